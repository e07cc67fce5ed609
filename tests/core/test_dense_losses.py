from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from d2det.core import decode_offsets, dense_iou_loss, overlap_loss
from d2det.core.losses import elementwise_iou


def test_iou_equals_torchvision_and_is_zero_for_inverted_boxes():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(30, 4, generator=generator, dtype=torch.float64) * 10
    b = torch.rand(30, 4, generator=generator, dtype=torch.float64) * 10
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    torch.testing.assert_close(elementwise_iou(a, b), box_iou(a, b).diagonal())
    inverted = a[:, [2, 3, 0, 1]]
    assert elementwise_iou(inverted, a).eq(0).all()
    assert elementwise_iou(inverted, inverted).eq(0).all()


def test_loss_equals_a_loop_over_cells():
    generator = torch.Generator().manual_seed(1)
    proposals = torch.tensor([[0.0, 0.0, 40.0, 20.0], [10.0, 5.0, 30.0, 60.0]]).double()
    gt_boxes = torch.tensor([[2.0, -1.0, 44.0, 18.0], [8.0, 8.0, 33.0, 50.0]]).double()
    offsets = torch.rand(2, 4, 7, 7, generator=generator, dtype=torch.float64)
    weights = (torch.rand(2, 1, 7, 7, generator=generator) > 0.4).double()
    cells = decode_offsets(proposals, offsets)
    total, eps = 0.0, 0.01
    for r in range(2):
        for i in range(7):
            for j in range(7):
                if not weights[r, 0, i, j]:
                    continue
                x1, y1, x2, y2 = cells[r, :, i, j].tolist()
                g1, h1, g2, h2 = gt_boxes[r].tolist()
                inter = max(min(x2, g2) - max(x1, g1), 0) * max(min(y2, h2) - max(y1, h1), 0)
                union = (x2 - x1) * (y2 - y1) + (g2 - g1) * (h2 - h1) - inter
                total += -math.log((inter / union + eps) / (1 + eps))
    loss = dense_iou_loss(cells, gt_boxes, weights, eps)
    assert loss.item() == pytest.approx(total / (2 * 49), abs=1e-12)


def test_each_cell_is_weighted_by_itself():
    # The first release broadcasts (n,) with (n, 1): one background cell then counts as well.
    gt_boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    cells = gt_boxes[:, :, None, None].repeat(1, 1, 2, 2)
    cells[0, :, 1, 1] = torch.tensor([100.0, 100.0, 110.0, 110.0])
    weights = torch.ones(1, 1, 2, 2)
    weights[0, 0, 1, 1] = 0
    assert dense_iou_loss(cells, gt_boxes, weights).item() == pytest.approx(0, abs=1e-6)


def test_loss_is_finite_and_falls_with_iou_near_zero():
    gt_boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    losses = []
    for shift in (10.0, 9.9, 9.5, 9.0, 8.9, 5.0, 0.0):
        cells = gt_boxes + torch.tensor([shift, 0.0, shift, 0.0])
        losses.append(
            dense_iou_loss(cells[:, :, None, None], gt_boxes, torch.ones(1, 1, 1, 1)).item()
        )
    assert all(math.isfinite(x) for x in losses)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    assert losses[-1] == pytest.approx(0, abs=1e-6)


def test_gradients():
    generator = torch.Generator().manual_seed(2)
    proposals = torch.tensor([[0.0, 0.0, 40.0, 20.0]]).double()
    gt_boxes = torch.tensor([[1.0, 1.0, 42.0, 19.0]]).double()
    offsets = 0.4 + 0.2 * torch.rand(1, 4, 3, 3, generator=generator, dtype=torch.float64)
    offsets.requires_grad_()
    weights = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: dense_iou_loss(decode_offsets(proposals, x), gt_boxes, weights), (offsets,)
    )


def test_overlap_loss_is_the_mean_cross_entropy():
    logits = torch.tensor([[[[0.0, 2.0]]]])
    targets = torch.tensor([[[[1.0, 0.0]]]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert overlap_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_no_rois_gives_zero_that_backpropagates():
    cells = torch.zeros(0, 4, 7, 7, requires_grad=True)
    logits = torch.zeros(0, 1, 7, 7, requires_grad=True)
    loss = dense_iou_loss(cells, torch.zeros(0, 4), torch.zeros(0, 1, 7, 7))
    loss = loss + overlap_loss(logits, torch.zeros(0, 1, 7, 7))
    loss.backward()
    assert loss.item() == 0
    assert cells.grad.shape == cells.shape
