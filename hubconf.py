"""Entry points of torch.hub: `torch.hub.load("<owner>/<repository>", "d2det_resnet50_fpn")`.

The `d2det_...` models are those of the torchvision host and need no detectron2; `d2det` gives any
model of the zoo in detectron2. In a clone: `torch.hub.load(".", ..., source="local")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2det.torchvision import (  # noqa: F401  the entry points
    d2det_quickstart,
    d2det_resnet50_dcnv2_fpn,
    d2det_resnet50_fpn,
    d2det_resnet101_dcnv2_fpn,
    d2det_resnet101_fpn,
)

# torch.hub takes every callable of this file for an entry point.
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from torch import nn

dependencies = ["torch", "torchvision", "numpy"]


def d2det(config_name: str, weights: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A detectron2 model of the zoo, in evaluation mode; needs detectron2.

    Args:
        config_name: e.g. "COCO-Detection/d2det_R_50_FPN_2x"; `d2det.model_zoo.names()` lists all.
        weights: of the whole model: a file, an output folder, or an address with `sha256`; None:
            random values.
        kwargs: `device`, `sha256` and `overrides` of `d2det.model_zoo.get`.
    """
    from d2det import model_zoo

    return model_zoo.get(config_name, weights, **kwargs)
