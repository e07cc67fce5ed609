"""UAVDT's evaluation: PASCAL VOC AP as in the D2Det paper, and its own toolkit's, by attribute."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2det.analysis.objects import Detections, GroundTruth
from d2det.analysis.uavdt import WITHOUT_REGIONS, strictly_inside, toolkit_average_precision
from d2det.analysis.voc import voc_average_precision

from .coco import CocoEvaluator

TEXT_FOLDER = "uavdt_toolkit"
_LACKS_FRAMES = (
    "lacks the sequences and frames of its images, which UAVDT's evaluation needs; "
    "python -m d2det.tools.convert_uavdt writes them"
)


class UAVDTEvaluator(CocoEvaluator):
    """COCO's metrics of the boxes ("bbox"), and two more tasks, in percent:

    - "uavdt_voc": PASCAL VOC AP, the mean over the classes;
    - "uavdt_toolkit": AP as UAVDT's toolkit computes it: classes pooled, detections strictly inside
      an ignore region dropped (but in M0209 and M0801).

    Each is named for its threshold ("AP70"), followed by the same for each attribute ("AP70 day",
    ...) that a sequence of the data set has. Result files in the toolkit's format, one for each
    sequence, are written to `output_dir/uavdt_toolkit/`.

    Args:
        dataset_name: a registered data set that `convert_uavdt` wrote.
        output_dir: see `CocoEvaluator`.
        voc_iou_threshold: the paper's is 0.7.
        toolkit_iou_threshold: sources give 0.7 and 0.5.
        eleven_point: VOC 2007's AP, for "uavdt_voc".

    Raises:
        ValueError: the data set's JSON lacks sequences and frames.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        voc_iou_threshold: float = 0.7,
        toolkit_iou_threshold: float = 0.7,
        eleven_point: bool = False,
    ) -> None:
        super().__init__(dataset_name, ("bbox",), output_dir=output_dir)
        if not _has_frames(self._coco_api.dataset):
            raise ValueError(f"{self._metadata.json_file} {_LACKS_FRAMES}")
        self._voc_iou = voc_iou_threshold
        self._toolkit_iou = toolkit_iou_threshold
        self._eleven_point = eleven_point

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        super()._eval_predictions(predictions, img_ids)
        found = self.with_dataset_ids(
            [entry for prediction in predictions for entry in prediction["instances"]]
        )
        content = self._coco_api.dataset
        if self._output_dir:
            write_text_results(content["images"], found, Path(self._output_dir) / TEXT_FOLDER)
        if self._do_evaluation:
            self._results.update(
                uavdt_results(
                    content,
                    found,
                    voc_iou_threshold=self._voc_iou,
                    toolkit_iou_threshold=self._toolkit_iou,
                    eleven_point=self._eleven_point,
                )
            )


def uavdt_results(
    content: dict[str, Any],
    found: Sequence[dict[str, Any]],
    *,
    voc_iou_threshold: float = 0.7,
    toolkit_iou_threshold: float = 0.7,
    eleven_point: bool = False,
) -> dict[str, dict[str, float]]:
    """Both kinds of AP, over all images and by attribute.

    Args:
        content: of a JSON that `convert_uavdt` wrote.
        found: detections in COCO's result format.
        voc_iou_threshold, toolkit_iou_threshold, eleven_point: as in `UAVDTEvaluator`.
    """
    # In the toolkit's order, which decides between equal scores.
    images = sorted(content["images"], key=lambda image: (image["sequence"], image["frame"]))
    place = {image["id"]: i for i, image in enumerate(images)}
    label = {c["id"]: k for k, c in enumerate(sorted(content["categories"], key=_id))}
    annotations = content["annotations"]
    truth = GroundTruth(
        **_arrays(annotations, place, label),
        crowd=np.array([bool(a["iscrowd"]) for a in annotations], bool),
    )
    detections = Detections(
        **_arrays(found, place, label), score=np.array([d["score"] for d in found], float)
    )
    sequence = np.array([image["sequence"] for image in images])
    dropped = _in_ignore_regions(content, place, sequence, detections)
    having = {entry["name"]: entry["attributes"] for entry in content.get("sequences", [])}
    attributes = list(dict.fromkeys(name for names in having.values() for name in names))
    results: dict[str, dict[str, float]] = {"uavdt_voc": {}, "uavdt_toolkit": {}}
    for attribute in (None, *sorted(attributes, key=_attribute_order)):
        wanted = np.array([attribute is None or attribute in having.get(s, ()) for s in sequence])
        of_truth = truth.take(wanted[truth.image])
        of_voc = wanted[detections.image]
        voc = voc_average_precision(
            of_truth,
            detections.take(of_voc),
            len(label),
            voc_iou_threshold,
            eleven_point=eleven_point,
        )
        toolkit = toolkit_average_precision(
            of_truth, detections.take(of_voc & ~dropped), toolkit_iou_threshold
        )
        suffix = "" if attribute is None else f" {attribute}"
        mean = float(np.nanmean(voc)) if not np.isnan(voc).all() else float("nan")
        results["uavdt_voc"][f"AP{100 * voc_iou_threshold:g}{suffix}"] = 100 * mean
        results["uavdt_toolkit"][f"AP{100 * toolkit_iou_threshold:g}{suffix}"] = 100 * toolkit
    return results


def write_text_results(
    images: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], folder: Path
) -> list[Path]:
    """Write detections in the toolkit's format, `SEQUENCE.txt` for each sequence (its RES_DET).

    A line is frame, -1, left, top, width, height, score, 1, -1, by frame and falling score. The
    toolkit cannot read an empty file: a sequence without detections gets a line for frame 0, which
    it does not look at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frame_of = {image["id"]: (image["sequence"], image["frame"]) for image in images}
    lines: dict[str, list[tuple[int, float, str]]] = {name: [] for name, _ in frame_of.values()}
    for entry in found:
        name, frame = frame_of[entry["image_id"]]
        box = ",".join(f"{value:.3f}" for value in entry["bbox"])
        text = f"{frame},-1,{box},{entry['score']:.6f},1,-1"
        lines[name].append((frame, -entry["score"], text))
    written = []
    for name, entries in sorted(lines.items()):
        texts = [text for *_, text in sorted(entries, key=lambda entry: entry[:2])]
        path = folder / f"{name}.txt"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("\n".join(texts or ["0,-1,0,0,1,1,0,1,-1"]) + "\n")
        os.replace(partial, path)
        written.append(path)
    return written


def read_results(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Read detections in COCO's result format.

    Args:
        path: a JSON.
        content: of the ground truth that they belong to.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is something else, or belongs to other ground truth.
    """
    if not _has_frames(content):
        raise ValueError(f"the ground truth {_LACKS_FRAMES}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    known = {image["id"] for image in content["images"]}, {c["id"] for c in content["categories"]}
    for number, entry in enumerate(found if isinstance(found, list) else [None], start=1):
        if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= set(
            entry
        ):
            raise ValueError(f"{path} is no list of detections in COCO's result format")
        if entry["image_id"] not in known[0] or entry["category_id"] not in known[1]:
            raise ValueError(
                f"{path}: detection number {number} has the image id {entry['image_id']} and the "
                f"category id {entry['category_id']}; the ground truth lacks one of them"
            )
    return found


def _has_frames(content: dict[str, Any]) -> bool:
    return all("sequence" in image and "frame" in image for image in content["images"])


def _arrays(
    entries: Sequence[dict[str, Any]], place: dict[Any, int], label: dict[Any, int]
) -> dict[str, np.ndarray]:
    box = np.array([entry["bbox"] for entry in entries], float).reshape(-1, 4)
    return {
        "image": np.array([place[entry["image_id"]] for entry in entries], np.int64),
        "label": np.array([label[entry["category_id"]] for entry in entries], np.int64),
        "box": box,
        "area": box[:, 2] * box[:, 3],
    }


def _in_ignore_regions(
    content: dict[str, Any], place: dict[Any, int], sequence: np.ndarray, detections: Detections
) -> np.ndarray:
    regions = content.get("ignore_regions", [])
    image = np.array([place[region["image_id"]] for region in regions], np.int64)
    box = np.array([region["bbox"] for region in regions], float).reshape(-1, 4)
    read = ~np.isin(sequence[image], WITHOUT_REGIONS) if len(image) else np.zeros(0, bool)
    return strictly_inside(detections.image, detections.box, image[read], box[read])


def _id(category: dict[str, Any]) -> Any:
    return category["id"]


def _attribute_order(name: str) -> tuple[int, str]:
    from d2det.data.uavdt_raw import ATTRIBUTES

    return (ATTRIBUTES.index(name) if name in ATTRIBUTES else len(ATTRIBUTES), name)
