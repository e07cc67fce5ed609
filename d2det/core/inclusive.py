"""Boxes that name their last pixels, as the releases' do, and boxes that end behind them.

A box of the releases from pixel 10 to pixel 19 is ten pixels wide: x2 - x1 + 1. Ours, like
detectron2's, ends at 20. The releases' weights were trained on the former (their pooling, their
cells at fractions of x2 - x1), but their anchors and proposals are the same parts of the image.
"""

from __future__ import annotations

from torch import Tensor


def to_inclusive(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) that name their last pixels, of boxes that end behind them."""
    return boxes - boxes.new_tensor([0, 0, 1, 1])


def from_inclusive(boxes: Tensor) -> Tensor:
    """The inverse of `to_inclusive`."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])
