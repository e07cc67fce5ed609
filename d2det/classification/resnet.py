"""timm's ResNet with deformable stages, and its registration (DCNv2, Appendix A3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from d2det.core import DeformableConv2d, reset_offsets

V1_STAGES = (False, False, False, True)
V2_STAGES = (False, True, True, True)


class DeformResNet(ResNet):
    """timm's ResNet or ResNeXt, `conv2` of its blocks deformable in the stages chosen.

    That is the 3 x 3 convolution, of the basic block the second. Offsets start at zero and
    modulation at 0.5.

    Args:
        deform_stages: for conv2 to conv5, whether deformable.
        modulated: DCNv2's; else DCNv1's.
        offset_groups: groups of input channels with offsets of their own.
        args, kwargs: timm's.

    Raises:
        ValueError: not as many stages as the network has.
    """

    def __init__(
        self,
        *args: Any,
        deform_stages: Sequence[bool] = V2_STAGES,
        modulated: bool = True,
        offset_groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        stages = [self.get_submodule(i["module"]) for i in self.feature_info[1:]]
        if len(deform_stages) != len(stages):
            raise ValueError(
                f"deform_stages needs one value for each of {len(stages)} stages: {deform_stages}"
            )
        for stage, deform in zip(stages, deform_stages, strict=True):
            for block in stage.children() if deform else ():
                block.conv2 = DeformableConv2d(block.conv2, modulated, offset_groups)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """As timm, but for the offset layers, which start at zero."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                reset_offsets(module.conv_offset)


_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {
        "block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4,
    },
    "resnext101_32x4d": {
        "block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 4,
    },
}  # fmt: skip
_VERSIONS: dict[str, dict[str, Any]] = {
    # Dai et al., ICCV 2017: no modulation, conv5 alone.
    "dcnv1": {"deform_stages": V1_STAGES, "modulated": False},
    # Zhu et al., CVPR 2019: conv3 to conv5.
    "dcnv2": {"deform_stages": V2_STAGES, "modulated": True},
}

MODELS = [f"{name}_{version}" for name in _ARCHITECTURES for version in _VERSIONS]

# Read by `register_model`. There are no weights; images as the paper's, and torchvision's, are.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in MODELS
    }
)


def _register(name: str, settings: dict[str, Any]) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> DeformResNet:
        return build_model_with_cfg(DeformResNet, name, pretrained, **{**settings, **kwargs})

    build.__name__ = build.__qualname__ = name  # the name that timm registers
    build.__doc__ = f"{name}: `DeformResNet` with {settings}; any of its arguments can be given."
    entrypoint: Callable[..., DeformResNet] = build
    globals()[name] = register_model(entrypoint)


for _name, _settings in _ARCHITECTURES.items():
    for _version, _chosen in _VERSIONS.items():
        _register(f"{_name}_{_version}", {**_settings, **_chosen})
