"""Training curves from detectron2's `metrics.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from .results import CLASS_SCORE_TASK, MASK_GAIN_TASK

_METRICS = ("AP", "AP50", "AP75", "AP90")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of `metrics.json`, one for each iteration, in order.

    A resumed run repeats iterations: the later line wins, key by key. A line cut off by a crash
    is left out.
    """
    by_iteration: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            by_iteration.setdefault(int(entry["iteration"]), {}).update(entry)
        except (ValueError, KeyError, TypeError):
            continue
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def write_curves(output_dir: str | Path) -> Path | None:
    """Plot losses and AP over the iterations into `output_dir/curves.png`.

    Returns:
        The picture, or None where there is no `metrics.json` with anything to plot.
    """
    source = Path(output_dir) / "metrics.json"
    if not source.is_file():
        return None
    entries = read_metrics(source)
    losses = _series(entries, lambda key: key == "total_loss" or "loss_" in key)
    metrics = _series(entries, _is_plotted)
    panels = [panel for panel in ((losses, "loss"), (metrics, "AP in percent")) if panel[0]]
    if not panels:
        return None
    # The object interface: pyplot would pick a backend and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        for index, (series, label) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for name, (x, y) in series.items():
                total = name == "total_loss"
                axes.plot(
                    x,
                    y,
                    label=name,
                    linewidth=1.8 if total else 1.2,
                    color="black" if total else None,
                    marker="o" if len(x) < 25 else None,
                    markersize=3,
                )
            axes.set_xlabel("iteration")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
        target = Path(output_dir) / "curves.png"
        figure.savefig(target, dpi=110)
    return target


def _is_plotted(key: str) -> bool:
    """AP, AP50, ... of a task; of masks by class score AP alone, of their difference nothing."""
    rest, _, metric = key.rpartition("/")
    task = rest.rpartition("/")[2]
    if task == CLASS_SCORE_TASK:
        return metric == "AP"
    return metric in _METRICS and task != MASK_GAIN_TASK


def _series(
    entries: list[dict[str, Any]], wanted: Callable[[str], bool]
) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        for key, value in entry.items():
            if wanted(key) and isinstance(value, (int, float)) and math.isfinite(value):
                x, y = series.setdefault(key, ([], []))
                x.append(entry["iteration"])
                y.append(float(value))
    return dict(sorted(series.items(), key=lambda item: item[0] != "total_loss"))
