"""Argument checks shared by the public functions: each error names the argument and the shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str, value: object, ndim: int | None, like: tuple[str, Tensor] | None = None
) -> None:
    """Check that `value` is a floating-point tensor of `ndim` dimensions.

    Args:
        name: the argument's name, for the message.
        value: the argument.
        ndim: its number of dimensions; None: any.
        like: (name, tensor) of the argument whose device it must share.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: wrong number of dimensions, or another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {shape(value)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} is on {value.device}, but {like[0]} is on {like[1].device}")


def check_shape(
    name: str, value: Tensor, expected: tuple[int, ...], because: tuple[str, Tensor]
) -> None:
    """Raise a ValueError that names both shapes unless `value` has the expected one."""
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} beside {because[0]} of shape "
            f"{shape(because[1])}, got {shape(value)}"
        )


def check_same_dtype(name: str, value: Tensor, like: tuple[str, Tensor]) -> None:
    """Raise a TypeError unless both tensors have one dtype."""
    if value.dtype != like[1].dtype:
        raise TypeError(f"{name} is {value.dtype}, but {like[0]} is {like[1].dtype}")


def check_integers(name: str, value: Tensor, like: tuple[str, Tensor], length: int) -> None:
    """Check a vector of `length` int64 numbers on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be torch.int64, got {value.dtype}")
    check_shape(name, value, (length,), like)
    if value.device != like[1].device:
        raise ValueError(f"{name} is on {value.device}, but {like[0]} is on {like[1].device}")


def check_positive(name: str, value: int, minimum: int = 1) -> int:
    """Check an integer setting; returns it."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def pair(name: str, value: int | tuple[int, int], minimum: int) -> list[int]:
    """(y, x) of a setting that may be given as one number for both."""
    values = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or two, got {value}")
    return [check_positive(name, v, minimum) for v in values]


def shape(value: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, as it is shown in messages."""
    return tuple(value.shape)


def autocast_is_on(value: Tensor) -> bool:
    """Whether autocast will settle the dtypes of operators on this tensor's device."""
    return value.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(value.device.type)


def autocast_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an operand: float64 and integers stay as they are."""
    if value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
