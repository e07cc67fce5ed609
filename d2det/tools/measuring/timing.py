"""Times of several calls, taken in turn, so that a slow spell of the machine hits all alike."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_LEAST_SAMPLE = 1e-3  # seconds; faster calls are repeated within one sample
_LEAST_SAMPLES = 3

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]


@dataclass
class Outcome:
    """Seconds for one call, sample by sample, or why there are none."""

    times: list[float] = field(default_factory=list)
    error: str = ""


def alternate(
    calls: dict[str, Call], seconds: float, device: str, clock: Clock | None = None
) -> dict[str, Outcome]:
    """Time each call for about `seconds` and three samples at least, round by round.

    A call that has had its time stays away from the rounds that follow, so that a slow one does
    not hold up the others. Every second round goes backwards. A call that raises is out.

    Args:
        clock: seconds that a call repeated so many times takes; the device's own by default.
    """
    clock = clock or (_cuda_clock if device.startswith("cuda") else _cpu_clock)
    outcomes = {name: Outcome() for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            clock(call, 1)  # what is set up once
            repeats[name] = max(1, math.ceil(_LEAST_SAMPLE / max(clock(call, 1), 1e-9)))
        except Exception as error:
            outcomes[name].error = f"failed: {brief(error)}"
    spent = dict.fromkeys(repeats, 0.0)
    pending = list(repeats)
    while pending:
        for name in pending:
            try:
                taken = clock(calls[name], repeats[name])
            except Exception as error:
                outcomes[name] = Outcome(error=f"failed: {brief(error)}")
                spent[name] = math.inf
                continue
            spent[name] += taken
            outcomes[name].times.append(taken / repeats[name])
        pending = [
            name
            for name in reversed(pending)
            if spent[name] < seconds or len(outcomes[name].times) < _LEAST_SAMPLES
            if spent[name] < math.inf
        ]
    return outcomes


def _cpu_clock(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _cuda_clock(call: Call, repeats: int) -> float:
    """Between two events in the stream: idle time of the GPU between the launches counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def host_syncs(call: Call) -> int:
    """How often one call makes the host wait for the GPU, as far as torch knows of it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def median(times: list[float]) -> float:
    """Infinite where there are no times."""
    return statistics.median(times) if times else math.inf


def brief(error: Exception) -> str:
    """The first line of what an exception says, short enough for a table's cell."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].replace("|", "/")
    return text if len(text) <= 90 else f"{text[:87]}..."
