"""The settings of the error analysis against pycocotools, class by class, and worked examples."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2det.analysis import AREAS, SETTINGS, error_curves, read_detections, read_ground_truth

CATEGORIES = [
    {"id": 4, "name": "cat", "supercategory": "animal"},
    {"id": 9, "name": "dog", "supercategory": "animal"},
    {"id": 2, "name": "car", "supercategory": "vehicle"},
    {"id": 11, "name": "tree", "supercategory": ""},
    {"id": 12, "name": "bush"},
]
SIZE = 240


def sample(seed, *, images=8, objects=9, masks=False):
    """Ground truth with crowds, all sizes and crossing classes; detections at all overlaps."""
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in CATEGORIES]
    annotations, found = [], []
    for image in range(1, images + 1):
        for _ in range(objects if image > 1 else 0):
            w, h = rng.choice([12.0, 40.0, 130.0], 2) + rng.integers(0, 30, 2) / 2
            x, y = rng.integers(0, 150, 2) / 2
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(rng.choice(ids[:4])),
                "bbox": [x, y, w, h],
                "area": w * h * rng.choice([1.0, 0.6]),
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            annotations.append(annotation)
            for _ in range(int(rng.integers(0, 4))):
                noise = rng.choice([0.01, 0.1, 0.4]) * rng.normal(size=4) * [w, h, w, h]
                box = np.add(annotation["bbox"], noise)
                box[2:] = np.maximum(box[2:], 1.0)
                category = annotation["category_id"] if rng.random() < 0.6 else int(rng.choice(ids))
                score = float(rng.integers(0, 12) / 12)  # equal ones too
                found.append(_detection(image, category, box, score, masks))
    for _ in range(20):
        box = np.append(rng.uniform(0, 150, 2), rng.uniform(5, 80, 2))
        image, category = int(rng.integers(1, images + 1)), int(rng.choice(ids))
        found.append(_detection(image, category, box, float(rng.random()), masks))
    content = {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(images, 0, -1)],
        "annotations": [annotations[i] for i in rng.permutation(len(annotations))],
        "categories": CATEGORIES,
    }
    return content, [found[i] for i in rng.permutation(len(found))]


def _detection(image, category, box, score, masks):
    detection = {"image_id": image, "category_id": category, "score": score}
    if masks:
        pixels = np.zeros((SIZE, SIZE), np.uint8, order="F")
        x, y, w, h = np.maximum(np.round(box), 0).astype(int)
        pixels[y : y + h + 1, x : x + w + 1] = 1
        detection["segmentation"] = mask_util.encode(pixels)
        detection["segmentation"]["counts"] = detection["segmentation"]["counts"].decode()
    else:
        detection["bbox"] = [float(value) for value in box]
    return detection


class KeepsIgnore(COCOeval):
    """pycocotools' evaluation that heeds "ignore", as COCO's Matlab version does."""

    def _prepare(self):
        flags = {a["id"]: a.get("ignore", 0) for a in self.cocoGt.dataset["annotations"]}
        super()._prepare()
        for group in self._gts.values():
            for annotation in group:
                annotation["ignore"] = annotation["iscrowd"] or flags[annotation["id"]]


def precision(content, found, iou_type, thresholds, **params):
    """(T, 101, K, A) of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = KeepsIgnore(truth, truth.loadRes(copy.deepcopy(found)), iou_type)
        evaluation.params.iouThrs = thresholds
        evaluation.params.maxDets = [100]
        evaluation.params.areaRng = [list(area) for area in AREAS.values()]
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0]


def one_by_one(content, found, iou_type, confusions):
    """(A, 7, K, 101): each class evaluated alone, on ground truth that is rewritten for it."""
    ids = sorted(category["id"] for category in CATEGORIES)
    above = {category["id"]: category.get("supercategory") or None for category in CATEGORIES}
    curves = np.zeros((7, 101, len(ids), len(AREAS)))
    curves[:3] = precision(content, found, iou_type, [0.75, 0.5, 0.1])
    for k, category in enumerate(ids):
        mine = [detection for detection in found if detection["category_id"] == category]
        for setting in (3, 4):
            rewritten = copy.deepcopy(content)
            kept = []
            # Own objects first: pycocotools lets the last of equal ones win.
            for annotation in rewritten["annotations"]:
                other = annotation["category_id"]
                if other != category:
                    if setting == 3 and (above[other] is None or above[other] != above[category]):
                        continue
                    annotation["ignore"] = 1
                    annotation["category_id"] = category
                    if confusions == "crowd":
                        annotation["iscrowd"] = 1
                kept.append(annotation)
            rewritten["annotations"] = kept
            if mine and kept:
                params = {"catIds": [category]}
                alone = precision(rewritten, mine, iou_type, [0.1], **params)
                curves[setting, :, k] = alone[0, :, 0]
    curves[5] = curves[4] > 0
    curves[6] = 1
    curves[:, :, (curves[0] == -1).all(axis=0)] = np.nan
    return curves.transpose(3, 0, 2, 1)


def both(tmp_path, content, found, iou_type="bbox", **options):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = read_ground_truth(tmp_path / "truth.json", iou_type)
    detections = read_detections(tmp_path / "found.json", truth, iou_type)
    return error_curves(truth.objects, detections, truth.supercategory, **options)


@pytest.mark.parametrize("confusions", ["match", "crowd"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_boxes_against_pycocotools(tmp_path, seed, confusions):
    content, found = sample(seed)
    curves = both(tmp_path, content, found, confusions=confusions)
    expected = one_by_one(content, found, "bbox", confusions)
    np.testing.assert_allclose(curves, expected, rtol=0, atol=1e-12)
    assert np.isnan(curves[0, 0]).any(axis=1).tolist() == [False] * 4 + [True]  # no bush is there
    # The settings differ from each other, or the comparison would say little.
    ap = np.nanmean(curves[0], axis=(1, 2))
    assert (np.diff(ap) > 1e-3).all()


def test_masks_against_pycocotools(tmp_path):
    content, found = sample(5, images=5, masks=True)
    crowd = next(a for a in content["annotations"] if a["iscrowd"])
    whole = mask_util.frPyObjects(crowd["segmentation"], SIZE, SIZE)[0]
    pixels = mask_util.decode(whole).ravel(order="F")
    runs = np.diff(np.flatnonzero(np.diff(np.append(pixels, 2), prepend=0)), prepend=0)
    crowd["segmentation"] = {"size": [SIZE, SIZE], "counts": runs.tolist()}
    curves = both(tmp_path, content, found, "segm")
    expected = one_by_one(content, found, "segm", "match")
    np.testing.assert_allclose(curves, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("confusions", ["match", "crowd"])
def test_no_curve_lies_below_an_earlier_one(tmp_path, confusions):
    for seed in range(10, 16):
        curves = both(tmp_path, *sample(seed, images=5, objects=14), confusions=confusions)
        assert (np.diff(np.nan_to_num(curves, nan=1.0), axis=1) >= -1e-12).all()


def test_only_the_best_detections_count(tmp_path):
    content, found = sample(3, images=4, objects=14)
    curves = both(tmp_path, content, found, max_detections=2)
    expected = precision(content, found, "bbox", [0.75, 0.5, 0.1], maxDets=[2])
    expected[expected == -1] = np.nan
    np.testing.assert_allclose(curves[:, :3], expected.transpose(3, 0, 2, 1), rtol=0, atol=1e-12)


CAT, DOG, CAR = [0, 0, 40, 40], [60, 0, 40, 40], [0, 100, 40, 40]


def cat_curves(tmp_path, objects, boxes):
    """(7, 101) of the cats: objects as (category id, box), detected cats by falling score."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": c, "bbox": b, "area": 1600, "iscrowd": 0}
        for i, (c, b) in enumerate(objects, start=1)
    ]
    content = {"images": [{"id": 1}], "annotations": annotations, "categories": CATEGORIES}
    found = [
        {"image_id": 1, "category_id": 4, "score": 0.9 - i / 10, "bbox": box}
        for i, box in enumerate(boxes)
    ]
    return both(tmp_path, content, found)[0, :, 1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([8, 0, 40, 40], [0.5, 1, 1, 1, 1, 1, 1]),  # IoU 2/3: the cat, from 0.5 on
        ([20, 0, 40, 40], [0.5, 0.5, 1, 1, 1, 1, 1]),  # IoU 1/3: the cat, from 0.1 on
        ([150, 0, 40, 40], [0.5, 0.5, 0.5, 0.5, 0.5, 1, 1]),  # background
        ([60, 5, 40, 40], [0.5, 0.5, 0.5, 1, 1, 1, 1]),  # the dog
        ([0, 105, 40, 40], [0.5, 0.5, 0.5, 0.5, 1, 1, 1]),  # the car
    ],
)
def test_one_wrong_detection_before_a_right_one(tmp_path, box, expected):
    curves = cat_curves(tmp_path, [(4, CAT), (9, DOG), (2, CAR)], [box, CAT])
    np.testing.assert_allclose(curves, np.repeat(np.array(expected)[:, None], 101, axis=1))


def test_duplicates_stay_wrong_and_misses_stay_missed(tmp_path):
    # Three cats: the first is found twice, then the second, the third never. Precision is 1 up to a
    # recall of 1/3, 2/3 up to 2/3, then 0.
    objects = [(4, CAT), (4, DOG), (4, CAR)]
    curves = cat_curves(tmp_path, objects, [CAT, [2, 0, 40, 40], DOG])
    expected = np.repeat([1.0, 2 / 3, 0.0], [34, 33, 34])
    np.testing.assert_allclose(curves[:5], np.repeat(expected[None], 5, axis=0))
    np.testing.assert_allclose(curves[5], np.repeat([1.0, 0.0], [67, 34]))
    assert (curves[6] == 1).all()


def test_of_equally_good_objects_the_last_is_taken(tmp_path):
    # IoU 3/5 with both; what is left decides whether the second detection, of the first, is right.
    first, last, between = [0, 0, 40, 40], [20, 0, 40, 40], [10, 0, 40, 40]
    curves = cat_curves(tmp_path, [(4, first), (4, last)], [between, first])
    assert curves[1, -1] == pytest.approx(1)
    curves = cat_curves(tmp_path, [(4, last), (4, first)], [between, first])
    assert curves[1, -1] == 0
    content = json.loads((tmp_path / "truth.json").read_text())
    found = json.loads((tmp_path / "found.json").read_text())
    np.testing.assert_allclose(precision(content, found, "bbox", [0.5])[0, :, 1, 0], curves[1])


def test_an_object_of_another_class_excuses_one_detection_or_any_number(tmp_path):
    boxes = [[60, 4, 40, 40], [60, 5, 40, 40], CAT]
    curves = cat_curves(tmp_path, [(4, CAT), (9, DOG)], boxes)
    np.testing.assert_allclose(curves[2:5, 0], [1 / 3, 1 / 2, 1 / 2])
    content = json.loads((tmp_path / "truth.json").read_text())
    found = json.loads((tmp_path / "found.json").read_text())
    curves = both(tmp_path, content, found, confusions="crowd")[0, :, 1]
    np.testing.assert_allclose(curves[2:5, 0], [1 / 3, 1, 1])


def test_nothing_detected(tmp_path):
    content, _ = sample(0)
    curves = both(tmp_path, content, [])
    there = ~np.isnan(curves[0, 0, :, 0])
    assert there.tolist() == [True] * 4 + [False]
    assert (curves[0, :6, there] == 0).all() and (curves[0, 6, there] == 1).all()


def test_settings_are_named_in_order():
    assert SETTINGS == ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, f: f[0].update(image_id=99), "detection number 1 .*image id 99"),
        (lambda c, f: f[2].update(category_id=1), "detection number 3 .*category id 1"),
        (
            lambda c, f: f[1].update(bbox=[1, 2, 3]),
            r"detection number 2 has the 'bbox' \[1, 2, 3\]",
        ),
        (lambda c, f: f[1].update(bbox=[1, 2, "3", 4]), "detection number 2 has the 'bbox'"),
        (
            lambda c, f: f[1].update(bbox=[1, 2, float("nan"), 4]),
            "detection number 2 has the 'bbox'",
        ),
        (lambda c, f: f[1].pop("bbox"), "detection number 2 has the 'bbox' None"),
        (lambda c, f: c["images"].append({"file_name": "x"}), "an entry of 'images' has no id"),
        (lambda c, f: f[1].pop("score"), "detection number 2 has the score None"),
        (
            lambda c, f: c["annotations"][0].update(id=7, category_id=1),
            "annotation 7 .*category id",
        ),
        (lambda c, f: c["annotations"].clear(), "holds no annotations"),
        (lambda c, f: c.pop("categories"), "lacks images or categories"),
    ],
)
def test_unusable_files_are_named(tmp_path, change, message):
    content, found = copy.deepcopy(sample(0))
    change(content, found)
    with pytest.raises(ValueError, match=message):
        both(tmp_path, content, found)


def test_options_are_checked(tmp_path):
    content, found = sample(0)
    with pytest.raises(ValueError, match="confusions must be one of"):
        both(tmp_path, content, found, confusions="any")
    with pytest.raises(ValueError, match="has no mask"):
        both(tmp_path, content, found, "segm")
    (tmp_path / "truth.json").write_text("{")
    with pytest.raises(ValueError, match="truth.json is not valid JSON"):
        read_ground_truth(tmp_path / "truth.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_ground_truth(tmp_path / "nowhere.json")
