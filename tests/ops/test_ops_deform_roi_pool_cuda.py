"""The CUDA kernels of deform_roi_pool against the reference in float64, emulated and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops.reference import deform_roi_pool as reference

SCALES = [1 / 4, 1 / 8, 1 / 16]
# Against float64: sums in float32, results rounded to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(
    dtype: torch.dtype,
    channels: int = 16,
    channels_last: bool = False,
    images: int = 2,
    rois: int = 9,
    side: int = 3,
    points: int = 2,
    convention: str = "aligned",
    moved: bool = True,
) -> tuple[Any, ...]:
    """Arguments of the operator: RoIs inside, across borders, outside, tiny, inverted."""
    features = [torch.randn(images, channels, h, w) for h, w in ((24, 30), (12, 15), (6, 8))]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [f.to(dtype).contiguous(memory_format=layout) for f in features]
    boxes = torch.tensor(
        [
            [10.2, 12.7, 70.1, 60.3],
            [-20.5, -12.5, 30.5, 40.5],
            [90.0, 70.0, 150.0, 120.0],
            [300.0, 300.0, 340.0, 350.0],
            [33.3, 44.4, 33.9, 44.6],
            [3.0, 50.0, 103.0, 60.0],
            [-500.0, -500.0, 900.0, 900.0],
            [60.0, 50.0, 20.0, 10.0],
            [5.1, 6.2, 110.3, 90.4],
        ]
    ).repeat(1 + rois // 9, 1)[:rois]
    image = torch.arange(rois) % images
    boxes = torch.cat([image[:, None].float(), boxes], 1).to(dtype)
    levels = torch.arange(rois) % 3
    offset = torch.randn(rois, 2, side, side).to(dtype) if moved else None
    modulation = torch.rand(rois, 1, side, side).to(dtype) if moved else None
    return features, boxes, levels, offset, modulation, side, SCALES, points, 0.3, convention


def to(value: Any, change: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [to(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(to(a, lambda t: t.double()) for a in args)


def on(args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    def move(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [v.to(device) for v in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(move(a) for a in args)


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]


def check(cuda_kernels: Any, args: tuple[Any, ...], deterministic: bool = False) -> None:
    ops, device = cuda_kernels
    dtype = args[0][0].dtype
    tolerance = TOLERANCE[dtype]

    def close(found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape
        scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(
            found.double().cpu(),
            expected,
            rtol=tolerance,
            atol=tolerance * max(scale, 1e-3),
            equal_nan=True,
        )

    output = ops.deform_roi_pool(*on(args, device))
    expected = reference.forward(*wide(args))
    assert output.dtype == dtype
    close(output, expected)
    grad = torch.randn_like(expected).to(dtype)
    if output.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous(memory_format=torch.channels_last)
    mask = [True, args[3] is not None, args[4] is not None]
    found = ops.deform_roi_pool_backward(grad.to(device), *on(args, device), mask, deterministic)
    wanted = reference.backward(grad.double(), *wide(args), mask, deterministic)
    given = [*args[0], args[3], args[4]]
    for f, w, like in zip(flat(found), flat(wanted), given, strict=True):
        close(f, w)
        if like is not None:
            assert f.dtype == like.dtype and f.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("convention", ["aligned", "psroi"])
def test_equals_reference(cuda_kernels, dtype, channels_last, convention):
    check(cuda_kernels, make(dtype, channels_last=channels_last, convention=convention))


@pytest.mark.parametrize("channels", [1, 3, 8, 24, 40, 264])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_of_channels(cuda_kernels, channels, channels_last, dtype):
    check(cuda_kernels, make(dtype, channels=channels, channels_last=channels_last, rois=4))


@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("moved", [False, True])
def test_grids(cuda_kernels, side, points, moved):
    check(cuda_kernels, make(torch.float32, 4, side=side, points=points, moved=moved))


def test_many_points(cuda_kernels):
    """So many that a block cannot hold the taps of many bins."""
    check(cuda_kernels, make(torch.float32, 4, side=4, points=64, rois=2))


def test_few_rois_on_large_maps(cuda_kernels):
    """Where the maps are not copied; with one more condition: they are contiguous."""
    args = make(torch.float32, rois=1, side=2, points=1)
    check(cuda_kernels, args)
    check(cuda_kernels, (list(reversed(args[0])), args[1], args[2], *args[3:]))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels_last", [False, True])
def test_deterministic(cuda_kernels, dtype, channels_last):
    check(cuda_kernels, make(dtype, 8, channels_last), deterministic=True)


def test_every_order_of_threads(emulated, order):
    check((emulated, torch.device("cpu")), make(torch.float16, 24, rois=3))
    check((emulated, torch.device("cpu")), make(torch.float32, 4, True, rois=3), True)


def test_deterministic_does_not_depend_on_the_order(emulated, monkeypatch):
    args = make(torch.float32, 8)
    grad = torch.randn(9, 8, 3, 3)
    results = []
    for name in ("forward", "reversed"):
        monkeypatch.setenv("D2DET_EMULATOR_ORDER", name)
        results.append(emulated.deform_roi_pool_backward(grad, *args, [True, True, True], True))
    for a, b in zip(*map(flat, results), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["offset", "modulation", "rois", "features", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_numbers_that_are_not_finite(cuda_kernels, where, value, deterministic):
    """They show wherever they do in the reference, and nowhere else."""
    ops, device = cuda_kernels
    args = make(torch.float32, 4, rois=4)
    features, rois, _, offset, modulation, *_ = args
    grad = torch.randn(4, 4, 3, 3)
    spoilt = {"offset": offset, "modulation": modulation, "features": features[0], "grad": grad}
    if where == "rois":
        rois[1, 2] = value
    else:
        spoilt[where].view(-1)[5] = value
    found = [ops.deform_roi_pool(*on(args, device))]
    expected = [reference.forward(*args)]
    call = ([True, True, True], deterministic)
    found += flat(ops.deform_roi_pool_backward(grad.to(device), *on(args, device), *call))
    expected += flat(reference.backward(grad, *args, *call))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu().isfinite(), b.isfinite())
        torch.testing.assert_close(a.cpu()[b.isfinite()], b[b.isfinite()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_rois_that_refer_to_nothing_become_nan(cuda_kernels, channels_last):
    ops, device = cuda_kernels
    args = make(torch.float32, 8, channels_last, rois=6)
    _, rois, levels, *_ = args
    rois[0, 0], rois[1, 0], rois[4, 0] = 2, -1, float("nan")
    levels[2], levels[3] = 3, -1
    output = ops.deform_roi_pool(*on(args, device)).cpu()
    assert output[:5].isnan().all() and output[5].isfinite().all()
    _, offset, modulation = ops.deform_roi_pool_backward(
        torch.ones_like(output).to(device), *on(args, device), [True, True, True], False
    )
    for grad in (offset.cpu(), modulation.cpu()):
        assert grad[:5].isnan().all() and grad[5].isfinite().all()


def test_without_images_or_rois(cuda_kernels):
    ops, device = cuda_kernels
    features, rois, levels, offset, modulation, *settings = make(torch.float32, rois=2)
    args = ([f[:0] for f in features], rois, levels, offset, modulation, *settings)
    assert ops.deform_roi_pool(*on(args, device)).isnan().all()
    grads = ops.deform_roi_pool_backward(
        torch.ones(2, 16, 3, 3, device=device), *on(args, device), [True] * 3, True
    )
    assert [g.shape[0] for g in grads[0]] == [0, 0, 0] and grads[1].isnan().all()
    args = (features, rois[:0], levels[:0], offset[:0], modulation[:0], *settings)
    assert ops.deform_roi_pool(*on(args, device)).shape == (0, 16, 3, 3)
    for deterministic in (False, True):
        grads = ops.deform_roi_pool_backward(
            torch.ones(0, 16, 3, 3, device=device), *on(args, device), [True] * 3, deterministic
        )
        assert all(not g.any() for g in grads[0])


def test_mixed_precision_and_strides(cuda_kernels):
    """Half-precision maps beside float32 RoIs and offsets, nothing contiguous."""
    ops, device = cuda_kernels
    features, rois, levels, offset, modulation, *settings = make(torch.float32, rois=5)
    features = [f.half().transpose(2, 3).contiguous().transpose(2, 3) for f in features]
    offset = offset.transpose(2, 3).contiguous().transpose(2, 3)
    rois = torch.stack([rois, rois], -1)[..., 0]
    args = (features, rois, levels, offset, modulation.double(), *settings)
    grad = torch.randn(5, 16, 3, 3).half()
    call = ([True, True, True], False)
    found = ops.deform_roi_pool_backward(grad.to(device), *on(args, device), *call)
    expected = reference.backward(grad.double(), *wide(args), *call)
    for f, e, like in zip(flat(found), flat(expected), [*features, offset, args[4]], strict=True):
        assert f.dtype == like.dtype and f.stride() == torch.empty_like(like).stride()
        torch.testing.assert_close(f.double().cpu(), e, rtol=4e-3, atol=4e-3)


def test_only_what_is_asked_for(cuda_kernels):
    ops, device = cuda_kernels
    args = make(torch.float32, rois=3)
    grad = torch.randn(3, 16, 3, 3)
    full = flat(ops.deform_roi_pool_backward(grad.to(device), *on(args, device), [True] * 3, True))
    for asked in range(3):
        mask = [i == asked for i in range(3)]
        found = ops.deform_roi_pool_backward(grad.to(device), *on(args, device), mask, True)
        for i, part in enumerate(found):
            parts = flat([part])
            if i == asked:
                expected = full[:3] if i == 0 else [full[2 + i]]
                assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
            else:
                assert sum(p.numel() for p in parts) == 0


def test_wrong_arguments_are_errors(cuda_kernels):
    ops, device = cuda_kernels
    features, rois, levels, offset, modulation, *settings = on(make(torch.float32), device)
    with pytest.raises(RuntimeError, match="offset must have shape"):
        ops.deform_roi_pool(features, rois, levels, offset[:, :1], modulation, *settings)
    with pytest.raises(RuntimeError, match="levels must be int64"):
        ops.deform_roi_pool(features, rois, levels.float(), offset, modulation, *settings)
    mixed = [features[0], features[1].double(), features[2]]
    with pytest.raises(RuntimeError, match="one dtype"):
        ops.deform_roi_pool(mixed, rois, levels, offset, modulation, *settings)
