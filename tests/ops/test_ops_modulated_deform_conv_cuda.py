"""CUDA kernels of modulated_deform_conv2d against the reference, emulated and on a GPU.

Errors are measured against the largest value of the result: columns are rounded to half precision
or TF32 on their way to the tensor cores, so that a small difference of large sums has a large
relative error, as in any convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops.reference import modulated_deform_conv as reference

TF32 = "tf32"
# Largest error over largest value, forward; three times that is allowed for gradients.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    TF32: 1e-3,
    torch.float16: 1e-3,
    torch.bfloat16: 6e-3,
}
GRADIENTS = ("input", "offset", "mask", "weight")


@dataclass(frozen=True)
class Case:
    """A problem; `kernel` to `dilation` are the same in both directions."""

    channels: int
    outputs: int
    size: tuple[int, int] = (6, 7)
    batch: int = 2
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    bias: bool = True
    channels_last: bool = False
    reach: float = 1.5

    def tensors(self, dtype: torch.dtype, offset_dtype: torch.dtype | None = None) -> list[Any]:
        """input, offset, mask, weight, bias, stride, padding, dilation."""
        taps = self.kernel**2
        x = torch.randn(self.batch, self.channels, *self.size)
        weight = torch.randn(self.outputs, self.channels // self.groups, self.kernel, self.kernel)
        weight /= (weight[0].numel()) ** 0.5
        extent = self.dilation * (self.kernel - 1) + 1
        ho, wo = ((s + 2 * self.padding - extent) // self.stride + 1 for s in self.size)
        offset = torch.randn(self.batch, 2 * self.offset_groups * taps, ho, wo) * self.reach
        mask = torch.rand(self.batch, self.offset_groups * taps, ho, wo)
        bias = torch.randn(self.outputs)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        of_offset = offset_dtype or dtype
        return [
            x.to(dtype),
            offset.to(of_offset),
            mask.to(of_offset) if self.modulated else None,
            weight.to(dtype),
            bias.to(dtype) if self.bias else None,
            [self.stride] * 2,
            [self.padding] * 2,
            [self.dilation] * 2,
        ]


def to(values: Any, target: Any) -> list[Any]:
    return [v.to(target) if isinstance(v, Tensor) else v for v in values]


def check(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert found.shape == expected.shape, name
    if expected.numel() == 0:
        return
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
    assert error <= tolerance, f"{name}: {error:.1e}"


def check_case(
    cuda_kernels: Any,
    case: Case,
    kind: Any,
    offset_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    forward: bool = True,
) -> None:
    ops, device = cuda_kernels
    dtype = torch.float32 if kind == TF32 else kind
    x, offset, mask, weight, bias, *steps = case.tensors(dtype, offset_dtype)
    wide = to([x, offset, mask, weight, bias], torch.float64)
    expected = reference.forward(*wide, *steps, False)
    grad = torch.randn_like(expected).to(dtype)
    if forward:
        args = to([x, offset, mask, weight, bias], device)
        output = ops.modulated_deform_conv2d(*args, *steps, kind == TF32)
        assert output.dtype == dtype
        like = torch.channels_last if case.channels_last else torch.contiguous_format
        assert output.is_contiguous(memory_format=like)
        check(output, expected, TOLERANCE[kind], "output")
    asked = [True, True, case.modulated, True]
    wanted = reference.backward(grad.double(), *wide[:4], *steps, asked, False, deterministic)
    given = to([grad, x, offset, mask, weight], device)
    grads = ops.modulated_deform_conv2d_backward(*given, *steps, asked, kind == TF32, deterministic)
    # Fixed point has some 40 bits for the largest sum.
    tolerance = max(3 * TOLERANCE[kind], 1e-9 if deterministic else 0)
    for name, g, w, like in zip(GRADIENTS, grads, wanted, given[1:], strict=True):
        check(g, w, tolerance, name)
        if g.numel():
            assert g.dtype == like.dtype
            assert g.stride() == torch.empty_like(like).stride()


PLAIN = Case(24, 40)
CASES = {
    # Several chunks of channels, the last one not full; channels_last.
    "chunks": Case(136, 72, (5, 6), 1, channels_last=True),
    "groups-merged": Case(32, 32, (4, 5), groups=4, bias=False, modulated=False),
    "offset-groups": Case(48, 70, (7, 6), 1, 2, stride=2, offset_groups=3),
    # No whole units of 16 bytes, and borders of groups and offset groups that do not meet.
    "odd": Case(6, 5, batch=3, offset_groups=3),
    "irregular": Case(12, 6, groups=2, offset_groups=3, padding=2, dilation=2),
    "strided": Case(16, 16, (11, 13), 1, 3, 3, padding=2, dilation=2),
    "many-taps": Case(8, 8, (6, 6), 1, 5, padding=2),
    # Most corners lie outside of the window that the input's gradient is sorted in, or of the map.
    "far": Case(16, 16, (40, 3), 1, reach=12.0),
}
KINDS = [torch.float16, torch.bfloat16, TF32, torch.float32, torch.float64]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_reference(cuda_kernels, kind):
    check_case(cuda_kernels, PLAIN, kind)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_shapes(cuda_kernels, name, kind):
    check_case(cuda_kernels, CASES[name], kind)


@pytest.mark.parametrize("name", ["offset-groups", "irregular"])
def test_shapes_in_tf32(cuda_kernels, name):
    check_case(cuda_kernels, CASES[name], TF32)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_float32_offsets(cuda_kernels, kind):
    check_case(cuda_kernels, PLAIN, kind, torch.float32)


@pytest.mark.parametrize("kind", [torch.bfloat16, TF32, torch.float64], ids=str)
def test_deterministic(cuda_kernels, kind):
    check_case(cuda_kernels, PLAIN, kind, deterministic=True, forward=False)


@pytest.mark.parametrize("kind", [torch.bfloat16, TF32, torch.float32], ids=str)
def test_any_order_of_threads(emulated, order, kind):
    """The barriers are where they must be."""
    check_case((emulated, torch.device("cpu")), Case(72, 24, (4, 5), 1), kind)


@pytest.mark.parametrize("tile", range(4))
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_tile(emulated, monkeypatch, tile, channels_last):
    """The choice depends on the GPU and on the size, which is larger than can be emulated."""
    monkeypatch.setenv("D2DET_EMULATOR_TILE", str(tile))
    case = Case(72, 137, (9, 8), channels_last=channels_last)
    x, offset, mask, weight, bias, *steps = case.tensors(torch.bfloat16)
    output = emulated.modulated_deform_conv2d(x, offset, mask, weight, bias, *steps, True)
    wide = to([x, offset, mask, weight, bias], torch.float64)
    expected = reference.forward(*wide, *steps, False)
    check(output, expected, TOLERANCE[torch.bfloat16], "output")


def test_deterministic_whatever_the_order(emulated, monkeypatch):
    """Also forward and the weights' gradient, which are the same from run to run in any mode."""
    x, offset, mask, weight, bias, *steps = Case(16, 16, (9, 9), 1).tensors(torch.float32)
    results = []
    for order in ("forward", "reversed", "shuffled"):
        monkeypatch.setenv("D2DET_EMULATOR_ORDER", order)
        y = emulated.modulated_deform_conv2d(x, offset, mask, weight, bias, *steps, True)
        grads = emulated.modulated_deform_conv2d_backward(
            y, x, offset, mask, weight, *steps, [True] * 4, True, True
        )
        results.append([y, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_repeat(kind, deterministic):
    """On a GPU nothing but the input's gradient may depend on the run, and that one neither if so
    asked."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dtype = torch.float32 if kind == TF32 else kind
    case = Case(128, 128, (40, 50))
    x, offset, mask, weight, bias, *steps = case.tensors(dtype)
    args = to([x, offset, mask, weight, bias], "cuda")
    ops = torch.ops.d2det
    runs = []
    for _ in range(3):
        y = ops.modulated_deform_conv2d(*args, *steps, kind == TF32)
        grads = ops.modulated_deform_conv2d_backward(
            y, *args[:4], *steps, [True] * 4, kind == TF32, deterministic
        )
        runs.append([y, *(grads if deterministic else grads[1:])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


LARGE = {
    "C128": Case(128, 128, (50, 84)),
    "C256": Case(256, 256, (50, 84), channels_last=True),
    "C512": Case(512, 512, (25, 42)),
    "many-images": Case(64, 64, (25, 42), 65),
    "resnext": Case(256, 256, (25, 42), groups=32),
    "strided": Case(256, 512, (51, 83), stride=2, offset_groups=4),
    "odd": Case(99, 51, (40, 31), groups=3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", list(LARGE))
@pytest.mark.parametrize("deterministic", [False, True])
def test_large_on_gpu(kind, name, deterministic):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernels = (torch.ops.d2det, torch.device("cuda"))
    check_case(kernels, LARGE[name], kind, deterministic=deterministic)


def test_only_what_is_asked_for(cuda_kernels):
    ops, device = cuda_kernels
    x, offset, mask, weight, _, *steps = PLAIN.tensors(torch.float32)
    grad = torch.randn(2, PLAIN.outputs, *PLAIN.size)
    args = to([grad, x, offset, mask, weight], device)

    def run(asked: list[bool], deterministic: bool) -> Any:
        return ops.modulated_deform_conv2d_backward(*args, *steps, asked, False, deterministic)

    everything = run([True] * 4, True)
    for i in range(4):
        only = run([i == j for j in range(4)], True)
        assert [g.numel() > 0 for g in only] == [i == j for j in range(4)]
        assert torch.equal(only[i], everything[i])
    torch.testing.assert_close(run([True, False, False, False], False)[0], everything[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_any_strides(cuda_kernels, kind):
    """Gradients have their tensors' strides, whatever these are."""
    ops, device = cuda_kernels
    x, offset, mask, weight, bias, *steps = PLAIN.tensors(kind)
    grad = torch.randn(2, PLAIN.outputs, *PLAIN.size, dtype=kind)
    plain = to([x, offset, mask, weight], device)
    moved = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in plain]
    results = []
    for given in (plain, moved):
        output = ops.modulated_deform_conv2d(*given, bias.to(device), *steps, False)
        grads = ops.modulated_deform_conv2d_backward(
            grad.to(device), *given, *steps, [True] * 4, False, True
        )
        results.append([output, *grads])
        assert all(g.stride() == t.stride() for g, t in zip(grads, given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_is_seen_where_it_belongs(cuda_kernels, deterministic):
    ops, device = cuda_kernels
    x, offset, mask, weight, bias, *steps = PLAIN.tensors(torch.float32)
    grad = torch.randn(2, PLAIN.outputs, *PLAIN.size)
    grad[1, 3, 2, 4] = float("nan")
    offset[0, 4, 3, 3] = float("nan")
    args = [x, offset, mask, weight]
    y = ops.modulated_deform_conv2d(*to([*args, bias], device), *steps, True)
    bad = y.isnan().any(1)
    assert bad[0, 3, 3] and bad.sum() == 1
    found = ops.modulated_deform_conv2d_backward(
        *to([grad, *args], device), *steps, [True] * 4, False, deterministic
    )
    wanted = reference.backward(grad, *args, *steps, [True] * 4, False, False)
    # The reference adds NaN to pixels that have the weight 0 as well; nothing else may be NaN.
    assert not (found[0].isnan().cpu() & ~wanted[0].isnan()).any()
    assert found[0][1].isnan().any() and found[0][0].isnan().any()
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(f.isnan().cpu(), w.isnan())


def test_empty_batch(cuda_kernels):
    ops, device = cuda_kernels
    x, offset, mask, weight, bias, *steps = PLAIN.tensors(torch.float32)
    args = to([x[:0], offset[:0], mask[:0], weight], device)
    y = ops.modulated_deform_conv2d(*args, bias.to(device), *steps, True)
    assert y.shape == (0, PLAIN.outputs, *PLAIN.size)
    grads = ops.modulated_deform_conv2d_backward(y, *args, *steps, [True] * 4, True, False)
    assert [g.shape for g in grads] == [a.shape for a in args]
    assert not grads[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 17, 6, 7)}, "offset of shape"),
        ({1: torch.zeros(2, 18, 5, 7)}, "offset must have shape"),
        ({2: torch.zeros(2, 8, 6, 7)}, "mask must have shape"),
        ({3: torch.zeros(40, 23, 3, 3)}, "weight of shape"),
        ({3: torch.zeros(40, 24, 3, 3).half()}, "weight must have the dtype"),
        ({4: torch.zeros(39)}, "bias must have shape"),
        ({5: [0, 1]}, "must be positive"),
    ],
)
def test_errors(cuda_kernels, change, message):
    ops, device = cuda_kernels
    args = [change.get(i, v) for i, v in enumerate(PLAIN.tensors(torch.float32))]
    with pytest.raises(RuntimeError, match=message):
        ops.modulated_deform_conv2d(*to(args, device), True)
