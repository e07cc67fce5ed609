"""Random displacement of training proposals, so that regression sees more than easy ones."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SIDE = 1.0  # pixels; a jittered box clipped at the image border keeps at least this


def jitter_boxes(
    boxes: Tensor,
    image_sizes: Tensor,
    amount: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each centre by U(-a, a) of the box's size and scale each side by 1 + U(-a, a).

    Args:
        boxes: (R, 4), in pixels.
        image_sizes: (R, 2), height and width of the image that each box lies in.
        amount: a, at least 0 and below 1; 0 returns the boxes unchanged.
        generator: source of randomness, on the boxes' device; torch's global one by default.

    Returns:
        (R, 4), clipped to the images, each side at least one pixel long (the image's own side if
        that is less).

    Raises:
        ValueError: `amount` outside [0, 1).
    """
    if not 0 <= amount < 1:
        raise ValueError(f"jitter amount must lie in [0, 1), got {amount}")
    if amount == 0:
        return boxes
    noise = torch.rand(
        (boxes.shape[0], 4), dtype=boxes.dtype, device=boxes.device, generator=generator
    )
    noise = (noise * 2 - 1) * amount
    size = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + size / 2 + noise[:, :2] * size
    half = size * (1 + noise[:, 2:]) / 2
    limit = image_sizes.flip(1).to(boxes.dtype)
    low = (center - half).clamp(min=0).minimum((limit - MIN_SIDE).clamp(min=0))
    high = (center + half).maximum(low + MIN_SIDE).minimum(limit)
    return torch.cat((low, high), dim=1)
