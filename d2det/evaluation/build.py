"""Choosing the evaluator of a data set."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from .coco import CocoEvaluator
from .coco_metrics import read_protocol
from .lvis import LvisEvaluator, check_lvis

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def inference_folder(cfg: CfgNode, dataset_name: str, *, augmented: bool = False) -> str:
    """Where the predictions on a data set are written; with test-time augmentation, elsewhere."""
    folder = "inference_TTA" if augmented else "inference"
    return os.path.join(cfg.OUTPUT_DIR, folder, dataset_name)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator for a data set's "evaluator_type": "coco" (also if unset), "lvis" or
    "pascal_voc".

    Boxes are evaluated always, masks and keypoints if the model predicts them; masks only if the
    ground truth has them. Area ranges and numbers of detections of "coco": TEST.COCO.

    Args:
        cfg: decides what is evaluated.
        dataset_name: a registered data set.
        output_folder: for the predictions; default `OUTPUT_DIR/inference/<dataset_name>`.

    Raises:
        ValueError: an evaluator type this project does not serve, one whose package is missing,
            or unfit keys of TEST.COCO.
    """
    output_folder = output_folder or inference_folder(cfg, dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"
    if kind == "coco":
        tasks = ["bbox"]
        tasks += ["segm"] if cfg.MODEL.MASK_ON else []
        tasks += ["keypoints"] if cfg.MODEL.KEYPOINT_ON else []
        return CocoEvaluator(
            dataset_name,
            tasks,
            output_dir=output_folder,
            protocol=read_protocol(cfg.TEST.COCO.AREA_RANGES, cfg.TEST.COCO.MAX_DETS),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    if kind == "lvis":
        check_lvis()
        return LvisEvaluator(dataset_name, output_dir=output_folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"data set {dataset_name} has evaluator_type {kind!r}; known are coco, lvis and pascal_voc"
    )
