"""The emulator that the CUDA kernels are tested with: what it runs and what it reports.

Also every emulated kernel on the samples that all operators share.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops import _library

SUMS, UNSYNCHRONISED, COLLECTIVES = -1, -2, -3


def test_shared_memory_and_warps(emulated, order):
    values = torch.arange(150.0)
    expected = torch.stack([part.sum() for part in values.split(64)])
    assert torch.equal(emulated.self_test(values, SUMS), expected)


def test_a_missing_barrier_shows(emulated, monkeypatch):
    """Whatever the order: a thread reads what another one has not written yet."""
    values = torch.arange(150.0)
    for order in ("forward", "reversed", "shuffled"):
        monkeypatch.setenv("D2DET_EMULATOR_ORDER", order)
        assert emulated.self_test(values, UNSYNCHRONISED).isnan().any()


def test_warp_collectives(emulated, order):
    found = emulated.self_test(torch.zeros(1), COLLECTIVES).view(7, 64)
    thread = torch.arange(64)
    lane, base = thread % 32, thread // 32 * 32
    inside = thread % 8
    assert torch.equal(found[0], (base + 3).float())
    assert torch.equal(found[1], torch.where(inside >= 2, thread - 2, thread).float())
    assert torch.equal(found[2], torch.where(inside < 6, thread + 2, thread).float())
    assert torch.equal(found[3], (thread ^ 5).float())
    assert torch.equal(found[4], torch.full((64,), 5.0))
    assert torch.equal(found[5], torch.full((64,), 40.0))
    assert torch.equal(found[6], torch.where(lane < 16, base, base + 17).float())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "that not all of its threads reach.*at the barrier in self_test.cpp"),
        (1, "that not all of its threads reach.*for their warp in self_test.cpp"),
        (2, "outside of the block's dynamic shared memory"),
        (3, "no multiple of its size"),
        (4, "that not all of its threads reach"),
        (6, "no GPU accepts"),
    ],
)
def test_mistakes_are_reported(emulated, order, kind, message):
    with pytest.raises(RuntimeError, match=f"emulated CUDA kernel mistake.*{message}"):
        emulated.self_test(torch.zeros(1), kind)


def test_dynamic_shared_memory_starts_as_garbage(emulated):
    assert emulated.self_test(torch.zeros(1), 5)[:64].isnan().all()


def backward_arguments(sample: Any, args: tuple[Any, ...], deterministic: bool) -> tuple[Any, ...]:
    output = _library.references[sample.op](*args)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype)
    grad = grad.view(output.shape)
    if sample.op == "modulated_deform_conv2d":
        x, offset, mask, weight, _, *steps, allow_tf32 = args
        needed = [True, True, mask is not None, True]
        return grad, x, offset, mask, weight, *steps, needed, allow_tf32, deterministic
    if sample.op == "deform_roi_pool":
        moved = args[3] is not None
        return grad, *args, [True, moved, moved], deterministic
    return grad, *args, [True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_equal_their_reference(emulated, op_sample, dtype, deterministic):
    args = op_sample.arguments(dtype, grad=False)
    calls = [(op_sample.op, args)]
    if op_sample.op != "soft_nms":
        calls.append(
            (f"{op_sample.op}_backward", backward_arguments(op_sample, args, deterministic))
        )
    for name, given in calls:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"d2det_emulated::{name}", "CPU"):
            pytest.skip(f"{name} has no CUDA kernel")
        found, expected = getattr(emulated, name)(*given), _library.references[name](*given)
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]
