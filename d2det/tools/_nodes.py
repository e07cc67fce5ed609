"""Nodes of a detectron2 detector: a position of a feature map, or a RoI's box-head feature."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn


class FeatureNode(NamedTuple):
    """The position of a feature map that lies over a point of the input.

    `layer` is an output of the backbone ("p4"), a stage of its ResNet ("res5"), or the path of any
    module of the model ("backbone.bottom_up.res4.2").
    """

    layer: str
    x: float
    y: float

    @property
    def center(self) -> tuple[float, float]:
        return self.x, self.y

    @property
    def aspect(self) -> float:
        return 1.0

    def respond(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, C) for normalised images (N, 3, H, W).

        Raises:
            ValueError: an unknown layer, or one whose output is not a feature map.
        """
        features = self._map(model, images)
        height, width = features.shape[-2:]
        column = min(int(self.x * width / images.shape[-1]), width - 1)
        row = min(int(self.y * height / images.shape[-2]), height - 1)
        return features[:, :, row, column]

    def _map(self, model: nn.Module, images: Tensor) -> Tensor:
        modules = dict(model.backbone.named_modules())
        outputs: list[Any] = []
        name = self.layer.removeprefix("backbone.")
        module = modules.get(name) or modules.get(f"bottom_up.{name}")
        if module is None:
            maps = model.backbone(images)
            if self.layer not in maps:
                stages = [n.removeprefix("bottom_up.") for n in modules if n.count(".") <= 1 and n]
                raise ValueError(
                    f"--layer {self.layer}: the backbone gives {sorted(maps)} and has, among other "
                    f"modules, {', '.join(sorted(stages))}"
                )
            return maps[self.layer]
        handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            model.backbone(images)
        finally:
            handle.remove()
        if not outputs or not isinstance(outputs[-1], Tensor) or outputs[-1].ndim != 4:
            raise ValueError(f"--layer {self.layer}: its output is not a feature map")
        return outputs[-1]


class RoINode(NamedTuple):
    """What the box head makes of a box (the paper's 2-fc node)."""

    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def aspect(self) -> float:
        x1, y1, x2, y2 = self.box
        return (x2 - x1) / (y2 - y1)

    def respond(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, C) for normalised images (N, 3, H, W).

        Raises:
            ValueError: the model has no single box head.
        """
        heads = getattr(model, "roi_heads", None)
        pooler, head = getattr(heads, "box_pooler", None), getattr(heads, "box_head", None)
        if pooler is None or head is None or isinstance(head, nn.ModuleList):
            raise ValueError(
                f"--box needs a model with one box head for all RoIs; {type(heads).__name__} is "
                "none: use --point"
            )
        maps = model.backbone(images)
        box = Boxes(torch.tensor([self.box], dtype=torch.float32, device=images.device))
        pooled = pooler([maps[name] for name in heads.box_in_features], [box] * len(images))
        return head(pooled).flatten(1)


Node = FeatureNode | RoINode
