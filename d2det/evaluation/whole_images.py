"""AP of merged results on whole images, with iSAID's area ranges and number of detections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

_NO_LIMIT = 1e10


def evaluate(
    results: Sequence[dict[str, Any]],
    annotations_json: Path,
    sides: Sequence[float] = (144, 512),
    max_dets: int = 1000,
) -> str:
    """A table of AP, AP50, AP75 and AP of small, medium and large objects, for boxes and masks.

    Args:
        results: in COCO's result format; masks are evaluated if all have them.
        annotations_json: of the same images.
        sides: where medium and large objects begin, as the side of a square of their area; those
            below 10 pixels count as none, as in iSAID.
        max_dets: best detections of an image and class that count.
    """
    masks = bool(results) and all("segmentation" in result for result in results)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations_json))
        rows = [
            [kind, *_metrics(truth, results, kind, sides, max_dets)]
            for kind in (("bbox", "segm") if masks else ("bbox",))
        ]
    headers = ["task", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f", missingval="-")


def _metrics(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    kind: str,
    sides: Sequence[float],
    max_dets: int,
) -> list[float | None]:
    plain = [dict(result) for result in results]
    for result in plain if kind == "segm" else ():
        result.pop("bbox")  # its area would be taken for the mask's
    found = truth.loadRes(plain) if plain else COCO()
    if not plain:
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval(truth, found, kind)
    medium, large = (side**2 for side in sides)
    evaluation.params.areaRng = [[0, _NO_LIMIT], [100, medium], [medium, large], [large, _NO_LIMIT]]
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (IoU, recall, class, area)
    chosen = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    chosen += [precision[..., area] for area in (1, 2, 3)]
    defined = [values[values > -1] for values in chosen]
    return [float(np.mean(values) * 100) if values.size else None for values in defined]
