"""The report of an experiment: one HTML file that needs nothing else, and Markdown beside plots."""

from __future__ import annotations

import base64
import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from .calls import Call, read_calls
from .collect import (
    Collected,
    collect_curves,
    collect_results,
    metrics_of,
    seconds_per_iteration,
    settings,
    shared_settings,
    tasks_of,
)
from .experiment import Experiment
from .folders import Run, State, runs_of, state, write_atomically
from .pictures import Example, find_examples
from .plots import Plot, plot_curves, plot_tradeoff
from .speed import read_speed
from .speed_tables import model_table, speed_table, tradeoff_points
from .tables import NONE, Cell, Table, class_table, markdown, results_table, runs_table

HTML, MARKDOWN, FILES = "report.html", "report.md", "report_files"


@dataclass
class Report:
    """What a report shows, before it is HTML or Markdown."""

    title: str
    description: str
    date: str
    status: str
    facts: list[tuple[str, str]]
    calls: list[Call]
    results: list[Table] = field(default_factory=list)
    tradeoffs: list[Plot] = field(default_factory=list)
    curves: list[Plot] = field(default_factory=list)
    speed: list[Table] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    runs: list[Table] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    classes: list[Table] = field(default_factory=list)
    settings: list[Table] = field(default_factory=list)

    @property
    def plots(self) -> list[Plot]:
        return [*self.tradeoffs, *self.curves]


def write_report(experiment: Experiment, output: Path, pictures: int = 6) -> list[Path]:
    """Write `report.html`, and `report.md` with `report_files/`; returns both paths.

    Args:
        pictures: example images at most, for each test set.
    """
    report = make_report(experiment, output, pictures)
    folder = output / FILES
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.jpg")]:
        old.unlink()
    for plot in report.plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
    for number, example in enumerate(report.examples):
        for place, (_, data) in enumerate(example.views):
            (folder / picture_name(number, place)).write_bytes(data)
    write_atomically(output / HTML, _render("report.html.jinja", report, html=True))
    write_atomically(output / MARKDOWN, _render("report.md.jinja", report, html=False))
    return [output / HTML, output / MARKDOWN]


def make_report(experiment: Experiment, output: Path, pictures: int = 6) -> Report:
    """Collect all that the experiment's folder has."""
    runs = runs_of(experiment, output)
    states = {run: state(run.folder) for run in runs}
    collected = collect_results(runs)
    tasks = tasks_of(collected)
    speed = read_speed(output)
    calls = read_calls(output)
    report = Report(
        title=experiment.title or output.resolve().name,
        description=experiment.description,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        status=_status(states),
        facts=_facts(experiment, runs, calls),
        calls=calls,
        results=[results_table(experiment, collected, task) for task in tasks],
        examples=find_examples(runs, pictures),
        runs=[runs_table(experiment, runs, states, lambda run: seconds_per_iteration(run.folder))],
        failures=[
            (run.name, found.message, str(run.folder / "console.txt"))
            for run, found in states.items()
            if found.kind == "failed"
        ],
        settings=_settings_tables(experiment, runs),
    )
    report.classes = [
        t for task in tasks if (t := class_table(experiment, collected, task)) is not None
    ]
    for metric, series in collect_curves(runs).items():
        plot = plot_curves(metric, series, experiment.methods)
        report.curves += [plot] if plot else []
    if speed is not None:
        report.speed = [speed_table(experiment, speed), model_table(experiment, speed)]
        report.tradeoffs = _tradeoffs(experiment, speed, collected)
    return report


def picture_name(example: int, view: int) -> str:
    """The file of one view of an example, in `report_files/`."""
    return f"example_{example:02d}_{view}.jpg"


def _tradeoffs(experiment: Experiment, speed: dict[str, Any], collected: Collected) -> list[Plot]:
    plots = []
    for task in tasks_of(collected)[:1]:  # the boxes of the first test set
        metric = next(iter(metrics_of(collected, task)), None)
        if metric is not None:
            points, setting = tradeoff_points(experiment, speed, collected, task, metric)
            plot = plot_tradeoff(points, metric, setting)
            plots += [plot] if plot else []
    return plots


def _status(states: dict[Run, State]) -> str:
    kinds = [found.kind for found in states.values()]
    text = f"{kinds.count('done')} of {len(kinds)} runs done"
    others = [
        f"{n} {kind}"
        for kind in ("running", "failed", "unfinished", "missing")
        if (n := kinds.count(kind))
    ]
    return text + (f" ({', '.join(others)})" if others else "")


def _facts(
    experiment: Experiment, runs: Sequence[Run], calls: Sequence[Call]
) -> list[tuple[str, str]]:
    facts = [
        ("Methods", str(len(experiment.methods))),
        ("Seeds", ", ".join(map(str, experiment.seeds))),
    ]
    shared, _ = shared_settings(_settings(experiment, runs))
    facts += [(name.capitalize(), str(value)) for name, value in shared.items()]
    if experiment.train_args:
        facts.append(("Arguments of all runs", shlex.join(experiment.train_args)))
    machines = list(dict.fromkeys(call.machine for call in calls))
    versions = list(dict.fromkeys(call.versions for call in calls))
    facts.append(("Machine", "; ".join(machines) or "not recorded"))
    facts.append(("Versions", "; ".join(versions) or "not recorded"))
    return facts


def _settings(experiment: Experiment, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.method.name not in found and (values := settings(run.folder)):
            found[run.method.name] = values
    return found


def _settings_tables(experiment: Experiment, runs: Sequence[Run]) -> list[Table]:
    found = _settings(experiment, runs)
    _, differing = shared_settings(found)
    rows = []
    for method in experiment.methods:
        values = found.get(method.name, {})
        own = [Cell(str(values.get(name, NONE))) for name in differing]
        overrides = shlex.join(method.overrides) or NONE
        config = _short(method.config) or NONE
        rows.append((Cell(method.label), Cell(config), Cell(overrides), *own))
    headers = ("method", "config", "overrides", *differing)
    table = Table("Methods", headers, tuple(rows), labels=len(headers))
    return [table]


def _short(config: str) -> str:
    """A config's path from `configs/` on: where the project lies is nobody's business."""
    parts = Path(config).parts
    if "configs" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("configs") :])
    return parts[-1] if parts else ""


def _render(template: str, report: Report, *, html: bool) -> str:
    folder = files(__package__) / "templates"
    environment = Environment(autoescape=html, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = markdown
    environment.filters["data_uri"] = _data_uri
    environment.filters["breakable"] = _breakable
    environment.globals.update(files=FILES, picture_name=picture_name)
    style = (folder / "report.css").read_text(encoding="utf-8")
    text = (folder / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(report=report, style=Markup(style), Markup=Markup)


def _breakable(text: str) -> Markup:
    """Text that may be broken after an underscore, as configs' names have."""
    return Markup("_<wbr>").join(escape(part) for part in text.split("_"))


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
