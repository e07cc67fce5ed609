"""Geometry of the generated data sets: outlines, where they lie, and how much of them is seen.

Coordinates are continuous image pixels, x before y, as in COCO: pixel (0, 0) covers [0, 1] squared.
A polygon is a float64 array (P, 2) without a repeated end point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .shapes_polygons import pixels, polygon_area
from .shapes_warp import Warp, sample_warp, subdivide

CLASSES = ("ellipse", "pie", "triangle", "dart", "star5", "star6")
"""Three pairs of look-alikes: what tells the two apart is a bite, a notch, or a count of points."""

REFERENCE_SIZE = 192  # the lengths below are pixels in images of about this side
LARGE_AREA = (10_500.0, 17_000.0)  # of the one large object that many images hold
MAX_LARGE_LENGTH = 180.0
MIN_BREADTH = 6.0
MIN_INSIDE = 0.55  # of the whole shape; the image border cuts the rest


@dataclass(frozen=True)
class Recipe:
    """What one generated data set has otherwise than another; the defaults are "shapes"."""

    lengths: tuple[float, float] = (26.0, 150.0)  # sqrt(length * breadth) of the stretched shape
    large_share: float = 0.8  # of the images, in which a large object is tried first
    max_objects: int = 7
    min_visible: float = 0.65  # of the part inside; an object covered further is not placed
    clutter: bool = True  # lines, specks, and shapes of no class
    deformed: bool = False  # stretched further, at any angle, bent and rippled with their texture


RECIPES = {
    "shapes": Recipe(),
    # Geometry is what is hard here: scales of 1:11, stretches of up to 4 along any axis of the
    # shape (with the turn, that is any shear as well), bends; little occlusion and no clutter.
    "shapes_deformed": Recipe(
        lengths=(16.0, 176.0),
        large_share=0.0,
        max_objects=5,
        min_visible=0.9,
        clutter=False,
        deformed=True,
    ),
}
"""Recipes by the name of their data set."""


@dataclass
class Shape:
    """One object (or unlabelled distractor, with `label` -1)."""

    label: int
    polygon: np.ndarray  # (P, 2), the whole outline, also where it is covered or outside
    key: np.ndarray | None  # (Q, 2), the part without which the class cannot be told
    warp: Warp | None = None  # what bent it, and is to bend its texture


@dataclass
class Scene:
    """Objects from back to front."""

    width: int
    height: int
    objects: list[Shape]


def sample_scene(rng: np.random.Generator, size: int, recipe: Recipe = RECIPES["shapes"]) -> Scene:
    """Draw an image size of about `size` and 2 or more objects that lie in it, back to front."""
    width, height = (int(v) for v in rng.integers(size * 5 // 6, size * 7 // 6 + 1, 2))
    scale = size / REFERENCE_SIZE
    scene = Scene(width, height, [])
    index = np.zeros((height, width), np.uint8)  # 1 + position of the topmost object
    # Pixels of each object and of its key part, bool (height, width).
    whole: list[np.ndarray] = []
    keys: list[np.ndarray | None] = []
    count = int(rng.integers(2, recipe.max_objects + 1))
    large = rng.random() < recipe.large_share
    for attempt in range(count * 6):
        shape = _sample_shape(rng, recipe, width, height, scale, large and attempt < 4)
        mask = pixels(shape.polygon, width, height)
        key = None if shape.key is None else pixels(shape.key, width, height)
        if not _inside_enough(shape, mask, key):
            continue
        if any(
            _hidden(index, i, mask, whole[i], keys[i], recipe.min_visible)
            for i in range(len(whole))
        ):
            continue
        index[mask] = len(whole) + 1
        whole.append(mask)
        keys.append(key)
        scene.objects.append(shape)
        large = False
        if len(whole) == count:
            break
    return scene


def sample_distractor(rng: np.random.Generator, scene: Scene, scale: float) -> Shape:
    """Draw a quadrilateral or a cross: shapes of no class, to be told from those that have one."""
    length = np.exp(rng.uniform(np.log(8.0), np.log(45.0))) * scale
    if rng.random() < 0.5:
        angles = (np.arange(4) + rng.uniform(-0.15, 0.15, 4)) * (np.pi / 2)
        outline = np.stack([np.cos(angles), np.sin(angles)], 1)
    else:
        outline = _star(rng, 4)
    aspect = np.exp(rng.uniform(0.0, np.log(3.0)))
    centre = rng.uniform(0.0, 1.0, 2) * (scene.width, scene.height)
    return Shape(-1, _place(rng, outline, length, aspect)(outline) + centre, None)


def _sample_shape(
    rng: np.random.Generator, recipe: Recipe, width: int, height: int, scale: float, large: bool
) -> Shape:
    label = int(rng.integers(len(CLASSES)))
    outline, key = _outline(rng, label)
    if large:
        fill = polygon_area(outline) / np.prod(np.ptp(outline, axis=0))
        length = min(np.sqrt(rng.uniform(*LARGE_AREA) / fill), MAX_LARGE_LENGTH)
        aspect = np.exp(rng.uniform(0.0, np.log(2.0)))
    else:
        length = np.exp(rng.uniform(*np.log(recipe.lengths)))
        if recipe.deformed:
            aspect = np.exp(rng.uniform(0.0, np.log(4.0)))
        else:
            aspect = np.exp(rng.uniform(0.0, np.log(6.0 if rng.random() < 0.1 else 2.5)))
    # A thin shape of few pixels would be a line; a long one would leave the image on both sides.
    aspect = min(
        aspect, (length / MIN_BREADTH) ** 2, max(1.0, (1.1 * REFERENCE_SIZE / length) ** 2)
    )
    transform = _place(rng, outline, length * scale, aspect, straight=not recipe.deformed)
    warp = sample_warp(rng, transform(outline)) if recipe.deformed else None

    def drawn(points: np.ndarray) -> np.ndarray:
        return transform(points) if warp is None else warp(transform(subdivide(points)))

    centre = rng.uniform(0.02, 0.98, 2) * (width, height)
    if large:
        centre = (0.5 + (centre / (width, height) - 0.5) * 0.5) * (width, height)
    polygon = np.round(drawn(outline) + centre, 2)
    moved = None if warp is None else warp.moved(centre)
    return Shape(label, polygon, None if key is None else drawn(key) + centre, moved)


def _place(
    rng: np.random.Generator,
    outline: np.ndarray,
    length: float,
    aspect: float,
    straight: bool = True,
) -> Callable[[np.ndarray], np.ndarray]:
    """A map that turns, stretches and turns again; the stretched frame is length x length in area.

    The first turn makes the stretch fall on any axis of the shape.
    """
    turn = _rotation(rng.uniform(0.0, 2 * np.pi))
    stretch = np.diag([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    turned = outline @ turn.T
    low, high = turned.min(0), turned.max(0)
    # Equal extents before the stretch, so that the aspect ratio is the one asked for.
    frame = np.diag(length / (high - low))
    # Every third one may lie or stand nearly straight: only these have boxes as long as themselves.
    spread = 0.12 if straight and rng.random() < 0.35 else np.pi / 4
    final = _rotation(rng.integers(4) * (np.pi / 2) + rng.uniform(-spread, spread))
    matrix = final @ stretch @ frame @ turn
    offset = matrix @ np.linalg.solve(turn, (low + high) / 2)
    return lambda points: points @ matrix.T - offset


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _outline(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline of a class around the origin, of any size, and its key part."""
    name = CLASSES[label]
    if name == "ellipse":
        return _arc(0.0, 2 * np.pi)[:-1], None
    if name == "pie":
        half = rng.uniform(0.45, 0.8)
        tip = [[rng.uniform(0.0, 0.4), rng.uniform(-0.1, 0.1)]]
        bite = np.concatenate([_arc(-half, half, 9), tip])
        return np.concatenate([_arc(half, 2 * np.pi - half), tip]), bite
    if name in ("triangle", "dart"):
        corners = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]]) + rng.uniform(-0.1, 0.1, (3, 2))
        if name == "triangle":
            return corners, None
        notch = [[rng.uniform(-0.15, 0.1), rng.uniform(-0.12, 0.12)]]
        polygon = np.concatenate([corners[:2], notch, corners[2:]])
        return polygon, np.concatenate([corners[1:2], notch, corners[2:]])
    return _star(rng, int(name[-1])), None


def _arc(start: float, stop: float, points: int = 49) -> np.ndarray:
    angles = np.linspace(start, stop, points)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _star(rng: np.random.Generator, points: int) -> np.ndarray:
    angles = np.arange(2 * points) * (np.pi / points) + rng.uniform(-0.05, 0.05, 2 * points)
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, rng.uniform(0.42, 0.6))
    radii = radii * rng.uniform(0.93, 1.07, 2 * points)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _inside_enough(shape: Shape, mask: np.ndarray, key: np.ndarray | None) -> bool:
    if mask.sum() < MIN_INSIDE * polygon_area(shape.polygon) or mask.sum() < 16:
        return False
    if key is None or shape.key is None:
        return True
    return bool(key.sum() >= 0.7 * polygon_area(shape.key))


def _hidden(
    index: np.ndarray,
    i: int,
    cover: np.ndarray,
    whole: np.ndarray,
    key: np.ndarray | None,
    min_visible: float,
) -> bool:
    """Whether object i, or its key part, would be covered too far by one more mask on top."""
    left = np.count_nonzero((index == i + 1) & ~cover)
    if left < min_visible * np.count_nonzero(whole):
        return True
    return key is not None and bool(np.count_nonzero(key & cover) > 0.4 * np.count_nonzero(key))
