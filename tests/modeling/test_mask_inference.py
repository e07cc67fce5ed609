"""Instance segmentation through detectron2: predictions, and detectron2's own tools on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import BitMasks, Instances

from .mask_batches import QUICK, TWO


def test_boxes_are_pooled_again_for_masks_and_suppressed_before_regression_only(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    heads, calls = model.roi_heads, []
    heads.dense_pooler.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    with torch.no_grad():
        (found,) = model.inference(batch(TWO[0]), do_postprocess=False)
        (_, first), (maps, second) = calls[0][0], calls[1][0]
        assert torch.equal(second[:, 1:], found.pred_boxes.tensor)
        assert not torch.equal(first, second)
        # The candidates of NMS are all returned, in their order: nothing suppresses afterwards.
        assert len(first) == len(second)
        trunk = heads.dense_head.tower(heads.dense_pooler(maps, second))
        masks, ranks = heads.mask_head.predict(trunk, found.pred_classes, found.scores)
    assert torch.equal(found.pred_masks, masks) and torch.equal(found.mask_scores, ranks)
    assert found.scores.diff().max() <= 0


def test_masks_of_given_boxes(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    inputs = batch(*TWO)
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)
        expected = [(x.pred_masks, x.mask_scores) for x in found]
        given = []
        for x in found:
            y = Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes)
            given.append(y)
            y.scores = x.scores
        again = model.inference(inputs, given, do_postprocess=False)
        for x, (masks, ranks) in zip(again, expected, strict=True):
            torch.testing.assert_close(x.pred_masks, masks)
            torch.testing.assert_close(x.mask_scores, ranks)
        scores = [x.scores for x in given]
        for x in given:
            x.remove("scores")
        for x, s in zip(model.inference(inputs, given, do_postprocess=False), scores, strict=True):
            # As certain as can be: the rank is 1 where it was the class score.
            torch.testing.assert_close(x.mask_scores + s - 1, expected.pop(0)[1])


def test_no_detections(small_cfg, batch):
    model = build_model(small_cfg(QUICK, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)).eval()
    inputs = batch((64, 64, [], []), (64, 80, [], []))
    with torch.no_grad():
        for output in model(inputs):
            assert output["instances"].mask_scores.shape == (0,)
            assert output["instances"].pred_masks.shape[0] == 0


def test_a_batch_predicts_what_its_images_do_alone(small_cfg, batch):
    model = build_model(small_cfg("COCO-InstanceSegmentation/d2det_R_50_FPN_2x.yaml")).eval()
    inputs = batch((96, 96, [], []), (96, 96, [], []))
    with torch.no_grad():
        together = model.inference(inputs, do_postprocess=False)
        alone = [model.inference([x], do_postprocess=False)[0] for x in inputs]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.mask_scores, b.mask_scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.pred_masks, b.pred_masks, atol=1e-4, rtol=1e-4)


def test_masks_are_pasted_where_their_boxes_are(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    torch.nn.init.zeros_(model.roi_heads.mask_head.masks.predictor.weight)
    torch.nn.init.ones_(model.roi_heads.mask_head.masks.predictor.bias)  # the mask fills its box
    inputs = batch((64, 80, [], []))
    inputs[0]["height"], inputs[0]["width"] = 128, 160
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
    assert found.pred_masks.shape[1:] == (128, 160)
    boxes = BitMasks(found.pred_masks).get_bounding_boxes().tensor
    large = found.pred_boxes.area() > 100
    assert large.any()
    assert (boxes - found.pred_boxes.tensor)[large].abs().max() < 2.5


def photo(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_default_predictor_and_test_time_augmentation(small_cfg, tmp_path):
    cfg = small_cfg(QUICK)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = 96, (64, 96), True
    found = DefaultPredictor(cfg)(photo())["instances"]
    assert found.pred_masks.shape == (len(found), 96, 128) and len(found) > 0
    image = torch.as_tensor(photo().transpose(2, 0, 1).copy())
    given = {"image": image, "height": 192, "width": 256, "file_name": ""}
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([given])[0]["instances"]
    assert found.pred_masks.shape == (len(found), 192, 256) and len(found) > 0


def test_coco_evaluator_takes_the_predictions(small_cfg, batch, tmp_path):
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    model = build_model(small_cfg(QUICK)).eval()
    with torch.no_grad():
        found = model(batch(TWO[0]))[0]["instances"]
    rows = instances_to_coco_json(found, 1)
    assert len(rows) == len(found) and all("segmentation" in row for row in rows)
    assert [row["score"] for row in rows] == found.scores.tolist()


def test_masks_are_counted_with_the_second_pass_of_the_tower(small_cfg):
    from d2det.tools.count import count

    name = "COCO-InstanceSegmentation/d2det_R_50_FPN_2x.yaml"
    cfg = small_cfg(name, "TEST.DETECTIONS_PER_IMAGE", 4)
    with_masks = count(cfg, 64, 64)
    without = count(small_cfg(name, "MODEL.MASK_ON", False), 64, 64)
    # Of a RoI, in multiply-adds: two 3x3 convolutions of the tower, two deconvolutions, three masks
    # of 8 channels, three FC layers.
    tower = 49 * 9 * (16 * 12 + 12 * 12)
    masks = 49 * 4 * 12 * 8 + 196 * 4 * 8 * 8 + 784 * 9 * 8 * 3
    scores = 13 * 49 * 16 + 16 * 16 + 16 * 3
    assert with_masks.products - without.products == 4 * (tower + masks + scores)
