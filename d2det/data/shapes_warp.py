"""Smooth non-rigid deformation of the generated shapes: a bend around a circle, and ripples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

MAX_BEND = 2.0  # radians between the two ends of a shape
MAX_FOLD = 0.6  # half-breadth over the bend's radius; 1 would draw the inner side into a point
_SOLVER_STEPS = 12


@dataclass(frozen=True)
class Warp:
    """A map of the plane: ripples, then a bend of one axis into an arc; (P, 2) to (P, 2).

    Args:
        axis: unit vector (2,) of the axis that is bent.
        curvature: 1 / radius of its arc in 1 / pixels; the sign is the side. 0: no bend.
        waves: (K, 2) angular frequencies in 1 / pixels.
        shifts: (K, 2) amplitudes in pixels.
        phases: (K,).
        centre: (2,), the point that the bend leaves where it is.
    """

    axis: np.ndarray
    curvature: float
    waves: np.ndarray
    shifts: np.ndarray
    phases: np.ndarray
    centre: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        points = points - self.centre
        return self._bend(points + self._ripple(points)) + self.centre

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Where points came from; to well below a pixel, as ripples shrink distances (see below).

        Points beyond the centre of the bend's circle, where nothing came from, go to some place.
        """
        target = self._unbend(points - self.centre)
        found = target
        for _ in range(_SOLVER_STEPS):  # a contraction: `sample_warp` bounds the ripples' slope
            found = target - self._ripple(found)
        return found + self.centre

    def moved(self, shift: np.ndarray) -> Warp:
        """The same warp elsewhere."""
        return replace(self, centre=self.centre + shift)

    def _ripple(self, points: np.ndarray) -> np.ndarray:
        return np.sin(points @ self.waves.T + self.phases) @ self.shifts

    def _bend(self, points: np.ndarray) -> np.ndarray:
        if self.curvature == 0:
            return points
        normal = np.array([-self.axis[1], self.axis[0]])
        along, across = points @ self.axis, points @ normal
        radius = 1 / self.curvature
        angle = along / radius
        x = (radius - across) * np.sin(angle)
        y = radius - (radius - across) * np.cos(angle)
        return x[:, None] * self.axis + y[:, None] * normal

    def _unbend(self, points: np.ndarray) -> np.ndarray:
        if self.curvature == 0:
            return points
        normal = np.array([-self.axis[1], self.axis[0]])
        radius = 1 / self.curvature
        x, y = points @ self.axis, radius - points @ normal
        sign = np.sign(radius)
        along = radius * np.arctan2(x * sign, y * sign)
        across = radius - sign * np.hypot(x, y)
        return along[:, None] * self.axis + across[:, None] * normal


def sample_warp(rng: np.random.Generator, polygon: np.ndarray) -> Warp:
    """Draw a warp for a shape around the origin: its outline neither folds nor crosses itself.

    It is bent along its longest direction, by up to `MAX_BEND`, or less where it is broad.
    """
    centre = (polygon.min(0) + polygon.max(0)) / 2
    centred = polygon - centre
    _, _, directions = np.linalg.svd(centred - centred.mean(0), full_matrices=False)
    axis = directions[0]
    extent = float(np.ptp(centred @ axis))
    breadth = float(np.abs(centred @ directions[1]).max())
    bend = rng.uniform(-1.0, 1.0) * min(MAX_BEND, MAX_FOLD * extent / breadth)
    angles = rng.uniform(0.0, 2 * np.pi, 2)
    frequencies = 2 * np.pi / (rng.uniform(0.7, 1.4, 2) * extent)
    waves = np.stack([np.cos(angles), np.sin(angles)], 1) * frequencies[:, None]
    # A wave along its own direction would squeeze, across it, shear; a slope of at most 0.35 each
    # keeps the sum of both a contraction.
    turns = rng.uniform(0.0, 2 * np.pi, 2)
    slopes = rng.uniform(0.1, 0.35, 2)
    shifts = np.stack([np.cos(turns), np.sin(turns)], 1) * (slopes / frequencies)[:, None]
    phases = rng.uniform(0.0, 2 * np.pi, 2)
    return Warp(axis, bend / extent, waves, shifts, phases, centre)


def subdivide(polygon: np.ndarray, edges: int = 48) -> np.ndarray:
    """The same polygon with at least `edges` edges, so that a straight one can become an arc."""
    parts = -(-edges // len(polygon))
    steps = np.arange(parts)[:, None] / parts
    following = np.roll(polygon, -1, axis=0)
    return np.concatenate(
        [here + (there - here) * steps for here, there in zip(polygon, following, strict=True)]
    )
