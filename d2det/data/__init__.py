"""Data sets: one that is drawn here, and any in COCO format. Importing registers the former."""

from __future__ import annotations

from importlib.util import find_spec

from .generated_names import register_generated

if find_spec("detectron2") is not None:
    register_generated()
