"""The detector's two stages after the proposals, on plain tensors: score, regress, suppress.

Hosts supply proposals and features and turn the result into their own structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from d2det.core.jitter import jitter_boxes
from d2det.core.sampling import sample_positives
from d2det.core.selection import (
    Candidates,
    SoftNMS,
    clip_boxes,
    nms_candidates,
    suppress,
    threshold_candidates,
)


@dataclass(frozen=True)
class DetectionSettings:
    """How scores and boxes become detections (Sec. 4; the releases' test settings)."""

    score_threshold: float = 0.03  # scores must exceed it
    nms_threshold: float = 0.5  # IoU, between proposals of one class
    pre_regression_topk: int = 125  # candidates an image that are regressed
    detections_per_image: int = 100
    soft_nms: SoftNMS | None = field(default_factory=SoftNMS)  # on the regressed boxes


def dense_candidates(
    proposals: Tensor,
    logits: Tensor,
    images: Tensor,
    image_sizes: Tensor,
    settings: DetectionSettings,
    regress: Callable[[Tensor, Tensor], Tensor],
) -> Candidates:
    """Scored and regressed boxes, before those of a class compete.

    Args:
        proposals: (R, 4), in pixels.
        logits: (R, K + 1), background last.
        images: (R,) int64, the image of each proposal.
        image_sizes: (N, 2), heights and widths.
        settings: thresholds and limits.
        regress: from images (M,) and boxes (M, 4) of the candidates to their regressed boxes.

    Returns:
        The best proposals that NMS leaves, moved by regression and clipped to their images.
    """
    candidates = threshold_candidates(
        proposals, logits.float().softmax(dim=1), images, settings.score_threshold
    )
    candidates = nms_candidates(
        candidates,
        iou_threshold=settings.nms_threshold,
        limit=settings.pre_regression_topk,
        num_images=image_sizes.shape[0],
    )
    boxes = regress(candidates.images, candidates.boxes)
    return candidates._replace(boxes=clip_boxes(boxes, image_sizes[candidates.images]))


def detect(candidates: Candidates, settings: DetectionSettings, num_images: int) -> Candidates:
    """Detections of a batch of images: soft-NMS, and the best of each.

    Returns:
        In falling score order over all images; see `split_by_image`.
    """
    return suppress(
        candidates,
        settings.soft_nms,
        limit=settings.detections_per_image,
        num_images=num_images,
    )


class DenseSamples(NamedTuple):
    """The P positive proposals that train dense regression."""

    rois: Tensor  # (P,) int64, into the proposals
    images: Tensor  # (P,) int64
    boxes: Tensor  # (P, 4), jittered


def dense_samples(
    proposals: Tensor,
    gt_classes: Tensor,
    images: Tensor,
    image_sizes: Tensor,
    *,
    num_classes: int,
    max_positive_per_image: int,
    jitter: float,
) -> DenseSamples:
    """Choose and jitter the positive proposals that train dense regression (Sec. 3.1).

    Args:
        proposals: (R, 4), in pixels, already matched.
        gt_classes: (R,) int64 in [0, K], K being background.
        images: (R,) int64, the image of each proposal.
        image_sizes: (N, 2), heights and widths.
        num_classes: K.
        max_positive_per_image: their number is limited to this, times N.
        jitter: see `jitter_boxes`.
    """
    rois = sample_positives(gt_classes, num_classes, max_positive_per_image * len(image_sizes))
    images = images[rois]
    boxes = jitter_boxes(proposals[rois].detach(), image_sizes[images], jitter)
    return DenseSamples(rois, images, boxes)


def image_index(counts: list[int], device: torch.device) -> Tensor:
    """The image of each box (R,), given the number of boxes of each image."""
    repeats = torch.tensor(counts, dtype=torch.int64, device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(
        repeats, output_size=sum(counts)
    )


def split_by_image(detections: Candidates, num_images: int) -> list[Candidates]:
    """The detections of each image, in falling score order."""
    order = detections.images.argsort(stable=True)
    counts = torch.bincount(detections.images, minlength=num_images).tolist()
    parts = [field_values[order].split(counts) for field_values in detections]
    return [Candidates(*image) for image in zip(*parts, strict=True)]
