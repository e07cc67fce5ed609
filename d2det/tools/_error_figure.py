"""The figure of an error analysis: precision-recall curves as stacked areas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2det.analysis.errors import RECALLS, SETTINGS

# White and grey for what is right, then a colour for each kind of error; apart in lightness too, so
# that they can be told in print and by the colour-blind.
COLORS = ("#ffffff", "#e4e4e4", "#4477aa", "#ee6677", "#bbcc33", "#aa3377", "#ffb000")
_PANEL, _LEGEND = 3.0, 0.9  # inches


def draw_errors(
    panels: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    stem: Path,
) -> list[Path]:
    """Draw curves as `<stem>.png` and `<stem>.svg`.

    Args:
        panels: for each row and column (7, 101) precision, NaN where there is no ground truth.
        rows: names of the size ranges.
        columns: names of the result files; with only one, the size ranges stand side by side.
        title: over all panels.
        stem: path without the extension.

    Returns:
        The files.
    """
    titles = [[f"{c}: {row}" if len(columns) > 1 else row for c in columns] for row in rows]
    if len(columns) == 1:
        panels, titles = [[row[0] for row in panels]], [[row[0] for row in titles]]
    height, width = len(panels), len(panels[0])
    size = ((_PANEL + _LEGEND) * width + 0.4, _PANEL * height + 0.7)
    # Text as text: the SVG is smaller and can be searched. A fixed salt: the same file every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2det"}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True)
        for r in range(height):
            for c in range(width):
                _draw_panel(grid[r, c], panels[r][c])
                grid[r, c].set_title(titles[r][c], fontsize=10)
                if c == 0:
                    grid[r, c].set_ylabel("precision")
                if r == height - 1:
                    grid[r, c].set_xlabel("recall")
        figure.suptitle(title, fontsize=11)
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
        for file in files:
            partial = file.with_name(f".{file.name}.partial")
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(partial, dpi=110, format=file.suffix[1:], metadata=metadata)
            partial.replace(file)
    return files


def _draw_panel(axes: Axes, curves: np.ndarray) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    if np.isnan(curves).any():
        axes.text(0.5, 0.5, "no ground truth", ha="center", va="center", color="0.4")
        return
    below = np.zeros_like(RECALLS)
    handles = []
    for name, color, curve in zip(SETTINGS, COLORS, curves, strict=True):
        label = f"[{100 * curve.mean():.1f}] {name}"
        handles.append(axes.fill_between(RECALLS, below, curve, color=color, lw=0, label=label))
        below = np.maximum(below, curve)
    for curve in curves[::-1]:
        axes.plot(RECALLS, curve, color="black", linewidth=0.6, clip_on=False)
    # Beside the panel, in the order of the areas from top to bottom: none of them is covered.
    legend = axes.legend(
        handles=handles[::-1],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=8,
        frameon=False,
    )
    for patch in legend.get_patches():
        patch.set_edgecolor("black")
        patch.set_linewidth(0.6)
