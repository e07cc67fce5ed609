"""Mask targets against loops over pixels in Python floats, and against worked numbers."""

from __future__ import annotations

import pytest
import torch

from d2det.core import MaskTargets, crop_masks, mask_targets
from d2det.core.mask_targets import shrink_masks


def overlap_1d(a0: float, a1: float, b0: float, b1: float) -> float:
    return max(min(a1, b1) - max(a0, b0), 0.0)


def crop_by_loop(raster, frame, box, side):
    """Cover of each cell and the share of the mask's area inside the box, pixel by pixel."""
    height, width = raster.shape
    fx, fy = frame[0], frame[1]
    px, py = (frame[2] - frame[0]) / width, (frame[3] - frame[1]) / height
    cw, ch = (box[2] - box[0]) / side, (box[3] - box[1]) / side
    cover = [[0.0] * side for _ in range(side)]
    inside = total = 0.0
    for v in range(height):
        for u in range(width):
            if not raster[v, u]:
                continue
            x0, y0 = fx + u * px, fy + v * py
            total += px * py
            inside += overlap_1d(x0, x0 + px, box[0], box[2]) * overlap_1d(
                y0, y0 + py, box[1], box[3]
            )
            for i in range(side):
                for j in range(side):
                    cell_x, cell_y = box[0] + j * cw, box[1] + i * ch
                    area = overlap_1d(x0, x0 + px, cell_x, cell_x + cw) * overlap_1d(
                        y0, y0 + py, cell_y, cell_y + ch
                    )
                    cover[i][j] += area / (cw * ch)
    return torch.tensor(cover), inside / total if total else 0.0


BOXES = [
    [1.3, 0.7, 8.1, 6.9],
    [-3.0, -2.0, 5.5, 4.0],  # beyond the image on two sides
    [6.2, 3.1, 15.0, 12.0],
    [2.0, 2.0, 2.4, 2.3],  # within one pixel
    [20.0, 20.0, 30.0, 30.0],  # nowhere near it
    [0.0, 0.0, 10.0, 8.0],
]


@pytest.mark.parametrize("frame", [[0.0, 0.0, 10.0, 8.0], [1.0, -0.5, 7.0, 9.5]])
def test_crops_and_shares_equal_a_loop_over_pixels(frame, device):
    generator = torch.Generator().manual_seed(3)
    rasters = torch.rand(3, 8, 10, generator=generator) > 0.5
    index = torch.tensor([0, 2, 1, 0, 2, 2])
    found = crop_masks(
        rasters.to(device),
        torch.tensor([frame] * 3, device=device),
        index.to(device),
        torch.tensor(BOXES, device=device),
        6,
    )
    for r, box in enumerate(BOXES):
        cover, share = crop_by_loop(rasters[index[r]], frame, box, 6)
        clear = (cover - 0.5).abs() > 1e-5
        assert torch.equal(found.masks[r].cpu()[clear], (cover >= 0.5)[clear])
        assert found.shares[r].item() == pytest.approx(share, abs=1e-6)
    assert found.valid.all()


def test_an_empty_mask_is_no_mask_and_one_pixel_is_one():
    rasters = torch.zeros(2, 6, 6, dtype=torch.bool)
    rasters[1, 2, 3] = True
    frames = torch.tensor([[0.0, 0.0, 6.0, 6.0]] * 2)
    boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0], [0.0, 0.0, 6.0, 6.0], [3.0, 2.0, 3.5, 3.0]])
    found = crop_masks(rasters, frames, torch.tensor([0, 1, 1]), boxes, 6)
    assert found.valid.tolist() == [False, True, True]
    assert found.shares.tolist() == [0.0, 1.0, 0.5]
    assert found.masks.sum(dim=(1, 2)).tolist() == [0, 1, 36]
    assert found.masks[1, 2, 3]


def test_a_cell_that_is_covered_by_half_counts():
    rasters = torch.zeros(1, 4, 4, dtype=torch.bool)
    rasters[0, :, :2] = True
    box = torch.tensor([[1.0, 0.0, 3.0, 4.0]])  # one cell of it: half inside
    found = crop_masks(rasters, torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0]), box, 1)
    assert found.masks.item() is True


def test_far_corner_of_a_huge_mask_is_exact():
    # The sums exceed 2^24, beyond which float32 knows no odd numbers.
    rasters = torch.ones(1, 6001, 6001, dtype=torch.bool)
    rasters[0, 5999, 5999] = False
    found = crop_masks(
        rasters,
        torch.tensor([[0.0, 0.0, 6001.0, 6001.0]]),
        torch.tensor([0]),
        torch.tensor([[5998.0, 5998.0, 6001.0, 6001.0]]),
        3,
    )
    assert found.masks[0].tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert found.shares.item() == pytest.approx(8 / (6001**2 - 1), rel=1e-5)


def test_chunks_of_instances_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    rasters = torch.rand(7, 9, 11, generator=generator) > 0.4
    frames = torch.tensor([[0.0, 0.0, 11.0, 9.0]] * 7)
    corner = torch.rand(30, 2, generator=generator) * 6
    boxes = torch.cat((corner, corner + 1 + torch.rand(30, 2, generator=generator) * 5), dim=1)
    index = torch.randint(7, (30,), generator=generator)
    whole = crop_masks(rasters, frames, index, boxes, 8)
    monkeypatch.setattr(mask_targets, "_CHUNK_PIXELS", 200)  # two instances at a time
    for a, b in zip(whole, crop_masks(rasters, frames, index, boxes, 8), strict=True):
        assert torch.equal(a, b)


def test_no_rois():
    found = crop_masks(
        torch.zeros(2, 5, 5, dtype=torch.bool),
        torch.zeros(2, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 4),
        28,
    )
    assert found.masks.shape == (0, 28, 28)
    assert MaskTargets.cat([found, found]).valid.shape == (0,)


@pytest.mark.parametrize("k", [7, 5])
def test_shrinking_equals_bilinear_sampling_by_hand(k):
    side = 4 * k
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand(20, side, side, generator=generator) > 0.4
    found = shrink_masks(masks, k)
    assert found.shape == (20, 1, k, k)
    for r in range(20):
        pixels = masks[r].tolist()
        for i in range(k):
            for j in range(k):
                y, x = 4 * (i + 0.5) - 0.5, 4 * (j + 0.5) - 0.5  # half-pixel centres
                y0, x0 = int(y), int(x)
                value = sum(
                    wy * wx * pixels[y0 + dy][x0 + dx]
                    for dy, wy in ((0, 1 - (y - y0)), (1, y - y0))
                    for dx, wx in ((0, 1 - (x - x0)), (1, x - x0))
                )
                assert found[r, 0, i, j].item() == float(value > 0.5)


def test_shrinking_without_antialiasing_reads_the_middle_of_a_cell():
    ring = torch.ones(1, 28, 28, dtype=torch.bool)
    for i in range(7):
        for j in range(7):
            ring[0, 4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3] = False
    assert ring.float().mean() == 0.75
    assert shrink_masks(ring, 7).sum() == 0
    assert shrink_masks(~ring, 7).sum() == 49
    assert shrink_masks(torch.zeros(0, 28, 28), 7).shape == (0, 1, 7, 7)
