"""Soft-NMS (Bodla et al., ICCV 2017), batched by class: schema and fake kernel.

Letters: N boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import autocast_to, check_integers, check_shape, check_tensor, shape
from ._library import define
from .reference import soft_nms as reference

METHODS = ("linear", "gaussian", "hard")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    iou_threshold: float,
    method: str = "linear",
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Take boxes by falling score; each one taken lowers the scores of its class that overlap it.

    "linear": score * (1 - IoU) where IoU > iou_threshold; "gaussian": score * exp(-IoU^2 / sigma);
    "hard": plain NMS, boxes with IoU > iou_threshold are dropped. A box whose score falls below
    `min_score` is dropped. IoU is without "+1". Of equal scores the lower index goes first. A NaN
    score counts as dropped.

    Not differentiable: scores come back detached. Under autocast boxes and scores are cast to
    float32; in any case the work is done in float32 (float64 if one of them is). The operator
    returns padded tensors and a count, and this function slices them: its one synchronisation.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        classes: (N,) int64; boxes of different classes do not affect each other.
        iou_threshold: in [0, 1]; "gaussian" does not use it.
        method: "linear", "gaussian" or "hard".
        sigma: width of the Gaussian, above 0.
        min_score: at least 0.

    Returns:
        (kept indices, int64; their decayed scores, in the scores' dtype), by falling decayed score.

    Raises:
        TypeError: an argument is not a tensor of the right kind of dtype.
        ValueError: shapes, devices or settings do not fit.
    """
    check_tensor("boxes", boxes, 2)
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), got {shape(boxes)}")
    check_tensor("scores", scores, 1, ("boxes", boxes))
    check_shape("scores", scores, (boxes.shape[0],), ("boxes", boxes))
    check_integers("classes", classes, ("boxes", boxes), boxes.shape[0])
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    if not sigma > 0.0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if not min_score >= 0.0:
        raise ValueError(f"min_score must be at least 0, got {min_score}")
    keep, decayed, count = torch.ops.d2det.soft_nms(
        boxes.detach(),
        scores.detach(),
        classes,
        float(iou_threshold),
        method,
        float(sigma),
        float(min_score),
    )
    kept = int(count)
    return keep[:kept], decayed[:kept]


def _autocast(dtype: torch.dtype, boxes: Tensor, scores: Tensor, *rest: Any) -> tuple[Any, ...]:
    # Not autocast's dtype: half-precision boxes are off by pixels.
    return (autocast_to(boxes, torch.float32), autocast_to(scores, torch.float32), *rest)


def _fake(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    method: str,
    sigma: float,
    min_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(classes), torch.empty_like(scores), classes.new_empty(())


define(
    "soft_nms(Tensor boxes, Tensor scores, Tensor classes, float iou_threshold, str method, "
    "float sigma, float min_score) -> (Tensor, Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake,
    autocast=_autocast,
)
