"""Geometry of the generated scenes, against pycocotools' masks and shapes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cv2")
mask_util = pytest.importorskip("pycocotools.mask")

from d2det.data.shapes import CLASSES, sample_scene  # noqa: E402
from d2det.data.shapes_polygons import clip_polygon, clipped_box, polygon_area  # noqa: E402

SIZE = 192


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng([7, i]), SIZE) for i in range(150)]


@pytest.fixture(scope="module")
def objects(scenes):
    return [(shape, scene.width, scene.height) for scene in scenes for shape in scene.objects]


def decode(polygon, width, height, scale=1):
    rle = mask_util.frPyObjects([(polygon * scale).ravel().tolist()], height * scale, width * scale)
    return mask_util.decode(rle)[..., 0].astype(bool)


def test_boxes_are_tight_around_masks_drawn_by_pycocotools(objects):
    scale = 8
    for shape, width, height in objects[:150]:
        rows, columns = np.nonzero(
            decode(clip_polygon(shape.polygon, width, height), width, height, scale)
        )
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = clipped_box(shape.polygon, width, height)
        # A thin tip covers no pixel centre at its very end, so a pixel and a half of the fine grid
        # is not enough.
        np.testing.assert_allclose(np.array(drawn) / scale, box, atol=0.75)


def test_area_is_that_of_the_mask(objects):
    scale = 8
    for shape, width, height in objects[:80]:
        clipped = clip_polygon(shape.polygon, width, height)
        drawn = decode(clipped, width, height, scale).sum() / scale**2
        assert polygon_area(clipped) == pytest.approx(drawn, rel=0.05)


def test_box_ignores_where_a_part_outside_is_cut_off():
    # A "C" that opens to the right: the spine left of the image, the upper arm above it.
    polygon = np.array(
        [[-5, -8], [5, -8], [5, -6], [-3, -6], [-3, 4], [5, 4], [5, 6], [-5, 6]], float
    )
    assert clip_polygon(polygon, 10, 10).min(0)[1] == 0  # the joining edge, without area
    assert clipped_box(polygon, 10, 10).tolist() == [0, 4, 5, 6]
    assert polygon_area(clip_polygon(polygon, 10, 10)) == 10


def test_box_of_a_polygon_that_covers_the_image_and_of_one_beside_it():
    around = np.array([[-9, -9], [30, -9], [30, 30], [-9, 30]], float)
    assert clipped_box(around, 10, 8).tolist() == [0, 0, 10, 8]
    assert clipped_box(around + 50, 10, 8).tolist() == [0, 0, 0, 0]
    assert len(clip_polygon(around + 50, 10, 8)) == 0


def test_scenes_are_varied_and_balanced(scenes, objects):
    assert {len(scene.objects) for scene in scenes} <= set(range(1, 10))
    assert np.mean([len(scene.objects) for scene in scenes]) > 3.5
    assert len({(scene.width, scene.height) for scene in scenes}) > 100
    assert all(160 <= s.width <= 224 and 160 <= s.height <= 224 for s in scenes)
    shares = np.bincount([o.label for o, _, _ in objects], minlength=6) / len(objects)
    assert len(CLASSES) == 6
    assert shares.min() > 0.11
    assert shares.max() < 0.23


def test_sizes_and_aspect_ratios(objects):
    areas = np.array([polygon_area(clip_polygon(o.polygon, w, h)) for o, w, h in objects])
    boxes = np.array([clipped_box(o.polygon, w, h) for o, w, h in objects])
    sides = boxes[:, 2:] - boxes[:, :2]
    ratios = np.maximum(sides[:, 0] / sides[:, 1], sides[:, 1] / sides[:, 0])
    assert np.mean(areas > 96**2) >= 0.12  # COCO's large
    assert np.mean(areas < 32**2) > 0.3  # COCO's small
    assert sides.min() > 4
    assert np.mean(ratios > 2) > 0.1
    assert ratios.max() > 4


def test_no_object_is_hidden_too_far(scenes):
    for scene in scenes[:60]:
        masks = [
            decode(clip_polygon(o.polygon, scene.width, scene.height), scene.width, scene.height)
            for o in scene.objects
        ]
        for i, mask in enumerate(masks):
            above = np.any(masks[i + 1 :], axis=0) if masks[i + 1 :] else np.zeros_like(mask)
            assert (mask & ~above).sum() >= 0.35 * mask.sum()


def test_some_objects_overlap_and_some_are_cut_by_the_border(scenes, objects):
    overlapping = 0
    for scene in scenes:
        total = np.zeros((scene.height, scene.width), int)
        for shape in scene.objects:
            total += decode(
                clip_polygon(shape.polygon, scene.width, scene.height), scene.width, scene.height
            )
        overlapping += total.max() > 1
    assert overlapping > len(scenes) / 2
    cut = [o.polygon.min() < 0 or (o.polygon > (w, h)).any() for o, w, h in objects]
    assert 0.1 < np.mean(cut) < 0.6
