"""UAVDT's sequences as the content of a COCO JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .uavdt_clips import Clip
from .uavdt_raw import CATEGORIES, Box


def coco_content(
    clips: Sequence[Clip],
    split: str,
    image_ids: dict[tuple[str, int], int],
    sizes: dict[tuple[str, int], tuple[int, int]],
    *,
    ignore_regions: str,
    three_classes: bool,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The content of one split's JSON.

    Args:
        clips: its sequences.
        split: its name.
        image_ids, sizes: id and (width, height) by sequence and frame.
        ignore_regions, three_classes: as in the options of the conversion.
        warn: receives one sentence if boxes are left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ignored: list[dict[str, Any]] = []
    names = dict(CATEGORIES) if three_classes else {1: "vehicle"}
    removes_hidden = ignore_regions == "black" and split in ("train", "trainval")
    hidden = 0
    for clip in clips:
        regions: dict[int, list[Box]] = {}
        for region in clip.regions:
            regions.setdefault(region.frame, []).append(region)
            place = image_ids[clip.name, region.frame]
            ignored.append({"image_id": place, "bbox": list(region.box)})
            if ignore_regions == "crowd":
                for category in names:
                    annotations.append(_annotation(annotations, place, category, region, crowd=1))
        for frame, source in clip.frames.items():
            width, height = sizes[clip.name, frame]
            images.append(
                {
                    "id": image_ids[clip.name, frame],
                    "file_name": f"{clip.name}/{source.name}",
                    "width": width,
                    "height": height,
                    "sequence": clip.name,
                    "frame": frame,
                }
            )
        for box in clip.boxes:
            # What is painted over cannot be learnt. Tests keep it, as the toolkit does.
            if removes_hidden and any(
                _inside(box.box, region.box) for region in regions.get(box.frame, ())
            ):
                hidden += 1
                continue
            category = box.rest[2] if three_classes else 1
            place = image_ids[clip.name, box.frame]
            annotations.append(_annotation(annotations, place, category, box, crowd=0))
    if hidden:
        warn(f"{split}: {hidden} boxes that lie wholly in an ignore region are left out")
    return {
        "info": {"description": f"UAVDT {split}", "ignore_regions": ignore_regions},
        "sequences": [{"name": clip.name, "attributes": clip.attributes or []} for clip in clips],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
        "images": images,
        "annotations": annotations,
        "ignore_regions": ignored,
    }


def _annotation(
    annotations: Sequence[Any], image_id: int, category: int, box: Box, crowd: int
) -> dict[str, Any]:
    annotation = {
        "id": len(annotations) + 1,
        "image_id": image_id,
        "category_id": category,
        "bbox": list(box.box),
        "area": box.box[2] * box.box[3],
        "iscrowd": crowd,
    }
    if not crowd:
        annotation["track"] = box.target
        annotation.update(zip(("out_of_view", "occlusion", "kind"), box.rest, strict=True))
    return annotation


def _inside(box: Sequence[float], region: Sequence[float]) -> bool:
    return all(
        box[i] >= region[i] and box[i] + box[i + 2] <= region[i] + region[i + 2] for i in (0, 1)
    )
