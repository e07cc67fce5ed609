from __future__ import annotations

import math

import pytest
import torch

from d2det.core import average_boxes, cell_centers, decode_offsets, encode_offsets, overlap_targets


def random_boxes(count: int, generator: torch.Generator, limit: float = 200.0) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * limit
    size = 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * limit
    return torch.cat((corner, corner + size), dim=1)


def loop_offsets(proposal, box, k):
    """Eq. 2, one cell at a time."""
    x1, y1, x2, y2 = proposal
    xl, yt, xr, yb = box
    w, h = x2 - x1, y2 - y1
    result = [[[0.0] * k for _ in range(k)] for _ in range(4)]
    for i in range(k):
        for j in range(k):
            x, y = x1 + (j + 0.5) * w / k, y1 + (i + 0.5) * h / k
            values = ((x - xl) / w, (y - yt) / h, (xr - x) / w, (yb - y) / h)
            for side, value in enumerate(values):
                result[side][i][j] = value
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_encode_equals_the_equation(k):
    generator = torch.Generator().manual_seed(k)
    proposals, boxes = random_boxes(5, generator), random_boxes(5, generator)
    expected = torch.stack(
        [loop_offsets(p, b, k) for p, b in zip(proposals.tolist(), boxes.tolist(), strict=True)]
    )
    torch.testing.assert_close(encode_offsets(proposals, boxes, k), expected, rtol=0, atol=1e-12)


def test_worked_example():
    # A 70 x 70 proposal at the origin: cells are 10 wide, the first centre lies at 5.
    # The object starts at 10 and ends at 80: l = (5 - 10)/70, r = (80 - 5)/70.
    offsets = encode_offsets(
        torch.tensor([[0.0, 0.0, 70.0, 70.0]]), torch.tensor([[10.0, 20.0, 80.0, 60.0]]), 7
    )
    expected = torch.tensor([-5 / 70, -15 / 70, 75 / 70, 55 / 70])
    torch.testing.assert_close(offsets[0, :, 0, 0], expected)


def test_decoding_inverts_encoding_at_every_cell():
    generator = torch.Generator().manual_seed(0)
    proposals, boxes = random_boxes(50, generator), random_boxes(50, generator)
    decoded = decode_offsets(proposals, encode_offsets(proposals, boxes, 7))
    expected = boxes[:, :, None, None].expand(-1, -1, 7, 7)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-10)


def test_degenerate_proposals_stay_finite_and_invert():
    proposals = torch.tensor([[3.0, 4.0, 3.0, 90.0], [0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 505.0, 6.0]])
    boxes = torch.tensor([[3.0, 4.0, 4.0, 80.0], [0.0, 0.0, 1.0, 2.0], [4.0, 4.0, 500.0, 7.0]])
    offsets = encode_offsets(proposals, boxes, 7)
    assert offsets.isfinite().all()
    decoded = decode_offsets(proposals, offsets)
    torch.testing.assert_close(
        decoded, boxes[:, :, None, None].expand_as(decoded), atol=1e-3, rtol=0
    )


def test_half_precision_boxes_are_widened():
    # 1000.3 has no half-precision neighbour nearer than 0.3: geometry happens in float32.
    proposals = torch.tensor([[1000.0, 1000.0, 1010.0, 1010.0]]).half()
    assert encode_offsets(proposals, proposals, 7).dtype == torch.float32
    assert cell_centers(proposals, 2)[0, 0, 0, 0] == 1002.5


@pytest.mark.parametrize("margin", [0.0, 1 / 6])
def test_overlap_targets_equal_a_loop(margin):
    generator = torch.Generator().manual_seed(1)
    proposals = random_boxes(40, generator, 20.0)
    boxes = random_boxes(40, generator, 20.0)
    targets = overlap_targets(encode_offsets(proposals, boxes, 7), margin)
    expected = torch.zeros(40, 1, 7, 7, dtype=torch.float64)
    for r, (p, b) in enumerate(zip(proposals.tolist(), boxes.tolist(), strict=True)):
        w, h = p[2] - p[0], p[3] - p[1]
        for i in range(7):
            for j in range(7):
                x, y = p[0] + (j + 0.5) * w / 7, p[1] + (i + 0.5) * h / 7
                inside = (
                    x - b[0] >= margin * w
                    and b[2] - x >= margin * w
                    and y - b[1] >= margin * h
                    and b[3] - y >= margin * h
                )
                expected[r, 0, i, j] = float(inside)
    assert torch.equal(targets, expected)
    assert 0 < expected.mean() < 1


def test_margin_of_the_releases_on_a_matching_proposal():
    # Proposal = object, k = 7: cells 0 and 6 lie 1/14 inside, cells 1 and 5 at 3/14 > 1/6.
    box = torch.tensor([[0.0, 0.0, 70.0, 70.0]])
    targets = overlap_targets(encode_offsets(box, box, 7), 1 / 6)
    expected = torch.zeros(7, 7)
    expected[1:6, 1:6] = 1
    assert torch.equal(targets[0, 0], expected)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_average_takes_the_cells_that_vote():
    boxes = torch.zeros(1, 4, 2, 2)
    boxes[0, :, 0, 0] = torch.tensor([0.0, 0.0, 10.0, 10.0])
    boxes[0, :, 0, 1] = torch.tensor([2.0, 4.0, 20.0, 30.0])
    boxes[0, :, 1] = 1000.0
    logits = torch.tensor([[[[logit(0.9), logit(0.51)], [logit(0.49), -50.0]]]])
    average = average_boxes(boxes, logits, 0.5)
    torch.testing.assert_close(average, torch.tensor([[1.0, 2.0, 15.0, 20.0]]))


def test_average_falls_back_to_the_most_likely_cell():
    boxes = torch.arange(16.0).view(1, 4, 2, 2)
    logits = torch.tensor([[[[-3.0, -1.0], [-2.0, -90.0]]]])
    assert torch.equal(average_boxes(boxes, logits, 0.5), boxes[:, :, 0, 1])


def test_average_without_overlap_prediction_and_without_rois():
    boxes = torch.arange(16.0).view(1, 4, 2, 2)
    assert torch.equal(average_boxes(boxes, None, 0.5), boxes.mean(dim=(2, 3)))
    empty = average_boxes(torch.zeros(0, 4, 7, 7), torch.zeros(0, 1, 7, 7), 0.5)
    assert empty.shape == (0, 4)
