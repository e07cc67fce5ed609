"""CUDA kernels of adaptive_weighted_pool against the reference, emulated and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops.reference import adaptive_weighted_pool as reference

# Against float64: weights in float32, results rounded to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
USUAL = (12.0, 3, 2, 1)


def maps(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def check(
    cuda_kernels: Any,
    features: Tensor,
    logits: Tensor,
    settings: tuple[float, int, int, int] = USUAL,
    normalize: bool = True,
) -> None:
    ops, device = cuda_kernels
    tolerance = max(TOLERANCE[features.dtype], TOLERANCE[logits.dtype])

    def close(found: Tensor, expected: Tensor, rtol: float) -> None:
        scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(
            found.double().cpu(), expected, rtol=rtol, atol=rtol * scale, equal_nan=True
        )

    args = (*settings, normalize)
    output = ops.adaptive_weighted_pool(features.to(device), logits.to(device), *args)
    expected = reference.forward(features.double(), logits.double(), *args)
    assert output.dtype == features.dtype
    assert output.stride() == reference.forward(features, logits, *args).stride()
    close(output, expected, tolerance)
    grad = torch.randn_like(expected).to(features.dtype)
    mask = [True, True]
    found = ops.adaptive_weighted_pool_backward(
        grad.to(device), features.to(device), logits.to(device), *args, mask
    )
    wanted = reference.backward(grad.double(), features.double(), logits.double(), *args, mask)
    for f, w, like in zip(found, wanted, (features, logits), strict=True):
        close(f, w, 3 * tolerance)
        assert f.dtype == like.dtype and f.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_reference(cuda_kernels, dtype, channels_last, normalize):
    shape = (3, 24, 14, 14)
    features, logits = (maps(shape, dtype, channels_last) for _ in range(2))
    check(cuda_kernels, features, logits, USUAL, normalize)


@pytest.mark.parametrize(
    "settings", [(12.0, 2, 1, 0), (-5.0, 4, 3, 2), (0.0, 1, 1, 0), (3, 5, 7, 1)]
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_any_window(cuda_kernels, settings, channels_last, normalize):
    features, logits = (maps((2, 9, 11, 6), torch.float32, channels_last) for _ in range(2))
    check(cuda_kernels, features, logits, settings, normalize)


@pytest.mark.parametrize("channels", [1, 2, 7, 36])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_shape(cuda_kernels, channels, size, channels_last):
    shape = (3, channels, *size)
    features, logits = (maps(shape, torch.float32, channels_last) for _ in range(2))
    check(cuda_kernels, features, logits)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_planes_larger_than_shared_memory(cuda_kernels, channels_last, dtype):
    features, logits = (maps((1, 2, 70, 80), dtype, channels_last) for _ in range(2))
    check(cuda_kernels, features, logits)
    check(cuda_kernels, features, logits, (1.0, 4, 3, 1), False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.float16])
def test_logits_of_another_dtype_and_format(cuda_kernels, dtype, other):
    features, logits = maps((2, 8, 6, 6), dtype, True), maps((2, 8, 6, 6), other, False)
    check(cuda_kernels, features, logits)
    check(cuda_kernels, features.transpose(2, 3), logits[..., [0, 1, 2, 3, 4, 5]])


def test_every_order_of_threads(emulated, order):
    for channels_last in (False, True):
        features, logits = (maps((2, 9, 8, 8), torch.float32, channels_last) for _ in range(2))
        check((emulated, torch.device("cpu")), features, logits)


def test_extreme_logits_and_coefficients(cuda_kernels):
    features = maps((2, 4, 6, 6), torch.float32, False)
    logits = torch.linspace(-200, 200, features.numel()).view_as(features)
    for coefficient in (80.0, -80.0):
        ops, device = cuda_kernels
        args = (coefficient, 3, 2, 1, True)
        found = ops.adaptive_weighted_pool(features.to(device), logits.to(device), *args)
        expected = reference.forward(features.double(), logits.double(), *args)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=1e-3)


def test_not_a_number_shows_where_it_does_in_the_reference(cuda_kernels):
    ops, device = cuda_kernels
    features, logits = (maps((2, 4, 6, 6), torch.float32, False) for _ in range(2))
    features[0, 1, 2, 3], logits[1, 2, 4, 5] = float("nan"), float("nan")
    args = (*USUAL, True)
    found = ops.adaptive_weighted_pool(features.to(device), logits.to(device), *args).cpu()
    expected = reference.forward(features, logits, *args)
    assert torch.equal(found.isnan(), expected.isnan())


def test_empty_and_partial(cuda_kernels):
    ops, device = cuda_kernels
    features, logits = (maps((2, 4, 6, 6), torch.float32, False).to(device) for _ in range(2))
    args = (*USUAL, True)
    assert ops.adaptive_weighted_pool(features[:0], logits[:0], *args).shape == (0, 4, 3, 3)
    grad = torch.randn(2, 4, 3, 3).to(device)
    call = ops.adaptive_weighted_pool_backward
    assert call(grad[:0], features[:0], logits[:0], *args, [True, True])[0].shape == (0, 4, 6, 6)
    both = call(grad, features, logits, *args, [True, True])
    one, none = call(grad, features, logits, *args, [True, False])
    assert torch.equal(one, both[0]) and none.numel() == 0
    none, one = call(grad, features, logits, *args, [False, True])
    assert torch.equal(one, both[1]) and none.numel() == 0
    with pytest.raises(RuntimeError, match="smaller than a window"):
        ops.adaptive_weighted_pool(features[..., :1], logits[..., :1], 12.0, 4, 2, 1, True)
    with pytest.raises(RuntimeError, match="logits must have shape"):
        ops.adaptive_weighted_pool(features, logits[..., :1], *args)
