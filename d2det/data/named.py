"""Data sets with a name of their own, read from the folder DETECTRON2_DATASETS when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import isaid, objects365_names

# In the training annotations of Objects365 v2, but not among its images.
_OBJECTS365_MISSING = frozenset(
    {"objects365_v2_00908726.jpg", "objects365_v1_00320532.jpg", "objects365_v1_00320534.jpg"}
)


def register_named(root: str | os.PathLike[str] | None = None) -> None:
    """Register "isaid_train", "isaid_val", "objects365_v2_train" and "objects365_v2_val".

    iSAID: `isaid/<split>/instancesonly_filtered_<split>.json` and `isaid/<split>/images`, as
    `d2det.tools.cut_patches` and iSAID's development kit write them. Objects365:
    `objects365/annotations/zhiyuan_objv2_<split>.json`, and images below `objects365/<split>` as
    the JSON names them (images/v1/patch0/...) or without the leading folders (patch0/...).

    Args:
        root: parent of these folders; default `$DETECTRON2_DATASETS`, or `datasets`.
    """
    root = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for split in ("train", "val"):
        json_file, image_root = isaid.split_paths(root / "isaid", split)
        _register(f"isaid_{split}", json_file, image_root, isaid.CLASSES, split, _check_isaid)
        folder = root / "objects365"
        json_file = folder / "annotations" / f"zhiyuan_objv2_{split}.json"
        _register(
            f"objects365_v2_{split}",
            json_file,
            folder / split,
            objects365_names.CLASSES,
            split,
            _place_objects365,
        )


def _register(
    name: str,
    json_file: Path,
    image_root: Path,
    classes: Sequence[str],
    split: str,
    prepare: Callable[[dict[str, Any], Path, Path], None],
) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    def load() -> list[dict[str, Any]]:
        from .coco import load_coco, read_coco

        content = read_coco(json_file)
        found = sorted(category["id"] for category in content.get("categories", []))
        if found != list(range(1, len(classes) + 1)):
            raise ValueError(
                f"{json_file} has {len(found)} categories; {name} has the ids 1 to {len(classes)}"
            )
        prepare(content, image_root, json_file)
        purpose = "train" if split == "train" else "test"
        return load_coco(content, image_root, json_file, purpose=purpose)[0]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(classes))},
        has_annotations=True,
    )


def _check_isaid(content: dict[str, Any], image_root: Path, json_file: Path) -> None:
    """The official ids, and annotations from 1: COCO's evaluation counts an id 0 as unmatched."""
    ids = isaid.official_ids(content["categories"])
    wrong = [c["name"] for c in content["categories"] if ids[c["id"]] != c["id"]]
    if wrong or any(annotation["id"] == 0 for annotation in content.get("annotations", [])):
        reason = f"another id for {wrong[0]} than iSAID's" if wrong else "an annotation of id 0"
        raise ValueError(
            f"{json_file} has {reason}: cut the images by python -m d2det.tools.cut_patches "
            "--preset isaid, which numbers them as the evaluation needs"
        )


def _place_objects365(content: dict[str, Any], image_root: Path, json_file: Path) -> None:
    """Leave out the missing images, and name the others as they lie on the disk."""
    content["images"] = [
        image
        for image in content["images"]
        if Path(image["file_name"]).name not in _OBJECTS365_MISSING
    ]
    first = content["images"][0]["file_name"] if content["images"] else ""
    if not (image_root / first).is_file():
        for image in content["images"]:
            image["file_name"] = "/".join(Path(image["file_name"]).parts[-2:])
