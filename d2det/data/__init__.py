"""Data sets: one that is drawn here, and any in COCO format. Importing registers the former."""

from __future__ import annotations

from .generated_names import register_generated

register_generated()
