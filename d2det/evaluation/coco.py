"""COCO evaluation that ranks boxes and masks apart, and copes with what detectron2's does not."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_keypoints import evaluate_keypoints
from .coco_metrics import (
    CocoProtocol,
    IoUs,
    Result,
    ap_by_iou,
    difference,
    evaluate_results,
    metrics,
)
from .masks import encode_masks
from .results import CLASS_SCORE_TASK, MASK_GAIN_TASK, class_table, summary_table

BOX_FILE = "coco_instances_results.json"
MASK_FILE = "coco_segm_results.json"


class CocoEvaluator(COCOEvaluator):
    """detectron2's `COCOEvaluator`, and:

    - masks are ranked by `mask_scores` where predictions have them, boxes by `scores`: tasks "bbox"
      and "segm"; beside them "segm_class_score", the masks ranked by class score, and
      "mask_scoring_gain", what the mask score adds to each metric;
    - one file in COCO's result format for boxes and one for masks, each with its own score; line n
      of both is the same object;
    - "AP90" beside the stock metrics, and AP at every IoU threshold in `ap_by_iou.json`;
    - any area ranges and number of detections;
    - no detections at all count as AP 0, not as NaN, wherever there is ground truth;
    - an empty list of annotations is as good as none: predictions are written, nothing is
      evaluated;
    - annotations without "iscrowd" or "area" are completed (area of the box);
    - masks are evaluated if all predictions have them; at objects without a mask, detections count
      neither as found nor as false.

    Args:
        dataset_name: a registered data set.
        tasks: of "bbox", "segm", "keypoints".
        output_dir: where `coco_instances_results.json` (boxes and keypoints) and
            `coco_segm_results.json` are written.
        protocol: area ranges and detections of each image and class that count; default COCO's.
        kpt_oks_sigmas: as in detectron2.
        use_fast_impl: detectron2's C++ implementation, where it is built; same numbers.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] = ("bbox",),
        *,
        output_dir: str | None = None,
        protocol: CocoProtocol = CocoProtocol(),  # noqa: B008  immutable
        kpt_oks_sigmas: Sequence[float] = (),
        use_fast_impl: bool = True,
    ) -> None:
        self._tasks: tuple[str, ...]
        super().__init__(
            dataset_name,
            tasks=tuple(tasks),
            output_dir=output_dir,
            kpt_oks_sigmas=kpt_oks_sigmas,
            use_fast_impl=use_fast_impl,
        )
        self._protocol = protocol
        self._kpt_oks_sigmas = kpt_oks_sigmas  # unset by the base class without annotations
        annotations = self._coco_api.dataset.get("annotations") or []
        self._do_evaluation = bool(annotations)
        for annotation in annotations:
            _complete(annotation)
        if "segm" in self._tasks and not any(a.get("segmentation") for a in annotations):
            self._drop_masks("no ground truth has masks")
        self._mask_truth = mask_truth(self._coco_api) if "segm" in self._tasks else None

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            prediction = {"image_id": given["image_id"]}
            if "instances" in output:
                output["instances"] = in_float32(output["instances"])
                prediction["instances"] = to_coco_json(output["instances"], given["image_id"])
                prediction["mask_scores"] = output["instances"].has("mask_scores")
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def _drop_masks(self, reason: str) -> None:
        self._tasks = tuple(task for task in self._tasks if task != "segm")
        if self._do_evaluation and comm.is_main_process():
            self._logger.warning(f"Masks are not evaluated: {reason}.")

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        found = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        # pycocotools would quietly take a missing mask for the rectangle of its box.
        if "segm" in self._tasks and not all("segmentation" in x for x in found):
            self._drop_masks("not all predictions have masks")
        found = self.with_dataset_ids(found)
        boxes = [_without(x, "segmentation", "mask_score") for x in found]
        masks = [_mask_result(x) for x in found if "segmentation" in x]
        if self._output_dir:
            _write_json(Path(self._output_dir) / BOX_FILE, boxes)
            segm = Path(self._output_dir) / MASK_FILE
            if masks or "segm" in self._tasks:
                _write_json(segm, masks)
            else:
                segm.unlink(missing_ok=True)  # of an earlier run with masks
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        if not found:
            self._logger.warning("The model detected nothing in the whole data set.")
        self._ap_by_iou: dict[str, dict[str, float]] = {}
        if "bbox" in self._tasks:
            self._evaluate("bbox", "bbox", [_without(x, "keypoints") for x in boxes], img_ids)
        if "segm" in self._tasks:
            ious: IoUs = {}
            self._evaluate("segm", "segm", masks, img_ids, ious)
            if any(x.get("mask_scores") for x in predictions):
                by_class = [
                    {**mask, "score": x["score"]} for mask, x in zip(masks, found, strict=True)
                ]
                self._evaluate(CLASS_SCORE_TASK, "segm", by_class, img_ids, ious)
                gain = difference(self._results["segm"], self._results[CLASS_SCORE_TASK])
                self._results[MASK_GAIN_TASK] = gain
        if "keypoints" in self._tasks:
            evaluation = evaluate_keypoints(
                self._coco_api, found, self._kpt_oks_sigmas, img_ids, fast=self._use_fast_impl
            )
            self._note_ap_by_iou("keypoints", evaluation)
            self._results["keypoints"] = self._derive_coco_results(
                evaluation, "keypoints", self._metadata.get("thing_classes")
            )
        tables = {self._metadata.name: dict(self._results)}
        text = "\n\n".join(table for table in (summary_table(tables), class_table(tables)) if table)
        self._logger.info(f"In percent:\n\n{text}\n")
        if self._output_dir:
            _write_json(Path(self._output_dir) / "ap_by_iou.json", self._ap_by_iou, indent=1)

    def _evaluate(
        self,
        task: str,
        iou_type: str,
        results: list[Result],
        image_ids: Any,
        ious: IoUs | None = None,
    ) -> None:
        evaluation = evaluate_results(
            self._coco_api if self._mask_truth is None or iou_type == "bbox" else self._mask_truth,
            results,
            iou_type,
            self._protocol,
            image_ids=image_ids,
            fast=self._use_fast_impl,
            ious=ious,
        )
        self._note_ap_by_iou(task, evaluation)
        self._results[task] = metrics(evaluation, self._metadata.get("thing_classes"))

    def _note_ap_by_iou(self, task: str, evaluation: COCOeval) -> None:
        self._ap_by_iou[task] = {
            f"{iou:.2f}": round(ap, 4)
            for iou, ap in ap_by_iou(evaluation).items()
            if math.isfinite(ap)
        }

    def with_dataset_ids(self, found: list[Result]) -> list[Result]:
        """The detections with the data set's category ids in place of class indices."""
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if ids is None:
            return found
        category = {index: identity for identity, index in ids.items()}
        unknown = {x["category_id"] for x in found} - set(category)
        if unknown:
            raise ValueError(
                f"the model predicts class {min(unknown)}, and data set {self._metadata.name} has "
                f"{len(category)} classes: set MODEL.ROI_HEADS.NUM_CLASSES to their number"
            )
        return [{**x, "category_id": category[x["category_id"]]} for x in found]


def to_coco_json(instances: Instances, image_id: Any) -> list[Result]:
    """detectron2's `instances_to_coco_json`, and "mask_score" where there are `mask_scores`.

    Masks are encoded on the device they are on.
    """
    masks = encode_masks(instances.pred_masks) if instances.has("pred_masks") else None
    scores = instances.mask_scores.tolist() if instances.has("mask_scores") else None
    rest = Instances(instances.image_size, **instances.get_fields())
    for name in ("pred_masks", "mask_scores"):
        if rest.has(name):
            rest.remove(name)
    results: list[Result] = instances_to_coco_json(rest.to("cpu"), image_id)
    for index, result in enumerate(results):
        if masks is not None:
            result["segmentation"] = masks[index]
        if scores is not None:
            result["mask_score"] = scores[index]
    return results


def in_float32(instances: Instances) -> Instances:
    """The same detections, with half-precision fields in float32: NumPy knows no bfloat16."""
    half = (torch.float16, torch.bfloat16)
    result = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes) and value.tensor.dtype in half:
            value = Boxes(value.tensor.float())
        elif isinstance(value, torch.Tensor) and value.dtype in half:
            value = value.float()
        result.set(name, value)
    return result


def _mask_result(found: Result) -> Result:
    """A detection as COCO's result format has masks: ranked by mask score, and without a box."""
    return {
        "image_id": found["image_id"],
        "category_id": found["category_id"],
        "segmentation": found["segmentation"],
        "score": found.get("mask_score", found["score"]),
    }


def _without(found: Result, *keys: str) -> Result:
    return {key: value for key, value in found.items() if key not in keys}


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write beside, then rename: other programs never find half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    beside.replace(path)


def _complete(annotation: dict[str, Any]) -> None:
    annotation.setdefault("iscrowd", 0)
    if "area" not in annotation:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]


def mask_truth(truth: COCO) -> COCO:
    """Ground truth for masks: objects without one become crowd regions of their boxes.

    A detection there counts neither as found nor as false.
    """
    annotations = truth.dataset.get("annotations") or []
    if all(annotation.get("segmentation") for annotation in annotations):
        return truth
    masked = COCO()
    masked.dataset = {**truth.dataset, "annotations": [_with_mask(a) for a in annotations]}
    with contextlib.redirect_stdout(io.StringIO()):
        masked.createIndex()
    return masked


def _with_mask(annotation: dict[str, Any]) -> dict[str, Any]:
    if annotation.get("segmentation"):
        return annotation
    x, y, w, h = annotation["bbox"]
    box = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {**annotation, "iscrowd": 1, "segmentation": [box]}
