"""ResNets for D2Det: any width, trainable affine norms, deformable convolution on any device.

Parameter names are those of detectron2's builder, so that its checkpoints load.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import DeformConv, FrozenBatchNorm2d, ModulatedDeformConv, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import nn

from d2det.modeling.deform_conv import DeformConv2d

BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_d2det_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet from detectron2's `MODEL.RESNETS` keys and `TRAIN_NORM_AFFINE`.

    Unlike detectron2's own, R18 and R34 take any `RES2_OUT_CHANNELS`, and deformable convolution
    runs on d2det's operator, hence on CPU too.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH in BASIC_BLOCKS and resnets.RES2_OUT_CHANNELS != 64:
        model = _build_basic(cfg, input_shape)
    else:
        model = build_resnet_backbone(cfg, input_shape)
    replace_deform_convs(model)
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


def _build_basic(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    resnets = cfg.MODEL.RESNETS
    if any(resnets.DEFORM_ON_PER_STAGE) or resnets.RES5_DILATION != 1 or resnets.NUM_GROUPS != 1:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH {resnets.DEPTH} supports neither deformable stages nor "
            "RES5_DILATION nor NUM_GROUPS; set them to False, 1 and 1, or use depth 50 or more"
        )
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    stages, channels = [], resnets.STEM_OUT_CHANNELS
    for i, blocks in enumerate(BASIC_BLOCKS[resnets.DEPTH]):
        width = resnets.RES2_OUT_CHANNELS * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=width,
                norm=resnets.NORM,
            )
        )
        channels = width
    return ResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def replace_deform_convs(model: nn.Module) -> None:
    """Put d2det's operator in place of detectron2's GPU-only deformable convolutions."""
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
