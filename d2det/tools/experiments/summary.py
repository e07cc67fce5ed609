"""Statistics over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Of some values.

    Attributes:
        number: how many there are.
        mean: their mean.
        deviation: sample standard deviation (n − 1); NaN of a single value.
        low, high: lowest and highest.
    """

    number: int
    mean: float
    deviation: float
    low: float
    high: float


class Curve(NamedTuple):
    """Several runs' values over the iterations: arrays of one length, in rising order of x.

    Attributes:
        x: iterations.
        mean, low, high: over the runs that reach them.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def summarize(values: Sequence[float | None]) -> Summary | None:
    """A summary of the finite values; None where there are none."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return None
    deviation = statistics.stdev(finite) if len(finite) > 1 else math.nan
    return Summary(len(finite), statistics.fmean(finite), deviation, min(finite), max(finite))


def summarize_gain(
    values: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> Summary | None:
    """A summary of value − reference over the seeds that both have."""
    return summarize(
        [
            value - other
            for seed, value in values.items()
            if value is not None and (other := reference.get(seed)) is not None
        ]
    )


def band(series: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Curve:
    """Mean, lowest and highest of several runs' series (x rising, y).

    Where the runs have written at different iterations, values between are interpolated; beyond
    its ends a run has no say.
    """
    if not series:
        return Curve(*(np.empty(0) for _ in range(4)))
    x = np.unique(np.concatenate([np.asarray(points, float) for points, _ in series]))
    y = np.stack([np.interp(x, xs, ys, left=np.nan, right=np.nan) for xs, ys in series])
    return Curve(x, np.nanmean(y, axis=0), np.nanmin(y, axis=0), np.nanmax(y, axis=0))
