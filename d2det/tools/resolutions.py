"""AP against the resolution of the images (DCNv2, Figure 4), as a table and a plot.

Trains and evaluates every model at every shorter side; with --eval-only, evaluates trained models
at each. A run that is finished is skipped and an interrupted one goes on, so the command can be
repeated, with further resolutions too. Each run is a `train_net.py` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from d2det.engine.arguments import argument_parser
from d2det.engine.configs import find_config, merge_overrides
from d2det.engine.setup import get_cfg
from d2det.engine.trained import find_weights

EXAMPLES = """\
examples:
  python -m d2det.tools.resolutions --config-file configs/shapes/faster_rcnn.yaml \\
      configs/shapes/d2det.yaml --short-sides 96 128 160 --output output/resolutions
  python -m d2det.tools.resolutions --eval-only --weights output/mine \\
      --short-sides 400 600 800 1000 --train-args --val-json DATA/val.json --val-images DATA/val
"""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
OWN_KEYS = (
    "OUTPUT_DIR", "MODEL.WEIGHTS", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST",
)  # fmt: skip


class Model(NamedTuple):
    """A model to measure: its curve's name, its config, and weights ("" where it is trained)."""

    name: str
    config: str
    weights: str


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.resolutions",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", nargs="+", default=[], metavar="FILE", help="one for each model")
    add("--short-sides", "--short-edges", nargs="+", type=int, required=True, metavar="S",
        help="shorter sides in pixels; the limit of the longer side grows with them")  # fmt: skip
    add("--eval-only", action="store_true", help="train nothing: evaluate --weights")
    add("--weights", nargs="+", default=[], metavar="PATH",
        help="with --eval-only: checkpoints or output folders")  # fmt: skip
    add("--names", nargs="+", metavar="NAME", help="of the models; else of their files or folders")
    add("--output", type=Path, default=Path("output/resolutions"), metavar="DIR",
        help="%(default)s")  # fmt: skip
    add("--train-args", nargs=argparse.REMAINDER, default=[],
        help="all that follows goes to train_net.py: --val-json A.json ... KEY VALUE")  # fmt: skip
    args = parser.parse_args(argv)
    if args.eval_only != bool(args.weights):
        parser.error("--eval-only and --weights belong together")
    if not args.weights and not args.config_file:
        parser.error("--config-file is needed, or --eval-only with --weights")
    count = len(args.weights or args.config_file)
    for option in ("config_file", "names"):
        if getattr(args, option) and len(getattr(args, option)) != count:
            parser.error(f"--{option.replace('_', '-')}: one for each model is needed")
    if min(args.short_sides) < 1:
        parser.error("--short-sides must be positive")
    return args


def find_models(args: argparse.Namespace) -> list[Model]:
    """The models that the command line names.

    Raises:
        FileNotFoundError: a config or weights do not exist.
        ValueError: two models of one name.
    """
    models = []
    for i, given in enumerate(args.weights or args.config_file):
        weights = find_weights(given) if args.weights else ""
        if args.config_file:
            config = find_config(args.config_file[i])
        else:
            config = find_config(Path(weights).parent / "config.yaml")
        path = Path(given)
        own = path.name if path.is_dir() else path.parent.name if weights else path.stem
        models.append(Model(args.names[i] if args.names else own, str(config), weights))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models of one name, {names}: tell them apart by --names")
    return models


def size_overrides(cfg: CfgNode, short_side: int) -> list[str]:
    """Config overrides for a shorter side, the longer side's limit in the config's proportion."""
    sizes = cfg.INPUT
    train = round(short_side * sizes.MAX_SIZE_TRAIN / max(sizes.MIN_SIZE_TRAIN))
    test = round(short_side * sizes.MAX_SIZE_TEST / sizes.MIN_SIZE_TEST)
    return [
        "INPUT.MIN_SIZE_TRAIN", f"({short_side},)", "INPUT.MAX_SIZE_TRAIN", str(train),
        "INPUT.MIN_SIZE_TEST", str(short_side), "INPUT.MAX_SIZE_TEST", str(test),
    ]  # fmt: skip


def claim(model: Model, args: argparse.Namespace) -> CfgNode:
    """Note what a model's folder holds, and return its config with the overrides.

    Raises:
        ValueError: the folder holds runs of other settings, or an override is this tool's own.
    """
    opts = argument_parser().parse_args(["--config-file", model.config, *args.train_args]).opts
    taken = [key for key in opts[::2] if key in OWN_KEYS]
    if taken:
        raise ValueError(f"--train-args: {', '.join(taken)} is set by this tool")
    cfg = get_cfg(model.config)
    settings = {"config": cfg.dump(), "weights": model.weights, "train_args": args.train_args}
    merge_overrides(cfg, opts)
    folder = args.output / model.name
    note = folder / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != settings:
        raise ValueError(
            f"{folder} holds runs with another config, other weights or other --train-args: remove "
            "it, or choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=1))
    return cfg


def run(model: Model, cfg: CfgNode, short_side: int, args: argparse.Namespace) -> None:
    """Train and evaluate, or evaluate, at one resolution, unless that is done.

    Raises:
        subprocess.CalledProcessError: the run failed; its output is in console.txt.
    """
    folder = args.output / model.name / str(short_side)
    if (folder / "results.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "d2det.engine.main", "--config-file", model.config]
    command += ["--eval-only" if model.weights else "--resume=auto", *args.train_args]
    command += [*size_overrides(cfg, short_side), "OUTPUT_DIR", str(folder)]
    if model.weights:
        command += ["MODEL.WEIGHTS", model.weights]
    with (folder / "console.txt").open("a") as console:
        subprocess.run(command, check=True, stdout=console, stderr=subprocess.STDOUT)


def collect(models: Sequence[Model], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each finished run and test set: model, data set, shorter side, box metrics."""
    for model in models:
        for short_side in sorted(set(args.short_sides)):
            file = args.output / model.name / str(short_side) / "results.json"
            if not file.is_file():
                continue
            for dataset, results in json.loads(file.read_text()).items():
                metrics = {m: results.get("bbox", {}).get(m) for m in METRICS}
                yield {"model": model.name, "data": dataset, "short side": short_side, **metrics}


def write_table(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write resolutions.json and resolutions.md; returns the table."""
    (folder / "resolutions.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = [
        {k: "-" if v is None else f"{v:.1f}" if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    table = tabulate(
        shown, headers="keys", tablefmt="github", stralign="right", disable_numparse=True
    )
    (folder / "resolutions.md").write_text(table + "\n")
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """AP over the shorter side, one curve for each model and test set."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    several = len({row["data"] for row in rows}) > 1
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["AP"] is not None:
            name = f"{row['model']}, {row['data']}" if several else row["model"]
            curves.setdefault(name, []).append((row["short side"], row["AP"]))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(sorted({row["short side"] for row in rows}))
    axes.set_xlabel("shorter side in pixels")
    axes.set_ylabel("AP in percent")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet; print the table of all that is."""
    args = parse_arguments(argv)
    try:
        models = find_models(args)
        configs = [claim(model, args) for model in models]
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    runs = [
        (m, c, s)
        for s in sorted(set(args.short_sides))
        for m, c in zip(models, configs, strict=True)
    ]
    failed = []
    for model, cfg, short_side in tqdm(runs, unit="run"):
        try:
            run(model, cfg, short_side, args)
        except subprocess.CalledProcessError:
            failed.append(args.output / model.name / str(short_side) / "console.txt")
    rows = list(collect(models, args))
    if rows:
        print(write_table(rows, args.output))
        plot(rows, args.output / "resolutions.png")
        print(f"Written: {args.output / 'resolutions.md'}, resolutions.json, resolutions.png")
    for console in failed:
        last = console.read_text().strip().splitlines()[-1:]
        print(f"error: {''.join(last)} (all of it: {console})", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
