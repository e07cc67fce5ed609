"""Numbers from detections beside ground truth: NumPy arrays in and out, no framework.

Average precision as PASCAL VOC, COCO and UAVDT's toolkit define it, and what it is lost to.
"""

from __future__ import annotations

from .coco_files import read_detections, read_ground_truth
from .errors import AREAS, SETTINGS, error_curves
from .objects import Detections, GroundTruth
from .voc import average_precision, voc_average_precision

__all__ = [
    "AREAS",
    "Detections",
    "GroundTruth",
    "SETTINGS",
    "average_precision",
    "error_curves",
    "read_detections",
    "read_ground_truth",
    "voc_average_precision",
]
