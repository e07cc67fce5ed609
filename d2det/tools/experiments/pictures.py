"""Example detections: the pictures that runs leave, shrunk, one image's side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from .folders import Run, read_results

_GAP = 12  # of d2det.evaluation.drawing.beside
_WIDTH = 420
_QUALITY = 82


class Example(NamedTuple):
    """One image.

    Attributes:
        name: of its file, without the ending.
        dataset: where it is from.
        views: JPEG files and the label of each: "ground truth", then the methods.
    """

    name: str
    dataset: str
    views: list[tuple[str, bytes]]


def find_examples(runs: Sequence[Run], wanted: int) -> list[Example]:
    """Images that most methods have pictures of, evenly spread; each method's first run shows it.

    Args:
        wanted: how many at most, for each test set.
    """
    first: dict[str, Run] = {}
    for run in runs:
        if (run.folder / "pictures").is_dir() and read_results(run.folder) is not None:
            first.setdefault(run.method.name, run)
    examples: list[Example] = []
    for dataset in dict.fromkeys(name for run in first.values() for name in _datasets(run)):
        by_picture: dict[str, list[tuple[Run, Path]]] = {}
        for run in first.values():
            for path in sorted((run.folder / "pictures" / dataset).glob("[0-9]*_*.jpg")):
                by_picture.setdefault(path.name, []).append((run, path))
        most = max(map(len, by_picture.values()), default=0)
        names = sorted(name for name, found in by_picture.items() if len(found) == most)
        for name in _spread(names, wanted):
            found = _example(Path(name).stem.partition("_")[2], dataset, by_picture[name])
            if found.views:
                examples.append(found)
    return examples


def split_picture(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Ground truth and detections of a picture that has both, with white between; None of others.

    Args:
        picture: (H, W, 3) uint8, BGR.
    """
    width = picture.shape[1]
    half = (width - _GAP) // 2
    if half < 1 or 2 * half + _GAP != width:
        return None
    # JPEG's blocks reach a few pixels into the gap.
    middle = picture[:, half + 4 : half + _GAP - 4]
    if middle.min() < 225:
        return None
    return picture[:, :half], picture[:, half + _GAP :]


def _datasets(run: Run) -> list[str]:
    folders = (run.folder / "pictures").iterdir()
    return sorted(path.name for path in folders if path.is_dir())


def _spread(names: Sequence[str], wanted: int) -> list[str]:
    count = min(len(names), wanted)
    return [names[round(i)] for i in np.linspace(0, len(names) - 1, count)] if count else []


def _example(name: str, dataset: str, found: Sequence[tuple[Run, Path]]) -> Example:
    views: list[tuple[str, bytes]] = []
    for run, path in found:
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            continue
        tasks: Mapping[str, object] = (read_results(run.folder) or {}).get(dataset) or {}
        halves = split_picture(picture) if tasks else None  # no tasks: there is no ground truth
        if halves is not None and not views:
            views.append(("ground truth", _encode(halves[0])))
        views.append((run.method.label, _encode(picture if halves is None else halves[1])))
    return Example(name, dataset, views)


def _encode(picture: np.ndarray) -> bytes:
    height, width = picture.shape[:2]
    if width > _WIDTH:
        size = (_WIDTH, max(1, round(height * _WIDTH / width)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done
    return data.tobytes()
