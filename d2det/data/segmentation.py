"""Training samples for semantic segmentation."""

from __future__ import annotations

import copy
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from PIL import Image


class SegmentationMapper:
    """Makes a training sample of a record with "file_name" and "sem_seg_file_name".

    The shorter side is resized as INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN say; with
    INPUT.CROP.ENABLED (TYPE "absolute") a window of INPUT.CROP.SIZE follows, which
    INPUT.CROP.SINGLE_CATEGORY_MAX_AREA constrains as in detectron2's DeepLab. Smaller images are
    filled up to that size: with grey, their labels with MODEL.SEM_SEG_HEAD.IGNORE_VALUE. Then
    flips, as INPUT.RANDOM_FLIP says.

    Unlike detectron2's `DatasetMapper`, it takes PASCAL VOC's label pictures as they are: their
    palette's indices are the labels. `DatasetMapper` would read the brightness of their colours.

    Raises:
        ValueError: another TYPE of crop; when called, labels that are no map of the image's size.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.format = cfg.INPUT.FORMAT
        self.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        steps: list[T.Augmentation] = [
            T.ResizeShortestEdge(
                cfg.INPUT.MIN_SIZE_TRAIN,
                cfg.INPUT.MAX_SIZE_TRAIN,
                cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            )
        ]
        crop = cfg.INPUT.CROP
        if crop.ENABLED:
            if crop.TYPE != "absolute":
                raise ValueError(
                    f'INPUT.CROP.TYPE is {crop.TYPE!r}; semantic segmentation needs "absolute"'
                )
            size = tuple(int(side) for side in crop.SIZE)
            area = crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0)
            # First of those windows that fit into the image; then the rest of a small one.
            steps.append(
                T.RandomCrop_CategoryAreaConstraint(crop.TYPE, size, area, self.ignore_value)
            )
            grey = float(np.mean(cfg.MODEL.PIXEL_MEAN))
            steps.append(T.FixedSizeCrop(size, True, grey, self.ignore_value))
        if cfg.INPUT.RANDOM_FLIP != "none":
            vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
            steps.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
        self.augmentations = T.AugmentationList(steps)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with "image" (3, H, W), uint8, and "sem_seg" (H, W), int64."""
        record = copy.deepcopy(record)
        image = detection_utils.read_image(record["file_name"], format=self.format)
        detection_utils.check_image_size(record, image)
        labels = read_labels(record.pop("sem_seg_file_name"))
        if labels.shape != image.shape[:2]:
            raise ValueError(f"the image is {image.shape[:2]} and its labels {labels.shape}")
        given = T.AugInput(image, sem_seg=labels)
        self.augmentations(given)
        pixels = np.ascontiguousarray(given.image.transpose(2, 0, 1))
        record["image"] = torch.as_tensor(pixels)
        record["sem_seg"] = torch.as_tensor(given.sem_seg.astype(np.int64))
        return record


def read_labels(path: str) -> np.ndarray:
    """Pixel values, or indices of a palette, of a picture as labels (H, W), uint8.

    Raises:
        ValueError: a picture of colours, or of more than 8 bits.
    """
    with Image.open(path) as picture:
        if picture.mode not in ("P", "L"):
            raise ValueError(
                f"{path} is a picture of kind {picture.mode}: labels are one channel of 8 bits, "
                "or the indices of a palette"
            )
        return np.array(picture)
