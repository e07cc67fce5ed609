"""Cutting a data set of large images: all images in parallel, then one JSON for the patches."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .cutting import Job, cut
from .parallel import in_parallel


class Summary(NamedTuple):
    """What was cut."""

    images: int
    done_before: int  # images that an earlier run had finished
    patches: int
    empty: int  # patches without an object
    objects: int  # in the whole images
    pieces: int  # annotations of the patches
    dropped: dict[str, int]  # objects and pieces, by reason

    def __str__(self) -> str:
        lines = [
            f"{self.images} images ({self.done_before} of them done before), {self.patches} "
            f"patches ({self.empty} without objects)",
            f"{self.objects} objects, {self.pieces} annotations of patches",
        ]
        lines += [f"dropped: {n} {why}" for why, n in sorted(self.dropped.items())]
        return "\n".join(lines)


def cut_dataset(
    jobs: Sequence[Job],
    categories: Sequence[dict[str, Any]],
    *,
    patches_json: Path,
    whole_json: Path,
    annotated: bool = True,
    workers: int = 1,
) -> Summary:
    """Cut all images and write the annotations of patches and of whole images.

    Images that an earlier run with the same input and options has finished are not cut again. The
    result does not depend on the number of workers.

    Args:
        jobs: one for each image, in the order of the JSON to write.
        categories: for both JSON files.
        patches_json: annotations of the patches; ids of images and annotations from 1. Each image
            says under "patch_of" which window of which image it shows.
        whole_json: annotations of the whole images, with the same categories.
        annotated: False leaves "annotations" out, as for a test set.
        workers: processes; 0 cuts in this one.

    Raises:
        ValueError, FileNotFoundError: see `cut`.
    """
    done = in_parallel(cut, jobs, total=len(jobs), workers=workers, what="cutting")
    before = sum(not cut_now for _, cut_now in done)
    parts = [job.part for job in jobs]
    _write_json(patches_json, categories, _patches(parts), annotated)
    _write_json(whole_json, categories, _wholes(parts), annotated)
    return _summary(parts, before)


def _patches(parts: Iterable[Path]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each patch's image entry, without an id, and its annotations."""
    for path in parts:
        part = json.loads(path.read_bytes())
        whole = {"image_id": part["image"]["id"], **_select(part["image"])}
        for patch in part["patches"]:
            x1, y1, x2, y2 = patch["window"]
            entry = {
                "file_name": next(iter(patch["files"])),
                "width": x2 - x1,
                "height": y2 - y1,
                "patch_of": {**whole, "window": patch["window"]},
            }
            yield entry, patch["annotations"]


def _wholes(parts: Iterable[Path]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each whole image's entry, with its own id, and its annotations."""
    for path in parts:
        part = json.loads(path.read_bytes())
        yield {"id": part["image"]["id"], **_select(part["image"])}, part["annotations"]


def _select(image: dict[str, Any]) -> dict[str, Any]:
    return {key: image[key] for key in ("file_name", "width", "height")}


def _write_json(
    path: Path,
    categories: Sequence[dict[str, Any]],
    content: Iterator[tuple[dict[str, Any], list[dict[str, Any]]]],
    annotated: bool,
) -> None:
    """Write a COCO JSON piece by piece: all annotations at once would fill gigabytes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    spilled = path.with_name(f"{path.name}.{os.getpid()}.annotations.partial")
    try:
        with partial.open("w+") as images, spilled.open("w+") as annotations:
            images.write('{"categories": ' + json.dumps(list(categories)) + ',\n"images": [')
            number = 0
            for position, (image, found) in enumerate(content, start=1):
                entry = {"id": position, **image}
                _append(images, position, entry)
                for annotation in found:
                    number += 1
                    own = {"id": number, "image_id": entry["id"], **annotation}
                    _append(annotations, number, own)
            images.write("\n]")
            if annotated:
                images.write(',\n"annotations": [')
                annotations.seek(0)
                while block := annotations.read(1 << 22):
                    images.write(block)
                images.write("\n]")
            images.write("}\n")
        partial.replace(path)
    finally:
        for file in (partial, spilled):
            file.unlink(missing_ok=True)


def _append(file: TextIO, position: int, entry: dict[str, Any]) -> None:
    file.write(("," if position > 1 else "") + "\n" + json.dumps(entry))


def _summary(parts: Sequence[Path], before: int) -> Summary:
    patches = empty = objects = pieces = 0
    dropped: Counter[str] = Counter()
    for path in parts:
        part = json.loads(path.read_bytes())
        counts = [len(patch["annotations"]) for patch in part["patches"]]
        patches += len(counts)
        empty += counts.count(0)
        pieces += sum(counts)
        objects += len(part["annotations"])
        dropped.update(part["dropped"])
    return Summary(len(parts), before, patches, empty, objects, pieces, dict(dropped))
