"""Data sets: one that is drawn here, any in COCO format, and VOC's segmentation.

Importing registers the first and the last.
"""

from __future__ import annotations

from importlib.util import find_spec

from .generated_names import register_generated
from .voc_segmentation import register_builtin

if find_spec("detectron2") is not None:
    register_generated()
    register_builtin()
