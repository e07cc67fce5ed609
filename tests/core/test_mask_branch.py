from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from d2det.core import DenseRegression, MaskBranch, MaskTargets, encode_offsets
from d2det.core.mask_prediction import MaskPredictor, choose_class, mask_loss


def branch(**kwargs) -> MaskBranch:
    torch.manual_seed(0)
    arguments = {"conv_dim": 8, "norm": partial(nn.GroupNorm, 4), "score_fc_dim": 16}
    return MaskBranch(6, 7, 3, **{**arguments, **kwargs})


def some_targets(valid=(True, True, True, True)) -> MaskTargets:
    masks = torch.zeros(4, 28, 28, dtype=torch.bool)
    masks[:, 4:20, 6:26] = True
    valid = torch.tensor(valid)
    masks[~valid] = False
    return MaskTargets(masks, torch.tensor([1.0, 0.5, 0.8, 1.0]) * valid, valid)


CLASSES = torch.tensor([2, 0, 1, 2])


def test_sizes_are_the_papers():
    with torch.device("meta"):
        predictor = MaskPredictor(576, 80, norm=partial(nn.GroupNorm, 16))
    shapes = {name: tuple(p.shape) for name, p in predictor.named_parameters()}
    assert shapes["deconv1.weight"] == (576, 256, 2, 2)
    assert shapes["deconv2.weight"] == (256, 256, 2, 2)
    assert shapes["predictor.weight"] == (80, 256, 3, 3)
    assert predictor.norm1.num_groups == 16
    assert predictor(torch.empty(5, 576, 7, 7, device="meta")).shape == (5, 80, 28, 28)


def test_loss_equals_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    masks = torch.rand(3, 4, 4, generator=generator) > 0.5
    valid = torch.tensor([True, False, True])
    total = 0.0
    for r in (0, 2):
        for i in range(4):
            for j in range(4):
                p = 1 / (1 + math.exp(-logits[r, i, j].item()))
                total -= math.log(p if masks[r, i, j] else 1 - p)
    assert mask_loss(logits, masks, valid).item() == pytest.approx(total / 32, abs=1e-12)
    assert mask_loss(logits, masks, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_only_the_mask_of_its_class_trains():
    logits = torch.randn(4, 3, 28, 28, requires_grad=True)
    targets = some_targets()
    mask_loss(choose_class(logits, CLASSES), targets.masks, targets.valid).backward()
    trained = logits.grad.abs().sum(dim=(2, 3)) > 0
    assert torch.equal(trained, nn.functional.one_hot(CLASSES, 3).bool())
    assert torch.equal(choose_class(logits[:, :1], CLASSES), logits[:, 0])


def test_predicts_masks_of_the_given_classes_with_scores():
    model = branch()
    nn.init.normal_(model.masks.predictor.weight)
    trunk = torch.randn(4, 6, 7, 7)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    masks, ranks = model.predict(trunk, CLASSES, scores)
    assert masks.shape == (4, 1, 28, 28) and ranks.shape == (4,)
    everything = model.masks(trunk).sigmoid()
    for r, c in enumerate(CLASSES.tolist()):
        torch.testing.assert_close(masks[r, 0], everything[r, c])
    ious = model.scorer(trunk, choose_class(model.masks(trunk), CLASSES), CLASSES)
    torch.testing.assert_close(ranks, scores + 0.3 * ious)
    assert branch(scoring=False).predict(trunk, CLASSES, scores)[1] is None


def test_a_mask_for_all_classes_keeps_an_iou_for_each():
    model = branch(class_agnostic=True)
    assert model.masks.predictor.out_channels == 1
    assert model.scorer.predictor.out_features == 3
    losses, _ = model.losses(torch.randn(4, 6, 7, 7), CLASSES, some_targets())
    assert set(losses) == {"loss_mask", "loss_mask_iou"}


@pytest.mark.parametrize("agnostic", [False, True])
def test_learns_masks_and_how_good_they_are(agnostic):
    model = branch(class_agnostic=agnostic, conv_dim=32)
    trunk, targets = torch.randn(4, 6, 7, 7), some_targets()
    targets.masks[2, 4:12] = False
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        losses, statistics = model.losses(trunk, CLASSES, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert statistics["accuracy"] > 0.98
    assert statistics["iou_error"] < 0.05
    # The shares 1, 0.5, 0.8, 1: as much of the instances can be found at all.
    assert statistics["mean_iou"].item() == pytest.approx(0.825, abs=0.03)
    _, ranks = model.predict(trunk, CLASSES, torch.zeros(4))
    assert (ranks / 0.3).tolist() == pytest.approx([1.0, 0.5, 0.8, 1.0], abs=0.1)


def test_loss_weights_and_half_a_batch_without_masks():
    trunk = torch.randn(4, 6, 7, 7)
    one, many = branch(), branch(loss_weight=3.0, score_loss_weight=2.5)
    targets = some_targets((True, False, True, False))
    a, _ = one.losses(trunk, CLASSES, targets)
    b, _ = many.losses(trunk, CLASSES, targets)
    torch.testing.assert_close(b["loss_mask"], 3 * a["loss_mask"])
    torch.testing.assert_close(b["loss_mask_iou"], 5 * a["loss_mask_iou"])
    rows = torch.tensor([0, 2])
    c, _ = one.losses(trunk[rows], CLASSES[rows], MaskTargets(*(x[rows] for x in targets)))
    for name in a:
        torch.testing.assert_close(a[name], c[name])


@pytest.mark.parametrize("count", [0, 3])
def test_no_masks_give_every_parameter_a_zero_gradient(count):
    model = branch()
    trunk = torch.randn(count, 6, 7, 7)
    classes = torch.zeros(count, dtype=torch.int64)
    targets = MaskTargets.none(count, 28, trunk.device)
    losses, statistics = model.losses(trunk, classes, targets)
    sum(losses.values()).backward()
    assert all(v.item() == 0 for v in losses.values())
    assert all(v.isfinite() for v in statistics.values())
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())
    masks, scores = model.predict(trunk, classes, torch.zeros(count))
    assert masks.shape == (count, 1, 28, 28) and scores.shape == (count,)


def test_autocast_predicts_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = branch().losses(torch.randn(4, 6, 7, 7), CLASSES, some_targets())
        masks, scores = branch().predict(torch.randn(4, 6, 7, 7), CLASSES, torch.rand(4))
    assert {x.dtype for x in (*losses.values(), masks, scores)} == {torch.float32}


def test_cells_are_labelled_by_masks_where_there_are_masks():
    dense = DenseRegression(6, conv_dim=12, num_conv=1)
    boxes = torch.tensor([[0.0, 0.0, 28.0, 28.0]]).repeat(4, 1)
    offsets = encode_offsets(boxes, boxes, 7)
    logits = torch.full((4, 1, 7, 7), -20.0)
    # The masks' rows 4 to 19 and columns 6 to 25: cells 1 to 4, and 2 to 5 with 4 x 6 + 2 > 1/2.
    logits[:2, :, 1:5, 2:6] = 20.0
    logits[:2, :, 1:5, 1] = -20.0  # column 1 has pixels 5 and 6 in its middle: a half, not more
    logits[2:, :, 1:6, 1:6] = 20.0  # Eq. 3 with the releases' margin
    targets = some_targets((True, True, False, False))
    losses, statistics = dense.losses((offsets, logits), boxes, boxes, branch().overlap(targets))
    assert losses["loss_overlap"].item() == pytest.approx(0, abs=1e-6)
    assert statistics["overlap_accuracy"].item() == 1
    losses, _ = dense.losses((offsets, logits), boxes, boxes)
    assert losses["loss_overlap"].item() > 1
    assert branch(overlap_labels=False).overlap(targets) is None


def test_offsets_train_in_the_masks_cells_only():
    dense = DenseRegression(6, conv_dim=12, num_conv=1)
    boxes = torch.tensor([[0.0, 0.0, 28.0, 28.0]]).repeat(4, 1)
    offsets = torch.full((4, 4, 7, 7), 0.3, requires_grad=True)
    logits = torch.zeros(4, 1, 7, 7)
    labels = branch().overlap(some_targets())
    losses, _ = dense.losses((offsets, logits), boxes, boxes, labels)
    losses["loss_dense_reg"].backward()
    assert torch.equal(offsets.grad.abs().sum(dim=1, keepdim=True) > 0, labels[0] > 0)


def test_refuses_an_unknown_ranking():
    with pytest.raises(ValueError, match="not 'best'"):
        branch(ranking="best")
