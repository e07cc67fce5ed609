from __future__ import annotations

import torch

from d2det.core import clip_boxes, sample_positives


def test_background_and_ignored_rois_do_not_train():
    classes = torch.tensor([3, 0, -1, 2, 3, 1])
    assert sample_positives(classes, 3, 10).tolist() == [1, 3, 5]
    assert sample_positives(classes[:1], 3, 10).tolist() == []


def test_a_random_subset_in_order_where_there_are_too_many():
    torch.manual_seed(0)
    classes = torch.zeros(50, dtype=torch.int64)
    draws = [sample_positives(classes, 1, 10).tolist() for _ in range(40)]
    assert all(len(set(d)) == 10 and d == sorted(d) for d in draws)
    assert {i for d in draws for i in d} == set(range(50))


def test_boxes_are_cut_at_their_own_image():
    boxes = torch.tensor([[-5.0, 2.0, 50.0, 90.0], [10.0, -1.0, 20.0, 5.0]])
    sizes = torch.tensor([[80.0, 40.0], [4.0, 100.0]])
    expected = torch.tensor([[0.0, 2.0, 40.0, 80.0], [10.0, 0.0, 20.0, 4.0]])
    assert torch.equal(clip_boxes(boxes, sizes), expected)
