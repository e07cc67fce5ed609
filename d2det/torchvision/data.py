"""COCO-format data for torchvision's detectors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2


class CocoBoxes(CocoDetection):
    """Images (3, H, W) in [0, 1] and targets of a COCO-format data set.

    A target has "boxes" (G, 4) in pixels, "labels" (G,) int64 from 1, in the order of the file's
    categories, and "image_id". Crowd regions are left out; boxes are clipped to the image, those
    without area left out.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        train: leave out images without objects and flip half of the others.

    Raises:
        FileNotFoundError, ValueError: a file or folder that is not there; no categories; in
            training, no objects.
    """

    def __init__(
        self, json_file: str | os.PathLike[str], image_root: str | os.PathLike[str], *, train: bool
    ) -> None:
        for path in (json_file, image_root):
            if not Path(path).exists():
                raise FileNotFoundError(f"{path} does not exist")
        super().__init__(str(image_root), str(json_file))
        categories = self.coco.loadCats(self.coco.getCatIds())
        if not categories:
            raise ValueError(f"{json_file} has no categories")
        self.class_names = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self._labels = {category: i for i, category in enumerate(self.category_ids, start=1)}
        if train:
            self.ids: list[int] = [i for i in sorted(self.coco.imgs) if len(self._boxes(i)[1])]
            if not self.ids:
                raise ValueError(f"no image of {json_file} has an object to learn from")
        self._augment: Any = v2.RandomHorizontalFlip() if train else None

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image_id = self.ids[index]
        image = v2.functional.to_image(self._load_image(image_id))
        boxes, labels = self._boxes(image_id)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])
            ),
            "labels": labels,
            "image_id": image_id,
        }
        if self._augment is not None:
            image, target = self._augment(image, target)
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        return v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), target

    def _boxes(self, image_id: int) -> tuple[Tensor, Tensor]:
        info = self.coco.imgs[image_id]
        objects = [a for a in self.coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        corners = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        limit = torch.tensor([info["width"], info["height"]], dtype=torch.float32).repeat(2)
        corners = corners.clamp(min=0).minimum(limit)
        labels = torch.tensor([self._labels[a["category_id"]] for a in objects], dtype=torch.int64)
        kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        return corners[kept], labels[kept]


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[Any]]:
    """Lists of images and targets, as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
