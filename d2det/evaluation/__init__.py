"""Evaluators, and what is shown of their results: tables, pictures and curves."""

from __future__ import annotations

from .build import build_evaluator, inference_folder
from .coco import CocoEvaluator
from .pascal_voc import PascalVOCEvaluator
from .uavdt import UAVDTEvaluator

__all__ = [
    "CocoEvaluator",
    "PascalVOCEvaluator",
    "UAVDTEvaluator",
    "build_evaluator",
    "inference_folder",
]
