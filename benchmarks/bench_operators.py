#!/usr/bin/env python3
"""How long do d2det's operators take beside their peers? Prints one table, with ratios in one run.

Each operator runs with whatever implementation it has here (`python -m d2det.ops` lists them), at
the sizes of D2Det on COCO, smaller with --quick. Times are medians; a ratio above 1 means that
d2det is faster than the peer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from machine import describe
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark import Timer

from d2det import ops
from d2det.core import assign_levels
from d2det.ops._library import implementation

STRIDES = (4, 8, 16, 32)


class Case(NamedTuple):
    """One operator at one size, and its peer; both return a tensor to derive, or None."""

    operator: str
    size: str
    ours: Callable[[], Tensor | None]
    peer_name: str
    peer: Callable[[], Tensor | None]
    differentiable: bool = True


def conv_case(channels: int, height: int, width: int, device: str) -> Case:
    x = torch.randn(1, channels, height, width, device=device, requires_grad=True)
    offset = torch.randn(1, 18, height, width, device=device, requires_grad=True)
    mask = torch.rand(1, 9, height, width, device=device, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3, device=device, requires_grad=True)
    return Case(
        "modulated_deform_conv2d",
        f"{channels} x {height} x {width}",
        lambda: ops.modulated_deform_conv2d(x, offset, mask, weight, padding=1),
        "torchvision deform_conv2d",
        lambda: torchvision.ops.deform_conv2d(x, offset, weight, padding=1, mask=mask),
    )


def pooling_case(rois: int, channels: int, device: str) -> Case:
    maps = [
        torch.randn(1, channels, 800 // s, 1344 // s, device=device, requires_grad=True)
        for s in STRIDES
    ]
    size = 2 ** (4 + 5 * torch.rand(rois, 2, device=device))
    corner = torch.rand(rois, 2, device=device) * (torch.tensor([1344.0, 800.0]).to(size) - size)
    boxes = torch.cat((corner, corner + size), dim=1)
    boxes = torch.cat((boxes.new_zeros(rois, 1), boxes), dim=1)
    levels = assign_levels(boxes[:, 1:], STRIDES)
    scales = [1 / s for s in STRIDES]

    def peer() -> Tensor:
        output = maps[0].new_zeros(rois, channels, 14, 14)
        for level, features in enumerate(maps):
            index = (levels == level).nonzero()[:, 0]
            pooled = torchvision.ops.roi_align(
                features, boxes[index], 14, scales[level], 2, aligned=True
            )
            output = output.index_put((index,), pooled)
        return output

    return Case(
        "deform_roi_pool",
        f"{rois} RoIs, 14 x 14 x {channels}",
        lambda: ops.deform_roi_pool(
            maps, boxes, levels, output_size=14, spatial_scales=scales, sampling_ratio=2
        ),
        "torchvision roi_align by level",
        peer,
    )


def weighting_case(rois: int, channels: int, device: str) -> Case:
    features = torch.randn(rois, channels, 14, 14, device=device, requires_grad=True)
    logits = torch.randn(rois, channels, 14, 14, device=device, requires_grad=True)

    def peer() -> Tensor:
        weights = (12 * logits.sigmoid()).exp()
        total = F.avg_pool2d(features * weights, 3, 2, 1)
        return total / F.avg_pool2d(weights, 3, 2, 1)

    return Case(
        "adaptive_weighted_pool",
        f"{rois} RoIs, 14 x 14 x {channels}",
        lambda: ops.adaptive_weighted_pool(features, logits),
        "eager PyTorch",
        peer,
    )


def soft_nms_case(count: int, classes: int, device: str) -> Case:
    corner = torch.rand(count, 2, device=device) * 200
    boxes = torch.cat((corner, corner + 20 + 60 * torch.rand(count, 2, device=device)), dim=1)
    scores = torch.rand(count, device=device)
    labels = torch.randint(classes, (count,), device=device)

    def ours() -> None:
        ops.soft_nms(boxes, scores, labels, iou_threshold=0.5)

    def peer() -> None:
        """One kept box at a time, vectorised over the rest."""
        left, remaining = scores.clone(), torch.ones_like(scores, dtype=torch.bool)
        while remaining.any():
            best = torch.where(remaining, left, -1.0).argmax()
            remaining[best] = False
            iou = torchvision.ops.box_iou(boxes[best : best + 1], boxes)[0]
            near = remaining & (labels == labels[best]) & (iou > 0.5)
            left = torch.where(near, left * (1 - iou), left)
            remaining &= left >= 1e-3

    return Case("soft_nms", f"{count} boxes, {classes} classes", ours, "loop", peer, False)


def cases(quick: bool, device: str) -> Iterator[Case]:
    yield conv_case(128, *((25, 42) if quick else (100, 168)), device)
    yield pooling_case(64 if quick else 512, 64 if quick else 256, device)
    yield weighting_case(64 if quick else 512, 64 if quick else 256, device)
    yield soft_nms_case(125, 80, device)
    if not quick:
        yield soft_nms_case(2000, 80, device)


def median_ms(function: Callable[[], Tensor | None], backward: bool, seconds: float) -> float:
    def both() -> None:
        output = function()
        assert output is not None
        output.backward(torch.ones_like(output))

    timer = Timer(
        "f()", globals={"f": both if backward else function}, num_threads=torch.get_num_threads()
    )
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for case in cases(args.quick, args.device):
        kind = implementation(case.operator, args.device)
        for backward in (False, True) if case.differentiable else (False,):
            ours = median_ms(case.ours, backward, args.seconds)
            peer = median_ms(case.peer, backward, args.seconds)
            what = "forward + backward" if backward else "forward"
            sizes = [case.operator, kind, case.size, what]
            rows.append(
                [*sizes, f"{ours:.2f}", case.peer_name, f"{peer:.2f}", f"{peer / ours:.2f}"]
            )
    headers = ["operator", "ours is", "size", "", "ms", "peer", "peer ms", "peer / ours"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(f"\nMedians. {describe(args.device)}.")


if __name__ == "__main__":
    main()
