"""Polygons of the generated data sets: pixels, area, and the part inside the image.

A polygon is a float64 array (P, 2) of x, y without a repeated end point, in continuous pixels.
"""

from __future__ import annotations

import numpy as np


def pixels(polygon: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixels that a polygon covers, roughly those whose centre it holds; bool (height, width)."""
    import cv2  # here, so that the names of the classes are known without it

    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round((polygon - 0.5) * 16).astype(np.int32)], 1, shift=4)
    return canvas.astype(bool)


def polygon_area(polygon: np.ndarray) -> float:
    """Area in square pixels (shoelace formula)."""
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def clip_polygon(polygon: np.ndarray, width: float, height: float) -> np.ndarray:
    """Part of a polygon inside [0, width] x [0, height] (Sutherland and Hodgman), (P', 2).

    Parts of a concave polygon that are cut off from each other stay joined along the border, by
    edges without area: use `clipped_box` for the box, which such edges would enlarge.
    """
    for axis, bound, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        if len(polygon) == 0:
            break
        following = np.roll(polygon, -1, axis=0)
        inside = sign * (polygon[:, axis] - bound) >= 0
        kept = []
        for here, there, is_in, next_in in zip(
            polygon, following, inside, np.roll(inside, -1), strict=True
        ):
            if is_in:
                kept.append(here)
            if is_in != next_in:
                cut = here + (there - here) * ((bound - here[axis]) / (there[axis] - here[axis]))
                cut[axis] = bound
                kept.append(cut)
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def clipped_box(polygon: np.ndarray, width: float, height: float) -> np.ndarray:
    """Tight box (x1, y1, x2, y2) of the part of a polygon inside [0, width] x [0, height].

    Its sides touch either an edge, or a corner of the image that lies inside the polygon.
    """
    start, step = polygon, np.roll(polygon, -1, axis=0) - polygon
    first, last = np.zeros(len(polygon)), np.ones(len(polygon))
    for axis, bound in ((0, width), (1, height)):
        with np.errstate(divide="ignore", invalid="ignore"):
            a = -start[:, axis] / step[:, axis]
            b = (bound - start[:, axis]) / step[:, axis]
        level = step[:, axis] == 0  # parallel to the border: inside all along, or nowhere
        within = (start[:, axis] >= 0) & (start[:, axis] <= bound)
        low = np.where(level, np.where(within, -np.inf, np.inf), np.minimum(a, b))
        high = np.where(level, np.where(within, np.inf, -np.inf), np.maximum(a, b))
        first, last = np.maximum(first, low), np.minimum(last, high)
    seen = first <= last
    ends = [start[seen] + step[seen] * t[seen, None] for t in (first, last)]
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    points = np.concatenate([*ends, corners[[_covers(polygon, c) for c in corners]]])
    if len(points) == 0:
        return np.zeros(4)
    points = np.clip(points, 0, (width, height))
    return np.concatenate([points.min(0), points.max(0)])


def _covers(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Whether a polygon holds a point: an odd number of edges cross the ray to its right."""
    (x, y), (x1, y1), (x2, y2) = point, polygon.T, np.roll(polygon, -1, axis=0).T
    straddles = (y1 > y) != (y2 > y)
    rise = np.where(straddles, y2 - y1, 1.0)
    return bool(np.count_nonzero(straddles & (x < x1 + (y - y1) / rise * (x2 - x1))) % 2)
