"""What a figure was measured with: machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

import d2det
from d2det.ops._build_info import build_info
from d2det.ops._library import extension

_ROOT = Path(d2det.__file__).resolve().parents[1]
_PEERS = ("detectron2", "mmcv")


def describe(device: str = "cpu") -> str:
    """Processor or GPU, cores and threads, torch and torchvision."""
    if device.startswith("cuda"):
        where = torch.cuda.get_device_name()
    else:
        where = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{where}; {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )


def versions() -> str:
    """d2det with its commit and the instruction set of its kernels, and its peers."""
    peers = [f"{name} {version}" for name in _PEERS if (version := _version(name))]
    kernels = build_info(extension.path).get("instruction set", "no compiled extension")
    return ", ".join([f"d2det {d2det.__version__}{_commit()} ({kernels})", *peers])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    if not (_ROOT / ".git").exists():  # installed: another project's repository may lie around it
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" at {answer.stdout.strip()}"
