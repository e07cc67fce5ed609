"""Runs of masks against a loop over all pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from d2det.core.run_lengths import mask_bounds, mask_runs


def by_loop(mask):
    """(start, end) of each run of ones, columns one after the other."""
    position, runs = 0, []
    for value, group in itertools.groupby(mask.numpy().flatten(order="F").tolist()):
        length = len(list(group))
        if value:
            runs.append((position, position + length))
        position += length
    return runs


def awkward_masks(height=7, width=9):
    masks = torch.zeros(12, height, width, dtype=torch.bool)
    masks[1] = True
    masks[2, 0, 0] = True
    masks[3, -1, -1] = True
    masks[4, 2:5, 3:6] = True
    masks[5, :, 2:5] = True  # whole columns: one run
    masks[6, -1, 2] = masks[6, 0, 3] = True  # from the foot of a column to the head of the next
    masks[7, 3] = True
    masks[8] = torch.rand(height, width) > 0.5
    masks[9, 0, :] = masks[9, -1, :] = True
    masks[10, 2:5, 3:6] = True
    masks[10, 3, 4] = False  # a hole
    # 11: empty, as 0
    return masks


def check(masks):
    runs = mask_runs(masks)
    for index, mask in enumerate(masks):
        mine = runs.masks == index
        found = list(zip(runs.starts[mine].tolist(), runs.ends[mine].tolist(), strict=True))
        assert found == by_loop(mask), index


def test_awkward_masks():
    check(awkward_masks())


def test_noise_and_views():
    masks = torch.rand(5, 40, 31) > 0.4
    check(masks)
    check(masks.transpose(1, 2))
    check(masks[::2, 3:, 4:-1])


@pytest.mark.parametrize(
    "shape", [(0, 5, 5), (2, 0, 4), (2, 4, 0), (1, 1, 1), (3, 1, 6), (3, 6, 1)]
)
def test_odd_sizes(shape):
    check(torch.ones(shape, dtype=torch.bool))
    check(torch.zeros(shape, dtype=torch.bool))


def test_bounds():
    masks = awkward_masks()
    for mask, box in zip(masks, mask_bounds(masks).tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        wanted = [0, 0, 0, 0]
        if len(rows):
            wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == wanted


@pytest.mark.parametrize("masks", [torch.zeros(4, 4, dtype=torch.bool), torch.zeros(1, 4, 4)])
def test_errors_name_what_is_wrong(masks):
    with pytest.raises(ValueError, match=r"masks must be \(N, H, W\) bool, not"):
        mask_runs(masks)
