"""Which RoIs train the dense regression branch."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_positives(gt_classes: Tensor, num_classes: int, limit: int) -> Tensor:
    """Indices of RoIs with an object, in order; a random subset where there are more than `limit`.

    Args:
        gt_classes: (R,) int64; `num_classes` is background, negative values are ignored.
        num_classes: K.
        limit: the releases take 96 times the number of images.
    """
    positive = ((gt_classes >= 0) & (gt_classes < num_classes)).nonzero()[:, 0]
    if positive.numel() > limit:
        chosen = torch.randperm(positive.numel(), device=positive.device)[:limit]
        positive = positive[chosen.sort().values]
    return positive
