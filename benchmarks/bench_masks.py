#!/usr/bin/env python3
"""What does an image cost with D2Det's masks, beside detectron2's Mask R-CNN of the same backbone?

Whole detectors (ResNet-50, FPN, COCO's 80 classes, each with its own settings for inference; quick:
the small ones of configs/shapes) from pixels to pasted masks. Weights are random. So that all have
as many proposals, and find as many objects, as a trained detector may, what comes out of the
backbone and of the classifier is replaced by noise of a trained one's size.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import harness
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from harness import Case, Contestant

from d2det import get_cfg

SPREAD = 3.0  # standard deviation of the classifiers' outputs

found: dict[str, int] = {}  # objects, by contestant


def detector(name: str, cfg: Any, args: argparse.Namespace) -> Contestant:
    """A detector on one image of noise."""
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", args.device
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    model.backbone.register_forward_hook(
        lambda _, inputs, maps: {level: features.normal_() for level, features in maps.items()}
    )
    model.roi_heads.box_predictor.cls_score.register_forward_hook(
        lambda _, inputs, logits: logits.normal_(std=SPREAD)
    )
    height, width = args.size
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, device=args.device)

    def call() -> Any:
        instances = model([{"image": image, "height": height, "width": width}])[0]["instances"]
        found[name] = len(instances)
        return [x for x in instances.get_fields().values() if isinstance(x, torch.Tensor)]

    return Contestant(name, call)


def contestants(args: argparse.Namespace) -> list[Contestant]:
    if args.quick:
        masks = get_cfg("shapes/d2det_masks")
        theirs = get_cfg("shapes/detectron2_mask_rcnn")
    else:
        masks = get_cfg("COCO-InstanceSegmentation/d2det_R_50_FPN_2x")
        theirs = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    boxes = masks.clone()
    boxes.MODEL.MASK_ON = False
    return [
        detector("d2det", masks, args),
        detector("d2det, boxes only", boxes, args),
        detector("detectron2's Mask R-CNN", theirs, args),
    ]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1216], metavar=("H", "W"))
    args = parser.parse_args()
    if args.quick:
        args.size = [160, 192]
    case = Case(("x".join(map(str, args.size)),), partial(contestants, args))
    harness.run("Instance segmentation", ["image"], [case], args)
    print(f"objects found: {found}", file=sys.stderr)


if __name__ == "__main__":
    main()
