"""UAVDT's AP against a loop over the raw files and the result files, as its toolkit reads them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2det.analysis.uavdt import strictly_inside
from d2det.data.coco import register_coco
from d2det.data.uavdt import Options, convert
from d2det.engine.setup import get_cfg
from d2det.evaluation import UAVDTEvaluator, build_evaluator
from d2det.evaluation.uavdt import uavdt_results, write_text_results
from d2det.tools import evaluate_uavdt

NIGHT, DAY = {"M0203"}, {"M0209"}


@pytest.fixture
def converted(raw_uavdt, tmp_path):
    """The converted folder, and the content of its test set, in which the classes are kept."""
    options = Options(three_classes=True)
    written = convert([raw_uavdt], tmp_path / "out", options, warn=lambda _: None)
    return tmp_path / "out", json.loads(written["test"].read_text())


def detections(content, seed):
    """Moved objects, at times of another class, and others inside ignore regions."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in content["annotations"]:
        for _ in range(int(rng.integers(0, 4))):
            box = np.array(annotation["bbox"], float) + rng.choice([0.3, 2.0]) * rng.normal(size=4)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 4))
            found.append((annotation["image_id"], category, box, rng.integers(1, 16) / 16))
    for region in content["ignore_regions"]:
        x, y, w, h = region["bbox"]
        found.append((region["image_id"], 1, np.array([x + 1, y + 1, w - 2, h - 2.5]), 0.95))
        found.append((region["image_id"], 1, np.array([x, y + 1, w - 2, h - 2.5]), 0.9))
    return [
        {"image_id": i, "category_id": c, "bbox": np.round(b, 3).tolist(), "score": float(s)}
        for i, c, b, s in found
    ]


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def read(path):
    return [list(map(float, line.split(","))) for line in path.read_text().split()]


def area_under(flags, number):
    points = [
        (Fraction(sum(flags[:n]), number), sum(flags[:n]) / n) for n in range(1, len(flags) + 1)
    ]
    area, last = 0.0, Fraction(0)
    for recall in sorted({r for r, _ in points}):
        area += float(recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return 100 * area


def toolkit(raw, results, sequences, threshold):
    """From gt_whole.txt, gt_ignore.txt and the result files, sequence by sequence."""
    folder = raw / "UAV-benchmark-MOTD_v1.0" / "GT"
    ranked, number = [], 0
    for name in sorted(sequences):
        truth, found = read(folder / f"{name}_gt_whole.txt"), read(results / f"{name}.txt")
        number += len(truth)
        if name not in ("M0209", "M0801"):
            for r in read(folder / f"{name}_gt_ignore.txt"):
                found = [
                    d
                    for d in found
                    if not (
                        d[0] == r[0]
                        and d[2] > r[2]
                        and d[3] > r[3]
                        and d[2] + d[4] < r[2] + r[4]
                        and d[3] + d[5] < r[3] + r[5]
                    )
                ]
        for frame in sorted({t[0] for t in truth}):
            free = [t[2:6] for t in truth if t[0] == frame]
            for d in sorted((d for d in found if d[0] == frame), key=lambda d: -d[6]):
                overlaps = [iou(d[2:6], t) for t in free]
                best = max(overlaps, default=0)
                if best >= threshold:
                    free.pop(len(overlaps) - 1 - overlaps[::-1].index(best))
                ranked.append((d[6], best >= threshold))
    ranked.sort(key=lambda entry: -entry[0])
    return area_under([flag for _, flag in ranked], number)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_toolkits_ap(converted, raw_uavdt, tmp_path, seed, threshold):
    content = converted[1]
    found = detections(content, seed)
    write_text_results(content["images"], found, tmp_path / "text")
    results = uavdt_results(content, found, toolkit_iou_threshold=threshold)["uavdt_toolkit"]
    key = f"AP{threshold * 100:g}"
    expected = {key: toolkit(raw_uavdt, tmp_path / "text", NIGHT | DAY, threshold)}
    for names, sequences in (
        (("day", "front view", "side view", "long term"), DAY),
        (("night", "bird view"), NIGHT),
        (("low altitude",), NIGHT | DAY),
    ):
        value = toolkit(raw_uavdt, tmp_path / "text", sequences, threshold)
        expected.update({f"{key} {name}": value for name in names})
    assert results == pytest.approx(expected, abs=1e-9)
    assert 5 < min(results.values()) < max(results.values()) < 95
    keys = list(results)
    assert keys[1:4] == [f"{key} day", f"{key} night", f"{key} low altitude"]  # in UAVDT's order


def test_the_papers_ap(converted):
    """One class, VOC: each detection belongs to the object that it overlaps most."""
    _, content = converted
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    content["categories"] = [{"id": 1, "name": "vehicle"}]
    found = [{**entry, "category_id": 1} for entry in detections(content, 0)]
    results = uavdt_results(content, found)["uavdt_voc"]
    place = {i["id"]: (i["sequence"], i["frame"]) for i in content["images"]}
    flags, claimed = [], set()
    for entry in sorted(found, key=lambda d: (-d["score"], place[d["image_id"]])):
        here = [a for a in content["annotations"] if a["image_id"] == entry["image_id"]]
        best = max(here, key=lambda a: iou(entry["bbox"], a["bbox"]))
        right = iou(entry["bbox"], best["bbox"]) >= 0.7 and best["id"] not in claimed
        claimed |= {best["id"]} if right else set()
        flags.append(right)
    assert results["AP70"] == pytest.approx(area_under(flags, len(content["annotations"])))
    assert 5 < results["AP70"] < 95
    whole = uavdt_results(content, found, voc_iou_threshold=0.5)["uavdt_voc"]
    points = uavdt_results(content, found, voc_iou_threshold=0.5, eleven_point=True)["uavdt_voc"]
    assert 0.1 < abs(whole["AP50"] - points["AP50"]) < 10


def test_text_results(converted, tmp_path):
    _, content = converted
    first = content["images"][0]["id"]
    found = [
        {"image_id": first + 1, "category_id": 1, "bbox": [1, 2, 3, 4.5], "score": 0.5},
        {"image_id": first, "category_id": 2, "bbox": [5, 6, 7, 8], "score": 0.25},
        {"image_id": first, "category_id": 3, "bbox": [9, 6, 7, 8], "score": 0.75},
    ]
    paths = write_text_results(content["images"], found, tmp_path / "text")
    assert [path.name for path in paths] == ["M0203.txt", "M0209.txt"]
    assert paths[0].read_text().splitlines() == [
        "1,-1,9.000,6.000,7.000,8.000,0.750000,1,-1",
        "1,-1,5.000,6.000,7.000,8.000,0.250000,1,-1",
        "2,-1,1.000,2.000,3.000,4.500,0.500000,1,-1",
    ]
    assert paths[1].read_text() == "0,-1,0,0,1,1,0,1,-1\n"


def test_a_region_holds_only_what_touches_no_edge():
    image = np.array([0, 0, 0, 1, 2])
    box = np.array([[1, 1, 8, 8], [0, 1, 5, 5], [20, 20, 5, 5], [1, 1, 8, 8], [1, 1, 8, 8]], float)
    region_image = np.array([2, 0, 0])
    region = np.array([[0, 0, 9, 10], [0, 0, 10, 10], [19, 19, 7, 7]], float)
    found = strictly_inside(image, box, region_image, region)
    assert found.tolist() == [True, False, True, False, False]
    nothing = np.zeros(0, int), np.zeros((0, 4))
    assert not strictly_inside(image, box, *nothing).any()
    assert strictly_inside(*nothing, region_image, region).shape == (0,)


def test_nothing_detected_or_nothing_to_detect(converted):
    _, content = converted
    results = uavdt_results(content, [])
    assert set(results["uavdt_voc"].values()) == set(results["uavdt_toolkit"].values()) == {0.0}
    content["annotations"] = []
    results = uavdt_results(content, [])
    assert math.isnan(results["uavdt_voc"]["AP70"]) and math.isnan(results["uavdt_toolkit"]["AP70"])


@pytest.fixture
def registered(converted):
    """The converted test set under a name of its own, as train_net.py registers it."""
    folder, _ = converted
    register_coco("uavdt_given", folder / "annotations/instances_test.json", folder / "images")
    yield "uavdt_given"
    DatasetCatalog.remove("uavdt_given")
    MetadataCatalog.remove("uavdt_given")


def test_the_evaluator(converted, registered, tmp_path):
    content = converted[1]
    found = detections(content, 1)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.TEST.EVALUATOR = "uavdt"
    cfg.TEST.UAVDT.TOOLKIT_IOU_THRESH = 0.5
    evaluator = build_evaluator(cfg, registered)
    assert isinstance(evaluator, UAVDTEvaluator)
    evaluator.reset()
    for image in content["images"]:
        mine = [d for d in found if d["image_id"] == image["id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([d["bbox"] for d in mine]).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        instances.scores = torch.tensor([d["score"] for d in mine])
        instances.pred_classes = torch.tensor([d["category_id"] - 1 for d in mine])
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "uavdt_voc", "uavdt_toolkit"]
    expected = uavdt_results(content, found, toolkit_iou_threshold=0.5)
    assert results["uavdt_voc"] == pytest.approx(expected["uavdt_voc"], abs=1e-3)
    assert results["uavdt_toolkit"] == pytest.approx(expected["uavdt_toolkit"], abs=1e-3)
    folder = Path(cfg.OUTPUT_DIR) / "inference" / registered
    assert (folder / "uavdt_toolkit" / "M0203.txt").is_file()
    assert (folder / "coco_instances_results.json").is_file()


def test_result_files_at_any_threshold(converted, tmp_path, capsys):
    folder, content = converted
    found = detections(content, 2)
    results = tmp_path / "found.json"
    results.write_text(json.dumps(found))
    line = ["--gt", str(folder / "annotations/instances_test.json"), "--results", str(results)]
    evaluate_uavdt.main([*line, "--iou", "0.5", "0.7", "--text", str(tmp_path / "text")])
    rows = [[c.strip() for c in r.split("|")] for r in capsys.readouterr().out.splitlines()]
    assert rows[0][2:6] == ["VOC AP50", "toolkit AP50", "VOC AP70", "toolkit AP70"]
    assert [row[1] for row in rows[2:5]] == ["all", "day", "night"]
    expected = uavdt_results(content, found)
    assert rows[3][4] == f"{expected['uavdt_voc']['AP70 day']:.2f}"
    assert rows[3][5] == f"{expected['uavdt_toolkit']['AP70 day']:.2f}"
    assert (tmp_path / "text/M0203.txt").is_file()
    for change, message in (
        ({"image_id": 99}, "number 1 has the image id 99"),
        (None, "no list of"),
    ):
        results.write_text(json.dumps([found[0] | change] if change else {"found": found}))
        with pytest.raises(SystemExit, match=message):
            evaluate_uavdt.main(line)
    results.unlink()
    with pytest.raises(SystemExit, match="found.json is not there"):
        evaluate_uavdt.main(line)


def test_other_data_sets_are_refused(coco_data, tmp_path):
    register_coco("no_uavdt", coco_data / "val.json", coco_data / "images")
    try:
        cfg = get_cfg()
        cfg.TEST.EVALUATOR = "uavdt"
        with pytest.raises(ValueError, match="val.json lacks the sequences and frames"):
            build_evaluator(cfg, "no_uavdt", str(tmp_path))
        cfg.TEST.EVALUATOR = "uadt"
        with pytest.raises(ValueError, match="TEST.EVALUATOR is 'uadt'; known are coco"):
            build_evaluator(cfg, "no_uavdt", str(tmp_path))
    finally:
        DatasetCatalog.remove("no_uavdt")
        MetadataCatalog.remove("no_uavdt")
