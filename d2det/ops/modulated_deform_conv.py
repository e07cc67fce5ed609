"""Modulated deformable convolution (Zhu et al., CVPR 2019, Eq. 1): schema, fake kernel, autograd.

Letters: N images, G offset groups, kh x kw the kernel, Ho x Wo the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    autocast_is_on,
    autocast_to,
    check_same_dtype,
    check_shape,
    check_tensor,
    pair,
    shape,
)
from ._library import define, differentiate
from .reference import modulated_deform_conv as reference
from .reference.gather import new_output

_Pair = int | tuple[int, int]


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
) -> Tensor:
    """Convolution whose taps are moved by `offset` and scaled by `mask`.

        y(p) = sum_k w_k * x(p + p_k + offset_k) * mask_k

    with bilinear sampling that is zero outside the map. The meaning of all tensors is that of
    `torchvision.ops.deform_conv2d`; the order of the arguments differs. Offset groups and weight
    groups are read off the shapes.

    Under autocast, input, weight and bias are cast to its dtype; offset and mask keep theirs,
    so that float32 coordinates survive beside a half-precision input. Sums are in float32 at least;
    compiled kernels may round the sampled values, as they would be rounded in a half-precision
    im2col buffer, to bfloat16 (CPUs with AVX512_BF16) or to the input's dtype (GPUs).

    On a GPU, float32 products run in TF32 where torch allows that for convolutions:
    `torch.backends.cudnn.conv.fp32_precision`, "tf32" by default, as for torch's own. The sums
    are the same from run to run, but for the input's gradient on a GPU, which
    `torch.use_deterministic_algorithms(True)` makes so.

    Args:
        input: (N, Cin, H, W), floating point.
        offset: (N, 2 * G * kh * kw, Ho, Wo), y before x, in input pixels; the input's dtype or
            float32.
        mask: (N, G * kh * kw, Ho, Wo), dtype as for `offset`; None (DCNv1) means ones.
        weight: (Cout, Cin / groups, kh, kw), the input's dtype.
        bias: (Cout,), the input's dtype; optional.
        stride, padding, dilation: one number, or (y, x).

    Returns:
        (N, Cout, Ho, Wo), in the input's dtype and memory format.

    Raises:
        TypeError: an argument is not a floating-point tensor, or of another dtype.
        ValueError: shapes or devices do not fit; the message names both shapes.
    """
    steps = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    _check(input, offset, mask, weight, bias, *steps)
    return torch.ops.d2det.modulated_deform_conv2d(
        input, offset, mask, weight, bias, *steps, _allow_tf32()
    )


def _allow_tf32() -> bool:
    """Whether float32 convolutions may run in TF32 on a GPU: torch's own switch for them."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


# What torch.compiler.assume_constant_result sets, without importing the compiler: the switch is
# read when a graph is traced, not traced itself.
_allow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    check_tensor("input", input, 4)
    like = ("input", input)
    check_tensor("weight", weight, 4, like)
    check_tensor("offset", offset, 4, like)
    n, channels, height, width = input.shape
    out, per_group, kh, kw = weight.shape
    if 0 in (channels, height, width, *weight.shape):
        raise ValueError(
            f"only the batch may be empty: input has shape {shape(input)}, weight {shape(weight)}"
        )
    if channels % per_group or out % (channels // per_group):
        raise ValueError(
            f"weight of shape {shape(weight)} does not fit input of shape {shape(input)}: its "
            "second dimension must divide the input channels, and the quotient (the number of "
            "groups) its first"
        )
    size = _output_size(input, weight, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"weight of shape {shape(weight)} with dilation {dilation} is larger than the padded "
            f"input of shape {shape(input)}"
        )
    groups = offset.shape[1] // (2 * kh * kw)
    if groups == 0 or offset.shape[1] % (2 * kh * kw) or channels % groups:
        raise ValueError(
            f"offset of shape {shape(offset)} must have 2 * G * {kh} * {kw} channels beside weight "
            f"of shape {shape(weight)}, with G dividing the channels of input of shape "
            f"{shape(input)}"
        )
    check_shape("offset", offset, (n, offset.shape[1], *size), like)
    if mask is not None:
        check_tensor("mask", mask, 4, like)
        check_shape("mask", mask, (n, groups * kh * kw, *size), ("offset", offset))
    if bias is not None:
        check_tensor("bias", bias, 1, like)
        check_shape("bias", bias, (out,), ("weight", weight))
    if autocast_is_on(input):
        return
    check_same_dtype("weight", weight, like)
    if bias is not None:
        check_same_dtype("bias", bias, like)
    for name, value in (("offset", offset), ("mask", mask)):
        if value is not None and value.dtype not in (input.dtype, torch.float32):
            raise TypeError(f"{name} must be {input.dtype} or float32, got {value.dtype}")


def _output_size(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    )
    return height, width


def _autocast(
    dtype: torch.dtype,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Any, ...]:
    input, weight = autocast_to(input, dtype), autocast_to(weight, dtype)
    bias = None if bias is None else autocast_to(bias, dtype)
    allowed = (input.dtype, torch.float32)
    offset = offset if offset.dtype in allowed else offset.float()
    mask = mask if mask is None or mask.dtype in allowed else mask.float()
    return (input, offset, mask, weight, bias, *rest)


def _fake(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    allow_tf32: bool,
) -> Tensor:
    size = _output_size(input, weight, stride, padding, dilation)
    return new_output(input, (input.shape[0], weight.shape[0], *size))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_mask: list[bool],
    allow_tf32: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    operands = (input, offset, mask, weight)
    return tuple(
        torch.empty_like(t) if needed and t is not None else input.new_empty(0)
        for t, needed in zip(operands, output_mask, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, _, stride, padding, dilation, ctx.allow_tf32 = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.steps = (stride, padding, dilation)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    needed = [bool(n) for n in ctx.needs_input_grad[:4]]
    grads = torch.ops.d2det.modulated_deform_conv2d_backward(
        grad,
        input,
        offset,
        mask,
        weight,
        *ctx.steps,
        needed,
        ctx.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    wanted = [g if n else None for g, n in zip(grads, needed, strict=True)]
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    return (*wanted, grad_bias, None, None, None, None)


define(
    "modulated_deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
    "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, bool allow_tf32) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    autocast=_autocast,
)
define(
    "modulated_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, "
    "Tensor? mask, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "bool[4] output_mask, bool allow_tf32, bool deterministic) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
)
differentiate("modulated_deform_conv2d", _backward, _setup_context)
