"""VOC's average precision against a plain loop, and against detectron2's evaluator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from d2det.engine.setup import get_cfg
from d2det.evaluation import PascalVOCEvaluator, build_evaluator

CLASSES = ("red", "green", "blue")
NAME = "voc_evaluator_test"


@pytest.fixture
def voc(write_voc):
    """A function that registers a VOC folder of these objects, for one test."""

    def register(objects, year=2007, classes=CLASSES):
        folder = write_voc(objects, "test")
        register_pascal_voc(NAME, str(folder), "test", year, classes)
        MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
        return folder

    yield register
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def random_objects(rng, classes=CLASSES):
    def box():
        x, y = rng.integers(1, 40, 2)
        w, h = rng.integers(8, 25, 2)
        return tuple(int(v) for v in (x, y, x + w, y + h))

    return {
        f"{number:06d}": [
            (classes[rng.integers(len(classes))], box(), bool(rng.random() < 0.2))
            for _ in range(rng.integers(1, 6))
        ]
        for number in range(12)
    }


def random_detections(rng, objects, classes=CLASSES):
    """Near ground truth and beside it, some twice, with scores of three decimals, all different."""
    scores = iter(rng.permutation(np.arange(1, 1000)) / 1000)
    found = {}
    for image, items in objects.items():
        rows = []
        for name, box, _ in items:
            for _ in range(rng.integers(0, 3)):
                # In pixels counted from 0, hence one less at the top left.
                moved = np.array(box) - [1, 1, 0, 0] + rng.normal(scale=2, size=4)
                wrong = rng.random() < 0.2
                label = rng.integers(len(classes)) if wrong else classes.index(name)
                rows.append((int(label), moved.round(1).tolist(), float(next(scores))))
        rows += [(int(rng.integers(len(classes))), [50.0, 40.0, 70.5, 60.0], float(next(scores)))]
        found[image] = rows
    return found


def run(evaluator, found, dtype=torch.float32):
    evaluator.reset()
    for image, rows in found.items():
        result = Instances((64, 80))
        result.pred_boxes = Boxes(torch.tensor([r[1] for r in rows], dtype=dtype).reshape(-1, 4))
        result.scores = torch.tensor([r[2] for r in rows], dtype=dtype)
        result.pred_classes = torch.tensor([r[0] for r in rows], dtype=torch.int64)
        evaluator.process([{"image_id": image}], [{"instances": result}])
    return evaluator.evaluate()


def by_hand(objects, found, name, label, threshold, eleven):
    """AP of a class, one detection after the other; boxes are in whole pixels, ends included."""
    truth = [(image, box, hard) for image, items in objects.items()
             for kind, box, hard in items if kind == name]  # fmt: skip
    total = sum(not hard for _, _, hard in truth)
    taken, hits, points = set(), 0, []
    rows = [(s, image, box) for image, rows in found.items() for c, box, s in rows if c == label]
    false = 0
    for _, image, (x1, y1, x2, y2) in sorted(rows, reverse=True):
        best, index = -1.0, -1
        for number, (where, (a1, b1, a2, b2), _) in enumerate(truth):
            if where != image:
                continue
            w = min(x2, a2) - max(x1 + 1, a1) + 1
            h = min(y2, b2) - max(y1 + 1, b1) + 1
            inner = max(w, 0) * max(h, 0)
            area = (x2 - x1) * (y2 - y1) + (a2 - a1 + 1) * (b2 - b1 + 1)
            if inner / (area - inner) > best:
                best, index = inner / (area - inner), number
        if best > threshold and truth[index][2]:
            continue  # a difficult object counts neither way
        if best > threshold and index not in taken:
            taken.add(index)
            hits += 1
        else:
            false += 1
        points.append((hits / total, hits / (hits + false)))
    if eleven:
        best = [max([p for r, p in points if r >= t], default=0) for t in np.arange(0, 1.1, 0.1)]
        return sum(best) / 11
    # Every hit raises the recall by 1 / total; its precision is the best from there on.
    steps = {r for r, _ in points if r > 0}
    return sum(max(p for r, p in points if r >= step) for step in steps) / total


@pytest.mark.parametrize(("metric", "year"), [("year", 2007), ("area", 2007), ("year", 2012),
                                              ("11 points", 2012)])  # fmt: skip
def test_against_a_plain_loop(metric, year, voc):
    rng = np.random.default_rng(year)
    objects = random_objects(rng)
    found = random_detections(rng, objects)
    voc(objects, year)
    results = run(PascalVOCEvaluator(NAME, metric=metric), found)["bbox"]
    eleven = metric == "11 points" or (metric == "year" and year == 2007)

    def mean(threshold):
        return 100 * np.mean([by_hand(objects, found, name, i, threshold / 100, eleven)
                              for i, name in enumerate(CLASSES)])  # fmt: skip

    expected = {f"AP{t}": mean(t) for t in (50, 70, 75)}
    expected["AP"] = np.mean([mean(t) for t in range(50, 100, 5)])
    for i, name in enumerate(CLASSES):
        expected[f"AP-{name}"] = 100 * by_hand(objects, found, name, i, 0.5, eleven)
    assert list(results) == ["AP", "AP50", "AP70", "AP75", *(f"AP-{name}" for name in CLASSES)]
    assert results == pytest.approx(expected, abs=1e-9)
    assert results["AP50"] > results["AP70"] > results["AP75"] > 0
    if metric == "year":
        theirs = run(PascalVOCDetectionEvaluator(NAME), found)["bbox"]
        assert {key: results[key] for key in theirs} == pytest.approx(dict(theirs))


def test_files_and_pictures_records(voc, tmp_path):
    rng = np.random.default_rng(0)
    objects = random_objects(rng)
    found = random_detections(rng, objects)
    found["000003"] = []
    voc(objects)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.TEST.VOC_METRIC = "area"
    evaluator = build_evaluator(cfg, NAME)
    area = run(evaluator, found)
    folder = tmp_path / "out" / "inference" / NAME
    assert {p.name for p in folder.iterdir()} == {
        "instances_predictions.pth", *(f"comp4_det_test_{name}.txt" for name in CLASSES)
    }  # fmt: skip
    lines = (folder / "comp4_det_test_green.txt").read_text().splitlines()
    rows = [(image, box, s) for image, r in found.items() for c, box, s in r if c == 1]
    assert len(lines) == len(rows)
    image, (x1, y1, x2, y2), score = rows[0]
    assert lines[0] == f"{image} {score:.3f} {x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}"
    kept = torch.load(folder / "instances_predictions.pth", weights_only=False)
    assert [prediction["image_id"] for prediction in kept] == list(objects)
    assert kept[3]["instances"] == []
    cfg.TEST.VOC_METRIC = "11 points"
    assert run(build_evaluator(cfg, NAME), found) != area
    cfg.TEST.VOC_METRIC = "voc2007"
    with pytest.raises(ValueError, match="TEST.VOC_METRIC is 'voc2007'; choose one of"):
        build_evaluator(cfg, NAME)


def test_classes_without_objects_or_detections(voc):
    """Undefined where there is nothing to find, 0 where nothing is found."""
    objects = {"a": [("red", (5, 5, 30, 30), False), ("blue", (5, 5, 30, 30), True)],
               "b": [("green", (10, 10, 40, 40), False)]}  # fmt: skip
    voc(objects)
    found = {"a": [(0, [4.0, 4.0, 30.0, 30.0], 0.9), (2, [50.0, 50.0, 60.0, 60.0], 0.8)], "b": []}
    results = run(PascalVOCEvaluator(NAME), found)["bbox"]
    assert results["AP-red"] == pytest.approx(100)
    assert results["AP-green"] == 0
    assert np.isnan(results["AP-blue"])
    assert results["AP"] == results["AP50"] == results["AP70"] == pytest.approx(50)


def test_nothing_at_all(voc):
    voc({"a": []})
    results = run(PascalVOCEvaluator(NAME), {"a": []})["bbox"]
    assert all(np.isnan(value) for value in results.values())


def test_half_precision(voc):
    voc({"a": [("red", (5, 5, 30, 30), False)]})
    rows = {"a": [(0, [4.0, 4.0, 30.0, 30.0], 0.5)]}
    for dtype in (torch.bfloat16, torch.float16):
        results = run(PascalVOCEvaluator(NAME, metric="area"), rows, dtype)["bbox"]
        assert results["AP"] == pytest.approx(100)
