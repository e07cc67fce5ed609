"""Mask IoU scoring: how well a mask fits, predicted, so that masks are ranked by it.

Mask Scoring R-CNN (Huang et al., CVPR 2019), Sec. 3, on the tower of dense regression as D2Det has
it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2det.core.mask_targets import MaskTargets

RANKING_RULES = ("sum", "product")


class MaskScorer(nn.Module):
    """Predicts the IoU of a RoI's mask with its instance, for each class.

    Args:
        in_channels: channels C of the tower.
        grid: k, side of its maps.
        num_classes: K.
        fc_dim: width of the hidden layers.
        num_fc: number of hidden layers, at least 1.

    Raises:
        ValueError: no hidden layer.
    """

    def __init__(
        self, in_channels: int, grid: int, num_classes: int, *, fc_dim: int = 1024, num_fc: int = 2
    ) -> None:
        super().__init__()
        if num_fc < 1:
            raise ValueError(f"mask scoring needs at least 1 hidden layer, got {num_fc}")
        sizes = [(in_channels + 1) * grid**2] + [fc_dim] * num_fc
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.fcs = nn.ModuleList(layers)
        self.predictor = nn.Linear(fc_dim, num_classes)
        for fc in layers:
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, trunk: Tensor, mask_logits: Tensor, classes: Tensor) -> Tensor:
        """Predict.

        Args:
            trunk: (R, C, k, k), the tower's output.
            mask_logits: (R, 4k, 4k), of the RoI's class; no gradient flows into them.
            classes: (R,) int64 in [0, K).

        Returns:
            (R,) IoU of that class, in float32 at least; not bounded.
        """
        mask = pooled_mask(mask_logits).to(trunk.dtype)
        x = torch.cat((trunk, mask), dim=1).flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x), inplace=True)
        ious = self.predictor(x)[torch.arange(len(x), device=x.device), classes]
        return ious.to(torch.promote_types(trunk.dtype, torch.float32))


def pooled_mask(mask_logits: Tensor) -> Tensor:
    """(R, 1, k, k): probability of each cell's most likely pixel, of detached logits (R, 4k, 4k).

    The windows are those of the releases: 4 x 4 with a stride of 4, one pixel up and to the left.
    """
    return F.max_pool2d(mask_logits.detach()[:, None], 4, stride=4, padding=1).sigmoid()


@torch.no_grad()
def mask_iou(predicted: Tensor, targets: MaskTargets) -> Tensor:
    """IoU of predicted masks with whole instances, also with what of them lies outside the RoI.

    Args:
        predicted: (R, m, m) bool.
        targets: of the RoIs; the instance's whole area is that inside the RoI, over the share that
            it is of the whole.

    Returns:
        (R,) float32 in [0, 1]; 0 where the instance has no mask, or none inside the RoI.
    """
    overlap = (predicted & targets.masks).sum(dim=(1, 2)).float()
    inside = targets.masks.sum(dim=(1, 2)).float()
    whole = inside / targets.shares.float().clamp(min=torch.finfo(torch.float32).eps)
    union = predicted.sum(dim=(1, 2)) + whole - overlap
    return (overlap / union.clamp(min=1)).clamp(max=1)


def mask_iou_loss(ious: Tensor, targets: Tensor, valid: Tensor, min_iou: float = 0.1) -> Tensor:
    """Squared error of predicted IoUs, where the target exceeds `min_iou`.

    Args:
        ious: (R,), predicted.
        targets: (R,), of `mask_iou`.
        valid: (R,) bool: which RoIs have a mask.
        min_iou: RoIs with a target up to this do not train.

    Returns:
        A scalar: the sum over the number of RoIs that have a mask, whether they train or not; 0
        where there are none.
    """
    trains = valid & (targets > min_iou)
    error = (ious - targets.to(ious.dtype)) ** 2
    return (error * trains).sum() / valid.sum().clamp(min=1)


def mask_scores(
    class_scores: Tensor, ious: Tensor, rule: str = "sum", iou_weight: float = 0.3
) -> Tensor:
    """Scores (M,) that rank masks, of class scores (M,) and predicted IoUs (M,).

    Args:
        rule: "sum", class score + `iou_weight` * IoU, as D2Det's releases do; or "product", class
            score * IoU (Mask Scoring R-CNN).
        iou_weight: for "sum".

    Raises:
        ValueError: another rule.
    """
    if rule == "sum":
        return class_scores + iou_weight * ious
    if rule == "product":
        return class_scores * ious.clamp(min=0)  # a score below 0 would rank the unlikely first
    raise ValueError(f"the ranking rule must be one of {RANKING_RULES}, not {rule!r}")
