"""Speed and memory of an experiment's methods, by batch size and precision, in one process.

Methods take turns (`d2det.tools.measuring.timing`), so ratios between them hold whatever else the
machine does. What is measured goes into `speed.json` at once, and is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import d2det
from d2det.tools.measuring import machine, memory, timing

from .experiment import Experiment
from .folders import Run, settings_of, write_atomically
from .subjects import (
    INFERENCE,
    TRAINING,
    Subject,
    count_model,
    method_config,
    parameters_of,
    trained_weights,
)

FILE = "speed.json"


class Recorder:
    """`speed.json`: figures by method, phase, batch size and precision.

    Args:
        output: the experiment's folder.
        key: what the figures hold for; figures noted for anything else are dropped.
        about: more to write down.
    """

    def __init__(self, output: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        self._file = output / FILE
        self.dropped = False
        self.cells: dict[str, dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self._head = {**about, "key": key}
        earlier = read_speed(output)
        if earlier is not None:
            self.dropped = earlier["key"] != json.loads(json.dumps(key))
            if not self.dropped:
                self.cells, self.models = earlier["cells"], earlier["models"]

    def get(self, name: str, phase: str, batch: int, precision: str) -> dict[str, Any]:
        """A cell to fill in."""
        return self.cells.setdefault(cell_name(name, phase, batch, precision), {})

    def save(self) -> None:
        content = {**self._head, "models": self.models, "cells": self.cells}
        write_atomically(self._file, json.dumps(content, indent=1) + "\n")


def cell_name(method: str, phase: str, batch: int, precision: str) -> str:
    """The key of a figure in `speed.json`."""
    return "|".join((method, phase, str(batch), precision))


def read_speed(output: Path) -> dict[str, Any] | None:
    """The content of an experiment's `speed.json`; None where there is none."""
    file = output / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what detectron2 tells of models and data, for each of them."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@_quiet()
def measure(
    experiment: Experiment, runs: Sequence[Run], output: Path, args: argparse.Namespace
) -> None:
    """Measure what `speed.json` lacks.

    Args:
        args: the command line's `device`, `batch_sizes`, `precisions`, `seconds`, `no_training`,
            `no_memory` and `memory_child`.

    Raises:
        d2det.engine.setup.InputError: data or weights are missing.
    """
    phases = [INFERENCE] if args.no_training else [INFERENCE, TRAINING]
    groups = [
        (phase, batch, precision)
        for precision in args.precisions
        for batch in args.batch_sizes
        for phase in phases
    ]
    weights = {m.name: trained_weights(runs, m) for m in experiment.methods}
    recorder = _recorder(experiment, weights, output, args)
    if args.memory_child:  # a process of `_measure_memory_on_cpu`
        _print_peaks(experiment, weights, groups, recorder, args)
        return
    if recorder.dropped:
        print(
            f"{output / FILE} is of other settings, weights or another machine: measuring anew",
            file=sys.stderr,
        )
    _measure_memory_on_cpu(experiment, groups, recorder, output, args)
    missing = [
        group
        for group in groups
        if any("times" not in recorder.get(m.name, *group) for m in experiment.methods)
    ]
    if not missing and all(m.name in recorder.models for m in experiment.methods):
        return
    subjects = _load(experiment, weights, args, training=TRAINING in phases)
    for subject in tqdm(subjects, desc="parameters and FLOPs", unit="model"):
        if subject.name not in recorder.models:
            own = {"parameters": parameters_of(subject.model)}  # for a model it cannot count
            recorder.models[subject.name] = own | count_model(subject.cfg)
            recorder.save()
    for group in tqdm(missing, desc="times", unit="group"):
        _measure_group(subjects, group, recorder, args)
        recorder.save()


def _recorder(
    experiment: Experiment, weights: dict[str, str], output: Path, args: argparse.Namespace
) -> Recorder:
    key = {
        "methods": {m.name: settings_of(m, experiment.train_args) for m in experiment.methods},
        "weights": weights,
        "machine": machine.describe(args.device),
    }
    about = {
        "device": args.device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": machine.versions(),
        "seconds": args.seconds,
    }
    return Recorder(output, key, about)


def _load(
    experiment: Experiment, weights: dict[str, str], args: argparse.Namespace, *, training: bool
) -> list[Subject]:
    subjects = []
    for method in tqdm(experiment.methods, desc="loading", unit="model"):
        cfg = method_config(method, experiment.train_args, args.device)
        most = max(args.batch_sizes)
        subjects.append(Subject(method.name, cfg, weights[method.name], most, training=training))
    return subjects


def _measure_group(
    subjects: Sequence[Subject],
    group: tuple[str, int, str],
    recorder: Recorder,
    args: argparse.Namespace,
) -> None:
    before = {subject.name: subject.snapshot() for subject in subjects}
    calls = {subject.name: subject.call(*group) for subject in subjects}
    cuda = args.device.startswith("cuda")
    for name, outcome in timing.alternate(calls, args.seconds, args.device).items():
        cell = recorder.get(name, *group)
        cell["times"] = list(timing.quartiles(outcome.times)) if outcome.times else []
        cell["samples"], cell["note"] = len(outcome.times), outcome.error
        if cuda and not args.no_memory and outcome.times:
            cell["peak"] = memory.peak(calls[name], args.device)
    calls.clear()
    for subject in subjects:
        subject.model.zero_grad()
        subject.restore(before[subject.name])
    if cuda:  # after a group that ran out of memory, say
        torch.cuda.empty_cache()


def _measure_memory_on_cpu(
    experiment: Experiment,
    groups: Sequence[tuple[str, int, str]],
    recorder: Recorder,
    output: Path,
    args: argparse.Namespace,
) -> None:
    """Peaks, from a process of their own (`d2det.tools.measuring.memory` says why)."""
    if args.no_memory or args.device.startswith("cuda") or memory.unavailable(args.device):
        return
    wanted = sum(1 for _ in _without_peak(experiment, groups, recorder))
    if not wanted:
        return
    recorder.save()
    path = [str(Path(d2det.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [sys.executable, "-m", "d2det.tools.experiments", *_child_arguments(output, args)],
        env={**os.environ, **memory.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        with tqdm(total=wanted, desc="peak memory", unit="figure") as bar:
            for line in child.stdout:
                if line.startswith('["'):  # detectron2's log begins its lines with "[date"
                    name, peak = json.loads(line)
                    recorder.cells.setdefault(name, {})["peak"] = peak
                    recorder.save()
                    bar.update()
        if child.wait():
            print(f"some peaks are missing: it ended with {child.returncode}", file=sys.stderr)
    finally:
        child.kill()
        child.wait()


def _child_arguments(output: Path, args: argparse.Namespace) -> list[str]:
    sizes = [str(size) for size in args.batch_sizes]
    line = ["speed", str(output), "--memory-child", "--device", args.device]
    line += ["--batch-sizes", *sizes, "--precisions", *args.precisions]
    return line + ["--threads", str(torch.get_num_threads())] + ["--no-training"] * args.no_training


def _without_peak(
    experiment: Experiment, groups: Sequence[tuple[str, int, str]], recorder: Recorder
) -> Iterator[tuple[str, tuple[str, int, str]]]:
    for method in experiment.methods:
        for group in groups:
            if "peak" not in recorder.get(method.name, *group):
                yield method.name, group


def _print_peaks(
    experiment: Experiment,
    weights: dict[str, str],
    groups: Sequence[tuple[str, int, str]],
    recorder: Recorder,
    args: argparse.Namespace,
) -> None:
    """Print one JSON line, [cell, bytes], for each figure that is missing."""
    memory.prepare_process()
    wanted = list(_without_peak(experiment, groups, recorder))
    for method in experiment.methods:
        own = [group for name, group in wanted if name == method.name]
        if not own:
            continue
        cfg = method_config(method, experiment.train_args, args.device)
        training = any(phase == TRAINING for phase, *_ in own)
        most = max(batch for _, batch, _ in own)
        subject = Subject(method.name, cfg, weights[method.name], most, training=training)
        for group in sorted(own, key=lambda group: group[0]):  # inference first
            call, peak = subject.call(*group), None
            try:
                call()
                peak = memory.peak(call, args.device)
            except Exception as error:  # the times' note will say so too
                print(f"{method.name}: {timing.brief(error)}", file=sys.stderr)
            print(json.dumps([cell_name(method.name, *group), peak]), flush=True)
