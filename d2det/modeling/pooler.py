"""RoI poolers by name: our own, then detectron2's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from d2det.core import DeformablePooling, DiscriminativePooling
from d2det.modeling.shapes import channels_and_strides

ROI_POOLER_REGISTRY = Registry("ROI_POOLER")
ROI_POOLER_REGISTRY.__doc__ = """
Poolers that `MODEL.ROI_BOX_HEAD.POOLER_TYPE` can name, besides those of detectron2's `ROIPooler`.

A registered class is called with (cfg, input_shape: dict[str, ShapeSpec]); the object, with
(features: list[Tensor (N, C, H, W)], boxes: list[Boxes], one an image), and returns (R, C, k, k).
It reads k from `MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION`, also where `MODEL.ROI_MASK_HEAD.POOLER_TYPE`
names it: it is then shown a config whose box head has the mask head's settings.
"""


@ROI_POOLER_REGISTRY.register()
class DiscriminativeRoIPooler(DiscriminativePooling):
    """`d2det.core.DiscriminativePooling` with detectron2's pooler interface (Sec. 3.2)."""

    @configurable
    def __init__(self, *, in_channels: int, strides: Sequence[float], **kwargs: Any) -> None:
        """Arguments are those of `d2det.core.DiscriminativePooling`."""
        super().__init__(in_channels, strides, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        channels, strides = channels_and_strides(input_shape, cfg.MODEL.ROI_HEADS.IN_FEATURES)
        drp = cfg.MODEL.ROI_BOX_HEAD.DRP
        return {
            "in_channels": channels,
            "strides": strides,
            "output_size": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
            "offset_resolution": drp.OFFSET_RESOLUTION,
            "offset_fc_dim": drp.OFFSET_FC_DIM,
            "gamma": drp.GAMMA,
            "sampling_ratio": drp.SAMPLING_RATIO,
            "offset_sampling_ratio": drp.OFFSET_SAMPLING_RATIO,
            "weighting": drp.WEIGHTING,
            "coefficient": drp.WEIGHT_COEFFICIENT,
            "per_level": drp.PER_LEVEL,
            "convention": drp.CONVENTION,
            "inclusive_boxes": cfg.MODEL.ROI_HEADS.INCLUSIVE_BOXES,
        }

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool the boxes of all images: (R, C, k, k)."""
        return super().forward(features, convert_boxes_to_pooler_format(box_lists))


@ROI_POOLER_REGISTRY.register()
class DeformRoIPooler(DeformablePooling):
    """Deformable RoI pooling (DCNv1): `d2det.core.DeformablePooling` for detectron2."""

    @configurable
    def __init__(self, *, in_channels: int, strides: Sequence[float], **kwargs: Any) -> None:
        """Arguments are those of `d2det.core.DeformablePooling`."""
        super().__init__(in_channels, strides, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        channels, strides = channels_and_strides(input_shape, cfg.MODEL.ROI_HEADS.IN_FEATURES)
        deform = cfg.MODEL.DEFORM_ROI_POOLING
        return {
            "in_channels": channels,
            "strides": strides,
            "output_size": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
            "offset_resolution": deform.OFFSET_RESOLUTION,
            "gamma": deform.GAMMA,
            "sampling_ratio": deform.SAMPLING_RATIO,
            "convention": deform.CONVENTION,
        }

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool the boxes of all images: (R, C, k, k)."""
        return super().forward(features, convert_boxes_to_pooler_format(box_lists))


@ROI_POOLER_REGISTRY.register()
class ModulatedDeformRoIPooler(DeformRoIPooler):
    """Modulated deformable RoI pooling (DCNv2, Eq. 2)."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        width = cfg.MODEL.DEFORM_ROI_POOLING.FC_DIM
        return {
            **super().from_config(cfg, input_shape),
            "modulated": True,
            "hidden_dims": (width, width),
        }


def build_box_pooler(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The pooler that `MODEL.ROI_BOX_HEAD.POOLER_TYPE` names: registered here, or detectron2's."""
    name = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    if name in ROI_POOLER_REGISTRY:
        return ROI_POOLER_REGISTRY.get(name)(cfg, input_shape)
    return build_plain_pooler(cfg, input_shape, name)


def build_mask_pooler(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The pooler that `MODEL.ROI_MASK_HEAD.POOLER_TYPE` names."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("POOLER_TYPE", "POOLER_RESOLUTION", "POOLER_SAMPLING_RATIO"):
        cfg.MODEL.ROI_BOX_HEAD[key] = cfg.MODEL.ROI_MASK_HEAD[key]
    return build_box_pooler(cfg, input_shape)


def build_plain_pooler(
    cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], pooler_type: str = "ROIAlignV2"
) -> ROIPooler:
    """detectron2's pooler for the box head's resolution.

    Raises:
        ValueError: a name that neither d2det nor detectron2 knows.
    """
    known = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
    if pooler_type not in known:
        ours = [name for name, _ in ROI_POOLER_REGISTRY]
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {pooler_type!r}; choose one of {[*ours, *known]}"
        )
    _, strides = channels_and_strides(input_shape, cfg.MODEL.ROI_HEADS.IN_FEATURES)
    return ROIPooler(
        output_size=cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
        scales=[1 / s for s in strides],
        sampling_ratio=cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
        pooler_type=pooler_type,
    )
