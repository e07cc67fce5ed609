"""The compiled CPU kernel of soft_nms against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2det.ops import _library

pytestmark = pytest.mark.skipif(
    _library.implementation("soft_nms", "cpu") != "compiled",
    reason="no compiled kernel of soft_nms for the CPU here",
)

METHODS = ("linear", "gaussian", "hard")


def make(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 boxes in dense clusters, scores and classes."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g, dtype=torch.float64) * 100
    size = 10 + 50 * torch.rand(count, 2, generator=g, dtype=torch.float64)
    scores = torch.rand(count, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=g)
    return torch.cat([corner, corner + size], 1), scores, labels


def check(tensors: tuple[Tensor, ...], method: str, min_score: float = 1e-3) -> None:
    """Same boxes in the same order; where two scores round alike the order is free."""
    settings = (0.5, method, 0.5, min_score)
    found = torch.ops.d2det.soft_nms(*tensors, *settings)
    expected = _library.references["soft_nms"](*tensors, *settings)
    assert int(found[2]) == int(expected[2])
    kept = int(found[2])
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    if tensors[1].dtype in (torch.float16, torch.bfloat16):
        tolerance = {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(found[1], expected[1], **tolerance)
    assert (found[0][kept:] == -1).all()
    assert not found[1][kept:].any()

    def by_index(result: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros_like(tensors[1]).index_copy_(0, result[0][:kept], result[1][:kept])

    torch.testing.assert_close(by_index(found), by_index(expected), **tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "classes"), [(0, 1), (1, 1), (17, 1), (125, 80), (300, 3)])
def test_equals_the_reference(count, classes, dtype, method):
    boxes, scores, labels = make(count, classes)
    tensors = (boxes.to(dtype), scores.to(dtype), labels)
    check(tensors, method)
    check(tensors, method, min_score=0.3)
    check(tensors, method, min_score=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_and_broken_boxes(method):
    """Ties go to the lower index, NaN and infinite boxes overlap nothing, in any lane."""
    nan, inf = float("nan"), float("inf")
    for count in (3, 16, 50):
        boxes, scores, _ = make(count, 1)
        labels = torch.zeros(count, dtype=torch.int64)
        tensors = (boxes.float(), torch.full((count,), 0.5), labels)
        check(tensors, method)
        found = torch.ops.d2det.soft_nms(*tensors, 1.0, method, 1e9, 1e-3)
        assert found[0].tolist() == list(range(count))
        broken = boxes.float()
        broken[0, 1], broken[1, 2] = nan, inf
        broken[2] = broken[2].flip(0)
        given = scores.float()
        given[-1] = nan
        check((broken, given, labels), method)


def test_runs_agree_to_the_bit():
    boxes, scores, labels = make(500, 7)
    before = torch.get_num_threads()
    first = None
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found = torch.ops.d2det.soft_nms(
                boxes.float(), scores.float(), labels, 0.5, "gaussian", 0.5, 1e-3
            )
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    finally:
        torch.set_num_threads(before)
