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
    categories, "image_id" and, if asked for, "masks" (G, H, W) uint8. Crowd regions are left out;
    boxes are clipped to the image, those without area left out.

    Args:
        json_file: annotations.
        image_root: folder of the images.
        train: leave out images without objects and flip half of the others.
        masks: read masks too; every object needs one.

    Raises:
        FileNotFoundError, ValueError: a file or folder that is not there; no categories; in
            training, no objects.
    """

    def __init__(
        self,
        json_file: str | os.PathLike[str],
        image_root: str | os.PathLike[str],
        *,
        train: bool,
        masks: bool = False,
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
            self.ids: list[int] = [i for i in sorted(self.coco.imgs) if len(self._objects(i)[1])]
            if not self.ids:
                raise ValueError(f"no image of {json_file} has an object to learn from")
        self._masks = masks
        if masks:
            bare = [a["id"] for a in self.coco.anns.values() if not a.get("segmentation")]
            if bare:
                raise ValueError(
                    f"{len(bare)} annotations of {json_file} have no segmentation, the first with "
                    f"id {bare[0]}: train boxes alone, or use the detectron2 host, which takes both"
                )
        self._augment: Any = v2.RandomHorizontalFlip() if train else None

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image_id = self.ids[index]
        image = v2.functional.to_image(self._load_image(image_id))
        boxes, labels, objects = self._objects(image_id)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])
            ),
            "labels": labels,
            "image_id": image_id,
        }
        if self._masks:
            height, width = image.shape[-2:]
            drawn = [torch.from_numpy(self.coco.annToMask(a)) for a in objects]
            target["masks"] = tv_tensors.Mask(
                torch.stack(drawn) if drawn else torch.zeros(0, height, width, dtype=torch.uint8)
            )
        if self._augment is not None:
            image, target = self._augment(image, target)
        for name in ("boxes", "masks") if self._masks else ("boxes",):
            target[name] = target[name].as_subclass(Tensor)
        return v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), target

    def _objects(self, image_id: int) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        info = self.coco.imgs[image_id]
        objects = [a for a in self.coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        corners = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        limit = torch.tensor([info["width"], info["height"]], dtype=torch.float32).repeat(2)
        corners = corners.clamp(min=0).minimum(limit)
        labels = torch.tensor([self._labels[a["category_id"]] for a in objects], dtype=torch.int64)
        kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        objects = [a for a, keep in zip(objects, kept.tolist(), strict=True) if keep]
        return corners[kept], labels[kept], objects


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[Any]]:
    """Lists of images and targets, as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
