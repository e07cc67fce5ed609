"""UAVDT's data sets by name: uavdt_train, uavdt_val, uavdt_trainval and uavdt_test."""

from __future__ import annotations

import os
from pathlib import Path

SPLITS = ("train", "val", "trainval", "test")


def register_uavdt(root: str | os.PathLike[str] | None = None) -> None:
    """Register the four data sets; nothing is read, and nothing needs to be there.

    Args:
        root: what `d2det.tools.convert_uavdt` wrote; default `$DETECTRON2_DATASETS/uavdt`, or
            `datasets/uavdt`.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "uavdt"
    for split in SPLITS:
        name = f"uavdt_{split}"
        json_file = Path(root) / "annotations" / f"instances_{split}.json"
        image_root = Path(root) / "images"
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

        def load(
            name: str = name,
            json_file: Path = json_file,
            image_root: Path = image_root,
            purpose: str = "train" if "train" in split else "test",
        ) -> list[dict]:
            from .coco import load_coco, read_coco

            records, classes, id_map = load_coco(
                read_coco(json_file), image_root, json_file, purpose=purpose
            )
            MetadataCatalog.get(name).set(
                thing_classes=classes, thing_dataset_id_to_contiguous_id=id_map
            )
            return records

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=str(json_file), image_root=str(image_root), evaluator_type="uavdt"
        )
