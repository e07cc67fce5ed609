"""Names and folders of the generated data set, known without drawing anything."""

from __future__ import annotations

import os
from pathlib import Path

from .shapes import CLASSES

VERSION = 1  # raise it whenever the same seed would give other pictures or annotations
SPLITS = {"train": 2000, "val": 400}
DEFAULT_SIZE = 192
DEFAULT_SEED = 0


def dataset_folder(
    root: str | os.PathLike[str], split: str, *, num_images: int, size: int, seed: int
) -> Path:
    """Folder of one data set: everything its content depends on is in the name."""
    return Path(root) / f"v{VERSION}" / f"{split}-{num_images}-{size}px-seed{seed}"


def register_generated(root: str | os.PathLike[str] | None = None) -> None:
    """Register "shapes_train" and "shapes_val"; they are drawn when first asked for.

    Args:
        root: where to write; default `$DETECTRON2_DATASETS/shapes`, or `datasets/shapes`.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "shapes"
    for split, num_images in SPLITS.items():
        name = f"shapes_{split}"
        options = {"num_images": num_images, "size": DEFAULT_SIZE, "seed": DEFAULT_SEED}
        folder = dataset_folder(root, split, **options)
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

        def load(name: str = name, split: str = split, options: dict = options) -> list[dict]:
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
