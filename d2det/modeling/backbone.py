"""ResNets: any depth, width and dilation, deformable on any device, trainable affine norms.

Parameter names are those of detectron2's builder, so that its checkpoints load.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import (
    CNNBlockBase,
    DeformConv,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    ShapeSpec,
)
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from d2det.modeling.deform_conv import DeformConv2d
from d2det.modeling.resnet_blocks import (
    DeformBasicBlock,
    DeformBottleneckBlock,
    DilatedBasicBlock,
)

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@BACKBONE_REGISTRY.register()
def build_d2det_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet or ResNeXt from detectron2's `MODEL.RESNETS` keys and `TRAIN_NORM_AFFINE`.

    Unlike detectron2's own, deformable convolution runs on any device, and R18 and R34 take it, as
    well as RES5_DILATION 2 and any `RES2_OUT_CHANNELS`.

    Raises:
        ValueError: a depth, a dilation or groups that there are no blocks for.
    """
    resnets = cfg.MODEL.RESNETS
    _check(resnets)
    model = ResNet(
        BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM),
        [_build_stage(resnets, index) for index in range(4)],
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    if resnets.TRAIN_NORM_AFFINE:
        train_norm_affine(model, cfg.MODEL.BACKBONE.FREEZE_AT)
    return model


@BACKBONE_REGISTRY.register()
def build_d2det_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """`build_d2det_resnet_backbone` under a feature pyramid, as detectron2 builds it."""
    return FPN(
        bottom_up=build_d2det_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_d2det_resnet_c5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ReducedC5:
    """`build_d2det_resnet_backbone`, conv5 reduced for the RoI heads: DCNv2's detector.

    It is meant for RES5_DILATION 2, OUT_FEATURES ["res4", "res5"], RPN on "res4", RoIs on "c5".
    """
    bottom_up = build_d2det_resnet_backbone(cfg, input_shape)
    return ReducedC5(bottom_up, cfg.MODEL.RESNETS.C5_CHANNELS)


class ReducedC5(Backbone):
    """A ResNet whose "res5" comes out as "c5": a 1 x 1 convolution to few channels, and a ReLU.

    A 7 x 7 RoI of conv5's 2048 channels would need 103 M parameters in the first FC layer.
    """

    def __init__(self, bottom_up: ResNet, channels: int) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self._shapes = dict(bottom_up.output_shape())
        last = self._shapes.pop("res5")
        self._shapes["c5"] = ShapeSpec(channels=channels, stride=last.stride)
        self.reduction = nn.Conv2d(last.channels, channels, kernel_size=1)
        nn.init.normal_(self.reduction.weight, std=0.01)
        nn.init.zeros_(self.reduction.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(x)
        features["c5"] = F.relu_(self.reduction(features.pop("res5")))
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def _check(resnets: CfgNode) -> None:
    if resnets.DEPTH not in BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; choose one of {list(BLOCKS)}")
    if resnets.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION is {resnets.RES5_DILATION}; choose 1 or 2")
    if resnets.DEPTH < 50 and resnets.NUM_GROUPS != 1:
        raise ValueError(
            f"MODEL.RESNETS.NUM_GROUPS is {resnets.NUM_GROUPS}, but the blocks of DEPTH "
            f"{resnets.DEPTH} have no groups; use depth 50 or more"
        )


def _build_stage(resnets: CfgNode, index: int) -> list[CNNBlockBase]:
    """Blocks of stage `index` (0 is res2)."""
    blocks = BLOCKS[resnets.DEPTH][index]
    dilation = resnets.RES5_DILATION if index == 3 else 1
    # Dilation stands for the stride that conv5 gives up (as in R-FCN).
    stride = 1 if index == 0 or dilation == 2 else 2
    out_channels = resnets.RES2_OUT_CHANNELS * 2**index
    deform = resnets.DEFORM_ON_PER_STAGE[index]
    arguments: dict[str, Any] = {"norm": resnets.NORM}
    if resnets.DEPTH >= 50:
        block = DeformBottleneckBlock if deform else BottleneckBlock
        arguments |= {
            "bottleneck_channels": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index,
            "stride_in_1x1": resnets.STRIDE_IN_1X1,
            "num_groups": resnets.NUM_GROUPS,
            "dilation": dilation,
        }
    elif deform or dilation != 1:
        block = DeformBasicBlock if deform else DilatedBasicBlock
        arguments["dilation"] = dilation
    else:
        block = BasicBlock
    if deform:
        arguments |= {
            "deform_modulated": resnets.DEFORM_MODULATED,
            "deform_num_groups": resnets.DEFORM_NUM_GROUPS,
        }
    return ResNet.make_stage(
        block,
        blocks,
        stride_per_block=[stride] + [1] * (blocks - 1),
        in_channels=resnets.STEM_OUT_CHANNELS if index == 0 else out_channels // 2,
        out_channels=out_channels,
        **arguments,
    )


def replace_deform_convs(model: nn.Module) -> None:
    """Put d2det's operator in place of detectron2's GPU-only deformable convolutions.

    For models that detectron2 builds itself; those built here have it already.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (DeformConv, ModulatedDeformConv)):
                setattr(parent, name, DeformConv2d.from_detectron2(child))


def train_norm_affine(model: ResNet, freeze_at: int) -> None:
    """Make scale and shift of frozen BatchNorm trainable, its statistics staying fixed.

    Stages up to `freeze_at` (1 the stem, 2 res2, ...) stay as they are.
    """
    for index, (_, stage) in enumerate(model.named_children(), start=1):
        if index <= freeze_at:
            continue
        for norm in stage.modules():
            if isinstance(norm, FrozenBatchNorm2d):
                for name in ("weight", "bias"):
                    value = norm._buffers.pop(name)
                    setattr(norm, name, nn.Parameter(value))
