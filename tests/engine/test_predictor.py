"""Prediction: kinds of images, configs, weights and class names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
from detectron2.config import LazyCall, LazyConfig
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from omegaconf import OmegaConf

import d2det
from d2det.engine.predictor import Predictor, load_image
from d2det.engine.setup import get_cfg
from d2det.engine.trained import find_weights, load_trained


@pytest.fixture
def run(finished_run):
    return finished_run


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def assert_same(a, b, tolerance=0.0):
    a, b = a["instances"], b["instances"]
    assert len(a) == len(b) > 0
    torch.testing.assert_close(
        a.pred_boxes.tensor, b.pred_boxes.tensor, atol=tolerance * 100, rtol=0
    )
    torch.testing.assert_close(a.scores, b.scores, atol=tolerance, rtol=0)
    assert a.pred_classes.tolist() == b.pred_classes.tolist()
    assert a.image_size == b.image_size


def test_same_as_default_predictor(run, image):
    cfg = get_cfg(run / "config.yaml")
    cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    expected = DefaultPredictor(cfg)(image)
    assert_same(Predictor(cfg)(image), expected)
    assert_same(d2det.Predictor(None, run)(image), expected)
    assert_same(d2det.Predictor(str(run))(image), expected)
    cfg.INPUT.FORMAT = "RGB"
    in_rgb = DefaultPredictor(cfg)(image)
    assert_same(Predictor(cfg)(image), in_rgb)
    assert not torch.equal(in_rgb["instances"].scores, expected["instances"].scores)


def test_configs_of_every_kind(run, image, tiny_yaml):
    weights = run / "model_final.pth"
    expected = Predictor(None, run)(image)
    assert_same(Predictor(tiny_yaml, weights)(image), expected)
    assert_same(Predictor(str(tiny_yaml), str(weights))(image), expected)
    cfg = get_cfg(tiny_yaml)
    before = cfg.dump()
    assert_same(Predictor(cfg, weights)(image), expected)
    assert cfg.dump() == before


def build_tiny(file):
    return build_model(get_cfg(file))


def test_lazy_config(run, image, tiny_yaml, tmp_path):
    import detectron2.data.transforms as T

    expected = Predictor(None, run)(image)
    resize = LazyCall(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)
    lazy = OmegaConf.create({"train": {"init_checkpoint": str(run / "model_final.pth")}})
    lazy.model = LazyCall(build_tiny)(file=str(tiny_yaml))
    lazy.dataloader = {"test": {"mapper": {"augmentations": [resize], "image_format": "BGR"}}}
    assert_same(Predictor(lazy)(image), expected)
    lazy.train.device = "cpu"
    lazy.dataloader.test.mapper.augmentations = []
    sizes = Predictor(lazy, run)(image)["instances"]
    assert sizes.image_size == (60, 90)
    assert not torch.equal(sizes.scores, expected["instances"].scores)  # the usual size: 800


def test_lazy_config_file(run, image, tiny_yaml, tmp_path):
    file = tmp_path / "lazy.py"
    file.write_text(
        "from detectron2.config import LazyCall, get_cfg\n"
        "from detectron2.modeling import build_model\n"
        "from d2det.engine.setup import get_cfg\n"
        f"model = LazyCall(build_model)(cfg=LazyCall(get_cfg)(name_or_path={str(tiny_yaml)!r}))\n"
    )
    assert LazyConfig.load(str(file)).model
    assert len(Predictor(file, run)(image)["instances"]) > 0


def test_grey_transparent_and_float_images(run, image):
    predictor = Predictor(None, run)
    expected = predictor(image)
    alpha = np.full((*image.shape[:2], 1), 7, np.uint8)
    assert_same(predictor(np.concatenate([image, alpha], axis=2)), expected)
    grey = image[:, :, 0]
    as_color = predictor(np.repeat(grey[:, :, None], 3, axis=2))
    assert_same(predictor(grey), as_color)
    assert_same(predictor(grey[:, :, None]), as_color)
    # detectron2 resizes floats without antialiasing, so only the kind of result is compared
    assert predictor(image.astype(np.float64))["instances"].image_size == (60, 90)


def test_one_color_and_odd_shapes(run):
    predictor = Predictor(None, run)
    for shape in ((64, 64, 3), (1, 1, 3), (4, 200, 3), (3, 2, 3)):
        for value in (0, 255):
            found = predictor(np.full(shape, value, np.uint8))["instances"]
            assert found.image_size == shape[:2]
            assert torch.isfinite(found.pred_boxes.tensor).all()


def test_paths_and_batches(run, image, tmp_path):
    file = tmp_path / "ünï.png"
    file.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    one, other = Predictor(None, run), Predictor(None, run, batch_size=2)
    small = image[:40, :50]
    expected = [one(image), one(image), one(small)]
    listed = one([str(file), file, small])
    assert isinstance(listed, list)
    for got, wanted in zip(listed, expected, strict=True):
        assert_same(got, wanted)
    for got, wanted in zip(other([image, image, small]), expected, strict=True):
        assert_same(got, wanted, tolerance=1e-4)
    assert one([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((8, 8, 3), np.nan), "image 1: has NaN or infinite values"),
        (np.full((8, 8, 3), np.inf, np.float32), "NaN or infinite"),
        (np.zeros((8, 8, 2), np.uint8), r"image 1: shape \(8, 8, 2\)"),
        (np.zeros((8,), np.uint8), "shape"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (7, "not int"),
    ],
)
def test_bad_images(run, image, bad, message):
    with pytest.raises(ValueError, match=message):
        Predictor(None, run)([image, bad])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image(tmp_path / "nowhere.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be read as an image"):
        load_image(tmp_path / "text.jpg")


def test_score_threshold_leaves_out_lower_scores(run, image):
    scores = Predictor(None, run)(image)["instances"].scores
    middle = float(scores.median())
    found = Predictor(None, run, score_threshold=middle)(image)["instances"].scores
    assert 0 < len(found) < len(scores)
    assert torch.equal(found, scores[scores >= middle])


def test_half_precision_is_close(run, image):
    full = Predictor(None, run)(image)["instances"]
    half = Predictor(None, run, amp=True)(image)["instances"]
    assert half.scores.dtype == half.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(half.scores[:5], full.scores[:5])
    torch.testing.assert_close(half.scores[:5], full.scores[:5], atol=0.05, rtol=0)


def test_outputs_may_be_changed_and_threads_agree(run, image):
    predictor = Predictor(None, run)
    expected = predictor(image)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(predictor, [image] * 8):
            assert_same(got, expected)
    expected["instances"].pred_boxes.scale(2, 2)  # in place
    assert not predictor.model.training


def test_class_names(run, image, tiny_yaml, tmp_path):
    predictor = Predictor(None, run)
    assert predictor.class_names == ["red", "green", "blue"]
    assert predictor.metadata.thing_classes == predictor.class_names
    elsewhere = tmp_path / "copied.pth"
    elsewhere.write_bytes((run / "model_final.pth").read_bytes())
    other = Predictor(tiny_yaml, elsewhere)
    assert other.class_names == ["class 0", "class 1", "class 2"]
    found = predictor(image)["instances"]
    assert Visualizer(image, predictor.metadata).draw_instance_predictions(found).get_image().any()


def test_drawing(run, image):
    predictor = Predictor(None, run)
    found = predictor(image)["instances"]
    drawn = predictor.draw(image, found)
    assert drawn.shape == image.shape
    assert (drawn != image).any()
    assert (predictor.draw(image, found[:0]) == image).all()
    large = cv2.resize(image, None, fx=3, fy=3)
    mask = torch.zeros(1, 60, 90, dtype=torch.bool)
    mask[:, 10:20, 10:20] = True
    one = found[:1]
    one.pred_masks = mask
    one.pred_boxes.tensor[:] = torch.tensor([10.0, 10.0, 20.0, 20.0])
    changed = np.argwhere((predictor.draw(large, one, 3) != large).any(axis=2))
    assert [28, 28] <= changed.max(axis=0).tolist()
    assert changed[:, 0].max() <= 63  # 20 * 3, and the line's width


def test_best_weights_of_a_folder(run):
    assert find_weights(run) == str(run / "model_final.pth")
    (run / "model_best.pth").write_bytes((run / "model_final.pth").read_bytes())
    assert find_weights(run) == str(run / "model_best.pth")


def test_missing_weights(tiny_yaml, tmp_path):
    with pytest.raises(ValueError, match="no weights are given"):
        Predictor(tiny_yaml)
    with pytest.raises(ValueError, match="a config or weights are needed"):
        Predictor()
    with pytest.raises(FileNotFoundError, match="none.pth"):
        Predictor(tiny_yaml, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        Predictor(tiny_yaml, tmp_path)
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist"):
        Predictor(None, tmp_path / "x.pth")


def test_weights_of_another_class_count_are_refused(run, tiny_yaml):
    cfg = get_cfg(tiny_yaml)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ValueError, match=r"do not hold the whole model(.|\n)*cls_score\.weight"):
        Predictor(cfg, run)


def test_weights_of_a_part_are_refused(run, tiny_yaml):
    cfg = get_cfg(tiny_yaml)
    model = build_model(cfg)
    torch.save({"model": model.backbone.state_dict(prefix="backbone.")}, run / "part.pth")
    with pytest.raises(ValueError, match=r"not in the file"):
        load_trained(model, run / "part.pth")
