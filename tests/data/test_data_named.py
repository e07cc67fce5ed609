"""Objects365 as it is released, and configs of large vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2det.data import objects365_names
from d2det.data.checks import check_datasets
from d2det.data.named import register_named
from d2det.engine.setup import get_cfg

NAMES = (
    "images/v1/patch8/objects365_v1_00420917.jpg",
    "images/v2/patch16/objects365_v2_00900001.jpg",
)
MISSING = "images/v2/patch16/objects365_v2_00908726.jpg"  # in the JSON, but not to download


@pytest.fixture
def objects365(tmp_path):
    """A function that writes both splits with images below `prefix`."""

    def write(place) -> Path:
        for split in ("train", "val"):
            names = [*NAMES, MISSING] if split == "train" else NAMES
            images = [
                {"id": i + 7, "file_name": n, "height": 30, "width": 40}
                for i, n in enumerate(names)
            ]
            annotations = [
                {"id": i + 1, "image_id": i + 7, "category_id": 365 - i, "iscrowd": 0, "area": 100,
                 "bbox": [1, 2, 10, 10]} for i in range(len(names))
            ]  # fmt: skip
            categories = [{"id": i + 1, "name": n} for i, n in enumerate(objects365_names.CLASSES)]
            path = tmp_path / "objects365" / "annotations" / f"zhiyuan_objv2_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(
                {"images": images, "annotations": annotations, "categories": categories[::-1]}
            ))  # fmt: skip
            for name in NAMES:
                image = tmp_path / "objects365" / split / place(name)
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(image)
        register_named(tmp_path)
        return tmp_path

    yield write
    register_named()


@pytest.mark.parametrize("place", [str, lambda n: "/".join(Path(n).parts[-2:])])
def test_objects365_in_both_layouts(objects365, place):
    root = objects365(place)
    check_datasets(get_cfg("Objects365/d2det_R_50_FPN_2x"))
    train = DatasetCatalog.get("objects365_v2_train")
    assert [Path(r["file_name"]) for r in train] == [
        root / "objects365" / "train" / place(name) for name in NAMES
    ]
    assert [r["annotations"][0]["category_id"] for r in train] == [364, 363]
    assert len(DatasetCatalog.get("objects365_v2_val")) == 2


def test_a_lacking_image_is_named(objects365):
    root = objects365(str)
    (root / "objects365" / "val" / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match="objects365_v2_00900001.jpg"):
        DatasetCatalog.get("objects365_v2_val")


def test_names_are_whole_and_unlike():
    assert len(objects365_names.CLASSES) == len(set(objects365_names.CLASSES)) == 365
    assert MetadataCatalog.get("objects365_v2_val").thing_classes[0] == "Person"
    assert objects365_names.CLASSES[-1] == "Table Tennis"


@pytest.mark.parametrize(
    ("name", "classes"),
    [("LVIS/d2det_R_50_FPN", 1203), ("Objects365/d2det_R_50_FPN_2x", 365)],
)
def test_large_vocabularies_as_released(name, classes):
    cfg = get_cfg(name)
    heads = cfg.MODEL.ROI_HEADS
    assert heads.NUM_CLASSES == classes
    assert (heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST) == (1e-4, 0.3)
    assert heads.PRE_REGRESSION_TOPK == cfg.TEST.DETECTIONS_PER_IMAGE == 300
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    assert cfg.DATALOADER.REPEAT_THRESHOLD == 1e-3
    assert not heads.SOFT_NMS.ENABLED or heads.SOFT_NMS.MIN_SCORE <= heads.SCORE_THRESH_TEST
