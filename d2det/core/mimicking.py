"""R-CNN feature mimicking (Deformable ConvNets v2, Sec. 3.3): which RoIs, their patches, the loss.

N is the number of images, R of RoIs, P of patches, C of feature channels, s the side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

# The rows of the paper's Table 3 but for "none", which is to leave mimicking out.
ROI_CHOICES = ("foreground", "background", "foreground+background")
REDUCTIONS = ("sum", "mean")


def select_rois(
    gt_classes: Tensor, images: Tensor, num_classes: int, *, choice: str, limit: int
) -> Tensor:
    """Indices of the RoIs to mimic: of each image, at most `limit` of the chosen kind, at random.

    Args:
        gt_classes: (R,) int64; `num_classes` is background, negative values are ignored.
        images: (R,) int64, the image of each RoI.
        num_classes: foreground classes.
        choice: one of `ROI_CHOICES`.
        limit: the paper's 32.

    Returns:
        (P,) int64, in rising order.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in ROI_CHOICES:
        raise ValueError(f"choice must be one of {ROI_CHOICES}, not {choice!r}")
    wanted = gt_classes >= 0
    if choice == "foreground":
        wanted &= gt_classes < num_classes
    elif choice == "background":
        wanted &= gt_classes == num_classes
    candidates = wanted.nonzero()[:, 0]
    # All images at once: shuffled, then grouped by image, a RoI's rank in its group is random.
    shuffled = candidates[torch.randperm(candidates.numel(), device=candidates.device)]
    grouped = shuffled[images[shuffled].argsort(stable=True)]
    group = images[grouped]
    rank = torch.arange(group.numel(), device=group.device) - torch.searchsorted(group, group)
    return grouped[rank < limit].sort().values


def crop_patches(
    images: Tensor, sizes: Sequence[tuple[int, int]], rois: Tensor, side: int
) -> Tensor:
    """Cut RoIs out of a batch of images and resize each to a square, all in one call.

    Bilinear, with half-pixel centres; where a RoI shrinks, the samples of each new pixel are
    averaged, so that large objects do not alias. What padding a batch has beyond an image's own
    size does not show: at the border the last row or column goes on.

    Args:
        images: (N, 3, H, W), padded at the right and at the bottom.
        sizes: height and width of each image without its padding.
        rois: (P, 5), image index and box in pixels.
        side: s.

    Returns:
        (P, 3, s, s), without gradient.
    """
    with torch.no_grad():
        images = _replicate_into_padding(images, sizes)
        return roi_align(
            images, rois.to(images.dtype), (side, side), sampling_ratio=0, aligned=True
        )


def _replicate_into_padding(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    if all(tuple(size) == images.shape[-2:] for size in sizes):
        return images
    images = images.clone()
    for image, (height, width) in zip(images, sizes, strict=True):  # views
        image[:, :, width:] = image[:, :, width - 1 : width]
        image[:, height:] = image[:, height - 1 : height]
    return images


def mimic_loss(patch_features: Tensor, roi_features: Tensor, images: int, reduction: str) -> Tensor:
    """Sum over RoIs of 1 - cos(f_RCNN(b), f_FRCNN(b)), in float32 (Sec. 3.3).

    Gradients go into both: the networks are trained together, and the paper holds neither fixed.

    Args:
        patch_features: (P, C), of the patches, by the R-CNN branch.
        roi_features: (P, C), of the same RoIs, by the detector.
        images: N. The sum is each image's own, averaged over the images, so that its weight does
            not depend on how many of them are on a device.
        reduction: "sum", or "mean" over the RoIs, which does not grow with their number either.

    Returns:
        A scalar; 0 without RoIs.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, not {reduction!r}")
    distance = 1 - F.cosine_similarity(patch_features.float(), roi_features.float(), dim=1)
    count = images if reduction == "sum" else distance.numel()
    return distance.sum() / max(count, 1)
