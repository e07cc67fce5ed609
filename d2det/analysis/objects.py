"""Ground truth and detections as flat arrays, and the pairs of them that overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pycocotools.mask as mask_util


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What ground truth and detections have in common.

    Args:
        image: (N,) int64, place of the image in the data set's order.
        label: (N,) int64, class from 0.
        box: (N, 4) float64, left, top, width, height in pixels.
        area: (N,) float64, in square pixels; decides which size range an object belongs to.
        masks: (N,) objects, COCO's compressed run lengths; overlap is then that of the masks.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: np.ndarray) -> Self:
        """The objects at `index`: positions, or a mask."""
        arrays = {name: value[index] for name, value in vars(self).items() if value is not None}
        return replace(self, **arrays)


@dataclass(frozen=True, kw_only=True)
class GroundTruth(Objects):
    """Annotated objects.

    Args:
        crowd: (N,) bool, regions to ignore: an overlap is measured against the detection's own
            area, and any number of detections may match.
    """

    crowd: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Detections(Objects):
    """Detected objects.

    Args:
        score: (N,) float64.
    """

    score: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """A detection and an object in the same image.

    Args:
        detection, truth: (P,) int64, their places.
        overlap: (P,) float64, IoU; against crowd regions, the share of the detection's area.
    """

    detection: np.ndarray
    truth: np.ndarray
    overlap: np.ndarray

    def take(self, index: np.ndarray) -> Pairs:
        """The pairs at `index`: positions, or a mask."""
        return Pairs(self.detection[index], self.truth[index], self.overlap[index])


def overlapping_pairs(
    truth: GroundTruth,
    detections: Detections,
    at_least: float,
    *,
    same_class: bool = False,
    other_classes_as_crowd: bool = False,
) -> Pairs:
    """All pairs in one image whose overlap is at least `at_least`, by detection, then object.

    The overlaps are pycocotools' own, to the last bit.

    Args:
        truth: ground truth.
        detections: detections.
        at_least: least overlap, above 0.
        same_class: leave out pairs of different classes.
        other_classes_as_crowd: measure the overlap of a pair of different classes as for a crowd
            region.
    """
    found: list[Pairs] = []
    for d, t in _by_image(detections.image, truth.image):
        different = detections.label[d][:, None] != truth.label[t][None, :]
        overlap = _overlaps(detections, truth, d, t, truth.crowd[t])
        if other_classes_as_crowd and different.any():
            as_crowd = _overlaps(detections, truth, d, t, np.ones(len(t), bool))
            overlap = np.where(different, as_crowd, overlap)
        close = overlap >= at_least
        if same_class:
            close &= ~different
        row, column = np.nonzero(close)
        found.append(Pairs(d[row], t[column], overlap[row, column]))
    empty = np.zeros(0, np.int64)
    detection = np.concatenate([empty, *(pairs.detection for pairs in found)])
    place = np.concatenate([empty, *(pairs.truth for pairs in found)])
    overlap = np.concatenate([np.zeros(0), *(pairs.overlap for pairs in found)])
    return Pairs(detection, place, overlap).take(np.lexsort((place, detection)))


def _by_image(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of both sides in each image that has some of both."""
    groups = []
    for images in (first, second):
        order = np.argsort(images, kind="stable")
        values, starts = np.unique(images[order], return_index=True)
        parts = np.split(order, starts[1:]) if len(values) else []
        groups.append(dict(zip(values.tolist(), parts, strict=True)))
    for image in groups[0].keys() & groups[1].keys():
        yield groups[0][image], groups[1][image]


def _overlaps(
    detections: Detections, truth: GroundTruth, d: np.ndarray, t: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    flags = crowd.astype(np.uint8).tolist()
    found: Any
    if detections.masks is not None and truth.masks is not None:
        found = mask_util.iou(list(detections.masks[d]), list(truth.masks[t]), flags)
    else:
        found = mask_util.iou(detections.box[d], truth.box[t], flags)
    return np.asarray(found)


def rank_in_image_and_class(detections: Detections) -> np.ndarray:
    """(N,) int64: 0 for the highest score of a class in an image, then 1, 2, ...

    Equal scores keep their order.
    """
    order = np.lexsort((-detections.score, detections.label, detections.image))
    image, label = detections.image[order], detections.label[order]
    first = np.ones(len(order), bool)
    first[1:] = (image[1:] != image[:-1]) | (label[1:] != label[:-1])
    places = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return rank
