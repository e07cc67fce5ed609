"""The image files of a COCO data set: are they there, can they be read, how large are they?"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SAMPLE_SIZE = 16  # images that are read whole
# Up to this many, all headers are read, in a second or two. Larger sets may lie on slow disks, and
# every process registers them: there only the existence of all files is checked.
HEADERS_UP_TO = 10_000
_EXIF_ORIENTATION = 0x0112


def check_files(images: Sequence[dict[str, Any]], image_root: Path, json_file: Path) -> None:
    """Check that all image files exist and hold something, and that they are images.

    That they are is seen from the headers, in sets of up to `HEADERS_UP_TO`; a few are read whole.

    Args:
        images: entries of the JSON, with "file_name".
        image_root: folder to which the names are relative.
        json_file: named in messages.

    Raises:
        FileNotFoundError: the folder, or any file, does not exist.
        ValueError: a file is empty or not an image, or has another size than the JSON says.
    """
    if not image_root.is_dir():
        raise FileNotFoundError(f"{image_root}, the image folder of {json_file}, is not there")
    # One listing for each folder: far fewer system calls than asking for each file.
    listings: dict[str, dict[str, int]] = {}
    missing, empty = [], []
    for image in images:
        folder, base = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in listings:
            listings[folder] = _file_sizes(folder)
        size = listings[folder].get(base)
        if size is None:
            missing.append(image["file_name"])
        elif size == 0:
            empty.append(image["file_name"])
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(images)} images of {json_file} are not in {image_root}: "
            f"{_some(missing)}; {_hint(missing[0], image_root)}"
        )
    if empty:
        raise ValueError(
            f"{len(empty)} of the {len(images)} images of {json_file} are empty files: "
            f"{_some(empty)}; copy or download them again"
        )
    for image in images if len(images) <= HEADERS_UP_TO else ():
        _check_readable(image, image_root, json_file, whole=False)
    for image in random.Random(0).sample(list(images), min(SAMPLE_SIZE, len(images))):
        _check_readable(image, image_root, json_file, whole=True)


def missing_sizes(images: Sequence[dict[str, Any]], image_root: Path) -> dict[Any, tuple[int, int]]:
    """(width, height) of the images whose entry in the JSON lacks it, by image id."""
    return {
        image["id"]: _read_size(os.path.join(image_root, image["file_name"]))
        for image in images
        if not (image.get("width") and image.get("height"))
    }


def _file_sizes(folder: str) -> dict[str, int]:
    sizes = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    sizes[entry.name] = entry.stat().st_size
                except FileNotFoundError:  # a link to nothing
                    continue
    except (FileNotFoundError, NotADirectoryError):
        pass
    return sizes


def _check_readable(
    image: dict[str, Any], image_root: Path, json_file: Path, *, whole: bool
) -> None:
    path = os.path.join(image_root, image["file_name"])
    try:
        with Image.open(path) as picture:
            if whole:
                picture.load()
            found = _upright_size(picture)
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(
            f"{path}, an image of {json_file}, cannot be read ({error}); replace the file, or take "
            "it out of the JSON"
        ) from error
    told = [int(image.get(side) or 0) for side in ("width", "height")]
    if all(told) and list(found) != told:
        raise ValueError(
            f"{path} is {found[0]} x {found[1]} pixels, but {json_file} says {told[0]} x {told[1]};"
            " were the images resized or rotated after they were annotated?"
        )


def _read_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return _upright_size(picture)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) once the camera's orientation is applied, as detectron2 does on reading."""
    width, height = picture.size
    turned = picture.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def _hint(name: str, image_root: Path) -> str:
    folder, base = os.path.split(name)
    if folder and (image_root.parent / name).is_file():
        return f"give {image_root.parent} as image folder: the names in the JSON start from there"
    if folder and (image_root / base).is_file():
        return f"the names in the JSON begin with {folder!r}, which the folder does not hold"
    return "give the folder to which the names in the JSON are relative"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
