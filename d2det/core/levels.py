"""Which feature level a RoI is pooled from (Feature Pyramid Networks, Eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A RoI of 224 pixels belongs to stride 16, so one of 14 pixels would belong to stride 1.
CANONICAL_SIZE_AT_STRIDE_1 = 14.0


def assign_levels(boxes: Tensor, strides: Sequence[float], *, inclusive: bool = False) -> Tensor:
    """Index of the level of each box: floor(log2(sqrt(w h) / 14)) - log2(finest stride), clamped.

    For strides 4 to 32 that is floor(log2(sqrt(w h) / 56)).

    Args:
        boxes: (R, 4), in pixels.
        strides: of the L levels, fine to coarse, each twice the one before.
        inclusive: boxes name their last pixel, as the releases' do: sides are one pixel longer.

    Returns:
        (R,) int64 in [0, L).

    Raises:
        ValueError: strides that are not powers of two, doubling from level to level.
    """
    finest = math.log2(strides[0])
    if any(math.log2(s) != finest + i for i, s in enumerate(strides)):
        raise ValueError(f"strides must double from level to level, got {list(strides)}")
    sides = boxes[:, 2:] - boxes[:, :2] + (1 if inclusive else 0)
    size = sides.clamp(min=0).prod(dim=1).float().sqrt()
    if inclusive:
        # The releases divide by the size at the finest level first, and add more.
        level = torch.floor(torch.log2(size / (CANONICAL_SIZE_AT_STRIDE_1 * strides[0]) + 1e-6))
    else:
        # detectron2 adds the same 1e-8 inside the logarithm: sizes at a boundary go up.
        level = torch.floor(torch.log2(size / CANONICAL_SIZE_AT_STRIDE_1 + 1e-8)) - finest
    return level.clamp(min=0, max=len(strides) - 1).to(torch.int64)
