"""Detections on overlapping patches of an image merged into detections on the whole image.

Two pieces of one object, seen in two patches, agree where the patches overlap. So:

1. Split objects are rejoined. Two detections of one class in two patches are pieces of one object
   if each is cut by a side of its patch that runs inside the other patch, and if they agree in the
   strip that the patches share: IoU there of at least `join_iou`, and for both the best partner in
   the other's patch. Where patches touch without overlapping, the pixel rows along the common side
   are compared. A rejoined object has the union of the pieces and their highest score.
2. Duplicates are suppressed, among detections of one class that have no patch in common (within a
   patch, the detector has done it). Two are one object if their IoU is at least `nms_iou`, or if a
   cut one lies within the other by `nms_ios` of its own area. The one of lower score goes, where a
   cut detection counts with `cut_weight` of its score.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from d2det.data.columns import to_rle

from .duplicates import suppress
from .patch_detections import Detection, MergeRules
from .rejoining import cut_sides, rejoin


def merge_image(
    detections: Sequence[Detection], height: int, width: int, rules: MergeRules
) -> tuple[list[Detection], Counter[str]]:
    """Merge the detections of all patches of one image.

    Args:
        detections: each with one window; `cut` is set here.
        height, width: of the whole image.
        rules: thresholds.

    Returns:
        The merged detections in falling score order, and how many were "rejoined" from how many
        "pieces", and how many were "duplicates".
    """
    counts: Counter[str] = Counter()
    size = height, width
    marked = [
        d._replace(cut=any(cut_sides(d, size, rules.border)))
        for d in detections
        if d.score >= rules.min_score
    ]
    by_class: dict[int, list[Detection]] = defaultdict(list)
    for detection in marked:
        by_class[detection.category_id].append(detection)
    merged = []
    for found in by_class.values():
        joined = rejoin(found, size, rules, counts)
        merged += suppress(joined, size, rules, counts)
    merged.sort(key=lambda d: -d.score)
    return merged[: rules.limit or None], counts


def to_result(detection: Detection, image_id: Any, height: int, width: int) -> dict[str, Any]:
    """A detection in COCO's result format; "pieces" says from how many it was rejoined."""
    x1, y1, x2, y2 = detection.box
    result = {
        "image_id": image_id,
        "category_id": detection.category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": detection.score,
    }
    if detection.columns is not None:
        result["segmentation"] = to_rle(detection.columns, height, width)
    if len(detection.windows) > 1:
        result["pieces"] = len(detection.windows)
    return result
