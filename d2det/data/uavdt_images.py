"""Images of a converted data set: ignore regions painted black, all others linked."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

Region = tuple[float, float, float, float]


class Task(NamedTuple):
    """One image: where it is, where it goes, and what is painted (left, top, width, height)."""

    source: Path
    target: Path
    regions: tuple[Region, ...]


def write_images(tasks: Sequence[Task], workers: int) -> list[tuple[int, int]]:
    """Write or link all images, in parallel; what is there already is kept.

    An image gets its name when it is complete, so that an interrupted run can be repeated.

    Returns:
        (width, height) of each.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    # Threads are enough: Pillow releases the lock while it decodes and encodes.
    pool = ThreadPoolExecutor(max_workers=max(workers, 1))
    try:
        results = pool.map(write_image, tasks)
        return list(tqdm(results, total=len(tasks), desc="images", unit="image"))
    finally:  # after an error, those that wait are not begun
        pool.shutdown(cancel_futures=True)


def write_image(task: Task) -> tuple[int, int]:
    """Write one image unless it is there; returns (width, height)."""
    source, target, regions = task
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(
                f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial"
            )
            partial.unlink(missing_ok=True)
            if regions:
                _paint(source, partial, regions)
            else:
                _link(source, partial)
            os.replace(partial, target)
        with Image.open(target) as picture:
            return picture.size
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(
            f"{source} cannot be converted ({type(error).__name__}: {error})"
        ) from error


def _paint(source: Path, target: Path, regions: Sequence[Region]) -> None:
    with Image.open(source) as picture:
        kind = picture.format
        picture.load()
        draw = ImageDraw.Draw(picture)
        for left, top, width, height in regions:
            # Every pixel that a region touches; both ends belong to Pillow's rectangles.
            x1, y1 = max(int(left // 1), 0), max(int(top // 1), 0)
            x2 = min(int(-(-(left + width) // 1)), picture.width) - 1
            y2 = min(int(-(-(top + height) // 1)), picture.height) - 1
            if x2 >= x1 and y2 >= y1:
                draw.rectangle((x1, y1, x2, y2), fill=0)
        # The source's own quantisation: what is not painted changes by rounding only.
        options = {"quality": "keep"} if kind == "JPEG" else {}
        picture.save(target, format=kind, **options)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        os.symlink(source.resolve(), target)
