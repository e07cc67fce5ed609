"""Drawing, and pictures of detections beside the ground truth."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2det.engine.setup import get_cfg
from d2det.evaluation.drawing import (
    caption,
    class_color,
    contact_sheet,
    draw_objects,
    enlarge,
    score_label,
    write_image,
)
from d2det.evaluation.masks import encode_masks
from d2det.evaluation.pictures import _mask, write_pictures

GREY = np.full((120, 160, 3), 90, np.uint8)


def test_colors_are_apart_and_stay():
    colors = np.array([class_color(i) for i in range(20)], float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    assert distances[~np.eye(20, dtype=bool)].min() > 25
    assert class_color(7) == class_color(7)


def test_boxes_are_where_they_belong():
    drawn = draw_objects(GREY, np.array([[20.0, 30.0, 70.0, 90.0]]), [3], [""])
    changed = np.argwhere((drawn != GREY).any(axis=2))
    assert abs(changed.min(axis=0) - [30, 20]).max() <= 1
    assert abs(changed.max(axis=0) - [90, 70]).max() <= 1
    assert tuple(drawn[60, 20]) == class_color(3)
    assert (drawn[35:85, 25:65] == 90).all()
    assert (GREY == 90).all()


def test_masks_are_blended_inside_only():
    mask = np.zeros((120, 160), bool)
    mask[40:80, 30:60] = True
    drawn = draw_objects(GREY, np.array([[30, 40, 59, 79]]), [0], [""], [mask])
    expected = 0.6 * 90 + 0.4 * np.array(class_color(0))
    assert np.abs(drawn[60, 45] - expected).max() <= 1
    assert (drawn[100:, 100:] == 90).all()


@pytest.mark.parametrize(
    "box",
    [[0, 0, 159, 119], [150, 2, 158, 9], [-30, -20, 5, 5], [40, 118, 60, 140], [50, 50, 50, 50]],
)
def test_labels_stay_inside(box):
    """Each label is drawn whole, whatever the box: its filled rectangle has the same size."""
    free = draw_objects(GREY, np.array([[60.0, 60.0, 61.0, 61.0]]), [2], ["größer 0.87"])
    there = draw_objects(GREY, np.array([box], float), [2], ["größer 0.87"])

    def text_pixels(image):
        # Black on the label's colour: nowhere else in the picture.
        return int((image < 15).all(axis=2).sum()) + int((image > 245).all(axis=2).sum())

    assert text_pixels(free) > 15
    assert text_pixels(there) == pytest.approx(text_pixels(free), rel=0.25)


def test_labels_make_room_for_each_other():
    """Ten boxes one on another: their labels hide each other less than at one place."""
    image = np.full((400, 600, 3), 90, np.uint8)
    boxes = np.array([[250, 180, 330, 230]] * 3 + [[60, 60, 90, 90]], float)

    def dark(label_boxes):
        labels = ["object 0.50 | 0.75"] * len(label_boxes)
        drawn = draw_objects(image, label_boxes, [2] * len(label_boxes), labels)
        return int((drawn < 15).all(axis=2).sum())

    alone = dark(boxes[3:])
    assert alone > 50
    assert dark(boxes) == pytest.approx(4 * alone, rel=0.1)  # every letter is to be seen


def test_masks_that_are_empty_or_everything():
    empty, full = np.zeros((120, 160), bool), np.ones((120, 160), np.uint8)
    box = np.array([[5.0, 5.0, 20.0, 20.0]])
    without = draw_objects(GREY, box, [1], ["x"])
    assert (draw_objects(GREY, box, [1], ["x"], [empty]) == without).all()
    drawn = draw_objects(GREY, box, [1], [""], [full])
    assert np.abs(drawn[60, 80] - (0.6 * 90 + 0.4 * np.array(class_color(1)))).max() <= 1


def test_labels_name_both_scores():
    assert score_label("cat", 0.876) == "cat 0.88"
    assert score_label("cat", 0.876, 1.1) == "cat 0.88 | 1.10"


def test_no_objects():
    assert (draw_objects(GREY, np.zeros((0, 4)), [], [], []) == GREY).all()


def test_small_images_are_enlarged_by_whole_factors():
    assert enlarge(GREY, 160)[1] == 1
    image, factor = enlarge(GREY, 161)
    assert factor == 2
    assert image.shape == (240, 320, 3)


def test_caption_and_sheet_sizes():
    titled = caption(GREY, "a very long text " * 20)
    assert titled.shape[1:] == (160, 3)
    assert (titled[-120:] == GREY).all()
    sheet = contact_sheet([GREY] * 3, columns=2, width=80)
    assert sheet.shape == (3 * 16 + 2 * 60, 3 * 16 + 2 * 80, 3)
    assert contact_sheet([GREY], columns=2, width=80).shape == (2 * 16 + 60, 2 * 16 + 80, 3)


def test_mask_formats_agree():
    polygon = [[10, 20, 40, 20, 40, 50, 10, 50], [35, 45, 60, 45, 60, 60, 35, 60]]
    from pycocotools import mask as mask_util

    rle = mask_util.merge(mask_util.frPyObjects(polygon, 120, 160))
    from_rle = _mask(rle, (240, 320), 2)
    from_polygon = _mask(polygon, (240, 320), 2)
    assert from_rle.shape == from_polygon.shape == (240, 320)
    assert from_polygon[94, 76] == 1  # where the two overlap
    union = (from_rle | from_polygon).sum()
    assert (from_rle & from_polygon).sum() / union > 0.93


@pytest.fixture
def finished_run(tmp_path):
    """A config whose OUTPUT_DIR holds the predictions on five images, annotated or not."""
    names = []

    def build(*, annotated=True):
        name = f"pictures_{annotated}"
        records, predictions = [], []
        for number in range(5):
            file = tmp_path / f"photo {number}.png"
            cv2.imwrite(str(file), GREY)
            truth = {
                "bbox": [10, 10, 60, 60],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "segmentation": [[10, 10, 60, 10, 60, 60, 10, 60]],
            }
            records.append(
                {
                    "file_name": str(file),
                    "image_id": 7 * number,
                    "height": 120,
                    "width": 160,
                    "annotations": [truth] if annotated else [],
                }
            )
            found = [
                {"image_id": 7 * number, "category_id": 0, "bbox": [80, 20, 40, 40], "score": score}
                for score in (0.9, 0.1)
            ]
            predictions.append({"image_id": 7 * number, "instances": found})
        DatasetCatalog.register(name, lambda: records)
        names.append(name)
        MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
        cfg = get_cfg()
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        cfg.TEST.NUM_PICTURES = 3
        folder = tmp_path / "run" / "inference" / name
        folder.mkdir(parents=True)
        torch.save(predictions, folder / "instances_predictions.pth")
        return cfg, name

    yield build
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_pictures_show_both_sides(finished_run):
    cfg, name = finished_run()
    folder = write_pictures(cfg, name)
    assert sorted(path.name for path in folder.iterdir()) == [
        "000_photo_0.jpg",
        "001_photo_2.jpg",
        "002_photo_4.jpg",
        "index.jpg",
    ]
    picture = cv2.imread(str(folder / "000_photo_0.jpg"))
    side = 160 * 3  # enlarged to at least 480
    assert picture.shape[1] == 2 * side + 12
    top = picture.shape[0] - 120 * 3

    def has_color(x, y, index):
        patch = picture[top + y - 3 : top + y + 4, x - 3 : x + 4].reshape(-1, 3).astype(int)
        return np.abs(patch - class_color(index)).sum(axis=1).min() < 90

    assert has_color(30, 100, 1)  # left edge of the ground truth, on the left
    assert not has_color(240, 100, 0)
    assert has_color(side + 12 + 240, 100, 0)  # left edge of the detection, on the right
    assert not has_color(side + 12 + 30, 100, 1)


def test_ground_truth_masks_are_shown_only_beside_predicted_ones(finished_run):
    cfg, name = finished_run()
    inside = []
    for cfg.MODEL.MASK_ON in (False, True):
        picture = cv2.imread(str(write_pictures(cfg, name) / "000_photo_0.jpg"))
        inside.append(picture[-120 * 3 + 100, 100].astype(int))
    assert np.abs(inside[0] - 90).max() <= 3
    assert np.abs(inside[1] - (0.6 * 90 + 0.4 * np.array(class_color(1)))).max() <= 6


def test_pictures_name_the_mask_score(finished_run, monkeypatch):
    cfg, name = finished_run()
    file = next(Path(cfg.OUTPUT_DIR).rglob("instances_predictions.pth"))
    predictions = torch.load(file, weights_only=False)
    mask = np.zeros((120, 160), bool)
    mask[20:60, 80:120] = True
    for prediction in predictions:
        for item in prediction["instances"]:
            item["mask_score"] = item["score"] + 0.25
            item["segmentation"] = encode_masks(torch.from_numpy(mask)[None])[0]
    torch.save(predictions, file)
    labels = []

    def record(image, boxes, classes, texts, masks=None):
        labels.append((list(texts), None if masks is None else [int(m.sum()) for m in masks]))
        return image

    monkeypatch.setattr("d2det.evaluation.pictures.draw_objects", record)
    cfg.MODEL.MASK_ON, cfg.TEST.NUM_PICTURES = True, 1
    write_pictures(cfg, name)
    assert labels[0] == (["cat 0.90 | 1.15"], [9 * mask.sum()])  # drawn three times as large
    assert labels[1][0] == ["dog"]


def test_pictures_replace_those_of_an_earlier_run_but_nothing_else(finished_run):
    cfg, name = finished_run()
    folder = write_pictures(cfg, name)
    (folder / "mine.jpg").write_bytes(b"x")
    cfg.TEST.NUM_PICTURES = 1
    write_pictures(cfg, name)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000_photo_0.jpg", "index.jpg", "mine.jpg"]


def test_pictures_without_ground_truth_have_one_side(finished_run):
    cfg, name = finished_run(annotated=False)
    folder = write_pictures(cfg, name)
    assert cv2.imread(str(folder / "000_photo_0.jpg")).shape[1] == 480


def test_no_pictures(finished_run):
    cfg, name = finished_run()
    cfg.TEST.NUM_PICTURES = 0
    assert write_pictures(cfg, name) is None
    cfg.TEST.NUM_PICTURES = 2
    cfg.OUTPUT_DIR = cfg.OUTPUT_DIR + "_other"
    assert write_pictures(cfg, name) is None


def test_unwritable_pictures_are_an_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        write_image(tmp_path / "none" / "x.jpg", GREY)
