"""A learning rate of their own for the layers that predict offsets."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def scale_offset_lr(optimizer: Optimizer, model: nn.Module, factor: float) -> None:
    """Multiply the rate of the offset layers of deformable convolutions by `factor`, in place.

    To be called before a scheduler is built, which takes the rates as they are then.

    Args:
        optimizer: of `model`, with the rates of all parameters.
        model: see `offset_groups`.
        factor: 0.1 in DCNv2; 1 changes nothing, not even the grouping.

    Raises:
        ValueError: a negative factor.
    """
    if factor < 0:
        raise ValueError(f"SOLVER.OFFSET_LR_FACTOR must not be negative, got {factor}")
    if factor != 1:
        for group in offset_groups(optimizer, model):
            group["lr"] *= factor


def offset_groups(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Give the offset layers of deformable convolutions parameter groups of their own, in place.

    Args:
        optimizer: of `model`.
        model: offset layers are its modules whose name ends in "_offset" (`conv2_offset`, in
            detectron2's blocks and ours).

    Returns:
        Those of the optimizer's groups that now hold offset layers and nothing else.
    """
    chosen = {
        id(parameter)
        for name, module in model.named_modules()
        if name.endswith("_offset")
        for parameter in module.parameters()
    }
    groups = []
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in chosen]
        others = [p for p in group["params"] if id(p) not in chosen]
        if ours and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": ours})
            group = optimizer.param_groups[-1]
        if ours:
            groups.append(group)
    return groups
