"""PASCAL VOC's average precision, with AP70 and single classes, and files for VOC's own tools."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from detectron2.utils import comm

from .coco import in_float32

METRICS = ("year", "11 points", "area")
THRESHOLDS = tuple(range(50, 100, 5))  # IoU, in percent


class PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's `PascalVOCDetectionEvaluator`, and:

    - "AP70" (DCNv2's Appendix A3 has AP50 and AP70), and "AP-<class>" at an IoU of 0.5, VOC's own;
    - a class without objects, difficult ones apart, is undefined (NaN) and left out of the means;
    - predictions are kept: `instances_predictions.pth`, of which pictures are drawn, and
      `comp4_det_<split>_<class>.txt`, in the form that VOC's development kit reads.

    Args:
        dataset_name: registered by detectron2's `register_pascal_voc`.
        output_dir: for the files; None: none are written.
        metric: "11 points" is VOC 2007's mean of precision at eleven recalls, "area" what VOC has
            used since 2010, the area under the whole curve; "year": that of the data set's year.

    Raises:
        ValueError: another metric.
    """

    def __init__(
        self, dataset_name: str, *, output_dir: str | None = None, metric: str = "year"
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"TEST.VOC_METRIC is {metric!r}; choose one of {METRICS}")
        super().__init__(dataset_name)
        self._output_dir = output_dir
        self._split = os.path.splitext(os.path.basename(self._image_set_path))[0]
        if metric != "year":
            self._is_2007 = metric == "11 points"

    def reset(self) -> None:
        super().reset()
        self._kept: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        outputs = [
            {"instances": in_float32(output["instances"].to(self._cpu_device))}
            for output in outputs
        ]
        super().process(inputs, outputs)
        for given, output in zip(inputs, outputs, strict=True):
            found = instances_to_coco_json(output["instances"], given["image_id"])
            self._kept.append({"image_id": given["image_id"], "instances": found})

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """AP over IoU 0.5 to 0.95, AP50, AP70, AP75 and AP50 of each class, in percent.

        Returns:
            {"bbox": metrics} in the main process, else None.
        """
        gathered = comm.gather((self._predictions, self._kept), dst=0)
        if not comm.is_main_process():
            return None
        lines: dict[int, list[str]] = defaultdict(list)
        for predictions, _ in gathered:
            for category, found in predictions.items():
                lines[category] += found
        self._logger.info(
            f"Evaluating {self._dataset_name} by "
            f"{'the mean precision at 11 recalls' if self._is_2007 else 'the area under the curve'}"
            " (detectron2's implementation, not VOC's own)."
        )
        with contextlib.ExitStack() as stack:
            folder = self._output_dir
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="d2det_voc_"))
            self._write(folder, lines)
            table = self._average_precision(folder, set(lines))
        if self._output_dir is not None:
            kept = [prediction for _, part in gathered for prediction in part]
            torch.save(kept, os.path.join(self._output_dir, "instances_predictions.pth"))
        defined = np.isfinite(table).all(axis=1)
        # By threshold, over those classes that have any object; NaN without any such class.
        mean = table[defined].mean(axis=0) if defined.any() else table.mean(axis=0)
        by_iou = dict(zip(THRESHOLDS, mean.tolist(), strict=True))
        metrics = {"AP": float(mean.mean())}
        metrics |= {f"AP{iou}": by_iou[iou] for iou in (50, 70, 75)}
        at_half = table[:, THRESHOLDS.index(50)].tolist()
        metrics |= {f"AP-{n}": ap for n, ap in zip(self._class_names, at_half, strict=True)}
        return {"bbox": metrics}

    def _write(self, folder: str, lines: dict[int, list[str]]) -> None:
        os.makedirs(folder, exist_ok=True)
        for index, name in enumerate(self._class_names):
            with open(self._file(folder, name), "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines.get(index, []))

    def _file(self, folder: str, class_name: str) -> str:
        return os.path.join(folder, f"comp4_det_{self._split}_{class_name}.txt")

    def _average_precision(self, folder: str, detected: set[int]) -> np.ndarray:
        """AP in percent, by class and threshold."""
        counts = self._count_objects()
        table = np.full((len(self._class_names), len(THRESHOLDS)), np.nan)
        for index, name in enumerate(self._class_names):
            if not counts[name]:
                continue
            if index not in detected:
                table[index] = 0.0
                continue
            for column, threshold in enumerate(THRESHOLDS):
                *_, ap = voc_eval(
                    self._file(folder, "{}"),
                    self._anno_file_template,
                    self._image_set_path,
                    name,
                    ovthresh=threshold / 100,
                    use_07_metric=self._is_2007,
                )
                table[index, column] = 100 * ap
        return table

    def _count_objects(self) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        with open(self._image_set_path) as file:
            for image in file.read().split():
                for item in parse_rec(self._anno_file_template.format(image)):
                    counts[item["name"]] += not item["difficult"]
        return counts
