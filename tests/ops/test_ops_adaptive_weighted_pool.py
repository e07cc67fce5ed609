"""adaptive_weighted_pool against a loop over windows in float64, and against average pooling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2det.ops import adaptive_weighted_pool
from d2det.ops.reference import adaptive_weighted_pool as reference


def slow_pool(
    features: Tensor,
    logits: Tensor,
    coefficient: float,
    kernel: int,
    stride: int,
    padding: int,
    normalize: bool,
) -> Tensor:
    """One window after the other, from the definition."""
    r, c, height, width = features.shape
    size = [(n + 2 * padding - kernel) // stride + 1 for n in (height, width)]
    out = torch.zeros(r, c, *size, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        n, channel, i, j = index
        total, weights = 0.0, 0.0
        for y in range(i * stride - padding, i * stride - padding + kernel):
            for x in range(j * stride - padding, j * stride - padding + kernel):
                if 0 <= y < height and 0 <= x < width:
                    sigmoid = 1 / (1 + math.exp(-logits[n, channel, y, x].item()))
                    w = math.exp(coefficient * sigmoid) if normalize else 2 * sigmoid
                    total += w * features[n, channel, y, x].item()
                    weights += w
        out[n, channel, i, j] = total / (weights if normalize else kernel * kernel)
    return out


def make(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "window", "coefficient"),
    [
        (6, 6, (3, 2, 1), 12.0),
        (5, 8, (3, 2, 1), 3.0),
        (5, 8, (2, 1, 0), -2.0),
        (7, 4, (4, 3, 2), 0.0),
        (1, 1, (3, 2, 1), 12.0),
    ],
)
def test_equals_a_loop_over_windows(height, width, window, coefficient, normalize, device):
    features, logits = make(2, 3, height, width)
    expected = slow_pool(features, logits, coefficient, *window, normalize)
    found = adaptive_weighted_pool(
        features.to(device),
        logits.to(device),
        coefficient=coefficient,
        kernel_size=window[0],
        stride=window[1],
        padding=window[2],
        normalize=normalize,
    )
    torch.testing.assert_close(found.cpu(), expected)


def test_equal_logits_are_average_pooling(device):
    """Normalised: a mean without the padding. Unnormalised, at logit 0: a mean with it."""
    features = torch.randn(4, 5, 14, 14, device=device)
    logits = torch.full_like(features, 0.7)
    for normalize, value in ((True, logits), (False, torch.zeros_like(features))):
        found = adaptive_weighted_pool(features, value, normalize=normalize)
        expected = F.avg_pool2d(features, 3, 2, 1, count_include_pad=not normalize)
        assert found.shape == (4, 5, 7, 7)
        torch.testing.assert_close(found, expected)


def test_extreme_logits_pick_one_element():
    """With a coefficient of 80 the weights span e^80; the result is the element of logit +inf."""
    features = torch.randn(1, 1, 3, 3)
    logits = torch.full_like(features, -1e4)
    logits[0, 0, 1, 2] = 1e4
    found = adaptive_weighted_pool(features, logits, coefficient=80.0, stride=1, padding=0)
    torch.testing.assert_close(found.view(()), features[0, 0, 1, 2])
    negative = adaptive_weighted_pool(features, -logits, coefficient=-80.0, stride=1, padding=0)
    torch.testing.assert_close(negative, found)


def test_chunks_of_rois_give_the_same(monkeypatch):
    features, logits = (t.requires_grad_() for t in make(5, 3, 6, 6))
    outputs = []
    for limit in (1 << 18, 2 * 3 * 36):
        monkeypatch.setattr(reference, "_CHUNK", limit)
        y = adaptive_weighted_pool(features, logits)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), [features, logits])])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_and_autocast(dtype, device):
    """Float32 logits beside half features: each gradient has its own dtype, nothing is cast."""
    features, logits = (t.to(device) for t in make(3, 2, 6, 6, dtype=torch.float32))
    features = features.to(dtype).requires_grad_()
    logits.requires_grad_()
    y = adaptive_weighted_pool(features, logits)
    exact = adaptive_weighted_pool(features.double(), logits.double())
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0)
    grads = torch.autograd.grad(y.float().sum(), [features, logits])
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(adaptive_weighted_pool(features, logits), y)
        full = adaptive_weighted_pool(features.float(), logits)
    assert full.dtype == torch.float32


def test_no_rois(device):
    features = torch.zeros(0, 3, 14, 14, device=device, requires_grad=True)
    y = adaptive_weighted_pool(features, features.detach())
    assert y.shape == (0, 3, 7, 7)
    y.sum().backward()
    assert features.grad.shape == (0, 3, 14, 14)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(3, 6, 6)}, ValueError, r"features must have 4 .*\(3, 6, 6\)"),
    ({"features": torch.zeros(2, 3, 6, 6).long()}, TypeError, "features must be floating point"),
    ({"logits": torch.zeros(2, 1, 6, 6)}, ValueError, r"\(2, 3, 6, 6\).*got \(2, 1, 6, 6\)"),
    ({"logits": torch.zeros(2, 3, 6, 6, device="meta")}, ValueError, "logits is on meta"),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
    ({"padding": 2}, ValueError, "padding must be at most kernel_size / 2, got 2, 3"),
    ({"kernel_size": 9, "padding": 1}, ValueError, r"\(2, 3, 6, 6\) .*window of 9"),
    ({"stride": 2.0}, TypeError, "stride must be an int, got float"),
    ({"coefficient": 81}, ValueError, "coefficient must be within .*80.0, got 81"),
    ({"coefficient": float("nan")}, ValueError, "coefficient must be within"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, error, message):
    arguments = {"features": torch.zeros(2, 3, 6, 6), "logits": torch.zeros(2, 3, 6, 6)}
    adaptive_weighted_pool(**arguments)
    with pytest.raises(error, match=message):
        adaptive_weighted_pool(**{**arguments, **change})
