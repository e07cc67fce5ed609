"""From raw files to results: conversion, some iterations of training, evaluation, analysis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
import d2det
from d2det.engine.setup import get_cfg
from d2det.tools import convert_uavdt, error_analysis

ROOT = Path(__file__).parents[3]


def train_net(tmp_path, *args):
    package = str(Path(d2det.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["DETECTRON2_DATASETS"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_convert_train_evaluate_and_analyse(raw_uavdt, tiny_yaml, tmp_path, capsys):
    convert_uavdt.main([str(raw_uavdt), str(tmp_path / "uavdt")])
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 1, "TEST.NUM_PICTURES", 0]
    names = ["DATASETS.TRAIN", "('uavdt_train',)", "DATASETS.TEST", "('uavdt_test',)"]
    run = tmp_path / "run"
    printed = train_net(tmp_path, "--config-file", tiny_yaml, *opts, *names, "OUTPUT_DIR", run)
    results = json.loads((run / "results.json").read_text())["uavdt_test"]
    assert {"bbox", "uavdt_voc", "uavdt_toolkit"} == set(results)
    assert {"AP70", "AP70 day", "AP70 night", "AP70 long term"} <= set(results["uavdt_voc"])
    assert "uavdt_toolkit" in printed
    folder = run / "inference" / "uavdt_test"
    texts = sorted(path.name for path in (folder / "uavdt_toolkit").iterdir())
    assert texts == ["M0203.txt", "M0209.txt"]

    # The same files from the command line give the same figures.
    data = tmp_path / "uavdt"
    given = [
        "--val-json",
        data / "annotations/instances_test.json",
        "--val-images",
        data / "images",
    ]
    again = tmp_path / "again"
    evaluation = ["MODEL.WEIGHTS", run / "model_final.pth", "OUTPUT_DIR", again]
    evaluation += ["TEST.EVALUATOR", "uavdt", "TEST.NUM_PICTURES", 0]
    train_net(tmp_path, "--config-file", tiny_yaml, "--eval-only", *given, *evaluation)
    assert json.loads((again / "results.json").read_text())["custom_val"] == results

    capsys.readouterr()
    found = folder / "coco_instances_results.json"
    truth = data / "annotations/instances_test.json"
    error_analysis.main(
        ["--gt", str(truth), "--results", str(found), "--output", str(tmp_path / "errors")]
    )
    assert "C75" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["d2det_R_101_FPN", "d2det_R_50_FPN", "faster_rcnn_R_101_FPN"])
def test_configs(name):
    cfg = get_cfg(f"UAVDT/{name}")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("uavdt_trainval",), ("uavdt_test",))
    assert cfg.MODEL.WEIGHTS.endswith(f"resnet{cfg.MODEL.RESNETS.DEPTH}")
    assert cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.ENABLED == name.startswith("d2det")
    epoch = round(24143 / 16)  # iterations
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((20 * epoch, 23 * epoch), 24 * epoch)
