"""What a checkpoint needs beside weights: states of the random generators, the metrics file."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def get_rng_state(*, cuda: bool = True) -> dict[str, Any]:
    """States of this process's Python, NumPy, PyTorch and (of the current device) CUDA generators.

    Only tensors and plain values, so that `torch.load` reads it back with `weights_only=True`.
    """
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": (version, torch.tensor(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever random numbers are drawn inside, the generators are as before afterwards."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and PyTorch's CPU generators start at `seed`; then as before."""
    state = get_rng_state(cuda=False)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would reseed the GPUs too, which a data sample has no business with.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        set_rng_state(state)


def keep_earlier(folder: str) -> None:
    """Set aside what an earlier training in `folder` would mix into a new one.

    Its best weights would be taken for the new training's, its metrics for the beginning of the new
    curves. They become `earlier_model_best.pth` and `earlier_metrics.json`.
    """
    best, metrics = (os.path.join(folder, n) for n in ("model_best.pth", "metrics.json"))
    if os.path.isfile(best):
        os.replace(best, os.path.join(folder, "earlier_model_best.pth"))
        logger.warning("%s of an earlier training is now earlier_model_best.pth.", best)
    if os.path.isfile(metrics) and os.path.getsize(metrics):
        # Copied, not renamed: the new training's writer may have the file open already.
        shutil.copyfile(metrics, os.path.join(folder, "earlier_metrics.json"))


def trim_metrics(path: str, start_iter: int) -> None:
    """Drop the lines of a metrics.json that a resumed training is going to write again.

    The file is changed in place, since a writer may hold it open for appending.

    Args:
        path: the file; nothing happens if there is none.
        start_iter: lines of this iteration and later ones go, and so do lines cut short by a crash.
    """
    if not os.path.isfile(path):
        return

    def is_kept(line: str) -> bool:
        try:
            return json.loads(line)["iteration"] < start_iter
        except (ValueError, KeyError, TypeError):
            return False

    with open(path, "r+", encoding="utf-8") as file:
        lines = file.readlines()
        kept = [line for line in lines if is_kept(line)]
        if len(kept) < len(lines):
            file.seek(0)
            file.writelines(kept)
            file.truncate()
            logger.info(
                "Dropped %d lines from %s, to be written again.", len(lines) - len(kept), path
            )
