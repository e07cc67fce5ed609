"""torchvision's ResNets with a feature pyramid, deformable where asked (DCNv1, DCNv2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torchvision.models import get_model
from torchvision.models._api import WeightsEnum
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

from d2det.core import DeformableConv2d

STAGES = ("layer1", "layer2", "layer3", "layer4")


def make_deformable(
    model: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    *,
    modulated: bool = True,
    offset_groups: int = 1,
) -> nn.Module:
    """Make the 3 x 3 convolutions (`conv2`) of a ResNet's stages deformable, in place.

    The convolutions keep their weights; the new parameters are `conv2.conv_offset.{weight,bias}`.

    Args:
        model: a torchvision ResNet or ResNeXt, or what holds its stages.
        stages: of "layer1" to "layer4"; the paper's conv3 to conv5 by default.
        modulated, offset_groups: see `d2det.core.DeformableConv2d`.

    Returns:
        The model.

    Raises:
        ValueError: a stage that the model does not have.
    """
    for stage in stages:
        blocks = getattr(model, stage, None) if stage in STAGES else None
        if blocks is None:
            raise ValueError(f"the model has no stage {stage!r}; choose among {STAGES}")
        for block in blocks:
            block.conv2 = DeformableConv2d(block.conv2, modulated, offset_groups)
    return model


def deformable_resnet_fpn_backbone(
    backbone_name: str,
    *,
    deformable: Sequence[str] = (),
    modulated: bool = True,
    weights: WeightsEnum | None = None,
    norm_layer: Callable[..., nn.Module] = FrozenBatchNorm2d,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] = (1, 2, 3, 4),
    out_channels: int = 256,
) -> BackboneWithFPN:
    """torchvision's `resnet_fpn_backbone`, with deformable stages and a choice of channels.

    Args:
        backbone_name: "resnet18" to "resnet152", "resnext101_32x8d", ...
        deformable: stages to make deformable, see `make_deformable`.
        modulated: DCNv2, else DCNv1.
        weights: torchvision's ImageNet weights, downloaded by torchvision; None for random ones.
        norm_layer: fixed statistics by default, as fine-tuning on few images a step wants.
        trainable_layers: stages that train, from the last one back; 5 is all of them.
        returned_layers: stages under the pyramid, 1 (stride 4) to 4 (stride 32).
        out_channels: of every level.
    """
    resnet = get_model(backbone_name, weights=weights, norm_layer=norm_layer)
    if not isinstance(resnet, ResNet):
        raise ValueError(f"{backbone_name!r} is not a ResNet")
    return fpn_backbone(
        make_deformable(resnet, deformable, modulated=modulated),
        trainable_layers=trainable_layers,
        returned_layers=returned_layers,
        out_channels=out_channels,
    )


def fpn_backbone(
    resnet: nn.Module,
    *,
    trainable_layers: int = 5,
    returned_layers: Sequence[int] = (1, 2, 3, 4),
    out_channels: int = 256,
) -> BackboneWithFPN:
    """A ResNet under a feature pyramid; its levels are called "0", "1", ... and "pool".

    Raises:
        ValueError: `trainable_layers` outside of 0 to 5.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must lie in 0 to 5, got {trainable_layers}")
    frozen = ("conv1", "bn1", *STAGES)[: 6 - trainable_layers if trainable_layers < 5 else 0]
    for name, parameter in resnet.named_parameters():
        # Offsets of frozen stages start at zero: they have to be learnt.
        if name.partition(".")[0] in frozen and "conv_offset" not in name:
            parameter.requires_grad_(False)
    widest = max(p.shape[0] for name, p in resnet.named_parameters() if name.startswith("layer4."))
    return BackboneWithFPN(
        resnet,
        {f"layer{k}": str(i) for i, k in enumerate(returned_layers)},
        [widest // 2 ** (4 - k) for k in returned_layers],
        out_channels,
    )
