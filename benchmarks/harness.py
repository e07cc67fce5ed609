"""What all bench_*.py share: contestants timed in turn, peak memory, one markdown table.

Each command makes cases (`Case`), each with several contestants (`Contestant`), the first of them
d2det's. README.md says how the figures come about.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import heading
from table import Row, table
from torch import Tensor

import d2det
from d2det.ops._library import implementation
from d2det.tools.measuring import memory, timing

FORWARD, BOTH = "forward", "forward + backward"


@dataclass
class Contestant:
    """One way to do a case's work.

    Args:
        name: as it appears in the table.
        call: does the work once, with the case's tensors.
        inputs: what to differentiate with respect to; none: there is no backward pass.
        missing: why there is nothing to call.
        family: of contestants of one family only the fastest gets a row, e.g. over memory formats.
    """

    name: str
    call: Callable[[], Any] | None = None
    inputs: Sequence[Tensor] = ()
    missing: str = ""
    family: str = ""
    _grad: Tensor | None = field(default=None, repr=False)

    def runner(self, phase: str) -> Callable[[], Any]:
        """A call of the given pass, which returns all results that it leaves behind."""
        return self._forward if phase == FORWARD else self._both

    def _forward(self) -> Any:
        assert self.call is not None
        with torch.no_grad():
            return self.call()

    def _both(self) -> tuple[Any, ...]:
        assert self.call is not None
        output = self.call()
        if self._grad is None:
            self._grad = torch.randn_like(output)
        return (output, *torch.autograd.grad(output, self.inputs, self._grad))


@dataclass
class Case:
    """One size and precision.

    Args:
        labels: the row's first cells.
        contestants: makes tensors and contestants, d2det's first.
        buffer: bytes that the peaks are given as a share of; 0: none.
        setting: entered around all that is run.
    """

    labels: tuple[str, ...]
    contestants: Callable[[], list[Contestant]]
    buffer: int = 0
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext


def ours(operator: str, device: str) -> str:
    """ "d2det" and what runs its operator on a device: compiled kernels or the reference."""
    kind = torch.device(device).type
    forward = implementation(operator, kind)
    backward = implementation(f"{operator}_backward", kind) if operator != "soft_nms" else forward
    if forward != backward:
        return f"d2det ({forward} forward, {backward} backward)"
    return f"d2det ({forward})"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every command has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--seconds", type=float, help="time for each figure (1; quick: 0.02)")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--output", metavar="FILE", help="write the table there too")
    result.add_argument("--no-memory", action="store_true", help="measure times only")
    result.add_argument(
        "--without", nargs="+", default=[], metavar="NAME",
        help="leave out the contestants whose names begin so",
    )  # fmt: skip
    result.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    return result


def run(
    title: str, columns: Sequence[str], cases: Sequence[Case], args: argparse.Namespace
) -> None:
    """Measure all cases and print the table.

    Args:
        title: the question in a few words.
        columns: headers of the cases' labels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # cuDNN's fastest algorithm, for whoever uses cuDNN
    if args.memory_child:
        _memory_child(cases, args)
        return
    known = {} if args.no_memory else _memory_of_child(args.device)
    rows, text = [], ""
    for index, case in enumerate(cases):
        print(f"{index + 1}/{len(cases)}", *case.labels, file=sys.stderr, flush=True)
        rows += measure(case, args)
        for row in rows:
            row.peak = known.get("|".join((*row.labels, row.phase, row.name)), row.peak)
        text = f"{heading(title, args.device)}\n\n{table(columns, rows)}\n"
        if args.output:  # after each case, so that an interruption costs one
            Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(text, encoding="utf-8")
    print(text)


def measure(case: Case, args: argparse.Namespace) -> list[Row]:
    """Rows of one case: times in both passes and, on a GPU, memory and host synchronisations."""
    rows: list[Row] = []
    cuda = args.device.startswith("cuda")
    seconds = args.seconds or (0.02 if args.quick else 1.0)
    with case.setting():
        contestants = case.contestants()
        for phase in phases(contestants):
            runners, found = {}, {}
            for c in contestants:
                row = Row(case.labels, phase, c.name, note=_absence(c, args), buffer=case.buffer)
                found[c.name] = row
                if not row.note:
                    runners[c.name] = c.runner(phase)
            for name, outcome in timing.alternate(runners, seconds, args.device).items():
                row = found[name]
                row.times, row.note = outcome.times, outcome.error
                if cuda and not row.note:
                    _look_at_gpu(row, runners[name], args)
            rows += _fastest(contestants, found)
    return rows


def _look_at_gpu(row: Row, call: Callable[[], Any], args: argparse.Namespace) -> None:
    try:
        row.syncs = timing.host_syncs(call)
        row.peak = None if args.no_memory else memory.peak(call, args.device)
    except Exception as error:  # the time stands
        print(f"{row.name}: {error}", file=sys.stderr)


def phases(contestants: Sequence[Contestant]) -> list[str]:
    return [FORWARD, BOTH] if any(c.inputs for c in contestants) else [FORWARD]


def _absence(contestant: Contestant, args: argparse.Namespace) -> str:
    if any(contestant.name.startswith(name) for name in args.without):
        return "left out"
    return contestant.missing


def _fastest(contestants: Sequence[Contestant], rows: dict[str, Row]) -> Iterator[Row]:
    """One row of each family: its fastest, or its first where none ran."""
    best: dict[str, Row] = {}
    for c in contestants:
        row, key = rows[c.name], c.family or c.name
        if key not in best or timing.median(row.times) < timing.median(best[key].times):
            best[key] = row
    return iter(best.values())


def _memory_child(cases: Sequence[Case], args: argparse.Namespace) -> None:
    """Print one JSON line, [key, bytes], for each contestant, pass and case."""
    memory.prepare_process()
    for case in cases:
        with case.setting():
            contestants = case.contestants()
            for contestant in contestants:
                if not _absence(contestant, args):
                    _print_peaks(case, contestant, phases(contestants), args.device)


def _print_peaks(case: Case, contestant: Contestant, wanted: list[str], device: str) -> None:
    for phase in wanted:
        runner = contestant.runner(phase)
        try:
            runner()
            found = memory.peak(runner, device)
        except Exception as error:  # its row says so: the measurement of times fails alike
            print(f"{contestant.name}: {error}", file=sys.stderr)
            continue
        print(json.dumps(["|".join((*case.labels, phase, contestant.name)), found]), flush=True)


def _memory_of_child(device: str) -> dict[str, int]:
    """Peaks on CPU, from a process of their own; on a GPU they are measured beside the times."""
    if device.startswith("cuda") or memory.unavailable(device):
        return {}
    print("peak memory, in a process of its own", file=sys.stderr, flush=True)
    # The child imports the d2det that is imported here.
    path = [str(Path(d2det.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-child"],
        env={**os.environ, **memory.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"it ended with {done.returncode}: some peaks are missing", file=sys.stderr)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def missing(module: str) -> str:
    """ "not installed", why a module fails to import, or nothing where it can be used."""
    return _missing(module)


@functools.cache
def _missing(module: str) -> str:
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return "not installed"
        return f"not measured: {error}"
    except Exception as error:
        return f"not measured: {module} does not import ({timing.brief(error)})"
    return ""
