"""The compiled CPU kernels of modulated_deform_conv2d, in the shapes that take them different ways.

Oracles in float64: torchvision, and the reference in PyTorch. Run as a script, the file checks one
instruction set: `D2DET_CPU_CAPABILITY` is read once in a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from d2det.ops import _library, modulated_deform_conv2d
from d2det.ops.reference import modulated_deform_conv as reference

CAPABILITIES = ["portable", "avx2", "avx512", "avx512_bf16"]

pytestmark = pytest.mark.skipif(
    _library.implementation("modulated_deform_conv2d", "cpu") != "compiled",
    reason="no compiled kernel here",
)


class Case(NamedTuple):
    channels: int
    out: int
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    offset_groups: int = 1
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    batch: int = 2
    size: tuple[int, int] = (7, 9)
    modulated: bool = True


CASES = {
    "one": Case(1, 1, (1, 1), padding=0, batch=3),
    "rgb": Case(3, 17, (3, 3), stride=2),
    "odd": Case(17, 33, (2, 2), dilation=2),
    "panels": Case(33, 130, (5, 3), stride=(2, 1), padding=(2, 1)),
    "wide": Case(130, 64, (3, 3), dilation=(1, 2), padding=2, modulated=False),
    "resnext": Case(128, 128, groups=32, batch=1),
    "resnext-few-out": Case(64, 32, groups=32, offset_groups=4),
    "groups-of-odd-size": Case(66, 39, groups=3, offset_groups=2),
    "offset-groups-cut-groups": Case(96, 48, groups=2, offset_groups=4),
    "a-channel-each": Case(8, 16, groups=8, offset_groups=8, batch=1),
    "many-small-images": Case(5, 3, (1, 1), padding=0, batch=65, size=(2, 3)),
    "many-taps": Case(2, 3, (9, 7), padding=(4, 3), batch=1),
    "one-pixel": Case(40, 40, (3, 3), padding=0, batch=1, size=(3, 3)),
}


def make(case: Case, dtype: torch.dtype = torch.float64, offsets: str = "random") -> list[Tensor]:
    """[input, offset, mask or nothing, weight, bias], the same values for every dtype."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(case.batch, case.channels, *case.size)
    weight = normal(case.out, case.channels // case.groups, *case.kernel)
    ho, wo = torch.nn.functional.conv2d(
        torch.zeros(1, 1, *case.size), torch.zeros(1, 1, *case.kernel), None, *steps(case)
    ).shape[2:]
    taps = case.offset_groups * case.kernel[0] * case.kernel[1]
    offset = normal(case.batch, 2 * taps, ho, wo)
    if offsets == "random":
        offset = offset * 2
    elif offsets == "whole":
        offset = (offset * 3).round()
    elif offsets == "far":
        offset = offset * 1e6
    elif offsets == "border":  # to the last pixel, and a little beyond
        offset = offset.sign() * case.size[1] + offset * 0.1
    mask = torch.rand((case.batch, taps, ho, wo), generator=generator, dtype=torch.float64)
    tensors = [x, offset, mask, weight, normal(case.out)]
    # Rounded to float32, so that all dtypes but the halves start from the same numbers.
    tensors = [t.float().to(dtype) for t in tensors]
    return tensors if case.modulated else [*tensors[:2], *tensors[3:]]


def steps(case: Case) -> tuple[int | tuple[int, int], ...]:
    return case.stride, case.padding, case.dilation


def ours(case: Case, tensors: list[Tensor]) -> Tensor:
    x, offset, *mask, weight, bias = tensors
    return modulated_deform_conv2d(x, offset, mask[0] if mask else None, weight, bias, *steps(case))


def torchvisions(case: Case, tensors: list[Tensor]) -> Tensor:
    x, offset, *mask, weight, bias = tensors
    return deform_conv2d(x, offset, weight, bias, *steps(case), mask[0] if mask else None)


def with_gradients(function, case: Case, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(case, leaves)
    grad = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value; 0 for empty tensors."""
    if found.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return ((found.double() - expected.double()).abs().max() / scale).item()


def check(case: Case, dtype: torch.dtype, limit: float, offsets: str = "random") -> None:
    tensors = make(case, dtype, offsets)
    expected = with_gradients(torchvisions, case, [t.double() for t in tensors])
    for a, b in zip(with_gradients(ours, case, tensors), expected, strict=True):
        assert a.dtype == dtype
        assert error(a, b) <= limit


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_equals_torchvision(case):
    check(case, torch.float64, 1e-13)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32_error(case):
    check(case, torch.float32, 1e-5)


@pytest.mark.parametrize("offsets", ["whole", "far", "border"])
@pytest.mark.parametrize("name", ["panels", "groups-of-odd-size"])
def test_offsets_with_kinks_follow_the_reference(name, offsets):
    """At whole numbers the slope is one-sided by convention, and torchvision's is another."""
    case = CASES[name]
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        x, offset, mask, weight, bias = make(case, dtype, offsets)
        pairs = [[v if isinstance(v, int) else v[i] for v in steps(case)] for i in range(2)]
        given = [list(pair) for pair in zip(*pairs, strict=True)]
        y = modulated_deform_conv2d(x, offset, mask, weight, bias, *steps(case))
        wide = [t.double() for t in (x, offset, mask, weight)]
        assert error(y, reference.forward(*wide, bias.double(), *given, False)) <= limit
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
        needed = [True] * 4
        found = torch.ops.d2det.modulated_deform_conv2d_backward(
            grad, x, offset, mask, weight, *given, needed, False, False
        )
        expected = reference.backward(grad.double(), *wide, *given, needed, False, False)
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) <= limit


@pytest.mark.parametrize("name", ["odd", "groups-of-odd-size", "many-small-images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layouts_and_dtypes_give_the_same(name, dtype):
    """channels_last, another dense layout and strided views, of operands and of the gradient."""
    case = CASES[name]
    tensors = make(case, dtype)
    expected = with_gradients(ours, case, tensors)

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def transposed(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() == 4 else t

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    for layout in (channels_last, transposed, strided):
        moved = [layout(t) for t in tensors]
        found = with_gradients(ours, case, moved)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(found[1:], moved, strict=True):
            assert a.stride() == torch.empty_like(b).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rgb", "groups-of-odd-size"])
def test_half_precision_is_rounded_once(name, dtype):
    case = CASES[name]
    x, offset, mask, weight, bias = make(case, dtype)
    full = [t.float() for t in (x, offset, mask, weight, bias)]
    expected = with_gradients(ours, case, full)
    for half in ([x, offset, mask, weight, bias], [x, *full[1:3], weight, bias]):
        assert torch.equal(ours(case, half), expected[0].to(dtype))


@pytest.mark.parametrize("name", ["bf16-products", "bf16-products-of-groups"])
def test_bf16_products(name):
    """Where the processor multiplies bfloat16, sampled values are rounded to it first."""
    cases = {
        "bf16-products": Case(64, 96),
        "bf16-products-of-groups": Case(80, 72, groups=2, offset_groups=2, size=(5, 5), batch=3),
    }
    case = cases[name]
    x, offset, mask, weight, bias = make(case)
    tensors = [x.bfloat16(), offset.float(), mask.float(), weight.bfloat16(), bias.bfloat16()]
    expected = with_gradients(torchvisions, case, [t.double() for t in tensors])
    limits = [2**-7, 2**-8, 1e-5, 1e-5, 2**-7, 2**-8]
    found = with_gradients(ours, case, tensors)
    exact = torch.linspace(-1, 2, found[0].numel()).bfloat16().double().view(found[0].shape)
    leaves = [t.double().requires_grad_() for t in tensors]
    expected[1:] = torch.autograd.grad(torchvisions(case, leaves), leaves, exact)
    for a, b, limit in zip(found, expected, limits, strict=True):
        assert error(a, b) <= limit


def test_values_that_are_not_finite_stay_in_their_group():
    case = CASES["resnext"]
    tensors = make(case)
    x, offset = tensors[0], tensors[1]
    x[0, 0, 3, 4] = float("inf")
    offset[0, 3, 5, 6] = float("nan")
    y = ours(case, tensors)
    assert y[0, :, 5, 6].isnan().all()
    y[0, :, 5, 6] = 0
    assert not y[0, :4].isfinite().all()
    assert y[0, 4:].isfinite().all()
    grad = torch.ones_like(y)
    arguments = (grad, *tensors[:4], [1, 1], [1, 1], [1, 1], [True] * 4, False, False)
    found = torch.ops.d2det.modulated_deform_conv2d_backward(*arguments)
    for a, b in zip(found, reference.backward(*arguments), strict=True):
        assert not a.isfinite().all()
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["rgb", "wide", "resnext", "offset-groups-cut-groups"])
def test_threads_do_not_change_the_result(name, threads):
    """More threads than blocks of channels too; two runs give the same bits."""
    case = CASES[name]
    tensors = make(case, torch.float32)
    expected = with_gradients(torchvisions, case, [t.double() for t in tensors])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (with_gradients(ours, case, tensors) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert error(a, c) <= 1e-5


@pytest.mark.parametrize("asked", range(16))
def test_subsets_of_gradients(asked):
    case = CASES["panels"]
    x, offset, mask, weight, _ = make(case, torch.float32)
    needed = [bool(asked >> i & 1) for i in range(4)]
    grad = torch.ones(case.batch, case.out, *offset.shape[2:])
    arguments = (grad, x, offset, mask, weight, [2, 1], [2, 1], [1, 1])
    backward = torch.ops.d2det.modulated_deform_conv2d_backward
    everything = backward(*arguments, [True] * 4, False, False)
    found = backward(*arguments, needed, False, False)
    for a, b, wanted in zip(found, everything, needed, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


def test_gradients_by_differences():
    case = Case(6, 4, (2, 3), groups=2, offset_groups=3, batch=1, size=(4, 3))
    leaves = [t.requires_grad_() for t in make(case)]
    assert torch.autograd.gradcheck(lambda *t: ours(case, list(t)), leaves)


def test_empty_batch():
    case = CASES["rgb"]._replace(batch=0)
    output, *grads = with_gradients(ours, case, make(case, torch.float32))
    assert output.shape[0] == 0
    for grad, tensor in zip(grads, make(case), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_a_direct_call_is_checked():
    x, offset, mask, weight, bias = make(CASES["rgb"], torch.float32)
    operator = torch.ops.d2det.modulated_deform_conv2d
    with pytest.raises(RuntimeError, match="offset must have shape"):
        operator(x, offset[..., 1:], mask, weight, bias, [2, 2], [1, 1], [1, 1], False)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        operator(x, offset, mask, weight, bias[1:], [2, 2], [1, 1], [1, 1], False)
    with pytest.raises(RuntimeError, match="stride"):
        operator(x, offset, mask, weight, bias, [0, 2], [1, 1], [1, 1], False)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    """One that this processor lacks runs as the best it has."""
    environment = {**os.environ, "D2DET_CPU_CAPABILITY": capability}
    root = str(Path(_library.__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([root, path] if path else [root])
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    for case in CASES.values():
        check(case, torch.float64, 1e-13)
        check(case, torch.float32, 1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        test_layouts_and_dtypes_give_the_same("odd", dtype)
        test_half_precision_is_rounded_once("rgb", dtype)
    test_values_that_are_not_finite_stay_in_their_group()


if __name__ == "__main__":
    main()
