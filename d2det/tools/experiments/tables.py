"""The report's tables, as data: cells of text that HTML and Markdown are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from .collect import Collected, Task, metrics_of, values_of
from .experiment import Experiment, Method
from .folders import Run, State
from .summary import Summary, summarize, summarize_gain

NONE = "-"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what it says.
        detail: more, in small print.
        kind: "best", "failed", "missing" or "".
    """

    text: str
    detail: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: one line above it.
        headers: of the columns.
        rows: as many cells each.
        note: small print beneath it.
        labels: how many columns, from the left, are words.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    labels: int = 1


def markdown(table: Table) -> str:
    """GitHub's Markdown: the caption, the table, the note."""
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    align = ["left" if i < table.labels else "right" for i in range(len(table.headers))]
    body = tabulate(
        rows,
        [_escaped(header) for header in table.headers],
        tablefmt="github",
        disable_numparse=True,
        colalign=align,
    )
    return "\n\n".join(filter(None, [f"**{table.caption}**", body, table.note]))


def results_table(experiment: Experiment, collected: Collected, task: Task) -> Table:
    """Mean and spread of every metric, a row for each method; gains over the first method."""
    metrics = metrics_of(collected, task)
    first = experiment.methods[0]
    gain = metrics[0] if metrics and len(experiment.methods) > 1 else None
    summaries = {
        metric: {
            method.name: summarize(list(values_of(collected, method.name, task, metric).values()))
            for method in experiment.methods
        }
        for metric in metrics
    }
    rows = []
    for method in experiment.methods:
        done = sum(task.task in (r.get(task.dataset) or {}) for r in _runs(collected, method))
        row = [Cell(method.label), _count_cell(done, len(experiment.seeds))]
        for metric in metrics:
            column = summaries[metric]
            published = method.published.get(task.task, {}).get(metric)
            best = len(experiment.methods) > 1 and _is_highest(method.name, column)
            row.append(summary_cell(column[method.name], published, best=best))
        if gain:
            values, reference = (
                values_of(collected, name, task, gain) for name in (method.name, first.name)
            )
            found = summarize_gain(values, reference) if method is not first else None
            row.append(summary_cell(found, signed=True))
        rows.append(tuple(row))
    headers = ["method", "seeds", *metrics, *([f"{gain} over the first"] if gain else [])]
    note = (
        "In percent: mean ± sample standard deviation over the seeds (lowest to highest); bold: "
        "the highest mean."
    )
    if gain:
        note += f" The last column compares the {gain} of runs with the same seed."
    if any(m.published.get(task.task) for m in experiment.methods):
        note += " “Paper”: published figures, not measured here."
    return Table(f"{task.dataset}: {task.task}", tuple(headers), tuple(rows), note)


def class_table(experiment: Experiment, collected: Collected, task: Task) -> Table | None:
    """Mean AP of every class, a column for each method; None for fewer than two classes."""
    metrics = metrics_of(collected, task, classes=True)
    if len(metrics) < 2:
        return None
    rows = []
    for metric in metrics:
        column = {
            method.name: summarize(list(values_of(collected, method.name, task, metric).values()))
            for method in experiment.methods
        }
        several = len(experiment.methods) > 1
        cells = (
            summary_cell(found, best=several and _is_highest(name, column))
            for name, found in column.items()
        )
        rows.append((Cell(metric.partition("-")[2]), *cells))
    headers = ("class", *(method.label for method in experiment.methods))
    return Table(f"{task.dataset}: AP of each class ({task.task})", headers, tuple(rows))


def runs_table(
    experiment: Experiment,
    runs: Sequence[Run],
    states: Mapping[Run, State],
    took: Callable[[Run], float | None],
) -> Table:
    """How each run went: a row for each method, a column for each seed.

    Args:
        took: seconds an iteration; None where it is not known.
    """
    by_name = {(run.method.name, run.seed): run for run in runs}
    rows = []
    for method in experiment.methods:
        cells = [Cell(method.label)]
        for seed in experiment.seeds:
            run = by_name[method.name, seed]
            cells.append(_state_cell(states[run], took(run)))
        rows.append(tuple(cells))
    headers = ("method", *(f"seed {seed}" for seed in experiment.seeds))
    note = (
        "Seconds an iteration as the runs went, beside whatever else the machine did: for "
        "comparisons see “Speed and memory”."
    )
    return Table("Runs", headers, tuple(rows), note)


def summary_cell(
    found: Summary | None,
    published: float | None = None,
    *,
    best: bool = False,
    signed: bool = False,
) -> Cell:
    """Mean ± deviation, with the range, and what a paper says, as its detail."""
    details = []
    text = NONE
    if found is not None:
        form = "+.1f" if signed else ".1f"
        text = f"{found.mean:{form}}"
        if found.number > 1:
            text += f" ± {found.deviation:.1f}"
            details.append(f"{found.low:{form}} to {found.high:{form}}")
    if published is not None:
        details.append(f"paper {published:.1f}")
    return Cell(text, "; ".join(details), "best" if best else "")


def _runs(collected: Collected, method: Method) -> list[dict]:
    return list(collected.get(method.name, {}).values())


def _is_highest(name: str, column: Mapping[str, Summary | None]) -> bool:
    means = {key: found.mean for key, found in column.items() if found is not None}
    return name in means and math.isclose(means[name], max(means.values()), abs_tol=1e-9)


def _count_cell(done: int, wanted: int) -> Cell:
    if done == wanted:
        return Cell(str(done))
    return Cell(f"{done} of {wanted}", kind="missing")


def _state_cell(found: State, seconds: float | None) -> Cell:
    speed = "" if seconds is None else f"{seconds:.3g} s an iteration"
    if found.kind == "done":
        return Cell("done", speed)
    where = f"{found.iteration} of {found.max_iter} iterations" if found.max_iter else ""
    if found.kind == "missing":
        return Cell("missing", kind="missing")
    return Cell(found.kind, where, "failed" if found.kind == "failed" else "missing")


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    if cell.kind == "best":
        text = f"**{text}**"
    return f"{text} ({_escaped(cell.detail)})" if cell.detail else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
