"""Where a large image is cut, and what the patches are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(?P<stem>.+)_(?P<y1>\d+)_(?P<y2>\d+)_(?P<x1>\d+)_(?P<x2>\d+)$")


class Window(NamedTuple):
    """Pixels x1 <= x < x2, y1 <= y < y2 of an image."""

    x1: int
    y1: int
    x2: int
    y2: int

    def overlap(self, other: Window) -> Window | None:
        """What two windows share; None where they do not even touch along a side."""
        shared = Window(
            max(self.x1, other.x1),
            max(self.y1, other.y1),
            min(self.x2, other.x2),
            min(self.y2, other.y2),
        )
        wide, high = shared.x2 - shared.x1, shared.y2 - shared.y1
        return shared if min(wide, high) >= 0 and max(wide, high) > 0 else None


@dataclass(frozen=True)
class Grid:
    """How images are cut.

    Attributes:
        size: side of a patch in pixels.
        overlap: pixels that neighbours share, at least.
        cut_when: "both": an image is cut if both of its sides exceed `size`, else kept whole, as
            iSAID is. "either": every side that exceeds `size` is cut.
    """

    size: int = 800
    overlap: int = 200
    cut_when: str = "both"

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < self.size:
            raise ValueError(
                f"patches of {self.size} pixels cannot overlap by {self.overlap}: the overlap must "
                "be at least 0 and less than the size"
            )
        if self.cut_when not in ("both", "either"):
            raise ValueError(f'cut_when must be "both" or "either", not {self.cut_when!r}')

    def windows(self, height: int, width: int) -> list[Window]:
        """The windows of an image, row by row; the last of a row or column is moved inward."""
        whole = Window(0, 0, width, height)
        exceeds = width > self.size, height > self.size
        if not (all(exceeds) if self.cut_when == "both" else any(exceeds)):
            return [whole]
        rows, columns = self._starts(height), self._starts(width)
        return [
            Window(x, y, min(x + self.size, width), min(y + self.size, height))
            for y in rows
            for x in columns
        ]

    def _starts(self, side: int) -> list[int]:
        last = max(side - self.size, 0)
        return [*range(0, last, self.size - self.overlap), last]


def patch_name(stem: str, window: Window, extension: str = ".png") -> str:
    """As iSAID's development kit names a patch: P0000_<y1>_<y2>_<x1>_<x2>.png."""
    return f"{stem}_{window.y1}_{window.y2}_{window.x1}_{window.x2}{extension}"


def parse_patch_name(file_name: str) -> tuple[str, Window] | None:
    """The image's stem and the window of a patch; None for a name that holds none."""
    found = _NAME.match(Path(file_name).stem)
    if not found:
        return None
    window = Window(*(int(found[side]) for side in Window._fields))
    return (found["stem"], window) if window.x1 < window.x2 and window.y1 < window.y2 else None
