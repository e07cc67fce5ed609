"""The CUDA kernels of soft_nms against the reference, emulated and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops.reference import soft_nms as reference

Boxes = tuple[Tensor, Tensor, Tensor]
METHODS = ("linear", "gaussian", "hard")


def make(count: int, classes: int, dtype: torch.dtype = torch.float32) -> Boxes:
    corner, size = torch.rand(count, 2) * 40, 5 + torch.rand(count, 2) * 20
    boxes = torch.cat([corner, corner + size], 1).to(dtype)
    return boxes, torch.rand(count).to(dtype), torch.randint(0, classes, (count,))


def check(
    cuda_kernels: Any, args: Boxes, method: str, threshold: float = 0.3, min_score: float = 0.05
) -> int:
    ops, device = cuda_kernels
    settings = (threshold, method, 0.5, min_score)
    found = [t.cpu() for t in ops.soft_nms(*(a.to(device) for a in args), *settings)]
    expected = reference.forward(*args, *settings)
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    return int(found[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (40, 3), (300, 2)])
def test_equals_reference(cuda_kernels, method, dtype, count, classes):
    boxes, scores, ids = make(count, classes, dtype)
    assert check(cuda_kernels, (boxes, scores, 7 * ids - 5), method) > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_order_of_threads(emulated, order, method):
    check((emulated, torch.device("cpu")), make(90, 4), method)


def test_classes_that_exceed_shared_memory(cuda_kernels):
    boxes, scores, ids = make(2500, 1)
    boxes = boxes + 30 * torch.arange(2500).div(10, rounding_mode="floor")[:, None]
    scores[torch.rand(2500) < 0.9] = 0.01
    assert check(cuda_kernels, (boxes, scores, ids), "linear") > 50
    assert check(cuda_kernels, (boxes.double(), scores, ids % 2), "gaussian") > 50


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_take_the_lower_index(cuda_kernels, method):
    boxes, _, ids = make(200, 3)
    scores = torch.randint(1, 4, (200,)) / 4
    check(cuda_kernels, (boxes, scores, ids), method)
    check(cuda_kernels, (boxes, torch.ones(200), ids), method)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite(cuda_kernels, method):
    boxes, scores, ids = make(60, 2)
    scores[3], scores[4], scores[5] = float("nan"), float("inf"), -float("inf")
    boxes[7, 0], boxes[8, 3], boxes[9] = float("nan"), float("inf"), 0.0
    boxes[10] = boxes[11] = torch.tensor([5.0, 5.0, 5.0, 9.0])  # no area
    boxes[12] = torch.tensor([9.0, 9.0, 5.0, 5.0])  # inverted
    check(cuda_kernels, (boxes, scores, ids), method)
    scores[:] = float("nan")
    assert check(cuda_kernels, (boxes, scores, ids), method) == 0


@pytest.mark.parametrize("method", METHODS)
def test_without_a_minimum(cuda_kernels, method):
    """Scores that decay to 0 stay; "hard" drops none for its score but all for overlap."""
    boxes, scores, ids = make(50, 2)
    boxes[10], scores[20], scores[21] = boxes[11], 0.0, -0.0
    kept = check(cuda_kernels, (boxes, scores, ids), method, min_score=0.0)
    assert kept == 50 or method == "hard"


def test_iou_at_the_threshold_is_not_above_it(cuda_kernels):
    """Boxes of IoU exactly 1/2 and 1/4, whatever the rounding."""
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1]], dtype=torch.float32)
    args = (boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64))
    assert check(cuda_kernels, args, "hard", threshold=0.5) == 3
    assert check(cuda_kernels, args, "hard", threshold=0.25) == 2


def test_strides_mixed_precision_and_empty(cuda_kernels):
    ops, device = cuda_kernels
    boxes, scores, ids = make(30, 3)
    args = (boxes.t().contiguous().t(), torch.stack([scores, scores], 1)[:, 0], ids)
    check(cuda_kernels, args, "linear")
    check(cuda_kernels, (boxes.double(), scores.half(), ids), "linear")
    found = ops.soft_nms(*(a[:0].to(device) for a in args), 0.3, "linear", 0.5, 0.05)
    assert [t.shape for t in found] == [(0,), (0,), ()] and int(found[2]) == 0


def test_wrong_arguments_are_errors(cuda_kernels):
    ops, device = cuda_kernels
    boxes, scores, ids = (t.to(device) for t in make(5, 2))
    with pytest.raises(RuntimeError, match="scores must have shape"):
        ops.soft_nms(boxes, scores[:4], ids, 0.3, "linear", 0.5, 0.05)
    with pytest.raises(RuntimeError, match="method must be"):
        ops.soft_nms(boxes, scores, ids, 0.3, "cubic", 0.5, 0.05)


@pytest.mark.gpu
def test_the_host_never_waits():
    """The operator itself: its public function reads the count, once."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = [t.cuda() for t in make(500, 20)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.d2det.soft_nms(*args, 0.3, "linear", 0.5, 0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")
