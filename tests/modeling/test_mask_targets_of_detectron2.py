"""Ground-truth masks of detectron2 as targets, beside its own crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from d2det.modeling.mask_targets import SharedMasks, mask_targets, share_masks


def objects(kind):
    """Random quadrilaterals, and boxes near their own."""
    generator = np.random.default_rng(0)
    polygons = []
    for _ in range(12):
        angle = np.sort(generator.uniform(0, 2 * np.pi, 5))
        radius = generator.uniform(10, 28, 5)
        points = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
        polygons.append([(points + generator.uniform(32, 64, 2)).ravel()])
    masks = PolygonMasks(polygons)
    boxes = masks.get_bounding_boxes().tensor
    size = boxes[:, 2:] - boxes[:, :2]
    noise = torch.from_numpy(generator.uniform(-0.15, 0.15, (12, 4))).float()
    boxes = boxes + noise * size.repeat(1, 2)
    return (masks if kind == "polygon" else BitMasks.from_polygon_masks(masks, 96, 96)), boxes


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_targets_are_detectron2s_crops(kind):
    masks, boxes = objects(kind)
    targets = SharedMasks(masks, torch.arange(12)).targets(boxes, 28)
    expected = masks.crop_and_resize(boxes, 28)
    # pycocotools' polygons are rounded to the pixel of the target, ours to a quarter of it.
    assert (targets.masks == expected).float().mean() > (0.985 if kind == "bitmask" else 0.96)
    assert 0.2 < expected.float().mean() < 0.9
    assert targets.valid.all()


def test_polygons_and_bitmaps_have_the_same_targets():
    polygons, boxes = objects("polygon")
    bitmaps, _ = objects("bitmask")
    index = torch.tensor([3, 3, 0, 11])
    boxes = boxes[index]
    boxes[1, 2:] -= 6
    a, b = (SharedMasks(m, index).targets(boxes, 28) for m in (polygons, bitmaps))
    assert (a.masks == b.masks).float().mean() > 0.97
    torch.testing.assert_close(a.shares, b.shares, atol=0.02, rtol=0)
    assert a.shares[1] < a.shares[0]


def test_polygons_with_holes_of_annotation_and_lines():
    masks = PolygonMasks([[], [[5.0, 5.0, 30.0, 30.0, 5.0, 5.0]], [[2.0, 2, 20, 2, 20, 20, 2, 20]]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [5.0, 5, 30, 30], [0.0, 0, 20, 20]])
    targets = SharedMasks(masks, torch.arange(3)).targets(boxes, 28)
    assert targets.valid[0].item() is False and targets.valid[2].item() is True
    assert not targets.masks[0].any()
    assert all(x.isfinite().all() for x in targets)


def test_shared_masks_are_indexed_without_copies():
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9], [5.0, 5, 20, 20]]))
    instances.gt_masks = BitMasks(torch.ones(2, 20, 30, dtype=torch.bool))
    (shared,) = share_masks([instances])
    assert isinstance(instances.gt_masks, BitMasks)
    many = shared[torch.tensor([1, 1, 0, 1])][torch.tensor([True, False, True, True])]
    assert many.gt_masks.index.tolist() == [1, 0, 1]
    assert many.gt_masks.masks is instances.gt_masks
    assert len(many) == len(many.gt_masks) == 3
    assert many.gt_masks[1].index.tolist() == [0]
    plain = Instances((20, 30), gt_boxes=Boxes(torch.zeros(0, 4)))
    assert not share_masks([plain])[0].has("gt_masks")


def test_targets_of_a_batch_belong_to_their_proposals():
    proposals = []
    for size, fill in (((20, 30), 0), ((16, 16), None), ((40, 40), 1)):
        p = Instances(size)
        p.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [4.0, 4, 16, 16]]))
        if fill is not None:
            masks = torch.zeros(2, *size, dtype=torch.bool)
            masks[fill] = True
            p.gt_masks = SharedMasks(BitMasks(masks), torch.arange(2))
        proposals.append(p)
    rows, images = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([0, 0, 1, 2, 2])
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5)
    targets = mask_targets(proposals, rows, images, boxes, 28)
    assert targets.valid.tolist() == [True, False, False, False, True]
    assert targets.masks.flatten(1).all(1).tolist() == targets.valid.tolist()
