"""Data sets: one that is drawn here, some with names, and any in COCO format.

Importing registers the drawn one and those with names.
"""

from __future__ import annotations

from importlib.util import find_spec

from .generated_names import register_generated
from .uavdt_names import register_uavdt

if find_spec("detectron2") is not None:
    from .named import register_named
    from .voc_segmentation import register_builtin

    register_generated()
    register_named()
    register_uavdt()
    register_builtin()
