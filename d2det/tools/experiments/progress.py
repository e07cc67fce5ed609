"""What is shown while runs go on: a bar for each on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from tqdm import tqdm

from .folders import Run, last_metrics, planned_iterations
from .job import Job

_LINE_EVERY = 60.0  # seconds, without a terminal
_LOOK_EVERY = 1.0


class Position(NamedTuple):
    """Where a run is.

    Attributes:
        iteration, max_iter: done, and to do (0: not known yet).
        eta: seconds that training will still take, without evaluations; None: not known.
    """

    iteration: int
    max_iter: int
    eta: float | None

    @property
    def share(self) -> float:
        return self.iteration / self.max_iter if self.max_iter else 0.0

    @property
    def text(self) -> str:
        if not self.max_iter or not self.iteration:
            return "starting"
        if self.iteration >= self.max_iter:
            return f"{self.max_iter} iterations, evaluating"
        left = "" if self.eta is None else f", {tqdm.format_interval(self.eta)} left"
        return f"iteration {self.iteration} of {self.max_iter}{left}"


def position(run: Run) -> Position:
    """Where a run is, from its `metrics.json`, which is written every 20 iterations."""
    last, max_iter = last_metrics(run.folder), planned_iterations(run.folder)
    iteration = int(last.get("iteration", -1)) + 1
    seconds = last.get("time")
    eta = None
    if isinstance(seconds, (int, float)) and max_iter:
        eta = max(0, max_iter - iteration) * float(seconds)
    return Position(iteration, max_iter, eta)


class Display:
    """Shows runs as they start, go on and end.

    Args:
        stream: bars if it is a terminal, lines otherwise.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars = self._stream.isatty()
        self._overall: tqdm | None = None
        self._by_slot: dict[str, tqdm] = {}
        self._ended = 0
        self._total = 0
        self._looked = self._wrote = 0.0

    def start(self, total: int, done: int) -> None:
        """`done` of `total` runs need nothing."""
        self._total, self._ended = total, done
        self._wrote = time.monotonic()
        if self._bars:
            self._overall = tqdm(
                total=total, initial=done, desc="all runs", file=self._stream, position=0,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}[{elapsed}<{remaining}]",
            )  # fmt: skip
            self._count()
        self._say(f"{total} runs, {done} of them done already")

    def started(self, job: Job) -> None:
        self._say(f"{job.slot.name}: {job.run.name} starts")
        if self._bars and job.slot.name not in self._by_slot:
            self._by_slot[job.slot.name] = tqdm(
                total=1, file=self._stream, position=len(self._by_slot) + 1, leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar:20}| {postfix}",
            )  # fmt: skip

    def skipped(self, run: Run, reason: str) -> None:
        self._ended += 1
        self._say(f"{run.name}: skipped, {reason}")

    def ended(self, job: Job, success: bool) -> None:
        self._ended += 1
        took = tqdm.format_interval(time.monotonic() - job.started)
        if success:
            self._say(f"{job.run.name}: done after {took} ({self._ended} of {self._total})")
        else:
            self._say(f"{job.run.name}: FAILED after {took}, see {job.console}")
        self._looked = 0.0

    def update(self, active: Sequence[Job]) -> None:
        """Call often; files are looked at once a second."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        places = [(job, position(job.run)) for job in active]
        for job, place in places if self._bars else ():
            bar = self._by_slot[job.slot.name]
            bar.set_description_str(f"{job.slot.name}: {job.run.name}", refresh=False)
            bar.set_postfix_str(place.text, refresh=False)
            bar.n = min(1.0, place.share)
            bar.refresh()
        if self._overall is not None:
            self._overall.n = min(self._total, self._ended + sum(p.share for _, p in places))
            self._count()
        elif now - self._wrote > _LINE_EVERY:
            self._wrote = now
            parts = [f"{job.run.name}: {place.text}" for job, place in places]
            self._say(f"{self._ended} of {self._total} runs; " + "; ".join(parts))

    def close(self) -> None:
        for bar in [*self._by_slot.values(), *filter(None, [self._overall])]:
            bar.close()

    def _count(self) -> None:
        assert self._overall is not None
        self._overall.set_postfix_str(f"{self._ended} of {self._total} ", refresh=False)
        self._overall.refresh()

    def _say(self, text: str) -> None:
        if self._bars:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
