#!/usr/bin/env python3
"""How long does soft-NMS take, beside a PyTorch loop over the kept boxes?

The boxes of one image; the loop takes one box at a time and is vectorised over those that are left.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import harness
import torch
from harness import Case, Contestant
from torch import Tensor
from torchvision.ops import box_iou

from d2det import ops
from d2det.ops._library import references

THRESHOLD, MIN_SCORE = 0.5, 1e-3


def loop(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Linear soft-NMS, one kept box at a time.

    Boxes that have gone are masked: leaving them out of the tensors took longer at all sizes here.
    """
    left, remaining = scores.clone(), torch.ones_like(scores, dtype=torch.bool)
    kept = []
    while remaining.any():
        best = torch.where(remaining, left, -1.0).argmax()
        kept.append(best)
        remaining[best] = False
        overlap = box_iou(boxes[best, None], boxes)[0]
        near = remaining & (classes == classes[best]) & (overlap > THRESHOLD)
        left = torch.where(near, left * (1 - overlap), left)
        remaining &= left >= MIN_SCORE
    index = torch.stack(kept)
    return index, left[index]


def contestants(count: int, classes: int, device: str) -> list[Contestant]:
    corner = torch.rand(count, 2, device=device) * 200
    boxes = torch.cat((corner, corner + 20 + 60 * torch.rand(count, 2, device=device)), dim=1)
    scores = torch.rand(count, device=device)
    labels = torch.randint(classes, (count,), device=device)
    settings = (THRESHOLD, "linear", 0.5, MIN_SCORE)
    return [
        Contestant(
            harness.ours("soft_nms", device),
            lambda: ops.soft_nms(boxes, scores, labels, iou_threshold=THRESHOLD),
        ),
        Contestant("PyTorch loop", lambda: loop(boxes, scores, labels)),
        Contestant(
            "reference (all classes at once)",
            lambda: references["soft_nms"](boxes, scores, labels, *settings),
        ),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for count in [20] if args.quick else args.boxes:
        for classes in args.classes:
            yield Case(
                (str(count), str(classes)), partial(contestants, count, classes, args.device)
            )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--boxes", nargs="+", type=int, default=[125, 2000])
    parser.add_argument("--classes", nargs="+", type=int, default=[80, 1])
    args = parser.parse_args()
    harness.run("Soft-NMS", ["boxes", "classes"], list(cases(args)), args)


if __name__ == "__main__":
    main()
