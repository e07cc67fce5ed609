"""D2Det in torchvision's R-CNN: images and targets in, losses or predictions out.

The same `d2det.core` heads as in detectron2, for where detectron2 is not installed; parameters of
the RoI heads have the same names in both, so that their state dicts interchange.
"""

from __future__ import annotations

from d2det.torchvision.backbones import (
    deformable_resnet_fpn_backbone,
    fpn_backbone,
    make_deformable,
)
from d2det.torchvision.builders import (
    d2det_quickstart,
    d2det_resnet50_dcnv2_fpn,
    d2det_resnet50_fpn,
    d2det_resnet101_dcnv2_fpn,
    d2det_resnet101_fpn,
)
from d2det.torchvision.models import D2Det
from d2det.torchvision.roi_heads import D2DetRoIHeads

__all__ = [
    "D2Det",
    "D2DetRoIHeads",
    "d2det_quickstart",
    "d2det_resnet50_dcnv2_fpn",
    "d2det_resnet50_fpn",
    "d2det_resnet101_dcnv2_fpn",
    "d2det_resnet101_fpn",
    "deformable_resnet_fpn_backbone",
    "fpn_backbone",
    "make_deformable",
]
