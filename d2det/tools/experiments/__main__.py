"""`python -m d2det.tools.experiments run | speed | report`."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from d2det.engine.arguments import argument_parser
from d2det.engine.setup import InputError

from .arguments import parse_arguments
from .calls import note_call
from .collect import collect_results, tasks_of
from .devices import find_slots
from .experiment import Experiment, from_configs, is_experiment, load_experiment
from .folders import claim, discover, recorded, runs_of
from .progress import Display
from .report import write_report
from .runner import Stopped, run_all, signals_raise
from .tables import markdown, results_table


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Returns:
        The exit status: 0; 1 where runs failed or the input is wrong; 128 + n after signal n.
    """
    args = parse_arguments(argv)
    command = "python -m d2det.tools.experiments " + shlex.join(
        sys.argv[1:] if argv is None else argv
    )
    try:
        return {"run": run, "speed": speed, "report": report}[args.command](args, command)
    except (ValueError, FileNotFoundError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(
            f"\nStopped by {stopped}; all processes have ended. The same command goes on from "
            "there.",
            file=sys.stderr,
        )
        return 128 + stopped.number
    except KeyboardInterrupt:  # outside the runs: nothing to end
        return 130


def run(args: Namespace, command: str) -> int:
    """Run what is not done, and report on all that is."""
    asked = _experiment(args)
    assert asked is not None
    per_run = argument_parser().parse_args(list(asked.train_args)).num_gpus
    slots = find_slots(args.jobs, args.gpus, per_run)
    claim(asked, args.output)
    on_gpu = bool(slots[0].environment.get("CUDA_VISIBLE_DEVICES"))
    note_call(args.output, command, "cuda" if on_gpu else "cpu")
    runs = runs_of(asked, args.output)
    try:
        problems = run_all(runs, asked.train_args, slots, Display())
    finally:  # also of what there is after Ctrl-C
        whole = recorded(args.output) or asked
        written = write_report(whole, args.output, args.pictures)
    if args.speed:
        _measure(whole, args.output, args)
        written = write_report(whole, args.output, args.pictures)
    _say_results(whole, args.output, written)
    for failed, message in problems.items():
        console = failed.folder / "console.txt"
        print(f"error: {failed.name}: {message} (all of it: {console})", file=sys.stderr)
    return 1 if problems else 0


def speed(args: Namespace, command: str) -> int:
    """Measure speed and memory of a folder's experiment, and report."""
    asked = _experiment(args)
    if asked is not None:
        claim(asked, args.output)
    experiment = recorded(args.output)
    if experiment is None:
        raise ValueError(
            f"{args.output} does not say what its configs are: give them, or an experiment file, "
            "after the folder"
        )
    _measure(experiment, args.output, args)
    if not args.memory_child:
        _say_results(experiment, args.output, write_report(experiment, args.output, args.pictures))
    return 0


def report(args: Namespace, command: str) -> int:
    """Report on what a folder holds."""
    if not args.output.is_dir():
        raise FileNotFoundError(f"folder {args.output} does not exist")
    experiment = _experiment(args) or recorded(args.output) or discover(args.output)
    written = write_report(experiment, args.output, args.pictures)
    _say_results(experiment, args.output, written)
    return 0


def _experiment(args: Namespace) -> Experiment | None:
    """What the command line lists; None where it lists nothing."""
    given: list[str] = args.configs
    files = [name for name in given if is_experiment(name)]
    if files and len(given) > 1:
        raise ValueError(f"{files[0]} is an experiment: give it alone, or configs")
    if not files:
        if not given:
            return None
        return from_configs(given, args.seeds or [1, 2, 3], args.train_args)
    experiment = load_experiment(files[0])
    seeds = tuple(args.seeds or experiment.seeds)
    train_args = (*experiment.train_args, *args.train_args)
    return Experiment(
        experiment.methods, seeds, train_args, experiment.title, experiment.description
    )


def _measure(experiment: Experiment, output: Path, args: Namespace) -> None:
    from .speed import measure
    from .subjects import available_precisions

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = available_precisions(args.device)
    args.precisions = args.precisions or known
    unfit = [name for name in args.precisions if name not in known]
    if unfit:
        raise ValueError(f"--precisions {' '.join(unfit)}: {args.device} has {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    with signals_raise():
        measure(experiment, runs_of(experiment, output), output, args)


def _say_results(experiment: Experiment, output: Path, written: Sequence[Path]) -> None:
    collected = collect_results(runs_of(experiment, output))
    for task in tasks_of(collected):
        print(markdown(results_table(experiment, collected, task)) + "\n")
    print("Written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    sys.exit(main())
