from __future__ import annotations

import math

import pytest
import torch

from d2det.core import assign_levels, jitter_boxes


def test_jitter_stays_within_its_bounds_and_fills_them():
    boxes = torch.tensor([[400.0, 300.0, 500.0, 500.0]]).repeat(4000, 1)
    sizes = torch.full((4000, 2), 1000.0)
    moved = jitter_boxes(boxes, sizes, 0.15, torch.Generator().manual_seed(0))
    center = (moved[:, :2] + moved[:, 2:]) / 2
    size = moved[:, 2:] - moved[:, :2]
    shift = (center - torch.tensor([450.0, 400.0])) / torch.tensor([100.0, 200.0])
    scale = size / torch.tensor([100.0, 200.0]) - 1
    for value in (shift, scale):
        assert value.abs().max() <= 0.15 + 1e-5
        assert value.abs().max() > 0.145
        assert value.mean().abs() < 0.01
    assert torch.corrcoef(torch.cat((shift, scale), dim=1).T).triu(1).abs().max() < 0.06


def test_jitter_clips_to_each_image_and_keeps_a_pixel():
    boxes = torch.tensor(
        [[0.0, 0.0, 50.0, 50.0], [99.0, 40.0, 100.0, 60.0], [0.0, 79.8, 0.2, 80.0]]
    ).repeat(500, 1)
    sizes = torch.tensor([[80.0, 100.0]]).repeat(1500, 1)
    moved = jitter_boxes(boxes, sizes, 0.15, torch.Generator().manual_seed(1))
    assert moved[:, :2].min() >= 0
    assert moved[:, 2].max() <= 100 and moved[:, 3].max() <= 80
    assert (moved[:, 2:] - moved[:, :2]).min() >= 1 - 1e-5


def test_jitter_of_nothing_and_by_nothing():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(jitter_boxes(boxes, torch.tensor([[9.0, 9.0]]), 0.0), boxes)
    assert jitter_boxes(boxes[:0], torch.zeros(0, 2), 0.15).shape == (0, 4)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
        jitter_boxes(boxes, torch.tensor([[9.0, 9.0]]), 1.5)


@pytest.mark.parametrize(
    ("side", "level"),
    [(1, 0), (56, 0), (111.9, 0), (112, 1), (224, 2), (447, 2), (448, 3), (9999, 3)],
)
def test_levels_of_the_paper(side, level):
    boxes = torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side]])
    assert assign_levels(boxes, (4, 8, 16, 32)).tolist() == [level]
    # The same by the formula for strides 4 to 32.
    assert min(max(math.floor(math.log2(side / 56)), 0), 3) == level


def test_levels_of_other_pyramids():
    boxes = torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 0.0, 9.0]])
    assert assign_levels(boxes, (16,)).tolist() == [0, 0]
    assert assign_levels(boxes, (8, 16, 32, 64, 128)).tolist() == [1, 0]
    with pytest.raises(ValueError, match="double"):
        assign_levels(boxes, (4, 8, 32))
    with pytest.raises(ValueError, match="double"):
        assign_levels(boxes, (32, 16, 8, 4))


def test_levels_equal_detectron2():
    poolers = pytest.importorskip("detectron2.modeling.poolers")
    structures = pytest.importorskip("detectron2.structures")
    generator = torch.Generator().manual_seed(0)
    size = 2 ** (torch.rand(2000, 2, generator=generator) * 10)
    boxes = torch.cat((torch.zeros(2000, 2), size), dim=1)
    expected = poolers.assign_boxes_to_levels([structures.Boxes(boxes)], 2, 5, 224, 4)
    assert torch.equal(assign_levels(boxes, (4, 8, 16, 32)), expected)


@pytest.mark.parametrize(
    ("side", "level"), [(110.9, 0), (111, 1), (112, 1), (222.9, 1), (223, 2), (447, 3)]
)
def test_levels_of_the_releases(side, level):
    # Boxes that name their last pixel are one pixel longer than x2 - x1.
    boxes = torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side]])
    assert assign_levels(boxes, (4, 8, 16, 32), inclusive=True).tolist() == [level]
