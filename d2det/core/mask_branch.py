"""Masks of dense regression's RoIs: prediction, scoring, losses (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2det.core.mask_prediction import MaskPredictor, choose_class, mask_loss
from d2det.core.mask_scoring import (
    RANKING_RULES,
    MaskScorer,
    mask_iou,
    mask_iou_loss,
    mask_scores,
)
from d2det.core.mask_targets import MaskTargets, shrink_masks


class MaskBranch(nn.Module):
    """Masks of 4k x 4k and their scores, from the k x k output of dense regression's tower.

    Args:
        in_channels: channels of the tower.
        grid: k, side of its maps.
        num_classes: K.
        conv_dim, norm: see `MaskPredictor`.
        class_agnostic: one mask a RoI instead of one for each class.
        loss_weight: of the cross-entropy.
        mask_threshold: probability that a pixel of the mask exceeds.
        overlap_labels: whether the masks label the cells of dense regression, in place of Eq. 3.
        overlap_threshold: see `shrink_masks`.
        scoring: whether the IoU of masks is predicted, and masks are ranked by it.
        score_fc_dim, score_num_fc: see `MaskScorer`.
        score_loss_weight: of the squared error.
        score_min_iou: see `mask_iou_loss`.
        ranking, iou_weight: see `mask_scores`.

    Raises:
        ValueError: an unknown ranking rule.
    """

    def __init__(
        self,
        in_channels: int,
        grid: int,
        num_classes: int,
        *,
        conv_dim: int = 256,
        norm: Callable[[int], nn.Module] | None = None,
        class_agnostic: bool = False,
        loss_weight: float = 1.0,
        mask_threshold: float = 0.5,
        overlap_labels: bool = True,
        overlap_threshold: float = 0.5,
        scoring: bool = True,
        score_fc_dim: int = 1024,
        score_num_fc: int = 2,
        score_loss_weight: float = 0.5,
        score_min_iou: float = 0.1,
        ranking: str = "sum",
        iou_weight: float = 0.3,
    ) -> None:
        super().__init__()
        if ranking not in RANKING_RULES:
            raise ValueError(f"mask ranking must be one of {RANKING_RULES}, not {ranking!r}")
        self.grid = grid
        self.loss_weight = loss_weight
        self.mask_threshold = mask_threshold
        self.overlap_labels = overlap_labels
        self.overlap_threshold = overlap_threshold
        self.score_loss_weight = score_loss_weight
        self.score_min_iou = score_min_iou
        self.ranking = ranking
        self.iou_weight = iou_weight
        num_masks = 1 if class_agnostic else num_classes
        self.masks = MaskPredictor(in_channels, num_masks, conv_dim=conv_dim, norm=norm)
        self.scorer: MaskScorer | None = None
        if scoring:
            self.scorer = MaskScorer(
                in_channels, grid, num_classes, fc_dim=score_fc_dim, num_fc=score_num_fc
            )

    @property
    def side(self) -> int:
        """Pixels a side of a mask."""
        return 4 * self.grid

    def overlap(self, targets: MaskTargets) -> tuple[Tensor, Tensor] | None:
        """Labels of the cells for `DenseRegression.losses`, or None where Eq. 3 is to give them.

        Returns:
            (R, 1, k, k), and (R,) which RoIs they hold for.
        """
        if not self.overlap_labels:
            return None
        return shrink_masks(targets.masks, self.grid, self.overlap_threshold), targets.valid

    def losses(
        self, trunk: Tensor, classes: Tensor, targets: MaskTargets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses over R positive RoIs, and scalars worth watching.

        Args:
            trunk: (R, C, k, k), the tower's output.
            classes: (R,) int64, of their ground truth.
            targets: with masks of `side`.

        Returns:
            The losses "loss_mask" and (with scoring) "loss_mask_iou", weighted, 0 where no RoI has
            a mask; and, detached, "accuracy" of the pixels, "mean_iou" of the predicted masks and
            "iou_error" of its prediction, which are empty where R is 0.
        """
        logits = choose_class(self.masks(trunk), classes)
        losses = {"loss_mask": mask_loss(logits, targets.masks, targets.valid) * self.loss_weight}
        predicted = logits.detach().sigmoid() > self.mask_threshold
        found = mask_iou(predicted, targets)
        ious = None
        if self.scorer is not None:
            ious = self.scorer(trunk, logits, classes)
            loss = mask_iou_loss(ious, found, targets.valid, self.score_min_iou)
            losses["loss_mask_iou"] = loss * self.score_loss_weight
        return losses, self._statistics(predicted, targets, found, ious)

    @torch.no_grad()
    def _statistics(
        self, predicted: Tensor, targets: MaskTargets, found: Tensor, ious: Tensor | None
    ) -> dict[str, Tensor]:
        if predicted.shape[0] == 0:
            return {}
        count = targets.valid.sum().clamp(min=1)
        correct = (predicted == targets.masks).float().mean(dim=(1, 2))
        statistics = {
            "accuracy": (correct * targets.valid).sum() / count,
            "mean_iou": (found * targets.valid).sum() / count,
        }
        if ious is not None:
            statistics["iou_error"] = ((ious - found).abs() * targets.valid).sum() / count
        return statistics

    def predict(
        self, trunk: Tensor, classes: Tensor, class_scores: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Masks and their scores.

        Args:
            trunk: (M, C, k, k), the tower's output for the detected boxes.
            classes: (M,) int64.
            class_scores: (M,).

        Returns:
            Probabilities (M, 1, 4k, 4k) of the given classes, and scores (M,) that rank the masks;
            None without scoring.
        """
        logits = choose_class(self.masks(trunk), classes)
        scores = None
        if self.scorer is not None:
            ious = self.scorer(trunk, logits, classes)
            scores = mask_scores(class_scores, ious, self.ranking, self.iou_weight)
        return logits.sigmoid()[:, None], scores
