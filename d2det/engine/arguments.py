"""The command line of `train_net.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .checkpoint import RESUME_CHOICES

_DESCRIPTION = "Train and evaluate D2Det, or any detectron2 detector."
_EXAMPLES = """\
examples:
  %(prog)s --config-file quickstart
  %(prog)s --config-file COCO-Detection/d2det_R_50_FPN_2x --num-gpus 8
  %(prog)s --config-file quickstart --train-json train.json --train-images train/ \\
      --val-json val.json --val-images val/ OUTPUT_DIR output/mine
  %(prog)s --config-file output/config.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
  on two machines, with the address of the first:
    %(prog)s --config-file ... --num-gpus 8 --num-machines 2 --machine-rank 0 \\
        --dist-url tcp://10.0.0.1:29500      (and --machine-rank 1 on the second)
"""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A bare --resume must not swallow the config key that may follow it, as argparse's
        # optional values do.
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args(_spell_out_resume(args), namespace)


def _spell_out_resume(args: Sequence[str]) -> list[str]:
    args = list(args)
    for position, arg in enumerate(args):
        if arg != "--resume":
            continue
        follows = args[position + 1] if position + 1 < len(args) else ""
        if follows in RESUME_CHOICES:
            args[position : position + 2] = [f"--resume={follows}"]
        else:
            args[position] = "--resume=must"
        break
    return args


def argument_parser() -> argparse.ArgumentParser:
    """Everything detectron2's launcher offers, and COCO-format data without writing code.

    `resume` is one of `RESUME_CHOICES`; `--resume` alone means "must".
    """
    parser = _Parser(
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a yaml file, or a name in configs/ such as quickstart",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS; do not train"
    )
    parser.add_argument(
        "--resume",
        choices=RESUME_CHOICES,
        default="no",
        help="--resume: go on from the last checkpoint in OUTPUT_DIR, an error if there is none; "
        "--resume=auto: go on if there is one, else start",
    )
    _add_data(parser.add_argument_group("your own data, in COCO format"))
    _add_processes(parser.add_argument_group("several processes"))
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys that override the file, after all options, e.g. SOLVER.BASE_LR 0.01",
    )
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train-json", metavar="JSON", help="annotations to train on")
    group.add_argument("--train-images", metavar="DIR", help="folder of their images")
    group.add_argument(
        "--val-json",
        "--test-json",
        metavar="JSON",
        help="annotations to evaluate on; without any, images are predicted and written out",
    )
    group.add_argument(
        "--val-images", "--test-images", metavar="DIR", help="folder of their images"
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs on each machine")
    group.add_argument(
        "--num-processes",
        type=int,
        default=0,
        metavar="N",
        help="run on the CPU, with N processes on each machine",
    )
    group.add_argument("--num-machines", type=int, default=1, metavar="N")
    group.add_argument(
        "--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0"
    )
    group.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the processes meet; needed with several machines, e.g. tcp://10.0.0.1:29500",
    )
