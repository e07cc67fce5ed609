"""Registering any data set in COCO's format, with its faults found before training."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco_annotations import Facts, clean_annotations, group_by_image
from .coco_images import check_files, missing_sizes

_logger = logging.getLogger(__name__)


def register_coco(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    purpose: str | None = None,
    categories_of: str | None = None,
) -> int:
    """Check a data set in COCO's format and register it.

    Category ids may have gaps and come in any order: they are numbered from 0 in rising order.
    Boxes are clipped to their image; those without area or outside are dropped, and what was
    changed is counted in one warning. An evaluation reads the JSON as it is.

    Metadata set beside detectron2's own: `has_annotations`; `has_masks` (of any object);
    `without_mask`, the share of objects that have none where others do; `mask_format`, "bitmask"
    where there is any RLE, else "polygon", as INPUT.MASK_FORMAT has it.

    Args:
        name: under which detectron2 will know it. Registering the same content again is allowed,
            as each process of a run has to.
        json_file: annotations.
        image_root: folder to which the JSON's file names are relative.
        purpose: "train": boxes are required, and images whose boxes are all crowd or dropped are
            left out. "test": neither, and the JSON may lack "annotations". None: as "test";
            `check_datasets` then finds a lack of boxes.
        categories_of: name of a data set whose categories hold where the JSON has none.

    Returns:
        Number of classes; 0 if there are no categories and no `categories_of`.

    Raises:
        FileNotFoundError: the JSON, the folder or images do not exist.
        ValueError: the content is not usable; the message says what, where and what to do.
    """
    if purpose not in (None, "train", "test"):
        raise ValueError(f'purpose must be "train", "test" or None, not {purpose!r}')
    json_file, image_root = Path(json_file).expanduser(), Path(image_root).expanduser()
    fingerprint = (*_identity(json_file), str(image_root.resolve()), purpose, categories_of)
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if metadata.get("fingerprint") == fingerprint:
            return len(metadata.get("thing_classes") or [])
        raise ValueError(
            f"a data set named {name!r} is registered already"
            f" ({metadata.get('json_file', 'not by this function')}); choose another name"
        )
    content = read_coco(json_file)
    check_files(content["images"], image_root, json_file)
    sizes = missing_sizes(content["images"], image_root)
    classes, id_map = _classes(content, json_file, categories_of)
    records, facts = _records(content, image_root, json_file, id_map, sizes, purpose)
    if facts.warning:
        _logger.warning("%s: %s", json_file, facts.warning)
    if purpose == "train" and not any(record["annotations"] for record in records):
        raise ValueError(
            f"{json_file} holds no box to train on"
            f" ({facts.warning or 'it has no annotations'}); a set without boxes can only be tested"
        )

    def load() -> list[dict[str, Any]]:
        # Read again rather than kept: the boxes of a large data set fill gigabytes.
        again = read_coco(json_file)
        return _records(again, image_root, json_file, id_map, sizes, purpose)[0]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        fingerprint=fingerprint,
        has_annotations=facts.boxes > 0,
        has_masks=facts.has_masks,
        without_mask=facts.without_mask / max(facts.boxes, 1),
        mask_format=facts.mask_format,
    )
    if classes:
        MetadataCatalog.get(name).set(
            thing_classes=classes, thing_dataset_id_to_contiguous_id=id_map
        )
    return len(classes)


def load_coco(
    content: dict[str, Any], image_root: Path, json_file: Path, *, purpose: str | None = None
) -> tuple[list[dict[str, Any]], list[str], dict[int, int]]:
    """detectron2's records, the class names, and the map from category ids to 0, 1, ...

    The JSON is checked and its boxes are cleaned as in `register_coco`; of the images only whether
    they are there, and their sizes where the JSON has none.

    Args:
        content: of `read_coco`, with categories.
        image_root, purpose: as for `register_coco`.
        json_file: named in messages.

    Raises:
        FileNotFoundError, ValueError: as `register_coco`.
    """
    check_files(content["images"], image_root, json_file)
    classes, id_map = _classes(content, json_file, None)
    sizes = missing_sizes(content["images"], image_root)
    records, facts = _records(content, image_root, json_file, id_map, sizes, purpose)
    if facts.warning:
        _logger.warning("%s: %s", json_file, facts.warning)
    return records, classes, id_map


def read_coco(json_file: Path) -> dict[str, Any]:
    """Read a COCO JSON and check its outline.

    Raises:
        FileNotFoundError, ValueError: as `register_coco`.
    """
    if not json_file.is_file():
        raise FileNotFoundError(f"{json_file} (annotations in COCO's format) is not there")
    try:
        with json_file.open(encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = "it is empty" if json_file.stat().st_size == 0 else str(error)
        raise ValueError(
            f"{json_file} is not valid JSON ({reason}); was it downloaded or written completely?"
        ) from error
    problem = _outline_problem(content)
    if problem:
        raise ValueError(f"{json_file} is not in COCO's format: {problem}")
    if not content["images"]:
        raise ValueError(f"{json_file} lists no images: nothing to train or test on")
    _check_entries(content["images"], ("id", "file_name"), "image", json_file)
    _check_entries(content.get("annotations", []), ("id", "image_id"), "annotation", json_file)
    _check_entries(content.get("categories", []), ("id", "name"), "category", json_file)
    return content


def _outline_problem(content: Any) -> str:
    if not isinstance(content, dict) or "images" not in content:
        found = sorted(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        return (
            "expected an object with the lists 'images', 'annotations' and 'categories', found "
            f"{found}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key, []), list):
            return f"'{key}' is not a list"
    return ""


def _check_entries(entries: list[Any], needed: tuple[str, ...], kind: str, json_file: Path) -> None:
    seen = set()
    for position, entry in enumerate(entries):
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(
                f"{json_file}: {kind} number {position + 1} of {len(entries)} has no {lacking[0]!r}"
            )
        if entry["id"] in seen:
            raise ValueError(
                f"{json_file}: the {kind} id {entry['id']} is used more than once; were several "
                "files joined without numbering them anew?"
            )
        seen.add(entry["id"])


def _identity(json_file: Path) -> tuple[str, int, int]:
    if not json_file.is_file():
        raise FileNotFoundError(f"{json_file} (annotations in COCO's format) is not there")
    stat = json_file.stat()
    return str(json_file.resolve()), stat.st_mtime_ns, stat.st_size


def _classes(
    content: dict[str, Any], json_file: Path, categories_of: str | None
) -> tuple[list[str], dict[int, int]]:
    """Names in the order of their ids, and the map from ids to places in that order."""
    categories = sorted(content.get("categories", []), key=lambda category: category["id"])
    if categories:
        id_map = {category["id"]: i for i, category in enumerate(categories)}
        return [str(category["name"]) for category in categories], id_map
    if content.get("annotations"):
        raise ValueError(
            f"{json_file} has annotations but no 'categories': add the list of "
            '{"id": ..., "name": ...}'
        )
    if categories_of is None:
        return [], {}
    metadata = MetadataCatalog.get(categories_of)
    return list(metadata.thing_classes), dict(metadata.thing_dataset_id_to_contiguous_id)


def _records(
    content: dict[str, Any],
    image_root: Path,
    json_file: Path,
    id_map: dict[int, int],
    sizes: dict[Any, tuple[int, int]],
    purpose: str | None,
) -> tuple[list[dict[str, Any]], Facts]:
    """detectron2's records, in rising order of image ids, and what was found on the way."""
    images = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        width, height = sizes.get(image["id"]) or (int(image["width"]), int(image["height"]))
        path = os.path.join(image_root, image["file_name"])
        images.append({"id": image["id"], "file_name": path, "height": height, "width": width})
    groups = group_by_image(content.get("annotations", []), images)
    facts = clean_annotations(groups, id_map, json_file, leave_out=purpose == "train")
    records = [
        {
            "file_name": image["file_name"],
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": groups.kept[image["id"]],
        }
        for image in images
        if image["id"] in groups.kept
    ]
    return records, facts
