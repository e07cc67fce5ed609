"""Adaptive weighted pooling in PyTorch, in chunks of RoIs that stay in cache on CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather import accumulation_dtype, new_output

# Elements of one chunk on CPU: some ten passes are made over it. A GPU takes all at once.
_CHUNK = 1 << 18


def forward(
    features: Tensor,
    logits: Tensor,
    coefficient: float,
    kernel_size: int,
    stride: int,
    padding: int,
    normalize: bool,
) -> Tensor:
    """See `d2det.ops.adaptive_weighted_pool`."""
    r, c, h, w = features.shape
    height, width = (_pooled_size(n, kernel_size, stride, padding) for n in (h, w))
    output = new_output(features, (r, c, height, width))
    window = (kernel_size, stride, padding)
    for part in _chunks(features):
        values, weight, _ = _operands(features[part], logits[part], coefficient, normalize)
        total = _window_sum(values.mul(weight), window)
        if normalize:
            total /= _window_sum(weight, window)
        else:
            total /= kernel_size * kernel_size
        output[part] = total
    return output


def backward(
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
    """Gradients of features and logits; those not asked for are empty.

    With S the sum of weights of a window, y its result and g its gradient, a pixel's share of the
    windows that cover it is A = sum g / S and B = sum g y / S; then df = w A and dw = f A - B.
    The weights are computed again here rather than kept.
    """
    need_features, need_logits = output_mask
    grad_features = torch.empty_like(features) if need_features else features.new_empty(0)
    grad_logits = torch.empty_like(logits) if need_logits else logits.new_empty(0)
    window = (kernel_size, stride, padding)
    for part in _chunks(features):
        values, weight, sigmoid = _operands(features[part], logits[part], coefficient, normalize)
        grad = grad_output[part].to(values.dtype)
        if normalize:
            total = _window_sum(weight, window)
            share = grad / total
            result = _window_sum(values * weight, window) / total
            owed = _spread(share, values, window)
            slope = sigmoid.mul(1 - sigmoid).mul_(weight).mul_(coefficient)
            if need_logits:
                moved = values.mul(owed).sub_(_spread(share * result, values, window))
                grad_logits[part] = moved.mul_(slope)
        else:
            owed = _spread(grad / (kernel_size * kernel_size), values, window)
            if need_logits:
                slope = sigmoid.mul(1 - sigmoid).mul_(2.0)
                grad_logits[part] = values.mul(owed).mul_(slope)
        if need_features:
            grad_features[part] = owed.mul_(weight)
    return grad_features, grad_logits


def _pooled_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


def _chunks(features: Tensor) -> Iterator[slice]:
    rois = features.shape[0]
    step = rois
    if features.device.type == "cpu":
        step = _CHUNK // max(1, features[:1].numel())
    step = max(1, step)
    return (slice(start, start + step) for start in range(0, rois, step))


def _operands(
    features: Tensor, logits: Tensor, coefficient: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights and sigmoid(logits), in float32 at least and in one memory layout."""
    dtype = accumulation_dtype(features)
    values = features.to(dtype)
    sigmoid = torch.empty_like(values).copy_(logits).sigmoid_()
    if normalize:
        # exp(c s) is scaled by its largest value: ratios stay the same and nothing overflows.
        weight = sigmoid.sub(1.0 if coefficient > 0 else 0.0).mul_(coefficient).exp_()
    else:
        weight = sigmoid.mul(2.0)
    return values, weight, sigmoid


def _window_sum(values: Tensor, window: tuple[int, int, int]) -> Tensor:
    kernel_size, stride, padding = window
    return F.avg_pool2d(values, kernel_size, stride, padding, divisor_override=1)


def _spread(grad: Tensor, values: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Transpose of `_window_sum`: each pixel's sum over the windows that cover it."""
    kernel_size, stride, padding = window
    return torch.ops.aten.avg_pool2d_backward(
        grad, values, [kernel_size] * 2, [stride] * 2, [padding] * 2, False, True, 1
    )
