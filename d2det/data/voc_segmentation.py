"""PASCAL VOC 2012's segmentation, as it comes, beside the detection sets that detectron2 knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

CLASSES = ("background", *CLASS_NAMES)
# Split to the list of its images and the folder of its labels. The last one is usually made of
# VOC's train and the Semantic Boundaries Dataset: 10,582 images.
SPLITS = {
    "train": ("train", "SegmentationClass"),
    "val": ("val", "SegmentationClass"),
    "trainval": ("trainval", "SegmentationClass"),
    "trainaug": ("trainaug", "SegmentationClassAug"),
}


def register_voc_segmentation(
    name: str,
    dirname: str | os.PathLike[str],
    split: str,
    *,
    labels: str = "SegmentationClass",
    classes: tuple[str, ...] = CLASSES,
) -> None:
    """Register a folder laid out as VOC's, for semantic segmentation.

    Args:
        name: under which detectron2 will know it.
        dirname: has `ImageSets/Segmentation/<split>.txt`, `JPEGImages/<image>.jpg` and
            `<labels>/<image>.png`, whose pixel values are classes, 255 what is not counted.
        split: name of the list.
        labels: folder of the label pictures.
        classes: names, in the order of the pixel values.
    """
    DatasetCatalog.register(name, lambda: _load(Path(dirname), split, labels))
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes),
        dirname=str(dirname),
        split=split,
        evaluator_type="sem_seg",
        ignore_label=255,
    )


def _load(folder: Path, split: str, labels: str) -> list[dict[str, Any]]:
    lines = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().splitlines()
    return [
        {
            "file_name": str(folder / "JPEGImages" / f"{image}.jpg"),
            "sem_seg_file_name": str(folder / labels / f"{image}.png"),
            "image_id": image,
        }
        for image in (line.strip() for line in lines)
        if image
    ]


def register_builtin(root: str | os.PathLike[str] | None = None) -> None:
    """Register "voc_2012_sem_seg_train", "..._val", "..._trainval" and "..._trainaug".

    Args:
        root: has the folder VOC2012; default `$DETECTRON2_DATASETS`, or `datasets`.
    """
    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    for split, (images, labels) in SPLITS.items():
        name = f"voc_2012_sem_seg_{split}"
        if name not in DatasetCatalog.list():
            register_voc_segmentation(name, Path(root) / "VOC2012", images, labels=labels)
