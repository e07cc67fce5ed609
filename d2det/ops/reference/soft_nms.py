"""Soft-NMS in PyTorch: all classes advance together, one box of each class a step.

Letters: N boxes, K classes that occur, M boxes of the most frequent class. One host
synchronisation (K and M); M steps of a few operations on (K, M) tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GONE = float("-inf")


def forward(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    method: str,
    sigma: float,
    min_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded (indices, scores) and their count; see `d2det.ops.soft_nms`."""
    n = scores.shape[0]
    decayed = torch.full_like(scores, _GONE, dtype=_compute_dtype(boxes, scores))
    if n > 0:
        decayed = _decay(boxes, scores, classes, iou_threshold, method, sigma, min_score)
    # Stable: of two equal scores the lower index comes first.
    ordered, order = decayed.sort(descending=True, stable=True)
    kept = ordered >= min_score
    count = kept.sum()
    return (
        order.masked_fill(~kept, -1),
        ordered.masked_fill(~kept, 0.0).to(scores.dtype),
        count,
    )


def _compute_dtype(boxes: Tensor, scores: Tensor) -> torch.dtype:
    double = torch.float64 in (boxes.dtype, scores.dtype)
    return torch.float64 if double else torch.float32


def _decay(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    method: str,
    sigma: float,
    min_score: float,
) -> Tensor:
    """Scores after soft-NMS, -inf for boxes that fell away."""
    dtype = _compute_dtype(boxes, scores)
    by_class = classes.argsort(stable=True)
    row, column, rows, columns = _positions(classes[by_class])
    flat = row * columns + column
    live = scores[by_class].to(dtype)
    live = live.masked_fill(~(live >= min_score), _GONE)  # written so that NaN falls away too
    remaining = live.new_full((rows * columns,), _GONE).index_copy_(0, flat, live)
    remaining = remaining.view(rows, columns)
    corners = boxes.new_zeros((rows * columns, 4), dtype=dtype)
    corners = corners.index_copy_(0, flat, boxes[by_class].to(dtype)).view(rows, columns, 4)
    final = torch.full_like(remaining, _GONE)
    for _ in range(columns):
        # argmax returns the first of equal values, which within a class is the lowest index.
        best = remaining.argmax(1, keepdim=True)
        # A class that has run out takes -inf, which must not overwrite what its box 0 has.
        taken = torch.maximum(final.gather(1, best), remaining.gather(1, best))
        final.scatter_(1, best, taken)
        remaining.scatter_(1, best, _GONE)
        chosen = corners.gather(1, best[..., None].expand(-1, -1, 4))
        overlap = _iou(chosen, corners)
        remaining = _suppress(remaining, overlap, iou_threshold, method, sigma)
        # Also for what left earlier: -inf times a factor of 0 is NaN.
        remaining = remaining.masked_fill(~(remaining >= min_score), _GONE)
    return torch.empty_like(live).index_copy_(0, by_class, final.view(-1)[flat])


def _positions(classes: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Row (class) and column (rank within it) of each box, for classes in rising order."""
    first = torch.ones_like(classes, dtype=torch.bool)
    first[1:] = classes[1:] != classes[:-1]
    row = first.cumsum(0) - 1
    position = torch.arange(classes.shape[0], device=classes.device)
    start = torch.where(first, position, 0).cummax(0).values
    column = position - start
    rows, columns = torch.stack([row[-1], column.max()]).add(1).tolist()
    return row, column, rows, columns


def _suppress(
    scores: Tensor, overlap: Tensor, iou_threshold: float, method: str, sigma: float
) -> Tensor:
    if method == "gaussian":
        return scores * torch.exp(-(overlap * overlap) / sigma)
    over = overlap > iou_threshold
    if method == "linear":
        return torch.where(over, scores * (1 - overlap), scores)
    return scores.masked_fill(over, _GONE)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of (K, 1, 4) with (K, M, 4) boxes, without "+1"; 0 where it is not a number."""
    x1, y1, x2, y2 = second.unbind(-1)
    a1, b1, a2, b2 = first.unbind(-1)
    width = (torch.minimum(x2, a2) - torch.maximum(x1, a1)).clamp(min=0)
    height = (torch.minimum(y2, b2) - torch.maximum(y1, b1)).clamp(min=0)
    intersection = width * height
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    union = area + (a2 - a1).clamp(min=0) * (b2 - b1).clamp(min=0) - intersection
    return torch.where(union > 0, intersection / union, 0.0).nan_to_num(0.0)
