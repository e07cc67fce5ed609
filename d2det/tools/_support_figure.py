"""Drawing what nodes see: one column a view of a model, one row a kind of view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TITLES = ("sampling locations", "receptive field", "saliency region")
_MARK = "#00e5ff"


class View(NamedTuple):
    """What one node of one model sees; pixels are those of `image`.

    Attributes:
        name: of the model.
        image: (H, W, 3) uint8, RGB, as the network gets it.
        center: x, y of the node.
        box: of a RoI node; None for a feature map's.
        locations: (P, 2) sampling locations, most important last.
        weights: (P,) their contributions, at most 1.
        bins: (B, 2) RoI bins.
        bin_weights: (B,) theirs.
        field: (H, W) effective receptive field.
        region: (H, W) bool, the saliency region; None where it was not asked for.
        error: the region's 1 - cos.
    """

    name: str
    image: np.ndarray
    center: tuple[float, float]
    box: tuple[float, float, float, float] | None
    locations: np.ndarray
    weights: np.ndarray
    bins: np.ndarray
    bin_weights: np.ndarray
    field: np.ndarray
    region: np.ndarray | None
    error: float


def draw_views(views: Sequence[View], path: Path, title: str = "") -> None:
    """Write the picture in the format that the path's ending names (png, svg, pdf, ...)."""
    rows = 3 if any(view.region is not None for view in views) else 2
    height, width = views[0].image.shape[:2]
    column = 4.2
    row = column * height / width
    figure = Figure(figsize=(column * len(views), row * rows + 0.5), layout="compressed")
    axes = figure.subplots(rows, len(views), squeeze=False)
    for j, view in enumerate(views):
        for i, draw in enumerate((_locations, _field, _region)[:rows]):
            axis = axes[i][j]
            draw(axis, view)
            _node(axis, view)
            axis.set_xlim(-0.5, view.image.shape[1] - 0.5)
            axis.set_ylim(view.image.shape[0] - 0.5, -0.5)
            axis.set_xticks([])
            axis.set_yticks([])
            if j == 0:
                axis.set_ylabel(TITLES[i])
        axes[0][j].set_title(view.name)
    if title:
        figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


def _locations(axis: Any, view: View) -> None:
    axis.imshow(_faded(view.image))
    area = max(2.0, 5e4 / view.image.shape[1] ** 1.2)
    # Square root: the few strongest would outshine all others.
    for points, weights, marker, scale in (
        (view.locations, view.weights, "o", 1.0),
        (view.bins, view.bin_weights, "s", 2.0),
    ):
        shade = np.sqrt(weights)
        axis.scatter(
            *points.T, c=shade, s=scale * area * (0.3 + 0.7 * shade), marker=marker,
            cmap="plasma", vmin=0, vmax=1, linewidths=0.4 if marker == "s" else 0,
            edgecolors="white" if marker == "s" else "none",
        )  # fmt: skip


def _field(axis: Any, view: View) -> None:
    # Against the strongest pixels but for a few: single ones would darken the rest.
    shade = np.sqrt(np.clip(view.field / max(np.quantile(view.field, 0.999), 1e-30), 0, 1))
    axis.imshow(_faded(view.image))
    axis.imshow(shade, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(2.5 * shade, 0, 0.9))


def _region(axis: Any, view: View) -> None:
    if view.region is None:
        axis.set_visible(False)
        return
    axis.imshow(np.where(view.region[:, :, None], view.image, view.image // 6))
    axis.contour(view.region, levels=[0.5], colors="white", linewidths=0.8)
    share = 100 * view.region.mean()
    axis.set_xlabel(f"{share:.1f} % of the image, error {view.error:.3f}", fontsize="small")


def _node(axis: Any, view: View) -> None:
    if view.box is None:
        axis.plot(*view.center, marker="+", color=_MARK, markersize=11, markeredgewidth=2)
        return
    x1, y1, x2, y2 = view.box
    axis.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_MARK, linewidth=1.5)
    )


def _faded(image: np.ndarray) -> np.ndarray:
    """A dark grey version on which colours stand out."""
    grey = image.mean(axis=2, keepdims=True) * 0.55
    return np.repeat(grey.astype(np.uint8), 3, axis=2)
