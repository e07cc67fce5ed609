"""Pictures of detections beside the ground truth, drawn from the files an evaluation leaves."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from .build import inference_folder
from .classes import fill_up, load_class_names
from .drawing import beside, caption, contact_sheet, draw_objects, enlarge, score_label, write_image

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_MIN_SIDE = 480  # smaller images are enlarged until labels can be read

_logger = logging.getLogger(__name__)


def write_pictures(cfg: CfgNode, dataset_name: str) -> Path | None:
    """Draw detections beside the ground truth into `OUTPUT_DIR/pictures/<dataset_name>/`.

    Takes TEST.NUM_PICTURES images, evenly spread over the data set, and detections of at least
    TEST.PICTURE_SCORE_THRESH; `index.jpg` shows all on one sheet. Pictures of an earlier
    evaluation are replaced. Run it in one process, after the evaluation.

    Returns:
        The folder, or None where no pictures are wanted or the evaluator left no predictions.
    """
    predictions_file = Path(inference_folder(cfg, dataset_name)) / "instances_predictions.pth"
    if cfg.TEST.NUM_PICTURES <= 0:
        return None
    if not predictions_file.is_file():
        _logger.info(f"No pictures of {dataset_name}: its evaluator keeps no predictions.")
        return None
    found = torch.load(predictions_file, weights_only=False)  # written by this run
    detections = {prediction["image_id"]: prediction["instances"] for prediction in found}
    records = DatasetCatalog.get(dataset_name)
    annotated = any(record.get("annotations") for record in records)
    names = fill_up(
        list(MetadataCatalog.get(dataset_name).get("thing_classes") or [])
        or load_class_names(cfg.OUTPUT_DIR),
        cfg.MODEL.ROI_HEADS.NUM_CLASSES,
    )

    folder = Path(cfg.OUTPUT_DIR) / "pictures" / dataset_name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        if re.match(r"\d{3,}_|index\.jpg$", old.name):
            old.unlink()
    pictures = []
    for number, position in enumerate(_spread(len(records), cfg.TEST.NUM_PICTURES)):
        record = records[position]
        objects = detections.get(record["image_id"], [])
        truth = record.get("annotations", []) if annotated else None
        if truth and not cfg.MODEL.MASK_ON:  # masks on one side only would hide the image there
            truth = [{**item, "segmentation": None} for item in truth]
        threshold = cfg.TEST.PICTURE_SCORE_THRESH
        picture = _picture(record["file_name"], truth, objects, names, threshold)
        stem = re.sub(r"[^\w.-]", "_", Path(record["file_name"]).stem)
        write_image(folder / f"{number:03d}_{stem}.jpg", picture)
        pictures.append(picture)
    if pictures:
        write_image(folder / "index.jpg", contact_sheet(pictures))
    return folder


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(position) for position in np.linspace(0, count - 1, min(count, wanted))})


def _picture(
    file_name: str,
    truth: Sequence[Mapping[str, Any]] | None,
    objects: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    score_threshold: float,
) -> np.ndarray:
    image, scale = enlarge(read_image(file_name, format="BGR"), _MIN_SIDE)
    shown = [item for item in objects if item["score"] >= score_threshold]
    labels = [
        score_label(names[item["category_id"]], item["score"], item.get("mask_score"))
        for item in shown
    ]
    detected = _draw(image, scale, shown, labels)
    text = f"detections: {len(shown)} with score ≥ {score_threshold:g}"
    detected = caption(detected, text)
    if truth is None:
        return detected
    truth = [item for item in truth if not item.get("iscrowd", 0)]
    labels = [names[item["category_id"]] for item in truth]
    text = f"ground truth: {len(truth)} ({Path(file_name).name})"
    return beside(caption(_draw(image, scale, truth, labels), text), detected)


def _draw(
    image: np.ndarray, scale: int, objects: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> np.ndarray:
    boxes = [
        # Detections in COCO's result format carry no mode: theirs is x, y, width, height.
        BoxMode.convert(
            list(item["bbox"]), item.get("bbox_mode", BoxMode.XYWH_ABS), BoxMode.XYXY_ABS
        )
        for item in objects
    ]
    masks = None
    if objects and all(item.get("segmentation") for item in objects):
        masks = [_mask(item["segmentation"], image.shape[:2], scale) for item in objects]
    return draw_objects(
        image,
        np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale,
        [item["category_id"] for item in objects],
        labels,
        masks,
    )


def _mask(segmentation: Any, size: tuple[int, int], scale: int) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon).reshape(-1, 2) * scale for polygon in segmentation]
        for polygon in polygons:  # one by one: filled together, overlaps would be holes
            cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1)
        return mask
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    decoded = mask_util.decode(segmentation)
    return cv2.resize(decoded, size[::-1], interpolation=cv2.INTER_NEAREST)
