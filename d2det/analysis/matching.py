"""COCO's greedy matching of detections to ground truth, for a whole data set at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .objects import Detections, GroundTruth, Pairs, rank_in_image_and_class


@dataclass(frozen=True)
class Matches:
    """What became of each detection.

    Args:
        truth: (N,) int64, place of the matched object, or -1.
        ignored: (N,) bool, matched to an object that does not count.
    """

    truth: np.ndarray
    ignored: np.ndarray


class GreedyMatcher:
    """Matches pairs as `COCOeval.evaluateImg` does: by falling score, each to the best free object.

    In one image, the detections of one class choose one after the other, and see only the objects
    that they are paired with. Those of different classes do not take objects from each other: each
    class is evaluated by itself. So the best detections of all images and classes are matched
    first, in one step, then the second best of all, and so on.

    Args:
        truth: ground truth.
        detections: detections, no more for each image and class than are to be evaluated.
        pairs: those that may match; of several equally good ones the last object wins, as in COCO.
    """

    def __init__(self, truth: GroundTruth, detections: Detections, pairs: Pairs) -> None:
        rank = rank_in_image_and_class(detections)[pairs.detection]
        self.pairs = pairs.take(np.lexsort((-pairs.truth, -pairs.overlap, pairs.detection, rank)))
        self._rank = np.sort(rank)
        self._num_detections = len(detections)
        # One place to be taken for each object and class of detections.
        classes = int(detections.label.max(initial=0)) + 1
        key = self.pairs.truth * classes + detections.label[self.pairs.detection]
        _, self._slot = np.unique(key, return_inverse=True)

    def match(
        self,
        threshold: float,
        ignored: np.ndarray,
        reusable: np.ndarray,
        usable: np.ndarray | None = None,
    ) -> Matches:
        """Match at one threshold.

        An object that counts is preferred to any that is ignored, however much better that fits.

        Args:
            threshold: least overlap of a match.
            ignored: (P,) bool in the order of `self.pairs`: the object does not count.
            reusable: (P,) bool: the object may match any number of detections.
            usable: (P,) bool: pairs that exist at all; None: all.
        """
        # A threshold of 1 must survive rounding, as in pycocotools.
        allowed = self.pairs.overlap >= min(threshold, 1 - 1e-10)
        if usable is not None:
            allowed &= usable
        kept = np.flatnonzero(allowed)
        detection, slot = self.pairs.detection[kept], self._slot[kept]
        ignored, reusable, rank = ignored[kept], reusable[kept], self._rank[kept]
        taken = np.zeros(int(self._slot.max(initial=-1)) + 1, bool)
        chosen = np.full(self._num_detections, -1, np.int64)
        bounds = np.flatnonzero(np.diff(rank, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(bounds.tolist()):
            step = slice(start, stop)
            free = ~taken[slot[step]]
            for wanted in (False, True):
                open_pairs = free & (ignored[step] == wanted) & (chosen[detection[step]] < 0)
                candidates = start + np.flatnonzero(open_pairs)
                # The pairs of a detection stand together, the best first.
                best = np.diff(detection[candidates], prepend=-1) != 0
                first = candidates[best]
                chosen[detection[first]] = first
                taken[slot[first]] = ~reusable[first]
        matched = chosen >= 0
        place = np.full(self._num_detections, -1, np.int64)
        place[matched] = self.pairs.truth[kept[chosen[matched]]]
        is_ignored = np.zeros(self._num_detections, bool)
        is_ignored[matched] = ignored[chosen[matched]]
        return Matches(place, is_ignored)
