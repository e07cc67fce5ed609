"""Which cells of a proposal overlap the object (Sec. 3.1, binary overlap prediction)."""

from __future__ import annotations

from torch import Tensor


def overlap_targets(offsets: Tensor, margin: float) -> Tensor:
    """Foreground cells: those at least `margin` inside the ground-truth box on all four sides.

    Args:
        offsets: (R, 4, k, k), target offsets of `encode_offsets`.
        margin: as a fraction of the proposal's width (left, right) or height (top, bottom).
            0 gives Eq. 3; the releases use 1/(k - 1) = 1/6.

    Returns:
        (R, 1, k, k), 1 for foreground and 0 otherwise, in the dtype of `offsets`.
    """
    return (offsets.amin(dim=1, keepdim=True) >= margin).to(offsets.dtype)
