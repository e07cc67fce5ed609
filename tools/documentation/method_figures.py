"""The figures of docs/method.md, drawn by the functions that the detector runs.

    python tools/documentation/method_figures.py

One object of a generated image, one proposal that misses a part of it. What a network would predict
is set by hand, since the figures show what is done with it; everything else comes from d2det.core
and d2det.ops. Sampling places are read off by pooling two maps that hold each pixel's coordinates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from d2det.core import (
    average_boxes,
    cell_centers,
    decode_offsets,
    encode_offsets,
    overlap_targets,
)
from d2det.data.generated import generate_image
from d2det.ops import adaptive_weighted_pool, deform_roi_pool

FOLDER = Path(__file__).resolve().parents[2] / "docs"
IMAGE = 22  # of the split "figures"
OBJECT = 3  # of the image
K = 7
GAMMA = 0.1
GREEN, ORANGE, BLUE = "#2ca02c", "#ff7f0e", "#1f77b4"


def scene() -> tuple[np.ndarray, Tensor, Tensor, np.ndarray]:
    """The image in RGB, an object's box, a proposal (1, 4) for it, and its mask."""
    bgr, annotations = generate_image(0, "figures", IMAGE, 320)
    x, y, width, height = annotations[OBJECT]["bbox"]
    truth = torch.tensor([[x, y, x + width, y + height]])
    # A quarter of its width too far right and an eighth too high, and a little too large.
    shift = torch.tensor([[0.25 * width, -0.12 * height, 0.3 * width, 0.05 * height]])
    mask = np.zeros(bgr.shape[:2], np.uint8)
    for polygon in annotations[OBJECT]["segmentation"]:
        cv2.fillPoly(mask, [np.array(polygon).reshape(-1, 2).round().astype(np.int32)], 1)
    return bgr[:, :, ::-1].copy(), truth, truth + shift, mask


def sample(maps: Tensor, proposal: Tensor, offsets: Tensor | None, size: int) -> Tensor:
    """Discriminative RoI pooling's sampling of maps (1, C, H, W): one point a bin."""
    rois = torch.cat((torch.zeros(1, 1), proposal), dim=1)
    level = torch.zeros(1, dtype=torch.int64)
    return deform_roi_pool(
        [maps],
        rois,
        level,
        offsets,
        output_size=size,
        spatial_scales=[1.0],
        sampling_ratio=1,
        gamma=GAMMA,
        convention="aligned",
    )


def draw_dense_regression(image: np.ndarray, truth: Tensor, proposal: Tensor) -> plt.Figure:
    """Targets of a proposal's cells, what they predict, and the average."""
    targets = encode_offsets(proposal, truth, K)
    overlap = overlap_targets(targets, 1 / 6)
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))
    # By hand: a good prediction where a cell sees the object, a poor one where it does not.
    predicted = (targets + noise * torch.where(overlap > 0, 0.06, 0.35)).relu()
    boxes = decode_offsets(proposal, predicted)
    votes = overlap[0, 0].bool()
    centers = cell_centers(proposal, K)[0].flatten(1).T
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9))
    for axis, title in zip(
        axes,
        (
            "the offsets of one cell",
            "cells that overlap the object",
            "the box of each cell",
            "the average of those that vote",
        ),
        strict=True,
    ):
        _show(axis, image, torch.cat((truth, proposal)), title)
    _box(axes[0], truth[0], GREEN)
    _grid(axes[0], proposal[0])
    cell = centers[2 * K + 2]
    left, top, right, bottom = truth[0]
    for end in ((left, cell[1]), (cell[0], top), (right, cell[1]), (cell[0], bottom)):
        axes[0].annotate(
            "",
            xy=[float(value) for value in end],
            xytext=cell.tolist(),
            arrowprops={"arrowstyle": "->", "color": "white", "lw": 2},
        )
    _box(axes[1], truth[0], GREEN)
    _grid(axes[1], proposal[0])
    side = (proposal[0, 2:] - proposal[0, :2]) / K
    for center in centers[votes.flatten()]:
        corner = (center - side / 2).tolist()
        axes[1].add_patch(Rectangle(corner, *side.tolist(), color=GREEN, alpha=0.45, lw=0))
    for vote, box in zip(votes.flatten(), boxes[0].flatten(1).T, strict=True):
        _box(axes[2], box, GREEN if vote else "white", lw=0.8, alpha=0.9 if vote else 0.45)
    average = average_boxes(boxes, (overlap - 0.5) * 20, 0.5)
    _box(axes[3], proposal[0], ORANGE, ls="--")
    _box(axes[3], average_boxes(boxes, None, 0.5)[0], "white")
    _box(axes[3], truth[0], GREEN, lw=3)
    _box(axes[3], average[0], BLUE)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def draw_pooling(
    image: np.ndarray, truth: Tensor, proposal: Tensor, mask: np.ndarray
) -> plt.Figure:
    """Where a proposal is sampled with and without offsets, and what the weights make of it."""
    height, width = mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack((x, y))[None]
    colours = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    inside = torch.from_numpy(mask)[None, None].float()
    # By hand: every cell's bins move a part of the way to the object's middle.
    size = (proposal[:, 2:] - proposal[:, :2])[:, :, None, None]
    middle = (truth[:, :2] + truth[:, 2:])[:, :, None, None] / 2
    offsets = 0.45 * (middle - cell_centers(proposal, K)) / size / GAMMA
    offsets = offsets.repeat_interleave(2, 2).repeat_interleave(2, 3)
    regular = sample(places, proposal, None, 2 * K)[0].flatten(1)
    moved = sample(places, proposal, offsets, 2 * K)[0].flatten(1)
    # By hand: a logit of 2 on the object, of -2 beside it.
    logits = 4 * sample(inside, proposal, offsets, 2 * K) - 2
    weights = torch.exp(12 * logits.sigmoid())
    aligned = adaptive_weighted_pool(
        sample(colours, proposal, None, 2 * K), torch.zeros(1, 3, 14, 14)
    )
    sampled = sample(colours, proposal, offsets, 2 * K)
    pooled = adaptive_weighted_pool(sampled, logits.expand(-1, 3, -1, -1))

    figure, axes = plt.subplots(1, 5, figsize=(15, 3.5))
    around = torch.cat((truth, proposal))
    for axis, points, title in (
        (axes[0], regular, "regular places, 2k a side"),
        (axes[1], moved, "moved by offsets"),
    ):
        _show(axis, image, around, title)
        _box(axis, proposal[0], ORANGE, ls="--")
        axis.scatter(*points, s=9, color="white", edgecolors="black", linewidths=0.5)
    _show(axes[2], image, around, "their weights")
    _box(axes[2], proposal[0], ORANGE, ls="--")
    share = (weights / weights.max()).flatten()
    axes[2].scatter(*moved, s=26 * share + 1, c=share, cmap="plasma", linewidths=0)
    for axis, values, title in (
        (axes[3], aligned, "pooled, regular and even"),
        (axes[4], pooled, "pooled, moved and weighted"),
    ):
        axis.imshow(values[0].permute(1, 2, 0).clamp(0, 255).byte().numpy())
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _show(axis: Any, image: np.ndarray, boxes: Tensor, title: str) -> None:
    low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
    edge = 0.12 * float((high - low).max())
    axis.imshow((image * 0.9).astype(np.uint8), extent=(0, image.shape[1], image.shape[0], 0))
    axis.set_xlim(max(0, float(low[0]) - edge), min(image.shape[1], float(high[0]) + edge))
    axis.set_ylim(min(image.shape[0], float(high[1]) + edge), max(0, float(low[1]) - edge))
    axis.set_title(title, fontsize=11)
    axis.axis("off")


def _box(axis: Any, box: Tensor, colour: str, lw: float = 2, **options: Any) -> None:
    x1, y1, x2, y2 = box.tolist()
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=lw, **options))


def _grid(axis: Any, box: Tensor) -> None:
    x1, y1, x2, y2 = box.tolist()
    for step in np.linspace(0, 1, K + 1):
        axis.plot([x1 + step * (x2 - x1)] * 2, [y1, y2], color=ORANGE, lw=0.7)
        axis.plot([x1, x2], [y1 + step * (y2 - y1)] * 2, color=ORANGE, lw=0.7)


def main(folder: Path = FOLDER) -> list[Path]:
    """Draw both figures into a folder; their paths."""
    image, truth, proposal, mask = scene()
    figures = {
        "method_dense_regression.jpg": draw_dense_regression(image, truth, proposal),
        "method_pooling.jpg": draw_pooling(image, truth, proposal, mask),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=75, pil_kwargs={"quality": 85})
        plt.close(figure)
    return [folder / name for name in figures]


if __name__ == "__main__":
    print(*main(), sep="\n")
