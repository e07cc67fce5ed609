"""The emulator that the CUDA kernels are tested with: what it runs and what it reports."""

from __future__ import annotations

import pytest
import torch

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
