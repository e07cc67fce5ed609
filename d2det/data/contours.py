"""Polygons of a mask, in the two ways that COCO-format data sets draw them."""

from __future__ import annotations

import cv2
import numpy as np
import pycocotools.mask as mask_util

from .columns import Columns, to_dense


def outlines(columns: Columns) -> list[list[int]]:
    """Polygons along the pixels' edges: COCO's rasterisation gives back exactly this mask.

    Holes are reached by a slit of no width, since COCO joins the polygons of an instance.

    Returns:
        One list [x, y, x, y, ...] for each part of the mask.
    """
    x1, y1, contours, parents = _trace(columns, scale=2, mode=cv2.RETR_CCOMP)
    # At twice the size, contour points 2p and 2p + 1 are the pixel's outer sides p and p + 1.
    rings = [_simplify((contour + 1) // 2 + np.array((x1, y1))) for contour in contours]
    parts = {i: rings[i] for i, parent in enumerate(parents) if parent < 0}
    for i, parent in enumerate(parents):
        if parent >= 0:
            parts[parent] = _bridge(parts[parent], rings[i])
    return [part.ravel().tolist() for part in parts.values()]


def pixel_contours(columns: Columns) -> list[list[int]]:
    """Polygons through the border pixels themselves, without holes, as iSAID's are drawn.

    COCO's rasterisation takes the right and lower border pixels off such a polygon.

    Returns:
        One list [x, y, x, y, ...] for each part of the mask, but for those so thin that nothing of
        them would be left.
    """
    x1, y1, contours, _ = _trace(columns, scale=1, mode=cv2.RETR_EXTERNAL)
    x2, y2 = columns.box()[2:]
    rings = [_simplify(contour + np.array((x1, y1))) for contour in contours]
    parts = [ring.ravel().tolist() for ring in rings if len(ring) >= 3]
    return [part for part in parts if mask_util.area(mask_util.frPyObjects([part], y2, x2))[0]]


def _trace(
    columns: Columns, *, scale: int, mode: int
) -> tuple[int, int, list[np.ndarray], list[int]]:
    """OpenCV's contours (P, 2) of the mask's box, enlarged, and the contour each is a hole of."""
    x1, y1, x2, y2 = columns.box()
    dense = to_dense(columns.shift(-x1, -y1), y2 - y1, x2 - x1)
    if scale > 1:
        dense = dense.repeat(scale, axis=0).repeat(scale, axis=1)
    found, hierarchy = cv2.findContours(dense, mode, cv2.CHAIN_APPROX_NONE)
    parents = hierarchy[0, :, 3].tolist() if hierarchy is not None else []
    return x1, y1, [contour.reshape(-1, 2).astype(np.int64) for contour in found], parents


def _simplify(ring: np.ndarray) -> np.ndarray:
    """The ring without repeated points and points between two others of the same direction."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before = np.sign(ring - np.roll(ring, 1, axis=0))
    after = np.sign(np.roll(ring, -1, axis=0) - ring)
    return ring[(before != after).any(axis=1)]


def _bridge(ring: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One polygon of a ring and a hole: to the hole, around it, and back the same way."""
    start = int(hole[:, 0].argmin())
    hole = np.roll(hole, -start, axis=0)
    at = int(np.abs(ring - hole[0]).sum(axis=1).argmin())
    return np.concatenate((ring[: at + 1], hole, hole[:1], ring[at:]))
