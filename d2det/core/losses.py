"""Losses of dense local regression (Sec. 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def elementwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corresponding boxes, whose coordinates lie in dimension 1.

    Args:
        a, b: (R, 4, ...), broadcastable. A box with x2 < x1 or y2 < y1 has no area.

    Returns:
        (R, ...), 0 where the union is empty.
    """
    size_a = (a[:, 2:] - a[:, :2]).clamp(min=0)
    size_b = (b[:, 2:] - b[:, :2]).clamp(min=0)
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (high - low).clamp(min=0).prod(dim=1)
    union = size_a.prod(dim=1) + size_b.prod(dim=1) - inter
    return inter / union.clamp(min=torch.finfo(union.dtype).tiny)


def dense_iou_loss(
    cell_boxes: Tensor, gt_boxes: Tensor, weights: Tensor, eps: float = 1e-2
) -> Tensor:
    """-log(IoU) of every cell's box with the ground truth, weighted by cell.

    The logarithm is taken of (IoU + eps) / (1 + eps): zero at IoU 1, finite and still falling
    near IoU 0, where -log(IoU) is infinite.

    Args:
        cell_boxes: (R, 4, k, k), predicted boxes.
        gt_boxes: (R, 4).
        weights: (R, 1, k, k), 1 for cells that count.
        eps: see above.

    Returns:
        A scalar: the weighted sum over R k^2, the number of all cells. 0 where R is 0.
    """
    iou = elementwise_iou(cell_boxes, gt_boxes[:, :, None, None].to(cell_boxes.dtype))
    loss = -torch.log((iou + eps) / (1 + eps))
    return (loss * weights[:, 0]).sum() / max(loss.numel(), 1)


def overlap_loss(overlap_logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the overlap logits, averaged over all cells; 0 where there are none.

    Args:
        overlap_logits: (R, 1, k, k).
        targets: (R, 1, k, k), 0 or 1.
    """
    total = F.binary_cross_entropy_with_logits(overlap_logits, targets, reduction="sum")
    return total / max(overlap_logits.numel(), 1)
