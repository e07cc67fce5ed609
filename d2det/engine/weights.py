"""ImageNet weights from torchvision, renamed for detectron2's ResNet."""

from __future__ import annotations

import logging
import re

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

PREFIX = "torchvision://"
# torchvision's V2 weights come from another recipe; detectors and their published results use V1.
_DEFAULT_WEIGHTS = "IMAGENET1K_V1"
_STEM = "stem.conv1.weight"
_MODULES = {
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
    "conv2.conv_offset": "conv2_offset",
    "conv2_offset": "conv2_offset",
}


def torchvision_state_dict(url: str) -> dict[str, torch.Tensor]:
    """Weights of a torchvision model, downloaded unless they are in torch's cache.

    Args:
        url: "torchvision://resnet50", "torchvision://resnet50/IMAGENET1K_V2", or an entry of
            torchvision's enumeration: "torchvision://ResNet50_Weights.IMAGENET1K_V2".

    Returns:
        The state dict under torchvision's names.

    Raises:
        ValueError: torchvision has no such weights.
        RuntimeError: they cannot be downloaded.
    """
    import torchvision

    name = url.removeprefix(PREFIX)
    try:
        if "." in name:
            weights = torchvision.models.get_weight(name)
        else:
            model, _, entry = name.partition("/")
            enumeration = torchvision.models.get_model_weights(model)
            weights = torchvision.models.get_weight(
                f"{enumeration.__name__}.{entry or _DEFAULT_WEIGHTS}"
            )
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"MODEL.WEIGHTS {url!r}: torchvision has no such weights ({error}). Examples: "
            "'torchvision://resnet50', 'torchvision://resnet101/IMAGENET1K_V2'."
        ) from error
    try:
        # One process of each machine downloads; the others then find the file in the cache.
        if comm.get_local_rank() == 0:
            state = weights.get_state_dict(progress=True, check_hash=True)
        comm.synchronize()
        if comm.get_local_rank() != 0:
            state = weights.get_state_dict(progress=False)
    except OSError as error:
        raise RuntimeError(
            f"MODEL.WEIGHTS {url!r} cannot be downloaded: {error}. Where there is no network, get "
            f"{getattr(weights, 'url', 'the file')} elsewhere and give its path as MODEL.WEIGHTS."
        ) from error
    return dict(state)


def is_torchvision_resnet(state: dict) -> bool:
    """Whether the names are those of torchvision's ResNets."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def to_detectron2_names(state: dict, model: nn.Module) -> dict:
    """Rename a torchvision ResNet's weights to those of the detectron2 ResNet inside `model`.

    Args:
        state: torchvision's state dict; the counters of its BatchNorm layers are dropped unless the
            model has them too.
        model: any module with one detectron2 ResNet in it, or a ResNet itself.

    Returns:
        A new dict. Names that have no counterpart, such as the classifier's, are kept.

    Raises:
        ValueError: there is no detectron2 ResNet, or more than one.
    """
    names = set(model.state_dict())
    prefixes = [n.removesuffix(_STEM) for n in names if n == _STEM or n.endswith("." + _STEM)]
    if len(prefixes) != 1:
        raise ValueError(
            f"The weights are those of a torchvision ResNet, but the model has {len(prefixes)} "
            "ResNet backbones to load them into; exactly 1 is needed."
        )
    renamed = {}
    for name, value in state.items():
        target = detectron2_name(name)
        target = name if target is None else prefixes[0] + target
        if not target.endswith("num_batches_tracked") or target in names:
            renamed[target] = value
    _check_recipe(model)
    return renamed


def detectron2_name(name: str) -> str | None:
    """'layer1.0.bn2.weight' -> 'res2.0.conv2.norm.weight'; None for what is no backbone layer.

    The offset layers of `d2det.classification` are known too, as 'conv2.conv_offset'.
    """
    stem = re.fullmatch(r"(conv|bn)1\.(\w+)", name)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn' else ''}{stem[2]}"
    layer = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)\.(\w+)", name)
    if not layer:
        return None
    stage, block, module, parameter = layer.groups()
    number = re.fullmatch(r"(conv|bn)(\d)", module)
    if number:
        module = f"conv{number[2]}" + (".norm" if number[1] == "bn" else "")
    elif module in _MODULES:
        module = _MODULES[module]
    else:
        return None
    return f"res{int(stage) + 1}.{block}.{module}.{parameter}"


def _check_recipe(model: nn.Module) -> None:
    """Warn where a model would use torchvision's weights otherwise than they were trained."""
    bottlenecks = [m for m in model.modules() if isinstance(m, BottleneckBlock)]
    if any(block.conv1.stride != (1, 1) for block in bottlenecks):
        logger.warning(
            "torchvision's ResNets have their stride in the 3x3 convolution: set "
            "MODEL.RESNETS.STRIDE_IN_1X1 False."
        )
    std = getattr(model, "pixel_std", None)
    if std is not None and float(std.max()) < 10:
        logger.warning(
            "torchvision's weights expect INPUT.FORMAT 'RGB', MODEL.PIXEL_MEAN [123.675, 116.28, "
            "103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]; this model has PIXEL_STD %s.",
            [round(float(v), 3) for v in std.flatten()],
        )
