"""Choosing the evaluator of a data set."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator

from .coco import CocoEvaluator
from .coco_metrics import read_protocol
from .lvis import LvisEvaluator, check_lvis
from .pascal_voc import PascalVOCEvaluator
from .uavdt import UAVDTEvaluator

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def inference_folder(cfg: CfgNode, dataset_name: str, *, augmented: bool = False) -> str:
    """Where the predictions on a data set are written; with test-time augmentation, elsewhere."""
    folder = "inference_TTA" if augmented else "inference"
    return os.path.join(cfg.OUTPUT_DIR, folder, dataset_name)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator that TEST.EVALUATOR names, else that of the data set's "evaluator_type": "coco"
    (also if unset), "lvis", "pascal_voc", "uavdt", "sem_seg" or "cityscapes_sem_seg".

    Boxes are evaluated always, masks and keypoints if the model predicts them; masks only if the
    ground truth has them. Area ranges and numbers of detections of "coco": TEST.COCO. The last two
    are semantic segmentation, both by detectron2's `SemSegEvaluator`, which needs none of
    Cityscapes' own scripts.

    Args:
        cfg: decides what is evaluated.
        dataset_name: a registered data set.
        output_folder: for the predictions; default `OUTPUT_DIR/inference/<dataset_name>`.

    Raises:
        ValueError: an evaluator type this project does not serve, one whose package is missing,
            or unfit keys of TEST.COCO.
    """
    output_folder = output_folder or inference_folder(cfg, dataset_name)
    kind = cfg.TEST.EVALUATOR or MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"
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
        metric = cfg.TEST.get("VOC_METRIC", "year")
        return PascalVOCEvaluator(dataset_name, output_dir=output_folder, metric=metric)
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        return SemSegEvaluator(dataset_name, output_dir=output_folder)
    if kind == "uavdt":
        return UAVDTEvaluator(
            dataset_name,
            output_dir=output_folder,
            voc_iou_threshold=cfg.TEST.UAVDT.VOC_IOU_THRESH,
            toolkit_iou_threshold=cfg.TEST.UAVDT.TOOLKIT_IOU_THRESH,
            eleven_point=cfg.TEST.UAVDT.ELEVEN_POINT,
        )
    source = (
        "TEST.EVALUATOR is" if cfg.TEST.EVALUATOR else f"data set {dataset_name} has evaluator_type"
    )
    raise ValueError(
        f"{source} {kind!r}; known are coco, lvis, pascal_voc, uavdt, sem_seg and "
        "cityscapes_sem_seg"
    )
