"""What all tests share: determinism, a device fixture, and a plain word on what could not run."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


VOC_CLASSES = ("red", "green", "blue")
VOC_XML = """<annotation>
	<folder>{folder}</folder>
	<filename>{image}.jpg</filename>
	<source><database>The VOC2007 Database</database><image>flickr</image></source>
	<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
	<segmented>1</segmented>{objects}
</annotation>
"""
VOC_OBJECT = """
	<object>
		<name>{name}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
	</object>"""

# image -> (class, (x1, y1, x2, y2) with pixels counted from 1, difficult)
VocObjects = Mapping[str, Sequence[tuple[str, tuple[int, int, int, int], bool]]]


@pytest.fixture
def write_voc(tmp_path: Path) -> Callable[..., Path]:
    """A function that lays out PASCAL VOC's folders: XML, lists, pictures, label pictures.

    The objects of `VOC_CLASSES` are rectangles of their colours; in the label pictures, which have
    a palette as VOC's do, they are 1, 2 and 3, in a frame of 255.
    """

    def write(objects: VocObjects, split: str, size: tuple[int, int] = (80, 64)) -> Path:
        folder = tmp_path / "VOC2007"
        for part in ("Annotations", "JPEGImages", "SegmentationClass"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for task in ("Main", "Segmentation"):
            listed = folder / "ImageSets" / task
            listed.mkdir(parents=True, exist_ok=True)
            (listed / f"{split}.txt").write_text("".join(f"{image}\n" for image in objects))
        width, height = size
        palette = np.random.default_rng(1).permutation(256 * 3).astype(np.uint8).tolist()
        for number, (image, items) in enumerate(objects.items()):
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            labels = np.zeros((height, width), np.uint8)
            text = ""
            for name, (x1, y1, x2, y2), difficult in items:
                fields = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "difficult": int(difficult)}
                text += VOC_OBJECT.format(name=name, **fields)
                if name in VOC_CLASSES:
                    kind = VOC_CLASSES.index(name)
                    pixels[y1 - 1 : y2, x1 - 1 : x2, kind] = 230
                    labels[y1 - 1 : y2, x1 - 1 : x2] = 255
                    labels[y1 : y2 - 1, x1 : x2 - 1] = kind + 1
            fields = {"folder": folder.name, "image": image, "width": width, "height": height}
            xml = VOC_XML.format(objects=text, **fields)
            (folder / "Annotations" / f"{image}.xml").write_text(xml)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{image}.jpg", quality=95)
            picture = Image.fromarray(labels, mode="P")
            picture.putpalette(palette)
            picture.save(folder / "SegmentationClass" / f"{image}.png")
        return folder

    return write
