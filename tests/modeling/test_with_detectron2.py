"""detectron2's own tools on a D2Det model: checkpoints, predictor, test-time augmentation, AMP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer


def photo(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_saved_and_loaded_model_detects_the_same(small_cfg, batch, tmp_path):
    model = build_model(small_cfg()).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    torch.manual_seed(99)
    other = build_model(small_cfg("COCO-Detection/d2det_R_50_FPN_2x.yaml"))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    inputs = batch((96, 128, [], []))
    with torch.no_grad():
        a, b = (m.eval()(inputs)[0]["instances"] for m in (model, other))
    assert len(a) == len(b) > 0
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.pred_classes, b.pred_classes)


def test_default_predictor_and_visualizer(small_cfg, tmp_path):
    cfg = small_cfg()
    model = build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT = 96, "RGB"
    found = DefaultPredictor(cfg)(photo())["instances"]
    with torch.no_grad():
        image = torch.as_tensor(photo()[:, :, ::-1].astype("float32").transpose(2, 0, 1).copy())
        expected = model([{"image": image, "height": 96, "width": 128}])[0]["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    drawn = Visualizer(photo()).draw_instance_predictions(found).get_image()
    assert drawn.shape == (96, 128, 3)
    assert (drawn != photo()).any()


def test_test_time_augmentation(small_cfg):
    cfg = small_cfg()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (64, 96), True
    model = build_model(cfg).eval()
    image = torch.as_tensor(photo().transpose(2, 0, 1).copy())
    given = {"image": image, "height": 192, "width": 256, "file_name": ""}
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([given])[0]["instances"]
    assert len(calls) >= 2  # four views, in batches of up to three
    assert found.image_size == (192, 256)
    assert len(found) > 0
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and (boxes <= torch.tensor([256, 192, 256, 192])).all()


@pytest.mark.parametrize("name", ["quickstart.yaml", "shapes/drp.yaml"])
def test_mixed_precision_trains_and_predicts(name, small_cfg, batch):
    model = build_model(small_cfg(name))
    inputs = batch((96, 128, [[10, 10, 60, 50], [70, 20, 120, 90]], [0, 2]), (64, 64, [], []))
    with EventStorage(0):
        exact = sum(model(inputs).values())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(inputs)
        sum(losses.values()).backward()
    # Different RoIs are sampled, but the losses are of one size.
    assert sum(losses.values()).item() == pytest.approx(exact.item(), rel=0.3)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.eval()(inputs)[0]["instances"]
    assert found.scores.isfinite().all()
