"""Pictures of predicted classes of pixels beside the true ones."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

from d2det.data.segmentation import read_labels

from .build import inference_folder
from .drawing import beside, caption, draw_label_map, enlarge

if TYPE_CHECKING:
    from detectron2.config import CfgNode

FILE_NAME = "sem_seg_predictions.json"  # of detectron2's evaluator
_BACKGROUND = "background"  # not painted


def segmentation_pictures(
    cfg: CfgNode, dataset_name: str, positions: Sequence[int], min_side: int
) -> list[tuple[str, np.ndarray]]:
    """File name and picture (BGR) of some images of a data set, from what the evaluator left.

    Args:
        cfg: of the run.
        dataset_name: evaluated just before.
        positions: of the images, in the data set's order.
        min_side: smaller images are enlarged.
    """
    content = json.loads((Path(inference_folder(cfg, dataset_name)) / FILE_NAME).read_text())
    metadata = MetadataCatalog.get(dataset_name)
    names = list(metadata.stuff_classes)
    to_class = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
    regions = defaultdict(list)
    for region in content:
        regions[region["file_name"]].append(region)
    records = DatasetCatalog.get(dataset_name)
    pictures = []
    for record in (records[position] for position in positions):
        image, scale = enlarge(read_image(record["file_name"], format="BGR"), min_side)
        truth = read_labels(record["sem_seg_file_name"])
        found = np.full(truth.shape, metadata.ignore_label, np.uint8)
        for region in regions[record["file_name"]]:
            inside = mask_util.decode(region["segmentation"]).astype(bool)
            found[inside] = to_class.get(region["category_id"], region["category_id"])
        sides = []
        for title, labels in ((f"truth ({Path(record['file_name']).name})", truth),
                              ("prediction", found)):  # fmt: skip
            size = (labels.shape[1] * scale, labels.shape[0] * scale)
            large = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
            shown = {i: name for i, name in enumerate(names) if name != _BACKGROUND}
            sides.append(caption(draw_label_map(image, large, shown), title))
        pictures.append((record["file_name"], beside(*sides)))
    return pictures
