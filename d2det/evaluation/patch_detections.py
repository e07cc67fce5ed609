"""Detections of patches, and the thresholds by which they are merged; see `merging`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from d2det.data.columns import Columns
from d2det.data.patches import Window

Box = tuple[float, float, float, float]  # x1, y1, x2, y2


@dataclass(frozen=True)
class MergeRules:
    """Thresholds of the module's rules.

    Attributes:
        join_iou: agreement of two pieces in the shared strip.
        border: a detection is cut if it comes this close to a side of its patch, in pixels.
        method: of 2.: "nms"; "soft-nms": duplicates by IoU are not dropped, but their scores
            decayed by 1 - IoU; "none": no duplicate is touched.
        nms_iou, nms_ios, cut_weight: see 2.
        min_score: detections whose score is, or decays, below it are dropped.
        limit: best detections of each whole image; 0 for all.
    """

    join_iou: float = 0.5
    border: float = 4.0
    method: str = "nms"
    nms_iou: float = 0.5
    nms_ios: float = 0.5
    cut_weight: float = 0.5
    min_score: float = 0.0
    limit: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("nms", "soft-nms", "none"):
            raise ValueError(f'method must be "nms", "soft-nms" or "none", not {self.method!r}')
        for name in ("join_iou", "nms_iou", "nms_ios"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if not (0 < self.cut_weight <= 1 and self.border >= 0 and self.limit >= 0):
            raise ValueError(
                "cut_weight must be in (0, 1], border and limit at least 0, not "
                f"{self.cut_weight}, {self.border} and {self.limit}"
            )


class Detection(NamedTuple):
    """A detection in the coordinates of the whole image."""

    category_id: int
    score: float
    box: Box
    columns: Columns | None  # its mask; None where the detector finds boxes
    windows: tuple[Window, ...]  # the patches it was seen in; several: rejoined
    cut: bool  # by a side of its patch, and not rejoined

    @property
    def area(self) -> float:
        """Pixels of the mask, or the area of the box."""
        if self.columns is not None:
            return float(self.columns.area)
        x1, y1, x2, y2 = self.box
        return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)


def box_overlaps(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and intersection (N, M) of boxes (N, 4) and (M, 4)."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0), shared
