"""Deformable convolution as a layer, in place of detectron2's."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import Tensor, nn

from d2det.ops import modulated_deform_conv2d


class DeformConv2d(nn.Module):
    """Deformable (v1) or modulated deformable (v2) convolution, on any device.

    Calls, parameter names and layout are those of detectron2's `DeformConv` and
    `ModulatedDeformConv`: (x, offset) or (x, offset, mask), followed by norm and activation.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.norm = norm
        self.activation = activation

    @classmethod
    def from_detectron2(cls, layer: Conv2d | DeformConv | ModulatedDeformConv) -> DeformConv2d:
        """A layer with the parameters of one of detectron2's, deformable or plain."""
        return cls(
            layer.weight,
            getattr(layer, "bias", None),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.norm,
            layer.activation,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, Cin, H, W).
            offset: (N, 2 G kh kw, Ho, Wo), y before x.
            mask: (N, G kh kw, Ho, Wo), or None for v1.

        Returns:
            (N, Cout, Ho, Wo).
        """
        x = modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        return f"{shape}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


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
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
    )
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
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
