"""Models by name, as torchvision's own builders."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, ResNet101_Weights
from torchvision.models._api import WeightsEnum
from torchvision.ops.misc import FrozenBatchNorm2d

from d2det.torchvision.backbones import deformable_resnet_fpn_backbone
from d2det.torchvision.models import D2Det

DCN_STAGES = ("layer2", "layer3", "layer4")


def _d2det(
    name: str,
    num_classes: int,
    weights_backbone: WeightsEnum | None,
    trainable_backbone_layers: int | None,
    deformable: tuple[str, ...] = (),
    **kwargs: Any,
) -> D2Det:
    scratch = weights_backbone is None
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 5 if scratch else 3
    backbone = deformable_resnet_fpn_backbone(
        name,
        deformable=deformable,
        weights=weights_backbone,
        trainable_layers=trainable_backbone_layers,
        # Random weights need BatchNorm that trains.
        norm_layer=nn.BatchNorm2d if scratch else FrozenBatchNorm2d,
    )
    return D2Det(backbone, num_classes, **kwargs)


def d2det_resnet50_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: ResNet50_Weights | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> D2Det:
    """D2Det on ResNet-50-FPN.

    Args:
        num_classes: with background; 91 as in torchvision's COCO models.
        weights_backbone: ImageNet weights, downloaded by torchvision; None: random ones, with
            BatchNorm that trains.
        trainable_backbone_layers: 0 to 5; 3 with ImageNet weights, else 5.
        kwargs: of `D2Det`.
    """
    return _d2det("resnet50", num_classes, weights_backbone, trainable_backbone_layers, **kwargs)


def d2det_resnet101_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: ResNet101_Weights | None = ResNet101_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> D2Det:
    """D2Det on ResNet-101-FPN; see `d2det_resnet50_fpn`."""
    return _d2det("resnet101", num_classes, weights_backbone, trainable_backbone_layers, **kwargs)


def d2det_resnet50_dcnv2_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: ResNet50_Weights | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> D2Det:
    """D2Det on ResNet-50-DCNv2-FPN (conv3 to conv5 deformable); see `d2det_resnet50_fpn`."""
    return _d2det(
        "resnet50", num_classes, weights_backbone, trainable_backbone_layers, DCN_STAGES, **kwargs
    )


def d2det_resnet101_dcnv2_fpn(
    *,
    num_classes: int = 91,
    weights_backbone: ResNet101_Weights | None = ResNet101_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> D2Det:
    """D2Det on ResNet-101-DCNv2-FPN (conv3 to conv5 deformable); see `d2det_resnet50_fpn`."""
    return _d2det(
        "resnet101", num_classes, weights_backbone, trainable_backbone_layers, DCN_STAGES, **kwargs
    )


def d2det_quickstart(
    *,
    num_classes: int = 7,
    weights_backbone: ResNet18_Weights | None = None,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> D2Det:
    """A D2Det on ResNet-18 small enough to learn generated images on two CPU cores."""
    scratch = weights_backbone is None
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 5 if scratch else 3
    backbone = deformable_resnet_fpn_backbone(
        "resnet18",
        weights=weights_backbone,
        trainable_layers=trainable_backbone_layers,
        returned_layers=(2, 3, 4),  # stride 4 is half of the cost and sees too little
        out_channels=32,
        norm_layer=nn.BatchNorm2d if scratch else FrozenBatchNorm2d,
    )
    return D2Det(
        backbone,
        num_classes,
        **{
            "strides": (8, 16, 32),
            "anchor_sizes": (24, 48, 96, 160),
            "min_size": 160,
            "max_size": 224,
            "rpn_pre_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 200,
            "rpn_post_nms_top_n_train": 150,
            "rpn_post_nms_top_n_test": 150,
            "batch_size_per_image": 32,
            "positive_fraction": 0.5,
            "fc_dim": 128,
            "pooling": {"offset_fc_dim": 128},
            "regression": {"num_conv": 4, "conv_dim": 48, "norm": partial(nn.GroupNorm, 6)},
            **kwargs,
        },
    )
