"""D2Det's RoI heads for detectron2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2det.core import (
    Candidates,
    MultiLevelRoIAlign,
    SoftNMS,
    clip_boxes,
    jitter_boxes,
    nms_candidates,
    sample_positives,
    suppress,
    threshold_candidates,
)
from d2det.modeling.batch import check_finite, image_index, image_sizes, put_scalars
from d2det.modeling.box_branches import (
    ClassPredictor,
    build_classification_head,
    build_delta_branch,
    build_delta_predictor,
)
from d2det.modeling.dense_head import build_dense_regression_head
from d2det.modeling.dense_masks import DenseMaskROIHeads
from d2det.modeling.pooler import build_box_pooler
from d2det.modeling.shapes import channels_and_strides


@ROI_HEADS_REGISTRY.register()
class D2DetROIHeads(DenseMaskROIHeads):
    """Separate branches for what an object is and where it is (Sec. 3).

    The classification branch scores the proposals; the dense regression branch moves the best of
    them. All images of a batch go through each in one call. Without a dense head the second branch
    predicts plain box deltas: the paper's baseline.

    A `D2DetMaskHead` reads the tower of dense regression, in a second pooling from the regressed
    boxes. Other mask heads, and keypoint heads, are detectron2's, on the same boxes.
    """

    @configurable
    def __init__(
        self,
        *,
        dense_pooler: nn.Module | None = None,
        dense_head: nn.Module | None = None,
        delta_branch: nn.Module | None = None,
        jitter: float = 0.15,
        max_positive_per_image: int = 96,
        score_thresh: float = 0.03,
        nms_thresh: float = 0.5,
        pre_regression_topk: int = 125,
        detections_per_image: int = 100,
        soft_nms: SoftNMS | None = None,
        **kwargs: Any,
    ) -> None:
        """Besides the arguments of detectron2's `StandardROIHeads`:

        Args:
            dense_pooler, dense_head: the dense regression branch; both or neither. The pooler is
                called with the feature maps and RoIs (R, 5), as `d2det.core.MultiLevelRoIAlign`.
            delta_branch: without them, the branch whose features `box_predictor.bbox_pred` reads;
                None shares the classification branch's features.
            jitter: see `d2det.core.jitter_boxes`; training only.
            max_positive_per_image: positive RoIs for the dense branch, times the images.
            score_thresh: class scores must exceed it.
            nms_thresh: IoU for NMS on the proposals (dense), or on the boxes (deltas without
                `soft_nms`).
            pre_regression_topk: candidates an image that reach the dense branch.
            detections_per_image: best detections that are returned.
            soft_nms: settings of soft-NMS on the regressed boxes; None for none.

        Raises:
            ValueError: half a dense branch, one beside a delta branch, or training other heads on
                predicted boxes, of which this class has none in training.
        """
        super().__init__(**kwargs)
        if self.dense_masks and not hasattr(dense_head, "tower"):
            raise ValueError("D2DetMaskHead needs a dense_head with a tower to read")
        if (dense_head is None) != (dense_pooler is None):
            raise ValueError("dense_head and dense_pooler come together")
        if dense_head is not None and delta_branch is not None:
            raise ValueError("dense_head and delta_branch exclude each other")
        if self.train_on_pred_boxes:
            raise ValueError("D2DetROIHeads does not support TRAIN_ON_PRED_BOXES")
        self.dense_pooler = dense_pooler
        self.dense_head = dense_head
        self.delta_branch = delta_branch
        self.jitter = jitter
        self.max_positive_per_image = max_positive_per_image
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.pre_regression_topk = pre_regression_topk
        self.detections_per_image = detections_per_image
        self.soft_nms = soft_nms

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        heads, dense = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_DENSE_REGRESSION_HEAD
        soft = heads.SOFT_NMS
        arguments = super().from_config(cfg, input_shape)
        arguments.update(
            jitter=dense.JITTER,
            max_positive_per_image=dense.MAX_POSITIVE_PER_IMAGE,
            score_thresh=heads.SCORE_THRESH_TEST,
            nms_thresh=heads.NMS_THRESH_TEST,
            pre_regression_topk=heads.PRE_REGRESSION_TOPK,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            soft_nms=SoftNMS(soft.METHOD, soft.IOU_THRESH, soft.SIGMA, soft.MIN_SCORE)
            if soft.ENABLED
            else None,
        )
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        dense = cfg.MODEL.ROI_DENSE_REGRESSION_HEAD
        if dense.ENABLED and cfg.MODEL.ROI_HEADS.SHARED_BRANCH:
            raise ValueError(
                "MODEL.ROI_HEADS.SHARED_BRANCH shares the FC head of the baseline; set "
                "MODEL.ROI_DENSE_REGRESSION_HEAD.ENABLED to False with it"
            )
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        head = build_classification_head(cfg, input_shape)
        arguments = {
            "box_in_features": names,
            "box_pooler": build_box_pooler(cfg, input_shape),
            "box_head": head,
        }
        if not dense.ENABLED:
            arguments["box_predictor"] = build_delta_predictor(cfg, head.output_shape)
            if not cfg.MODEL.ROI_HEADS.SHARED_BRANCH:
                arguments["delta_branch"] = build_delta_branch(cfg, input_shape)
            return arguments
        shape = head.output_shape
        channels, strides = channels_and_strides(input_shape, names)
        side = dense.POOLER_RESOLUTION
        arguments["box_predictor"] = ClassPredictor(
            shape.channels * (shape.height or 1) * (shape.width or 1),
            cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_WEIGHT,
        )
        arguments["dense_pooler"] = MultiLevelRoIAlign(side, strides, dense.POOLER_SAMPLING_RATIO)
        arguments["dense_head"] = build_dense_regression_head(
            cfg, ShapeSpec(channels=channels, height=side, width=side)
        )
        return arguments

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        if not self.training:
            candidates = self.box_candidates(features, proposals)
            return self.detections(candidates, [p.image_size for p in proposals])
        maps = [features[name] for name in self.box_in_features]
        box_features = self.box_head(self.box_pooler(maps, [p.proposal_boxes for p in proposals]))
        if self.dense_head is None:
            predictions = self._delta_predictions(maps, box_features, proposals)
            return self.box_predictor.losses(predictions, proposals)
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        losses = self.box_predictor.losses(self.box_predictor(box_features), gt_classes)
        losses.update(self._dense_losses(maps, proposals))
        return losses

    def box_candidates(self, features: dict[str, Tensor], proposals: list[Instances]) -> Candidates:
        """Scored and regressed boxes of all images, before those of a class compete.

        Test-time augmentation pools them over its views and passes them on to `detections`.
        """
        maps = [features[name] for name in self.box_in_features]
        check_finite(maps)
        box_features = self.box_head(self.box_pooler(maps, [p.proposal_boxes for p in proposals]))
        if self.dense_head is None:
            predictions = self._delta_predictions(maps, box_features, proposals)
            candidates = self._delta_candidates(predictions, proposals)
        else:
            candidates = self._dense_candidates(maps, self.box_predictor(box_features), proposals)
        sizes = image_sizes(proposals, candidates.boxes)[candidates.images]
        return candidates._replace(boxes=clip_boxes(candidates.boxes, sizes))

    def detections(
        self,
        candidates: Candidates,
        sizes: list[tuple[int, int]],
        *,
        pooled: bool = False,
    ) -> list[Instances]:
        """What is left of the candidates once those of a class have competed.

        Args:
            candidates: of `box_candidates`, or several such of the same images pooled.
            sizes: height and width of each image.
            pooled: the candidates are those of several views. Where a model's boxes do not compete
                once they are moved (dense regression without soft-NMS), views would repeat each
                object: plain NMS at `nms_thresh` merges them.
        """
        if self.soft_nms is None and (pooled or self.dense_head is None):
            candidates = nms_candidates(
                candidates,
                iou_threshold=self.nms_thresh,
                limit=self.detections_per_image,
                num_images=len(sizes),
            )
        found = suppress(
            candidates, self.soft_nms, limit=self.detections_per_image, num_images=len(sizes)
        )
        order = found.images.argsort(stable=True)
        counts = torch.bincount(found.images, minlength=len(sizes)).tolist()
        results = []
        parts = (x[order].split(counts) for x in found[:3])
        for size, boxes, scores, classes in zip(sizes, *parts, strict=True):
            result = Instances(size)
            result.pred_boxes = Boxes(boxes)
            result.scores = scores
            result.pred_classes = classes
            results.append(result)
        return results

    def _dense_losses(self, maps: list[Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        images = image_index([len(p) for p in proposals], maps[0].device)
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        positive = sample_positives(
            gt_classes, self.num_classes, self.max_positive_per_image * len(proposals)
        )
        images = images[positive]
        # detectron2 gives the proposals of an image without objects no gt_boxes.
        gt_boxes = torch.cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )[positive]
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[positive]
        boxes = jitter_boxes(boxes.detach(), image_sizes(proposals, boxes)[images], self.jitter)
        features = self._dense_features(maps, images, boxes)
        put_scalars("dense_reg", {"num_rois": positive.numel()})
        if not self.dense_masks:
            losses, statistics = self.dense_head.losses(self.dense_head(features), boxes, gt_boxes)
            put_scalars("dense_reg", statistics)
            return losses
        trunk = self.dense_head.tower(features)
        targets, mask_losses = self._mask_losses(
            trunk, gt_classes[positive], proposals, positive, images, boxes
        )
        losses, statistics = self.dense_head.losses(
            self.dense_head.predict(trunk), boxes, gt_boxes, self.mask_head.overlap(targets)
        )
        put_scalars("dense_reg", statistics)
        return {**losses, **mask_losses}

    def _dense_candidates(
        self, maps: list[Tensor], logits: Tensor, proposals: list[Instances]
    ) -> Candidates:
        candidates = threshold_candidates(
            torch.cat([p.proposal_boxes.tensor for p in proposals]),
            logits.float().softmax(dim=1),
            image_index([len(p) for p in proposals], logits.device),
            self.score_thresh,
        )
        candidates = nms_candidates(
            candidates,
            iou_threshold=self.nms_thresh,
            limit=self.pre_regression_topk,
            num_images=len(proposals),
        )
        features = self._dense_features(maps, candidates.images, candidates.boxes)
        boxes = self.dense_head.boxes(self.dense_head(features), candidates.boxes)
        return candidates._replace(boxes=boxes)

    def _delta_predictions(
        self, maps: list[Tensor], box_features: Tensor, proposals: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        other = box_features
        if self.delta_branch is not None:
            other = self.delta_branch(maps, [p.proposal_boxes for p in proposals])
        return (
            self.box_predictor.cls_score(box_features.flatten(1)),
            self.box_predictor.bbox_pred(other.flatten(1)),
        )

    def _delta_candidates(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> Candidates:
        boxes = torch.cat(self.box_predictor.predict_boxes(predictions, proposals))
        scores = torch.cat(self.box_predictor.predict_probs(predictions, proposals))
        if boxes.shape[1] != 4:
            boxes = boxes.view(boxes.shape[0], self.num_classes, 4)
        images = image_index([len(p) for p in proposals], boxes.device)
        return threshold_candidates(boxes, scores, images, self.score_thresh)

    def _dense_features(self, maps: list[Tensor], images: Tensor, boxes: Tensor) -> Tensor:
        rois = torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1)
        return self.dense_pooler(maps, rois)
