"""Tables of results: printed, and written as JSON and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# data set -> task ("bbox", "segm", ...) -> metric -> percent (NaN: cannot be computed)
Results = dict[str, dict[str, dict[str, float]]]

CLASS_SCORE_TASK = "segm_class_score"  # masks ranked by class score, beside "segm" by mask score
MASK_GAIN_TASK = "mask_scoring_gain"  # what the mask score adds

_FIRST_METRICS = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")
_CLASS_PREFIX = "AP-"


def by_dataset(cfg: CfgNode, results: Mapping[str, Any] | None) -> Results:
    """Key results by data set, also where a trainer leaves out the name of a single one.

    Args:
        cfg: its DATASETS.TEST were evaluated.
        results: of detectron2's `DefaultTrainer.test`.
    """
    names = list(cfg.DATASETS.TEST)
    results = dict(results or {})
    if len(names) == 1:
        results = {names[0]: results}
    keyed: Results = {name: {} for name in names}
    for name, tasks in results.items():
        keyed[name] = {task: dict(metrics) for task, metrics in (tasks or {}).items()}
    return keyed


def summary_table(results: Results) -> str:
    """One row for each data set and task, in GitHub's Markdown; "-" where a metric is undefined."""
    found = {
        metric: None
        for tasks in results.values()
        for metrics in tasks.values()
        for metric in metrics
        if not metric.startswith(_CLASS_PREFIX)
    }
    columns = [metric for metric in _FIRST_METRICS if metric in found]
    columns += [metric for metric in found if metric not in columns]
    rows = []
    for name, tasks in results.items():
        for task, metrics in tasks.items():
            rows.append([name, task, *(_number(metrics.get(column)) for column in columns)])
        if not tasks:
            rows.append([name, "no ground truth", *("-" for _ in columns)])
    return _table(rows, ["data set", "task", *columns])


def class_table(results: Results) -> str:
    """AP of each class, one column for each task; "" where no task has more than one class."""
    parts = []
    for name, tasks in results.items():
        per_task = {
            task: {
                metric.removeprefix(_CLASS_PREFIX): value
                for metric, value in metrics.items()
                if metric.startswith(_CLASS_PREFIX)
            }
            for task, metrics in tasks.items()
        }
        per_task = {task: values for task, values in per_task.items() if values}
        classes = list(dict.fromkeys(c for values in per_task.values() for c in values))
        rows = [
            [_escape(c), *(_number(values.get(c)) for values in per_task.values())] for c in classes
        ]
        if rows:
            headers = [f"{name}: class", *(f"AP ({task})" for task in per_task)]
            parts.append(_table(rows, headers))
    return "\n\n".join(parts)


def notes(results: Results) -> str:
    """What the names of tasks mean that are not COCO's; "" where there are none."""
    tasks = {task.removesuffix("_TTA") for of_set in results.values() for task in of_set}
    lines = []
    if MASK_GAIN_TASK in tasks:
        lines.append(
            f"segm: masks ranked by mask score; {CLASS_SCORE_TASK}: the same masks ranked by class "
            f"score; {MASK_GAIN_TASK}: the difference."
        )
    if any(task.endswith("_TTA") for of_set in results.values() for task in of_set):
        lines.append("..._TTA: with test-time augmentation.")
    return " ".join(lines)


def write_results(results: Results, folder: str | Path) -> list[Path]:
    """Write `results.json` (undefined metrics as null) and `results.md`; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: {
            task: {metric: _finite(value) for metric, value in metrics.items()}
            for task, metrics in tasks.items()
        }
        for name, tasks in results.items()
    }
    json_path, markdown_path = folder / "results.json", folder / "results.md"
    json_path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = ["# Results", "In percent.", summary_table(results), notes(results)]
    text = "\n\n".join(part for part in (*parts, class_table(results)) if part)
    markdown_path.write_text(text + "\n", encoding="utf-8")
    return [json_path, markdown_path]


def _table(rows: list[list[str]], headers: list[str]) -> str:
    align = ["left" if i == 0 or headers[i] == "task" else "right" for i in range(len(headers))]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
