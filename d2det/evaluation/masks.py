"""Masks in COCO's compressed run-length format."""

from __future__ import annotations

from typing import Any

import pycocotools.mask as mask_util
import torch
from torch import Tensor

from d2det.core.run_lengths import mask_runs


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks as other COCO tools read them from JSON.

    The same as pycocotools' `encode`, which would have each full-size mask copied into its memory
    order (and off the GPU) first.

    Args:
        masks: (N, H, W); nonzero inside.

    Returns:
        N times {"size": [H, W], "counts": str}.
    """
    height, width = masks.shape[1:]
    runs = mask_runs(masks if masks.dtype == torch.bool else masks != 0)
    per_mask = torch.bincount(runs.masks, minlength=len(masks)).tolist()
    edges = torch.stack((runs.starts, runs.ends), dim=1).flatten()
    encoded = []
    for part in edges.split([2 * count for count in per_mask]):
        bounds = torch.cat((part.new_zeros(1), part, part.new_tensor([height * width])))
        counts = bounds.diff().tolist()
        if len(counts) > 1 and counts[-1] == 0:  # the last pixel is inside
            counts.pop()
        encoded.append({"size": [height, width], "counts": counts})
    compressed = mask_util.frPyObjects(encoded, height, width) if encoded else []
    return [{"size": [height, width], "counts": x["counts"].decode("ascii")} for x in compressed]
