"""COCO evaluation that also reports AP90 and copes with data that detectron2's stumbles over."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class CocoEvaluator(COCOEvaluator):
    """detectron2's `COCOEvaluator`, and:

    - "AP90" beside the stock metrics, and AP at every IoU threshold in `ap_by_iou.json`;
    - no detections at all count as AP 0, not as NaN, wherever there is ground truth;
    - an empty list of annotations is as good as none: predictions are written, nothing is
      evaluated;
    - annotations without "iscrowd" or "area" are completed (area of the box);
    - masks are evaluated only if all ground truth and all predictions have them.

    Args:
        dataset_name: a registered data set.
        tasks: of "bbox", "segm", "keypoints".
        output_dir: where `coco_instances_results.json`, in COCO's result format, is written.
        kpt_oks_sigmas: as in detectron2.
        use_fast_impl: detectron2's C++ implementation, where it is built; same numbers.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] = ("bbox",),
        *,
        output_dir: str | None = None,
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
        self._kpt_oks_sigmas = kpt_oks_sigmas  # unset by the base class without annotations
        annotations = self._coco_api.dataset.get("annotations") or []
        self._do_evaluation = bool(annotations)
        for annotation in annotations:
            _complete(annotation)
        if "segm" in self._tasks and not _all_have_masks(annotations):
            self._drop_masks("not all ground truth has masks")

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for output in outputs:
            if "instances" in output:
                output["instances"] = in_float32(output["instances"])
        super().process(inputs, outputs)

    def _drop_masks(self, reason: str) -> None:
        self._tasks = tuple(task for task in self._tasks if task != "segm")
        if self._do_evaluation and comm.is_main_process():
            self._logger.warning(f"Masks are not evaluated: {reason}.")

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        found = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        # pycocotools would quietly take a missing mask for the rectangle of its box.
        if "segm" in self._tasks and not all("segmentation" in x for x in found):
            self._drop_masks("not all predictions have masks")
        self._ap_by_iou: dict[str, dict[str, float]] = {}
        super()._eval_predictions(predictions, img_ids)
        if self._output_dir and self._ap_by_iou:
            with open(os.path.join(self._output_dir, "ap_by_iou.json"), "w") as file:
                json.dump(self._ap_by_iou, file, indent=1)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            self._logger.warning("The model detected nothing in the whole data set.")
            coco_eval = evaluate_nothing(self._coco_api, iou_type, self._kpt_oks_sigmas)
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        by_iou = ap_by_iou(coco_eval)
        self._ap_by_iou[iou_type] = {
            f"{iou:.2f}": round(ap, 4) for iou, ap in by_iou.items() if np.isfinite(ap)
        }
        if iou_type == "keypoints":
            return results
        # In its place among the summary metrics, before those of single classes.
        ordered = {}
        for key, value in results.items():
            ordered[key] = value
            if key == "AP75":
                ordered["AP90"] = by_iou[0.9]
        return ordered


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


def ap_by_iou(coco_eval: COCOeval) -> dict[float, float]:
    """AP in percent at each IoU threshold (0.5, 0.55, ..., 0.95), all areas and classes.

    Args:
        coco_eval: after `accumulate`. NaN where there is no ground truth.
    """
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]  # (T, R, K): area "all", most dets
    result = {}
    for iou, values in zip(coco_eval.params.iouThrs, precision, strict=True):
        values = values[values > -1]
        result[round(float(iou), 2)] = float(values.mean() * 100) if values.size else float("nan")
    return result


def evaluate_nothing(coco: COCO, iou_type: str, kpt_oks_sigmas: Sequence[float] = ()) -> COCOeval:
    """The finished evaluation of zero detections, which `COCO.loadRes` refuses to load."""
    empty = COCO()
    empty.dataset = {
        "images": coco.dataset["images"],
        "categories": coco.dataset["categories"],
        "annotations": [],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        empty.createIndex()
        evaluation = COCOeval(coco, empty, iou_type)
        if iou_type == "keypoints" and kpt_oks_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _complete(annotation: dict[str, Any]) -> None:
    annotation.setdefault("iscrowd", 0)
    if "area" not in annotation:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]


def _all_have_masks(annotations: list[dict[str, Any]]) -> bool:
    return bool(annotations) and all(annotation.get("segmentation") for annotation in annotations)
