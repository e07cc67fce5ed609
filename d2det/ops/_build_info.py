"""What a compiled library says about itself (csrc/build_info.cpp, csrc/cuda/build_info.cu)."""

from __future__ import annotations

import ctypes
from pathlib import Path


def build_info(library: Path | None) -> dict[str, str]:
    """What the loaded library for CPU was built with, name and value; empty without one.

    "torch", "compiler", "instruction sets" (those it has kernels for), "instruction set" (the one
    in use in this process).
    """
    return _read(library, "d2det_build_info")


def cuda_build_info(library: Path | None) -> dict[str, str]:
    """The same of the library for CUDA: "cuda" (the toolkit's version), "architectures"."""
    return _read(library, "d2det_cuda_build_info")


def _read(library: Path | None, symbol: str) -> dict[str, str]:
    if library is None:
        return {}
    try:
        function = getattr(ctypes.CDLL(str(library)), symbol)
    except (OSError, AttributeError):  # built from older sources
        return {}
    function.restype = ctypes.c_char_p
    lines = function().decode(errors="replace").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)
