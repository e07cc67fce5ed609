"""iSAID (Waqas Zamir et al., CVPR workshops 2019): names, ids and colours as released."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Columns, from_labels

# In the order of the official ids, from 1. The JSON files of the release number them by first
# appearance, differently in train and val: only the names can be trusted.
CLASSES = (
    "ship", "storage_tank", "baseball_diamond", "tennis_court", "basketball_court",
    "Ground_Track_Field", "Bridge", "Large_Vehicle", "Small_Vehicle", "Helicopter",
    "Swimming_pool", "Roundabout", "Soccer_ball_field", "plane", "Harbor",
)  # fmt: skip
# RGB of each class, in the same order, in *_instance_color_RGB.png; black is background.
COLOURS = (
    (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191),
    (0, 63, 255), (0, 127, 63), (0, 127, 127), (0, 0, 127), (0, 0, 191),
    (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255), (0, 100, 155),
)  # fmt: skip
CLASS_SUFFIX = "_instance_color_RGB"
INSTANCE_SUFFIX = "_instance_id_RGB"
SKIPPED = ("P1527", "P1530")  # images that the development kit leaves out
MIN_AREA = 11  # it drops objects of up to 10 pixels
_FIRST_INSTANCE = 1000  # lower values of R + 256 G + 65536 B are no instances


def categories() -> list[dict[str, Any]]:
    """COCO's list of the 15 categories, by their official ids."""
    return [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]


def official_ids(found: Sequence[dict[str, Any]]) -> dict[Any, int]:
    """From the ids of a JSON's categories to the official ones, by name.

    Upper and lower case, spaces, "_" and "-" make no difference.

    Raises:
        ValueError: a name that is none of iSAID's.
    """
    known = {_plain(name): i + 1 for i, name in enumerate(CLASSES)}
    unknown = [str(c["name"]) for c in found if _plain(c["name"]) not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is none of iSAID's classes ({', '.join(CLASSES)}); "
            "for other data, leave out --preset isaid"
        )
    return {category["id"]: known[_plain(category["name"])] for category in found}


def read_instances(classes: np.ndarray, instances: np.ndarray) -> list[tuple[int, Columns]]:
    """Official category id and mask of each instance, from the two RGB masks of an image.

    Args:
        classes: (H, W, 3) uint8, *_instance_color_RGB.png.
        instances: (H, W, 3) uint8, *_instance_id_RGB.png; one colour for each instance.

    Raises:
        ValueError: sizes differ, or an instance has no class's colour.
    """
    if classes.shape != instances.shape:
        raise ValueError(
            f"the masks differ in size: {classes.shape[:2]} and {instances.shape[:2]} pixels"
        )
    ids = {_number(np.array(colour)): i + 1 for i, colour in enumerate(COLOURS)}
    labels, colours = _number(instances), _number(classes)
    labels[labels < _FIRST_INSTANCE] = 0
    found = []
    for columns in from_labels(labels).values():
        pieces = [colours[top:bottom, x] for x, top, bottom in zip(*columns, strict=True)]
        values, counts = np.unique(np.concatenate(pieces), return_counts=True)
        coloured = values != 0
        if not coloured.any():  # "unlabeled", which the development kit leaves out
            continue
        # Where colours meet, most of the pixels decide.
        colour = int(values[coloured][counts[coloured].argmax()])
        if colour not in ids:
            rgb = colour & 255, colour >> 8 & 255, colour >> 16
            x, y, *_ = columns.box()
            raise ValueError(f"the instance at ({x}, {y}) has the colour {rgb}, which is no class")
        found.append((ids[colour], columns))
    return found


def split_paths(root: Path, split: str) -> tuple[Path, Path]:
    """JSON and image folder of a cut split, laid out as the development kit does."""
    folder = root / split
    return folder / f"instancesonly_filtered_{split}.json", folder / "images"


def _number(rgb: np.ndarray) -> Any:
    wide = rgb.astype(np.int32)
    number = wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]
    return int(number) if number.ndim == 0 else number


def _plain(name: Any) -> str:
    return str(name).casefold().replace(" ", "_").replace("-", "_")
