"""RoI heads whose masks come from the tower of dense regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, build_mask_head
from detectron2.structures import Instances
from torch import Tensor

from d2det.core import MaskTargets
from d2det.modeling.batch import image_index, put_scalars
from d2det.modeling.mask_head import D2DetMaskHead
from d2det.modeling.mask_targets import mask_targets, share_masks
from d2det.modeling.standard_heads import DeformableROIHeads


class DenseMaskROIHeads(DeformableROIHeads):
    """What a `D2DetMaskHead` needs of `D2DetROIHeads`; with other mask heads it changes nothing.

    Subclasses have `dense_head`, with a `tower`, and `_dense_features`.
    """

    serves_dense_masks = True

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        if not cfg.MODEL.MASK_ON:
            return {}
        kind = ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)
        if not (isinstance(kind, type) and issubclass(kind, D2DetMaskHead)):
            return super()._init_mask_head(cfg, input_shape)
        dense = cfg.MODEL.ROI_DENSE_REGRESSION_HEAD
        grid = (dense.POOLER_RESOLUTION + 1) // 2
        shape = ShapeSpec(channels=dense.CONV_DIM, height=grid, width=grid)
        return {
            "mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "mask_head": build_mask_head(cfg, shape),
        }

    @property
    def dense_masks(self) -> bool:
        """Whether masks come from the tower of dense regression."""
        return self.mask_on and isinstance(self.mask_head, D2DetMaskHead)

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        if self.dense_masks:
            targets = share_masks(targets)
        return super().label_and_sample_proposals(proposals, targets)

    def _mask_losses(
        self,
        trunk: Tensor,
        gt_classes: Tensor,
        proposals: list[Instances],
        rows: Tensor,
        images: Tensor,
        boxes: Tensor,
    ) -> tuple[MaskTargets, dict[str, Tensor]]:
        """Targets and losses of the RoIs `boxes` (R, 4), whose trunk and classes are given.

        `rows` (R,) are their places among all proposals, `images` (R,) their images.
        """
        targets = mask_targets(proposals, rows, images, boxes, self.mask_head.side)
        losses, statistics = self.mask_head.losses(trunk, gt_classes, targets)
        put_scalars("mask", statistics)
        return targets, losses

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """In training nothing, as the losses come with dense regression's, from one tower.

        In inference, `pred_masks` and, with mask scoring, `mask_scores` of the `pred_boxes`, which
        are pooled anew. Boxes that are given without scores count as certain.
        """
        if not self.dense_masks:
            return super()._forward_mask(features, instances)
        if self.training:
            return {}
        maps = [features[name] for name in self.box_in_features]
        boxes = torch.cat([x.pred_boxes.tensor for x in instances]).float()
        classes = torch.cat([x.pred_classes for x in instances])
        scores = torch.cat(
            [x.scores if x.has("scores") else boxes.new_ones(len(x)) for x in instances]
        )
        counts = [len(x) for x in instances]
        pooled = self._dense_features(maps, image_index(counts, boxes.device), boxes)
        masks, ranks = self.mask_head.predict(self.dense_head.tower(pooled), classes, scores)
        for found, mask in zip(instances, masks.split(counts), strict=True):
            found.pred_masks = mask
        if ranks is not None:
            for found, rank in zip(instances, ranks.split(counts), strict=True):
                found.mask_scores = rank
        return instances
