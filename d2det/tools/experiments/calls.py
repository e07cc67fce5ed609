"""Who ran an experiment when: one note for each call of `run`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import NamedTuple

from d2det.tools.measuring import machine

from .folders import write_atomically

_FILE = "calls.json"


class Call(NamedTuple):
    """When, with which command, on what."""

    date: str
    command: str
    machine: str
    versions: str


def note_call(output: Path, command: str, device: str) -> None:
    """Add this call to the folder's notes."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    calls = [*read_calls(output), Call(date, command, _machine(device), machine.versions())]
    text = json.dumps([call._asdict() for call in calls], indent=1)
    write_atomically(output / _FILE, text + "\n")


def read_calls(output: Path) -> list[Call]:
    """The calls so far; [] where none is noted."""
    file = output / _FILE
    if not file.is_file():
        return []
    return [Call(**item) for item in json.loads(file.read_text(encoding="utf-8"))]


def _machine(device: str) -> str:
    # Without the threads of this process, which runs nothing itself.
    head, _, tail = machine.describe(device).partition("; ")
    return f"{head}; {tail.partition(', ')[2]}"
