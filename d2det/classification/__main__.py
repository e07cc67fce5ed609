"""Runs one of timm's scripts with d2det's models: `python -m d2det.classification TRAIN.PY ...`.

timm's package holds no scripts; train.py and validate.py are in its repository. Everything after
the script's name goes to the script. In several processes: `torchrun --nproc_per_node 8 -m
d2det.classification ...`.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.optim
from torch import nn
from torch.optim import Optimizer

import d2det.classification  # noqa: F401  registers the models
from d2det.engine.optimizer import offset_groups


def create_optimizer(
    original: Callable[..., Optimizer], factor: float, model: nn.Module, *args: Any, **kwargs: Any
) -> Optimizer:
    """`timm.optim.create_optimizer_v2`, and a learning rate of their own for offset layers.

    Args:
        original: timm's function.
        factor: of their rate; timm's schedules multiply a group's rate by its `lr_scale`.
        model, args, kwargs: timm's.
    """
    optimizer = original(model, *args, **kwargs)
    if factor != 1:
        for group in offset_groups(optimizer, model):
            group["initial_lr"] = group["lr"]  # from which schedules start
            group["lr"] *= factor  # where there is no schedule
            group["lr_scale"] = group.get("lr_scale", 1.0) * factor
    return optimizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.classification", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--offset-lr-factor",
        type=float,
        default=0.1,
        metavar="FACTOR",
        help="of the offset layers' learning rate (default: %(default)s, DCNv2's)",
    )
    parser.add_argument("script", type=Path, help="of timm's repository: train.py, validate.py")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="the script's own, e.g. --model resnet50_dcnv2"
    )
    args = parser.parse_args(arguments)
    if args.offset_lr_factor < 0:
        parser.error("--offset-lr-factor must not be negative")
    if not args.script.is_file():
        parser.error(
            f"{args.script} is not there: give the path of train.py in a clone of timm's "
            f"repository (github.com/huggingface/pytorch-image-models), tag v{timm.__version__}"
        )
    timm.optim.create_optimizer_v2 = functools.partial(
        create_optimizer, timm.optim.create_optimizer_v2, args.offset_lr_factor
    )
    sys.argv = [str(args.script), *args.arguments]
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    main()
