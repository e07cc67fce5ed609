"""Masks ranked apart from boxes, area ranges and limits, against pycocotools by itself."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2det.engine.setup import get_cfg
from d2det.evaluation import CocoEvaluator, build_evaluator
from d2det.evaluation.coco_metrics import AreaRange, CocoProtocol, read_protocol
from d2det.evaluation.masks import encode_masks

H, W = 90, 120
IDS = [4, 9]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def blob(rng, box):
    """A mask somewhat different from its box."""
    mask = np.zeros((H, W), bool)
    x1, y1, x2, y2 = np.clip(np.round(box), 0, [W, H, W, H]).astype(int)
    mask[y1:y2, x1:x2] = True
    mask[y1 : y1 + (y2 - y1) // int(rng.integers(2, 9)), x1 : x1 + (x2 - x1) // 2] = False
    return mask


def world(seed, *, images=4, objects=6, copies=3):
    """Ground truth, and for each image detections whose class and mask scores disagree."""
    rng = np.random.default_rng(seed)
    annotations, outputs = [], {}
    for image in range(1, images + 1):
        boxes, classes, masks = [], [], []
        for _ in range(objects):
            low = rng.uniform(0, [W - 20, H - 20])
            box = np.concatenate([low, low + rng.choice([9, 25, 60], 2)])
            box[2:] = np.minimum(box[2:], [W, H])
            mask, category = blob(rng, box), int(rng.integers(2))
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": IDS[category],
                    "bbox": [*box[:2], *(box[2:] - box[:2])],
                    "area": int(mask.sum()),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                }
            )
            for _ in range(copies):
                moved = box + rng.choice([0.3, 2, 6]) * rng.normal(size=4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 2)
                boxes.append(moved)
                classes.append(category if rng.random() < 0.8 else 1 - category)
                masks.append(blob(rng, moved))
        found = Instances((H, W), pred_boxes=Boxes(torch.tensor(np.array(boxes)).float()))
        found.scores = torch.tensor(rng.random(len(boxes))).float()
        found.pred_classes = torch.tensor(classes)
        found.pred_masks = torch.from_numpy(np.array(masks))
        found.mask_scores = torch.tensor(rng.random(len(boxes)) * 1.3).float()
        outputs[image] = found
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in outputs],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in IDS],
    }
    return content, outputs


def run(evaluator, outputs, drop=()):
    evaluator.reset()
    for image, found in outputs.items():
        kept = Instances(found.image_size, **found.get_fields())
        for name in drop:
            kept.remove(name)
        evaluator.process([{"image_id": image}], [{"instances": kept}])
    return evaluator.evaluate()


def direct(content, outputs, iou_type, score, *, areas=None, max_dets=None):
    """pycocotools' evaluation, without any code of ours: (AP, AP50, AP75, AP of each area)."""
    results = []
    for image, found in outputs.items():
        for i in range(len(found)):
            result = {
                "image_id": image,
                "category_id": IDS[found.pred_classes[i]],
                "score": found.get(score)[i].item(),
            }
            if iou_type == "segm":
                mask = np.asfortranarray(found.pred_masks[i].numpy().astype(np.uint8))
                result["segmentation"] = mask_util.encode(mask)
            else:
                box = found.pred_boxes.tensor[i]
                result["bbox"] = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        if areas is not None:
            evaluation.params.areaRng = [[0, 1e10], *areas]
            evaluation.params.areaRngLbl = ["all", *(str(i) for i in range(len(areas)))]
        if max_dets is not None:
            evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]

    def mean(values):
        values = values[values > -1]
        return 100 * values.mean() if values.size else math.nan

    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    return [mean(p) for p in parts] + [
        mean(precision[..., i]) for i in range(1, precision.shape[3])
    ]


def assert_equal(results, expected, names=METRICS):
    for name, value in zip(names, expected, strict=True):
        assert results[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "official"])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_task_equals_pycocotools(register, tmp_path, seed, fast):
    content, outputs = world(seed)
    name = register(content)
    evaluator = CocoEvaluator(name, ["bbox", "segm"], output_dir=str(tmp_path), use_fast_impl=fast)
    results = run(evaluator, outputs)
    assert list(results) == ["bbox", "segm", "segm_class_score", "mask_scoring_gain"]
    assert_equal(results["bbox"], direct(content, outputs, "bbox", "scores"))
    assert_equal(results["segm"], direct(content, outputs, "segm", "mask_scores"))
    assert_equal(results["segm_class_score"], direct(content, outputs, "segm", "scores"))
    gain = results["segm"]["AP"] - results["segm_class_score"]["AP"]
    assert abs(gain) > 0.1  # else the two could be the same task
    assert results["mask_scoring_gain"]["AP"] == gain
    assert not [key for key in results["mask_scoring_gain"] if key.startswith("AP-")]
    by_iou = json.loads((tmp_path / "ap_by_iou.json").read_text())
    assert by_iou["segm"]["0.50"] == pytest.approx(results["segm"]["AP50"], abs=1e-4)


def test_more_detections_than_count_are_cut_by_each_ranking(register, tmp_path):
    content, outputs = world(3, images=2, objects=5, copies=60)  # 150 of each class and image
    for protocol in (CocoProtocol(), CocoProtocol(max_dets=7), CocoProtocol(max_dets=1000)):
        evaluator = CocoEvaluator(
            register(content), ["bbox", "segm"], output_dir=str(tmp_path), protocol=protocol
        )
        results = run(evaluator, outputs)
        for task, kind, score in (
            ("bbox", "bbox", "scores"),
            ("segm", "segm", "mask_scores"),
            ("segm_class_score", "segm", "scores"),
        ):
            wanted = direct(content, outputs, kind, score, max_dets=protocol.max_dets)
            assert_equal(results[task], wanted)


def test_area_ranges(register, tmp_path):
    content, outputs = world(4)
    cfg = get_cfg()
    cfg.TEST.COCO.AREA_RANGES = [["tiny", 10, 400], ["rest", 400, "1e10"]]  # YAML's 1e10 is a text
    cfg.TEST.COCO.MAX_DETS, cfg.MODEL.MASK_ON = 5, True
    results = run(build_evaluator(cfg, register(content), str(tmp_path)), outputs)
    names = ("AP", "AP50", "AP75", "APtiny", "APrest")
    areas = [[10, 400], [400, 1e10]]
    for task, kind, score in (("bbox", "bbox", "scores"), ("segm", "segm", "mask_scores")):
        wanted = direct(content, outputs, kind, score, areas=areas, max_dets=5)
        assert_equal(results[task], wanted, names)
        assert "APs" not in results[task]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([["s", 5]], r"\['s', 5\] is not \[label, lowest area, highest area\]"),
        ([["s", "x", 5]], r"is not \[label"),
        ([["s", 9, 5]], "0 <= lowest < highest"),
        ([["s", 0, 5], ["s", 5, 9]], "'s', 's'"),
        ([["50", 0, 5]], "names of other metrics"),
    ],
)
def test_unfit_area_ranges(ranges, message):
    with pytest.raises(ValueError, match=message):
        read_protocol(ranges, 100)


def test_protocol_of_the_keys_is_cocos():
    coco = get_cfg().TEST.COCO
    assert read_protocol(coco.AREA_RANGES, coco.MAX_DETS) == CocoProtocol()
    assert CocoProtocol().areas[1] == AreaRange("m", 32**2, 96**2)
    with pytest.raises(ValueError, match="TEST.COCO.MAX_DETS must be at least 1, not 0"):
        read_protocol(coco.AREA_RANGES, 0)


def test_both_files_are_read_by_pycocotools(register, tmp_path):
    content, outputs = world(5)
    run(CocoEvaluator(register(content), ["bbox", "segm"], output_dir=str(tmp_path)), outputs)
    boxes = json.loads((tmp_path / "coco_instances_results.json").read_text())
    masks = json.loads((tmp_path / "coco_segm_results.json").read_text())
    assert set(boxes[0]) == {"image_id", "category_id", "bbox", "score"}
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    scores = torch.cat([found.scores for found in outputs.values()])
    mask_scores = torch.cat([found.mask_scores for found in outputs.values()])
    assert [x["score"] for x in boxes] == scores.tolist()
    assert [x["score"] for x in masks] == mask_scores.tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        for file, kind, score in (
            ("coco_instances_results.json", "bbox", "scores"),
            ("coco_segm_results.json", "segm", "mask_scores"),
        ):
            evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / file)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            wanted = direct(content, outputs, kind, score)
            np.testing.assert_allclose(100 * evaluation.stats[:3], wanted[:3], atol=1e-9)
    # A later run without masks leaves no file that looks like its own.
    run(
        CocoEvaluator(register(content), output_dir=str(tmp_path)),
        outputs,
        ("pred_masks", "mask_scores"),
    )
    assert not (tmp_path / "coco_segm_results.json").exists()
    assert not list(tmp_path.glob("*.part"))


def test_without_mask_scores_there_is_one_ranking(register, tmp_path):
    content, outputs = world(6)
    evaluator = CocoEvaluator(register(content), ["bbox", "segm"], output_dir=str(tmp_path))
    results = run(evaluator, outputs, ("mask_scores",))
    assert list(results) == ["bbox", "segm"]
    assert_equal(results["segm"], direct(content, outputs, "segm", "scores"))


def test_stock_evaluator_takes_the_same_predictions(register, tmp_path):
    content, outputs = world(7)
    stock = run(COCOEvaluator(register(content), output_dir=str(tmp_path / "stock")), outputs)
    ours = run(CocoEvaluator(register(content), ["bbox", "segm"]), outputs)
    for name in METRICS:
        assert stock["bbox"][name] == pytest.approx(ours["bbox"][name], abs=1e-9, nan_ok=True)
        by_class = ours["segm_class_score"][name]  # the only ranking detectron2 knows
        assert stock["segm"][name] == pytest.approx(by_class, abs=1e-9, nan_ok=True)


def test_nothing_detected_by_a_model_with_mask_scores(register, tmp_path):
    content, outputs = world(8)
    nothing = {image: found[:0] for image, found in outputs.items()}
    evaluator = CocoEvaluator(register(content), ["bbox", "segm"], output_dir=str(tmp_path))
    results = run(evaluator, nothing)
    assert results["segm"]["AP"] == results["segm_class_score"]["AP"] == 0
    assert results["mask_scoring_gain"]["AP"] == 0
    assert json.loads((tmp_path / "coco_segm_results.json").read_text()) == []


def test_some_images_alone(register):
    content, outputs = world(9)
    evaluator = CocoEvaluator(register(content), ["bbox", "segm"])
    run(evaluator, outputs)
    part = {**content, "images": content["images"][:2]}
    part["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 2]
    wanted = direct(part, {i: outputs[i] for i in (1, 2)}, "segm", "mask_scores")
    assert_equal(evaluator.evaluate(img_ids=[1, 2])["segm"], wanted)


def test_more_classes_than_the_data_has(register):
    content, outputs = world(10)
    outputs[1].pred_classes[0] = 5
    with pytest.raises(ValueError, match=r"class 5, and data set \w+ has 2 classes: set MODEL"):
        run(CocoEvaluator(register(content), ["bbox", "segm"]), outputs)


def test_encoding_equals_pycocotools():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 33, 47)) > 0.6
    masks[1], masks[2], masks[3, :, 5:9], masks[4, -1, -1] = False, True, True, True
    expected = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    found = encode_masks(torch.from_numpy(masks))
    assert [x["counts"].encode() for x in found] == [x["counts"] for x in expected]
    assert found[0]["size"] == [33, 47]
    assert encode_masks(torch.from_numpy(masks).float()) == found
    assert encode_masks(torch.zeros(0, 33, 47, dtype=torch.bool)) == []
