"""Running what is not done yet, in as many processes as there are places."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .devices import Slot
from .folders import Run, state
from .job import Job, command_of
from .lock import Busy
from .progress import Display

_POLL = 0.2  # seconds


class Stopped(Exception):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_all(
    runs: Sequence[Run], train_args: Sequence[str], slots: Sequence[Slot], display: Display
) -> dict[Run, str]:
    """Run all that is not done; what fails does not stop the others.

    Returns:
        Why each run that is still not done is not: a failure's last words, or that another process
        is at it.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP came; all processes have been ended.
    """
    waiting = deque(run for run in runs if state(run.folder).kind != "done")
    free, active = deque(slots), list[Job]()
    problems: dict[Run, str] = {}
    display.start(len(runs), len(runs) - len(waiting))
    with _signals_noted() as noted:
        try:
            while waiting or active:
                if noted:
                    raise Stopped(noted[0])
                while waiting and free:
                    run = waiting.popleft()
                    try:
                        active.append(Job(run, free[0], command_of(run, train_args)))
                    except Busy as error:
                        problems[run] = str(error)
                        display.skipped(run, str(error))
                        continue
                    free.popleft()
                    display.started(active[-1])
                for job in list(active):
                    success = job.poll()
                    if success is None:
                        continue
                    active.remove(job)
                    free.append(job.slot)
                    if not success:
                        problems[job.run] = state(job.run.folder).message
                    display.ended(job, success)
                display.update(active)
                if active:
                    time.sleep(_POLL)
        finally:
            with _signals_wait():
                for job in active:
                    job.end()
                display.close()
    return problems


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """The signals that came: an exception between a process's start and its note would lose it."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    with _handlers(note):
        yield noted


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handlers(stop):
        yield


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A second Ctrl-C must not leave processes behind; the ending takes seconds at most."""
    with _handlers(signal.SIG_IGN):
        yield


@contextmanager
def _handlers(handler: object) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
