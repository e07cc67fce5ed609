"""Average precision as PASCAL VOC defines it, for boxes from any data set."""

from __future__ import annotations

import numpy as np

from .objects import Detections, GroundTruth, overlapping_pairs


def average_precision(right: np.ndarray, number: int, *, eleven_point: bool = False) -> float:
    """Average precision of ranked detections.

    Args:
        right: (N,) bool, by falling score: a true positive, else a false one.
        number: of objects to be found.
        eleven_point: VOC 2007's mean of the best precisions at recalls of 0, 0.1, ..., 1 and
            beyond; else the area under the interpolated curve (VOC 2010 and later).

    Returns:
        Between 0 and 1; NaN where there is nothing to be found.
    """
    if number == 0:
        return float("nan")
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if eleven_point:
        # In whole numbers, so that a recall of 0.3 is reached when it is.
        needed = np.arange(11) * number
        return float(best[np.searchsorted(hits * 10, needed, side="left")].mean())
    # The recall rises by 1 / number with each true positive.
    return float(best[:-1][np.asarray(right, bool)].sum() / number)


def voc_average_precision(
    truth: GroundTruth,
    detections: Detections,
    num_classes: int,
    iou_threshold: float = 0.7,
    *,
    eleven_point: bool = False,
) -> np.ndarray:
    """PASCAL VOC's average precision of each class.

    By falling score, a detection belongs to the object of its class and image that it overlaps
    most. It is right if their IoU reaches the threshold and no earlier detection claimed this
    object; there is no second choice, where COCO's matching looks for another free object. What
    belongs to no object and overlaps a crowd region of its class by that share of its own area is
    neither right nor wrong. Boxes are continuous: width is x2 - x1, without VOC's "+1".

    Args:
        truth: ground truth.
        detections: with the same image places and labels.
        num_classes: K.
        iou_threshold: least IoU, itself included.
        eleven_point: see `average_precision`.

    Returns:
        (K,) float64; NaN for classes without ground truth.
    """
    right, judged = voc_matches(truth, detections, iou_threshold)
    order = np.lexsort((np.arange(len(detections)), detections.image, -detections.score))
    order = order[judged[order]]
    result = np.full(num_classes, np.nan)
    for k in range(num_classes):
        mine = order[detections.label[order] == k]
        number = int(((truth.label == k) & ~truth.crowd).sum())
        result[k] = average_precision(right[mine], number, eleven_point=eleven_point)
    return result


def voc_matches(
    truth: GroundTruth, detections: Detections, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which count at all.

    Returns:
        Two (N,) bool arrays: true positives; detections that are not ignored.
    """
    right = np.zeros(len(detections), bool)
    judged = np.ones(len(detections), bool)
    pairs = overlapping_pairs(truth, detections, iou_threshold, same_class=True)
    real = pairs.take(~truth.crowd[pairs.truth])
    # The best object of each detection; of equal ones the first, as in VOC's code.
    real = real.take(np.lexsort((real.truth, -real.overlap, real.detection)))
    best = real.take(np.diff(real.detection, prepend=-1) != 0)
    # The first detection of each object.
    score, image = detections.score[best.detection], detections.image[best.detection]
    best = best.take(np.lexsort((best.detection, image, -score, best.truth)))
    right[best.detection[np.diff(best.truth, prepend=-1) != 0]] = True
    in_crowd = pairs.detection[truth.crowd[pairs.truth]]
    judged[in_crowd] = False
    judged[real.detection] = True
    return right, judged
