"""LVIS evaluation by detectron2, made to run on today's NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator

from .coco import in_float32


class LvisEvaluator(LVISEvaluator):
    """detectron2's `LVISEvaluator`, on half-precision detections too and without the removed
    `np.float`, which the lvis package (0.5.3, its last) still calls."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for output in outputs:
            if "instances" in output:
                output["instances"] = in_float32(output["instances"])
        super().process(inputs, outputs)

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        with _removed_names():
            super()._eval_predictions(predictions)


def check_lvis() -> None:
    """Refuse to go on without the lvis package, which reads and evaluates LVIS.

    Raises:
        ValueError: with the command that installs it.
    """
    if find_spec("lvis") is None:
        raise ValueError(
            "LVIS data sets need the package lvis: pip install --no-deps lvis (all that it needs "
            "is there; without --no-deps it brings a second OpenCV)"
        )


class _OldNumPy:
    """NumPy with `float` among its names."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _removed_names() -> Iterator[None]:
    import lvis.eval

    before, lvis.eval.np = lvis.eval.np, _OldNumPy()
    try:
        yield
    finally:
        lvis.eval.np = before
