"""Trainings in processes of their own: killed, resumed, and two at a time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

import d2det
from d2det.engine.sampler import TrainingStream

PROGRAM = Path(__file__).with_name("tiny_training.py")


def start(folder: Path, **options) -> subprocess.Popen:
    root = str(Path(d2det.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    arguments = [f"{key}={value}" for key, value in {"detector": "d2det", **options}.items()]
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, *, killed: bool = False) -> str:
    output, _ = process.communicate(timeout=300)
    assert (process.returncode != 0) == killed, output[-5000:]
    return output


def ends(folder: Path, processes: int = 1) -> list[dict]:
    return [torch.load(folder / f"end{rank}.pth") for rank in range(processes)]


def assert_same(a: dict, b: dict) -> None:
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    states = [end["optimizer"]["state"] for end in (a, b)]
    assert states[0] and states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key]["momentum_buffer"], states[1][key]["momentum_buffer"])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    folders = [tmp_path / f"{workers}_workers" for workers in (0, 2)]
    keys = [{"DATALOADER__NUM_WORKERS": workers} for workers in (0, 2)]
    whole = start(tmp_path / "whole")
    killed = [start(f, kill_at=4, **k) for f, k in zip(folders, keys, strict=True)]
    finish(whole)
    for process, folder in zip(killed, folders, strict=True):
        finish(process, killed=True)
        assert process.returncode == -9
        assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
        assert not (folder / "end0.pth").exists()
    resumed = [start(f, resume="must", **k) for f, k in zip(folders, keys, strict=True)]
    (reference,) = ends(tmp_path / "whole")
    for process, folder in zip(resumed, folders, strict=True):
        finish(process)
        (end,) = ends(folder)
        assert end["start"] == 4
        assert_same(end, reference)


@pytest.mark.slow
def test_two_processes_train_evaluate_and_resume(tmp_path):
    """Every second image has no annotations, so that a process is often without a positive RoI."""
    keys = {
        "processes": 2,
        "empty_every": 2,
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__ASPECT_RATIO_GROUPING": False,
        "SOLVER__ACCUMULATE": 2,
    }
    streams = [TrainingStream(12, 1, seed=3, rank=rank, world_size=2) for rank in range(2)]
    seen = [[b[0][0] % 2 for b in itertools.islice(stream, 12)] for stream in streams]
    assert any(a != b for a, b in zip(*seen, strict=True))  # only one of the two has objects

    whole, cut = start(tmp_path / "whole", **keys), start(tmp_path / "cut", kill_at=4, **keys)
    finish(whole)
    finish(cut, killed=True)
    finish(start(tmp_path / "cut", resume="must", **keys))
    first, second = ends(tmp_path / "whole", 2)
    assert_same(first, second)
    assert first["results"]["bbox"]["images"] == 12
    for end, reference in zip(ends(tmp_path / "cut", 2), (first, second), strict=True):
        assert end["start"] == 4
        assert_same(end, reference)

    # Iteration 0: passes 1, 3 and 2, 4. d/da = (2 + 3) / 2, as means over passes, then processes;
    # d/db = (0 + 3) / 2. Iteration 1: 0 in the first process and 8, 0 in the second.
    a, b = 1 - 2.5 - (0 + 4) / 2, 1 - 1.5 - (0 + 4) / 2
    assert first["branches"] == second["branches"] == [a, b]


@pytest.mark.slow
def test_two_processes_mimic_where_only_one_has_objects(tmp_path):
    """Synchronised BatchNorm waits in every process: also where there is no RoI to crop."""
    keys = {
        "processes": 2,
        "empty_every": 2,
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__ASPECT_RATIO_GROUPING": False,
        "MODEL__META_ARCHITECTURE": "MimickingRCNN",
        "MODEL__MIMIC__ENABLED": True,
        "MODEL__MIMIC__CROP_SIZE": 64,
        "MODEL__MIMIC__NUM_CROPS": 2,
        "MODEL__RESNETS__NORM": "naiveSyncBN",
    }
    whole, cut = start(tmp_path / "whole", **keys), start(tmp_path / "cut", kill_at=4, **keys)
    finish(whole)
    finish(cut, killed=True)
    finish(start(tmp_path / "cut", resume="must", **keys))
    first, second = ends(tmp_path / "whole", 2)
    assert "mimic.cls_score.weight" in first["model"]
    assert_same(first, second)
    assert_same(ends(tmp_path / "cut", 2)[0], first)


@pytest.mark.slow
def test_two_processes_learn_masks_where_only_one_has_objects(tmp_path):
    """DistributedDataParallel waits for every parameter: also for those of masks nobody has."""
    keys = {
        "processes": 2,
        "empty_every": 2,
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__ASPECT_RATIO_GROUPING": False,
        "MODEL__MASK_ON": True,
        "MODEL__ROI_MASK_HEAD__NAME": "D2DetMaskHead",
        "MODEL__ROI_MASK_HEAD__CONV_DIM": 16,
        "MODEL__RESNETS__NORM": "naiveSyncBN",
        "MODEL__ROI_MASK_HEAD__SCORING__FC_DIM": 16,
    }
    finish(start(tmp_path / "whole", **keys))
    first, second = ends(tmp_path / "whole", 2)
    assert any(name.startswith("roi_heads.mask_head.") for name in first["model"])
    assert_same(first, second)
