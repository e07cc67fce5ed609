"""UAVDT as it is downloaded: where its files are, and what their lines say.

The archives are UAV-benchmark-M (images), UAV-benchmark-MOTD_v1.0 (folder GT) and M_attr. Both
known layouts of images and annotations are read, wherever below the given folders they lie:

    M0101/img000001.jpg           M0101/img1/img000001.jpg
    GT/M0101_gt_whole.txt         M0101/gt/gt_whole.txt
    GT/M0101_gt_ignore.txt        M0101/gt/gt_ignore.txt
    M_attr/train/M0101_attr.txt   (one published name has a space: "M0701 _attr.txt")

Du et al., The Unmanned Aerial Vehicle Benchmark: Object Detection and Tracking, ECCV 2018.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TRAIN = (
    "M0101", "M0201", "M0202", "M0204", "M0206", "M0207", "M0210", "M0301",
    "M0401", "M0402", "M0501", "M0603", "M0604", "M0605", "M0702", "M0703",
    "M0704", "M0901", "M0902", "M1002", "M1003", "M1005", "M1006", "M1008",
    "M1102", "M1201", "M1202", "M1304", "M1305", "M1306",
)  # fmt: skip
TEST = (
    "M0203", "M0205", "M0208", "M0209", "M0403", "M0601", "M0602", "M0606",
    "M0701", "M0801", "M0802", "M1001", "M1004", "M1007", "M1009", "M1101",
    "M1301", "M1302", "M1303", "M1401",
)  # fmt: skip
CATEGORIES = {1: "car", 2: "truck", 3: "bus"}
ATTRIBUTES = (
    "day", "night", "fog", "low altitude", "medium altitude", "high altitude", "front view",
    "side view", "bird view", "long term",
)  # fmt: skip
_DEPTH = 5  # of folders below the given one
_SEQUENCE = re.compile(r"M\d{4}")
_IMAGE = re.compile(r"(?:img)?0*(\d+)\.(?:jpg|jpeg|png)", re.IGNORECASE)
_ANNOTATION = re.compile(r"(M\d{4})_gt_(whole|ignore)\.txt")
_ATTRIBUTE = re.compile(r"(M\d{4})\s*_attr\.txt")


@dataclass(frozen=True, slots=True)  # there are 800,000 of them
class Box:
    """A line of an annotation file: `box` is left, top, width, height in pixels."""

    line: int
    frame: int
    target: int
    box: tuple[float, float, float, float]
    rest: tuple[int, ...] = ()  # out of view, occlusion, category


@dataclass
class RawSequence:
    """The files of one sequence."""

    name: str
    frames: dict[int, Path] = field(default_factory=dict)  # by frame number, from 1
    folder: Path | None = None
    whole: Path | None = None
    ignore: Path | None = None
    attribute_file: Path | None = None

    @property
    def is_test(self) -> bool:
        """Whether it belongs to the test split, by the official lists or else its M_attr folder.

        Raises:
            ValueError: neither says, or they contradict each other.
        """
        told = self.attribute_file.parent.name if self.attribute_file else ""
        listed = "train" if self.name in TRAIN else "test" if self.name in TEST else ""
        if told in ("train", "test") and listed and told != listed:
            raise ValueError(
                f"{self.attribute_file}: {self.name} is a sequence of the {listed} split; were the "
                "files moved?"
            )
        split = listed or told
        if split not in ("train", "test"):
            raise ValueError(
                f"{self.folder or self.whole}: {self.name} is not in UAVDT's lists, and no file in "
                f"M_attr/train or M_attr/test tells its split: remove it, or add the file"
            )
        return split == "test"


def find_sequences(
    folders: Iterable[Path], skip: Path | None = None
) -> tuple[dict[str, RawSequence], list[str]]:
    """Find images, annotations and attributes of all sequences below some folders.

    Args:
        folders: where to look.
        skip: a folder that is passed over: converted images are no raw ones.

    Returns:
        Sequences in the order of their names, and warnings.

    Raises:
        FileNotFoundError: a folder does not exist, or there are no sequences below any.
        ValueError: the images of a sequence are in two places.
    """
    found: dict[str, RawSequence] = {}
    warnings: list[str] = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        _scan(folder, _DEPTH, skip and skip.resolve(), found, warnings)
    if not any(sequence.folder for sequence in found.values()):
        raise FileNotFoundError(
            f"no sequences of UAVDT (folders M0101, M0201, ... with images) below "
            f"{', '.join(map(str, folders))}; give the folder that UAV-benchmark-M was unpacked in"
        )
    return dict(sorted(found.items())), warnings


def _scan(
    folder: Path,
    depth: int,
    skip: Path | None,
    found: dict[str, RawSequence],
    warnings: list[str],
) -> None:
    if folder.resolve() == skip:
        return
    inner = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir():
            inner.append(path)
        elif match := _ANNOTATION.fullmatch(entry.name):
            _set(found, match[1], match[2], path, warnings)
        elif match := _ATTRIBUTE.fullmatch(entry.name):
            _set(found, match[1], "attribute_file", path, warnings)
    for path in inner:
        if _SEQUENCE.fullmatch(path.name):
            _scan_sequence(path, found, warnings)
        elif depth > 1:
            _scan(path, depth - 1, skip, found, warnings)


def _scan_sequence(folder: Path, found: dict[str, RawSequence], warnings: list[str]) -> None:
    for kind in ("whole", "ignore"):
        file = folder / "gt" / f"gt_{kind}.txt"
        if file.is_file():
            _set(found, folder.name, kind, file, warnings)
    inside = folder / "img1"
    images = inside if inside.is_dir() else folder
    frames = {}
    for entry in os.scandir(images):
        match = _IMAGE.fullmatch(entry.name)
        if match and entry.is_file():
            if int(match[1]) in frames:
                raise ValueError(f"{images}: frame {int(match[1])} is there twice, as {entry.name}")
            frames[int(match[1])] = Path(entry.path)
    sequence = found.setdefault(folder.name, RawSequence(folder.name))
    if sequence.frames and frames and not images.samefile(sequence.folder or images):
        raise ValueError(
            f"the images of {folder.name} are in two places, {sequence.folder} and {images}: "
            "remove one"
        )
    if frames or sequence.folder is None:
        sequence.folder, sequence.frames = images, dict(sorted(frames.items()))


def _set(
    found: dict[str, RawSequence], name: str, kind: str, path: Path, warnings: list[str]
) -> None:
    sequence = found.setdefault(name, RawSequence(name))
    earlier = getattr(sequence, kind)
    if earlier is None:
        setattr(sequence, kind, path)
    elif earlier.read_bytes() != path.read_bytes():
        warnings.append(f"{path} differs from {earlier}, which is used")


def read_boxes(path: Path, *, whole: bool) -> list[Box]:
    """Read `gt_whole.txt` (nine columns) or `gt_ignore.txt` (six or more).

    Raises:
        ValueError: a malformed line, with file and line.
    """
    boxes = []
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        parts = [part.strip() for part in text.strip().rstrip(",").split(",")]
        if parts == [""]:
            continue
        where = f"{path}:{number}"
        if len(parts) != 9 if whole else len(parts) < 6:
            raise ValueError(
                f"{where}: {len(parts)} columns, expected {'9' if whole else 'at least 6'}, "
                f"separated by commas: {text.strip()[:60]!r}"
            )
        try:
            values = [float(part) for part in parts]
        except ValueError:
            raise ValueError(f"{where}: not all are numbers: {text.strip()[:60]!r}") from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{where}: not all are finite numbers: {text.strip()[:60]!r}")
        if values[0] != int(values[0]) or values[0] < 1:
            raise ValueError(f"{where}: frame {parts[0]}; frames are counted from 1")
        rest = tuple(int(value) for value in values[6:9]) if whole else ()
        if whole and (values[8] not in CATEGORIES):
            known = ", ".join(f"{key} {name}" for key, name in CATEGORIES.items())
            raise ValueError(f"{where}: unknown class {parts[8]}; known are {known}")
        left, top, width, height = values[2:6]
        boxes.append(Box(number, int(values[0]), int(values[1]), (left, top, width, height), rest))
    return boxes


def read_attributes(path: Path) -> list[str]:
    """Names, of `ATTRIBUTES`, that hold for a sequence.

    Raises:
        ValueError: the file does not hold ten values of 0 or 1.
    """
    values = path.read_text(encoding="utf-8-sig").replace(",", " ").split()
    if len(values) != len(ATTRIBUTES) or not set(values) <= {"0", "1"}:
        raise ValueError(
            f"{path}:1: expected {len(ATTRIBUTES)} values of 0 or 1 ({', '.join(ATTRIBUTES)}), "
            f"found {' '.join(values)[:60]!r}"
        )
    return [name for name, value in zip(ATTRIBUTES, values, strict=True) if value == "1"]
