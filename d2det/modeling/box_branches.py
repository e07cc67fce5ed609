"""The two RoI branches: classification, and a plain delta regression to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, build_box_head
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2det.modeling.pooler import build_plain_pooler
from d2det.modeling.shapes import channels_and_strides


class ClassPredictor(nn.Module):
    """Class scores of a RoI: FastRCNNOutputLayers without box deltas.

    Its one layer is called `cls_score` as there, so that a Faster R-CNN's weights load.
    """

    def __init__(self, in_features: int, num_classes: int, loss_weight: float) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (R, K + 1), background last, of features (R, C) or (R, C, h, w)."""
        return self.cls_score(features.flatten(1))

    def losses(self, logits: Tensor, gt_classes: Tensor) -> dict[str, Tensor]:
        """Cross-entropy "loss_cls", averaged over the RoIs; 0 where there are none."""
        _log_classification_stats(logits, gt_classes)
        total = F.cross_entropy(logits.float(), gt_classes, reduction="sum")
        return {"loss_cls": total * self.loss_weight / max(gt_classes.numel(), 1)}


class DeltaBranch(nn.Module):
    """The baseline's regression branch: RoIAlign, FC layers, their features for box deltas.

    It is a branch of its own, as the paper's baseline has it (Table 2: 38.0 against 37.7 AP with a
    shared head).
    """

    def __init__(self, pooler: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler
        self.head = head

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        return self.head(self.pooler(features, boxes))


def build_classification_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The FC layers of `MODEL.ROI_BOX_HEAD`, on features of its pooler's resolution."""
    channels, _ = channels_and_strides(input_shape, cfg.MODEL.ROI_HEADS.IN_FEATURES)
    side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    return build_box_head(cfg, ShapeSpec(channels=channels, height=side, width=side))


def build_delta_branch(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> DeltaBranch:
    """A second box head on plain RoIAlign features."""
    return DeltaBranch(
        build_plain_pooler(cfg, input_shape), build_classification_head(cfg, input_shape)
    )


def build_delta_predictor(cfg: CfgNode, head_shape: Any) -> FastRCNNOutputLayers:
    """detectron2's predictor, its classification loss weighted as `CLS_LOSS_WEIGHT` says."""
    weight = {
        "loss_cls": cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_WEIGHT,
        "loss_box_reg": cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT,
    }
    arguments = FastRCNNOutputLayers.from_config(cfg, head_shape)
    return FastRCNNOutputLayers(**{**arguments, "loss_weight": weight})
