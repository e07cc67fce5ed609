"""The lines above a benchmark's table."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path

from d2det.tools.measuring.machine import describe, versions


def heading(title: str, device: str) -> str:
    """In markdown: question, command, machine, versions, date."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    today = datetime.datetime.now(datetime.UTC).date()
    return f"# {title}\n\n`{command}`\n\n{describe(device)}; {versions()}. {today}."
