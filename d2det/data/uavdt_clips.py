"""A sequence of UAVDT, read and checked, and which ones are for validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .uavdt_raw import ATTRIBUTES, Box, RawSequence, read_attributes, read_boxes

VAL_SHARE = 0.1  # of the training frames, at least


@dataclass
class Clip:
    """A sequence that was read and checked."""

    name: str
    is_test: bool
    frames: dict[int, Path]
    boxes: list[Box]
    regions: list[Box]
    attributes: list[str] | None


def read_clip(
    sequence: RawSequence, warn: Callable[[str], None], *, allow_missing_frames: bool = False
) -> Clip | None:
    """Read and check a sequence; None where there is nothing of it to convert.

    Args:
        sequence: its files.
        warn: receives one sentence for each kind of irregularity.
        allow_missing_frames: leave out boxes whose image is missing, instead of an error.

    Raises:
        FileNotFoundError: annotations or images are missing.
        ValueError: a malformed line.
    """
    if sequence.folder is None:
        warn(f"{sequence.whole or sequence.attribute_file}: there are no images of {sequence.name}")
        return None
    is_test = sequence.is_test
    if sequence.whole is None:
        raise FileNotFoundError(
            f"{sequence.name}: its images are in {sequence.folder}, but there is no "
            f"{sequence.name}_gt_whole.txt (UAV-benchmark-MOTD_v1.0/GT) in the given folders"
        )
    boxes = _usable(read_boxes(sequence.whole, whole=True), sequence.whole, "boxes", warn)
    regions: list[Box] = []
    if sequence.ignore is None:
        warn(
            f"{sequence.name} has no {sequence.name}_gt_ignore.txt: taken as without ignore regions"
        )
    else:
        regions = _usable(
            read_boxes(sequence.ignore, whole=False), sequence.ignore, "regions", warn
        )
    if not sequence.frames:
        text = f"{sequence.folder}: an empty sequence, without any image"
        if boxes and not allow_missing_frames:
            raise FileNotFoundError(f"{text}, but {sequence.whole} has {len(boxes)} boxes")
        warn(f"{text}: left out")
        return None
    if not boxes:
        warn(f"{sequence.whole} is empty: its {len(sequence.frames)} frames count as empty")
    boxes = _with_image(boxes, sequence, sequence.whole, allow_missing_frames, warn)
    if sequence.ignore is not None:
        regions = [region for region in regions if region.frame in sequence.frames]
        _warn_of_overlaps(regions, sequence.ignore, warn)
    attributes = None
    if sequence.attribute_file is not None:
        attributes = read_attributes(sequence.attribute_file)
    return Clip(sequence.name, is_test, sequence.frames, boxes, regions, attributes)


def _usable(boxes: list[Box], path: Path, what: str, warn: Callable[[str], None]) -> list[Box]:
    flat = [box for box in boxes if box.box[2] <= 0 or box.box[3] <= 0]
    if flat:
        warn(f"{path}:{flat[0].line}: {len(flat)} {what} without area left out, the first here")
    return [box for box in boxes if box.box[2] > 0 and box.box[3] > 0]


def _with_image(
    boxes: list[Box],
    sequence: RawSequence,
    path: Path,
    allow_missing_frames: bool,
    warn: Callable[[str], None],
) -> list[Box]:
    lost = [box for box in boxes if box.frame not in sequence.frames]
    if lost:
        frames = sorted({box.frame for box in lost})
        text = f"{path}:{lost[0].line}: frame {lost[0].frame} has no image in {sequence.folder}"
        more = f" ({len(frames)} such frames, {len(lost)} boxes)"
        if not allow_missing_frames:
            raise FileNotFoundError(
                f"{text}{more}; unpack the images again, or leave these boxes out by "
                "--allow-missing-frames"
            )
        warn(f"{text}{more}: left out")
    return [box for box in boxes if box.frame in sequence.frames]


def _warn_of_overlaps(regions: list[Box], path: Path, warn: Callable[[str], None]) -> None:
    by_frame: dict[int, list[Box]] = {}
    count, first = 0, None
    for region in regions:
        for other in by_frame.setdefault(region.frame, []):
            if _overlap(region.box, other.box):
                count += 1
                first = first or (region, other)
        by_frame[region.frame].append(region)
    if first:
        warn(
            f"{path}:{first[0].line}: overlaps the region of line {first[1].line} ({count} such "
            "pairs): their union is ignored"
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def choose_val(clips: Sequence[Clip], share: float = VAL_SHARE) -> tuple[str, ...]:
    """Training sequences for validation: every condition once, then up to a share of the frames.

    For each attribute in turn that no chosen sequence has yet, the shortest training sequence that
    has it, if another one stays for training; then those of the fewest frames, until `share` of
    them is reached. Always the same for the same data.
    """
    pool = sorted(
        (c for c in clips if not c.is_test), key=lambda clip: (len(clip.frames), clip.name)
    )
    chosen: list[Clip] = []
    for attribute in ATTRIBUTES:
        having = [clip for clip in pool if attribute in (clip.attributes or ())]
        left = [clip for clip in having if clip not in chosen]
        if len(left) == len(having) >= 2:
            chosen.append(left[0])
    total = sum(len(clip.frames) for clip in pool)
    for clip in pool:
        if sum(len(c.frames) for c in chosen) >= share * total or len(chosen) + 1 >= len(pool):
            break
        if clip not in chosen:
            chosen.append(clip)
    return tuple(sorted(clip.name for clip in chosen))
