"""What average precision is lost to: the settings of COCO's error analysis (D2Det, Figure 5).

Each setting forgives more than the one before it, so that no precision-recall curve lies below an
earlier one:

    C75  IoU of at least 0.75
    C50  IoU of at least 0.5
    Loc  IoU of at least 0.1; a second detection of one object is still wrong
    Sim  as Loc, and confusions within the supercategory are ignored
    Oth  as Sim, and confusions with any class are ignored
    BG   no false positive is left: precision 1 up to the highest recall
    FN   nothing is missed either: precision 1

After Hoiem et al., Diagnosing Error in Object Detectors, ECCV 2012, as COCO's own API (analyze() of
its Matlab version) defines it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .matching import GreedyMatcher, Matches
from .objects import Detections, GroundTruth, overlapping_pairs, rank_in_image_and_class

SETTINGS = ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")
# Square pixels, both ends included, as in COCO.
AREAS = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
RECALLS = np.linspace(0.0, 1.0, 101)
CONFUSIONS = ("match", "crowd")
_LOOSE = 0.1  # IoU of Loc and of all later settings


def error_curves(
    truth: GroundTruth,
    detections: Detections,
    supercategory: np.ndarray,
    areas: Mapping[str, tuple[float, float]] = AREAS,
    *,
    max_detections: int = 100,
    confusions: str = "match",
) -> np.ndarray:
    """Precision at the recalls 0, 0.01, ..., 1 for each size range, setting and class.

    C75 and C50 are COCO's precisions at these thresholds. In Sim and Oth, a detection that matches
    no object of its class may match one of another class, and is then neither right nor wrong; what
    matches in Loc matches here too.

    Args:
        truth: ground truth. Crowd regions are ignored in every setting.
        detections: with the same image places and labels.
        supercategory: (K,) int64 for each class; -1: it has none, and so no similar classes.
        areas: smallest and largest area of each range, in square pixels.
        max_detections: the best ones of each image and class that are evaluated.
        confusions: "match": an object of another class matches at IoU 0.1, and once, as in COCO's
            analysis. "crowd": it is treated as a crowd region, so that a detection that lies on it
            by a tenth of its own area matches, any number of times, as in MMDetection's tool.

    Returns:
        (A, 7, K, 101) float64, the settings in the order of `SETTINGS`; NaN for classes without
        ground truth in the range.

    Raises:
        ValueError: an unknown `confusions`, or labels that `supercategory` does not cover.
    """
    if confusions not in CONFUSIONS:
        raise ValueError(f"confusions must be one of {CONFUSIONS}, not {confusions!r}")
    classes = len(supercategory)
    for labels in (truth.label, detections.label):
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels must lie in [0, {classes - 1}], found {np.unique(labels)}")
    kept = rank_in_image_and_class(detections) < max_detections
    detections = detections.take(kept)
    pairs = overlapping_pairs(
        truth, detections, _LOOSE, other_classes_as_crowd=confusions == "crowd"
    )
    matcher = GreedyMatcher(truth, detections, pairs)
    pairs = matcher.pairs
    # pycocotools concatenates images: among equal scores of a class, the earlier image comes first.
    order = np.lexsort(
        (np.arange(len(detections)), detections.image, -detections.score, detections.label)
    )
    bounds = np.searchsorted(detections.label[order], np.arange(classes + 1))

    found, meant = detections.label[pairs.detection], truth.label[pairs.truth]
    same = found == meant
    similar = same | ((supercategory[found] == supercategory[meant]) & (supercategory[found] >= 0))
    reusable = truth.crowd[pairs.truth]
    if confusions == "crowd":
        reusable = reusable | ~same
    curves = np.full((len(areas), len(SETTINGS), classes, len(RECALLS)), np.nan)
    for a, (low, high) in enumerate(areas.values()):
        counts = ~truth.crowd & (truth.area >= low) & (truth.area <= high)
        number = np.bincount(truth.label[counts], minlength=classes)
        outside = (detections.area < low) | (detections.area > high)
        ignored = ~counts[pairs.truth] | ~same
        settings = [(0.75, same), (0.5, same), (_LOOSE, same), (_LOOSE, similar), (_LOOSE, None)]
        for s, (threshold, usable) in enumerate(settings):
            matches = matcher.match(threshold, ignored, reusable, usable)
            right, wrong = _judge(matches, outside)
            for k in np.flatnonzero(number):
                mine = order[bounds[k] : bounds[k + 1]]
                curves[a, s, k] = precision_at_recalls(right[mine], wrong[mine], int(number[k]))
        there = number > 0
        curves[a, 5, there] = curves[a, 4, there] > 0
        curves[a, 6, there] = 1.0
    return curves


def _judge(matches: Matches, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives; what is ignored is neither."""
    matched = matches.truth >= 0
    return matched & ~matches.ignored, ~matched & ~outside


def precision_at_recalls(right: np.ndarray, wrong: np.ndarray, number: int) -> np.ndarray:
    """COCO's interpolated precision: the best one at each recall of `RECALLS` or beyond it.

    Args:
        right, wrong: (N,) bool, true and false positives by falling score.
        number: of objects to be found, at least 1.

    Returns:
        (101,) float64; 0 where the recall is not reached.
    """
    hits, misses = np.cumsum(right, dtype=float), np.cumsum(wrong, dtype=float)
    precision = hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(hits / number, RECALLS, side="left")
    return np.append(precision, 0.0)[np.minimum(place, len(precision))]
