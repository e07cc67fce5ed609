from __future__ import annotations

import math

import pytest
import torch

from d2det.core import MultiLevelRoIAlign


def bilinear(image, y, x):
    """RoIAlign's interpolation: 0 beyond one pixel outside, else the nearest border's values."""
    height, width = image.shape[-2:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(image.shape[0], dtype=image.dtype)
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = min(math.floor(y), height - 1), min(math.floor(x), width - 1)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
    bottom = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def released_roi_align(maps, roi, strides, size, points):
    """The releases' RoIAlign of one inclusive box: no half-pixel shift, to (x2 + 1) / stride."""
    image, x1, y1, x2, y2 = roi.tolist()
    finest = 14.0 * strides[0]
    level = math.floor(math.log2(math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / finest + 1e-6))
    level = min(max(level, 0), len(strides) - 1)
    scale = 1 / strides[level]
    start_x, start_y = x1 * scale, y1 * scale
    width, height = max((x2 + 1) * scale - start_x, 0), max((y2 + 1) * scale - start_y, 0)
    result = torch.zeros(maps[0].shape[1], size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            for a in range(points):
                for b in range(points):
                    y = start_y + (i + (a + 0.5) / points) * height / size
                    x = start_x + (j + (b + 0.5) / points) * width / size
                    result[:, i, j] += bilinear(maps[level][int(image)], y, x) / points**2
    return result


def test_the_releases_roi_align():
    generator = torch.Generator().manual_seed(0)
    strides = (4, 8)
    maps = [
        torch.randn(2, 3, 128 // s, 160 // s, generator=generator, dtype=torch.float64)
        for s in strides
    ]
    rois = torch.tensor(
        [
            [0, 10.0, 12.0, 60.5, 50.0],
            [1, 0.0, 0.0, 159.0, 127.0],  # the whole image
            [1, 30.0, 40.0, 30.0, 40.0],  # one pixel
            [0, 140.0, 100.0, 170.0, 140.0],  # over the border
            [1, 20.3, 30.7, 131.3, 141.7],  # 112 pixels: just the next level
        ],
        dtype=torch.float64,
    )
    pooler = MultiLevelRoIAlign(5, strides, 2, "inclusive")
    computed = pooler(maps, rois)
    for roi, value in zip(rois, computed, strict=True):
        torch.testing.assert_close(value, released_roi_align(maps, roi, strides, 5, 2))


def test_no_rois():
    pooler = MultiLevelRoIAlign(5, (4,), 2, "inclusive")
    assert pooler([torch.zeros(1, 3, 8, 8)], torch.zeros(0, 5)).shape == (0, 3, 5, 5)


def test_unknown_conventions():
    with pytest.raises(ValueError, match="inclusive"):
        MultiLevelRoIAlign(5, (4,), 2, "legacy")
