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
_PANEL = 3.4  # inches


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
        columns: names of the result files.
        title: over all panels.
        stem: path without the extension.

    Returns:
        The files.
    """
    size = (_PANEL * len(columns) + 0.4, _PANEL * len(rows) + 0.5)
    # Text as text: the SVG is smaller and can be searched. A fixed salt: the same file every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2det"}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                _draw_panel(grid[r, c], panels[r][c])
                name = f"{column}: {row}" if len(columns) > 1 else row
                grid[r, c].set_title(name, fontsize=10)
                if c == 0:
                    grid[r, c].set_ylabel("precision")
                if r == len(rows) - 1:
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
    for handle in handles:
        handle.set_edgecolor("black")
        handle.set_linewidth(0.0)
    legend = axes.legend(handles=handles, loc="lower left", fontsize=8, framealpha=0.9)
    for patch in legend.get_patches():
        patch.set_edgecolor("black")
        patch.set_linewidth(0.6)
