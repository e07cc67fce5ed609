"""Objects with and without masks in one image, through detectron2's mapper and ours."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks

import d2det
from d2det.data.mapper import TrainMapper, masks_may_lack

SQUARE = [[10.0, 10, 20, 10, 20, 20, 10, 20]]


@pytest.fixture
def record(tmp_path):
    """An image of 40 x 30: a square with a mask, a box without, a crowd region."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = [[10, 10, 20, 20], [22, 4, 36, 26], [0, 0, 5, 5]]
    annotations = [
        {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "iscrowd": int(i == 2)}
        for i, b in enumerate(boxes)
    ]
    annotations[0]["segmentation"] = copy.deepcopy(SQUARE)
    annotations[2]["segmentation"] = {"size": [30, 40], "counts": [0, 1200]}
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": 30,
        "width": 40,
        "annotations": annotations,
    }


def mapper(may_lack=True, mask_format="polygon", augmentations=(), **kwargs):
    return TrainMapper(
        True, augmentations=list(augmentations), image_format="RGB", use_instance_mask=True,
        instance_mask_format=mask_format, masks_may_lack=may_lack, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_an_object_without_a_mask_keeps_its_box_and_gets_an_empty_one(record, mask_format):
    found = mapper(mask_format=mask_format)(record)["instances"]
    assert found.gt_classes.tolist() == [0, 1]
    assert found.gt_boxes.tensor.tolist() == [[10, 10, 20, 20], [22, 4, 36, 26]]
    assert found.gt_masks.nonempty().tolist() == [True, False]


def test_for_other_mask_heads_it_is_left_out(record):
    found = mapper(may_lack=False)(record)["instances"]
    assert found.gt_classes.tolist() == [0]
    assert isinstance(found.gt_masks, PolygonMasks)


@pytest.mark.parametrize("with_masks", [0, 2])
def test_all_or_none_is_as_detectron2_has_it(record, with_masks):
    record["annotations"] = record["annotations"][:2]
    for annotation in record["annotations"]:
        annotation.pop("segmentation", None)
        if with_masks:
            annotation["segmentation"] = copy.deepcopy(SQUARE)
    theirs = DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True
    )(copy.deepcopy(record))["instances"]  # fmt: skip
    ours = mapper()(record)["instances"]
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_classes, theirs.gt_classes)
    if with_masks:
        assert [p[0].tolist() for p in ours.gt_masks] == [p[0].tolist() for p in theirs.gt_masks]
    else:
        assert not ours.gt_masks.nonempty().any()


def test_flips_and_crops_move_what_is_there(record):
    found = mapper(augmentations=[T.RandomFlip(1.0)])(copy.deepcopy(record))["instances"]
    assert found.gt_boxes.tensor.tolist() == [[20, 10, 30, 20], [4, 4, 18, 26]]
    (polygon,) = found.gt_masks.polygons[0]
    assert polygon.reshape(-1, 2)[:, 0].max() == 30

    class Crop(T.Augmentation):
        def get_transform(self, image):
            return T.CropTransform(14, 0, 26, 30)

    # Of bitmaps: detectron2 needs shapely to crop polygons.
    square = np.zeros((30, 40), np.uint8)
    square[10:20, 10:20] = 1
    encoded = mask_util.encode(np.asfortranarray(square))
    record["annotations"][0]["segmentation"] = encoded
    found = mapper(True, "bitmask", [Crop()], recompute_boxes=True)(copy.deepcopy(record))
    found = found["instances"]
    assert found.gt_boxes.tensor.tolist() == [[0, 10, 6, 20], [8, 4, 22, 26]]

    class Away(T.Augmentation):
        def get_transform(self, image):
            return T.CropTransform(22, 0, 18, 30)

    found = mapper(True, "bitmask", [Away()], recompute_boxes=True)(record)["instances"]
    assert found.gt_classes.tolist() == [1]


def test_which_heads_take_objects_without_masks():
    cfg = d2det.add_d2det_config(get_cfg())
    assert masks_may_lack(cfg)  # no masks are asked for
    cfg.MODEL.MASK_ON = True
    assert not masks_may_lack(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "D2DetMaskHead"
    assert masks_may_lack(cfg)
    assert TrainMapper(cfg).masks_may_lack
