"""Split objects put together again: the first rule of `merging`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pycocotools.mask as mask_util

from d2det.data.columns import from_rle, to_rle
from d2det.data.patches import Window

from .patch_detections import Box, Detection, MergeRules, box_overlaps


def cut_sides(
    detection: Detection, size: tuple[int, int], border: float
) -> tuple[bool, bool, bool, bool]:
    """Whether the left, upper, right and lower side of its patch cut a detection.

    The image's own border cuts nothing that another patch could show.
    """
    (x1, y1, x2, y2), window = detection.box, detection.windows[0]
    return (
        window.x1 > 0 and x1 <= window.x1 + border,
        window.y1 > 0 and y1 <= window.y1 + border,
        window.x2 < size[1] and x2 >= window.x2 - border,
        window.y2 < size[0] and y2 >= window.y2 - border,
    )


def rejoin(
    found: Sequence[Detection], size: tuple[int, int], rules: MergeRules, counts: Counter[str]
) -> list[Detection]:
    """The detections of one class, pieces of split objects replaced by their union."""
    in_window: dict[Window, list[int]] = defaultdict(list)
    for index, detection in enumerate(found):
        if detection.cut:
            in_window[detection.windows[0]].append(index)
    root = list(range(len(found)))
    for one, other in combinations(sorted(in_window), 2):
        strip = one.overlap(other)
        if strip is None:
            continue
        ours = [i for i in in_window[one] if _cut_inside(found[i], other, size, rules.border)]
        theirs = [i for i in in_window[other] if _cut_inside(found[i], one, size, rules.border)]
        if not ours or not theirs:
            continue
        agreement = _agreement([found[i] for i in ours], [found[i] for i in theirs], strip)
        best_row, best_column = agreement.argmax(axis=1), agreement.argmax(axis=0)
        for row, column in enumerate(best_row.tolist()):
            mutual = best_column[column] == row
            if mutual and agreement[row, column] >= rules.join_iou:
                root[_find(root, theirs[column])] = _find(root, ours[row])
    groups: dict[int, list[Detection]] = defaultdict(list)
    for index, detection in enumerate(found):
        groups[_find(root, index)].append(detection)
    joined = []
    for group in groups.values():
        if len(group) > 1:
            counts["rejoined"] += 1
            counts["pieces"] += len(group)
        joined.append(_union(group, size, rules.border))
    return joined


def _cut_inside(detection: Detection, other: Window, size: tuple[int, int], border: float) -> bool:
    """Whether a side of its own patch that runs inside the other patch cuts a detection."""
    sides = cut_sides(detection, size, border)
    inside = _sides_inside(detection.windows[0], other)
    return any(cut and shown for cut, shown in zip(sides, inside, strict=True))


def _sides_inside(own: Window, other: Window) -> tuple[bool, bool, bool, bool]:
    """Which sides of a patch another one goes on beyond: left, upper, right, lower."""
    return (
        other.x1 < own.x1 <= other.x2,
        other.y1 < own.y1 <= other.y2,
        other.x1 <= own.x2 < other.x2,
        other.y1 <= own.y2 < other.y2,
    )


def _agreement(ours: Sequence[Detection], theirs: Sequence[Detection], strip: Window) -> np.ndarray:
    """IoU (N, M) of two patches' detections within what the patches share."""
    strips = []
    for found in (ours, theirs):
        x1, y1, x2, y2 = strip
        if x1 == x2:  # patches that only touch: the last column of one, the first of the other
            x1, x2 = (x1 - 1, x1) if found[0].windows[0].x2 == x1 else (x1, x1 + 1)
        if y1 == y2:
            y1, y2 = (y1 - 1, y1) if found[0].windows[0].y2 == y1 else (y1, y1 + 1)
        strips.append(Window(x1, y1, x2, y2))
    pairs = list(zip((ours, theirs), strips, strict=True))
    height, width = strips[0].y2 - strips[0].y1, strips[0].x2 - strips[0].x1
    if all(d.columns is not None for found in (ours, theirs) for d in found):
        rles = [[to_rle(d.columns.crop(*s), height, width) for d in f] for f, s in pairs]
        return np.asarray(mask_util.iou(rles[0], rles[1], [0] * len(rles[1])))
    clipped = [np.array([_clip(d.box, s) for d in found]) for found, s in pairs]
    return box_overlaps(clipped[0], clipped[1])[0]


def _clip(box: Box, window: Window) -> Box:
    """A box in a window's coordinates, cut at its sides; empty where it lies outside."""
    x1, y1 = max(box[0], window.x1), max(box[1], window.y1)
    x2, y2 = max(min(box[2], window.x2), x1), max(min(box[3], window.y2), y1)
    return x1 - window.x1, y1 - window.y1, x2 - window.x1, y2 - window.y1


def _union(group: Sequence[Detection], size: tuple[int, int], border: float) -> Detection:
    if len(group) == 1:
        return group[0]
    boxes = np.array([d.box for d in group])
    box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
    columns = None
    if all(d.columns is not None for d in group):
        columns = from_rle(mask_util.merge([to_rle(d.columns, *size) for d in group]))
    windows = tuple(dict.fromkeys(window for d in group for window in d.windows))
    score = max(d.score for d in group)
    cut = any(_still_cut(d, windows, size, border) for d in group)
    return Detection(group[0].category_id, score, box, columns, windows, cut)


def _still_cut(
    piece: Detection, windows: Sequence[Window], size: tuple[int, int], border: float
) -> bool:
    """Whether a side cuts a piece beyond which these patches do not go on all along the piece."""
    for side, cut in enumerate(cut_sides(piece, size, border)):
        beyond = [w for w in windows if _sides_inside(piece.windows[0], w)[side]]
        along = 1 - side % 2  # a left or right side runs along y
        stretches = sorted((w[along], w[along + 2]) for w in beyond)
        if cut and not _covered(piece.box[along], piece.box[along + 2], stretches):
            return True
    return False


def _covered(low: float, high: float, stretches: Sequence[tuple[int, int]]) -> bool:
    for first, last in stretches:
        if first > low:
            return False
        low = max(low, last)
    return low >= high


def _find(root: list[int], index: int) -> int:
    while root[index] != index:
        root[index] = index = root[root[index]]
    return index
