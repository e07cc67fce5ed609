"""D2Det's mask head, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from torch import nn

from d2det.core import MaskBranch
from d2det.modeling.dense_head import group_norm_or


@ROI_MASK_HEAD_REGISTRY.register()
class D2DetMaskHead(MaskBranch):
    """`d2det.core.MaskBranch`, built from a detectron2 config (Sec. 3.3).

    It reads the tower of dense regression, so that it has no pooler and is not called as
    detectron2's mask heads are: `D2DetROIHeads` hands it the tower's output.
    """

    masks_may_lack = True  # of objects in training: an empty mask counts as none

    @configurable
    def __init__(
        self,
        *,
        input_shape: ShapeSpec,
        num_classes: int,
        norm: str | Callable[[int], nn.Module] | None = "GN",
        norm_groups: int = 16,
        **kwargs: Any,
    ) -> None:
        """See `d2det.core.MaskBranch` for the other arguments.

        Args:
            input_shape: of the tower's output: channels, and height and width k.
            num_classes: K.
            norm: as detectron2's `get_norm` takes it; "GN" uses `norm_groups`.
            norm_groups: groups of "GN".
        """
        super().__init__(
            input_shape.channels,
            input_shape.height,
            num_classes,
            norm=group_norm_or(norm, norm_groups),
            **kwargs,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        dense, scoring = head.DENSE, head.SCORING
        _check(cfg)
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": head.CONV_DIM,
            "norm": dense.NORM,
            "norm_groups": dense.NORM_GROUPS,
            "class_agnostic": head.CLS_AGNOSTIC_MASK,
            "loss_weight": dense.LOSS_WEIGHT,
            "mask_threshold": dense.MASK_THRESH,
            "overlap_labels": dense.OVERLAP_LABELS,
            "overlap_threshold": dense.OVERLAP_LABEL_THRESH,
            "scoring": scoring.ENABLED,
            "score_fc_dim": scoring.FC_DIM,
            "score_num_fc": scoring.NUM_FC,
            "score_loss_weight": scoring.LOSS_WEIGHT,
            "score_min_iou": scoring.MIN_IOU,
            "ranking": scoring.RANKING,
            "iou_weight": scoring.IOU_WEIGHT,
        }


def _check(cfg: CfgNode) -> None:
    head, heads = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.NAME
    if not getattr(ROI_HEADS_REGISTRY.get(heads), "serves_dense_masks", False):
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.NAME {head.NAME} reads the tower of dense regression, which "
            f"MODEL.ROI_HEADS.NAME {heads} has not: set that to D2DetROIHeads, or choose a mask "
            "head of detectron2, such as MaskRCNNConvUpsampleHead"
        )
    if not cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.ENABLED:
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.NAME {head.NAME} reads the tower of dense regression: set "
            "MODEL.ROI_DENSE_REGRESSION_HEAD.ENABLED True, or choose a mask head of detectron2, "
            "such as MaskRCNNConvUpsampleHead"
        )
    if head.DENSE.NORM == "GN" and head.CONV_DIM % head.DENSE.NORM_GROUPS:
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.CONV_DIM {head.CONV_DIM} is not a multiple of DENSE.NORM_GROUPS "
            f"{head.DENSE.NORM_GROUPS}"
        )
