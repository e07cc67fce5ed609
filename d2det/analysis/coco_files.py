"""COCO's ground truth and result files as arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .objects import Detections, GroundTruth

IOU_TYPES = ("bbox", "segm")
_NO_SUPERCATEGORY = ("", "none")


@dataclass(frozen=True)
class CocoTruth:
    """A ground-truth file.

    Args:
        objects: annotations, in the file's order.
        image_ids: by place; in rising order.
        category_ids, names: by label; in rising order of the ids.
        supercategory: (K,) int64, -1 for a category that shares none with another.
        sizes: (height, width) of each image; needed for masks.
        zero_id: an annotation has the id 0, with which pycocotools counts a match as a miss.
    """

    path: Path
    objects: GroundTruth
    image_ids: list[Any]
    category_ids: list[int]
    names: list[str]
    supercategory: np.ndarray
    sizes: list[tuple[int, int]]
    zero_id: bool


def read_ground_truth(path: str | PathLike[str], iou_type: str = "bbox") -> CocoTruth:
    """Read annotations in COCO's format.

    As in pycocotools, what is ignored are crowd regions; the field "ignore" is not read. A missing
    "area" is that of the box.

    Args:
        path: a JSON with "images", "annotations" and "categories".
        iou_type: "bbox" or "segm".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is something else, or an annotation is unusable: the message names it.
    """
    path = Path(path).expanduser()
    content = _read(path, "ground truth")
    if not isinstance(content, dict) or not content.get("images") or not content.get("categories"):
        raise ValueError(
            f"{path} is no ground truth in COCO's format: it lacks images or categories"
        )
    for kind in ("images", "categories"):
        for entry in content[kind]:
            if not isinstance(entry, dict) or "id" not in entry:
                raise ValueError(f"{path}: an entry of {kind!r} has no id: {str(entry)[:60]}")
    images = sorted(content["images"], key=lambda image: image["id"])
    categories = sorted(content["categories"], key=lambda category: category["id"])
    place = {image["id"]: i for i, image in enumerate(images)}
    label = {category["id"]: i for i, category in enumerate(categories)}
    annotations = content.get("annotations") or []
    if not annotations:
        raise ValueError(f"{path} holds no annotations: there is nothing to compare with")
    for annotation in annotations:
        where = f"{path}: annotation {annotation.get('id')!r}"
        _check(annotation, place, label, where)
        if iou_type == "segm" and not annotation.get("segmentation"):
            raise ValueError(f"{where} has no mask: only boxes (bbox) can be compared")
    box = _boxes(annotations)
    area = [a.get("area", b[2] * b[3]) for a, b in zip(annotations, box.tolist(), strict=True)]
    sizes = [(int(image.get("height") or 0), int(image.get("width") or 0)) for image in images]
    masks = None
    if iou_type == "segm":
        masks = _objects(
            [_run_lengths(a["segmentation"], sizes[place[a["image_id"]]]) for a in annotations]
        )
    truth = GroundTruth(
        image=np.array([place[a["image_id"]] for a in annotations], np.int64),
        label=np.array([label[a["category_id"]] for a in annotations], np.int64),
        box=box,
        area=np.array(area, float),
        masks=masks,
        crowd=np.array([bool(a.get("iscrowd")) for a in annotations]),
    )
    return CocoTruth(
        path,
        truth,
        list(place),
        list(label),
        [str(category.get("name", category["id"])) for category in categories],
        _supercategories(categories),
        sizes,
        any(annotation.get("id") == 0 for annotation in annotations),
    )


def read_detections(
    path: str | PathLike[str], truth: CocoTruth, iou_type: str = "bbox"
) -> Detections:
    """Read detections in COCO's result format, a list of entries with "image_id", "category_id",
    "score" and "bbox" or "segmentation".

    The area of a detection, which decides its size range, is its box's for "bbox" and its mask's
    for "segm", as in detectron2's evaluation.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is something else, or belongs to another ground truth.
    """
    path = Path(path).expanduser()
    found = _read(path, "detections")
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(
            f"{path} is not in COCO's result format: a list of detections, as "
            "coco_instances_results.json is"
        )
    place = {image: i for i, image in enumerate(truth.image_ids)}
    label = {category: i for i, category in enumerate(truth.category_ids)}
    for number, entry in enumerate(found):
        where = f"{path}: detection number {number + 1}"
        _check(entry, place, label, f"{where} does not belong to {truth.path}: it", box=False)
        if not isinstance(entry.get("score"), (int, float)) or entry["score"] != entry["score"]:
            raise ValueError(f"{where} has the score {entry.get('score')!r}")
        if iou_type == "segm" and not entry.get("segmentation"):
            raise ValueError(f"{where} has no mask: only boxes (bbox) can be compared")
    masks = None
    if iou_type == "segm":
        masks = _objects(
            [_run_lengths(e["segmentation"], truth.sizes[place[e["image_id"]]]) for e in found]
        )
        area = np.array([float(mask_util.area(mask)) for mask in masks])
        box = np.zeros((len(found), 4))  # not read where there are masks
    else:
        for number, entry in enumerate(found):
            _check_box(entry, f"{path}: detection number {number + 1}")
        box = _boxes(found)
        area = box[:, 2] * box[:, 3]
    return Detections(
        image=np.array([place[e["image_id"]] for e in found], np.int64),
        label=np.array([label[e["category_id"]] for e in found], np.int64),
        box=box,
        area=area,
        masks=masks,
        score=np.array([e["score"] for e in found], float),
    )


def _read(path: Path, kind: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} ({kind} in COCO's format) is not there")
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def _check(
    entry: dict[str, Any], place: dict, label: dict, where: str, *, box: bool = True
) -> None:
    if entry.get("image_id") not in place:
        raise ValueError(f"{where} has the image id {entry.get('image_id')!r}, which is not listed")
    if entry.get("category_id") not in label:
        raise ValueError(
            f"{where} has the category id {entry.get('category_id')!r}, which is not listed"
        )
    if box:
        _check_box(entry, where)


def _check_box(entry: dict[str, Any], where: str) -> None:
    box: Any = entry.get("bbox")
    try:
        fit = len(box) == 4 and all(map(math.isfinite, box))
    except TypeError:
        fit = False
    if not fit:
        raise ValueError(f"{where} has the 'bbox' {box!r}; expected [x, y, width, height]")


def _boxes(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([entry["bbox"] for entry in entries], float).reshape(-1, 4)


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed run lengths of polygons or run lengths."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *size)
    return segmentation


def _objects(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _supercategories(categories: Sequence[dict[str, Any]]) -> np.ndarray:
    names = [str(category.get("supercategory") or "").strip() for category in categories]
    known = {
        name: i
        for i, name in enumerate(sorted(set(names)))
        if name.lower() not in _NO_SUPERCATEGORY and names.count(name) > 1
    }
    return np.array([known.get(name, -1) for name in names], np.int64)
