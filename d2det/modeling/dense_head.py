"""The dense regression head of `D2DetROIHeads`, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from torch import nn

from d2det.core import DenseRegression

ROI_DENSE_REGRESSION_HEAD_REGISTRY = Registry("ROI_DENSE_REGRESSION_HEAD")
ROI_DENSE_REGRESSION_HEAD_REGISTRY.__doc__ = """
Heads that `MODEL.ROI_DENSE_REGRESSION_HEAD.NAME` can name.

A registered class is called with (cfg, input_shape: ShapeSpec of the pooled features) and offers
`forward`, `losses` and `boxes` as `d2det.core.DenseRegression` does; beside `D2DetMaskHead` also
`tower`, with `CONV_DIM` channels of half the pooled side, `predict`, and the `overlap` of `losses`.
"""


@ROI_DENSE_REGRESSION_HEAD_REGISTRY.register()
class DenseLocalRegressionHead(DenseRegression):
    """`d2det.core.DenseRegression`, built from a detectron2 config (Sec. 3.1)."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: ShapeSpec,
        norm: str | Callable[[int], nn.Module] | None = "GN",
        norm_groups: int = 36,
        **kwargs: Any,
    ) -> None:
        """See `d2det.core.DenseRegression` for the other arguments.

        Args:
            input_shape: of the pooled features; their channels are read.
            norm: as detectron2's `get_norm` takes it; "GN" uses `norm_groups`.
            norm_groups: groups of "GN".
        """
        super().__init__(input_shape.channels, norm=group_norm_or(norm, norm_groups), **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        dense = cfg.MODEL.ROI_DENSE_REGRESSION_HEAD
        if dense.NORM == "GN" and dense.CONV_DIM % dense.NORM_GROUPS:
            raise ValueError(
                f"MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM {dense.CONV_DIM} is not a multiple of "
                f"NORM_GROUPS {dense.NORM_GROUPS}"
            )
        return {
            "input_shape": input_shape,
            "conv_dim": dense.CONV_DIM,
            "num_conv": dense.NUM_CONV,
            "norm": dense.NORM,
            "norm_groups": dense.NORM_GROUPS,
            "init_offset": dense.INIT_OFFSET,
            "predict_overlap": dense.OVERLAP,
            "overlap_margin": dense.OVERLAP_MARGIN,
            "overlap_threshold": dense.OVERLAP_THRESH,
            "loss_weight": dense.LOSS_WEIGHT,
            "overlap_loss_weight": dense.OVERLAP_LOSS_WEIGHT,
        }


def group_norm_or(
    norm: str | Callable[[int], nn.Module] | None, groups: int
) -> Callable[[int], nn.Module] | None:
    """What makes a normalisation layer: "GN" of `groups`, or detectron2's of that name."""
    if norm is None or norm == "":
        return None
    if norm == "GN":
        return partial(nn.GroupNorm, groups)
    return lambda channels: get_norm(norm, channels)


def build_dense_regression_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """The head that `MODEL.ROI_DENSE_REGRESSION_HEAD.NAME` names."""
    name = cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.NAME
    return ROI_DENSE_REGRESSION_HEAD_REGISTRY.get(name)(cfg, input_shape)
