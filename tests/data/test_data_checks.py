"""What is said, before training, of data sets that are missing or do not fit the model."""

from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2det.data.checks import check_datasets
from d2det.data.coco import register_coco

_numbers = itertools.count()


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture
def add(tmp_path):
    """Register a data set of one image; returns its name."""
    made = []
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    def run(classes=("cat", "dog"), masks=None, boxes=True, by=register_coco):
        name = f"checks_test_{next(_numbers)}"
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
            "categories": [{"id": i + 1, "name": c} for i, c in enumerate(classes)],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        }
        if masks:
            content["annotations"][0]["segmentation"] = masks
        if not boxes:
            del content["annotations"]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        if by is register_coco:
            register_coco(name, path, tmp_path)
        else:
            register_coco_instances(name, {}, str(path), str(tmp_path))
        made.append(name)
        return name

    yield run
    for name in made:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_all_in_order(cfg, add):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (add(), add()), (add(), add(boxes=False))
    check_datasets(cfg)


def test_no_data_set_at_all(cfg):
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        check_datasets(cfg)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("by", [register_coco, register_coco_instances])
def test_class_count(cfg, add, key, by):
    cfg.DATASETS[key] = (add(by=by),)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(ValueError, match=r"is 80, .*set MODEL\.ROI_HEADS\.NUM_CLASSES 2"):
        check_datasets(cfg)


def test_class_count_of_a_one_stage_detector(cfg, add):
    cfg.DATASETS.TRAIN = (add(),)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(ValueError, match=r"set MODEL\.RETINANET\.NUM_CLASSES 2"):
        check_datasets(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    check_datasets(cfg)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("dog", "cat"), "class 0 is 'cat' in the one and 'dog' in the other"),
        (("cat", "dog", "owl"), "2 in the one and 3 in the other"),
    ],
)
def test_classes_differ_between_train_and_test(cfg, add, other, message):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (add(),), (add(other),)
    with pytest.raises(ValueError, match=message):
        check_datasets(cfg)


def test_unknown_name_with_a_close_match(cfg):
    cfg.DATASETS.TRAIN = ("shape_train",)
    with pytest.raises(ValueError, match=r"did you mean .*shapes_train.*--train-json"):
        check_datasets(cfg)


def test_unknown_name_unlike_any(cfg):
    cfg.DATASETS.TEST = ("zzzzzzzzzzzzzzz",)
    with pytest.raises(ValueError, match="none of a similar name"):
        check_datasets(cfg)
    assert "zzzzzzzzzzzzzzz" not in MetadataCatalog.list()


def test_files_of_a_named_data_set_are_missing(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("d2det.data.checks.os.path.exists", lambda path: False)
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    with pytest.raises(FileNotFoundError) as caught:
        check_datasets(cfg)
    assert "annotations/instances_train2017.json is not there" in str(caught.value)
    assert f"DETECTRON2_DATASETS, now {tmp_path}" in str(caught.value)


def test_generated_data_is_not_drawn(cfg, monkeypatch):
    monkeypatch.setitem(DatasetCatalog.data, "shapes_train", lambda: pytest.fail("was drawn"))
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.MASK_ON = True
    check_datasets(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    with pytest.raises(ValueError, match="has 6 classes"):
        check_datasets(cfg)


def test_training_without_boxes(cfg, add):
    cfg.DATASETS.TRAIN = (add(boxes=False),)
    with pytest.raises(ValueError, match="has no boxes"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), cfg.DATASETS.TRAIN
    check_datasets(cfg)


def test_masks_are_needed(cfg, add):
    cfg.DATASETS.TRAIN = (add(),)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"has no masks: set MODEL\.MASK_ON False"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN = (add(masks=[[1, 1, 9, 1, 9, 9]]),)
    check_datasets(cfg)


def test_many_objects_without_masks_need_a_head_that_takes_them(cfg, add, monkeypatch):
    name = add(masks=[[1, 1, 9, 1, 9, 9]])
    metadata = vars(MetadataCatalog.get(name))
    monkeypatch.setitem(metadata, "without_mask", 0.04)
    cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON = (name,), True
    check_datasets(cfg)
    monkeypatch.setitem(metadata, "without_mask", 0.25)
    with pytest.raises(ValueError, match="no valid mask for 25% of its objects.*D2DetMaskHead"):
        check_datasets(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "D2DetMaskHead"
    check_datasets(cfg)


def test_rle_needs_bitmasks(cfg, add):
    cfg.DATASETS.TRAIN = (add(masks={"size": [30, 40], "counts": [40, 10, 1150]}),)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"set INPUT\.MASK_FORMAT bitmask"):
        check_datasets(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_datasets(cfg)


def test_an_empty_data_set(cfg):
    name = f"checks_test_{next(_numbers)}"
    DatasetCatalog.register(name, list)
    try:
        cfg.DATASETS.TRAIN = (name,)
        with pytest.raises(ValueError, match="is empty"):
            check_datasets(cfg)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
