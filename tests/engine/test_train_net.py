"""train_net.py as its users run it: in processes of their own, on tiny data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

pytest.importorskip("detectron2")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_net(tiny_yaml, coco_data, tmp_path):
    """A function that runs a program on tiny data and returns the finished process."""

    def run(*args, opts=(), train="train", val="val", output="run", script="train_net.py"):
        line = [sys.executable, str(ROOT / script), "--config-file", str(tiny_yaml), *args]
        for split, name in (("train", train), ("val", val)):
            if name:
                line += [f"--{split}-json", str(coco_data / f"{name}.json")]
                line += [f"--{split}-images", str(coco_data / "images")]
        line += ["OUTPUT_DIR", str(tmp_path / output), *opts]
        return subprocess.run(
            [str(item) for item in line],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.mark.slow
def test_train_go_on_and_evaluate(train_net, tmp_path):
    run = tmp_path / "run"
    done = train_net()
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert {"AP", "AP50", "AP75", "AP90", "APs", "AP-red"} <= set(results["custom_val"]["bbox"])
    assert "| custom_val" in done.stdout
    assert (run / "results.md").read_text().splitlines()[4] in done.stdout
    for shown in ("pictures/custom_val", "results.json", "curves.png", "results.json"):
        assert str(run / shown) in done.stdout.split("Written:")[1]
    assert sorted(p.name for p in (run / "pictures/custom_val").iterdir()) == [
        "000_0.jpg",
        "001_2.jpg",
        "index.jpg",
    ]
    assert cv2.imread(str(run / "pictures/custom_val/index.jpg")) is not None
    found = json.loads((run / "inference/custom_val/coco_instances_results.json").read_text())
    assert {detection["category_id"] for detection in found} <= {10, 20, 30}
    assert json.loads((run / "classes.json").read_text())["classes"] == ["red", "green", "blue"]

    # The second name of the program; two more iterations from where it stopped.
    done = train_net(
        "--resume", script="projects_train_net.py", opts=["SOLVER.MAX_ITER", 4], val=None
    )
    assert done.returncode == 0, done.stderr
    assert "Starting training from iteration 2" in done.stdout
    assert "nothing will be evaluated" in done.stdout

    # Evaluation alone, of images without annotations: predicted and written out.
    weights = ["MODEL.WEIGHTS", run / "model_final.pth"]
    done = train_net("--eval-only", train=None, val="bare", output="bare", opts=weights)
    assert done.returncode == 0, done.stderr
    assert "no ground truth" in done.stdout
    found = json.loads(
        (tmp_path / "bare/inference/custom_val/coco_instances_results.json").read_text()
    )
    assert {detection["image_id"] for detection in found} == {1, 2, 3}
    picture = cv2.imread(str(tmp_path / "bare/pictures/custom_val/000_0.jpg"))
    assert picture.shape[1] == 504  # 7 x 72: detections alone

    # Weights for another number of classes would give detections from untrained parts.
    done = train_net("--eval-only", train=None, val="two", output="two", opts=weights)
    assert done.returncode == 2
    assert "do not hold the whole model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_cpu_processes_train_and_evaluate(train_net, tmp_path):
    masks = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    masks += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7]
    done = train_net("--num-processes", "2", "--resume=auto", opts=masks)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["custom_val"]) == {"bbox", "segm"}  # masks where there are masks
    assert "World size: 2" in done.stdout
    assert done.stdout.count("Results in percent") == 1
    found = torch.load(
        tmp_path / "run/inference/custom_val/instances_predictions.pth", weights_only=False
    )
    assert sorted(prediction["image_id"] for prediction in found) == [1, 2, 3]
    assert (tmp_path / "run" / "log.txt.rank1").is_file()


def test_bad_input_ends_with_a_message_before_anything_is_written(train_net, tmp_path):
    done = train_net("--num-processes", "2", opts=["MODEL.ROI_HEADS.NUM_CLASSES", 80])
    assert done.returncode == 2
    assert done.stderr.count("error: MODEL.ROI_HEADS.NUM_CLASSES is 80") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_tells_what_there_is(program):
    module = program("train_net")
    text = module.argument_parser().format_help()
    for option in ("--resume", "--train-json", "--val-images", "--num-processes", "--dist-url"):
        assert option in text


def test_test_time_augmentation_is_reported_beside(program, finished_run, coco_data, tmp_path):
    module = program("train_net")
    line = ["--config-file", finished_run / "config.yaml", "--eval-only"]
    line += ["--val-json", coco_data / "val.json", "--val-images", coco_data / "images"]
    line += ["MODEL.WEIGHTS", finished_run / "model_final.pth", "OUTPUT_DIR", tmp_path / "tta"]
    line += ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.NUM_PICTURES", 0]
    results = module.main(module.argument_parser().parse_args([str(item) for item in line]))
    assert set(results) == {"bbox", "bbox_TTA"}
    files = [
        tmp_path / "tta" / folder / "custom_val/coco_instances_results.json"
        for folder in ("inference", "inference_TTA")
    ]
    plain, augmented = (json.loads(file.read_text()) for file in files)
    assert plain and augmented and plain != augmented
    written = json.loads((tmp_path / "tta" / "results.json").read_text())
    assert set(written["custom_val"]) == {"bbox", "bbox_TTA"}
