"""A few large generated images with masks, written as iSAID is released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

from d2det.data import isaid

FIRST_APPEARANCE = ("Small_Vehicle", "plane", "Harbor", "ship")  # ids 1 to 4 of the JSON


class Raw(NamedTuple):
    """Where the raw data lie, and what was drawn."""

    folder: Path  # images and mask images
    json: Path
    labels: dict[str, np.ndarray]  # by stem: (H, W), 0 or the number of the instance
    classes: dict[str, list[str]]  # by stem: class of instance 1, 2, ...


@pytest.fixture(scope="session")
def isaid_raw(tmp_path_factory) -> Raw:
    """Four images: two that are cut in both directions, one too low to be cut, one empty."""
    folder = tmp_path_factory.mktemp("isaid")
    images = folder / "images"
    images.mkdir()
    sizes = {"P0000": (230, 260), "P0001": (215, 330), "P0007": (90, 250), "P1527": (220, 220)}
    labels, classes = {}, {}
    rng = np.random.default_rng(4)
    for stem, (height, width) in sizes.items():
        labels[stem], classes[stem] = draw(rng, height, width)
        write_images(images / f"{stem}.png", rng, labels[stem], classes[stem])
    json_file = folder / "iSAID_train.json"
    json_file.write_text(json.dumps(release_json(labels, classes)))
    return Raw(images, json_file, labels, classes)


def draw(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Ellipses and bars that do not overlap, from a few pixels to more than a patch."""
    labels = np.zeros((height, width), np.int32)
    classes: list[str] = []
    for _ in range(60):
        shape = np.zeros((height, width), np.uint8)
        centre = tuple(int(v) for v in rng.uniform(0, (width, height)))
        long = float(np.exp(rng.uniform(np.log(2), np.log(70))))
        axes = (int(long), max(1, int(long * rng.uniform(0.15, 0.8))))
        cv2.ellipse(shape, centre, axes, rng.uniform(0, 180), 0, 360, 1, -1)
        if (labels[cv2.dilate(shape, np.ones((5, 5))) > 0] > 0).any():
            continue
        if len(classes) % 4 == 0 and long > 20:  # with a hole
            cv2.circle(shape, centre, 2, 0, -1)
        classes.append(FIRST_APPEARANCE[len(classes) % len(FIRST_APPEARANCE)])
        labels[shape > 0] = len(classes)
    return labels, classes


def write_images(
    path: Path, rng: np.random.Generator, labels: np.ndarray, classes: list[str]
) -> None:
    """The picture, its *_instance_color_RGB.png and its *_instance_id_RGB.png."""
    colours = [(0, 0, 0), *(isaid.COLOURS[isaid.CLASSES.index(name)] for name in classes)]
    by_class = np.array(colours, np.uint8)[labels]
    numbers = np.where(labels > 0, 4_000_000 + 7919 * labels, 0)
    ids = np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    picture = np.clip(rng.normal(90, 12, (*labels.shape, 3)) + 0.6 * by_class, 0, 255)
    stem = path.with_suffix("")
    cv2.imwrite(str(path), picture.astype(np.uint8)[..., ::-1])
    cv2.imwrite(f"{stem}{isaid.CLASS_SUFFIX}.png", by_class[..., ::-1])
    cv2.imwrite(f"{stem}{isaid.INSTANCE_SUFFIX}.png", ids[..., ::-1])


def release_json(labels: dict[str, np.ndarray], classes: dict[str, list[str]]) -> dict[str, Any]:
    """As released: no sizes, ids from 0, categories numbered by first appearance, contours."""
    images, annotations = [], []
    for image_id, (stem, drawn) in enumerate(labels.items()):
        images.append({"id": image_id, "file_name": f"{stem}.png"})
        for number, name in enumerate(classes[stem], start=1):
            mask = (drawn == number).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            x, y, w, h = cv2.boundingRect(mask)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": FIRST_APPEARANCE.index(name) + 1,
                    "category_name": name,
                    "segmentation": [c.ravel().tolist() for c in contours],
                    "area": int(mask.sum()),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(FIRST_APPEARANCE)]
    return {"images": images, "categories": categories, "annotations": annotations}


@pytest.fixture
def cut(isaid_raw, tmp_path, capsys):
    """A function that cuts the raw data and returns the patches' JSON, and where it lies."""
    from d2det.tools import cut_patches

    def run(*options: Any, split: str = "train", from_json: bool = True):
        given = ["--images", isaid_raw.folder, "--output", tmp_path, "--split", split]
        given += ["--size", 100, "--overlap", 30, "--workers", 0, "--preset", "isaid"]
        given += ["--json", isaid_raw.json] if from_json else []
        cut_patches.main([str(item) for item in (*given, *options)])
        path = tmp_path / split / f"instancesonly_filtered_{split}.json"
        return json.loads(path.read_text()), path

    return run
