"""What goes with a deformable convolution: the layer that predicts its offsets and modulation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_Pair = tuple[int, int]


def offset_layer(conv: nn.Conv2d, modulated: bool, groups: int) -> nn.Conv2d:
    """The convolution that predicts offsets, and modulation logits, for `conv` made deformable.

    It has the kernel, stride and dilation of `conv` and starts at zero, so that taps start in
    their regular places, with a modulation of 0.5 (DCNv2, Sec. 3.1).

    Args:
        conv: the convolution to be deformed.
        modulated: v2, with logits; else v1.
        groups: groups of input channels with offsets of their own, G.
    """
    height, width = conv.kernel_size
    layer = nn.Conv2d(
        conv.in_channels,
        (3 if modulated else 2) * height * width * groups,
        (height, width),
        stride=cast(_Pair, conv.stride),
        padding=cast(_Pair, conv.padding),
        dilation=cast(_Pair, conv.dilation),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    reset_offsets(layer)
    return layer


def reset_offsets(layer: nn.Conv2d) -> None:
    """Put an offset layer back to its start: regular taps, modulation 0.5."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def split_offsets(raw: Tensor, modulated: bool) -> tuple[Tensor, Tensor | None]:
    """Offsets and modulation of an offset layer's output: two thirds, and the rest's sigmoid.

    Args:
        raw: (N, 3 G taps, Ho, Wo), or (N, 2 G taps, Ho, Wo) where not modulated.

    Returns:
        Offsets (N, 2 G taps, Ho, Wo), y before x, and modulation (N, G taps, Ho, Wo) in (0, 1), or
        None. The layout is detectron2's.
    """
    if not modulated:
        return raw, None
    count = raw.shape[1] // 3
    offset, logits = torch.split(raw, [2 * count, count], dim=1)
    return offset, logits.sigmoid()
