"""detectron2's RoI heads with d2det's poolers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads

from d2det.modeling.pooler import ROI_POOLER_REGISTRY, build_box_pooler, build_mask_pooler


@ROI_HEADS_REGISTRY.register()
class DeformableROIHeads(StandardROIHeads):
    """Faster and Mask R-CNN as detectron2 has them, with any pooler of `ROI_POOLER_REGISTRY`.

    `POOLER_TYPE` of `MODEL.ROI_BOX_HEAD` and of `MODEL.ROI_MASK_HEAD` may name one, e.g.
    "ModulatedDeformRoIPooler"; with detectron2's names this is its `StandardROIHeads`.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(_plain(cfg), input_shape)
        if cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE in ROI_POOLER_REGISTRY:
            arguments["box_pooler"] = build_box_pooler(cfg, input_shape)
        return arguments

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_mask_head(_plain(cfg), input_shape)
        if arguments and cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE in ROI_POOLER_REGISTRY:
            arguments["mask_pooler"] = build_mask_pooler(cfg, input_shape)
        return arguments


def _plain(cfg: CfgNode) -> CfgNode:
    """The config with detectron2's pooler where it names one of ours, which it would refuse."""
    cfg = cfg.clone()
    cfg.defrost()
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        if head.POOLER_TYPE in ROI_POOLER_REGISTRY:
            head.POOLER_TYPE = "ROIAlignV2"
    return cfg
