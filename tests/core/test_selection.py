from __future__ import annotations

import torch
from torchvision.ops import box_iou, nms

from d2det.core import Candidates, SoftNMS, nms_candidates, pool_candidates, suppress
from d2det.core.selection import threshold_candidates


def scored(count: int, classes: int, images: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=generator) * 40), dim=1)
    scores = torch.rand(count, classes + 1, generator=generator)
    index = torch.randint(images, (count,), generator=generator)
    return boxes, scores, index


def test_threshold_is_strict_and_ignores_background():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]])
    scores = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.9, 0.99]])
    found = threshold_candidates(boxes, scores, torch.tensor([0, 1]), 0.2)
    assert found.classes.tolist() == [1, 0]
    assert found.rois.tolist() == [1, 0]
    assert found.images.tolist() == [1, 0]
    assert torch.equal(found.boxes, boxes[[1, 0]])


def test_threshold_with_a_box_for_each_class():
    boxes = torch.arange(16.0).view(2, 2, 4)
    found = threshold_candidates(
        boxes, torch.tensor([[0.6, 0.5, 0.0], [0.0, 0.7, 0.0]]), torch.tensor([0, 0]), 0.1
    )
    assert torch.equal(found.boxes, torch.stack((boxes[1, 1], boxes[0, 0], boxes[0, 1])))


def test_nms_equals_one_call_for_each_image_and_class():
    boxes, scores, images = scored(120, 3, 4)
    found = nms_candidates(
        threshold_candidates(boxes, scores, images, 0.3),
        iou_threshold=0.4,
        limit=1000,
        num_images=4,
    )
    result = set(zip(found.rois.tolist(), found.classes.tolist(), strict=True))
    expected = set()
    for image in range(4):
        for cls in range(3):
            index = ((images == image) & (scores[:, cls] > 0.3)).nonzero()[:, 0]
            kept = index[nms(boxes[index], scores[index, cls], 0.4)]
            expected |= {(i, cls) for i in kept.tolist()}
    assert result == expected
    assert len(result) == len(found.scores)
    assert found.scores.diff().max() <= 0


def test_limit_counts_each_image_by_itself():
    boxes, scores, images = scored(200, 2, 3)
    everything = threshold_candidates(boxes, scores, images, 0.0)
    found = nms_candidates(everything, iou_threshold=1.0, limit=7, num_images=3)
    for image in range(3):
        best = everything.scores[everything.images == image].topk(7).values
        assert torch.equal(found.scores[found.images == image], best)


def test_suppress_decays_within_image_and_class_only():
    box = torch.tensor([0.0, 0.0, 10.0, 10.0])
    near = torch.tensor([0.0, 0.0, 10.0, 8.0])  # IoU 0.8
    candidates = Candidates(
        boxes=torch.stack((box, near, near, near)),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
        classes=torch.tensor([0, 0, 1, 0]),
        images=torch.tensor([0, 0, 0, 1]),
        rois=torch.arange(4),
    )
    found = suppress(candidates, SoftNMS(), limit=100, num_images=2)
    # Only the second shares image and class with the first: 0.8 (1 - 0.8) = 0.16.
    assert found.rois.tolist() == [0, 2, 3, 1]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.6, 0.16]))
    plain = suppress(candidates, None, limit=1, num_images=2)
    assert plain.rois.tolist() == [0, 3]


def test_plain_nms_is_a_method_of_suppress():
    boxes, scores, images = scored(80, 2, 2)
    everything = threshold_candidates(boxes, scores, images, 0.2)
    found = suppress(everything, SoftNMS("hard", 0.4), limit=1000, num_images=2)
    expected = nms_candidates(everything, iou_threshold=0.4, limit=1000, num_images=2)
    assert torch.equal(found.rois, expected.rois)
    assert torch.equal(found.scores, expected.scores)


def test_suppress_drops_boxes_without_area():
    candidates = Candidates(
        boxes=torch.tensor([[0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 2.0, 2.0], [9.0, 3.0, 4.0, 4.0]]),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        classes=torch.zeros(3, dtype=torch.int64),
        images=torch.zeros(3, dtype=torch.int64),
        rois=torch.arange(3),
    )
    for settings in (SoftNMS(), None):
        assert suppress(candidates, settings, limit=9, num_images=1).rois.tolist() == [1]


def test_nothing_in_nothing_out():
    empty = threshold_candidates(
        torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0.1
    )
    for settings in (SoftNMS(), None):
        found = nms_candidates(empty, iou_threshold=0.5, limit=5, num_images=2)
        found = suppress(found, settings, limit=5, num_images=2)
        assert found.boxes.shape == (0, 4)


def test_nms_far_from_the_origin_keeps_its_precision():
    # 64 images of 80 classes: groups are shifted by millions of pixels, float32 would round IoUs.
    box = torch.tensor([[1000.0, 1000.0, 1010.0, 1010.0], [1000.0, 1000.0, 1010.0, 1004.999]])
    assert box_iou(box[:1], box[1:]).item() < 0.5
    candidates = Candidates(
        boxes=box,
        scores=torch.tensor([0.9, 0.8]),
        classes=torch.tensor([79, 79]),
        images=torch.tensor([63, 63]),
        rois=torch.arange(2),
    )
    found = nms_candidates(candidates, iou_threshold=0.5, limit=9, num_images=64)
    assert len(found.scores) == 2


def test_pooled_candidates_compete_as_if_one_view_had_found_them():
    boxes, scores, images = scored(90, 3, 2)
    everything = threshold_candidates(boxes, scores, images, 0.2)
    third = torch.arange(len(everything.scores)) % 3
    parts = [everything.take(third == i) for i in range(3)]
    pooled = pool_candidates([*parts, everything.take(third < 0)])  # and a view that found nothing
    assert pooled.scores.diff().max() <= 0
    found = suppress(pooled, SoftNMS(), limit=20, num_images=2)
    expected = suppress(everything, SoftNMS(), limit=20, num_images=2)
    for name in ("boxes", "scores", "classes", "images"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # rois: positions in all parts, one after the other
    joined = torch.cat([part.scores for part in parts])
    assert torch.equal(joined[pooled.rois], pooled.scores)


def test_pooling_settles_ties_by_the_order_of_the_parts():
    part = Candidates(
        boxes=torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
        scores=torch.tensor([0.5]),
        classes=torch.tensor([1]),
        images=torch.tensor([0]),
        rois=torch.tensor([7]),
    )
    other = part._replace(boxes=part.boxes + 1)
    assert torch.equal(pool_candidates([part, other]).boxes, torch.cat((part.boxes, other.boxes)))
    assert torch.equal(pool_candidates([other, part]).boxes, torch.cat((other.boxes, part.boxes)))
