"""From UAVDT's raw files to COCO's format: one class "vehicle", ignore regions painted black."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .uavdt_clips import Clip, choose_val, read_clip
from .uavdt_coco import coco_content
from .uavdt_images import Task, write_images
from .uavdt_raw import TEST, TRAIN, RawSequence, find_sequences

VERSION = 1  # of the converted data
IGNORE_MODES = ("black", "crowd", "keep")
SPLITS = ("train", "val", "trainval", "test")
SETTINGS_FILE = "uavdt.json"


@dataclass(frozen=True)
class Options:
    """How to convert.

    Args:
        ignore_regions: "black": painted black in all images, as in the paper. "crowd": crowd boxes
            of every class. "keep": nothing is done about them. The regions themselves are always
            written beside the annotations, for the evaluation.
        three_classes: car, truck and bus instead of "vehicle".
        val_sequences: training sequences for validation; None: see `choose_val`.
        allow_missing_frames: leave out annotations whose image is missing, instead of an error.
    """

    ignore_regions: str = "black"
    three_classes: bool = False
    val_sequences: tuple[str, ...] | None = None
    allow_missing_frames: bool = False


def convert(
    folders: Sequence[Path],
    output: Path,
    options: Options,
    *,
    workers: int = 1,
    warn: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Write `output/images/` and `output/annotations/instances_{train,val,trainval,test}.json`.

    An interrupted conversion can be repeated: images that are there are kept, and every file gets
    its name when it is complete. Beside COCO's fields, an image has "sequence" and "frame"; an
    annotation "track", "out_of_view", "occlusion" and "kind" (1 car, 2 truck, 3 bus); the file
    "sequences" (names and attributes) and "ignore_regions" (image ids and boxes).

    Args:
        folders: where the archives were unpacked; searched for sequences.
        output: folder of the converted data.
        options: see there.
        workers: images that are written at a time.
        warn: receives one sentence for each kind of irregularity.

    Returns:
        Paths of the JSON files by split; a split without sequences is not written.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a line or a file is not what it should be, or `output` holds a conversion with
            other options; the message names file and line.
    """
    if options.ignore_regions not in IGNORE_MODES:
        raise ValueError(f"ignore_regions must be one of {IGNORE_MODES}")
    raw, warnings = find_sequences(folders, skip=output / "images")
    for warning in warnings:
        warn(warning)
    clips = [
        clip
        for sequence in raw.values()
        if (clip := read_clip(sequence, warn, allow_missing_frames=options.allow_missing_frames))
        is not None
    ]
    _warn_of_missing(raw, warn)
    val = _val_names(clips, options)
    _claim(output, options, val, raw)
    tasks, places = _image_tasks(clips, output / "images", options)
    sizes = dict(zip(places, write_images(tasks, workers), strict=True))
    members = {
        "train": [clip for clip in clips if not clip.is_test and clip.name not in val],
        "val": [clip for clip in clips if clip.name in val],
        "trainval": [clip for clip in clips if not clip.is_test],
        "test": [clip for clip in clips if clip.is_test],
    }
    image_ids = {place: i for i, place in enumerate(places, start=1)}
    written = {}
    for split in SPLITS:
        if not members[split]:
            warn(f"no sequences for the {split} split: it is not written")
            continue
        content = coco_content(
            members[split],
            split,
            image_ids,
            sizes,
            ignore_regions=options.ignore_regions,
            three_classes=options.three_classes,
            warn=warn,
        )
        written[split] = output / "annotations" / f"instances_{split}.json"
        _write(written[split], content)
    return written


def _warn_of_missing(raw: dict[str, RawSequence], warn: Callable[[str], None]) -> None:
    for split, names in (("train", TRAIN), ("test", TEST)):
        missing = [name for name in names if name not in raw or not raw[name].frames]
        if missing:
            warn(
                f"{len(missing)} of the {len(names)} {split} sequences are not there: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; results are not "
                "comparable with published ones"
            )
    bare = [name for name, sequence in raw.items() if sequence.attribute_file is None]
    if bare:
        warn(
            f"{len(bare)} sequences have no attributes (M_attr): {', '.join(bare[:5])}"
            f"{', ...' if len(bare) > 5 else ''}; they are in no result by attribute"
        )


def _val_names(clips: Sequence[Clip], options: Options) -> tuple[str, ...]:
    if options.val_sequences is None:
        return choose_val(clips)
    training = {clip.name for clip in clips if not clip.is_test}
    unknown = [name for name in options.val_sequences if name not in training]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no training sequences, so none for validation")
    return tuple(sorted(set(options.val_sequences)))


def _claim(
    output: Path, options: Options, val: tuple[str, ...], raw: dict[str, RawSequence]
) -> None:
    """Note what the folder holds, or see that it holds just this."""
    digest = hashlib.sha256()
    for name, sequence in raw.items():
        regions = sequence.ignore.read_bytes() if sequence.ignore else b""
        digest.update(f"{name} {sequence.folder} {len(regions)} ".encode() + regions)
    settings: dict[str, Any] = {"version": VERSION, **asdict(options), "val_sequences": list(val)}
    settings["regions"] = digest.hexdigest()
    del settings["allow_missing_frames"]
    note = output / SETTINGS_FILE
    if note.is_file() and json.loads(note.read_text()) != settings:
        raise ValueError(
            f"{output} holds a conversion with other options or of other files: remove it, or "
            "choose another folder"
        )
    _write(note, settings)


def _image_tasks(
    clips: Sequence[Clip], folder: Path, options: Options
) -> tuple[list[Task], list[tuple[str, int]]]:
    tasks, places = [], []
    for clip in clips:
        painted: dict[int, list[tuple[float, float, float, float]]] = {}
        if options.ignore_regions == "black":
            for region in clip.regions:
                painted.setdefault(region.frame, []).append(region.box)
        for frame, source in clip.frames.items():
            target = folder / clip.name / source.name
            tasks.append(Task(source, target, tuple(painted.get(frame, ()))))
            places.append((clip.name, frame))
    return tasks, places


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)
