"""Ground truth of patches merged back as if it had been detected: what cutting, merging lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from d2det.data.coco import read_coco
from d2det.data.columns import from_rle, to_rle

from .patch_results import Result

_FOUND = 0.9  # IoU from which a rejoined object counts as found


def truth_as_results(patches_json: Path) -> list[Result]:
    """The objects of all patches as detections of score 1; crowd regions are left out."""
    content = read_coco(patches_json)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    results = []
    for annotation in content.get("annotations", []):
        if annotation.get("iscrowd"):
            continue
        result = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        result["score"] = 1.0
        if annotation.get("segmentation"):
            result["segmentation"] = _rle(annotation, *sizes[annotation["image_id"]])
        results.append(result)
    return results


class Returned(NamedTuple):
    """How the objects of the whole images came back.

    Attributes:
        whole, whole_exact: objects that a patch shows wholly; of them, returned to the pixel.
        split, split_exact, split_found: objects that no patch shows wholly; of them, returned to
            the pixel as one, and as one of IoU at least 0.9.
        missing: objects of which no patch shows a piece: all were dropped.
        extra: results beyond one for each object: pieces that were not rejoined.
    """

    whole: int
    whole_exact: int
    split: int
    split_exact: int
    split_found: int
    missing: int
    extra: int

    def __str__(self) -> str:
        return (
            f"wholly inside a patch: {self.whole} objects, {self.whole_exact} returned exactly\n"
            f"split: {self.split} objects, {self.split_exact} rejoined exactly, "
            f"{self.split_found} with IoU of at least {_FOUND}\n"
            f"dropped when cutting: {self.missing} objects\n"
            f"pieces left over: {self.extra}"
        )


def compare_with_truth(results: Sequence[Result], patches_json: Path, whole_json: Path) -> Returned:
    """Compare merged ground truth with the whole images' annotations.

    Args:
        results: of `merge_results` on `truth_as_results`.
        patches_json, whole_json: of `d2det.tools.cut_patches`.

    Raises:
        ValueError: the patches' annotations do not tell which object they show.
    """
    visible: dict[tuple[Any, Any], float] = defaultdict(float)
    patches = read_coco(patches_json)
    whole_id = {image["id"]: _whole_id(image, patches_json) for image in patches["images"]}
    for annotation in patches.get("annotations", []):
        key = whole_id[annotation["image_id"]], annotation["source_id"]
        visible[key] = max(visible[key], annotation["visible"])
    truth = read_coco(whole_json)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    found: dict[tuple[Any, Any], list[Result]] = defaultdict(list)
    for result in results:
        found[result["image_id"], result["category_id"]].append(result)
    counts = dict.fromkeys(Returned._fields, 0)
    for annotation in truth.get("annotations", []):
        if annotation["iscrowd"]:
            continue
        share = visible.get((annotation["image_id"], annotation["source_id"]), 0.0)
        near = found[annotation["image_id"], annotation["category_id"]]
        exact, iou = _best(annotation, near, *sizes[annotation["image_id"]])
        if share == 0:
            counts["missing"] += 1
            continue
        kind = "whole" if share == 1 else "split"
        counts[kind] += 1
        counts[f"{kind}_exact"] += exact
        counts["split_found"] += kind == "split" and iou >= _FOUND
    counts["extra"] = len(results) - counts["whole"] - counts["split"]
    return Returned(**counts)


def _best(
    annotation: Mapping[str, Any], near: Sequence[Result], height: int, width: int
) -> tuple[bool, float]:
    """Whether one of the results is this object exactly, and the highest IoU."""
    if not near:
        return False, 0.0
    if annotation.get("segmentation") and all("segmentation" in result for result in near):
        own = _rle(annotation, height, width)
        exact = any(result["segmentation"]["counts"] == own["counts"] for result in near)
        shapes = [result["segmentation"] for result in near]
    else:
        own = list(map(float, annotation["bbox"]))
        exact = any(result["bbox"] == own for result in near)
        shapes = [list(map(float, result["bbox"])) for result in near]
    return exact, float(mask_util.iou([own], shapes, [0] * len(shapes)).max())


def _rle(annotation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """The mask as COCO's tools rasterise it, in its one canonical encoding."""
    coco = COCO()
    coco.imgs = {annotation["image_id"]: {"height": height, "width": width}}
    return to_rle(from_rle(coco.annToRLE(annotation)), height, width)


def _whole_id(image: Mapping[str, Any], where: Path) -> Any:
    if "patch_of" not in image:
        raise ValueError(
            f"{where} does not say which object an annotation is a piece of: it was not written by "
            "d2det.tools.cut_patches"
        )
    return image["patch_of"]["image_id"]
