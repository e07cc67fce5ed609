"""Adaptive weighted pooling (D2Det, Sec. 3.2): schema, fake kernel, autograd.

Letters: R RoIs, C channels, k x k the pooled size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_positive, check_shape, check_tensor, shape
from ._library import define, differentiate
from .reference import adaptive_weighted_pool as reference
from .reference.gather import new_output

# exp of minus this is still a normal float32, so that no window's weights vanish altogether.
_MAX_COEFFICIENT = 80.0


def adaptive_weighted_pool(
    features: Tensor,
    logits: Tensor,
    *,
    coefficient: float = 12.0,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
    normalize: bool = True,
) -> Tensor:
    """Average pooling in which every element has its own learned weight.

    Normalised: sum(w f) / sum(w) over each window, w = exp(coefficient * sigmoid(logits)).
    Otherwise:  sum(w f) / kernel_size ** 2, padding counted, w = 2 * sigmoid(logits), which is
    plain average pooling where the logits are 0; `coefficient` is not used.

    Weights are computed in float32 at least (exp(12) overflows float16), and again in the backward
    pass instead of being kept. Features and logits may differ in dtype, so that autocast casts
    neither: half-precision features go with float32 logits from a normalisation layer.

    Args:
        features: (R, C, H, W); in D2Det H = W = 2k.
        logits: the same shape.
        coefficient: at most 80 in absolute value.
        kernel_size, stride, padding: of the windows; padding at most half the kernel.
        normalize: which form, see above.

    Returns:
        (R, C, H', W') with H' = (H + 2 * padding - kernel_size) // stride + 1: k x k by default.
        The dtype and memory format are those of `features`.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, devices or settings do not fit.
    """
    check_tensor("features", features, 4)
    check_tensor("logits", logits, 4, ("features", features))
    check_shape("logits", logits, shape(features), ("features", features))
    check_positive("kernel_size", kernel_size)
    check_positive("stride", stride)
    check_positive("padding", padding, 0)
    if 2 * padding > kernel_size:
        raise ValueError(f"padding must be at most kernel_size / 2, got {padding}, {kernel_size}")
    if min(features.shape[2:]) + 2 * padding < kernel_size or features.shape[1] == 0:
        raise ValueError(
            f"features of shape {shape(features)} have no channel, or are smaller than a window of "
            f"{kernel_size} with padding {padding}"
        )
    if not math.isfinite(coefficient) or abs(coefficient) > _MAX_COEFFICIENT:
        raise ValueError(f"coefficient must be within +-{_MAX_COEFFICIENT}, got {coefficient}")
    return torch.ops.d2det.adaptive_weighted_pool(
        features, logits, float(coefficient), kernel_size, stride, padding, normalize
    )


def _fake(
    features: Tensor,
    logits: Tensor,
    coefficient: float,
    kernel_size: int,
    stride: int,
    padding: int,
    normalize: bool,
) -> Tensor:
    r, c, height, width = features.shape
    pooled = [(n + 2 * padding - kernel_size) // stride + 1 for n in (height, width)]
    return new_output(features, (r, c, pooled[0], pooled[1]))


def _fake_backward(
    grad_output: Tensor,
    features: Tensor,
    logits: Tensor,
    coefficient: float,
    kernel_size: int,
    stride: int,
    padding: int,
    normalize: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_features, grad_logits = (
        torch.empty_like(t) if needed else t.new_empty(0)
        for t, needed in zip((features, logits), output_mask, strict=True)
    )
    return grad_features, grad_logits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, logits, *settings = inputs
    ctx.save_for_backward(features, logits)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = [bool(n) for n in ctx.needs_input_grad[:2]]
    grads = torch.ops.d2det.adaptive_weighted_pool_backward(
        grad, *ctx.saved_tensors, *ctx.settings, needed
    )
    wanted = [g if n else None for g, n in zip(grads, needed, strict=True)]
    return (*wanted, *[None] * len(ctx.settings))


_ARGUMENTS = (
    "Tensor features, Tensor logits, float coefficient, int kernel_size, int stride, int padding, "
    "bool normalize"
)
define(
    f"adaptive_weighted_pool({_ARGUMENTS}) -> Tensor",
    reference=reference.forward,
    fake=_fake,
)
define(
    f"adaptive_weighted_pool_backward(Tensor grad_output, {_ARGUMENTS}, bool[2] output_mask) -> "
    "(Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
)
differentiate("adaptive_weighted_pool", _backward, _setup_context)
