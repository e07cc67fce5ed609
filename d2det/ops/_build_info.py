"""What a compiled library says about itself (csrc/build_info.cpp, csrc/cuda/build_info.cu)."""

from __future__ import annotations

import ctypes
from pathlib import Path


def build_info(library: Path | None) -> dict[str, str]:
    """Name and value of what a loaded library was built with; empty without one.

    The library for CPU says: "torch", "compiler", "instruction sets" (those it has kernels for) and
    "instruction set" (the one in use in this process). The one for CUDA: "cuda", "architectures".
    """
    if library is None:
        return {}
    try:
        function = ctypes.CDLL(str(library)).d2det_build_info
    except (OSError, AttributeError):  # built from older sources
        return {}
    function.restype = ctypes.c_char_p
    lines = function().decode(errors="replace").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)
