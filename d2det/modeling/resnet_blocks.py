"""Residual blocks that detectron2 lacks: deformable ones for any device, and dilated basic ones.

In each, `conv2` is the deformable convolution and `conv2_offset` predicts its offsets from its
input. Names of parameters are those of detectron2's `DeformBottleneckBlock` and, but for
`conv2_offset`, those of plain blocks: checkpoints of both load.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor

from d2det.core import offset_layer, split_offsets
from d2det.modeling.deform_conv import DeformConv2d


class DilatedBasicBlock(BasicBlock):
    """The block of ResNet-18 and 34, both of its convolutions dilated."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        for conv in (self.conv1, self.conv2):
            conv.padding = conv.dilation = (dilation, dilation)


class DeformBasicBlock(DilatedBasicBlock):
    """The block of ResNet-18 and 34, its second convolution deformable."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.deform_modulated = deform_modulated
        self.conv2_offset = offset_layer(self.conv2, deform_modulated, deform_num_groups)
        self.conv2 = DeformConv2d.from_detectron2(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = self.conv2(out, *split_offsets(self.conv2_offset(out), self.deform_modulated))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DeformBottleneckBlock(BottleneckBlock):
    """The block of ResNet-50 and deeper, and of ResNeXt, its 3 x 3 convolution deformable."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.deform_modulated = deform_modulated
        self.conv2_offset = offset_layer(self.conv2, deform_modulated, deform_num_groups)
        self.conv2 = DeformConv2d.from_detectron2(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = self.conv2(out, *split_offsets(self.conv2_offset(out), self.deform_modulated))
        out = self.conv3(F.relu_(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)
