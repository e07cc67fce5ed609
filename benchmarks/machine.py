"""A line that names the machine and the versions a figure was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torchvision


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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
