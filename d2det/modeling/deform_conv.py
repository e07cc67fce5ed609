"""Deformable convolution as a layer, in place of detectron2's."""

from __future__ import annotations

from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from torch import Tensor, nn

from d2det.core.deformable_conv import offset_layer, split_offsets
from d2det.ops import modulated_deform_conv2d

__all__ = ["DeformConv2d", "offset_layer", "split_offsets"]


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
