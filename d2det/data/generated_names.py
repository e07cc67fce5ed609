"""Names and folders of the generated data sets, known without drawing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .shapes import CLASSES, RECIPES

VERSION = 1  # raise it whenever the same seed would give other pictures or annotations
SPLITS = {"train": 2000, "val": 400}
DEFAULT_SIZE = 192
DEFAULT_SEED = 0


def dataset_folder(
    root: str | os.PathLike[str],
    split: str,
    *,
    num_images: int,
    size: int,
    seed: int,
    dataset: str = "shapes",
) -> Path:
    """Folder of one data set: everything its content depends on is in the name."""
    name = split if dataset == "shapes" else f"{dataset}-{split}"
    return Path(root) / f"v{VERSION}" / f"{name}-{num_images}-{size}px-seed{seed}"


def register_generated(root: str | os.PathLike[str] | None = None) -> None:
    """Register "shapes_train", "shapes_val", "shapes_deformed_train" and "shapes_deformed_val".

    They are drawn when first asked for.

    Args:
        root: where to write; default `$DETECTRON2_DATASETS/shapes`, or `datasets/shapes`.
    """
    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "shapes"
    for dataset in RECIPES:
        for split, num_images in SPLITS.items():
            _register(Path(root), dataset, split, num_images)


def _register(root: Path, dataset: str, split: str, num_images: int) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = f"{dataset}_{split}"
    options: dict[str, Any] = {
        "num_images": num_images,
        "size": DEFAULT_SIZE,
        "seed": DEFAULT_SEED,
        "dataset": dataset,
    }
    folder = dataset_folder(root, split, **options)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    def load() -> list[dict]:
        from detectron2.data.datasets import load_coco_json

        from .generated import write_dataset

        json_file = write_dataset(root, split, **options)
        return load_coco_json(str(json_file), str(json_file.parent / "images"), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(folder / f"instances_{split}.json"),
        image_root=str(folder / "images"),
        evaluator_type="coco",
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        has_masks=True,
        mask_format="polygon",
        generated=True,
    )
