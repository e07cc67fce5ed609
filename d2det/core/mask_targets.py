"""What the mask of a RoI should be, from the masks of the ground truth (Sec. 3.3).

A mask is given as a raster of pixels and the frame, a box in the image, that the raster fills: a
bitmap has the image as its frame, a polygon is drawn once in its own tight box. I: instances; m:
side of the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SIDE = 1e-2  # pixels; thinner RoIs count as this wide, so that their cells have an area
# Sums over whole images are made for as many instances at a time as have this many pixels.
_CHUNK_PIXELS = 2**25


class MaskTargets(NamedTuple):
    """Targets of R RoIs."""

    masks: Tensor  # (R, m, m) bool: the instance's mask, cropped to the RoI
    shares: Tensor  # (R,) part of the instance's area that lies inside the RoI; 0 to 1
    valid: Tensor  # (R,) bool: the instance has a mask; the other two are 0 where it has none

    @staticmethod
    def none(count: int, side: int, device: torch.device) -> MaskTargets:
        """Of RoIs whose instances have no masks."""
        return MaskTargets(
            torch.zeros(count, side, side, dtype=torch.bool, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )

    @staticmethod
    def cat(parts: list[MaskTargets]) -> MaskTargets:
        """Those of several images as one."""
        return MaskTargets(*(torch.cat(x) for x in zip(*parts, strict=True)))


@torch.no_grad()
def crop_masks(
    rasters: Tensor, frames: Tensor, index: Tensor, boxes: Tensor, side: int
) -> MaskTargets:
    """Crop masks to RoIs: a cell of the target is 1 if the mask covers at least half of it.

    The cover is exact for the raster, whatever the sizes: sums over pixels are read off integral
    images, whose values between pixels are bilinear. Sums are integers until they are interpolated
    (float64).

    Args:
        rasters: (I, h, w) bool.
        frames: (I, 4), the boxes in the image, in pixels, that the rasters fill.
        index: (R,) int64, the instance of each RoI.
        boxes: (R, 4), the RoIs in pixels.
        side: m.

    Returns:
        Targets of the R RoIs. An instance without a single pixel has no mask.
    """
    used, place = index.unique(return_inverse=True)
    result = MaskTargets.none(len(boxes), side, boxes.device)
    step = max(1, _CHUNK_PIXELS // max(rasters.shape[1] * rasters.shape[2], 1))
    for start in range(0, len(used), step):
        chunk = used[start : start + step]
        rows = ((place >= start) & (place < start + step)).nonzero()[:, 0]
        part = _crop(rasters[chunk], frames[chunk], place[rows] - start, boxes[rows], side)
        for whole, values in zip(result, part, strict=True):
            whole[rows] = values.to(whole.dtype)
    return result


def _crop(
    rasters: Tensor, frames: Tensor, index: Tensor, boxes: Tensor, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = rasters.shape[1:]
    sums = rasters.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    sums = F.pad(sums, (1, 0, 1, 0))  # (I, h + 1, w + 1): pixels above and to the left
    frames, boxes = frames[index].double(), boxes.double()
    scale = boxes.new_tensor([width, height]) / (frames[:, 2:] - frames[:, :2])
    corner = (boxes[:, :2] - frames[:, :2]) * scale
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=MIN_SIDE) * scale
    steps = torch.arange(side + 1, device=boxes.device, dtype=boxes.dtype) / side
    x = (corner[:, :1] + size[:, :1] * steps).clamp(min=0, max=width)  # (R, m + 1)
    y = (corner[:, 1:] + size[:, 1:] * steps).clamp(min=0, max=height)
    areas = _interpolate(sums, index, y, x).diff(dim=1).diff(dim=2)
    cell = size.prod(dim=1)[:, None, None] / side**2
    total = sums[:, -1, -1][index].double()
    shares = (areas.sum(dim=(1, 2)) / total.clamp(min=1)).clamp(max=1)
    # Halves that float64 rounds down still count.
    return areas / cell >= 0.5 - 1e-9, shares, total > 0


def _interpolate(sums: Tensor, index: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear values of `sums` at all pairs of y (R, a) and x (R, b): (R, a, b) float64."""
    y0 = y.floor().clamp(max=sums.shape[1] - 2)
    x0 = x.floor().clamp(max=sums.shape[2] - 2)
    fy, fx = (y - y0)[:, :, None], (x - x0)[:, None, :]
    row, column, image = y0.long()[:, :, None], x0.long()[:, None, :], index[:, None, None]
    top = sums[image, row, column] * (1 - fx) + sums[image, row, column + 1] * fx
    bottom = sums[image, row + 1, column] * (1 - fx) + sums[image, row + 1, column + 1] * fx
    return top * (1 - fy) + bottom * fy


def shrink_masks(masks: Tensor, k: int, threshold: float = 0.5) -> Tensor:
    """Overlap labels from masks: 28 x 28 shrunk to the 7 x 7 cells of dense regression.

    Bilinear without antialiasing, as released: of a cell's 4 x 4 pixels the middle four count.

    Args:
        masks: (R, m, m), 0 or 1.
        k: cells a side.
        threshold: a shrunk value must exceed it.

    Returns:
        (R, 1, k, k) float32, 0 or 1.
    """
    if masks.shape[0] == 0:
        return masks.new_zeros((0, 1, k, k), dtype=torch.float32)
    small = F.interpolate(masks[:, None].float(), (k, k), mode="bilinear", align_corners=False)
    return (small > threshold).float()
