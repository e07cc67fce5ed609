"""One run as a process: started, watched, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import d2det

from . import lock
from .devices import Slot
from .folders import Run, read_results, write_atomically

_PATIENCE = 10.0  # seconds from SIGTERM to SIGKILL


def command_of(run: Run, train_args: Sequence[str]) -> list[str]:
    """The `train_net.py` command of a run."""
    return [
        sys.executable, "-m", "d2det.engine.main", "--config-file", run.method.config,
        "--resume=auto", *train_args, *run.method.overrides,
        "OUTPUT_DIR", str(run.folder), "SEED", str(run.seed),
    ]  # fmt: skip


class Job:
    """A run that has been started; its output goes to `console.txt` in its folder.

    The process leads a group of its own, so that Ctrl-C reaches it through `end` alone, together
    with its data workers. It holds the lock on its folder even if this process is killed.

    Raises:
        lock.Busy: another process holds the folder.
    """

    def __init__(self, run: Run, slot: Slot, command: Sequence[str]) -> None:
        self.run = run
        self.slot = slot
        self.started = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        handle = lock.take(run.folder)
        # The child imports the d2det that is imported here.
        package = str(Path(d2det.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        try:
            (run.folder / "failure.json").unlink(missing_ok=True)
            with self.console.open("a", encoding="utf-8") as console:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **slot.environment, "PYTHONPATH": path},
                    start_new_session=True,
                    pass_fds=[handle],
                )
        finally:
            os.close(handle)  # the child has its own handle on it

    @property
    def console(self) -> Path:
        return self.run.folder / "console.txt"

    def poll(self) -> bool | None:
        """Whether the run succeeded; None while it goes on. A failure is noted in its folder."""
        status = self._process.poll()
        if status is None:
            return None
        self._signal(signal.SIGKILL)  # data workers that a crash has left
        if read_results(self.run.folder) is not None:
            return True
        message = last_line(self.console) or "no output"
        if status < 0:
            message = f"ended by {signal.Signals(-status).name}; last output: {message}"
        elif status == 0:
            message = f"ended without results.json; last output: {message}"
        note = {"returncode": status, "message": message}
        write_atomically(self.run.folder / "failure.json", json.dumps(note, indent=1) + "\n")
        return False

    def end(self) -> None:
        """Stop the process and its workers: the run can be resumed from its last checkpoint."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:  # workers that outlive their parent, too
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # macOS says the latter of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def last_line(console: Path) -> str:
    """The last line of a program's output that says something; a bar's last state."""
    text = console.read_text(encoding="utf-8", errors="replace") if console.is_file() else ""
    for line in reversed(text.replace("\r", "\n").splitlines()):
        if line.strip():
            return line.strip()[:500]
    return ""
