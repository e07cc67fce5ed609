"""Masks as vertical runs of pixels: cutting, shifting and measuring without decoding an image.

COCO's run-length encoding goes down the columns, so a mask is a list of column pieces. An instance
in an image of 4000 x 13000 pixels has a few dozen of them; decoded, it would fill 52 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util


class Columns(NamedTuple):
    """A mask of S column pieces, by column and then by row; pieces of one column never touch."""

    x: np.ndarray  # (S,) int64, column
    top: np.ndarray  # (S,) int64, first row
    bottom: np.ndarray  # (S,) int64, row after the last

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.bottom - self.top).sum())

    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 of the pixels' outer edges; zeros without pixels."""
        if len(self.x) == 0:
            return 0, 0, 0, 0
        x1, x2 = int(self.x[0]), int(self.x[-1]) + 1
        return x1, int(self.top.min()), x2, int(self.bottom.max())

    def crop(self, x1: int, y1: int, x2: int, y2: int) -> Columns:
        """What lies in a window, in the window's own coordinates."""
        first, last = np.searchsorted(self.x, (x1, x2))
        x, top, bottom = (values[first:last] for values in self)
        top, bottom = np.maximum(top, y1), np.minimum(bottom, y2)
        inside = top < bottom
        return Columns(x[inside] - x1, top[inside] - y1, bottom[inside] - y1)

    def shift(self, dx: int, dy: int) -> Columns:
        """The mask moved right by `dx` and down by `dy` pixels."""
        return Columns(self.x + dx, self.top + dy, self.bottom + dy)


def from_rle(rle: dict[str, Any]) -> Columns:
    """Columns of a mask in COCO's run-length encoding, compressed or not.

    Raises:
        ValueError: the counts are not a run-length encoding of an image of this size.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    found = np.asarray(counts, dtype=np.int64) if isinstance(counts, list) else _decompress(counts)
    edges = found.cumsum()
    if (found < 0).any() or len(edges) == 0 or edges[-1] != height * width:
        raise ValueError(
            f"run lengths that add up to {int(edges[-1]) if len(edges) else 0} are no mask of "
            f"{height} x {width} pixels"
        )
    starts, ends = edges[0:-1:2], edges[1::2]
    full = starts < ends  # writers may leave runs of no pixel
    starts, ends = starts[full], ends[full]
    first, last = starts // height, (ends - 1) // height
    pieces = last - first + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    x = first[run] + np.arange(len(run)) - np.repeat(pieces.cumsum() - pieces, pieces)
    top = np.maximum(starts[run] - x * height, 0)
    bottom = np.minimum(ends[run] - x * height, height)
    return _join(x, top, bottom)


def to_rle(columns: Columns, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run-length encoding, with the counts as text.

    Raises:
        ValueError: the mask reaches out of the image.
    """
    x1, y1, x2, y2 = columns.box()
    if min(x1, y1) < 0 or x2 > width or y2 > height:
        raise ValueError(f"a mask in {(x1, y1, x2, y2)} is not inside {width} x {height} pixels")
    starts = columns.x * height + columns.top
    ends = columns.x * height + columns.bottom
    apart = np.ones(len(starts) + 1, dtype=bool)  # a full column goes on in the next one
    apart[1:-1] = starts[1:] != ends[:-1]
    edges = np.stack((starts[apart[:-1]], ends[apart[1:]]), axis=1).ravel()
    counts = np.diff(np.concatenate(([0], edges, [height * width])))
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    plain = {"size": [height, width], "counts": counts.tolist()}
    packed = mask_util.frPyObjects(plain, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def from_dense(mask: np.ndarray) -> Columns:
    """Columns of a binary mask (H, W)."""
    height, width = mask.shape
    padded = np.zeros((width, height + 2), dtype=np.int8)
    padded[:, 1:-1] = (mask != 0).T
    steps = np.diff(padded, axis=1)
    x, top = np.nonzero(steps == 1)
    _, bottom = np.nonzero(steps == -1)
    return Columns(x, top, bottom)


def to_dense(columns: Columns, height: int, width: int) -> np.ndarray:
    """The binary mask (H, W) uint8."""
    steps = np.zeros((width, height + 1), dtype=np.int8)
    np.add.at(steps, (columns.x, columns.top), 1)
    np.add.at(steps, (columns.x, columns.bottom), -1)
    return np.ascontiguousarray(steps.cumsum(axis=1)[:, :-1].T.astype(np.uint8))


def from_polygons(
    polygons: Sequence[Sequence[float]], height: int, width: int, *, pixel_contours: bool = False
) -> Columns:
    """The pixels of one instance's polygons [x, y, x, y, ...] in an image.

    Args:
        polygons: parts of the instance; what lies outside of the image is cut off.
        height, width: of the image.
        pixel_contours: False: COCO's rule (`frPyObjects`), by which points lie anywhere and a pixel
            is in if its centre is, roughly. True: points are border pixels, which belong to the
            object, as OpenCV traces them and as iSAID is annotated; COCO's rule would lose
            the right and lower ones.
    """
    if not pixel_contours:
        parts = mask_util.frPyObjects([list(map(float, p)) for p in polygons], height, width)
        return from_rle(mask_util.merge(parts))
    contours = [np.asarray(p, dtype=np.float64).reshape(-1, 2).round() for p in polygons]
    low = np.floor(np.min([c.min(axis=0) for c in contours], axis=0)).astype(np.int64)
    high = np.ceil(np.max([c.max(axis=0) for c in contours], axis=0)).astype(np.int64) + 1
    low, high = np.clip(low, 0, (width, height)), np.clip(high, 0, (width, height))
    if (high <= low).any():
        return from_dense(np.zeros((1, 1)))
    dense = np.zeros((high - low)[::-1], dtype=np.uint8)
    for contour in contours:  # one by one: filled together, overlaps would be holes
        cv2.fillPoly(dense, [(contour - low).astype(np.int32)], 1)
    return from_dense(dense).shift(*low.tolist())


def from_labels(labels: np.ndarray) -> dict[int, Columns]:
    """Columns of each value above 0 of an image of labels (H, W), by value."""
    height = labels.shape[0]
    down = np.ascontiguousarray(labels.T)
    new = np.ones(down.shape, dtype=bool)  # where a piece begins
    new[:, 1:] = down[:, 1:] != down[:, :-1]
    starts = np.flatnonzero(new)
    value = down.ravel()[starts]
    ends = np.append(starts[1:], down.size)
    kept = value != 0
    starts, ends, value = starts[kept], ends[kept], value[kept]
    order = np.argsort(value, kind="stable")
    starts, ends, value = starts[order], ends[order], value[order]
    firsts = np.flatnonzero(np.diff(value, prepend=0))
    found = {}
    for first, last in zip(firsts, np.append(firsts, len(value))[1:], strict=True):
        x = starts[first:last] // height
        found[int(value[first])] = Columns(
            x, starts[first:last] - x * height, ends[first:last] - x * height
        )
    return found


def _join(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> Columns:
    """Pieces in order, of which neighbours in a column may touch, as `Columns`."""
    apart = np.ones(len(x) + 1, dtype=bool)
    apart[1:-1] = (x[1:] != x[:-1]) | (top[1:] != bottom[:-1])
    return Columns(x[apart[:-1]], top[apart[:-1]], bottom[apart[1:]])


def _decompress(counts: str | bytes) -> np.ndarray:
    """The run lengths of COCO's text form: 5 bits a character, each number a difference."""
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(values) == 0 or ((values < 0) | (values > 63)).any() or values[-1] & 32:
        raise ValueError("not a compressed run-length encoding, or not all of it")
    stops = np.flatnonzero((values & 32) == 0)
    starts = np.append(0, stops[:-1] + 1)
    place = np.arange(len(values)) - np.repeat(starts, stops - starts + 1)
    numbers = np.add.reduceat((values & 31) << (5 * place), starts)
    negative = (values[stops] & 16) != 0
    numbers -= negative * (np.int64(1) << (5 * (stops - starts + 1)))
    # From the fourth on, a number is what its run has more than the run before the last.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
