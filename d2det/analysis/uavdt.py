"""UAVDT's own average precision, as its toolkit computes it (CalculateDetectionPR_overall).

Classes are pooled; detections strictly inside an ignore region are dropped beforehand; each
detection, by falling score, takes the free object that it overlaps most, if their IoU reaches the
threshold. The area under the interpolated curve is VOC's.
"""

from __future__ import annotations

import numpy as np

from .matching import GreedyMatcher
from .objects import Detections, GroundTruth, overlapping_pairs
from .voc import average_precision

# The toolkit reads no ignore regions for these sequences.
WITHOUT_REGIONS = ("M0209", "M0801")


def strictly_inside(
    image: np.ndarray, box: np.ndarray, region_image: np.ndarray, region: np.ndarray
) -> np.ndarray:
    """Which boxes lie strictly inside a region of their image: no edge touches.

    Args:
        image: (N,) int64, images of the boxes.
        box: (N, 4) left, top, width, height.
        region_image: (M,) int64.
        region: (M, 4) left, top, width, height.

    Returns:
        (N,) bool.
    """
    inside = np.zeros(len(image), bool)
    order = np.argsort(region_image, kind="stable")
    first = np.searchsorted(region_image[order], image, side="left")
    count = np.searchsorted(region_image[order], image, side="right") - first
    low, high = box[:, :2], box[:, :2] + box[:, 2:]
    for n in range(int(count.max(initial=0))):  # the n-th region of each image
        some = np.flatnonzero(count > n)
        mine = region[order[first[some] + n]]
        within = (low[some] > mine[:, :2]) & (high[some] < mine[:, :2] + mine[:, 2:])
        inside[some] |= within.all(axis=1)
    return inside


def toolkit_average_precision(
    truth: GroundTruth, detections: Detections, iou_threshold: float = 0.7
) -> float:
    """Average precision over all classes together.

    Args:
        truth: ground truth; crowd regions are left out.
        detections: without those in ignore regions; their classes do not matter.
        iou_threshold: least IoU, itself included.

    Returns:
        Between 0 and 1; NaN without ground truth.
    """
    truth = truth.take(~truth.crowd)
    pooled = Detections(**{**vars(detections), "label": np.zeros(len(detections), np.int64)})
    pairs = overlapping_pairs(truth, pooled, iou_threshold)
    matcher = GreedyMatcher(truth, pooled, pairs)
    never = np.zeros(len(matcher.pairs.truth), bool)
    right = matcher.match(iou_threshold, ignored=never, reusable=never).truth >= 0
    order = np.lexsort((np.arange(len(pooled)), pooled.image, -pooled.score))
    return average_precision(right[order], len(truth))
