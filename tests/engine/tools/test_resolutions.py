"""AP against resolution: which runs are made, with which sizes, and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import pytest

pytest.importorskip("detectron2")

import d2det
from d2det.engine.setup import get_cfg
from d2det.tools import resolutions

RESULTS = {"bbox": {"AP": 12.345, "AP50": 30.0, "AP75": None, "APs": 1.0, "APm": 2.0, "APl": 3.0}}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function that runs the tool in `tmp_path` and returns its exit status."""
    root = str(Path(d2det.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)

    def run(*args):
        with pytest.raises(SystemExit) as stopped:
            resolutions.main([str(arg) for arg in args])
        return stopped.value.code

    return run


@pytest.fixture
def recorded(monkeypatch):
    """Runs that only write down their command, and a result whose AP is their shorter side."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        metrics = {**RESULTS["bbox"], "AP": float(folder.name) / 10}
        (folder / "results.json").write_text(json.dumps({"val": {"bbox": metrics}}))

    monkeypatch.setattr(resolutions.subprocess, "run", run)
    return calls


def test_sizes_keep_the_configs_proportions():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (640, 800), 1333
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 800, 1200
    assert resolutions.size_overrides(cfg, 400) == [
        "INPUT.MIN_SIZE_TRAIN", "(400,)", "INPUT.MAX_SIZE_TRAIN", "666",
        "INPUT.MIN_SIZE_TEST", "400", "INPUT.MAX_SIZE_TEST", "600",
    ]  # fmt: skip


def test_every_model_at_every_resolution_once(command, recorded, tiny_yaml, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(tiny_yaml.read_text())
    line = ["--config-file", tiny_yaml, other, "--output", "out", "--short-sides"]
    assert command(*line, 64, 48, "--train-args", "SOLVER.MAX_ITER", 1) == 0
    assert len(recorded) == 4
    assert all("--resume=auto" in c and "--eval-only" not in c for c in recorded)
    assert recorded[0][-10:-2] == [
        "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MAX_SIZE_TRAIN", "72",
        "INPUT.MIN_SIZE_TEST", "48", "INPUT.MAX_SIZE_TEST", "72",
    ]  # fmt: skip
    table = capsys.readouterr().out
    assert "tiny" in table and "other" in table and "6.4" in table
    assert command(*line, 80, 64, 48, "--train-args", "SOLVER.MAX_ITER", 1) == 0
    assert len(recorded) == 6  # the two at 80; the others are there
    rows = json.loads(Path("out/resolutions.json").read_text())
    assert [(r["model"], r["short side"], r["AP"]) for r in rows[:3]] == [
        ("tiny", 48, 4.8), ("tiny", 64, 6.4), ("tiny", 80, 8.0)
    ]  # fmt: skip
    assert cv2.imread("out/resolutions.png").std() > 5


def test_runs_of_other_settings_and_own_keys_are_refused(command, recorded, tiny_yaml):
    line = ["--config-file", tiny_yaml, "--output", "out", "--short-sides", 48]
    assert command(*line) == 0
    assert "other --train-args" in command(*line, "--train-args", "SOLVER.MAX_ITER", 2)
    assert "INPUT.MIN_SIZE_TEST" in command(*line, "--train-args", "INPUT.MIN_SIZE_TEST", 9)
    assert len(recorded) == 1
    with pytest.raises(SystemExit):
        resolutions.parse_arguments(["--eval-only", "--short-sides", "48"])


@pytest.mark.slow
def test_evaluates_a_trained_model(command, finished_run, coco_data, capsys):
    line = ["--eval-only", "--weights", finished_run, "--output", "out", "--short-sides", 48, 64,
            "--train-args", "--val-json", coco_data / "val.json", "--val-images",
            coco_data / "images", "TEST.NUM_PICTURES", 0]  # fmt: skip
    assert command(*line) == 0, Path("out/run/48/console.txt").read_text()
    rows = json.loads(Path("out/resolutions.json").read_text())
    assert [(r["model"], r["data"], r["short side"]) for r in rows] == [
        ("run", "custom_val", 48), ("run", "custom_val", 64)
    ]  # fmt: skip
    assert all(r["AP"] is not None for r in rows)
    assert "MIN_SIZE_TEST: 48" in Path("out/run/48/config.yaml").read_text()
    # What fails is named, and what is done stays.
    assert command(*line[:8], 32, *line[8:-2], "NO.SUCH_KEY", 1) != 0


@pytest.mark.slow
def test_trains_and_evaluates(command, tiny_yaml, coco_data):
    images = ["--train-images", coco_data / "images", "--val-images", coco_data / "images"]
    data = ["--train-json", coco_data / "train.json", "--val-json", coco_data / "val.json"]
    line = ["--config-file", tiny_yaml, "--output", "out", "--short-sides", 48]
    status = command(*line, "--train-args", *data, *images, "SOLVER.MAX_ITER", 1)
    assert status == 0, Path("out/tiny/48/console.txt").read_text()
    config = Path("out/tiny/48/config.yaml").read_text()
    assert "MAX_SIZE_TRAIN: 72" in config
    assert Path("out/tiny/48/model_final.pth").is_file()
