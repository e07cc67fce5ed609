"""A learning rate of their own for the layers that predict offsets."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


def scale_offset_lr(optimizer: Optimizer, model: nn.Module, factor: float) -> None:
    """Multiply the rate of the offset layers of deformable convolutions by `factor`, in place.

    To be called before a scheduler is built, which takes the rates as they are then.

    Args:
        optimizer: of `model`, with the rates of all parameters.
        model: offset layers are its modules whose name ends in "_offset" (`conv2_offset`, in
            detectron2's blocks and ours).
        factor: 0.1 in DCNv2; 1 changes nothing, not even the grouping.

    Raises:
        ValueError: a negative factor.
    """
    if factor < 0:
        raise ValueError(f"SOLVER.OFFSET_LR_FACTOR must not be negative, got {factor}")
    if factor == 1:
        return
    chosen = {
        id(parameter)
        for name, module in model.named_modules()
        if name.endswith("_offset")
        for parameter in module.parameters()
    }
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in chosen]
        if not ours:
            continue
        others = [p for p in group["params"] if id(p) not in chosen]
        if others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": ours, "lr": group["lr"] * factor})
        else:
            group["lr"] *= factor
