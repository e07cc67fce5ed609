"""Parameters and FLOPs of classifiers: `python -m d2det.tools.count_classifiers MODEL ...`.

Counted as `d2det.tools.count` counts detectors, beside DCNv2's Table 6. No names: its rows.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch
from tabulate import tabulate

import d2det.classification
from d2det.tools.count import Count, count_operations


class Published(NamedTuple):
    """M parameters and GFLOPs."""

    parameters: float
    gflops: float


# DCNv2, Table 6.
PAPER = {
    "resnet50": Published(26.6, 4.1),
    "resnet50_dcnv2": Published(27.4, 4.3),
    "resnet101": Published(45.5, 7.8),
    "resnet101_dcnv2": Published(47.4, 8.2),
    "resnext101_32x4d": Published(45.1, 8.0),
    "resnext101_32x4d_dcnv2": Published(49.0, 8.7),
}


def count(name: str, size: int = 224) -> Count:
    """Count a classifier of 1000 classes that timm knows, on a square image of `size` pixels."""
    model = timm.create_model(name, num_classes=1000).eval()
    parameters = sum(p.numel() for p in model.parameters())
    return Count(parameters, *count_operations(model, torch.rand(1, 3, size, size)))


def table(names: Sequence[str], size: int = 224) -> str:
    """A Markdown table; a deformable model's row says what it adds to the plain one."""
    counts: dict[str, Count] = {}
    rows = []
    for name in names:
        plain = name.partition("_dcnv")[0]
        for needed in dict.fromkeys((plain, name)):
            if needed not in counts:
                counts[needed] = count(needed, size)
        found, base = counts[name], counts[plain]
        row = [name]
        for ours, theirs, unit, index in (
            (found.parameters, base.parameters, 1e6, 0),
            (found.products, base.products, 1e9, 1),
        ):
            published, before = PAPER.get(name), PAPER.get(plain)
            row += [f"{ours / unit:.2f}", f"{published[index]:.1f}" if published else ""]
            if name == plain:
                row += ["", ""]
            else:
                row.append(f"{(ours - theirs) / unit:+.2f}")
                known = published and before
                row.append(f"{published[index] - before[index]:+.1f}" if known else "")
        rows.append([*row, f"{found.sampling / 1e9:.2f}"])
    header = ["model", "M parameters", "paper", "added", "paper"]
    header += ["GFLOPs", "paper", "added", "paper", "sampling"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.count_classifiers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="*", default=list(PAPER), help="names that timm knows")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm has no model {unknown[0]}; deformable: {d2det.classification.MODELS}")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    print(table(args.models, args.size))


if __name__ == "__main__":
    main()
