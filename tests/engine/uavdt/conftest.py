"""A few frames in UAVDT's raw format, in both of its layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (96, 64)
# Name, split, frames, attributes: day night fog, low medium high, front side bird, long term.
SEQUENCES = (
    ("M0101", "train", 3, "1,0,0,0,1,0,1,0,0,0"),
    ("M0201", "train", 4, "1,0,0,1,0,0,1,1,0,0"),
    ("M0204", "train", 2, "0,1,0,1,0,0,0,0,1,0"),
    ("M0203", "test", 3, "0,1,0,1,0,0,0,0,1,0"),
    ("M0209", "test", 2, "1,0,0,1,0,0,1,1,0,1"),
)


def vehicles(rng: np.random.Generator) -> list[list[int]]:
    """Left, top, width, height of three vehicles, in three columns."""
    boxes = []
    for column in range(3):
        width, height = rng.integers(14, 24, 2)
        left, top = 4 + 31 * column, int(rng.integers(2, 64 - height - 2))
        boxes.append([left, top, int(width), int(height)])
    return boxes


def write_raw(folder: Path, layout: str = "archives") -> Path:
    """Write the sequences: "archives" as published first, "nested" as in the later image archive.

    Every frame has three vehicles and two ignore regions, one over a corner and one wholly over
    the third vehicle; M0209's ignore file is empty.
    """
    rng = np.random.default_rng(0)
    for name, split, frames, attributes in SEQUENCES:
        if layout == "archives":
            images = folder / "UAV-benchmark-M" / name
            texts = folder / "UAV-benchmark-MOTD_v1.0" / "GT" / f"{name}_gt"
        else:
            images = folder / "UAV-benchmark-M" / "UAV-benchmark-M" / name / "img1"
            texts = images.parent / "gt" / "gt"
        images.mkdir(parents=True)
        texts.parent.mkdir(parents=True, exist_ok=True)
        whole, ignore = [], []
        for frame in range(1, frames + 1):
            pixels = rng.integers(20, 70, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            for number, (x, y, w, h) in enumerate(vehicles(rng)):
                pixels[y : y + h, x : x + w] = 160 + 30 * number
                whole.append(f"{frame},{number + 1},{x},{y},{w},{h},1,1,{number % 3 + 1}")
                if number == 2:
                    ignore.append(f"{frame},2,{x - 1},{y - 1},{w + 2},{h + 2},1,-1,-1")
            ignore.append(f"{frame},1,0,0,9,5,1,-1,-1")
            Image.fromarray(pixels).save(images / f"img{frame:06d}.jpg", quality=90)
        Path(f"{texts}_whole.txt").write_text("\n".join(whole) + "\n")
        kept = "" if name == "M0209" else "\n".join(ignore) + "\n"
        Path(f"{texts}_ignore.txt").write_text(kept)
        space = " " if name == "M0203" else ""  # as in a published file's name
        file = folder / "M_attr" / split / f"{name}{space}_attr.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(attributes + "\n")
    return folder


@pytest.fixture
def raw_uavdt(tmp_path: Path) -> Path:
    """Five short sequences, as unpacked from the archives."""
    return write_raw(tmp_path / "raw")


@pytest.fixture
def write_raw_uavdt() -> Callable[..., Path]:
    """`write_raw`."""
    return write_raw
