#!/usr/bin/env python3
"""What does an image cost with D2Det's masks, beside detectron2's Mask R-CNN of the same backbone?

Whole detectors (ResNet-50, FPN, COCO's 80 classes, each with its own settings for inference) from
pixels to pasted masks. Weights are random, except that class scores are spread until 100 objects
are found, as many as either may return.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from harness import Case, Contestant

from d2det import get_cfg

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SPREAD = 3.0  # standard deviation of the classifiers' outputs


def detector(name: str, cfg: Any, args: argparse.Namespace) -> Contestant:
    """A detector on one image of noise."""
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", args.device
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    model.roi_heads.box_predictor.cls_score.register_forward_hook(
        lambda _, inputs, logits: logits.normal_(std=SPREAD)
    )
    height, width = args.size
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, device=args.device)

    def call() -> Any:
        found = model([{"image": image, "height": height, "width": width}])[0]["instances"]
        count[name] = len(found)
        return list(found.get_fields().values())[1:]

    return Contestant(name, call)


count: dict[str, int] = {}  # objects that each contestant found


def contestants(args: argparse.Namespace) -> list[Contestant]:
    folder = CONFIGS / "COCO-InstanceSegmentation"
    masks = get_cfg(folder / "d2det_R_50_FPN_2x.yaml")
    boxes = masks.clone()
    boxes.MODEL.MASK_ON = False
    theirs = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    return [
        detector("d2det", masks, args),
        detector("d2det, boxes only", boxes, args),
        detector("detectron2, Mask R-CNN", theirs, args),
    ]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1216], metavar=("H", "W"))
    args = parser.parse_args()
    if args.quick:
        args.size = [128, 160]
    case = Case(("x".join(map(str, args.size)),), partial(contestants, args))
    harness.run("Instance segmentation", ["image"], [case], args)
    if not args.memory_child:
        print(f"Objects found: {count}")


if __name__ == "__main__":
    main()
