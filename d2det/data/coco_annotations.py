"""From COCO annotations to detectron2's, without the boxes that no detector can learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

MIN_SIDE = 0.1  # pixels; a box that is thinner, whole or after clipping, counts as empty
CLIP_TOLERANCE = 1.0  # pixels outside the image that are put down to rounding and not reported


@dataclass
class Groups:
    """Annotations by image."""

    images: Sequence[dict[str, Any]]  # with "id", "width", "height"
    found: dict[Any, list[dict[str, Any]]]
    orphans: int  # annotations of images that are not listed
    kept: dict[Any, list[dict[str, Any]]] = field(default_factory=dict)  # in detectron2's form


@dataclass
class Facts:
    """What cleaning found."""

    boxes: int = 0  # kept and not crowd; as are those without a mask
    empty: int = 0
    outside: int = 0
    ignored: int = 0
    orphans: int = 0
    clipped: int = 0
    left_out: int = 0  # images
    without_mask: int = 0  # where others have one
    has_masks: bool = False
    mask_format: str = "polygon"

    @property
    def warning(self) -> str:
        """One sentence of what was changed; empty if nothing was."""
        parts = [
            (self.empty, "boxes without area dropped"),
            (self.outside, "boxes outside their image dropped"),
            (self.ignored, "boxes marked 'ignore' dropped"),
            (self.orphans, "annotations of images that are not listed dropped"),
            (self.without_mask, "objects without a valid mask"),
            (self.clipped, "boxes clipped to their image"),
            (self.left_out, "images left out, whose boxes are all crowd or dropped"),
        ]
        return ", ".join(f"{count} {what}" for count, what in parts if count)


def group_by_image(
    annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]
) -> Groups:
    """Sort annotations by the image they belong to."""
    found: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    orphans = 0
    for annotation in annotations:
        if annotation["image_id"] in found:
            found[annotation["image_id"]].append(annotation)
        else:
            orphans += 1
    return Groups(images, found, orphans)


def clean_annotations(
    groups: Groups, id_map: dict[int, int], json_file: Path, *, leave_out: bool
) -> Facts:
    """Fill `groups.kept` with usable annotations in detectron2's form (boxes XYWH, clipped).

    Crowd regions are kept, marked; an image without any annotation is kept, with an empty list.

    Args:
        groups: of `group_by_image`.
        id_map: from category ids to 0, 1, ...
        json_file: named in messages.
        leave_out: leave out images that had annotations, none of which can be trained on.

    Raises:
        ValueError: a box that is not four finite numbers, or an unknown category.
    """
    facts = Facts(orphans=groups.orphans)
    for image in groups.images:
        kept = [
            cleaned
            for annotation in groups.found[image["id"]]
            if (cleaned := _clean(annotation, image, id_map, json_file, facts)) is not None
        ]
        groups.kept[image["id"]] = kept
    _count_masks(groups, facts)
    for image in groups.images:
        usable = sum(not annotation["iscrowd"] for annotation in groups.kept[image["id"]])
        facts.boxes += usable
        if leave_out and usable == 0 and groups.found[image["id"]]:
            del groups.kept[image["id"]]
            facts.left_out += 1
    return facts


def _clean(
    annotation: dict[str, Any],
    image: dict[str, Any],
    id_map: dict[int, int],
    json_file: Path,
    facts: Facts,
) -> dict[str, Any] | None:
    where = f"{json_file}: annotation {annotation['id']} of image {annotation['image_id']}"
    category = annotation.get("category_id")
    if category not in id_map:
        raise ValueError(
            f"{where} has the category id {category!r}, which 'categories' does not list "
            f"({_range(id_map)})"
        )
    x, y, width, height = _box(annotation, where)
    if annotation.get("ignore") and not annotation.get("iscrowd"):
        facts.ignored += 1
        return None
    if width < MIN_SIDE or height < MIN_SIDE:
        facts.empty += 1
        return None
    x1, x2 = max(x, 0.0), min(x + width, float(image["width"]))
    y1, y2 = max(y, 0.0), min(y + height, float(image["height"]))
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        facts.outside += 1
        return None
    if max(x1 - x, y1 - y, x + width - x2, y + height - y2) > CLIP_TOLERANCE:
        facts.clipped += 1
    cleaned: dict[str, Any] = {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": id_map[category],
        "iscrowd": int(bool(annotation.get("iscrowd"))),
    }
    mask = _mask(annotation.get("segmentation"), image)
    if mask is not None:
        cleaned["segmentation"] = mask
    return cleaned


def _box(annotation: dict[str, Any], where: str) -> list[float]:
    box: Any = annotation.get("bbox")
    try:
        values = [float(value) for value in box]
    except (TypeError, ValueError):
        values = []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ValueError(f"{where} has the 'bbox' {box!r}; expected [x, y, width, height]")
    return values


def _mask(segmentation: Any, image: dict[str, Any]) -> list | dict | None:
    """A mask that detectron2 can use, or None: polygons of at least 3 points, or compressed RLE."""
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [image["height"], image["width"]]:
            return None
        if isinstance(segmentation.get("counts"), list):
            return mask_util.frPyObjects(segmentation, image["height"], image["width"])
        return segmentation if segmentation.get("counts") else None
    if not isinstance(segmentation, list):
        return None
    polygons = [
        polygon
        for polygon in segmentation
        if isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    ]
    return polygons or None


def _count_masks(groups: Groups, facts: Facts) -> None:
    objects = [a for kept in groups.kept.values() for a in kept if not a["iscrowd"]]
    masks = [a["segmentation"] for a in objects if "segmentation" in a]
    facts.has_masks = bool(masks)
    if any(isinstance(mask, dict) for mask in masks):
        facts.mask_format = "bitmask"
    if masks:
        facts.without_mask = len(objects) - len(masks)


def _range(id_map: dict[int, int]) -> str:
    ids = sorted(id_map)
    listed = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
    return f"it has {listed}"
