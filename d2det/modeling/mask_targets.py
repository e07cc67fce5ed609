"""Ground-truth masks of detectron2, as the tensors that `d2det.core.crop_masks` takes."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from d2det.core import MaskTargets, crop_masks

# A polygon is drawn once, this many pixels a side over its own box: four for each of a target's 28.
POLYGON_SIDE = 112
_MIN_POLYGON_SIDE = 0.1  # detectron2 draws thinner ones as if they were this wide


class SharedMasks:
    """The masks of an image for many RoIs: indexing it selects rows and copies no mask.

    detectron2 gives every sampled proposal a copy of its object's mask: 512 bitmaps of an image of
    800 x 1333 are half a gigabyte. As a field of `Instances` this stands in for them.

    Args:
        masks: of the I objects of an image.
        index: (R,) int64, the object of each row.
    """

    def __init__(self, masks: BitMasks | PolygonMasks, index: Tensor) -> None:
        self.masks = masks
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: Any) -> SharedMasks:
        return SharedMasks(self.masks, self.index[[item] if isinstance(item, int) else item])

    def targets(self, boxes: Tensor, side: int) -> MaskTargets:
        """Targets of `side` pixels for the rows, whose RoIs are `boxes` (R, 4)."""
        index = self.index.to(boxes.device)
        if len(index) == 0:
            return MaskTargets.none(0, side, boxes.device)
        if isinstance(self.masks, PolygonMasks):
            used, index = index.unique(return_inverse=True)
            rasters, frames = _draw(self.masks[used])
            rasters, frames = rasters.to(boxes.device), frames.to(boxes.device)
        else:
            rasters = self.masks.tensor.to(boxes.device)
            height, width = rasters.shape[1:]
            frames = boxes.new_tensor([0, 0, width, height]).expand(len(rasters), 4)
        return crop_masks(rasters, frames, index, boxes, side)


def _draw(polygons: PolygonMasks) -> tuple[Tensor, Tensor]:
    """Each instance in its own tight box: rasters (I, s, s) bool and boxes (I, 4)."""
    frames = polygons.get_bounding_boxes().tensor
    frames[~polygons.nonempty()] = 0  # detectron2's box of no polygons is infinite
    frames[:, 2:] = frames[:, 2:].maximum(frames[:, :2] + _MIN_POLYGON_SIDE)
    return polygons.crop_and_resize(frames, POLYGON_SIDE), frames


def share_masks(targets: list[Instances]) -> list[Instances]:
    """The same instances, whose `gt_masks`, where they have them, are `SharedMasks`."""
    shared = []
    for target in targets:
        fields = dict(target.get_fields())
        masks = fields.get("gt_masks")
        if isinstance(masks, BitMasks | PolygonMasks):
            index = torch.arange(len(target), device=target.gt_boxes.device)
            fields["gt_masks"] = SharedMasks(masks, index)
        shared.append(Instances(target.image_size, **fields))
    return shared


def mask_targets(
    proposals: list[Instances], rows: Tensor, images: Tensor, boxes: Tensor, side: int
) -> MaskTargets:
    """Targets of some of the proposals of a batch.

    Args:
        proposals: of each image, with `gt_masks` of `SharedMasks`, or without any.
        rows: (R,) rising indices into all proposals.
        images: (R,) the image of each.
        boxes: (R, 4), the RoIs to crop masks to; not necessarily those of the proposals.
        side: pixels a side.
    """
    counts = torch.bincount(images, minlength=len(proposals)).tolist()
    parts, start = [], 0
    for proposal, chosen, rois in zip(
        proposals, rows.split(counts), boxes.split(counts), strict=True
    ):
        if proposal.has("gt_masks"):
            parts.append(proposal.gt_masks[chosen - start].targets(rois, side))
        else:
            parts.append(MaskTargets.none(len(rois), side, boxes.device))
        start += len(proposal)
    return MaskTargets.cat(parts)
