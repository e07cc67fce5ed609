"""From scored boxes to detections: NMS on proposals, soft-NMS on refined boxes (Sec. 4).

All images of a batch are handled at once: an image and a class together form a group, and boxes
compete within their group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from d2det.ops import soft_nms

_COMPARED_AT_FIRST = 8  # candidates for each detection that is wanted


class Candidates(NamedTuple):
    """M scored boxes of a batch of images, in falling score order."""

    boxes: Tensor  # (M, 4), in pixels
    scores: Tensor  # (M,)
    classes: Tensor  # (M,) int64 in [0, K)
    images: Tensor  # (M,) int64, index in the batch
    rois: Tensor  # (M,) int64, index of the RoI that each comes from

    def take(self, index: Tensor) -> Candidates:
        """The candidates at `index` (or where a mask is true)."""
        return Candidates(*(x[index] for x in self))


@dataclass(frozen=True)
class SoftNMS:
    """Settings of `suppress`; see `d2det.ops.soft_nms`."""

    method: str = "linear"
    iou_threshold: float = 0.5
    sigma: float = 0.5
    min_score: float = 1e-3


def threshold_candidates(
    boxes: Tensor, scores: Tensor, images: Tensor, score_threshold: float
) -> Candidates:
    """Every pair of RoI and class whose score exceeds the threshold.

    Args:
        boxes: (R, 4), shared by the classes, or (R, K, 4).
        scores: (R, K + 1), the last column being background.
        images: (R,) int64.
        score_threshold: a score must be greater.
    """
    foreground = scores[:, :-1]
    rois, classes = (foreground > score_threshold).nonzero(as_tuple=True)
    chosen = foreground[rois, classes]
    order = chosen.argsort(descending=True, stable=True)
    rois, classes = rois[order], classes[order]
    chosen_boxes = boxes[rois] if boxes.dim() == 2 else boxes[rois, classes]
    return Candidates(chosen_boxes, chosen[order], classes, images[rois], rois)


def nms_candidates(
    candidates: Candidates, *, iou_threshold: float, limit: int, num_images: int
) -> Candidates:
    """Plain NMS within each image and class, then the best `limit` of each image.

    Whether a candidate is kept depends on better ones only. So the best few of each image are
    compared, and more of them as long as fewer than `limit` are kept: with the 1.2 million pairs of
    1000 proposals and LVIS's 1203 classes, a few thousand are looked at, and the result is that of
    comparing all.

    Args:
        candidates: in falling score order.
        iou_threshold: from which the worse of two boxes is dropped.
        limit: boxes an image.
        num_images: images in the batch.
    """
    images = candidates.images
    size = max(_COMPARED_AT_FIRST * limit, 1)
    if len(images) <= size:
        kept = candidates.take(_nms(candidates, iou_threshold))
        return _best_per_image(kept, limit, num_images)
    total = torch.bincount(images, minlength=num_images)
    rank = _rank_in_image(images, num_images)
    while True:
        best = candidates.take(rank <= size)
        kept = best.take(_nms(best, iou_threshold))
        found = torch.bincount(kept.images, minlength=num_images)
        if bool(((found >= limit) | (total <= size)).all()):
            return _best_per_image(kept, limit, num_images)
        size *= 4


def _nms(candidates: Candidates, iou_threshold: float) -> Tensor:
    boxes = candidates.boxes.double()
    # Groups are moved apart, so that one call serves them all; in float64 because coordinates of
    # 10^6 pixels would cost float32 the precision of the IoU.
    span = boxes.max() - boxes.min() + 1 if boxes.numel() else 1.0
    shifted = boxes + (_groups(candidates) * span)[:, None]
    return nms(shifted, candidates.scores.double(), iou_threshold)


def suppress(
    candidates: Candidates, settings: SoftNMS | None, *, limit: int, num_images: int
) -> Candidates:
    """Soft-NMS within each image and class, then the best `limit` of each image.

    Args:
        candidates: boxes that regression has moved; those without area are dropped.
        settings: None leaves the scores as they are.
        limit: detections an image.
        num_images: images in the batch.

    Returns:
        The detections of all images, in falling score order, with decayed scores.
    """
    sides = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    candidates = candidates.take((sides > 0).all(dim=1))
    if settings is not None:
        index, scores = soft_nms(
            candidates.boxes,
            candidates.scores,
            _groups(candidates),
            iou_threshold=settings.iou_threshold,
            method=settings.method,
            sigma=settings.sigma,
            min_score=settings.min_score,
        )
        candidates = candidates.take(index)._replace(scores=scores)
    else:
        candidates = candidates.take(candidates.scores.argsort(descending=True, stable=True))
    return _best_per_image(candidates, limit, num_images)


def pool_candidates(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of several views of the same images as one, in falling score order.

    They compete afterwards, in `suppress`, as if one view had found them all: an object is kept
    with the box of the view that is surest of it.

    Args:
        parts: one or more, in the same coordinates, `images` meaning the same in all.

    Returns:
        `rois` are positions among the candidates of all parts, one part after the other. Of equal
        scores the earlier part's goes first.
    """
    joined = Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    joined = joined._replace(rois=torch.arange(len(joined.scores), device=joined.scores.device))
    return joined.take(joined.scores.argsort(descending=True, stable=True))


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes (M, 4) cut at the border of their images, whose heights and widths are given (M, 2)."""
    return boxes.clamp(min=0).minimum(image_sizes.to(boxes.dtype).flip(1).repeat(1, 2))


def _groups(candidates: Candidates) -> Tensor:
    """One number for each pair of image and class (M,), without asking the device for K."""
    if candidates.classes.numel() == 0:
        return candidates.classes
    return candidates.images * (candidates.classes.max() + 1) + candidates.classes


def _best_per_image(candidates: Candidates, limit: int, num_images: int) -> Candidates:
    return candidates.take(_rank_in_image(candidates.images, num_images) <= limit)


def _rank_in_image(images: Tensor, num_images: int) -> Tensor:
    """The place (M,), from 1, of each candidate among those of its image, in their order."""
    member = images[:, None] == torch.arange(num_images, device=images.device)
    return member.cumsum(dim=0).gather(1, images[:, None])[:, 0]
