"""COCO's average precision, by any area ranges and number of detections."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Result = dict[str, Any]  # one detection in COCO's result format
IoUs = dict[tuple[Any, Any], Any]  # by image and category, detections in the order of their ids


class AreaRange(NamedTuple):
    """Objects that a metric counts; others are ignored, found or not."""

    label: str  # metric "AP" + label
    low: float  # smallest and largest area in pixels, both included
    high: float


class CocoProtocol(NamedTuple):
    """What the metrics are computed over; the default is COCO's."""

    areas: tuple[AreaRange, ...] = (
        AreaRange("s", 0, 32**2),
        AreaRange("m", 32**2, 96**2),
        AreaRange("l", 96**2, 1e10),
    )
    max_dets: int = 100  # best detections of each image and class that count


def read_protocol(area_ranges: Sequence[Sequence[Any]], max_dets: int) -> CocoProtocol:
    """The protocol of TEST.COCO's keys.

    Raises:
        ValueError: a range that is not [label, lowest area, highest area], a label twice, or no
            detections.
    """
    areas = []
    for item in area_ranges:
        try:
            label, low, high = item
            area = AreaRange(str(label), float(low), float(high))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"TEST.COCO.AREA_RANGES: {item!r} is not [label, lowest area, highest area]"
            ) from error
        if not (area.label and 0 <= area.low < area.high):
            raise ValueError(
                f"TEST.COCO.AREA_RANGES: {item!r} needs a label, and areas 0 <= lowest < highest"
            )
        areas.append(area)
    labels = [area.label for area in areas]
    if len(set(labels)) < len(labels):
        raise ValueError(f"TEST.COCO.AREA_RANGES: a label occurs twice among {labels}")
    clash = {"50", "75", "90"}.intersection(labels)
    if clash:
        raise ValueError(f"TEST.COCO.AREA_RANGES: {clash} are names of other metrics")
    if int(max_dets) < 1:
        raise ValueError(f"TEST.COCO.MAX_DETS must be at least 1, not {max_dets}")
    return CocoProtocol(tuple(areas), int(max_dets))


def evaluate_results(
    truth: COCO,
    results: Sequence[Result],
    iou_type: str,
    protocol: CocoProtocol = CocoProtocol(),  # noqa: B008  immutable
    *,
    image_ids: Sequence[Any] | None = None,
    fast: bool = True,
    ious: IoUs | None = None,
) -> COCOeval:
    """The finished evaluation of boxes or masks.

    Args:
        truth: ground truth; every annotation has "area" and "iscrowd".
        results: in COCO's result format, ranked by "score"; not changed. For masks they hold no
            "bbox", whose area COCO's tools would take for the mask's.
        iou_type: "bbox" or "segm".
        protocol: areas and limits.
        image_ids: images to evaluate; None for all.
        fast: detectron2's C++ matching, where it is built; else pycocotools' own.
        ious: filled by the first and used by any later call with the same detections in the same
            order, whatever their scores.
    """
    evaluator = _FastEvaluation if fast else _Evaluation
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluator(truth, load_results(truth, results), iou_type)
        evaluation.shared_ious = ious
        params = evaluation.params
        params.areaRng = [[0, 1e10], *([area.low, area.high] for area in protocol.areas)]
        params.areaRngLbl = ["all", *(area.label for area in protocol.areas)]
        params.maxDets = [*(n for n in (1, 10) if n < protocol.max_dets), protocol.max_dets]
        if image_ids is not None:
            params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def metrics(evaluation: COCOeval, class_names: Sequence[str] | None = None) -> dict[str, float]:
    """AP, AP50, AP75, AP90, AP of each area range and, as "AP-<name>", of each class, in percent.

    Args:
        evaluation: of `evaluate_results`.
        class_names: in the order of the category ids; AP by class is left out where there is only
            one.

    Returns:
        NaN where there is no ground truth.
    """
    precision = evaluation.eval["precision"][..., -1]  # (T, R, K, A), the most detections
    overall = precision[..., 0]
    found = {"AP": mean_percent(overall)}
    for iou in (0.5, 0.75, 0.9):
        threshold = np.isclose(evaluation.params.iouThrs, iou)
        found[f"AP{iou * 100:.0f}"] = mean_percent(overall[threshold])
    for index, label in enumerate(evaluation.params.areaRngLbl[1:], start=1):
        found[f"AP{label}"] = mean_percent(precision[..., index])
    if class_names is not None and len(class_names) > 1:
        if len(class_names) != overall.shape[2]:
            raise ValueError(
                f"{len(class_names)} class names for {overall.shape[2]} categories of ground truth"
            )
        for index, name in enumerate(class_names):
            found[f"AP-{name}"] = mean_percent(overall[:, :, index])
    return found


def ap_by_iou(evaluation: COCOeval) -> dict[float, float]:
    """AP in percent at each IoU threshold (0.5, 0.55, ..., 0.95), all areas and classes.

    Args:
        evaluation: after `accumulate`. NaN where there is no ground truth.
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (T, R, K): area "all", most dets
    thresholds = evaluation.params.iouThrs
    return {
        round(float(iou), 2): mean_percent(values)
        for iou, values in zip(thresholds, precision, strict=True)
    }


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """What `one` has more than `other` in each metric that is not of a single class."""
    return {
        name: value - other.get(name, math.nan)
        for name, value in one.items()
        if not name.startswith("AP-")
    }


def mean_percent(precision: np.ndarray) -> float:
    """The mean of precisions that are defined (not -1), in percent; NaN of none."""
    defined = precision[precision > -1]
    return float(defined.mean() * 100) if defined.size else math.nan


def load_results(truth: COCO, results: Sequence[Result]) -> COCO:
    """`COCO.loadRes`, which refuses to load nothing, and leaves its arguments as they are."""
    if results:
        return truth.loadRes([dict(result) for result in results])
    empty = COCO()
    empty.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty


class _Evaluation(COCOeval):
    """IoUs, most of the work for masks, computed once for several rankings of the same objects."""

    shared_ious: IoUs | None = None

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        if self.shared_ious is None:
            return super().computeIoU(imgId, catId)
        found, limit = self._dts[imgId, catId], self.params.maxDets[-1]
        if (imgId, catId) not in self.shared_ious:
            scores = [one["score"] for one in found]
            for one in found:  # all of them, in the order of their ids
                one["score"] = 0.0
            self.params.maxDets[-1] = max(limit, len(found))
            self.shared_ious[imgId, catId] = super().computeIoU(imgId, catId)
            self.params.maxDets[-1] = limit
            for one, score in zip(found, scores, strict=True):
                one["score"] = score
        ious = self.shared_ious[imgId, catId]
        if len(ious) == 0:
            return ious
        ranked = np.argsort([-one["score"] for one in found], kind="mergesort")
        return ious[ranked[:limit]]


# detectron2 names COCOeval twice where its C++ is not built.
_FastEvaluation: type[_Evaluation] = (
    _Evaluation
    if COCOeval_opt is COCOeval
    else type("_FastEvaluation", (COCOeval_opt, _Evaluation), {})
)
