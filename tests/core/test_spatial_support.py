"""What a node sees: gradients and the masking loop, on networks whose answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from d2det.core.spatial_support import (
    box_mask,
    centred_boxes,
    cosine_errors,
    drop_superpixels,
    grow_box,
    masked_errors,
    receptive_field,
)

SIZE = (8, 12)


def test_receptive_field_of_a_3x3_convolution():
    weight = torch.rand(1, 3, 3, 3) + 0.1
    image = torch.rand(3, *SIZE)
    field = receptive_field(lambda x: F.conv2d(x, weight, padding=1)[:, :, 4, 7], image)
    expected = torch.zeros(SIZE)
    expected[3:6, 6:9] = weight[0].mean(dim=0)  # d|f|/df is 1
    torch.testing.assert_close(field, expected)


def test_receptive_field_averages_absolute_values_over_channels():
    field = receptive_field(lambda x: x[:, :1, 2, 2] - 3 * x[:, 1:2, 2, 2], torch.ones(3, *SIZE))
    assert field[2, 2].item() == pytest.approx((1 + 3 + 0) / 3)


def test_cosine_errors():
    responses = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    errors = cosine_errors(responses, torch.tensor([[5.0, 0.0]]))
    torch.testing.assert_close(errors, torch.tensor([0.0, 1.0, 2.0, 1.0]))


def test_masked_errors_go_through_in_batches_and_masked_means_zero():
    seen = []

    def respond(images):
        seen.append(len(images))
        return images.sum(dim=(2, 3))

    image = torch.ones(3, *SIZE)
    image[1:] = 0
    image[1, 0, 0] = 12.0  # with the first row alone: channels 12 and 12
    errors = masked_errors(respond, image, batch=2)
    masks = torch.ones(3, *SIZE, dtype=torch.bool)
    masks[1, 1:] = False
    masks[2] = False
    found = errors(masks)
    assert seen == [1, 2, 1]
    whole = torch.tensor([96.0, 12.0])
    first_row = torch.tensor([12.0, 12.0])
    expected = 1 - float(F.cosine_similarity(whole, first_row, dim=0))
    torch.testing.assert_close(found, torch.tensor([0.0, expected, 1.0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("center", "aspect"), [((3.0, 5.0), 1.0), ((11.0, 1.0), 0.5)])
def test_boxes_grow_around_the_node_to_the_whole_image(center, aspect):
    boxes = centred_boxes(center, aspect, (100, 160), 20)
    assert boxes[-1] == (0, 0, 160, 100)
    for inner, outer in itertools.pairwise(boxes):
        assert all(a >= b for a, b in zip(inner[:2], outer[:2], strict=True))
        assert all(a <= b for a, b in zip(inner[2:], outer[2:], strict=True))
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= 160
        assert 0 <= y1 < y2 <= 100


def test_boxes_have_the_aspect_where_the_image_does_not_cut_them():
    x1, y1, x2, y2 = centred_boxes((400.0, 300.0), 2.0, (600, 800), 20)[4]
    assert (x2 - x1) / (y2 - y1) == pytest.approx(2.0, rel=0.02)
    assert (x1 + x2, y1 + y2) == (800, 600)


def needs(*points):
    """Errors of a network that needs some pixels: each one missing costs 0.06."""

    def errors(masks):
        kept = torch.stack([masks[:, y, x] for y, x in points], dim=1)
        return 0.06 * (~kept).sum(dim=1).float()

    return errors


def test_the_smallest_box_that_keeps_the_bound():
    boxes = centred_boxes((6.0, 4.0), 1.0, SIZE, 12)
    found = grow_box(needs((4, 6), (2, 7), (6, 5)), boxes, SIZE, 0.05)
    x1, y1, x2, y2 = found
    assert y1 <= 2 and y2 > 6 and x1 <= 5 and x2 > 7
    before = boxes[boxes.index(found) - 1]
    assert needs((4, 6), (2, 7), (6, 5))(box_mask(before, SIZE)[None]) > 0.05
    assert grow_box(lambda masks: torch.ones(len(masks)), boxes, SIZE, 0.1) == boxes[-1]


def test_superpixels_go_while_the_bound_holds():
    labels = torch.arange(SIZE[0] * SIZE[1]).view(SIZE) // 4  # 24 of them
    mask = box_mask((0, 0, 12, 6), SIZE)  # without the last six
    settled = []
    errors = needs((0, 0), (2, 9), (5, 5))  # super-pixels 0, 8, 16
    kept = drop_superpixels(errors, mask, labels, 0.1, settled.append)
    # One of the three may be missing, not two.
    left = set(labels[kept].tolist())
    assert len(left) == 2
    assert left < {0, 8, 16}
    assert errors(kept[None]) <= 0.1
    assert sum(settled) == labels[mask].unique().numel()
    assert bool((kept & ~mask).any()) is False
    assert bool(mask[0, 11])  # the argument is left as it was


def test_a_single_superpixel_that_is_needed_stays():
    labels = torch.zeros(SIZE, dtype=torch.int64)
    mask = box_mask((2, 2, 5, 5), SIZE)
    assert torch.equal(drop_superpixels(needs((3, 3), (4, 4)), mask, labels, 0.1), mask)
