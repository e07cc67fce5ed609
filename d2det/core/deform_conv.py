"""Deformable convolution as one layer that predicts its own offsets (Dai et al., 2017; DCNv2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2det.ops import modulated_deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution made deformable: `conv_offset` predicts offsets and modulation from its input.

    It keeps the weight's name, so that a plain convolution's parameters load; the offset layer has
    the name of the releases' and MMDetection's. Offsets start at zero and modulation at 0.5.

    Args:
        modulated: with modulation (DCNv2), else without (DCNv1).
        deform_groups: groups of input channels with offsets of their own, G.
        Others: as `torch.nn.Conv2d`.
    """

    def __init__(
        self, *args: Any, modulated: bool = True, deform_groups: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.modulated = modulated
        self.conv_offset = offset_layer(self, modulated, deform_groups)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, modulated: bool = True, deform_groups: int = 1
    ) -> DeformableConv2d:
        """A deformable layer that shares a plain one's parameters."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            **_geometry(conv),
            groups=conv.groups,
            bias=conv.bias is not None,
            modulated=modulated,
            deform_groups=deform_groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, Cin, H, W) to (N, Cout, Ho, Wo)."""
        offset, mask = split_offsets(self.conv_offset(input), self.modulated)
        return modulated_deform_conv2d(
            input,
            offset,
            mask,
            self.weight,
            self.bias,
            **_geometry(self),
        )


def offset_layer(conv: nn.Conv2d, modulated: bool, groups: int) -> nn.Conv2d:
    """The convolution that predicts offsets, and modulation logits, for `conv` made deformable.

    It has the kernel, stride and dilation of `conv` and starts at zero, so that taps start in
    their regular places, with a modulation of 0.5 (DCNv2, Sec. 3.1).

    Args:
        conv: the convolution to be deformed.
        modulated: v2, with logits; else v1.
        groups: groups of input channels with offsets of their own, G.
    """
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    layer = nn.Conv2d(
        conv.in_channels,
        (3 if modulated else 2) * taps * groups,
        conv.kernel_size,  # type: ignore[arg-type]
        **_geometry(conv),
    )
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


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
