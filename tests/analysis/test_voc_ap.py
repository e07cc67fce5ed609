"""PASCAL VOC's average precision against a plain loop over detections."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from d2det.analysis import Detections, GroundTruth, average_precision, voc_average_precision


def boxes_with_noise(rng, count, images, classes, shifts):
    image, label = rng.integers(0, images, count), rng.integers(0, classes, count)
    box = np.concatenate([rng.integers(0, 60, (count, 2)), rng.integers(4, 40, (count, 2))], axis=1)
    truth = GroundTruth(
        image=image,
        label=label,
        box=box.astype(float),
        area=box[:, 2:].prod(axis=1).astype(float),
        crowd=rng.random(count) < 0.2,
    )
    source = rng.integers(0, count, 3 * count)
    found = box[source] + rng.choice(shifts, len(source))[:, None] * rng.normal(size=(3 * count, 4))
    found[:, 2:] = np.maximum(found[:, 2:], 1)
    detections = Detections(
        image=image[source],
        label=np.where(rng.random(3 * count) < 0.8, label[source], rng.integers(0, classes)),
        box=found,
        area=found[:, 2:].prod(axis=1),
        score=rng.integers(0, 20, 3 * count) / 20,
    )
    return truth, detections


def iou(a, b, crowd=False):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - common)


def loop(truth, detections, label, threshold, eleven_point):
    number = sum(bool(truth.label[j] == label and not truth.crowd[j]) for j in range(len(truth)))
    mine = [i for i in range(len(detections)) if detections.label[i] == label]
    mine.sort(key=lambda i: (-detections.score[i], detections.image[i]))
    claimed, flags = set(), []
    for i in mine:
        here = [
            j
            for j in range(len(truth))
            if truth.image[j] == detections.image[i] and truth.label[j] == label
        ]
        best, place = 0.0, None
        for j in here:
            if not truth.crowd[j] and iou(detections.box[i], truth.box[j]) > best:
                best, place = iou(detections.box[i], truth.box[j]), j
        if best >= threshold:
            flags.append(place not in claimed)
            claimed.add(place)
        elif not any(
            truth.crowd[j] and iou(detections.box[i], truth.box[j], True) >= threshold for j in here
        ):
            flags.append(False)
    if number == 0:
        return math.nan
    curve = []  # recall, precision
    for n in range(1, len(flags) + 1):
        curve.append((Fraction(sum(flags[:n]), number), sum(flags[:n]) / n))
    if eleven_point:
        points = [[p for r, p in curve if r >= Fraction(t, 10)] for t in range(11)]
        return sum(max(p, default=0.0) for p in points) / 11
    area, last = 0.0, Fraction(0)
    for recall in sorted({r for r, _ in curve}):
        area += float(recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return area


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_random_detections(seed, threshold, eleven_point):
    rng = np.random.default_rng(seed)
    truth, detections = boxes_with_noise(rng, 60, 4, 2, [0.2, 2.0, 8.0])
    found = voc_average_precision(truth, detections, 3, threshold, eleven_point=eleven_point)
    expected = [loop(truth, detections, k, threshold, eleven_point) for k in range(3)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert 0.02 < np.nanmin(found) < np.nanmax(found) < 0.98  # nothing trivial
    assert math.isnan(found[2])


def test_no_second_choice():
    # Two objects side by side, and two detections that both overlap the first one most: the lower
    # one is wrong, though the second object is free and near enough.
    truth = GroundTruth(
        image=np.zeros(2, int),
        label=np.zeros(2, int),
        box=np.array([[0.0, 0, 10, 10], [4, 0, 10, 10]]),
        area=np.full(2, 100.0),
        crowd=np.zeros(2, bool),
    )
    detections = Detections(
        image=np.zeros(2, int),
        label=np.zeros(2, int),
        box=np.array([[0.0, 0, 10, 10], [1, 0, 10, 10]]),
        area=np.full(2, 100.0),
        score=np.array([0.9, 0.8]),
    )
    assert voc_average_precision(truth, detections, 1, 0.5).tolist() == [0.5]


@pytest.mark.parametrize(
    ("right", "number", "area", "points"),
    [
        ([1, 0, 1], 2, (1 + 2 / 3) / 2, (6 + 5 * 2 / 3) / 11),
        ([0, 0], 3, 0.0, 0.0),
        ([], 3, 0.0, 0.0),
        ([1, 1, 1], 10, 0.3, 4 / 11),  # a recall of 0.3 is reached, whatever 3 / 10 rounds to
        ([1] * 7, 10, 0.7, 8 / 11),
    ],
)
def test_both_integrals(right, number, area, points):
    right = np.array(right, bool)
    assert average_precision(right, number) == pytest.approx(area, abs=1e-15)
    assert average_precision(right, number, eleven_point=True) == pytest.approx(points, abs=1e-15)


def test_nothing_to_be_found():
    assert math.isnan(average_precision(np.array([False]), 0))
