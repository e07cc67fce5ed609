"""AP of merged results on whole images, by iSAID's area ranges and number of detections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO

from .coco_metrics import AreaRange, CocoProtocol, Result, evaluate_results, metrics
from .results import summary_table

SIDES = (10, 144, 512)  # iSAID's small, medium and large objects begin here, squared


def isaid_protocol(sides: Sequence[float] = SIDES, max_dets: int = 1000) -> CocoProtocol:
    """Small, medium and large objects from the squares of `sides` on, in pixels."""
    bounds = [side**2 for side in sides] + [1e10]
    areas = (AreaRange(*item) for item in zip("sml", bounds[:-1], bounds[1:], strict=True))
    return CocoProtocol(tuple(areas), max_dets)


def evaluate(
    results: Sequence[Result], annotations_json: Path, protocol: CocoProtocol | None = None
) -> str:
    """A table of the metrics of boxes and masks, where the results have them.

    Args:
        results: in COCO's result format.
        annotations_json: of the same images, complete ("area", "iscrowd").
        protocol: default `isaid_protocol()`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations_json))
    tasks = {}
    if all("bbox" in result for result in results):
        boxes = [_without(result, "segmentation") for result in results]
        tasks["bbox"] = boxes
    if results and all("segmentation" in result for result in results):
        tasks["segm"] = [_without(result, "bbox") for result in results]
    found = {
        task: metrics(evaluate_results(truth, chosen, task, protocol or isaid_protocol()))
        for task, chosen in tasks.items()
    }
    return summary_table({annotations_json.stem: found})


def _without(result: Result, key: str) -> Result:
    return {k: v for k, v in result.items() if k != key}
