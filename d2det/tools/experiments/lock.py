"""A lock on a run's folder, which lasts as long as a process that has its handle."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_FILE = ".lock"


class Busy(RuntimeError):
    """Another process is at this run."""


def take(folder: Path) -> int:
    """A file descriptor that holds the lock, to be closed or handed to a child.

    Raises:
        Busy: another process holds it.
    """
    handle = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise Busy(f"another process is at {folder}") from error
    return handle


def is_taken(folder: Path) -> bool:
    """Whether a process holds the lock now."""
    if not (folder / _FILE).is_file():
        return False
    try:
        os.close(take(folder))
    except Busy:
        return True
    return False
