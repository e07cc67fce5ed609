"""A tiny detector and tiny COCO-format data, for the tests of the programs."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

TINY_YAML = """\
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    OUT_FEATURES: [res2, res3, res4, res5]
    RES2_OUT_CHANNELS: 16
    STEM_OUT_CHANNELS: 8
    WIDTH_PER_GROUP: 4
    NORM: BN
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    PRE_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 30
    POST_NMS_TOPK_TRAIN: 30
    POST_NMS_TOPK_TEST: 15
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    NUM_CLASSES: 3
    BATCH_SIZE_PER_IMAGE: 16
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, MAX_SIZE_TRAIN: 96, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.005, MAX_ITER: 2, STEPS: [], WARMUP_ITERS: 1}
TEST: {NUM_PICTURES: 2, PICTURE_SCORE_THRESH: 0.2}
SEED: 1
VERSION: 2
"""

ROOT = Path(__file__).parents[2]
CLASSES = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Set-up adds handlers that hold the captured output of one test, and stops propagation."""
    loggers = [logging.getLogger(name) for name in ("d2det", "detectron2", "fvcore")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """A Faster R-CNN of a few thousand weights for three classes; two iterations."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


@pytest.fixture
def finished_run(tiny_yaml: Path, tmp_path: Path) -> Path:
    """The OUTPUT_DIR of a run: config.yaml, classes.json and weights, which are random."""
    detectron2_modeling = pytest.importorskip("detectron2.modeling")
    from d2det.engine.setup import get_cfg

    folder = tmp_path / "run"
    folder.mkdir()
    cfg = get_cfg(tiny_yaml)
    cfg.OUTPUT_DIR = str(folder)
    torch.manual_seed(0)
    model = detectron2_modeling.build_model(cfg)
    # Scores from 0.05 to 0.9: apart from each other, and above and below a threshold.
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.002)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return folder


@pytest.fixture
def program() -> Callable[[str], ModuleType]:
    """A function that imports one of the programs in the project's root, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def coco_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, three of them with a box of each class, and the JSON files train, val,
    bare (val without annotations or categories) and two (of two classes)."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(3):
        pixels = rng.integers(0, 60, (60, 72, 3), dtype=np.uint8)
        for category in range(3):
            x, y = 4 + 22 * category, int(rng.integers(2, 30))
            pixels[y : y + 20, x : x + 18, 2 - category] = 230
            polygon = [x, y, x + 18, y, x + 18, y + 20, x, y + 20]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 10 * (category + 1),  # gaps, as many files have
                    "bbox": [x, y, 18, 20],
                    "area": 360,
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": 60, "width": 72})
    categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES)]
    full = {"images": images, "annotations": annotations, "categories": categories}
    few = {
        **full,
        "categories": categories[:2],
        "annotations": [a for a in annotations if a["category_id"] < 30],
    }
    contents = {"train": full, "val": full, "bare": {"images": images}, "two": few}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
