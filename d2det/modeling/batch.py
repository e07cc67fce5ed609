"""A batch of images as flat tensors; what is said of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor


def image_index(counts: list[int], device: torch.device) -> Tensor:
    """The image of each box (R,), given the number of boxes of each image."""
    repeats = torch.tensor(counts, dtype=torch.int64, device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(
        repeats, output_size=sum(counts)
    )


def image_sizes(instances: list[Instances], like: Tensor) -> Tensor:
    """Height and width of each image (N, 2)."""
    return torch.tensor([x.image_size for x in instances], device=like.device, dtype=like.dtype)


def check_finite(maps: list[Tensor]) -> None:
    """Refuse NaN and Inf, which thresholds and NMS would turn into "no objects here".

    The coarsest map is enough: every pixel of the image reaches it.
    """
    finite = torch.isfinite(maps[-1]).flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise FloatingPointError(
            f"the features of image(s) {bad} of the batch contain NaN or Inf: look for such values "
            "in the input (a float image?) and in the weights (a training that diverged?); under "
            "float16, features may overflow: try bfloat16 (SOLVER.AMP.PRECISION bf16)"
        )


def put_scalars(group: str, values: Mapping[str, Tensor | float]) -> None:
    """Hand values to detectron2's event storage, as "group/name"."""
    storage = get_event_storage()
    for name, value in values.items():
        storage.put_scalar(f"{group}/{name}", value)
