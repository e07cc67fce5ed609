"""An experiment's folder: where runs lie, what settings they have, how far they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from d2det.engine.arguments import argument_parser
from d2det.engine.configs import merge_overrides
from d2det.engine.setup import get_cfg

from .experiment import Experiment, Method, from_json, merge, to_json
from .lock import is_taken

OWN_KEYS = ("OUTPUT_DIR", "SEED")
_OWN_OPTIONS = {"config_file": "", "eval_only": False, "resume": "no"}
# What a machine decides: runs of several machines may lie in one folder.
_NOT_COMPARED = ("MODEL.DEVICE", "OUTPUT_DIR")


class Run(NamedTuple):
    """One method with one seed."""

    method: Method
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.method.name}, seed {self.seed}"


class State(NamedTuple):
    """How far a run is: "done", "running", "failed", "unfinished" or "missing".

    Attributes:
        iteration: iterations done, as far as they were written down.
        max_iter: iterations to do; 0 where nobody knows yet.
        message: why it failed.
    """

    kind: str
    iteration: int = 0
    max_iter: int = 0
    message: str = ""


def runs_of(experiment: Experiment, output: Path) -> list[Run]:
    """All runs, every method's first seed before any second one."""
    return [
        Run(method, seed, output / method.name / f"seed{seed}")
        for seed in experiment.seeds
        for method in experiment.methods
    ]


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, then rename: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def claim(experiment: Experiment, output: Path) -> None:
    """Check all methods' settings and note them in their folders and in `experiment.json`.

    Raises:
        ValueError: an unknown config key, an option that the tool sets itself, or a folder with
            runs of other settings; nothing is written then.
    """
    notes: dict[Path, str] = {}
    for method in experiment.methods:
        settings = settings_of(method, experiment.train_args)
        note = output / method.name / "settings.json"
        if note.is_file():
            changes = list(differences(json.loads(note.read_text()), settings))
            if changes:
                raise ValueError(
                    f"{note.parent} holds runs of other settings ({'; '.join(changes[:4])}"
                    f"{'; ...' * (len(changes) > 4)}): remove it, or choose another --output"
                )
        else:
            notes[note] = json.dumps(settings, indent=1)
    earlier = recorded(output)
    if earlier is not None and earlier.train_args != experiment.train_args:
        raise ValueError(
            f"{output} holds runs with other --train-args "
            f"({' '.join(earlier.train_args) or 'none'}): give the same, or choose another --output"
        )
    for note, text in notes.items():
        write_atomically(note, text)
    whole = merge(recorded(output), experiment)
    write_atomically(output / "experiment.json", json.dumps(to_json(whole), indent=1) + "\n")


def settings_of(method: Method, train_args: tuple[str, ...]) -> dict[str, Any]:
    """What decides a method's results, apart from the seed: its config and all arguments.

    Raises:
        ValueError: see `claim`.
    """
    given = [*train_args, *method.overrides]
    try:
        parsed = argument_parser().parse_args(given)
    except SystemExit as error:
        raise ValueError(f"{method.name}: train_net.py refuses {' '.join(given)}") from error
    taken = [key for key in parsed.opts[::2] if key in OWN_KEYS]
    taken += [
        f"--{name.replace('_', '-')}"
        for name, default in _OWN_OPTIONS.items()
        if getattr(parsed, name) != default
    ]
    if taken:
        raise ValueError(f"{method.name}: {', '.join(taken)} is set by this tool")
    cfg = get_cfg(method.config)
    settings = {"config": cfg.dump(), "train_args": given}
    merge_overrides(cfg, parsed.opts)  # its errors, before anything runs
    return settings


def differences(noted: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """In words, what sets two notes of `settings_of` apart.

    A key that d2det or detectron2 has got since then counts only if it is not at its default.
    """
    before, after = (dict(_flat(yaml.safe_load(s["config"]))) for s in (noted, now))
    default = dict(_flat(yaml.safe_load(get_cfg().dump())))
    for key in sorted({*before, *after} - set(_NOT_COMPARED)):
        known = before.get(key, default.get(key))
        if key not in after:
            yield f"{key} is no longer a key"
        elif known != after[key]:
            yield f"{key} {known!r} there, {after[key]!r} now"
    if list(noted["train_args"]) != list(now["train_args"]):
        words = (" ".join(s["train_args"]) or "none" for s in (noted, now))
        yield "--train-args {} there, {} now".format(*words)


def recorded(output: Path) -> Experiment | None:
    """The experiment that a folder holds, from `experiment.json`; None where there is none.

    Raises:
        ValueError: a damaged file.
    """
    file = output / "experiment.json"
    if not file.is_file():
        return None
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): remove it") from error


def discover(output: Path) -> Experiment:
    """The experiment that runs in a folder make up, where nothing is recorded: without configs.

    Raises:
        ValueError: the folder holds no runs.
    """
    methods, seeds = [], set()
    train_args: tuple[str, ...] = ()
    for folder in sorted(path for path in output.glob("*") if path.is_dir()):
        found = [re.fullmatch(r"seed(\d+)", path.name) for path in folder.glob("seed*")]
        if not any(found):
            continue
        seeds |= {int(match[1]) for match in found if match}
        note = folder / "settings.json"
        if note.is_file():
            train_args = tuple(json.loads(note.read_text()).get("train_args", ()))
        methods.append(Method(folder.name, folder.name, ""))
    if not methods:
        raise ValueError(f"{output} holds no runs (no METHOD/seedN folders)")
    return Experiment(tuple(methods), tuple(sorted(seeds)), train_args)


def state(folder: Path) -> State:
    """How far a run is, from what it has written."""
    if read_results(folder) is not None:
        return State("done")
    iteration, max_iter = last_iteration(folder), planned_iterations(folder)
    failure = folder / "failure.json"
    if failure.is_file():
        message = str(json.loads(failure.read_text())["message"])
        return State("failed", iteration, max_iter, message)
    if is_taken(folder):
        return State("running", iteration, max_iter)
    started = (folder / "console.txt").is_file() or (folder / "metrics.json").is_file()
    return State("unfinished" if started else "missing", iteration, max_iter)


def read_results(folder: Path) -> dict[str, Any] | None:
    """A run's `results.json`; None where there is none, or half of one."""
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def last_iteration(folder: Path) -> int:
    """Iterations done, from the last whole line of `metrics.json`."""
    return int(last_metrics(folder).get("iteration", -1)) + 1


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of `metrics.json` that names an iteration; {} where there is none."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    with file.open("rb") as stream:  # the end only: it is read every second
        stream.seek(max(0, file.stat().st_size - 16384))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
            int(found["iteration"])
        except (ValueError, KeyError, TypeError):
            continue
        return found
    return {}


def run_config(folder: Path) -> dict[str, Any]:
    """The config that a run used, as nested dicts; {} before it has written it."""
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def planned_iterations(folder: Path) -> int:
    """SOLVER.MAX_ITER of a run; 0 before it is known."""
    return int(run_config(folder).get("SOLVER", {}).get("MAX_ITER", 0))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
