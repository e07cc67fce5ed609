"""What runs can use at once: the GPUs there are, or shares of the CPU's cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Slot(NamedTuple):
    """A place for one run at a time.

    Attributes:
        name: for the progress display.
        environment: variables that keep a run there.
    """

    name: str
    environment: dict[str, str]


def find_slots(
    jobs: int | None = None, gpus: Sequence[str] | None = None, per_run: int = 1
) -> list[Slot]:
    """Places for runs on this machine.

    Args:
        jobs: runs at once, at most as many as GPUs allow; None: as many, or one on a CPU.
        gpus: GPUs to use, as CUDA_VISIBLE_DEVICES names them; None: all that are visible; empty:
            none, i.e. the CPU.
        per_run: GPUs that each run uses.

    Raises:
        ValueError: more is asked for than there is.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    found = visible_gpus() if gpus is None else list(gpus)
    if not found:
        return cpu_slots(jobs or 1, hidden=gpus is not None)
    groups = [found[i : i + per_run] for i in range(0, len(found) - per_run + 1, per_run)]
    if not groups:
        raise ValueError(f"--num-gpus {per_run}, but there are {len(found)} GPUs")
    return [
        Slot("GPU " + ",".join(group), {"CUDA_VISIBLE_DEVICES": ",".join(group)})
        for group in groups[: jobs or len(groups)]
    ]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [name.strip() for name in named][:count] or [str(index) for index in range(count)]


def cpu_slots(jobs: int, *, hidden: bool = False) -> list[Slot]:
    """Shares of the cores; OMP_NUM_THREADS stands where it is set already.

    Args:
        hidden: keep runs from GPUs that are there.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    environment = {"OMP_NUM_THREADS": threads}
    if hidden:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return [Slot(f"CPU {number}" if jobs > 1 else "CPU", environment) for number in range(jobs)]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
