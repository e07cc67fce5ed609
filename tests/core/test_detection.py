from __future__ import annotations

import pytest
import torch

from d2det.core import (
    DetectionSettings,
    dense_candidates,
    dense_samples,
    detect,
    from_inclusive,
    image_index,
    split_by_image,
    to_inclusive,
)


def test_images_of_boxes():
    assert image_index([2, 0, 1], torch.device("cpu")).tolist() == [0, 0, 2]
    assert image_index([0, 0], torch.device("cpu")).tolist() == []


def run(proposals, logits, images, sizes, settings, regress):
    candidates = dense_candidates(proposals, logits, images, sizes, settings, regress)
    return detect(candidates, settings, len(sizes))


def scored(*probabilities):
    return torch.tensor(probabilities).log()


def test_steps_in_their_order():
    # Two look-alikes (IoU 0.9), one elsewhere, and one of the other image.
    proposals = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 10]])
    logits = scored([0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.5, 0.5])
    seen = []

    def regress(images, boxes):
        seen.append((images.tolist(), boxes.tolist()))
        return boxes + 1

    found = run(
        proposals,
        logits,
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([[30.0, 25.0], [40.0, 40.0]]),
        DetectionSettings(soft_nms=None),
        regress,
    )
    # NMS on the proposals dropped the second one before regression.
    assert seen == [([0, 0, 1], [[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])]
    assert found.scores.tolist() == pytest.approx([0.8, 0.6, 0.5])
    # Clipped to the first image's 25 x 30 after regression.
    assert found.boxes.tolist() == [[1, 1, 11, 11], [21, 21, 25, 30], [1, 1, 11, 11]]
    first, second = split_by_image(found, 2)
    assert first.scores.tolist() == pytest.approx([0.8, 0.6]) and len(second.boxes) == 1


def test_limits_count_for_each_image():
    proposals = torch.tensor([[0.0, 0, 5, 5], [10, 10, 15, 15], [20, 20, 25, 25]]).repeat(2, 1)
    logits = scored(*[[0.9 - 0.1 * i, 0.1 + 0.1 * i] for i in range(6)])
    images = torch.tensor([0, 0, 0, 1, 1, 1])
    sizes = torch.full((2, 2), 50.0)
    counts = []

    def regress(images, boxes):
        counts.append(torch.bincount(images).tolist())
        return boxes

    settings = DetectionSettings(pre_regression_topk=2, detections_per_image=1)
    found = run(proposals, logits, images, sizes, settings, regress)
    assert counts == [[2, 2]]
    assert found.images.tolist() == [0, 1]


def test_no_proposals():
    found = run(
        torch.zeros(0, 4),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.full((2, 2), 50.0),
        DetectionSettings(),
        lambda images, boxes: boxes,
    )
    assert [len(x.boxes) for x in split_by_image(found, 2)] == [0, 0]


def test_samples_are_positives_of_their_images():
    torch.manual_seed(0)
    proposals = torch.rand(40, 4) * 10 + torch.tensor([0.0, 0, 20, 20])
    classes = torch.arange(40) % 4  # 3 is background
    images = (torch.arange(40) >= 20).long()
    sizes = torch.tensor([[100.0, 100.0], [40.0, 40.0]])
    samples = dense_samples(
        proposals, classes, images, sizes, num_classes=3, max_positive_per_image=5, jitter=0.0
    )
    assert len(samples.rois) == 10
    assert (classes[samples.rois] < 3).all()
    assert torch.equal(samples.images, images[samples.rois])
    assert torch.equal(samples.boxes, proposals[samples.rois])
    moved = dense_samples(
        proposals, classes, images, sizes, num_classes=3, max_positive_per_image=99, jitter=0.15
    )
    assert not torch.equal(moved.boxes, proposals[moved.rois])
    assert torch.equal(moved.rois, (classes < 3).nonzero()[:, 0])


def test_inclusive_boxes_name_their_last_pixel():
    # Pixels 10 to 19, 5 to 5.
    ours = torch.tensor([[10.0, 5.0, 20.0, 6.0]])
    assert to_inclusive(ours).tolist() == [[10, 5, 19, 5]]
    assert torch.equal(from_inclusive(to_inclusive(ours)), ours)
