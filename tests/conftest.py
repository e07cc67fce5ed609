"""What all tests share: determinism, a device fixture, and a plain word on what could not run."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
HAS_EXTENSION = any(Path(__file__).parent.parent.glob("d2det/_C*.so"))
DATASETS = "DETECTRON2_DATASETS"

_own_datasets: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Set before any test module is imported, hence before d2det registers its data sets."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    # The tensors are tiny. More threads gain nothing, and where other programs want the cores too
    # they spin: some tests then took ten times as long. Child processes read the variable.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if DATASETS not in os.environ:
        _own_datasets.append(tempfile.mkdtemp(prefix="d2det-datasets-"))
        os.environ[DATASETS] = _own_datasets[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    for folder in _own_datasets:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    detectron2 = "detectron2" if HAS_DETECTRON2 else "NO detectron2"
    kernels = "compiled kernels" if HAS_EXTENSION else "reference implementations only"
    return f"d2det: torch {torch.__version__}, {detectron2}, {kernels}, {gpu}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not HAS_DETECTRON2:
        terminalreporter.section("detectron2 is missing", sep="!", red=True, bold=True)
        terminalreporter.line(
            "The tests of the plugin (modeling, data, evaluation, engine, train_net.py) DID NOT "
            "RUN. `make setup` says why detectron2 could not be installed."
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # detectron2 draws from the global generator
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
