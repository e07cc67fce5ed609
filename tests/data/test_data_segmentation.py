"""Samples of semantic segmentation, and VOC's folders of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2det.data.segmentation import SegmentationMapper, read_labels
from d2det.data.voc_segmentation import CLASSES, register_builtin, register_voc_segmentation
from d2det.engine.loader import _aspect_ratio_groups
from d2det.engine.setup import get_cfg

NAME = "segmentation_data_test"
OBJECTS = {"wide": [("red", (3, 4, 24, 40), False), ("blue", (40, 20, 60, 50), False)]}


@pytest.fixture
def record(write_voc):
    folder = write_voc(OBJECTS, "train")
    register_voc_segmentation(NAME, folder, "train", classes=("background", "a", "b", "c"))
    yield DatasetCatalog.get(NAME)[0]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def mapper(*opts) -> SegmentationMapper:
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "INPUT.MIN_SIZE_TRAIN", (64,),
        "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.TYPE", "absolute", *opts,
    ])  # fmt: skip
    return SegmentationMapper(cfg)


def expected_labels() -> np.ndarray:
    labels = np.zeros((64, 80), int)
    for kind, (x1, y1, x2, y2) in ((1, (3, 4, 24, 40)), (3, (40, 20, 60, 50))):
        labels[y1 - 1 : y2, x1 - 1 : x2] = 255
        labels[y1 : y2 - 1, x1 : x2 - 1] = kind
    return labels


def test_palette_indices_are_labels(record):
    sample = mapper()(record)
    assert sample["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(sample["sem_seg"], expected_labels())
    assert sample["image"].shape == (3, 64, 80)
    assert sample["image"].dtype == torch.uint8
    assert (sample["width"], sample["height"]) == (80, 64)
    assert "sem_seg_file_name" in record  # the record itself is as it was
    # In BGR, as the default format is, red is last.
    inside = sample["sem_seg"] == 1
    assert sample["image"][2][inside].float().mean() > 180
    assert sample["image"][0][inside].float().mean() < 60


@pytest.mark.parametrize("area", [1.0, 0.9])
def test_crops_are_filled_up(record, area):
    """A crop higher than the image and narrower: all rows, grey and ignored below."""
    crop = mapper(
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [96, 48],
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", area, "MODEL.PIXEL_MEAN", [90.0, 100.0, 110.0],
    )  # fmt: skip
    starts = set()
    for _ in range(12):
        sample = crop(record)
        labels = sample["sem_seg"].numpy()
        assert sample["image"].shape == (3, 96, 48) and labels.shape == (96, 48)
        assert (labels[64:] == 255).all() and (sample["image"][:, 64:] == 100).all()
        windows = [x for x in range(80 - 48 + 1)
                   if (labels[:64] == expected_labels()[:, x : x + 48]).all()]  # fmt: skip
        assert windows
        starts.add(windows[0])
    assert len(starts) > 3


def test_image_and_labels_turn_together(record):
    flip = mapper("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (32,))
    seen = set()
    for _ in range(12):
        sample = flip(record)
        assert sample["sem_seg"].shape == sample["image"].shape[1:] == (32, 40)
        red = sample["image"][2].float()
        assert red[sample["sem_seg"] == 1].mean() > 150
        seen.add(bool((sample["sem_seg"][:, :20] == 1).any()))
    assert seen == {True, False}


def test_bad_labels(record, tmp_path):
    other = tmp_path / "other.png"
    Image.new("L", (64, 64)).save(other)
    with pytest.raises(ValueError, match=r"the image is \(64, 80\) and its labels \(64, 64\)"):
        mapper()({**record, "sem_seg_file_name": str(other)})
    Image.new("RGB", (80, 64)).save(other)
    with pytest.raises(ValueError, match=r"other.png is a picture of kind RGB"):
        read_labels(str(other))


def test_sizes_come_from_the_files_where_records_have_none(record, tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "high.png")
    high = {"file_name": str(tmp_path / "high.png")}
    assert _aspect_ratio_groups([record, high, {"width": 2, "height": 1}]) == [0, 1, 0]
    with pytest.raises(ValueError, match=r"ASPECT_RATIO_GROUPING needs .*nowhere"):
        _aspect_ratio_groups([{"file_name": str(tmp_path / "nowhere.png")}])


def test_vocs_own_sets_are_registered():
    register_builtin()  # twice is harmless
    for split in ("train", "val", "trainval", "trainaug"):
        metadata = MetadataCatalog.get(f"voc_2012_sem_seg_{split}")
        assert metadata.evaluator_type == "sem_seg" and metadata.ignore_label == 255
        assert tuple(metadata.stuff_classes) == CLASSES and len(CLASSES) == 21
        assert metadata.dirname.endswith("VOC2012")
