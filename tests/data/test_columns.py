"""Masks as column pieces, and polygons of them, against pycocotools and dense arrays."""

from __future__ import annotations

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

pytest.importorskip("detectron2")

from d2det.data.columns import (
    Columns,
    from_dense,
    from_labels,
    from_polygons,
    from_rle,
    to_dense,
    to_rle,
)
from d2det.data.contours import outlines, pixel_contours


def masks(count: int = 150):
    """Random masks (H, W) of all densities, some of coarse blocks with holes and full columns."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(1, 30, 2)
        mask = rng.random((height, width)) < rng.choice([0.0, 0.03, 0.3, 0.6, 0.95, 1.0])
        mask = mask.astype(np.uint8)
        yield mask.repeat(3, 0).repeat(3, 1) if number % 3 == 0 else mask


def rasterise(polygons: list, height: int, width: int) -> np.ndarray:
    parts = mask_util.frPyObjects([list(map(float, p)) for p in polygons], height, width)
    return mask_util.decode(mask_util.merge(parts))


def assert_same(one: Columns, other: Columns) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rle_in_and_out_equals_pycocotools():
    for mask in masks():
        height, width = mask.shape
        encoded = mask_util.encode(np.asfortranarray(mask))
        columns = from_rle(encoded)
        assert_same(columns, from_dense(mask))
        np.testing.assert_array_equal(to_dense(columns, height, width), mask)
        assert to_rle(columns, height, width)["counts"] == encoded["counts"].decode()
        assert columns.area == mask.sum()
        if mask.any():
            x, y, w, h = mask_util.toBbox(encoded)
            assert columns.box() == (x, y, x + w, y + h)


def test_large_run_lengths_and_differences():
    """Numbers of several characters, negative differences, and more pixels than 31 bits count."""
    side = 60_000
    counts = [3_000_000_000, 5, 1_000_000, 900_000, 40, 1]
    counts.append(side * side - sum(counts))
    columns = from_rle({"size": [side, side], "counts": counts})
    assert columns.area == 5 + 900_000 + 1
    again = from_rle(to_rle(Columns(np.array([7]), np.array([9]), np.array([50_000])), side, side))
    assert again.area == 50_000 - 9 and again.box() == (7, 9, 8, 50_000)


def test_uncompressed_counts_with_empty_runs():
    columns = from_rle({"size": [4, 2], "counts": [1, 0, 2, 3, 0, 1, 1]})
    expected = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])  # pixels 3, 4, 5 and 6
    np.testing.assert_array_equal(to_dense(columns, 4, 2), expected)


@pytest.mark.parametrize("counts", ["", "h", "Zzzz", b"\x01\x02", [1, 2], [5, -1, 4]])
def test_broken_rle_is_refused(counts):
    with pytest.raises(ValueError, match=r"run(-| )length"):
        from_rle({"size": [2, 4], "counts": counts})


def test_crop_and_shift_equal_slicing():
    rng = np.random.default_rng(1)
    for mask in masks(60):
        height, width = mask.shape
        x1, y1 = rng.integers(0, width), rng.integers(0, height)
        x2, y2 = rng.integers(x1, width + 1), rng.integers(y1, height + 1)
        piece = from_dense(mask).crop(x1, y1, x2, y2)
        assert_same(piece, from_dense(mask[y1:y2, x1:x2]))
        moved = to_dense(piece.shift(x1, y1), height, width)
        window = np.zeros_like(mask)
        window[y1:y2, x1:x2] = 1
        np.testing.assert_array_equal(moved, mask * window)


def test_mask_outside_of_the_image_is_refused():
    columns = from_dense(np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"not inside 3 x 2"):
        to_rle(columns, 2, 3)
    with pytest.raises(ValueError, match=r"not inside"):
        to_rle(columns.shift(-1, 0), 3, 3)


def test_labels_give_the_mask_of_each_value():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, (9, 11)).repeat(2, 0) * 70_000
    found = from_labels(labels)
    assert set(found) == {70_000, 140_000, 210_000}
    for value, columns in found.items():
        assert_same(columns, from_dense(labels == value))
    assert from_labels(np.zeros((3, 3), int)) == {}


def test_outlines_rasterise_to_the_same_pixels():
    holes = 0
    for mask in masks():
        if mask.any():
            polygons = outlines(from_dense(mask))
            np.testing.assert_array_equal(rasterise(polygons, *mask.shape), mask)
            assert all(len(p) >= 8 for p in polygons)
            holes += len(cv2.findContours(mask, cv2.RETR_CCOMP, 1)[0]) > len(polygons)
    assert holes > 10  # the case that needs the slit did occur


def test_outline_of_a_square_with_a_hole():
    mask = np.ones((4, 4), np.uint8)
    mask[1:3, 1:3] = 0
    (polygon,) = outlines(from_dense(mask).shift(10, 20))
    points = np.array(polygon).reshape(-1, 2)
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert area == 16 - 4
    assert points.min(0).tolist() == [10, 20] and points.max(0).tolist() == [14, 24]


def test_pixel_contours_give_back_the_filled_mask():
    for mask in masks():
        if not mask.any():
            continue
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        filled = cv2.drawContours(mask.copy(), contours, -1, 1, -1)
        given = [c.ravel().tolist() for c in contours]
        columns = from_polygons(given, *mask.shape, pixel_contours=True)
        assert_same(columns, from_dense(filled))
        # Fewer points, but by COCO's rule the same pixels as the whole contours have.
        parts = [p for p in given if len(p) >= 6]
        expected = rasterise(parts, *mask.shape) if parts else np.zeros_like(mask)
        written = pixel_contours(from_dense(mask))
        found = rasterise(written, *mask.shape) if written else np.zeros_like(mask)
        np.testing.assert_array_equal(found, expected)


def test_polygons_by_cocos_rule_and_beyond_the_image():
    polygons = [[1.3, 0.2, 8.9, 3.1, 4.5, 7.7], [-5, 4, 3, 4, 3, 20, -5, 20]]
    columns = from_polygons(polygons, 10, 9)
    np.testing.assert_array_equal(to_dense(columns, 10, 9), rasterise(polygons, 10, 9))
    outside = [[20, 20, 24, 20, 24, 24]]
    assert from_polygons(outside, 10, 9).area == 0
    assert from_polygons(outside, 10, 9, pixel_contours=True).area == 0
    clipped = from_polygons([[-3, -3, 2, -3, 2, 1, -3, 1]], 10, 9, pixel_contours=True)
    assert clipped.box() == (0, 0, 3, 2) and clipped.area == 6
