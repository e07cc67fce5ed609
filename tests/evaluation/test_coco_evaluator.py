"""AP against pycocotools itself, and the data that detectron2's evaluator stumbles over."""

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
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2det.engine.setup import get_cfg
from d2det.evaluation import CocoEvaluator, build_evaluator
from d2det.evaluation.coco import mask_truth
from d2det.evaluation.coco_metrics import evaluate_results, metrics

SIZE = 200
IDS = [3, 7, 20]  # category ids with gaps
NAMES = ["a", "b", "c"]


def ground_truth(rng, *, images=6, boxes=8):
    annotations = []
    for image in range(1, images + 1):
        for _ in range(boxes):
            x, y = rng.uniform(0, 100, 2)
            w, h = rng.choice([14.0, 50.0, 97.0], 2) + rng.uniform(0, 3, 2)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice(IDS)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)],
    }


def detections(rng, content):
    """Shifted ground truth at all IoUs, some with a wrong class, and noise; in COCO's format."""
    found = []
    for annotation in content["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = annotation["bbox"]
            shift = rng.choice([0.002, 0.02, 0.1]) * rng.normal(size=4) * (w, h, w, h)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(IDS))
            box = np.float32(np.add([x, y, w, h], shift)).tolist()
            found.append((annotation["image_id"], category, box, float(np.float32(rng.random()))))
    return found


def feed(evaluator, content, found, *, masks=False):
    evaluator.reset()
    for image in content["images"]:
        mine = [d for d in found if d[0] == image["id"]]
        output = Instances((SIZE, SIZE))
        boxes = torch.tensor([d[2] for d in mine]).reshape(-1, 4)
        output.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        output.scores = torch.tensor([d[3] for d in mine])
        output.pred_classes = torch.tensor([IDS.index(d[1]) for d in mine], dtype=torch.int64)
        if masks:
            output.pred_masks = torch.from_numpy(rectangles([d[2] for d in mine]))
        evaluator.process([{"image_id": image["id"]}], [{"instances": output}])
    return evaluator.evaluate()


def rectangles(boxes):
    """Masks of boxes (x, y, w, h), rounded to pixels."""
    masks = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        rows = slice(max(0, round(y)), max(0, round(y + h)))
        mask[rows, max(0, round(x)) : max(0, round(x + w))] = True
    return masks


def direct(content, found, *, iou=None, masks=False):
    """What pycocotools alone says about the same detections."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        results = []
        for image, category, box, score in found:
            result = {"image_id": image, "category_id": category, "score": score}
            if masks:
                mask = np.asfortranarray(rectangles([box])[0].astype(np.uint8))
                result["segmentation"] = mask_util.encode(mask)
            else:
                result["bbox"] = box
            results.append(result)
        evaluation = COCOeval(truth, truth.loadRes(results), "segm" if masks else "bbox")
        if iou is not None:
            evaluation.params.iouThrs = np.array([iou])
        evaluation.evaluate()
        evaluation.accumulate()
        if iou is None:
            evaluation.summarize()
            return evaluation.stats * 100
        precision = evaluation.eval["precision"][0, :, :, 0, -1]
        return precision[precision > -1].mean() * 100


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "official"])
@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_equal_pycocotools(register, tmp_path, seed, fast):
    rng = np.random.default_rng(seed)
    content = ground_truth(rng)
    found = detections(rng, content)
    evaluator = CocoEvaluator(register(content), output_dir=str(tmp_path), use_fast_impl=fast)
    results = feed(evaluator, content, found)["bbox"]
    stats = direct(content, found)
    for index, key in enumerate(["AP", "AP50", "AP75", "APs", "APm", "APl"]):
        assert results[key] == pytest.approx(stats[index], abs=1e-9), key
    expected = direct(content, found, iou=0.9)
    assert 0 < expected < results["AP75"]  # else the comparison would show nothing
    assert results["AP90"] == pytest.approx(expected, abs=1e-9)
    assert list(results)[:4] == ["AP", "AP50", "AP75", "AP90"]
    by_iou = json.loads((tmp_path / "ap_by_iou.json").read_text())["bbox"]
    assert by_iou["0.65"] == pytest.approx(direct(content, found, iou=0.65), abs=1e-3)
    assert np.mean(list(by_iou.values())) == pytest.approx(results["AP"], abs=1e-3)


def test_masks_equal_pycocotools(register, tmp_path):
    rng = np.random.default_rng(2)
    content = ground_truth(rng)
    found = detections(rng, content)
    evaluator = CocoEvaluator(register(content), ["bbox", "segm"], output_dir=str(tmp_path))
    results = feed(evaluator, content, found, masks=True)
    stats = direct(content, found, masks=True)
    assert results["segm"]["AP"] == pytest.approx(stats[0], abs=1e-9)
    assert results["segm"]["AP90"] == pytest.approx(
        direct(content, found, iou=0.9, masks=True), abs=1e-9
    )
    assert results["bbox"]["AP"] == pytest.approx(direct(content, found)[0], abs=1e-9)
    assert results["bbox"]["AP"] != results["segm"]["AP"]


def test_half_precision_predictions(register, tmp_path):
    rng = np.random.default_rng(6)
    content = ground_truth(rng)
    evaluator = CocoEvaluator(register(content), output_dir=str(tmp_path))
    evaluator.reset()
    output = Instances((SIZE, SIZE))
    output.pred_boxes = Boxes(torch.tensor([[8.0, 8.0, 16.0, 32.0]], dtype=torch.bfloat16))
    output.scores = torch.tensor([0.5], dtype=torch.bfloat16)
    output.pred_classes = torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": output}])
    evaluator.evaluate()
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert written[0]["bbox"] == [8, 8, 8, 24]


def test_result_file_is_in_cocos_format(register, tmp_path):
    rng = np.random.default_rng(3)
    content = ground_truth(rng)
    found = detections(rng, content)
    feed(CocoEvaluator(register(content), output_dir=str(tmp_path)), content, found)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert sorted((d["image_id"], d["category_id"]) for d in written) == sorted(
        (d[0], d[1]) for d in found
    )


def test_nothing_detected_is_zero_where_there_is_ground_truth(register, tmp_path):
    content = ground_truth(np.random.default_rng(0))
    content["annotations"] = [a for a in content["annotations"] if a["area"] > 96**2]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != IDS[2]]
    results = feed(CocoEvaluator(register(content), output_dir=str(tmp_path)), content, [])["bbox"]
    assert results["AP"] == results["AP50"] == results["AP90"] == results["APl"] == 0
    assert results["AP-a"] == results["AP-b"] == 0
    assert math.isnan(results["APs"])
    assert math.isnan(results["AP-c"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


@pytest.mark.parametrize("annotations", ["absent", "empty"])
def test_without_ground_truth_predictions_are_written(register, tmp_path, annotations):
    rng = np.random.default_rng(0)
    content = ground_truth(rng)
    found = detections(rng, content)
    bare = {**content, "annotations": []}
    if annotations == "absent":
        del bare["annotations"]
    evaluator = CocoEvaluator(register(bare), ["bbox", "segm"], output_dir=str(tmp_path))
    assert feed(evaluator, content, found) == {}
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(written) == len(found)


def test_annotations_without_iscrowd_and_area(register, tmp_path):
    rng = np.random.default_rng(4)
    content = ground_truth(rng)
    found = detections(rng, content)
    lean = copy.deepcopy(content)
    for annotation in lean["annotations"]:
        del annotation["iscrowd"], annotation["area"], annotation["segmentation"]
    results = feed(CocoEvaluator(register(lean), output_dir=str(tmp_path)), content, found)["bbox"]
    assert results["AP"] == pytest.approx(direct(content, found)[0], abs=1e-9)
    assert results["APs"] == pytest.approx(direct(content, found)[3], abs=1e-9)


@pytest.mark.parametrize("lacking", ["ground truth", "predictions"])
def test_masks_are_not_evaluated_where_some_are_missing(register, tmp_path, lacking, caplog):
    rng = np.random.default_rng(5)
    content = ground_truth(rng)
    found = detections(rng, content)
    if lacking == "ground truth":
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
    evaluator = CocoEvaluator(register(content), ["bbox", "segm"], output_dir=str(tmp_path))
    results = feed(evaluator, content, found, masks=lacking == "ground truth")
    assert list(results) == ["bbox"]


def test_objects_without_a_mask_are_left_out_of_the_masks_alone(register, tmp_path):
    """Ground truth as its own detections: AP 100, whether the bare object is found or not."""
    content = ground_truth(np.random.default_rng(5))
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    found = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
        | {"segmentation": a["segmentation"]}
        for a in content["annotations"]
    ]
    bare = content["annotations"][0]
    bare["segmentation"] = []
    truth = mask_truth(CocoEvaluator(register(content), output_dir=str(tmp_path))._coco_api)
    assert truth.anns[bare["id"]]["iscrowd"] == 1
    assert sum(a["iscrowd"] for a in truth.dataset["annotations"]) == 1
    for detections_of in (found, found[1:]):
        evaluation = evaluate_results(
            truth,
            [{k: v for k, v in d.items() if k != "bbox"} for d in with_masks(detections_of, truth)],
            "segm",
        )
        assert metrics(evaluation)["AP"] == pytest.approx(100)


def with_masks(found, truth):
    """Polygons as run lengths, in which COCO's results are."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth.dataset["images"]}
    for result in found:
        polygons = mask_util.frPyObjects(result["segmentation"], *sizes[result["image_id"]])
        yield {**result, "segmentation": mask_util.merge(polygons)}


def test_evaluator_of_each_type(register, tmp_path):
    content = ground_truth(np.random.default_rng(0))
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    plain = build_evaluator(cfg, register(content))
    assert isinstance(plain, CocoEvaluator)
    assert plain._tasks == ("bbox",)
    assert plain._output_dir == str(tmp_path / "inference" / "evaluator_0")
    cfg.MODEL.MASK_ON = True
    masks = build_evaluator(cfg, register(content, evaluator_type="coco"), str(tmp_path / "x"))
    assert masks._tasks == ("bbox", "segm")
    assert masks._output_dir == str(tmp_path / "x")
    with pytest.raises(ValueError, match=r"'cityscapes'.*known are coco, lvis, pascal_voc"):
        build_evaluator(cfg, register(content, evaluator_type="cityscapes"))
