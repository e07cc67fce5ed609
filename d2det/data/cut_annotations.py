"""What is left of an image's objects inside a window, as COCO annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .columns import Columns, from_polygons, from_rle, to_rle
from .contours import outlines, pixel_contours
from .patches import Window

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """Which pieces of objects are kept, and how their masks are written.

    Attributes:
        min_area: pieces of fewer pixels are dropped (of boxes: of less area).
        min_visible: so are pieces of less than this share of the object.
        masks: "polygon" or "rle".
        pixel_contours: polygons, read and written, run through the border pixels (iSAID); else
            along the pixels' edges, as COCO rasterises them.
    """

    min_area: float = 1
    min_visible: float = 0.0
    masks: str = "polygon"
    pixel_contours: bool = False

    def __post_init__(self) -> None:
        if self.masks not in ("polygon", "rle"):
            raise ValueError(f'masks must be "polygon" or "rle", not {self.masks!r}')
        if self.min_area < 0 or not 0 <= self.min_visible <= 1:
            raise ValueError(
                f"min_area must be at least 0 and min_visible in [0, 1], not {self.min_area} and "
                f"{self.min_visible}"
            )


class Instance(NamedTuple):
    """An object of a whole image."""

    category_id: int
    iscrowd: int
    box: tuple[float, float, float, float]  # x1, y1, x2, y2, inside the image
    area: float  # as annotated
    columns: Columns | None  # None where objects have boxes only
    source_id: Any  # id of the annotation it comes from


def read_instances(
    annotations: Sequence[Annotation],
    height: int,
    width: int,
    rules: Rules,
    *,
    masks: bool,
    dropped: Counter[str],
) -> list[Instance]:
    """The objects of an image.

    Args:
        annotations: in COCO's format, with checked categories.
        height, width: of the image.
        rules: how polygons are read.
        masks: the data set has masks; objects without a valid one are dropped then.
        dropped: counts what is left out, by reason.

    Raises:
        ValueError: a box that is not four numbers, or a mask of another image size.
    """
    found = []
    for annotation in annotations:
        where = f"annotation {annotation['id']}"
        box = _clipped_box(annotation, height, width, where)
        columns = None
        if masks:
            columns = _columns(annotation.get("segmentation"), height, width, rules, where)
            if columns is None:
                dropped["without a valid mask"] += 1
                continue
        if box is None or (columns is not None and columns.area == 0):
            dropped["outside of their image"] += 1
            continue
        area = annotation.get("area")
        if area is None:
            area = columns.area if columns else (box[2] - box[0]) * (box[3] - box[1])
        crowd = int(bool(annotation.get("iscrowd")))
        found.append(
            Instance(annotation["category_id"], crowd, box, area, columns, annotation["id"])
        )
    return found


def cut_instances(
    instances: Iterable[Instance], window: Window, rules: Rules, dropped: Counter[str]
) -> list[Annotation]:
    """Annotations, without ids, of what a window shows.

    An object that lies wholly inside keeps its box and area; of a cut one they are the piece's.
    Beside COCO's keys: "source_id" and "visible", the share of the object that is inside.
    """
    pieces = []
    for instance in instances:
        piece = _cut_mask(instance, window) if instance.columns else _cut_box(instance, window)
        if piece is None:
            continue
        box, area, pixels, visible, columns = piece
        if pixels < rules.min_area:
            dropped["pieces that are too small"] += 1
            continue
        if visible < rules.min_visible:
            dropped["pieces that show too little of their object"] += 1
            continue
        annotation = {
            "category_id": instance.category_id,
            "bbox": box,
            "area": area,
            "iscrowd": instance.iscrowd,
            "visible": round(visible, 4),
            "source_id": instance.source_id,
        }
        if columns is not None:
            height, width = window.y2 - window.y1, window.x2 - window.x1
            mask = write_mask(columns, height, width, rules, crowd=instance.iscrowd)
            if not mask:
                dropped["pieces too thin for a polygon"] += 1
                continue
            annotation["segmentation"] = mask
        pieces.append(annotation)
    return pieces


def write_mask(
    columns: Columns, height: int, width: int, rules: Rules, *, crowd: int = 0
) -> list[list[int]] | dict[str, Any]:
    """A mask in the form that the rules ask for; crowd regions are RLE, as in COCO."""
    if rules.masks == "rle" or crowd:
        return to_rle(columns, height, width)
    return pixel_contours(columns) if rules.pixel_contours else outlines(columns)


def _cut_mask(instance: Instance, window: Window) -> tuple | None:
    assert instance.columns is not None
    x1, y1, x2, y2 = instance.columns.box()
    if x2 <= window.x1 or x1 >= window.x2 or y2 <= window.y1 or y1 >= window.y2:
        return None
    columns = instance.columns.crop(*window)
    if columns.area == 0:
        return None
    whole = instance.columns.area
    if columns.area == whole:
        return _shifted(instance, window), instance.area, whole, 1.0, columns
    x1, y1, x2, y2 = columns.box()
    box = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
    return box, columns.area, columns.area, columns.area / whole, columns


def _cut_box(instance: Instance, window: Window) -> tuple | None:
    x1, y1, x2, y2 = instance.box
    left, top = max(x1, window.x1), max(y1, window.y1)
    right, bottom = min(x2, window.x2), min(y2, window.y2)
    if right <= left or bottom <= top:
        return None
    whole, area = (x2 - x1) * (y2 - y1), (right - left) * (bottom - top)
    if (left, top, right, bottom) == instance.box:
        return _shifted(instance, window), instance.area, area, 1.0, None
    box = [left - window.x1, top - window.y1, right - left, bottom - top]
    return box, area, area, area / whole, None


def _shifted(instance: Instance, window: Window) -> list[float]:
    """The box x, y, width, height in the window; a box may reach beyond its mask."""
    x1, y1, x2, y2 = instance.box
    left, top = max(x1, window.x1), max(y1, window.y1)
    right, bottom = min(x2, window.x2), min(y2, window.y2)
    return [left - window.x1, top - window.y1, right - left, bottom - top]


def _clipped_box(
    annotation: Annotation, height: int, width: int, where: str
) -> tuple[float, float, float, float] | None:
    try:
        x, y, w, h = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where} has the 'bbox' {annotation.get('bbox')!r}; expected [x, y, width, height]"
        ) from None
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _columns(
    segmentation: Any, height: int, width: int, rules: Rules, where: str
) -> Columns | None:
    """The mask of an annotation; None where it has none that is valid."""
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(
                f"{where} has a mask of {segmentation.get('size')} pixels (height, width), its "
                f"image has {[height, width]}"
            )
        try:
            return from_rle(segmentation)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(segmentation, list):
        return None
    # COCO's tools take four numbers for a box; a traced pixel has two.
    least = 2 if rules.pixel_contours else 6
    polygons = [
        p for p in segmentation if isinstance(p, list) and len(p) >= least and len(p) % 2 == 0
    ]
    if not polygons:
        return None
    return from_polygons(polygons, height, width, pixel_contours=rules.pixel_contours)
