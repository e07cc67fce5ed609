"""Results on patches in, results on whole images out: COCO's format on both sides."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2det.data.coco import read_coco
from d2det.data.columns import Columns, from_rle
from d2det.data.parallel import in_parallel
from d2det.data.patches import Window, parse_patch_name

from .merging import merge_image, to_result
from .patch_detections import Detection, MergeRules

Result = dict[str, Any]


class Patch(NamedTuple):
    """Which part of which image a patch shows."""

    whole_id: Any
    height: int  # of the whole image
    width: int
    window: Window


def read_patches(patches_json: Path, whole_json: Path | None = None) -> dict[Any, Patch]:
    """The patches of a JSON by their image id.

    Args:
        patches_json: of `d2det.tools.cut_patches`, or of iSAID's development kit, whose patches
            tell their window by their file name.
        whole_json: the whole images; needed only for the latter.

    Raises:
        ValueError: a patch of which neither its entry nor its name tells what it shows.
    """
    wholes = {}
    if whole_json is not None:
        images = read_coco(whole_json)["images"]
        wholes = {Path(image["file_name"]).stem: image for image in images}
    return {
        image["id"]: _patch(image, wholes, patches_json)
        for image in read_coco(patches_json)["images"]
    }


def _patch(image: dict[str, Any], wholes: Mapping[str, dict[str, Any]], where: Path) -> Patch:
    known = image.get("patch_of")
    if known:
        size = int(known["height"]), int(known["width"])
        return Patch(known["image_id"], *size, Window(*known["window"]))
    name = image["file_name"]
    stem, window = parse_patch_name(name) or (Path(name).stem, None)
    whole = wholes.get(stem)
    if whole is None:
        raise ValueError(
            f"{where}: of which image {name} is a patch is not known: give --whole, the JSON of "
            f"the whole images, with one called {stem}"
        )
    if not (whole.get("width") and whole.get("height")):
        raise ValueError(f"the image {whole['file_name']} of --whole has no width and height")
    size = int(whole["height"]), int(whole["width"])
    window = window or Window(0, 0, size[1], size[0])
    if window.x2 > size[1] or window.y2 > size[0]:
        raise ValueError(
            f"{where}: {name} reaches out of its image of {size[1]} x {size[0]} pixels"
        )
    return Patch(whole["id"], *size, window)


def read_results(path: Path) -> list[Result]:
    """A list in COCO's result format.

    Raises:
        FileNotFoundError, ValueError: it is not there, not complete or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} (results in COCO's format) is not there")
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); was it written completely?"
        ) from None
    needed = {"image_id", "category_id", "bbox", "score"}
    for number, result in enumerate(results if isinstance(results, list) else [None], start=1):
        lacking = needed - set(result) if isinstance(result, dict) else needed
        if isinstance(result, dict) and "segmentation" in result:
            lacking -= {"bbox"}
        if lacking:
            raise ValueError(
                f"{path} is not a list in COCO's result format: entry {number} has no "
                f"{', '.join(sorted(lacking))}"
            )
    return results


def merge_results(
    results: Sequence[Result],
    patches: Mapping[Any, Patch],
    rules: MergeRules,
    *,
    workers: int = 0,
) -> tuple[list[Result], Counter[str]]:
    """Results on patches merged into results on whole images.

    Args:
        results: in COCO's result format, on patches. Masks are used if all have them; "bbox" may
            be lacking then, and is in the merged results as well.
        patches: of `read_patches`.
        rules: see `merging`.
        workers: processes; 0 merges in this one.

    Returns:
        Results in the order of the images, and counts of `merge_image` beside "found", "merged"
        and "images".

    Raises:
        ValueError: a result that is not on one of the patches, or that is malformed.
    """
    masks = bool(results) and all("segmentation" in result for result in results)
    groups: dict[Any, list[tuple[int, Result]]] = defaultdict(list)
    for number, result in enumerate(results, start=1):
        patch = patches.get(result["image_id"])
        if patch is None:
            raise ValueError(
                f"result {number} is on image {result['image_id']!r}, which is not in the patches' "
                "JSON: do the results and the JSON belong together?"
            )
        groups[patch.whole_id].append((number, result))
    ids = list(dict.fromkeys(patch.whole_id for patch in patches.values()))
    todo = [whole for whole in ids if whole in groups]
    jobs = (_job(groups.pop(whole), patches, masks, rules) for whole in todo)
    merged: dict[int, list[Result]] = {}
    counts: Counter[str] = Counter(found=len(results), images=len(todo))
    done = in_parallel(_merge, jobs, total=len(todo), workers=workers, what="merging")
    for number, (found, counted) in done:
        merged[number] = found
        counts.update(counted)
    ordered = [result for number in range(len(todo)) for result in merged[number]]
    counts["merged"] = len(ordered)
    return ordered, counts


class _Job(NamedTuple):
    results: list[tuple[int, Result]]  # with their numbers in the file
    patches: dict[Any, Patch]
    masks: bool
    rules: MergeRules


def _job(
    results: list[tuple[int, Result]], patches: Mapping[Any, Patch], masks: bool, rules: MergeRules
) -> _Job:
    own = {result["image_id"]: patches[result["image_id"]] for _, result in results}
    return _Job(results, own, masks, rules)


def _merge(job: _Job) -> tuple[list[Result], Counter[str]]:
    patch = next(iter(job.patches.values()))
    found = [
        _detection(number, result, job.patches[result["image_id"]], job.masks)
        for number, result in job.results
    ]
    merged, counts = merge_image(found, patch.height, patch.width, job.rules)
    size = patch.height, patch.width
    written = [to_result(detection, patch.whole_id, *size) for detection in merged]
    if any("bbox" not in result for _, result in job.results):
        for result in written:
            del result["bbox"]
    return written, counts


def _detection(number: int, result: Result, patch: Patch, masks: bool) -> Detection:
    window = patch.window
    try:
        score = float(result["score"])
        columns = _mask(result["segmentation"], window) if masks else None
        if columns is None or "bbox" in result:
            x, y, width, height = (float(value) for value in result["bbox"])
            box = x + window.x1, y + window.y1, x + width + window.x1, y + height + window.y1
        else:
            x1, y1, x2, y2 = columns.box()
            box = float(x1), float(y1), float(x2), float(y2)
        if not all(map(math.isfinite, (*box, score))):
            raise ValueError("its box or score is not finite")
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"result {number} is malformed: {error}") from error
    return Detection(result["category_id"], score, box, columns, (window,), cut=False)


def _mask(segmentation: dict[str, Any], window: Window) -> Columns:
    size = [window.y2 - window.y1, window.x2 - window.x1]
    if list(segmentation["size"]) != size:
        raise ValueError(
            f"a mask of {segmentation['size']} pixels (height, width) on a patch of {size}"
        )
    return from_rle(segmentation).shift(window.x1, window.y1)


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write results, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            file.writelines(_lines(results))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(results: Sequence[Result]) -> Iterator[str]:
    yield "["
    for number, result in enumerate(results):
        yield ("," if number else "") + "\n" + json.dumps(result)
    yield "\n]\n"
