"""Writing labels beside boxes, each readable whole and, where there is room, all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]  # BGR


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, in a size in pixels."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def write_labels(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[Color],
    thickness: int,
) -> np.ndarray:
    """Write each label at its box, where it hides the least of those written before.

    Args:
        image: (H, W, 3) uint8, BGR.
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        labels: N texts; "" for none.
        colors: N colours of the labels' ground.
        thickness: of the boxes' lines, in pixels.

    Returns:
        (H, W, 3) uint8, BGR; the argument is left as it is.
    """
    picture = Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    pen = ImageDraw.Draw(picture)
    font = font_of(_font_size(max(image.shape[:2]), len(boxes)))
    pad = max(1, int(font.size) // 6)
    height = sum(font.getmetrics())
    taken = np.zeros((0, 4))
    for box, text, (blue, green, red) in zip(boxes, labels, colors, strict=True):
        if not text:
            continue
        width = pen.textlength(text, font=font) + 2 * pad
        places = _places(box, width, height, thickness, image.shape[1], image.shape[0])
        hidden = [_overlap(place, taken) for place in places]
        place = places[int(np.argmin(hidden))]  # the first of the best
        taken = np.concatenate((taken, place[None]))
        pen.rectangle(tuple(place), fill=(red, green, blue))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        color = "black" if bright else "white"
        pen.text((place[0] + pad, place[1]), text, fill=color, font=font)
    return cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)


def _font_size(longest: int, count: int) -> int:
    share = 45 if count <= 15 else 60 if count <= 40 else 80
    return max(10, min(28, round(longest / share)))


def _places(
    box: np.ndarray, width: float, height: float, thickness: int, limit_x: int, limit_y: int
) -> np.ndarray:
    """Where a label may be (5, 4), inside the image: above, within, below its box."""
    x1, y1, x2, y2 = box
    left, right = x1 - thickness / 2, x2 - width + thickness / 2
    corners = [(left, y1 - height), (left, y1), (left, y2), (right, y1 - height), (right, y2)]
    if y1 < height:  # above would be pushed onto the box anyway
        corners[0], corners[1] = corners[1], corners[0]
    places = np.array([(x, y, x + width, y + height) for x, y in corners])
    spare = np.maximum(0.0, [limit_x - width, limit_y - height])
    start = np.clip(places[:, :2], 0.0, spare)
    return np.concatenate((start, np.add(start, (width, height))), axis=1)


def _overlap(place: np.ndarray, taken: np.ndarray) -> float:
    """Pixels of a label that lie on others."""
    sides = np.minimum(place[2:], taken[:, 2:]) - np.maximum(place[:2], taken[:, :2])
    return float(sides.clip(min=0).prod(axis=1).sum())
