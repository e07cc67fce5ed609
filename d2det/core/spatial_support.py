"""What a node of a network sees (Deformable ConvNets v2, Sec. 2, App. A1), on plain tensors.

A node's response is a vector: a position of a feature map, or a RoI's feature. H, W are the sides
of the network's input, M is a number of masks, D the length of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Response = Callable[[Tensor], Tensor]  # images (M, 3, H, W) to responses (M, D)
Errors = Callable[[Tensor], Tensor]  # masks (M, H, W) of bool to errors (M,)
Box = tuple[int, int, int, int]  # x1, y1, x2, y2; in whole pixels, the last ones not included


def strength(response: Tensor) -> Tensor:
    """The number whose gradient stands for a node's: the norm of its response (1, D)."""
    return response.float().norm()


def receptive_field(respond: Response, image: Tensor) -> Tensor:
    """Effective receptive field (H, W): the gradient's absolute value, averaged over channels.

    Args:
        respond: differentiable.
        image: (3, H, W).
    """
    pixels = image.detach()[None].requires_grad_()
    (gradient,) = torch.autograd.grad(strength(respond(pixels)), pixels)
    return gradient[0].abs().mean(dim=0)


def cosine_errors(responses: Tensor, reference: Tensor) -> Tensor:
    """One minus the cosine of each response (M, D) and the reference (1, D): (M,)."""
    return 1 - F.cosine_similarity(responses.float(), reference.float(), dim=1)


def masked_errors(respond: Response, image: Tensor, *, batch: int = 8, fill: float = 0.0) -> Errors:
    """A function from masks to the errors of the images that only they leave.

    Args:
        respond: the node.
        image: (3, H, W).
        batch: masked images that go through the network at a time.
        fill: value of what is masked; 0 in a normalised image is the mean colour.
    """
    with torch.no_grad():
        reference = respond(image[None])

    @torch.no_grad()
    def errors(masks: Tensor) -> Tensor:
        found = [
            cosine_errors(respond(torch.where(part[:, None], image, fill)), reference)
            for part in masks.split(batch)
        ]
        return torch.cat(found)

    return errors


def centred_boxes(
    center: tuple[float, float], aspect: float, size: tuple[int, int], steps: int
) -> list[Box]:
    """Growing boxes around a point, cut at the image; the last one is the whole image.

    Args:
        center: x, y.
        aspect: width over height: 1 for a position of a feature map, the RoI's for a RoI.
        size: H, W.
        steps: how many boxes; their sides grow by equal amounts.
    """
    (x, y), (height, width) = center, size
    # The height at which the box, of this aspect, has reached all four borders.
    full = 2 * max(y, height - y, max(x, width - x) / aspect)
    boxes = []
    for step in range(1, steps + 1):
        half_h = full * step / steps / 2
        half_w = half_h * aspect
        boxes.append(
            (
                max(0, round(x - half_w)),
                max(0, round(y - half_h)),
                min(width, max(round(x + half_w), round(x - half_w) + 1)),
                min(height, max(round(y + half_h), round(y - half_h) + 1)),
            )
        )
    return [*boxes[:-1], (0, 0, width, height)]


def grow_box(errors: Errors, boxes: Sequence[Box], size: tuple[int, int], bound: float) -> Box:
    """The first of growing boxes that keeps the error within the bound.

    Args:
        errors: of masks.
        boxes: the last of them the whole image, whose error is 0.
        size: H, W.
        bound: the paper's 0.1.
    """
    for box in boxes[:-1]:
        if float(errors(box_mask(box, size)[None])[0]) <= bound:
            return box
    return boxes[-1]


def box_mask(box: Box, size: tuple[int, int]) -> Tensor:
    """(H, W) of bool: True inside."""
    mask = torch.zeros(size, dtype=torch.bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    return mask


def drop_superpixels(
    errors: Errors,
    mask: Tensor,
    labels: Tensor,
    bound: float,
    settled: Callable[[int], Any] | None = None,
) -> Tensor:
    """Greedily remove super-pixels from a mask while the error stays within the bound.

    In each round the one whose removal costs least goes. One whose removal alone breaks the bound
    stays for good: with more removed it would hardly cost less.

    Args:
        errors: of masks.
        mask: (H, W) of bool, itself within the bound.
        labels: (H, W) of int64, the super-pixel of each pixel.
        bound: the paper's 0.1.
        settled: called with the number of super-pixels on which a round has decided.

    Returns:
        (H, W) of bool, a part of `mask`.
    """
    mask = mask.clone()
    open_labels = labels[mask].unique()
    while open_labels.numel():
        candidates = mask & (labels != open_labels[:, None, None])
        costs = errors(candidates)
        affordable = costs <= bound
        decided = int((~affordable).sum())
        if affordable.any():
            best = int(costs.argmin())
            mask = candidates[best]
            affordable[best] = False
            decided += 1
        open_labels = open_labels[affordable.to(open_labels.device)]
        if settled is not None:
            settled(decided)
    return mask
