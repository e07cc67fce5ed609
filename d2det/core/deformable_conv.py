"""Deformable convolution with the layer that predicts its offsets and modulation (DCNv1, v2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2det.ops import modulated_deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution that predicts its own offsets, and modulation: called as a plain one is.

    The layer that predicts them is `conv_offset`, as in the releases and MMDetection; `weight` and
    `bias` are the plain convolution's, so that its parameters load.

    Args:
        conv: a plain convolution, whose parameters become this one's.
        modulated: v2, with modulation; else v1.
        offset_groups: groups of input channels with offsets of their own.
    """

    def __init__(self, conv: nn.Conv2d, modulated: bool = True, offset_groups: int = 1) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            **_geometry(conv),
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",  # replaced below
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.modulated = modulated
        self.conv_offset = offset_layer(conv, modulated, offset_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Cin, H, W) to (N, Cout, Ho, Wo)."""
        offset, mask = split_offsets(self.conv_offset(x), self.modulated)
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, **_geometry(self))


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
        **_geometry(conv),
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


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
