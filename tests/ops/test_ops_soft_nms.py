"""soft_nms against a plain loop over boxes, torchvision's NMS, and cases done by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from d2det.ops import soft_nms
from d2det.ops.reference import soft_nms as reference


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    method: str,
    sigma: float,
    min_score: float,
) -> tuple[list[int], list[float]]:
    """One box after the other, over all classes at once, from the definition."""
    live = {i: s for i, s in enumerate(scores.tolist()) if s >= min_score}
    taken: dict[int, float] = {}
    while live:
        best = max(live, key=lambda i: (live[i], -i))
        taken[best] = live.pop(best)
        for i in list(live):
            if classes[i] != classes[best]:
                continue
            overlap = iou(boxes[best].tolist(), boxes[i].tolist())
            if method == "gaussian":
                live[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap > iou_threshold:
                live[i] *= 1 - overlap if method == "linear" else 0
                if method == "hard":
                    del live[i]
                    continue
            if live[i] < min_score:
                del live[i]
    order = sorted(taken, key=lambda i: (-taken[i], i))
    return order, [taken[i] for i in order]


def make(count: int, kinds: int, spread: float = 40.0) -> tuple[Tensor, Tensor, Tensor]:
    corner, size = torch.rand(count, 2).double() * spread, torch.rand(count, 2).double() * 20 + 5
    classes = torch.randint(0, kinds, (count,)) * 1000 - 7  # any integers, not only small ones
    return torch.cat([corner, corner + size], 1), torch.rand(count).double(), classes


METHODS = ("linear", "gaussian", "hard")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("count", "kinds"), [(1, 1), (40, 1), (60, 4), (30, 100)])
@pytest.mark.parametrize("min_score", [0.0, 0.2])
def test_equals_a_plain_loop(method, count, kinds, min_score, device):
    boxes, scores, classes = make(count, kinds)
    settings = {"iou_threshold": 0.4, "method": method, "sigma": 0.3, "min_score": min_score}
    indices, decayed = slow_soft_nms(boxes, scores, classes, **settings)
    keep, found = soft_nms(boxes.to(device), scores.to(device), classes.to(device), **settings)
    assert keep.tolist() == indices
    torch.testing.assert_close(found.cpu(), torch.tensor(decayed, dtype=torch.float64))
    # The reference as well, where a compiled kernel ran above.
    order, values, number = reference.forward(boxes, scores, classes, *settings.values())
    assert order.tolist() == indices + [-1] * (count - len(indices))
    torch.testing.assert_close(values[: int(number)].tolist(), decayed)
    assert not values[int(number) :].any()


def test_hard_equals_torchvision(device):
    boxes, scores, classes = (t.to(device) for t in make(200, 3))
    keep, found = soft_nms(boxes, scores, classes, iou_threshold=0.3, method="hard", min_score=0.0)
    expected = batched_nms(boxes, scores, classes, 0.3)
    assert 0 < len(keep) < 150
    assert torch.equal(keep, expected)
    assert torch.equal(found, scores[keep])


def by_hand(**settings: Any) -> tuple[list[int], list[float]]:
    """Boxes 0 and 1 overlap with IoU 0.6, box 2 is far away, box 3 is box 0 in another class."""
    boxes = torch.tensor([[0, 0, 8, 1], [2, 0, 10, 1], [50, 0, 58, 1], [0, 0, 8, 1.0]])
    scores, classes = torch.tensor([0.8, 0.9, 0.5, 0.7]), torch.tensor([1, 1, 1, 2])
    keep, decayed = soft_nms(boxes, scores, classes, **settings)
    return keep.tolist(), decayed.tolist()


def test_linear_by_hand():
    keep, decayed = by_hand(iou_threshold=0.5)
    assert keep == [1, 3, 2, 0]
    assert decayed == pytest.approx([0.9, 0.7, 0.5, 0.8 * 0.4])


def test_linear_below_the_threshold_is_untouched():
    assert by_hand(iou_threshold=0.61) == ([1, 0, 3, 2], pytest.approx([0.9, 0.8, 0.7, 0.5]))


def test_gaussian_by_hand():
    keep, decayed = by_hand(iou_threshold=0.9, method="gaussian", sigma=0.5)
    assert keep == [1, 3, 2, 0]
    assert decayed == pytest.approx([0.9, 0.7, 0.5, 0.8 * math.exp(-0.72)])


def test_scores_below_the_minimum_are_dropped():
    assert by_hand(iou_threshold=0.5, min_score=0.4)[0] == [1, 3, 2]
    assert by_hand(iou_threshold=0.5, min_score=0.6)[0] == [1, 3]
    assert by_hand(iou_threshold=0.5, min_score=1.0) == ([], [])


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_scores_the_lower_index_comes_first(method, device):
    boxes = torch.tensor([[0, 0, 4, 4.0]]).repeat(6, 1) + torch.arange(6.0)[:, None] * 10
    scores, classes = torch.full((6,), 0.5), torch.tensor([3, 1, 3, 2, 1, 3])
    keep, _ = soft_nms(
        boxes.to(device), scores.to(device), classes.to(device), iou_threshold=0.5, method=method
    )
    assert keep.tolist() == list(range(6))
    same = boxes[:1].repeat(6, 1).to(device)  # one stack: index 0 is taken first in each class
    keep, _ = soft_nms(
        same,
        scores.to(device),
        torch.zeros(6, dtype=torch.int64, device=device),
        iou_threshold=0.5,
        method=method,
        min_score=0.45,
    )
    assert keep.tolist() == [0]


def test_nan_scores_and_broken_boxes(device):
    """NaN scores are dropped; boxes without area or with NaN overlap nothing."""
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [[0, 0, 9, 9], [0, 0, 9, 9], [4, 4, 4, 4], [5, 5, 1, 1], [nan, 0, 9, 9], [0, 0, inf, 9.0]]
    )
    scores = torch.tensor([0.9, nan, 0.8, 0.7, 0.6, 0.5])
    for method in METHODS:
        keep, decayed = soft_nms(
            boxes.to(device),
            scores.to(device),
            torch.zeros(6, dtype=torch.int64, device=device),
            iou_threshold=0.5,
            method=method,
        )
        assert keep.tolist() == [0, 2, 3, 4, 5]
        assert decayed.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


def test_no_boxes(device):
    keep, decayed = soft_nms(
        torch.zeros(0, 4, device=device),
        torch.zeros(0, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        iou_threshold=0.5,
    )
    assert (keep.shape, keep.dtype, decayed.shape) == ((0,), torch.int64, (0,))


def test_autocast_works_in_float32(device):
    """Boxes 2049 and 2050 are one number in bfloat16; scores come back in float32."""
    boxes = torch.tensor([[2049, 0, 2050, 1], [2050, 0, 2051, 1.0]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    classes = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        keep, decayed = soft_nms(boxes, scores.bfloat16(), classes, iou_threshold=0.5)
    assert keep.tolist() == [0, 1]
    assert decayed.dtype == torch.float32


def test_result_is_detached():
    boxes, scores, classes = make(5, 1)
    assert not soft_nms(boxes, scores.requires_grad_(), classes, iou_threshold=0.5)[1].requires_grad


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes must have shape \(N, 4\), got \(3, 5\)"),
    ({"boxes": torch.zeros(3, 4).int()}, TypeError, "boxes must be floating point"),
    ({"scores": torch.zeros(2)}, ValueError, r"scores .*\(3,\).*\(3, 4\), got \(2,\)"),
    ({"scores": torch.zeros(3, device="meta")}, ValueError, "scores is on meta"),
    ({"classes": torch.zeros(3)}, TypeError, "classes must be torch.int64"),
    ({"classes": torch.zeros(4).long()}, ValueError, r"classes .*\(3,\).*got \(4,\)"),
    ({"method": "softer"}, ValueError, "method must be one of .*'softer'"),
    ({"iou_threshold": 1.5}, ValueError, "iou_threshold must be in"),
    ({"sigma": 0.0}, ValueError, "sigma must be above 0"),
    ({"min_score": -1.0}, ValueError, "min_score must be at least 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, error, message):
    arguments = {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "classes": torch.zeros(3, dtype=torch.int64),
        "iou_threshold": 0.5,
    }
    soft_nms(**arguments)
    with pytest.raises(error, match=message):
        soft_nms(**{**arguments, **change})
