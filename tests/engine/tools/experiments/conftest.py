"""Experiments whose runs are written by the test: no training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

MAX_ITER = 100
CONFIG_YAML = f"""\
DATASETS: {{TRAIN: [shapes_train], TEST: [val]}}
SOLVER: {{MAX_ITER: {MAX_ITER}, IMS_PER_BATCH: 4, ACCUMULATE: 2, BASE_LR: 0.02, STEPS: [60, 80]}}
MODEL: {{DEVICE: cpu}}
INPUT: {{MIN_SIZE_TEST: 160, MAX_SIZE_TEST: 224}}
"""


class FakeFolder:
    """An experiment's folder, filled run by run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(
        self,
        method: str,
        seed: int,
        bbox: Mapping[str, float | None] | None = None,
        *,
        results: Any = None,
        losses: Sequence[float] = (3.0, 2.0, 1.0),
        ap: Mapping[int, float] | None = None,
        pictures: int = 0,
        failure: str = "",
    ) -> Path:
        """A run; done if it has `bbox` metrics of the data set "val", or `results`.

        Args:
            losses: written every 20 iterations.
            ap: AP by iterations done.
            failure: the last words of a run that failed.
        """
        folder = self.path / method / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG_YAML)
        (folder / "console.txt").write_text(f"start\n{failure}\n")
        lines = [
            {"iteration": 20 * (i + 1) - 1, "total_loss": loss, "time": 0.5}
            for i, loss in enumerate(losses)
        ]
        lines += [{"iteration": done - 1, "bbox/AP": v} for done, v in (ap or {}).items()]
        text = "\n".join(map(json.dumps, lines))
        (folder / "metrics.json").write_text(text + '\n{"iteration": 99, "tota')  # cut off
        if results is None and bbox is not None:
            results = {"val": {"bbox": dict(bbox)}}
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        if failure:
            note = {"returncode": 1, "message": failure}
            (folder / "failure.json").write_text(json.dumps(note))
        if pictures:
            (folder / "pictures" / "val").mkdir(parents=True)
        for number in range(pictures):
            picture = fake_picture(seed=seed, number=number)
            cv2.imwrite(str(folder / "pictures" / "val" / f"{number:03d}_im{number}.jpg"), picture)
        return folder


def fake_picture(seed: int, number: int) -> np.ndarray:
    """As `d2det.evaluation.pictures` makes them: ground truth, a white gap, detections."""
    left = np.full((90, 120, 3), (40 + 10 * number, 60, 20), np.uint8)
    right = np.full((90, 120, 3), (20, 60, 40 * seed), np.uint8)
    return np.concatenate([left, np.full((90, 12, 3), 255, np.uint8), right], axis=1)


@pytest.fixture
def folder(tmp_path: Path) -> FakeFolder:
    return FakeFolder(tmp_path / "out")


@pytest.fixture
def full_folder(folder: FakeFolder) -> FakeFolder:
    """Two methods, three seeds: one run failed, one never started."""
    for seed, ap in ((1, 10.0), (2, 11.0), (3, 15.0)):
        folder.run("base", seed, {"AP": ap, "AP50": 30.0, "AP-a": 1.0, "AP-b": 2.0}, pictures=3,
                   ap={50: ap / 2, 100: ap})  # fmt: skip
    folder.run("ours", 1, {"AP": 14.0, "AP50": 20.0, "AP-a": 3.0, "AP-b": None}, pictures=2,
               ap={50: 8.0, 100: 14.0})  # fmt: skip
    folder.run("ours", 2, losses=(3.0,), failure="RuntimeError: <out> of | memory")
    return folder


@pytest.fixture
def speed_json(full_folder: FakeFolder) -> Callable[[], None]:
    """Writes a `speed.json` of both methods: inference and training, batches of 1 and 2."""

    def cell(seconds: float, peak: int | None) -> dict[str, Any]:
        times = [0.9 * seconds, seconds, 1.2 * seconds]
        return {"times": times, "samples": 5, "note": "", "peak": peak}

    def write() -> None:
        cells = {
            "base|inference|1|float32": cell(0.020, 4 * 2**20),
            "base|training|1|float32": cell(0.100, 8 * 2**20),
            "ours|inference|1|float32": cell(0.030, 6 * 2**20),
            "ours|training|1|float32": cell(0.250, None),
            "base|inference|2|float32": cell(0.032, 4 * 2**20),
            "ours|inference|2|float32": {"times": [], "note": "failed: out of memory"},
        }
        models = {
            "base": {"size": "160 x 224", "parameters": 2_000_000, "products": 10**9,
                     "sampling": 10**7},
            "ours": {"size": "160 x 224", "parameters": 3_000_000, "note": "not counted: reason"},
        }  # fmt: skip
        content = {
            "device": "cpu", "date": "2026-01-02", "versions": "d2det 0", "seconds": 1.0,
            "key": {"machine": "a machine", "methods": {}, "weights": {"base": "x.pth"}},
            "models": models, "cells": cells,
        }  # fmt: skip
        (full_folder.path / "speed.json").write_text(json.dumps(content))

    return write
