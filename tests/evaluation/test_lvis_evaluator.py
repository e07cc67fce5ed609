"""LVIS by detectron2's evaluator and the lvis package, where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from detectron2.structures import Boxes, Instances

from d2det.data.checks import check_datasets
from d2det.engine.loader import build_train_loader
from d2det.engine.setup import get_cfg
from d2det.evaluation import build_evaluator, lvis

NAME = "lvis_v1_tiny"
needs_lvis = pytest.mark.skipif(find_spec("lvis") is None, reason="the package lvis is missing")


@pytest.fixture
def tiny_lvis(tmp_path):
    """Four images with three of the 1203 categories, one of each frequency."""
    kinds = {5: "r", 700: "c", 1203: "f"}
    images, annotations = [], []
    for number in range(1, 5):
        url = f"http://images.cocodataset.org/val2017/{number:012d}.jpg"
        images.append({"id": number, "height": 60, "width": 80, "coco_url": url,
                       "neg_category_ids": [9], "not_exhaustive_category_ids": []})  # fmt: skip
        for category in (700, 1203) if number > 1 else (5, 700, 1203):
            x, y, w, h = 5 * number, 4 * number, 20, 30 if category == 5 else 10
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "area": w * h,
                                "category_id": category, "bbox": [x, y, w, h],
                                "segmentation": [corners]})  # fmt: skip
    categories = [
        {"id": i, "name": str(i), "frequency": kinds.get(i, "f"), "image_count": 3}
        for i in range(1, 1204)
    ]
    path = tmp_path / "lvis.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    (tmp_path / "coco").mkdir()
    register_lvis_instances(
        NAME, get_lvis_instances_meta("lvis_v1"), str(path), str(tmp_path / "coco") + "/"
    )
    yield content
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def predictions(content, image_id: int, dtype: torch.dtype) -> Instances:
    found = [a for a in content["annotations"] if a["image_id"] == image_id]
    boxes = torch.tensor([a["bbox"] for a in found], dtype=dtype)
    boxes[:, 2:] += boxes[:, :2]
    result = Instances((60, 80), pred_boxes=Boxes(boxes))
    result.scores = torch.linspace(0.9, 0.5, len(found), dtype=dtype)
    result.pred_classes = torch.tensor([a["category_id"] - 1 for a in found])
    return result


@needs_lvis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perfect_boxes_have_ap_100_and_a_missed_rare_class_0(tiny_lvis, tmp_path, dtype):
    cfg = get_cfg("LVIS/d2det_R_50_FPN")
    for miss in (False, True):
        evaluator = build_evaluator(cfg, NAME, str(tmp_path / "out"))
        evaluator.reset()
        for image in tiny_lvis["images"]:
            found = predictions(tiny_lvis, image["id"], dtype)
            found = found[found.pred_classes != 4] if miss else found
            evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
        results = evaluator.evaluate()["bbox"]
        assert results["APc"] == results["APf"] == pytest.approx(100)
        assert results["APr"] == pytest.approx(0 if miss else 100)
        assert results["AP"] == pytest.approx(200 / 3 if miss else 100)


@needs_lvis
def test_the_training_stream_repeats_rare_classes(tiny_lvis):
    cfg = get_cfg("LVIS/d2det_R_50_FPN")
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.64
    cfg.DATASETS.TEST = ()
    check_datasets(cfg)
    loader = build_train_loader(cfg)
    # Class 5 is in one of four images: sqrt(0.64 / 0.25).
    assert loader.stream.repeat_factors.tolist() == pytest.approx([1.6, 1, 1, 1])


def test_without_the_package_the_remedy_is_named(monkeypatch, tiny_lvis, tmp_path):
    monkeypatch.setattr(lvis, "find_spec", lambda name: None)
    cfg = get_cfg("LVIS/d2det_R_50_FPN")
    with pytest.raises(ValueError, match="pip install --no-deps lvis"):
        build_evaluator(cfg, NAME, str(tmp_path))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), (NAME,)
    with pytest.raises(ValueError, match="pip install --no-deps lvis"):
        check_datasets(cfg)
