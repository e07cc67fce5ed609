"""Mask IoU scoring against loops and worked numbers."""

from __future__ import annotations

import pytest
import torch

from d2det.core import MaskTargets, crop_masks
from d2det.core.mask_scoring import (
    MaskScorer,
    mask_iou,
    mask_iou_loss,
    mask_scores,
    pooled_mask,
)


def test_what_lies_outside_the_roi_counts_in_the_iou():
    # A square of 40 x 40; the RoI is its left half. A prediction that fills the RoI finds half.
    raster = torch.zeros(1, 60, 60, dtype=torch.bool)
    raster[0, 10:50, 10:50] = True
    box = torch.tensor([[10.0, 10.0, 30.0, 50.0]])
    frame = torch.tensor([[0.0, 0.0, 60.0, 60.0]])
    targets = crop_masks(raster, frame, torch.tensor([0]), box, 28)
    assert mask_iou(torch.ones(1, 28, 28, dtype=torch.bool), targets).item() == pytest.approx(0.5)
    quarter = torch.zeros(1, 28, 28, dtype=torch.bool)
    quarter[0, :14] = True
    assert mask_iou(quarter, targets).item() == pytest.approx(0.25)


def test_iou_equals_that_of_the_pixels_of_the_image():
    """One pixel a cell: the IoU over the whole image, counted in Python integers."""
    generator = torch.Generator().manual_seed(0)
    rasters = torch.rand(12, 40, 44, generator=generator) > 0.6
    predicted = torch.rand(12, 28, 28, generator=generator) > 0.5
    boxes, expected = [], []
    for r in range(12):
        x, y = r, 11 - r
        boxes.append([x, y, x + 28, y + 28])
        inside = outside = union = 0
        for v in range(40):
            for u in range(44):
                within = 0 <= v - y < 28 and 0 <= u - x < 28
                mine = within and bool(predicted[r, v - y, u - x])
                true = bool(rasters[r, v, u])
                inside += mine and true
                union += mine or true
                outside += true and not within
        assert outside > 0
        expected.append(inside / union)
    targets = crop_masks(
        rasters,
        torch.tensor([[0.0, 0.0, 44.0, 40.0]] * 12),
        torch.arange(12),
        torch.tensor(boxes).float(),
        28,
    )
    torch.testing.assert_close(mask_iou(predicted, targets), torch.tensor(expected))


def test_iou_without_mask_or_prediction_is_zero():
    targets = MaskTargets.none(2, 28, torch.device("cpu"))
    predicted = torch.zeros(2, 28, 28, dtype=torch.bool)
    predicted[1] = True
    assert mask_iou(predicted, targets).tolist() == [0, 0]
    away = MaskTargets(targets.masks, targets.shares, torch.tensor([True, True]))
    assert mask_iou(predicted, away).tolist() == [0, 0]


def test_input_is_max_pooled_with_one_pixel_of_padding():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 28, 28, generator=generator, dtype=torch.float64)
    found = pooled_mask(logits)
    assert found.shape == (3, 1, 7, 7)
    for r in range(3):
        for i in range(7):
            for j in range(7):
                best = max(
                    logits[r, v, u].item()
                    for v in range(max(4 * i - 1, 0), 4 * i + 3)
                    for u in range(max(4 * j - 1, 0), 4 * j + 3)
                )
                expected = 1 / (1 + torch.tensor(-best, dtype=torch.float64).exp().item())
                assert found[r, 0, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_scorer_reads_trunk_and_detached_mask_and_gives_the_class_asked_for():
    torch.manual_seed(0)
    scorer = MaskScorer(5, 7, 3, fc_dim=16)
    torch.nn.init.normal_(scorer.predictor.weight)
    trunk = torch.randn(4, 5, 7, 7, requires_grad=True)
    logits = torch.randn(4, 28, 28, requires_grad=True)
    classes = torch.tensor([2, 0, 1, 2])
    ious = scorer(trunk, logits, classes)
    x = torch.cat((trunk, pooled_mask(logits)), dim=1).flatten(1)
    for fc in scorer.fcs:
        x = fc(x).relu()
    everything = scorer.predictor(x)
    torch.testing.assert_close(
        ious, torch.stack([everything[r, c] for r, c in enumerate(classes.tolist())])
    )
    ious.sum().backward()
    assert logits.grad is None
    assert trunk.grad.abs().sum() > 0
    assert scorer(trunk, logits + 3, classes).sub(ious).abs().max() > 0
    with pytest.raises(ValueError, match="at least 1 hidden layer"):
        MaskScorer(5, 7, 3, num_fc=0)


def test_released_scorer_size():
    # 577 x 7 x 7 -> 1024 -> 1024 -> 80.
    expected = (577 * 49 + 1) * 1024 + 1025 * 1024 + 1025 * 80
    with torch.device("meta"):
        scorer = MaskScorer(576, 7, 80)
    assert sum(p.numel() for p in scorer.parameters()) == expected


def test_loss_leaves_out_what_is_too_bad_and_averages_over_all_that_have_a_mask():
    ious = torch.tensor([0.5, 0.9, 0.2, 0.7, 0.3], requires_grad=True)
    targets = torch.tensor([0.8, 0.1, 0.05, 1.0, 0.6])
    valid = torch.tensor([True, True, True, True, False])
    loss = mask_iou_loss(ious, targets, valid)
    assert loss.item() == pytest.approx((0.3**2 + 0.3**2) / 4)
    loss.backward()
    assert (ious.grad != 0).tolist() == [True, False, False, True, False]
    none = mask_iou_loss(ious[:0], targets[:0], valid[:0])
    none.backward()
    assert none.item() == 0


def test_ranking_rules():
    scores, ious = torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.2, 0.8, -0.1])
    torch.testing.assert_close(mask_scores(scores, ious), torch.tensor([0.96, 0.84, 0.47]))
    torch.testing.assert_close(mask_scores(scores, ious, "sum", 1.0), scores + ious)
    torch.testing.assert_close(
        mask_scores(scores, ious, "product"), torch.tensor([0.18, 0.48, 0.0])
    )
    with pytest.raises(ValueError, match=r"one of \('sum', 'product'\), not 'mean'"):
        mask_scores(scores, ious, "mean")
