"""The deformed scenes: an invertible warp, outlines that stay simple, sizes of every scale."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cv2")
mask_util = pytest.importorskip("pycocotools.mask")

from d2det.data import shapes_render  # noqa: E402
from d2det.data.shapes import CLASSES, RECIPES, sample_scene  # noqa: E402
from d2det.data.shapes_polygons import clip_polygon, clipped_box, polygon_area  # noqa: E402
from d2det.data.shapes_warp import Warp, sample_warp, subdivide  # noqa: E402

RECIPE = RECIPES["shapes_deformed"]
SQUARE = np.array([[-20.0, -20.0], [20.0, -20.0], [20.0, 20.0], [-20.0, 20.0]])


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng([5, i]), 192, RECIPE) for i in range(150)]


@pytest.fixture(scope="module")
def objects(scenes):
    return [(shape, scene.width, scene.height) for scene in scenes for shape in scene.objects]


def pure_bend(curvature, axis=(1.0, 0.0)):
    nothing = np.zeros((1, 2))
    return Warp(np.array(axis), curvature, nothing, nothing, np.zeros(1), np.zeros(2))


def test_a_bend_lays_a_line_on_a_circle():
    # A line of 2 pi R / 4 is a quarter of a circle of radius R, which begins at the origin
    # along the axis; R = 10.
    line = np.stack([np.linspace(0, 5 * np.pi, 20), np.zeros(20)], 1)
    arc = pure_bend(0.1)(line)
    np.testing.assert_allclose(np.hypot(arc[:, 0], arc[:, 1] - 10), 10)
    np.testing.assert_allclose(arc[-1], [10, 10])
    # The other side, and another axis.
    np.testing.assert_allclose(pure_bend(-0.1)(line)[-1], [10, -10])
    np.testing.assert_allclose(pure_bend(0.1, (0.0, 1.0))(line[:, ::-1])[-1], [-10, 10])


def test_without_bend_and_ripple_nothing_moves():
    for warp in (pure_bend(0.0), pure_bend(1e-9)):
        np.testing.assert_allclose(warp(SQUARE), SQUARE, atol=1e-5)
        np.testing.assert_allclose(warp.inverse(SQUARE), SQUARE, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_inverse_of_sampled_warps(seed):
    rng = np.random.default_rng(seed)
    polygon = subdivide(SQUARE * rng.uniform(0.3, 4.0, 2))
    warp = sample_warp(rng, polygon).moved(np.array([7.0, -3.0]))
    points = polygon * rng.uniform(0.0, 1.0, (len(polygon), 1)) + (7.0, -3.0)
    assert np.abs(warp(points) - points).max() > 0.5
    np.testing.assert_allclose(warp.inverse(warp(points)), points, atol=0.01)


def test_a_moved_warp_moves_what_it_gives():
    warp = sample_warp(np.random.default_rng(3), SQUARE)
    shift = np.array([30.0, 11.0])
    np.testing.assert_allclose(warp.moved(shift)(SQUARE + shift), warp(SQUARE) + shift)


def test_subdivided_edges_are_the_same_outline():
    fine = subdivide(SQUARE, 48)
    assert len(fine) == 48
    assert polygon_area(fine) == pytest.approx(1600)
    np.testing.assert_allclose(fine[::12], SQUARE)
    assert len(subdivide(fine, 10)) == 48


def test_outlines_are_simple_and_annotations_true(objects):
    """Where an outline crossed itself, the shoelace formula would not give the drawn area."""
    scale = 8
    for shape, width, height in objects[:250]:
        clipped = clip_polygon(shape.polygon, width, height)
        rle = mask_util.frPyObjects(
            [(clipped * scale).ravel().tolist()], height * scale, width * scale
        )
        mask = mask_util.decode(rle)[..., 0]
        assert mask.sum() / scale**2 == pytest.approx(polygon_area(clipped), rel=0.08, abs=1)
        rows, columns = np.nonzero(mask)
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
        np.testing.assert_allclose(drawn, clipped_box(shape.polygon, width, height), atol=1.25)


def test_sizes_span_more_than_those_of_shapes(scenes, objects):
    def sizes(objects):
        return np.sqrt([polygon_area(clip_polygon(o.polygon, w, h)) for o, w, h in objects])

    deformed = sizes(objects)
    low, high = np.percentile(deformed, [2, 98])
    assert high / low > 8
    plain = [
        (shape, s.width, s.height)
        for s in (sample_scene(np.random.default_rng([7, i]), 192) for i in range(150))
        for shape in s.objects
    ]
    assert high / low > np.divide(*np.percentile(sizes(plain), [98, 2]))
    assert np.mean([len(s.objects) for s in scenes]) > 2.5


def test_classes_are_balanced_and_any_angle_is_as_likely(objects):
    shares = np.bincount([o.label for o, _, _ in objects], minlength=6) / len(objects)
    assert shares.min() > 0.1
    assert shares.max() < 0.25
    # Main axis of each outline, as an angle in [0, pi).
    angles = []
    for shape, _, _ in objects:
        centred = shape.polygon - shape.polygon.mean(0)
        x, y = np.linalg.svd(centred, full_matrices=False)[2][0]
        angles.append(np.arctan2(y, x) % np.pi)
    parts, _ = np.histogram(angles, bins=6, range=(0, np.pi))
    assert parts.min() > 0.5 * len(angles) / 6


def test_straight_edges_become_curved(objects):
    """Of a triangle, the points of an edge leave the chord by a share of its length."""
    bows = []
    for shape, _, _ in objects:
        if CLASSES[shape.label] == "triangle":
            edge = shape.polygon[:17]  # 16 parts of the first of three edges, and its end
            chord = edge[-1] - edge[0]
            normal = np.array([-chord[1], chord[0]]) / (chord @ chord)
            bows.append(np.abs((edge - edge[0]) @ normal).max())
    assert len(bows) > 30
    assert np.median(bows) > 0.05


def test_little_is_hidden(scenes):
    for scene in scenes[:60]:
        index = np.zeros((scene.height, scene.width), int)
        whole = []
        for i, shape in enumerate(scene.objects):
            rle = mask_util.frPyObjects(
                [clip_polygon(shape.polygon, scene.width, scene.height).ravel().tolist()],
                scene.height,
                scene.width,
            )
            mask = mask_util.decode(rle)[..., 0].astype(bool)
            whole.append(mask.sum())
            index[mask] = i + 1
        for i, area in enumerate(whole):
            assert (index == i + 1).sum() >= 0.8 * area - 8


def test_texture_is_bent_as_the_shape_is(scenes, monkeypatch):
    """A texture that counts the columns of the straight shape tells where each pixel is from."""

    def columns(rng, height, width, amplitude):
        return np.broadcast_to(
            np.arange(width, dtype=np.float32)[:, None], (height, width, 3)
        ).copy()

    monkeypatch.setattr(shapes_render, "_coloured_texture", columns)
    shape = next(s for scene in scenes for s in scene.objects if np.ptp(s.polygon[:, 0]) > 60)
    inside = shape.polygon.mean(0) * 0.5 + shape.polygon * 0.5
    left, top = np.floor(inside.min(0)).astype(int) - 2
    width, height = np.ceil(np.ptp(inside, axis=0)).astype(int) + 5
    field = shapes_render._warped_texture(np.random.default_rng(0), shape, left, top, width, height)
    straight = shape.warp.inverse(shape.polygon)
    expected = shape.warp.inverse(inside)[:, 0] - straight[:, 0].min()
    x, y = np.round(inside - (left, top) - 0.5).astype(int).T
    found = field[y, x, 0]
    assert np.median(np.abs(found - expected)) < 1.0
    assert found.std() > 5
