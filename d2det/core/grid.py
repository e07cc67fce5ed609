"""The k x k grid of a RoI: offsets from its cells to the sides of a box, and back (Sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

# Sides below this many pixels count as this long, so that offsets of a degenerate RoI stay finite.
MIN_SIDE = 1e-2


def _corner_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Top-left corner (R, 2, 1, 1) and sides (R, 2, 1, 1), in float32 at least."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    corner, size = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=MIN_SIDE)
    return corner[:, :, None, None], size[:, :, None, None]


def cell_centers(boxes: Tensor, k: int) -> Tensor:
    """Centres of the k x k cells of each box.

    Args:
        boxes: (R, 4), in pixels.
        k: cells a side.

    Returns:
        (R, 2, k, k): x and y of cell (i, j), at ((j + 0.5)/k, (i + 0.5)/k) of the box.
    """
    corner, size = _corner_and_size(boxes)
    steps = (torch.arange(k, device=boxes.device, dtype=corner.dtype) + 0.5) / k
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"))
    return corner + size * grid


def encode_offsets(proposals: Tensor, boxes: Tensor, k: int) -> Tensor:
    """Offsets from every cell of a proposal to the sides of a box (Eq. 2).

    Args:
        proposals: (R, 4), in pixels; they carry the grid.
        boxes: (R, 4), in pixels; the boxes to describe.
        k: cells a side.

    Returns:
        (R, 4, k, k): left, top, right, bottom distances as fractions of the proposal's width or
        height; negative where the cell lies beyond that side.
    """
    centers = cell_centers(proposals, k)
    _, size = _corner_and_size(proposals)
    sides = boxes.to(centers.dtype)[:, :, None, None]
    return torch.cat(((centers - sides[:, :2]) / size, (sides[:, 2:] - centers) / size), dim=1)


def decode_offsets(proposals: Tensor, offsets: Tensor) -> Tensor:
    """The box that each cell describes: the inverse of `encode_offsets`.

    Args:
        proposals: (R, 4), in pixels.
        offsets: (R, 4, k, k): left, top, right, bottom as fractions of the proposal.

    Returns:
        (R, 4, k, k): x1, y1, x2, y2 in pixels.
    """
    centers = cell_centers(proposals, offsets.shape[-1])
    _, size = _corner_and_size(proposals)
    return torch.cat((centers - offsets[:, :2] * size, centers + offsets[:, 2:] * size), dim=1)


def average_boxes(cell_boxes: Tensor, overlap_logits: Tensor | None, threshold: float) -> Tensor:
    """One box a RoI: the mean over the cells that are believed to overlap the object (Sec. 3.1).

    A RoI none of whose cells exceeds the threshold takes the box of its most likely cell (the
    releases divide by nothing there).

    Args:
        cell_boxes: (R, 4, k, k).
        overlap_logits: (R, 1, k, k), or None to average all cells.
        threshold: probability that a cell must exceed to vote.

    Returns:
        (R, 4).
    """
    cell_boxes = cell_boxes.flatten(2)
    if overlap_logits is None:
        return cell_boxes.mean(dim=2)
    logits = overlap_logits.flatten(1)
    votes = logits.sigmoid() > threshold
    best = torch.zeros_like(votes).scatter_(1, logits.argmax(dim=1, keepdim=True), True)
    votes = torch.where(votes.any(dim=1, keepdim=True), votes, best).to(cell_boxes.dtype)
    return (cell_boxes * votes[:, None]).sum(dim=2) / votes.sum(dim=1)[:, None]
