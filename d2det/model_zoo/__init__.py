"""The project's detectors by name: their configs, models and LazyConfigs, for detectron2.

>>> from d2det import model_zoo
>>> model_zoo.names()
>>> model = model_zoo.get("COCO-Detection/d2det_R_50_FPN_2x", weights="model_final.pth")

Importing this module downloads nothing, and leaves detectron2 to be imported on first use.
"""

from __future__ import annotations

from d2det.model_zoo.models import get, get_config, get_lazy_config, names
from d2det.model_zoo.weights import WEIGHTS, Weights, fetch

__all__ = ["WEIGHTS", "Weights", "fetch", "get", "get_config", "get_lazy_config", "names"]
