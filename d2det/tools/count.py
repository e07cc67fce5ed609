"""Parameters and FLOPs of detectors: `python -m d2det.tools.count CONFIG ...`.

fvcore counts, one FLOP a multiply-add, as papers do, while the model runs once on the CPU with
random weights. The numbers of RoIs do not depend on them: they are those that the config allows
(RPN.POST_NMS_TOPK_TEST; DETECTIONS_PER_IMAGE for masks).
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import Tensor, nn

from d2det.engine.setup import get_cfg

SAMPLING = "sampling"
DEFORM_CONV = "modulated_deform_conv2d"
PRODUCTS = ("conv", "linear", "addmm", "matmul", "bmm", DEFORM_CONV)  # as fvcore calls them


class Published(NamedTuple):
    """What a paper says of a model: M parameters, and GFLOPs by the image's shorter side."""

    parameters: float
    gflops: Mapping[int, float]


_REGULAR = "DCNv2/faster_rcnn_R_50_C5"
# DCNv2, Tables 1 and 2. The first row has totals, the others what they add to it.
PAPER = {
    _REGULAR: Published(51.3, {800: 196.8, 1000: 326.7}),
    f"{_REGULAR}_dconv_c5": Published(0.2, {}),
    f"{_REGULAR}_dconv_c4-c5": Published(0.4, {}),
    f"{_REGULAR}_dconv_c3-c5": Published(0.5, {}),
    f"{_REGULAR}_dconv_c3-c5_dpool": Published(1.7, {}),
    f"{_REGULAR}_mdconv_c3-c5_mdpool": Published(14.2, {800: 17.9, 1000: 19.5}),
}


class Count(NamedTuple):
    """Of one model on one image.

    Attributes:
        parameters: all of them, frozen ones and BatchNorm's scale and shift included.
        products: multiply-adds of convolutions and FC layers.
        sampling: multiply-adds of bilinear interpolation, four a sample, which papers leave out.
    """

    parameters: int
    products: int
    sampling: int


def count(cfg: CfgNode, height: int, width: int) -> Count:
    """Count a detector that a config describes, on an image of this size.

    Args:
        cfg: of a `GeneralizedRCNN` with `StandardROIHeads`, `DeformableROIHeads` or
            `D2DetROIHeads`; MODEL.DEVICE and MODEL.WEIGHTS are not read.
        height, width: of the image, in pixels, before it is padded as the backbone needs.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    parameters = _count_parameters(model)
    trace = OnePass(model, cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    step = max(1, model.backbone.size_divisibility)
    padded = (-(-side // step) * step for side in (height, width))
    analysis = FlopCountAnalysis(trace, (torch.rand(1, 3, *padded),))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle("d2det::modulated_deform_conv2d", _deform_conv)
    analysis.set_op_handle("d2det::deform_roi_pool", _roi_pool)
    analysis.set_op_handle("torchvision::roi_align", _roi_align)
    with torch.no_grad():
        by_operator = analysis.by_operator()
    products = sum(int(by_operator[name]) for name in PRODUCTS)  # norms, for one, are left out
    return Count(parameters, products, int(by_operator[SAMPLING]))


def _count_parameters(model: nn.Module) -> int:
    total = sum(p.numel() for p in model.parameters())
    # FrozenBatchNorm2d keeps scale and shift as buffers.
    frozen = (
        b.numel() for n, b in model.named_buffers() if n.endswith((".norm.weight", ".norm.bias"))
    )
    return total + sum(frozen)


class OnePass(nn.Module):
    """The layers that a detector runs on one image, on fixed numbers of RoIs."""

    def __init__(self, model: nn.Module, num_rois: int, num_detections: int) -> None:
        super().__init__()
        self.model = model
        self.num_rois = num_rois
        self.num_detections = num_detections

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.model.backbone(image)
        rpn = self.model.proposal_generator
        results = [*chain(*rpn.rpn_head([features[name] for name in rpn.in_features]))]
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        boxes = [_boxes(image, self.num_rois)]
        predictor = heads.box_predictor
        x = heads.box_head(heads.box_pooler(maps, boxes)).flatten(1)
        results.append(predictor.cls_score(x))
        if getattr(heads, "delta_branch", None) is not None:
            results.append(predictor.bbox_pred(heads.delta_branch(maps, boxes).flatten(1)))
        elif hasattr(predictor, "bbox_pred"):
            results.append(predictor.bbox_pred(x))
        if getattr(heads, "dense_head", None) is not None:
            rois = _rois(image, heads.pre_regression_topk)
            dense = heads.dense_head(heads.dense_pooler(maps, rois))
            results += [t for t in dense if t is not None]
        if getattr(heads, "dense_masks", False):
            rois = _rois(image, self.num_detections)
            trunk = heads.dense_head.tower(heads.dense_pooler(maps, rois))
            masks = heads.mask_head.predict(trunk, rois[:, 0].long(), rois[:, 0])
            results += [t for t in masks if t is not None]
        elif heads.mask_on:
            maps = [features[name] for name in heads.mask_in_features]
            boxes = [_boxes(image, self.num_detections)]
            results.append(heads.mask_head.layers(heads.mask_pooler(maps, boxes)))
        return results  # the trace drops what nobody reads


def _boxes(image: Tensor, number: int) -> Boxes:
    """Boxes of all sizes within the image: from which level one is pooled costs the same."""
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    scale = torch.tensor([int(image.shape[3]), int(image.shape[2])])
    return Boxes((corners * scale).flatten(1))


def _rois(image: Tensor, number: int) -> Tensor:
    boxes = _boxes(image, number).tensor
    return torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)


def _deform_conv(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    channels = get_shape(inputs[0])[1]
    _, per_group, *kernel = get_shape(inputs[3])
    batch, _, *size = output = get_shape(outputs[0])
    return Counter(
        {
            DEFORM_CONV: prod(output) * per_group * prod(kernel),
            SAMPLING: 4 * batch * channels * prod(kernel) * prod(size),
        }
    )


def _roi_pool(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    ratio = inputs[7].toIValue()
    return Counter({SAMPLING: 4 * ratio**2 * prod(get_shape(outputs[0]))})


def _roi_align(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    ratio = inputs[5].toIValue()  # 0: as many as the RoI's size asks for; counted as 2
    return Counter({SAMPLING: 4 * (ratio or 2) ** 2 * prod(get_shape(outputs[0]))})


def table(names: Sequence[str], height: int, width: int) -> str:
    """A Markdown table of several configs, each beside what it adds to the first."""
    rows, first = [], None
    for name in names:
        found = count(get_cfg(name), height, width)
        published = PAPER.get(name, Published(float("nan"), {}))
        form = ".1f" if first is None else "+.1f"
        first = first or found
        rows.append(
            [
                name.removeprefix("DCNv2/"),
                f"{found.parameters / 1e6:.1f}",
                f"{(found.parameters - first.parameters) / 1e6:+.2f}",
                f"{published.parameters:{form}}",
                f"{found.products / 1e9:.1f}",
                f"{(found.products - first.products) / 1e9:+.1f}",
                f"{published.gflops.get(min(height, width), float('nan')):{form}}",
                f"{found.sampling / 1e9:.1f}",
            ]
        )
    rows = [["" if cell.endswith("nan") else cell for cell in row] for row in rows]
    header = ["config", "M parameters", "added", "paper", "GFLOPs", "added", "paper", "sampling"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.count", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "configs",
        nargs="*",
        default=list(PAPER),
        help="files, or names below configs/; none: the rows of DCNv2's Table 1",
    )
    parser.add_argument(
        "--size", nargs=2, type=int, default=(800, 1333), metavar=("HEIGHT", "WIDTH")
    )
    args = parser.parse_args(arguments)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    print(table(args.configs, *args.size))


if __name__ == "__main__":
    main()
