"""COCO's evaluation of keypoints: detectron2's, also for a model that detects nothing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOeval_opt, _evaluate_predictions_on_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .coco_metrics import Result, load_results


def evaluate_keypoints(
    truth: COCO,
    results: Sequence[Result],
    oks_sigmas: Sequence[float] = (),
    image_ids: Sequence[Any] | None = None,
    *,
    fast: bool = True,
) -> COCOeval:
    """The finished and summarised evaluation of keypoints.

    Args:
        truth: ground truth with keypoints.
        results: in COCO's result format, with "keypoints".
        oks_sigmas: one for each keypoint; none for COCO's.
        image_ids: images to evaluate; None for all.
        fast: detectron2's C++ matching.
    """
    if results:
        return _evaluate_predictions_on_coco(
            truth,
            [dict(result) for result in results],
            "keypoints",
            kpt_oks_sigmas=oks_sigmas,
            cocoeval_fn=COCOeval_opt if fast else COCOeval,
            img_ids=image_ids,
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, load_results(truth, []), "keypoints")
        if oks_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(oks_sigmas)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
