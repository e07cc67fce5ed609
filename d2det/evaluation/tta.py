"""Evaluation with test-time augmentation."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from .build import build_evaluator

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from detectron2.engine import DefaultTrainer


def evaluate_with_tta(
    trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module
) -> dict[str, dict[str, Any]]:
    """Evaluate with detectron2's `GeneralizedRCNNWithTTA`, as TEST.AUG describes it.

    Predictions are written to `OUTPUT_DIR/inference_TTA/<data set>/`.

    Returns:
        As `trainer.test`, every key followed by "_TTA".
    """
    logging.getLogger(__name__).info("Evaluating with test-time augmentation ...")
    evaluators = [
        build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA", name))
        for name in cfg.DATASETS.TEST
    ]
    model = getattr(model, "module", model)  # within DistributedDataParallel
    results = trainer.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
    return {f"{name}_TTA": value for name, value in results.items()}
