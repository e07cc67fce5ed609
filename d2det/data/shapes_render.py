"""Pictures of the generated data sets: textured, softly edged objects on a textured background."""

from __future__ import annotations

import cv2
import numpy as np

from .shapes import RECIPES, REFERENCE_SIZE, Recipe, Scene, Shape, sample_distractor

_SUPERSAMPLE = 4


def render_scene(
    rng: np.random.Generator, scene: Scene, size: int, recipe: Recipe = RECIPES["shapes"]
) -> np.ndarray:
    """Paint a scene.

    Colour, texture and blur are drawn without regard to class, so that only the outline tells it.

    Args:
        rng: source of everything that is drawn.
        scene: what to paint.
        size: nominal side of the data set's images; widths of lines and edges follow it.
        recipe: whether there is clutter.

    Returns:
        uint8 array (height, width, 3).
    """
    height, width = scene.height, scene.width
    scale = size / REFERENCE_SIZE
    canvas = rng.uniform(70, 185) + rng.uniform(-25, 25, 3).astype(np.float32)
    canvas = canvas + _coloured_texture(rng, height, width, rng.uniform(2, 9))
    if recipe.clutter:
        for _ in range(rng.integers(0, 4)):
            _paint(rng, canvas, sample_distractor(rng, scene, scale), scale)
        _clutter(rng, canvas, int(rng.integers(2, 8)), scale)
    for shape in scene.objects:
        _paint(rng, canvas, shape, scale)
    if recipe.clutter:
        _clutter(rng, canvas, int(rng.integers(0, 5)), scale)
    canvas *= _illumination(rng, height, width)[..., None]
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    noise = rng.standard_normal((height, width, 3), np.float32)
    canvas += noise * np.float32(rng.uniform(1, 4))
    return np.clip(canvas, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random field (height, width), float32, of about zero mean and unit deviation."""
    kind = rng.integers(3)
    if kind == 0:  # blobs
        return _blobs(rng, height, width, np.exp(rng.uniform(np.log(2.5), np.log(14.0))))
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    angle = rng.uniform(0, np.pi)
    period = np.exp(rng.uniform(np.log(5.0), np.log(24.0)))
    along = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    if kind == 1:  # wavy stripes
        warp = _blobs(rng, height, width, 24.0) * np.float32(rng.uniform(0, 1.5))
        return np.sin(along * np.float32(2 * np.pi / period) + warp) * np.float32(1.2)
    across = (y * np.cos(angle) - x * np.sin(angle)).astype(np.float32)  # a soft checkerboard
    frequency = np.float32(2 * np.pi / period)
    return np.sin(along * frequency) * np.sin(across * frequency) * np.float32(1.8)


def _blobs(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    grid = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _coloured_texture(
    rng: np.random.Generator, height: int, width: int, amplitude: float
) -> np.ndarray:
    tint = (1 + rng.uniform(-0.5, 0.5, 3)).astype(np.float32) * np.float32(amplitude)
    coarse, fine = texture(rng, height, width), _blobs(rng, height, width, 2.0)
    return (coarse + np.float32(0.35) * fine)[..., None] * tint


def _warped_texture(
    rng: np.random.Generator, shape: Shape, left: int, top: int, width: int, height: int
) -> np.ndarray:
    """Texture of a window that is bent as the shape is, (height, width, 3) float32."""
    assert shape.warp is not None
    x, y = np.meshgrid(np.arange(width) + left + 0.5, np.arange(height) + top + 0.5)
    source = shape.warp.inverse(np.stack([x.ravel(), y.ravel()], 1))
    straight = shape.warp.inverse(shape.polygon)
    low = straight.min(0)
    w, h = np.ceil(straight.max(0) - low).astype(int) + 1
    texture = _coloured_texture(rng, h, w, rng.uniform(3, 14))
    where = (source - low).astype(np.float32).reshape(height, width, 2)
    return cv2.remap(texture, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _illumination(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    light = cv2.resize(
        rng.uniform(0.72, 1.2, (3, 3)).astype(np.float32),
        (width, height),
        None,
        0,
        0,
        cv2.INTER_CUBIC,
    )
    return light


def _coverage(polygon: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Share of each pixel of a window that a polygon covers, float32 (height, width)."""
    s = _SUPERSAMPLE
    fine = np.zeros((height * s, width * s), np.uint8)
    points = (polygon - (left, top)) * s - 0.5
    cv2.fillPoly(fine, [np.round(points * 16).astype(np.int32)], 255, shift=4)
    mask = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return mask.astype(np.float32) / 255


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: Shape, scale: float) -> None:
    """Blend one shape into the canvas, in place."""
    height, width = canvas.shape[:2]
    margin = int(np.ceil(8 * scale)) + 2
    low = np.floor(shape.polygon.min(0)).astype(int) - margin
    high = np.ceil(shape.polygon.max(0)).astype(int) + margin
    left, top = np.maximum(low, 0)
    right, bottom = np.minimum(high, (width, height))
    if right - left < 2 or bottom - top < 2:
        return
    window = canvas[top:bottom, left:right]
    h, w = window.shape[:2]
    mask = _coverage(shape.polygon, left, top, w, h)
    length = float(np.sqrt(mask.sum()))
    if length < 2:
        return
    mask = _soften(rng, mask, min(1.0, length / 40) * scale)
    if rng.random() < 0.35:
        _shadow(rng, window, mask, min(1.0, length / 30) * scale)
    weight = mask / mask.sum()
    below = (window * weight[..., None]).sum((0, 1))
    fill = _contrasting(rng, below)
    if shape.warp is None:
        fill = fill + _coloured_texture(rng, h, w, rng.uniform(1, 6))
    else:
        fill = fill + _warped_texture(rng, shape, left, top, w, h)
    if rng.random() < 0.35:  # one side fades towards what lies behind it
        mask = mask * (1 - (1 - rng.uniform(0.35, 0.8)) * _ramp(rng, mask))
    window += (fill.astype(np.float32) - window) * mask[..., None]


def _soften(rng: np.random.Generator, mask: np.ndarray, scale: float) -> np.ndarray:
    """Blur the edge, in every third shape along one side more than along the other."""
    near, far = np.exp(rng.uniform(np.log(0.3), np.log(1.6), 2)) * max(scale, 0.3)
    soft = cv2.GaussianBlur(mask, (0, 0), max(near, 0.2))
    if rng.random() < 0.35:
        softer = cv2.GaussianBlur(mask, (0, 0), max(near, far) * 1.8)
        soft = soft + (softer - soft) * _ramp(rng, mask)
    return soft


def _ramp(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A field from 0 to 1 across the covered pixels, in a random direction, (h, w) float32."""
    h, w = mask.shape
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(w, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.arange(h, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    along = x + y
    covered = along[mask > 0.5]
    low, high = (covered.min(), covered.max()) if covered.size else (along.min(), along.max())
    return np.clip((along - low) / max(high - low, 1.0), 0, 1)


def _shadow(rng: np.random.Generator, window: np.ndarray, mask: np.ndarray, scale: float) -> None:
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 5.0) * scale
    shift = np.array(
        [[1, 0, distance * np.cos(angle)], [0, 1, distance * np.sin(angle)]], np.float32
    )
    cast = cv2.warpAffine(mask, shift, mask.shape[::-1])
    cast = cv2.GaussianBlur(cast, (0, 0), max(rng.uniform(0.8, 2.0) * scale, 0.3))
    window *= 1 - np.float32(rng.uniform(0.15, 0.4)) * cast[..., None]


def _contrasting(rng: np.random.Generator, below: np.ndarray) -> np.ndarray:
    """A colour (3,) that differs from what it covers: mostly in lightness, by a little or a lot."""
    step = rng.uniform(45, 100) * (1 if rng.random() < 0.5 else -1)
    mean = float(below.mean())
    if not 25 < mean + step < 225:
        step = -step
    return below + step + rng.uniform(-30, 30, 3)


def _clutter(rng: np.random.Generator, canvas: np.ndarray, count: int, scale: float) -> None:
    """Thin lines, arcs and specks that belong to nothing, in place."""
    height, width = canvas.shape[:2]
    for _ in range(count):
        x, y = rng.uniform(0, 1, 2) * (width, height)
        ix, iy = min(int(x), width - 1), min(int(y), height - 1)
        colour = (canvas[iy, ix].astype(np.float64) + rng.uniform(-60, 60, 3)).tolist()
        thickness = 1 if rng.random() < 0.7 else max(1, round(2 * scale))
        reach = rng.uniform(4, 60) * scale
        angle = rng.uniform(0, 360)
        kind = rng.integers(3)
        if kind == 0:
            turn = np.deg2rad(angle)
            end = (int(x + reach * np.cos(turn)), int(y + reach * np.sin(turn)))
            cv2.line(canvas, (ix, iy), end, colour, thickness)
        elif kind == 1:
            axes = (int(reach / 2) + 1, int(reach * rng.uniform(0.1, 0.5)) + 1)
            stop = rng.uniform(40, 200)
            cv2.ellipse(canvas, (ix, iy), axes, angle, 0, stop, colour, thickness)
        else:
            a, b = rng.uniform(0.5, 2.6, 2) * scale
            axes = (int(a) + 1, int(b) + 1)
            cv2.ellipse(canvas, (ix, iy), axes, angle, 0, 360, colour, -1)
