"""The compiled CPU kernel of adaptive_weighted_pool against its reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops import _library, adaptive_weighted_pool

pytestmark = pytest.mark.skipif(
    _library.implementation("adaptive_weighted_pool", "cpu") != "compiled",
    reason="no compiled kernel of adaptive_weighted_pool for the CPU here",
)

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def layout(value: Tensor, channels_last: bool) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if channels_last else value


def make(
    shape: tuple[int, ...],
    pooled: tuple[int, int],
    layouts: tuple[bool, bool] = (False, False),
    spread: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_output, features and logits in float64."""
    g = torch.Generator().manual_seed(sum(shape))
    grad, features, logits = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in ((*shape[:2], *pooled), shape, shape)
    )
    return (
        layout(grad, layouts[0]),
        layout(features, layouts[0]),
        layout(logits * spread, layouts[1]),
    )


def run(forward: Any, backward: Any, tensors: Any, settings: Any) -> list[Tensor]:
    """Output and both gradients."""
    with torch.no_grad():
        return [forward(*tensors[1:], *settings), *backward(*tensors, *settings, [True, True])]


def compiled(tensors: Any, settings: Any) -> list[Tensor]:
    ops = torch.ops.d2det
    return run(ops.adaptive_weighted_pool, ops.adaptive_weighted_pool_backward, tensors, settings)


def reference(tensors: Any, settings: Any) -> list[Tensor]:
    names = ("adaptive_weighted_pool", "adaptive_weighted_pool_backward")
    return run(*(_library.references[n] for n in names), tensors, settings)


def pooled_size(height: int, width: int, window: tuple[int, int, int]) -> tuple[int, int]:
    kernel, stride, padding = window
    rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    return rows, columns


def check(tensors: tuple[Tensor, ...], settings: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """`dtypes`: of grad_output, features and logits. Against float64, on the same numbers."""
    tensors = tuple(t.to(d) for t, d in zip(tensors, dtypes, strict=True))
    found = compiled(tensors, settings)
    expected = reference([t.double() for t in tensors], settings)
    for f, e, dtype in zip(found, expected, dtypes, strict=True):
        assert (f.dtype, f.shape) == (dtype, e.shape)
        bound = BOUNDS[dtype]
        if dtype == torch.float64 and torch.float64 != dtypes[1]:
            bound = 1e-5  # sums are in float32, as the features say
        if f.numel():
            error = (f.double() - e).abs().max() / e.abs().max().clamp(min=1.0)
            assert error <= bound, float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("channels", [1, 3, 17, 64, 130])
def test_equals_the_reference(channels, layouts, dtype):
    tensors = make((3, channels, 14, 14), (7, 7), layouts)
    for normalize in (True, False):
        check(tensors, (12.0, 3, 2, 1, normalize), (dtype,) * 3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "window", [(3, 2, 1), (2, 1, 0), (1, 1, 0), (5, 3, 2), (4, 7, 1), (3, 1, 1)]
)
@pytest.mark.parametrize(("height", "width"), [(5, 8), (14, 14), (21, 6)])
def test_windows(height, width, window, normalize):
    for coefficient in (-3.0, 0.0, 12.0):
        for layouts in ((False, False), (True, True)):
            tensors = make((2, 19, height, width), pooled_size(height, width, window), layouts)
            settings = (coefficient, *window, normalize)
            check(tensors, settings, (torch.float32,) * 3)
            check(tensors, settings, (torch.float64,) * 3)


@pytest.mark.parametrize("rois", [0, 1, 65])
def test_numbers_of_rois(rois):
    for shape in ((rois, 5, 4, 4), (rois, 16, 2, 2), (rois, 1, 1, 1)):
        tensors = make(shape, pooled_size(*shape[2:], (3, 2, 1)))
        check(tensors, (12.0, 3, 2, 1, True), (torch.float32,) * 3)


@pytest.mark.parametrize("features", DTYPES)
@pytest.mark.parametrize("logits", DTYPES)
def test_mixed_dtypes(features, logits):
    check(make((2, 18, 6, 6), (3, 3)), (12.0, 3, 2, 1, True), (features, features, logits))


@pytest.mark.parametrize("coefficient", [80.0, -80.0, 12.0])
def test_extreme_logits(coefficient):
    """Weights that span e^80 and sigmoids that are 0 or 1: finite, and as the reference."""
    grad, features, logits = (t.float() for t in make((2, 17, 14, 14), (7, 7)))
    logits = logits * 60
    logits[0, :, 2, 3], logits[0, :, 8, 9] = math.inf, -math.inf
    settings = (coefficient, 3, 2, 1, True)
    tensors = (grad, features, logits)
    found, expected = compiled(tensors, settings), reference(tensors, settings)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sigmoid_and_exponential_are_precise():
    """Windows of one pixel: the weights themselves, over the range of logits, to a few ulp."""
    logits = torch.linspace(-110, 110, 1 << 14).view(1, 16, 32, 32)
    ones = torch.ones_like(logits)
    settings = (12.0, 1, 1, 0, False)
    found = compiled((ones, ones, logits), settings)[0]
    exact = 2 * logits.double().sigmoid()
    normal = exact > 1e-30
    assert ((found - exact).abs() / exact)[normal].max() < 3e-7
    assert (found - exact).abs().max() < 3e-7


def test_nan_stays_in_its_windows():
    for dtype in (torch.float32, torch.float64):
        grad, features, logits = (t.to(dtype) for t in make((2, 3, 8, 8), (4, 4)))
        features[0, 1, 3, 3] = NAN
        logits[1, 2, 4, 4] = NAN
        features[1, 0, 0, 0] = math.inf
        for normalize in (True, False):
            settings = (12.0, 3, 2, 1, normalize)
            found = compiled((grad, features, logits), settings)
            expected = reference((grad, features, logits), settings)
            torch.testing.assert_close(found[0], expected[0], equal_nan=True)
            for a, b in zip(found[1:], expected[1:], strict=True):
                assert torch.equal(a.isnan(), b.isnan())


def test_strides_of_gradients_and_slices():
    grad, features, logits = (t.float() for t in make((3, 6, 14, 14), (7, 7), (True, False)))
    settings = (12.0, 3, 2, 1, True)
    found = compiled((grad, features, logits), settings)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert (found[1].stride(), found[2].stride()) == (features.stride(), logits.stride())
    odd = torch.randn(14, 14, 3, 6).permute(2, 3, 0, 1)  # dense, in no memory format
    sliced = (grad[:, ::2], odd[:, ::2], torch.randn(3, 3, 14, 28)[..., ::2])
    for a, b in zip(compiled(sliced, settings), reference(sliced, settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()
    expected = reference((grad, odd, logits), settings)
    for a, b in zip(compiled((grad, odd, logits), settings), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


def test_runs_agree_to_the_bit():
    tensors = tuple(t.float() for t in make((65, 20, 14, 14), (7, 7)))
    before = torch.get_num_threads()
    first = None
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found = compiled(tensors, (12.0, 3, 2, 1, True))
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_by_differences(channels_last):
    _, features, logits = make((2, 3, 6, 5), (3, 3), (channels_last, not channels_last), 0.5)
    leaves = (features.requires_grad_(), logits.requires_grad_())
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda f, x, n=normalize: adaptive_weighted_pool(f, x, coefficient=3.0, normalize=n),
            leaves,
        )


def test_kernel_refuses_what_does_not_fit():
    x = torch.zeros(2, 3, 6, 6)
    for tensors, settings in (
        ((x, x[:, :2]), (12.0, 3, 2, 1, True)),
        ((x, x), (12.0, 3, 0, 1, True)),
        ((x, x), (12.0, 9, 1, 1, True)),
        ((x, x), (12.0, 3, 1, 2, True)),
        ((x.long(), x), (12.0, 3, 2, 1, True)),
    ):
        with pytest.raises(RuntimeError, match="features|logits|kernel_size"):
            torch.ops.d2det.adaptive_weighted_pool(*tensors, *settings)
