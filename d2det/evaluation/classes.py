"""Class names that stay with the weights, since data sets may not be there at prediction time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog

if TYPE_CHECKING:
    from detectron2.config import CfgNode

FILE_NAME = "classes.json"


def names_from_datasets(cfg: CfgNode) -> list[str]:
    """Names of the first registered data set of `cfg` that has NUM_CLASSES of them, else []."""
    registered = DatasetCatalog.list()
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("thing_classes") if name in registered else None
        if names and len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            return list(names)
    return []


def save_class_names(cfg: CfgNode) -> None:
    """Write the class names to `OUTPUT_DIR/classes.json`, if a data set gives them."""
    names = names_from_datasets(cfg)
    if names:
        text = json.dumps({"classes": names}, indent=1, ensure_ascii=False)
        (Path(cfg.OUTPUT_DIR) / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_class_names(folder: str | Path) -> list[str]:
    """Names from `folder/classes.json`; [] where the file is missing or is something else."""
    try:
        content = json.loads((Path(folder) / FILE_NAME).read_text(encoding="utf-8"))
        return [str(name) for name in content["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def fill_up(names: list[str], count: int) -> list[str]:
    """`names`, or "class 0", "class 1", ... where there are not `count` of them."""
    return names if len(names) == count else [f"class {index}" for index in range(count)]
