#!/usr/bin/env python3
"""How long does adaptive weighted pooling take, beside eager PyTorch and torch.compile?

RoIs of 14x14x256, pooled to 7x7. The logits are float32 beside bfloat16 features, as they come from
a normalisation layer under autocast.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Case, Contestant
from torch import Tensor

from d2det import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def eager(features: Tensor, logits: Tensor) -> Tensor:
    """The equation as it stands; float32 inside, also with bfloat16 features."""
    weights = (12 * logits.sigmoid()).exp()
    total = F.avg_pool2d(features * weights, 3, 2, 1)
    return (total / F.avg_pool2d(weights, 3, 2, 1)).to(features.dtype)


def contestants(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> list[Contestant]:
    features, logits = (
        torch.randn(shape, device=device).to(d, memory_format=LAYOUTS[layout]).requires_grad_()
        for d in (dtype, torch.float32)
    )
    torch.compiler.reset()  # each case is compiled for its own sizes
    compiled = torch.compile(eager, dynamic=False)
    leaves = [features, logits]
    return [
        Contestant(
            harness.ours("adaptive_weighted_pool", device),
            lambda: ops.adaptive_weighted_pool(features, logits),
            leaves,
        ),
        Contestant("eager PyTorch", lambda: eager(features, logits), leaves),
        Contestant("torch.compile", lambda: compiled(features, logits), leaves),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype in args.dtype:
        for count in [4] if args.quick else args.rois:
            for layout in args.layout:
                shape = (count, 8 if args.quick else 256, 14, 14)
                yield Case(
                    (dtype, " x ".join(map(str, shape)), layout),
                    partial(contestants, shape, DTYPES[dtype], layout, args.device),
                )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rois", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    args = parser.parse_args()
    harness.run(
        "Adaptive weighted pooling",
        ["features", "input", "layout"],
        list(cases(args)),
        args,
    )


if __name__ == "__main__":
    main()
