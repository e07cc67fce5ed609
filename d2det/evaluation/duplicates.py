"""Detections of one object in several patches reduced to one: the second rule of `merging`."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util

from d2det.data.columns import to_rle

from .patch_detections import Detection, MergeRules, box_overlaps


def suppress(
    found: Sequence[Detection], size: tuple[int, int], rules: MergeRules, counts: Counter[str]
) -> list[Detection]:
    """The detections of one class without duplicates, or with decayed scores."""
    if rules.method == "none":
        return list(found)
    same = _duplicates(found, size, rules)
    scores = [d.score for d in found]
    areas = [d.area for d in found]

    def rank(i: int) -> tuple[float, float, int]:
        return -scores[i] * (rules.cut_weight if found[i].cut else 1.0), -areas[i], i

    heap = [rank(i) for i in range(len(found))]
    heapq.heapify(heap)
    state = [""] * len(found)  # then "kept" or "gone"
    while heap:
        entry = heapq.heappop(heap)
        i = entry[-1]
        if state[i] or entry != rank(i):  # settled, or its score has decayed since
            continue
        state[i] = "kept"
        for j, iou, contained in same[i]:
            if state[j]:
                continue
            if rules.method == "soft-nms" and not contained:
                scores[j] *= 1 - iou
                if scores[j] > 0 and scores[j] >= rules.min_score:
                    heapq.heappush(heap, rank(j))
                    continue
            state[j] = "gone"
            counts["duplicates"] += 1
    return [d._replace(score=scores[i]) for i, d in enumerate(found) if state[i] == "kept"]


def _duplicates(
    found: Sequence[Detection], size: tuple[int, int], rules: MergeRules
) -> list[list[tuple[int, float, bool]]]:
    """For each detection, those that are the same object: index, IoU, and whether the reason is
    that a cut one lies within the other."""
    same: list[list[tuple[int, float, bool]]] = [[] for _ in found]
    if not found:
        return same
    boxes = np.array([d.box for d in found], dtype=np.float64)
    areas = np.array([d.area for d in found], dtype=np.float64)
    cut = np.array([d.cut for d in found])
    masks = all(d.columns is not None for d in found)
    rles = [to_rle(d.columns, *size) for d in found] if masks else []
    order = boxes[:, 0].argsort(kind="stable")
    left = boxes[order, 0]
    for place, i in enumerate(order.tolist()):
        near = order[place + 1 : np.searchsorted(left, boxes[i, 2])]
        near = near[(boxes[near, 1] < boxes[i, 3]) & (boxes[near, 3] > boxes[i, 1])]
        own = set(found[i].windows)
        near = np.array([j for j in near if own.isdisjoint(found[j].windows)], dtype=np.int64)
        if len(near) == 0:
            continue
        if masks:
            iou = np.asarray(mask_util.iou([rles[i]], [rles[j] for j in near], [0] * len(near)))[0]
            shared = iou * (areas[i] + areas[near]) / (1 + iou)
        else:
            iou, shared = (x[0] for x in box_overlaps(boxes[i : i + 1], boxes[near]))
        least = rules.nms_ios - 1e-9  # what rounding may have taken off
        contained = (cut[i] & (shared >= least * areas[i])) | (
            cut[near] & (shared >= least * areas[near])
        )
        contained &= shared > 0
        for j, overlap, inside in zip(near.tolist(), iou.tolist(), contained.tolist(), strict=True):
            if inside or overlap >= rules.nms_iou:
                same[i].append((j, overlap, inside))
                same[j].append((i, overlap, inside))
    return same
