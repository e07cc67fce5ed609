"""What runs have written, read back: results, training curves, settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2det.evaluation.curves import read_metrics

from .folders import Run, read_results, run_config

_FIRST_METRICS = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")
_CLASS_PREFIX = "AP-"

# method -> seed -> data set -> task -> metric -> percent (None: undefined)
Collected = dict[str, dict[int, dict[str, dict[str, dict[str, float | None]]]]]
# method -> one series (iterations, values) for each run
Series = dict[str, list[tuple[list[float], list[float]]]]


class Task(NamedTuple):
    """What a table is about: a data set and a task ("bbox", "segm", ...)."""

    dataset: str
    task: str


def collect_results(runs: Iterable[Run]) -> Collected:
    """The results of all runs that are done, by the methods' names; methods without any too."""
    collected: Collected = {}
    for run in runs:
        of_method = collected.setdefault(run.method.name, {})
        results = read_results(run.folder)
        if results is not None:
            of_method[run.seed] = results
    return collected


def tasks_of(collected: Collected) -> list[Task]:
    """Every data set and task that any run was evaluated on, in the order of appearance."""
    found: dict[Task, None] = {}
    for by_seed in collected.values():
        for results in by_seed.values():
            for dataset, tasks in results.items():
                for task in tasks or {}:
                    found[Task(dataset, task)] = None
    return list(found)


def metrics_of(collected: Collected, task: Task, *, classes: bool = False) -> list[str]:
    """Names of a task's metrics, the well-known first; or those of single classes ("AP-...")."""
    found: dict[str, None] = {}
    for by_seed in collected.values():
        for results in by_seed.values():
            for metric in ((results.get(task.dataset) or {}).get(task.task)) or {}:
                if metric.startswith(_CLASS_PREFIX) == classes:
                    found[metric] = None
    first = [metric for metric in _FIRST_METRICS if metric in found]
    return first + [metric for metric in found if metric not in first]


def values_of(
    collected: Collected, method: str, task: Task, metric: str
) -> dict[int, float | None]:
    """A metric's value for each seed whose run has it."""
    values: dict[int, float | None] = {}
    for seed, results in collected.get(method, {}).items():
        metrics = (results.get(task.dataset) or {}).get(task.task) or {}
        if metric in metrics:
            values[seed] = metrics[metric]
    return values


def collect_curves(runs: Sequence[Run]) -> dict[str, Series]:
    """Series of "total_loss" and of every ".../AP", from the runs' `metrics.json`.

    Returns:
        By metric, then by method; metrics and methods without any value are left out.
    """
    curves: dict[str, Series] = {}
    for run in runs:
        file = run.folder / "metrics.json"
        if not file.is_file():
            continue
        found: dict[str, tuple[list[float], list[float]]] = {}
        for entry in read_metrics(file):
            for key, value in entry.items():
                if key != "total_loss" and key.rpartition("/")[1:] != ("/", "AP"):
                    continue
                if isinstance(value, (int, float)) and math.isfinite(value):
                    x, y = found.setdefault(key, ([], []))
                    x.append(entry["iteration"] + 1)  # iterations done
                    y.append(float(value))
        for key, series in found.items():
            curves.setdefault(key, {}).setdefault(run.method.name, []).append(series)
    return dict(sorted(curves.items(), key=lambda item: item[0] != "total_loss"))


def seconds_per_iteration(folder: Path) -> float | None:
    """Median over what a run wrote to `metrics.json`, each a median of 20 iterations."""
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    times = [e["time"] for e in read_metrics(file) if isinstance(e.get("time"), (int, float))]
    return statistics.median(times) if times else None


def settings(folder: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says of data and schedule, in words; {} where there is none."""
    config = run_config(folder)
    if not config:
        return {}
    solver, model, inputs = (config.get(name, {}) for name in ("SOLVER", "MODEL", "INPUT"))
    return {
        "training data": _listed(config.get("DATASETS", {}).get("TRAIN", ())),
        "test data": _listed(config.get("DATASETS", {}).get("TEST", ())),
        "iterations": solver.get("MAX_ITER"),
        "images an iteration": _batch(solver),
        "learning rate": solver.get("BASE_LR"),
        "reduced after": _listed(solver.get("STEPS", ())),
        "test size": f"{inputs.get('MIN_SIZE_TEST')} to {inputs.get('MAX_SIZE_TEST')} px",
        "half precision": (solver.get("AMP") or {}).get("ENABLED", False),
        "device": model.get("DEVICE"),
    }


def shared_settings(found: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Settings that all methods share, and the names of those in which they differ."""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    shared, differing = {}, []
    for name in names:
        values = [item.get(name) for item in found.values()]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        else:
            differing.append(name)
    return shared, differing


def _batch(solver: Mapping[str, Any]) -> int:
    return int(solver.get("IMS_PER_BATCH", 0)) * int(solver.get("ACCUMULATE", 1))


def _listed(values: Any) -> str:
    values = values if isinstance(values, (list, tuple)) else [values]
    return ", ".join(str(value) for value in values) or "none"
