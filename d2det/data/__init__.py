"""Data sets: one that is drawn here, some with names, and any in COCO format.

Importing registers the drawn one and those with names.
"""

from __future__ import annotations

from .generated_names import register_generated
from .named import register_named

register_generated()
register_named()
