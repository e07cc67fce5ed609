"""D2Det's RoI heads for torchvision's `GeneralizedRCNN`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from d2det.core import (
    DenseRegression,
    DetectionSettings,
    DiscriminativePooling,
    MaskBranch,
    MaskTargets,
    MultiLevelRoIAlign,
    crop_masks,
    dense_candidates,
    dense_samples,
    detect,
    from_inclusive,
    image_index,
    split_by_image,
    to_inclusive,
)
from d2det.core.detection import DenseSamples


class ClassificationHead(nn.Sequential):
    """The FC layers of the classification branch; names as in detectron2's box head."""

    def __init__(self, in_features: int, fc_dim: int, num_fc: int = 2) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i in range(1, num_fc + 1):
            layer = nn.Linear(in_features, fc_dim)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
            layers |= {f"fc{i}": layer, f"fc_relu{i}": nn.ReLU()}
            in_features = fc_dim
        super().__init__(layers)


class ClassScores(nn.Module):
    """Class logits; the layer has detectron2's name."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (R, K + 1), background last, of features (R, C)."""
        return self.cls_score(features)


class D2DetRoIHeads(RoIHeads):
    """Discriminative pooling says what an object is, dense local regression where (Sec. 3).

    Inputs and outputs are torchvision's: labels count from 1, 0 being background. Parameters have
    the names and meaning of the detectron2 host's `D2DetROIHeads` (background is the last row).

    Args:
        box_pooler, box_head, box_predictor: the classification branch: RoI features (R, C, k, k),
            their FC features (R, F), and logits (R, K + 1).
        dense_pooler, dense_head: the regression branch: RoI features (R, C, 2k, 2k), predictions.
        feature_names: feature maps that are pooled, fine to coarse.
        mask_head: masks on the tower of `dense_head` (Sec. 3.3); None for boxes alone.
        num_classes: K, without background.
        settings: from scores to detections.
        jitter, max_positive_per_image: see `d2det.core.detection.dense_samples`.
        cls_loss_weight: weight of the classification loss.
        inclusive_boxes: the branches see boxes that name their last pixel, as the releases' weights
            were trained on.
        fg_iou_thresh, bg_iou_thresh, batch_size_per_image, positive_fraction: as in torchvision.
    """

    def __init__(
        self,
        *,
        box_pooler: DiscriminativePooling | MultiLevelRoIAlign,
        box_head: nn.Module,
        box_predictor: nn.Module,
        dense_pooler: MultiLevelRoIAlign,
        dense_head: DenseRegression,
        feature_names: Sequence[str],
        num_classes: int,
        settings: DetectionSettings,
        mask_head: MaskBranch | None = None,
        jitter: float = 0.15,
        max_positive_per_image: int = 96,
        cls_loss_weight: float = 2.0,
        inclusive_boxes: bool = False,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
    ) -> None:
        super().__init__(
            None, None, None, fg_iou_thresh, bg_iou_thresh, batch_size_per_image,
            positive_fraction, None, settings.score_threshold, settings.nms_threshold,
            settings.detections_per_image,
        )  # fmt: skip
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.dense_pooler = dense_pooler
        self.dense_head = dense_head
        self.mask_head = mask_head
        self.feature_names = tuple(feature_names)
        self.num_classes = num_classes
        self.settings = settings
        self.jitter = jitter
        self.max_positive_per_image = max_positive_per_image
        self.cls_loss_weight = cls_loss_weight
        self.inclusive_boxes = inclusive_boxes

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training, else detections.

        Args:
            features: feature maps (N, C, Hl, Wl) by name.
            proposals: (R_i, 4) of each image, in pixels.
            image_shapes: height and width of each image before padding.
            targets: in training, of each image "boxes" (G, 4) and "labels" (G,) from 1; with a
                mask head also "masks" (G, H, W), where an image or an object has them.

        Returns:
            Detections of each image ("boxes", "labels" from 1, "scores"; with a mask head "masks"
            (M, 1, 4k, 4k) and "mask_scores", which rank the masks; in training none), and in
            training the losses "loss_classifier", "loss_dense_reg", "loss_overlap", "loss_mask"
            and "loss_mask_iou".
        """
        maps = [features[name] for name in self.feature_names]
        if self.training:
            proposals, matches, labels, _ = self.select_training_samples(proposals, targets)
        images = image_index([len(p) for p in proposals], maps[0].device)
        boxes = torch.cat(proposals)
        logits = self.box_predictor(self.box_head(self.box_pooler(maps, self._rois(images, boxes))))
        sizes = boxes.new_tensor(image_shapes)
        if not self.training:
            return self._detections(maps, logits, boxes, images, sizes), {}
        assert targets is not None
        gt_classes = self._to_core(torch.cat(labels))
        loss = F.cross_entropy(logits.float(), gt_classes, reduction="sum")
        losses = {"loss_classifier": loss * self.cls_loss_weight / max(gt_classes.numel(), 1)}
        samples = dense_samples(
            boxes,
            gt_classes,
            images,
            sizes,
            num_classes=self.num_classes,
            max_positive_per_image=self.max_positive_per_image,
            jitter=self.jitter,
        )
        gt_boxes = torch.cat(
            # Images without objects match a box that no positive proposal refers to.
            [
                t["boxes"].to(p.dtype)[m] if len(t["boxes"]) else p
                for t, m, p in zip(targets, matches, proposals, strict=True)
            ]
        )[samples.rois]
        rois = self._rois(samples.images, samples.boxes)
        trunk = self.dense_head.tower(self.dense_pooler(maps, rois))
        overlap = None
        if self.mask_head is not None:
            mask_targets = self._mask_targets(samples, matches, targets)
            classes = gt_classes[samples.rois]
            losses.update(self.mask_head.losses(trunk, classes, mask_targets)[0])
            overlap = self.mask_head.overlap(mask_targets)
        prediction = self.dense_head.predict(trunk)
        seen, gt_seen = self._seen(samples.boxes), self._seen(gt_boxes)
        losses.update(self.dense_head.losses(prediction, seen, gt_seen, overlap)[0])
        return [], losses

    def _mask_targets(
        self, samples: DenseSamples, matches: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> MaskTargets:
        assert self.mask_head is not None
        side, objects = self.mask_head.side, torch.cat(matches)[samples.rois]
        counts = torch.bincount(samples.images, minlength=len(targets)).tolist()
        parts = []
        for target, index, rois in zip(
            targets, objects.split(counts), samples.boxes.split(counts), strict=True
        ):
            if "masks" not in target or len(index) == 0:
                parts.append(MaskTargets.none(len(rois), side, rois.device))
                continue
            masks = target["masks"] > 0
            height, width = masks.shape[1:]
            frames = rois.new_tensor([0, 0, width, height]).expand(len(masks), 4)
            parts.append(crop_masks(masks, frames, index, rois, side))
        return MaskTargets.cat(parts)

    def check_targets(self, targets: list[dict[str, Tensor]] | None) -> None:
        """Refuse labels outside of 1 to K, which the losses would turn into nonsense or a crash."""
        super().check_targets(targets)
        for i, target in enumerate(targets or []):
            labels = target["labels"]
            if (
                labels.numel()
                and not 1 <= int(labels.min()) <= int(labels.max()) <= self.num_classes
            ):
                raise ValueError(
                    f"targets[{i}]['labels'] lie in [{int(labels.min())}, {int(labels.max())}], "
                    f"but this model has {self.num_classes} classes, numbered from 1 (0 is "
                    "background): set num_classes to the data's classes plus one"
                )

    def _to_core(self, labels: Tensor) -> Tensor:
        """torchvision's labels, 0 being background, as classes of which the last is background."""
        return torch.where(labels > 0, labels - 1, self.num_classes)

    def _detections(
        self, maps: list[Tensor], logits: Tensor, boxes: Tensor, images: Tensor, sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        def regress(images: Tensor, boxes: Tensor) -> Tensor:
            prediction = self.dense_head(self.dense_pooler(maps, self._rois(images, boxes)))
            moved = self.dense_head.boxes(prediction, self._seen(boxes))
            return from_inclusive(moved) if self.inclusive_boxes else moved

        candidates = dense_candidates(boxes, logits, images, sizes, self.settings, regress)
        found = detect(candidates, self.settings, len(sizes))
        results = [
            {"boxes": image.boxes, "labels": image.classes + 1, "scores": image.scores}
            for image in split_by_image(found, len(sizes))
        ]
        if self.mask_head is not None:
            self._add_masks(maps, results)
        return results

    def _add_masks(self, maps: list[Tensor], results: list[dict[str, Tensor]]) -> None:
        """Masks of the regressed boxes, which are pooled anew."""
        assert self.mask_head is not None
        counts = [len(found["boxes"]) for found in results]
        boxes = torch.cat([found["boxes"] for found in results])
        rois = self._rois(image_index(counts, boxes.device), boxes)
        masks, scores = self.mask_head.predict(
            self.dense_head.tower(self.dense_pooler(maps, rois)),
            torch.cat([found["labels"] for found in results]) - 1,
            torch.cat([found["scores"] for found in results]),
        )
        for found, mask in zip(results, masks.split(counts), strict=True):
            found["masks"] = mask
        if scores is not None:
            for found, score in zip(results, scores.split(counts), strict=True):
                found["mask_scores"] = score

    def _rois(self, images: Tensor, boxes: Tensor) -> Tensor:
        """(R, 5): batch index and box, as the poolers see it."""
        return torch.cat((images[:, None].to(boxes.dtype), self._seen(boxes)), dim=1)

    def _seen(self, boxes: Tensor) -> Tensor:
        """Boxes as the branches see them."""
        return to_inclusive(boxes) if self.inclusive_boxes else boxes
