"""Makes a detector's backbone of a classifier: `python -m d2det.tools.convert_classifier IN OUT`.

IN is a checkpoint of a ResNet or ResNeXt in timm's or torchvision's form, plain or deformable
(`d2det.classification`): as timm's or torchvision's training scripts write it, or a state dict. OUT
(.pth or .pkl) is for MODEL.WEIGHTS, offsets and modulation included. Every tensor is accounted for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor

from d2det.engine.setup import get_cfg
from d2det.engine.weights import detectron2_name
from d2det.modeling.backbone import BLOCKS
from d2det.tools._conversion import (
    Conversion,
    ConversionError,
    check_format,
    find_state_dict,
    read_checkpoint,
    write_weights,
)

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_TAPS = 9


def convert(state: Mapping[str, Tensor], cfg: CfgNode | None = None) -> Conversion:
    """Rename a classifier's tensors to those of `build_d2det_resnet_backbone`.

    Args:
        state: of a ResNet or ResNeXt, under any one prefix, such as "module.".
        cfg: of a detector that the result has to fit; only its backbone is looked at. It may be
            deformable where the classifier is plain: the offset layers are then missing.

    Raises:
        ConversionError: not a ResNet that the backbone builder has, or not the config's.
    """
    prefix = _prefix(state)
    inner = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    expected = _backbone_shapes(backbone_cfg(inner))
    done = Conversion()
    for name, value in state.items():
        bare = name.removeprefix(prefix) if name.startswith(prefix) else ""
        target = detectron2_name(bare)
        if not bare:
            done.left[name] = "outside the network"
        elif bare.startswith("fc."):
            done.left[name] = "the classifier"
        elif bare.endswith("num_batches_tracked"):
            done.left[name] = "BatchNorm's counter, which detection does not read"
        elif target not in expected:
            raise ConversionError(
                f"{name}: the backbone has nothing of that kind. Deep stems, pooled shortcuts, "
                "squeeze and excitation and the like are not supported"
            )
        else:
            _check_shape(name, value, expected[target])
            done.take(name, target, value)
    lacking = [name for name in expected if name not in done.state]
    if lacking:
        raise ConversionError(f"the file is not whole: nothing for {', '.join(lacking[:5])}")
    if cfg is not None:
        _check_fit(done, cfg)
    return done


def backbone_cfg(state: Mapping[str, Tensor]) -> CfgNode:
    """The config of the backbone that a classifier's weights are those of.

    Args:
        state: in torchvision's names, without a prefix.

    Raises:
        ConversionError: there is none.
    """
    blocks = tuple(
        len({m[1] for n in state if (m := re.match(rf"{stage}\.(\d+)\.", n))}) for stage in _STAGES
    )
    bottleneck = "layer1.0.conv3.weight" in state
    depths = [d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths:
        raise ConversionError(
            f"the network has {blocks} blocks {'with' if bottleneck else 'without'} a bottleneck: "
            f"no ResNet of depth {', '.join(map(str, BLOCKS))}"
        )
    first, second = _weight(state, "layer1.0.conv1.weight"), _weight(state, "layer1.0.conv2.weight")
    last = _weight(state, f"layer1.0.conv{3 if bottleneck else 2}.weight")
    groups = first.shape[0] // second.shape[1]
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_d2det_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.OUT_FEATURES = ["res5"]
    resnets.DEPTH = depths[0]
    resnets.NORM = "FrozenBN" if "bn1.running_mean" in state else "GN"
    resnets.NUM_GROUPS = groups
    resnets.WIDTH_PER_GROUP = first.shape[0] // groups
    resnets.STRIDE_IN_1X1 = False
    resnets.STEM_OUT_CHANNELS = _weight(state, "conv1.weight").shape[0]
    resnets.RES2_OUT_CHANNELS = last.shape[0]
    offsets = [_offsets(state, stage) for stage in _STAGES]
    resnets.DEFORM_ON_PER_STAGE = [found is not None for found in offsets]
    kinds = {found for found in offsets if found is not None}
    if len(kinds) > 1:
        raise ConversionError("the offset layers of the stages are of several kinds")
    for modulated, offset_groups in kinds:
        resnets.DEFORM_MODULATED, resnets.DEFORM_NUM_GROUPS = modulated, offset_groups
    return cfg


def _offsets(state: Mapping[str, Tensor], stage: str) -> tuple[bool, int] | None:
    """Whether a stage's offset layers have modulation, and their groups; None: it has none."""
    for name, value in state.items():
        if re.fullmatch(rf"{stage}\.\d+\.(conv2\.conv|conv2)_offset\.weight", name):
            for modulated in (True, False):
                groups, rest = divmod(value.shape[0], (3 if modulated else 2) * _TAPS)
                # 54 channels could be 2 groups of 27 or 3 of 18: groups divide the input's.
                if rest == 0 and value.shape[1] % groups == 0:
                    return modulated, groups
            raise ConversionError(f"{name} has {value.shape[0]} channels: no multiple of 18 or 27")
    return None


def _prefix(state: Mapping[str, Tensor]) -> str:
    """What all names of the network begin with: "", "module.", ..."""
    marks = ("conv1.weight", "layer1.0.conv1.weight")
    found = [
        name.removesuffix(marks[1])
        for name in state
        if name.endswith(marks[1]) and name.removesuffix(marks[1]) + marks[0] in state
    ]
    if len(found) != 1:
        raise ConversionError(
            f"the file holds {len(found) or 'no'} ResNets in the form of timm or torchvision (with "
            f"{' and '.join(marks)}); its names are like {', '.join(list(state)[:3])}"
        )
    return found[0]


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ConversionError(f"the file is not whole: it has no {name}")
    return state[name]


def _backbone_shapes(cfg: CfgNode) -> dict[str, torch.Size]:
    """Shapes of the ResNet's tensors in a config's backbone, without BatchNorm's counters."""
    with torch.device("meta"):
        state = build_backbone(cfg).state_dict()
    stem = "stem.conv1.weight"
    prefixes = [name.removesuffix(stem) for name in state if name.endswith(stem)]
    if len(prefixes) != 1:
        raise ConversionError(f"the backbone {cfg.MODEL.BACKBONE.NAME} is no ResNet")
    return {
        name.removeprefix(prefixes[0]): value.shape
        for name, value in state.items()
        if re.match(r"(stem|res[2-5])\.", name.removeprefix(prefixes[0]))
        and not name.endswith("num_batches_tracked")
    }


def _check_shape(name: str, value: Tensor, wanted: torch.Size) -> None:
    if value.shape != wanted:
        raise ConversionError(f"{name} is {tuple(value.shape)}, the backbone's {tuple(wanted)}")


def _check_fit(done: Conversion, cfg: CfgNode) -> None:
    """Compare with a detector's backbone; note the offset layers that it has in addition."""
    expected = _backbone_shapes(cfg)
    stages = {name.partition(".")[0] for name in expected}
    for source, target in done.used.items():
        if target in expected:
            _check_shape(source, done.state[target], expected[target])
        elif target.partition(".")[0] in stages:  # else it is for a head, as in detectron2's C4
            raise ConversionError(f"{source}: the config's backbone has no {target}")
    for name in (n for n in expected if n not in done.state):
        if ".conv2_offset." not in name:
            raise ConversionError(f"the config's backbone has {name}, the classifier does not")
        done.missing[name] = "starts at zero"


def settings(cfg: CfgNode, weights: str) -> str:
    """The lines of a detector's config that go with the weights."""
    usual, resnets = get_cfg().MODEL.RESNETS, cfg.MODEL.RESNETS
    keys = [key for key in resnets if resnets[key] != usual[key] or key == "DEPTH"]
    lines = [f"    {key}: {resnets[key]}" for key in keys if key not in ("OUT_FEATURES", "NORM")]
    lines += ['    NORM: "GN"'] if resnets.NORM == "GN" else []
    return "\n".join(["MODEL:", f'  WEIGHTS: "{weights}"', "  RESNETS:", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    try:
        check_format(args.output)
        cfg = get_cfg(args.config_file) if args.config_file else None
        content = read_checkpoint(args.input)
        state, key = find_state_dict(content, args.weights)
        done = convert(state, cfg)
        write_weights(args.output, done.state, author=f"d2det, from {args.input.rsplit('/')[-1]}")
    except (ConversionError, FileNotFoundError) as error:
        sys.exit(f"error: {args.input}: {error}")
    print(f"{args.input}{f', {key}' if key else ''}{_architecture(content)}")
    print(done.report(every_tensor=not args.quiet))
    inner = _prefix(state)
    found = backbone_cfg({n.removeprefix(inner): v for n, v in state.items()})
    print(f"\nWritten: {args.output}. In the detector's config:\n{settings(found, args.output)}")


def _architecture(content: Mapping[str, Any]) -> str:
    return f", saved as {content['arch']}" if isinstance(content.get("arch"), str) else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.convert_classifier", description=__doc__.splitlines()[0]
    )
    parser.add_argument("input", metavar="IN", help="a classifier's checkpoint")
    parser.add_argument("output", metavar="OUT", help="a file ending in .pth or .pkl")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "plain"),
        default="auto",
        help="the moving average or not; auto (default): the average where there is one",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="also check that the weights fit this detector"
    )
    parser.add_argument("--quiet", action="store_true", help="only count the tensors used")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
