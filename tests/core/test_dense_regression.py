from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from d2det.core import DenseRegression
from d2det.core.losses import elementwise_iou

PROPOSALS = torch.tensor([[0.0, 0.0, 40.0, 20.0], [10.0, 5.0, 30.0, 60.0]])


def head(**kwargs) -> DenseRegression:
    torch.manual_seed(0)
    arguments = {"conv_dim": 12, "num_conv": 2, "norm": partial(nn.GroupNorm, 4)}
    return DenseRegression(6, **{**arguments, **kwargs})


def test_starts_as_the_identity():
    # Small predictor weights move the boxes by little, and the mean over all cells is centred.
    model = head(init_offset=0.5, predict_overlap=False)
    boxes = model.boxes(model(torch.randn(2, 6, 14, 14)), PROPOSALS)
    assert elementwise_iou(boxes, PROPOSALS).min() > 0.95


def test_shapes_follow_the_pooled_side_and_overlap_is_optional():
    offsets, logits = head()(torch.randn(3, 6, 14, 14))
    assert offsets.shape == (3, 4, 7, 7) and logits.shape == (3, 1, 7, 7)
    offsets, logits = head(predict_overlap=False)(torch.randn(3, 6, 10, 10))
    assert offsets.shape == (3, 4, 5, 5) and logits is None


def test_offsets_are_never_negative():
    model = head(init_offset=0.01)
    nn.init.normal_(model.offset_predictor.weight, std=1.0)
    assert model(torch.randn(3, 6, 14, 14)).offsets.min() == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_learns_a_shift(overlap):
    torch.manual_seed(0)
    model = head(predict_overlap=overlap)
    pooled = torch.randn(2, 6, 14, 14)
    gt_boxes = PROPOSALS + torch.tensor([[-3.0, 2.0, 4.0, 3.0], [2.0, -4.0, 3.0, 5.0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        losses, _ = model.losses(model(pooled), PROPOSALS, gt_boxes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    boxes = model.boxes(model(pooled), PROPOSALS)
    assert elementwise_iou(boxes, gt_boxes).min() > 0.95
    assert elementwise_iou(PROPOSALS, gt_boxes).max() < 0.85


def test_losses_of_a_perfect_prediction_are_zero_and_statistics_say_so():
    model = head()
    offsets = torch.full((1, 4, 7, 7), 0.0)
    steps = (torch.arange(7.0) + 0.5) / 7
    offsets[0, 0], offsets[0, 2] = steps, 1 - steps
    offsets[0, 1], offsets[0, 3] = steps[:, None], 1 - steps[:, None]
    logits = torch.full((1, 1, 7, 7), -30.0)
    logits[..., 1:6, 1:6] = 30.0
    losses, statistics = model.losses((offsets, logits), PROPOSALS[:1], PROPOSALS[:1])
    assert losses["loss_dense_reg"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_overlap"].item() == pytest.approx(0, abs=1e-6)
    assert statistics["mean_iou"].item() == pytest.approx(1, abs=1e-5)
    assert statistics["overlap_accuracy"].item() == 1
    losses, statistics = model.losses((offsets, -logits), PROPOSALS[:1], PROPOSALS[:1])
    assert statistics["overlap_accuracy"].item() == 0


def test_loss_weights():
    pooled, gt = torch.randn(2, 6, 14, 14), PROPOSALS + 2
    one = head(loss_weight=1.0, overlap_loss_weight=1.0)
    many = head(loss_weight=3.0, overlap_loss_weight=5.0)
    a, _ = one.losses(one(pooled), PROPOSALS, gt)
    b, _ = many.losses(many(pooled), PROPOSALS, gt)
    torch.testing.assert_close(b["loss_dense_reg"], 3 * a["loss_dense_reg"])
    torch.testing.assert_close(b["loss_overlap"], 5 * a["loss_overlap"])


def test_no_rois_give_every_parameter_a_zero_gradient():
    model = head()
    prediction = model(torch.zeros(0, 6, 14, 14))
    losses, statistics = model.losses(prediction, torch.zeros(0, 4), torch.zeros(0, 4))
    sum(losses.values()).backward()
    assert statistics == {}
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())
    assert model.boxes(prediction, torch.zeros(0, 4)).shape == (0, 4)


def test_autocast_predicts_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offsets, logits = head()(torch.randn(2, 6, 14, 14))
    assert offsets.dtype == logits.dtype == torch.float32


def test_refuses_what_cannot_learn():
    with pytest.raises(ValueError, match="at least 1 convolution"):
        head(num_conv=0)
    with pytest.raises(ValueError, match="init_offset must be positive, got 0"):
        head(init_offset=0)


def test_released_tower_size():
    # 256 -> 576 and seven of 576 -> 576, 3x3 without bias, with 36 groups; two predictors.
    model = DenseRegression(256, norm=partial(nn.GroupNorm, 36))
    expected = 9 * (256 * 576 + 7 * 576**2) + 8 * 2 * 576 + (9 * 576 * 5 + 5)
    assert sum(p.numel() for p in model.parameters()) == expected
