"""Drawing labelled boxes and masks on an image."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from .labels import font_of, label_size, write_labels

_MASK_OPACITY = 0.4
_GOLDEN_RATIO = 0.618034  # steps of this share of the colour circle never come close to each other


@functools.cache
def class_color(index: int) -> tuple[int, int, int]:
    """The colour (BGR) of a class: the same in every picture, whatever the number of classes."""
    saturation, value = ((0.85, 0.95), (0.6, 1.0), (0.95, 0.75))[index // 2 % 3]
    rgb = colorsys.hsv_to_rgb((0.02 + index * _GOLDEN_RATIO) % 1.0, saturation, value)
    red, green, blue = (round(255 * channel) for channel in rgb)
    return blue, green, red


def enlarge(image: np.ndarray, min_side: int) -> tuple[np.ndarray, int]:
    """Enlarge a small image by a whole factor, so that labels on it can be read.

    Returns:
        The image, whose longer side is now at least `min_side`, and the factor (1: unchanged).
    """
    factor = -(-min_side // max(image.shape[:2]))
    if factor <= 1:
        return image, 1
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    labels: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Draw boxes with labels, and masks, on a copy of an image.

    Small objects are drawn over large ones. Labels are kept inside the image and, where there is
    room, apart from each other.

    Args:
        image: (H, W, 3) uint8, BGR.
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        classes: N class indices, for the colours.
        labels: N texts, in any alphabet that DejaVu Sans has; "" for none.
        masks: N arrays (H, W), nonzero inside; an empty one is left out.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    canvas = np.ascontiguousarray(image).copy()
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = [int(i) for i in np.argsort(-areas, kind="stable")]
    longest = max(canvas.shape[:2])
    thickness = max(1, round(longest / (320 if len(boxes) <= 40 else 640)))
    if masks is not None:
        for i in order:
            mask = (np.asarray(masks[i]) > 0).view(np.uint8)
            _blend(canvas, mask, class_color(int(classes[i])), thickness)
    for i in order:
        x1, y1, x2, y2 = (round(float(value)) for value in boxes[i])
        color = class_color(int(classes[i]))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, thickness)
    if not any(labels):
        return canvas
    colors = [class_color(int(classes[i])) for i in order]
    return write_labels(canvas, boxes[order], [labels[i] for i in order], colors, thickness)


def score_label(name: str, score: float, mask_score: float | None = None) -> str:
    """A detection's label: its class and class score, and its mask's score where there is one."""
    return f"{name} {score:.2f}" + ("" if mask_score is None else f" | {mask_score:.2f}")


def draw_label_map(image: np.ndarray, labels: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """Paint classes of pixels over a copy of an image, with each one's name on its largest part.

    Args:
        image: (H, W, 3) uint8, BGR.
        labels: (H, W) class of each pixel.
        names: of the classes that are painted; other pixels are left as they are.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    canvas = np.ascontiguousarray(image).copy()
    longest = max(canvas.shape[:2])
    thickness = max(1, round(longest / 320))
    present = [int(index) for index in np.unique(labels) if int(index) in names]
    for index in present:
        _blend(canvas, (labels == index).view(np.uint8), class_color(index), thickness)
    if not present:
        return canvas
    boxes = []
    for index in present:
        _, _, parts, centers = cv2.connectedComponentsWithStats((labels == index).astype(np.uint8))
        x, y = centers[1 + int(parts[1:, cv2.CC_STAT_AREA].argmax())]
        width, height = label_size(names[index], longest, len(present))
        # Labels stand above their boxes: here around the middle of the part.
        boxes.append([x - width / 2, y + height / 2, x + width / 2, y + height / 2])
    colors = [class_color(index) for index in present]
    return write_labels(canvas, np.array(boxes), [names[i] for i in present], colors, thickness)


def caption(image: np.ndarray, text: str) -> np.ndarray:
    """Add a white strip with a line of text above an image (BGR), cut off where it is too long."""
    width = image.shape[1]
    size = max(13, min(24, width // 34))
    strip = Image.new("RGB", (width, 2 * size), "white")
    font = font_of(size)
    pen = ImageDraw.Draw(strip)
    while len(text) > 1 and pen.textlength(text, font=font) > width - size:
        text = text[:-2].rstrip() + "…"
    pen.text((size // 2, size), text, fill=(30, 30, 30), font=font, anchor="lm")
    return np.concatenate([np.asarray(strip)[:, :, ::-1], image])


def beside(left: np.ndarray, right: np.ndarray, gap: int = 12) -> np.ndarray:
    """Two images of one height beside each other, on white."""
    space = np.full((left.shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([left, space, right], axis=1)


def contact_sheet(images: Sequence[np.ndarray], columns: int = 2, width: int = 960) -> np.ndarray:
    """All images on one sheet (BGR): `columns` beside each other, each scaled to `width`."""
    gap = 16
    columns = max(1, min(columns, len(images)))
    scaled = []
    for image in images:
        scale = width / image.shape[1]
        height = max(1, round(image.shape[0] * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        scaled.append(cv2.resize(image, (width, height), interpolation=method))
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    heights = [max(image.shape[0] for image in row) for row in rows]
    sheet_size = (sum(heights) + gap * (len(rows) + 1), columns * (width + gap) + gap, 3)
    sheet = np.full(sheet_size, 255, np.uint8)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            x = gap + column * (width + gap)
            sheet[top : top + image.shape[0], x : x + width] = image
        top += height + gap
    return sheet


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a JPEG, with an OSError where OpenCV's own writer would quietly write nothing."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 92]
    # Full colour resolution: thin coloured lines would fade otherwise.
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", image, options)
    if not done:
        raise OSError(f"{path} cannot be encoded")
    path.write_bytes(data.tobytes())


def _blend(canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], line: int) -> None:
    x, y, width, height = cv2.boundingRect(mask)
    if width == 0:
        return
    part, crop = canvas[y : y + height, x : x + width], mask[y : y + height, x : x + width]
    inside = part[crop > 0].astype(np.float32)
    mixed = (1 - _MASK_OPACITY) * inside + _MASK_OPACITY * np.asarray(color, np.float32)
    part[crop > 0] = mixed.round().astype(np.uint8)
    outlines, _ = cv2.findContours(crop, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(x, y))
    cv2.drawContours(canvas, outlines, -1, color, line, cv2.LINE_AA)
