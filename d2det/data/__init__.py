"""Data sets: one that is drawn here, UAVDT, and any in COCO format. Importing registers names."""

from __future__ import annotations

from .generated_names import register_generated
from .uavdt_names import register_uavdt

register_generated()
register_uavdt()
