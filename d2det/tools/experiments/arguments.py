"""The command line of `python -m d2det.tools.experiments`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  python -m d2det.tools.experiments run experiments/shapes.yaml --output output/shapes
  python -m d2det.tools.experiments run configs/shapes/faster_rcnn.yaml configs/shapes/d2det.yaml \\
      --seeds 1 2 3 --output output/mine --train-args --train-json A.json ... SOLVER.MAX_ITER 600
  python -m d2det.tools.experiments speed output/shapes --batch-sizes 1 2 4
  python -m d2det.tools.experiments report output/shapes
"""
_LISTED = "an experiment file, or configs: yaml files or names in configs/"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.experiments",
        description="Run configs with several seeds, measure their speed, report on all of it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train and evaluate what is not done yet, and write the report",
        description="Train and evaluate every method with every seed, skipping what is done and "
        "going on with what was interrupted, and write the report.",
    )  # fmt: skip
    run.add_argument("configs", nargs="+", metavar="EXPERIMENT|CONFIG", help=_LISTED)
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder")
    run.add_argument(
        "--jobs", type=int, metavar="N",
        help="runs at once; by default one for each GPU, or one on the CPU (they share the cores)",
    )  # fmt: skip
    run.add_argument(
        "--gpus", nargs="*", metavar="ID", help="GPUs to use; by default all; none given: the CPU"
    )
    run.add_argument("--speed", action="store_true", help="measure speed and memory afterwards")
    _add_speed(run)
    _add_shared(run)

    speed = commands.add_parser(
        "speed", help="measure speed and memory by batch size and precision",
        description="Measure training and inference of a folder's methods in turns, by batch size "
        "and precision, and count parameters and FLOPs. What is measured is not measured again.",
    )  # fmt: skip
    _add_folder(speed)
    _add_speed(speed)
    speed.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    _add_shared(speed)

    report = commands.add_parser(
        "report", help="write the report of what a folder holds",
        description="Write report.html and report.md of what a folder holds.",
    )  # fmt: skip
    _add_folder(report)
    _add_shared(report)

    parser.set_defaults(memory_child=False, speed=False)
    args = parser.parse_args(argv)
    if args.pictures < 0:
        parser.error(f"--pictures must not be negative, but is {args.pictures}")
    if min(getattr(args, "batch_sizes", [1])) < 1 or getattr(args, "seconds", 1) <= 0:
        parser.error("--batch-sizes and --seconds must be positive")
    return args


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="DIR", help="the experiment's folder")
    parser.add_argument(
        "configs", nargs="*", metavar="EXPERIMENT|CONFIG",
        help=f"{_LISTED}; by default what the folder has noted",
    )  # fmt: skip


def _add_speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N")
    group.add_argument(
        "--precisions", nargs="+", choices=["float32", "bfloat16", "float16"],
        help="by default all that the device has",
    )  # fmt: skip
    group.add_argument("--device", help="cuda or cpu; by default the GPU if there is one")
    group.add_argument(
        "--seconds", type=float, default=1.0, help="for each figure, at least (%(default)g)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    group.add_argument("--no-training", action="store_true", help="inference only")
    group.add_argument("--no-memory", action="store_true", help="times only")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="by default the experiment's, or 1 2 3"
    )
    parser.add_argument(
        "--pictures", type=int, default=6, metavar="N",
        help="example images in the report, for each test set (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--train-args", nargs=argparse.REMAINDER, default=[],
        help="all that follows goes to train_net.py: --train-json A.json ... KEY VALUE",
    )  # fmt: skip
