"""Makes the authors' weights ours: `python -m d2det.tools.convert_official IN.pth OUT.pth`.

IN is a checkpoint of D2Det's releases: of the first (mmdetection 1.x), whose trained weights were
published, or one that somebody trained with the second (mmdetection 2.1). OUT is for MODEL.WEIGHTS
of the config that the command names, one of `*_official.yaml`. Every tensor is accounted for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from d2det.engine.setup import get_cfg
from d2det.engine.weights import detectron2_name
from d2det.tools._conversion import (
    Conversion,
    ConversionError,
    check_format,
    find_state_dict,
    read_checkpoint,
    write_weights,
)


class Source(NamedTuple):
    """What a checkpoint is of."""

    release: int  # 1 or 2
    depth: int  # of the ResNet
    deformable: bool
    masks: bool
    num_classes: int  # K
    num_convs: int  # of the regression tower

    @property
    def config(self) -> str:
        """Name of the config for its weights."""
        folder = "COCO-InstanceSegmentation" if self.masks else "COCO-Detection"
        dcn = "_DCNv2" if self.deformable else ""
        return f"{folder}/d2det_R_{self.depth}{dcn}_FPN_official"

    @property
    def overrides(self) -> list[str]:
        """Keys and values that the config needs besides."""
        given: dict[str, object] = {}
        if self.num_classes != 80:
            given["MODEL.ROI_HEADS.NUM_CLASSES"] = self.num_classes
        if self.num_convs != 8:
            given["MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV"] = self.num_convs
        if self.release == 2:  # its boxes end behind their last pixel, as detectron2's do
            given |= {
                "MODEL.ROI_HEADS.INCLUSIVE_BOXES": False,
                "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
            }
        return [str(part) for item in given.items() for part in item]


_DEPTHS = {6: 50, 23: 101}  # blocks of layer3
# The releases' modules, by pattern, and ours. The first number of a name is available as {0}, ...
_MODULES = (
    (r"neck\.lateral_convs\.(\d)\.conv", "backbone.fpn_lateral{0+2}"),
    (r"neck\.fpn_convs\.(\d)\.conv", "backbone.fpn_output{0+2}"),
    (r"rpn_head\.rpn_conv", "proposal_generator.rpn_head.conv"),
    (r"rpn_head\.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn_head\.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    (r"bbox_head\.shared_fcs\.(\d)", "roi_heads.box_head.fc{0+1}"),
    (r"bbox_head\.fc_cls", "roi_heads.box_predictor.cls_score"),
    (
        r"bbox_roi_extractor\.roi_layers\.(\d)\.awp\.weight\.conv",
        "roi_heads.box_pooler.levels.{0}.weights.conv",
    ),
    (
        r"bbox_roi_extractor\.roi_layers\.(\d)\.awp\.weight\.bn",
        "roi_heads.box_pooler.levels.{0}.weights.norm",
    ),
    (
        r"bbox_roi_extractor\.roi_layers\.(\d)\.offset_fc\.(\d)",
        "roi_heads.box_pooler.levels.{0}.offsets.{1+1}",
    ),
    (r"D2Det_head\.convs\.(\d)\.conv", "roi_heads.dense_head.tower.{0*3}"),
    (r"D2Det_head\.convs\.(\d)\.gn", "roi_heads.dense_head.tower.{0*3+1}"),
    (r"D2Det_head\.D2Det_reg", "roi_heads.dense_head.offset_predictor"),
    (r"D2Det_head\.D2Det_mask", "roi_heads.dense_head.overlap_predictor"),
    (r"D2Det_head\.(deconv1|norm1|deconv2)", "roi_heads.mask_head.masks.{0}"),
    (r"D2Det_head\.D2Det_instance", "roi_heads.mask_head.masks.predictor"),
    (r"D2Det_head\.fcs\.(\d)", "roi_heads.mask_head.scorer.fcs.{0}"),
    (r"D2Det_head\.fc_instance_iou", "roi_heads.mask_head.scorer.predictor"),
)


def convert(state: Mapping[str, Tensor]) -> tuple[Conversion, Source]:
    """Rename the tensors of a released D2Det and put their rows in our order.

    Background becomes the last class (the first release has it first); offsets left, right, top,
    bottom become left, top, right, bottom; masks of background are left out.

    Args:
        state: in the releases' names.

    Returns:
        The tensors in the names of our detectron2 model, with all that became of the old ones, and
        what the checkpoint is of.

    Raises:
        ConversionError: it is not a D2Det, or not a whole one.
    """
    source = identify(state)
    cfg = get_cfg(source.config)
    cfg.merge_from_list(source.overrides)
    expected = _model_shapes(cfg)
    done = Conversion()
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            done.left[name] = "BatchNorm's counter, which detection does not read"
            continue
        target = official_name(name.removeprefix("roi_head."))
        if target not in expected:
            raise ConversionError(f"{name}: {source.config} has nothing of that kind")
        value = _reorder(target, value, source)
        if value.shape != expected[target]:
            raise ConversionError(
                f"{name} gives {tuple(value.shape)}, where {target} of {source.config} is "
                f"{tuple(expected[target])}"
            )
        done.take(name, target, value)
    lacking = [name for name in expected if name not in done.state]
    if lacking:
        raise ConversionError(f"the file is not whole: nothing for {', '.join(lacking[:5])}")
    return done, source


def identify(state: Mapping[str, Tensor]) -> Source:
    """Find out which release, backbone and heads a state dict is of.

    Raises:
        ConversionError: of none.
    """
    prefix = "roi_head." if any(name.startswith("roi_head.") for name in state) else ""
    marks = ("backbone.conv1.weight", f"{prefix}D2Det_head.D2Det_reg.weight")
    marks += (f"{prefix}bbox_head.fc_cls.weight",)
    absent = [name for name in marks if name not in state]
    if absent:
        raise ConversionError(
            f"this is no D2Det of the releases: it has no {', '.join(absent)}; its names are like "
            f"{', '.join(list(state)[:3])}"
        )
    blocks = len({m[1] for n in state if (m := re.match(r"backbone\.layer3\.(\d+)\.", n))})
    if blocks not in _DEPTHS:
        raise ConversionError(
            f"the backbone has {blocks} blocks in layer3: the releases have "
            f"{' or '.join(map(str, _DEPTHS))} (ResNet-50, ResNet-101)"
        )
    deformable = any("conv_offset" in name or "conv2_offset" in name for name in state)
    if deformable and _DEPTHS[blocks] == 50:
        raise ConversionError("there is no config for released weights with a deformable ResNet-50")
    masks = f"{prefix}D2Det_head.D2Det_instance.weight" in state
    if masks and (deformable or _DEPTHS[blocks] == 50):
        raise ConversionError("there is no config for released masks but with a plain ResNet-101")
    return Source(
        release=2 if prefix else 1,
        depth=_DEPTHS[blocks],
        deformable=deformable,
        masks=masks,
        num_classes=state[marks[2]].shape[0] - 1,
        num_convs=len({m[1] for n in state if (m := re.search(r"D2Det_head\.convs\.(\d+)\.", n))}),
    )


def official_name(name: str) -> str | None:
    """Our name of a released tensor (without "roi_head."); None for what is unknown."""
    if name.startswith("backbone."):
        inner = detectron2_name(name.removeprefix("backbone."))
        return None if inner is None else f"backbone.bottom_up.{inner}"
    module, _, parameter = name.rpartition(".")
    for pattern, template in _MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            return re.sub(r"\{([^}]+)\}", _fill(match.groups()), template) + f".{parameter}"
    return None


def _fill(groups: Sequence[str]) -> Callable[[re.Match[str]], str]:
    """What replaces {0}, {0+2}, {0*3} or {0*3+1}: a group of the pattern, or a number from it."""

    def fill(field: re.Match[str]) -> str:
        parts = re.fullmatch(r"(\d)(?:\*(\d))?(?:\+(\d))?", field[1])
        assert parts is not None
        value = groups[int(parts[1])]
        if parts[2] is None and parts[3] is None:
            return value
        return str(int(value) * int(parts[2] or 1) + int(parts[3] or 0))

    return fill


def _reorder(target: str, value: Tensor, source: Source) -> Tensor:
    """Rows in our order."""
    module = target.rpartition(".")[0]
    if module == "roi_heads.dense_head.offset_predictor" and len(value) == 4:
        return value[[0, 2, 1, 3]]
    if module == "roi_heads.box_predictor.cls_score" and source.release == 1:
        return value.roll(-1, dims=0)
    if module in ("roi_heads.mask_head.masks.predictor", "roi_heads.mask_head.scorer.predictor"):
        return value[1:] if source.release == 1 else value[:-1]
    return value


def _model_shapes(cfg: CfgNode) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).state_dict()
    return {
        name: value.shape
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.convert_official", description=__doc__.splitlines()[0]
    )
    parser.add_argument("input", metavar="IN", help="a checkpoint of D2Det's releases")
    parser.add_argument("output", metavar="OUT", help="a file ending in .pth or .pkl")
    parser.add_argument("--quiet", action="store_true", help="only count the tensors used")
    args = parser.parse_args(arguments)
    try:
        check_format(args.output)
        state, _ = find_state_dict(read_checkpoint(args.input), "plain")
        done, source = convert(state)
        author = f"d2det, from {args.input.rsplit('/')[-1]}"
        write_weights(args.output, done.state, author, by_ending=False)
    except ConversionError as error:
        sys.exit(f"error: {args.input}: {error}")
    print(f"{args.input}: release {source.release}, ResNet-{source.depth}")
    print(done.report(every_tensor=not args.quiet))
    keys = " ".join(["MODEL.WEIGHTS", args.output, *source.overrides])
    print(f"\nWritten: {args.output}. Use it with\n    --config-file {source.config} {keys}")


if __name__ == "__main__":
    main()
