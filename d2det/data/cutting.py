"""Cutting one large image, its mask images and its annotations into patches."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from . import isaid
from .cut_annotations import Annotation, Instance, Rules, cut_instances, read_instances
from .patches import Grid, Window, patch_name

_VERSION = 1  # raise it whenever the same input would give other patches or annotations


@dataclass(frozen=True)
class Job:
    """An image to cut.

    Attributes:
        image: its entry in the JSON: "id", "file_name".
        annotations: of this image, in COCO's format; None: read from the mask images.
        masks: the data set has masks.
        image_root: folder of the image.
        output: folder of the split: patches go to images/, what is known of them to parts/.
        grid, rules: how to cut, and what to keep.
        keep_empty: write patches without objects too.
        companions: suffixes of the mask images that are cut beside the image, such as
            "_instance_id_RGB".
    """

    image: dict[str, Any]
    annotations: list[Annotation] | None
    masks: bool
    image_root: Path
    output: Path
    grid: Grid = field(default_factory=Grid)
    rules: Rules = field(default_factory=Rules)
    keep_empty: bool = True
    companions: tuple[str, ...] = ()

    @property
    def name(self) -> Path:
        return Path(self.image["file_name"])

    @property
    def part(self) -> Path:
        """The file that tells that the image is finished."""
        return self.output / "parts" / self.name.with_suffix(".json")

    def source(self, suffix: str = "") -> Path:
        """The image, or the mask image with this suffix."""
        name = self.name
        return self.image_root / (name.with_name(f"{name.stem}{suffix}.png") if suffix else name)

    def fingerprint(self) -> str:
        """Changes with everything that the result depends on."""
        stats = [self.source(s).stat() for s in ("", *self.companions)]
        content = [
            _VERSION,
            self.image,
            self.annotations,
            self.masks,
            [asdict(self.grid), asdict(self.rules), self.keep_empty, self.companions],
            [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cut(job: Job) -> bool:
    """Cut an image, unless that is done; tells whether there was anything to do.

    Every file is written beside its place and renamed; the part file comes last, so that an image
    is either finished or done again.

    Raises:
        ValueError: the image, a mask image or an annotation is not usable; the message names it.
        FileNotFoundError: the image or a mask image is not there.
    """
    fingerprint = job.fingerprint()
    if _finished(job, fingerprint):
        return False
    pictures = {suffix: read_rgb(job.source(suffix)) for suffix in ("", *job.companions)}
    height, width = pictures[""].shape[:2]
    for suffix, picture in pictures.items():
        if picture.shape[:2] != (height, width):
            raise ValueError(
                f"{job.source(suffix)} is {picture.shape[1]} x {picture.shape[0]} pixels, its "
                f"image {width} x {height}"
            )
    dropped: Counter[str] = Counter()
    instances = _instances(job, pictures, dropped)
    patches = []
    for window in job.grid.windows(height, width):
        annotations = cut_instances(instances, window, job.rules, dropped)
        if annotations or job.keep_empty:
            files = _write_patch(job, pictures, window)
            entry = {"window": list(window), "files": files, "annotations": annotations}
            patches.append(entry)
    part = {
        "fingerprint": fingerprint,
        "image": {**job.image, "width": width, "height": height},
        "annotations": _whole_annotations(job, instances, height, width),
        "patches": patches,
        "dropped": dropped,
    }
    write_atomically(job.part, json.dumps(part).encode())
    return True


def read_rgb(path: Path) -> np.ndarray:
    """An image (H, W, 3) uint8, upright, read completely.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read to its end.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # large images are expected
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(
            f"{path} cannot be read ({error}): it is damaged or incomplete; copy or download it "
            "again"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there either completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finished(job: Job, fingerprint: str) -> bool:
    try:
        part = json.loads(job.part.read_bytes())
    except (OSError, ValueError):
        return False
    if part.get("fingerprint") != fingerprint:
        return False
    files = [item for patch in part["patches"] for item in patch["files"].items()]
    return all(_has_size(job.output / "images" / name, size) for name, size in files)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _instances(job: Job, pictures: dict[str, np.ndarray], dropped: Counter[str]) -> list[Instance]:
    height, width = pictures[""].shape[:2]
    try:
        if job.annotations is not None:
            return read_instances(
                job.annotations, height, width, job.rules, masks=job.masks, dropped=dropped
            )
        classes, ids = pictures[isaid.CLASS_SUFFIX], pictures[isaid.INSTANCE_SUFFIX]
        return [
            Instance(category, 0, tuple(map(float, m.box())), m.area, m, number)
            for number, (category, m) in enumerate(isaid.read_instances(classes, ids), start=1)
        ]
    except ValueError as error:
        raise ValueError(f"{job.source()}: {error}") from error


def _whole_annotations(
    job: Job, instances: list[Instance], height: int, width: int
) -> list[Annotation]:
    """The objects of the whole image, written as those of its patches are."""
    whole = cut_instances(instances, Window(0, 0, width, height), job.rules, Counter())
    for annotation in whole:
        del annotation["visible"]
    return whole


def _write_patch(job: Job, pictures: dict[str, np.ndarray], window: Window) -> dict[str, int]:
    """Write the patch and its mask images; their names, the patch's first, with sizes in bytes."""
    height, width = pictures[""].shape[:2]
    files = {}
    for suffix, picture in pictures.items():
        if window == (0, 0, width, height):  # kept whole: the file as it is
            name, content = job.source(suffix).name, job.source(suffix).read_bytes()
        else:
            name = patch_name(job.name.stem, window, f"{suffix}.png")
            piece = picture[window.y1 : window.y2, window.x1 : window.x2, ::-1]
            content = cv2.imencode(".png", np.ascontiguousarray(piece))[1].tobytes()
        relative = (job.name.parent / name).as_posix()
        write_atomically(job.output / "images" / relative, content)
        files[relative] = len(content)
    return files
