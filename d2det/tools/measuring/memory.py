"""Peak temporary memory of one call: what it takes beyond its inputs and its results.

On a GPU torch's allocator keeps the peak. On CPU the kernel of the operating system does: the
resident set's high-water mark, which sees whatever a kernel takes, from torch, malloc or new, once
it is written to. That needs a process in which freed memory goes back to the system at once, hence
one of its own (`prepare_process`), apart from the one that measures times.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3  # malloc.h
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_RETURNED_FROM = 1 << 15  # bytes; what is smaller stays with malloc and may go unseen

# The environment of the measuring process: MKL must not keep its buffers from call to call.
ENVIRONMENT = {"MKL_DISABLE_FAST_MM": "1"}


def unavailable(device: str) -> str:
    """Why the peak cannot be measured here; empty where it can."""
    if device.startswith("cuda") or (sys.platform == "linux" and _CLEAR.exists()):
        return ""
    return "needs Linux's /proc/self/clear_refs"


def prepare_process() -> None:
    """Make this process return freed memory at once, in pages of 4 KiB."""
    libc = ctypes.CDLL(None)
    if not libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_FROM):
        raise OSError("mallopt refused M_MMAP_THRESHOLD")
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes that `call` takes at its peak, less those of the tensors that it returns.

    The call has run before: threads, compiled code and whatever else is set up once and kept is not
    counted. Results that come into being after the peak make the figure too small, never too large;
    it is at least 0.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        top = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _high_water_mark()
        result = call()
        top = _high_water_mark()
    return max(0, top - before - _size(result))


def _high_water_mark() -> int:
    line = next(li for li in _STATUS.read_text().splitlines() if li.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _size(result: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(result)}
    return sum(s.nbytes() for s in storages.values())


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)
