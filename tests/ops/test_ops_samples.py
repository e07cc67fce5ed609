"""What holds for every operator: gradients, schema, fake kernel, compilation, layouts, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops import _library

# What every sample must pass; soft-NMS has no derivative to register.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def overload(name: str) -> Any:
    return getattr(torch.ops.d2det, name).default


def results(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def backward_arguments(
    sample: Any, args: tuple[Any, ...], deterministic: bool = False
) -> tuple[Any, ...]:
    """Arguments of the backward operator that ask for every gradient there is."""
    output = overload(sample.op)(*args)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    grad = grad.to(output.dtype).view(output.shape)
    if sample.op == "modulated_deform_conv2d":
        x, offset, mask, weight, _, *steps, allow_tf32 = args
        needed = [True, True, mask is not None, True]
        return grad, x, offset, mask, weight, *steps, needed, allow_tf32, deterministic
    if sample.op == "deform_roi_pool":
        moved = args[3] is not None
        return grad, *args, [True, moved, moved], deterministic
    return grad, *args, [True, True]


def test_gradients_by_differences(grad_sample, device):
    args = grad_sample.arguments(torch.float64, device)
    leaves = grad_sample.leaves(args)

    def run(*values: Tensor) -> Tensor:
        given = iter(values)
        filled = [
            [next(given) for _ in a]
            if isinstance(a, list) and a and isinstance(a[0], Tensor)
            else (next(given) if isinstance(a, Tensor) and a.requires_grad else a)
            for a in args
        ]
        return overload(grad_sample.op)(*filled)

    assert torch.autograd.gradcheck(run, leaves)


def test_opcheck(op_sample, device):
    args = op_sample.arguments(torch.float32, device)
    torch.library.opcheck(overload(op_sample.op), args, test_utils=CHECKS)
    if op_sample.leaves(args):
        torch.library.opcheck(overload(op_sample.op), args, test_utils="test_autograd_registration")


def test_opcheck_of_backward(grad_sample, device):
    args = grad_sample.arguments(torch.float32, device, grad=False)
    torch.library.opcheck(
        overload(f"{grad_sample.op}_backward"),
        backward_arguments(grad_sample, args),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_backward_leaves_out_what_is_not_asked_for(grad_sample):
    args = grad_sample.arguments(torch.float32, grad=False)
    backward = overload(f"{grad_sample.op}_backward")
    given = list(backward_arguments(grad_sample, args))
    position = [a.name for a in backward._schema.arguments].index("output_mask")
    mask = given[position]
    everything = backward(*given)
    for asked in range(len(mask)):
        only = [i == asked and mask[i] for i in range(len(mask))]
        given[position] = only
        grads = backward(*given)
        for i, (grad, full) in enumerate(zip(grads, everything, strict=True)):
            if only[i]:
                torch.testing.assert_close(grad, full, rtol=0, atol=0)
            else:
                assert sum(g.numel() for g in (grad if isinstance(grad, list) else [grad])) == 0


def test_frozen_arguments_get_no_gradient(grad_sample):
    """Only the first differentiable argument trains; the others must come back with None."""
    args = grad_sample.arguments(torch.float32)
    first, *others = grad_sample.leaves(args)
    for other in others:
        other.requires_grad_(False)
    overload(grad_sample.op)(*args).sum().backward()
    assert first.grad is not None
    assert all(other.grad is None for other in others)


def test_second_derivative_is_refused(grad_sample):
    args = grad_sample.arguments(torch.float64)
    leaf = grad_sample.leaves(args)[0]
    (grad,) = torch.autograd.grad(
        overload(grad_sample.op)(*args).square().sum(), leaf, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_compiles_into_one_graph(op_sample, device):
    args = op_sample.arguments(torch.float32, device)
    operator = overload(op_sample.op)
    torch.compiler.reset()  # each sample is a graph of its own
    compiled = torch.compile(lambda *a: operator(*a), fullgraph=True, backend="aot_eager")
    expected, found = operator(*args), compiled(*args)
    for a, b in zip(results(expected), results(found), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    leaves = op_sample.leaves(args)
    if leaves:
        for a, b in zip(
            torch.autograd.grad(expected.sum(), leaves),
            torch.autograd.grad(found.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_non_contiguous_inputs(op_sample, device):
    """Every tensor as a slice of a larger one, with another order of strides."""

    def scatter(value: Any) -> Any:
        if isinstance(value, list):
            return [scatter(v) for v in value]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        wide = torch.stack([torch.zeros_like(value), value], -1).transpose(0, -1).contiguous()
        return wide.transpose(0, -1)[..., 1]

    args = op_sample.arguments(torch.float64, device, grad=False)
    expected = results(overload(op_sample.op)(*args))
    found = results(overload(op_sample.op)(*[scatter(a) for a in args]))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_output_has_the_memory_format_of_the_features(grad_sample):
    def to(value: Any, layout: torch.memory_format) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [to(v, layout) for v in value]
        four = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=layout) if four else value

    args = grad_sample.arguments(torch.float32, grad=False)
    outputs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        outputs.append(overload(grad_sample.op)(*[to(a, layout) for a in args]))
        assert outputs[-1].numel() == 0 or outputs[-1].is_contiguous(memory_format=layout)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_inputs_and_outputs(op_sample, device, dtype):
    """The float32 result of the rounded inputs, rounded once: sums are kept in float32."""
    half = op_sample.arguments(dtype, device, grad=False)

    def widen(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [widen(v) for v in value]
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    full = tuple(widen(a) for a in half)
    for a, b in zip(
        results(overload(op_sample.op)(*half)), results(overload(op_sample.op)(*full)), strict=True
    ):
        torch.testing.assert_close(a, b.to(a.dtype))
    if op_sample.op == "soft_nms":
        return
    assert overload(op_sample.op)(*half).dtype == dtype
    name = f"{op_sample.op}_backward"
    low, high = backward_arguments(op_sample, half), backward_arguments(op_sample, full)
    high = (low[0].float(), *high[1:])
    for a, b in zip(overload(name)(*low), overload(name)(*high), strict=True):
        for x, y in zip(
            a if isinstance(a, list) else [a], b if isinstance(b, list) else [b], strict=True
        ):
            assert x.dtype == dtype or x.numel() == 0
            torch.testing.assert_close(x, y.to(x.dtype))


def test_deterministic_mode(grad_sample, device):
    """Accepted, and two backward passes agree to the bit."""
    args = grad_sample.arguments(torch.float32, device)
    leaves = grad_sample.leaves(args)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(overload(grad_sample.op)(*args).square().sum(), leaves)
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_compiled_kernels_equal_their_reference(op_sample, device):
    """Each kernel that the extension brings, forward and backward, on every sample."""
    names = [op_sample.op] + ([f"{op_sample.op}_backward"] if op_sample.op != "soft_nms" else [])
    names = [n for n in names if _library.implementation(n, device.type) == "compiled"]
    if not names:
        pytest.skip(f"no compiled kernel of {op_sample.op} for {device.type} here")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        args = op_sample.arguments(dtype, device, grad=False)
        for name in names:
            given = args if name == op_sample.op else backward_arguments(op_sample, args)
            for a, b in zip(
                results(overload(name)(*given)),
                results(_library.references[name](*given)),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
