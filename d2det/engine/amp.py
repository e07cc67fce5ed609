"""Automatic mixed precision on CPU and GPU: SOLVER.AMP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn


def amp_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """The half precision that SOLVER.AMP asks for on `device`; None where it is switched off.

    Raises:
        ValueError: unknown precision, or float16 on a CPU.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    precision = cfg.SOLVER.AMP.PRECISION
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "bf16"
    if precision not in ("fp16", "bf16"):
        raise ValueError(f"SOLVER.AMP.PRECISION {precision!r} is not one of 'auto', 'fp16', 'bf16'")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION 'fp16' needs a GPU: CPUs train in 'bf16' (or 'auto')."
        )
    return torch.float16 if precision == "fp16" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """`torch.autocast` in `dtype`, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def autocast_calls(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Callable[[Any], Any]:
    """A function that calls `model` under `autocast`."""

    def call(inputs: Any) -> Any:
        with autocast(device, dtype):
            return model(inputs)

    return call
