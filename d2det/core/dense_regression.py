"""Dense local regression: every cell of a RoI predicts a box and whether it may (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2det.core.grid import average_boxes, decode_offsets, encode_offsets
from d2det.core.losses import dense_iou_loss, elementwise_iou, overlap_loss
from d2det.core.overlap import overlap_targets


def _fill_bias(conv: nn.Conv2d, value: float) -> None:
    assert conv.bias is not None
    nn.init.constant_(conv.bias, value)


class DensePrediction(NamedTuple):
    """What the head predicts for R RoIs, in float32 at least."""

    offsets: Tensor  # (R, 4, k, k): left, top, right, bottom, as fractions of the proposal
    overlap_logits: Tensor | None  # (R, 1, k, k)


class DenseRegression(nn.Module):
    """Tower, predictors, losses and decoding of dense local regression.

    Args:
        in_channels: channels C of the pooled features.
        conv_dim: channels of the tower.
        num_conv: 3x3 convolutions in the tower, at least 1; the first has stride 2.
        norm: makes the normalisation layer for a number of channels; None for a convolution with
            bias instead.
        init_offset: what all offsets start at, as a fraction of the proposal. Must be positive:
            an empty box has no gradient.
        predict_overlap: whether cells also predict the binary overlap (Eq. 3).
        overlap_margin: see `overlap_targets`.
        overlap_threshold: see `average_boxes`.
        loss_weight, overlap_loss_weight: weights of the two losses.

    Raises:
        ValueError: no convolution, or an initial offset that is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        conv_dim: int = 576,
        num_conv: int = 8,
        norm: Callable[[int], nn.Module] | None = None,
        init_offset: float = 0.5,
        predict_overlap: bool = True,
        overlap_margin: float = 1 / 6,
        overlap_threshold: float = 0.5,
        loss_weight: float = 2.0,
        overlap_loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if num_conv < 1:
            raise ValueError(
                f"the tower needs at least 1 convolution, the one that halves: {num_conv}"
            )
        if init_offset <= 0:
            raise ValueError(
                f"init_offset must be positive, got {init_offset}: empty boxes do not learn"
            )
        self.overlap_margin = overlap_margin
        self.overlap_threshold = overlap_threshold
        self.loss_weight = loss_weight
        self.overlap_loss_weight = overlap_loss_weight
        layers: list[nn.Module] = []
        for i in range(num_conv):
            conv = nn.Conv2d(
                in_channels if i == 0 else conv_dim,
                conv_dim,
                kernel_size=3,
                stride=2 if i == 0 else 1,
                padding=1,
                bias=norm is None,
            )
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if norm is None:
                _fill_bias(conv, 0.0)
            layers += [conv] if norm is None else [conv, norm(conv_dim)]
            layers.append(nn.ReLU(inplace=True))
        self.tower = nn.Sequential(*layers)
        self.offset_predictor = nn.Conv2d(conv_dim, 4, kernel_size=3, padding=1)
        nn.init.normal_(self.offset_predictor.weight, std=0.001)
        _fill_bias(self.offset_predictor, init_offset)
        self.overlap_predictor: nn.Conv2d | None = None
        if predict_overlap:
            self.overlap_predictor = nn.Conv2d(conv_dim, 1, kernel_size=3, padding=1)
            nn.init.normal_(self.overlap_predictor.weight, std=0.001)
            _fill_bias(self.overlap_predictor, 0.0)

    def forward(self, pooled: Tensor) -> DensePrediction:
        """Predict.

        Args:
            pooled: (R, C, 2k, 2k), RoIAlign features.

        Returns:
            Offsets (R, 4, k, k), not negative, and overlap logits (R, 1, k, k) or None.
        """
        return self.predict(self.tower(pooled))

    def predict(self, trunk: Tensor) -> DensePrediction:
        """The predictors alone, on the tower's output (R, conv_dim, k, k)."""
        dtype = torch.promote_types(trunk.dtype, torch.float32)
        # A cell that votes lies inside the box: all of its distances are positive.
        offsets = self.offset_predictor(trunk).to(dtype).relu()
        if self.overlap_predictor is None:
            return DensePrediction(offsets, None)
        return DensePrediction(offsets, self.overlap_predictor(trunk).to(dtype))

    def losses(
        self,
        prediction: DensePrediction,
        proposals: Tensor,
        gt_boxes: Tensor,
        overlap: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses over R sampled RoIs, and scalars worth watching.

        Args:
            prediction: for the proposals.
            proposals: (R, 4), positive RoIs in pixels.
            gt_boxes: (R, 4), their ground truth.
            overlap: labels of the cells from masks (Sec. 3.3), (R, 1, k, k), and (R,) bool, the
                RoIs for which they replace those of Eq. 3; None for none.

        Returns:
            The losses "loss_dense_reg" and (with overlap prediction) "loss_overlap", weighted;
            and, detached, "mean_iou" of the decoded boxes and "overlap_accuracy" of the cells,
            which are empty when R is 0.
        """
        offsets, logits = prediction
        targets = encode_offsets(proposals, gt_boxes, offsets.shape[-1])
        foreground = overlap_targets(targets, self.overlap_margin)
        if overlap is not None:
            labels, valid = overlap
            foreground = torch.where(valid[:, None, None, None], labels, foreground)
        cell_boxes = decode_offsets(proposals, offsets)
        weights = foreground if logits is not None else torch.ones_like(foreground)
        regression = dense_iou_loss(cell_boxes, gt_boxes, weights)
        losses = {"loss_dense_reg": regression * self.loss_weight}
        if logits is not None:
            losses["loss_overlap"] = overlap_loss(logits, foreground) * self.overlap_loss_weight
        return losses, self._statistics(cell_boxes, logits, foreground, gt_boxes)

    @torch.no_grad()
    def _statistics(
        self, cell_boxes: Tensor, logits: Tensor | None, foreground: Tensor, gt_boxes: Tensor
    ) -> dict[str, Tensor]:
        if gt_boxes.shape[0] == 0:
            return {}
        boxes = average_boxes(cell_boxes, logits, self.overlap_threshold)
        statistics = {"mean_iou": elementwise_iou(boxes, gt_boxes.to(boxes.dtype)).mean()}
        if logits is not None:
            correct = (logits.sigmoid() > self.overlap_threshold) == (foreground > 0)
            statistics["overlap_accuracy"] = correct.float().mean()
        return statistics

    def boxes(self, prediction: DensePrediction, proposals: Tensor) -> Tensor:
        """The regressed box of each proposal (R, 4), not clipped to the image."""
        cell_boxes = decode_offsets(proposals, prediction.offsets)
        return average_boxes(cell_boxes, prediction.overlap_logits, self.overlap_threshold)
