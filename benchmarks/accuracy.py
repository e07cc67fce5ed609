#!/usr/bin/env python3
"""Compare detectors by accuracy: every config with every seed, then one table of mean and spread.

Runs that are finished are skipped and interrupted ones go on, so the command can be repeated. Each
run is `train_net.py` in a process of its own; all share data, schedule and overrides.

    python benchmarks/accuracy.py configs/shapes/d2det.yaml configs/shapes/faster_rcnn.yaml \
        --seeds 1 2 3 --jobs 2 --output output/accuracy
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from machine import describe
from tabulate import tabulate
from tqdm import tqdm

from d2det import get_cfg

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"))
    parser.add_argument(
        "--train-args", nargs=argparse.REMAINDER, default=[],
        help="all that follows goes to train_net.py, e.g. --train-json A.json ... KEY VALUE",
    )  # fmt: skip
    return parser.parse_args()


def claim(config: str, args: argparse.Namespace) -> None:
    """Note what a method's folder holds; refuse one that holds runs of other settings."""
    folder = args.output / Path(config).stem
    settings = {"config": get_cfg(config).dump(), "train_args": args.train_args}
    note = folder / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != settings:
        sys.exit(
            f"error: {folder} holds runs with another config or other --train-args: remove it, or "
            "choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=1))


def run(config: str, seed: int, args: argparse.Namespace) -> Path:
    """Train and evaluate once, unless that is done; returns the results file."""
    folder = args.output / Path(config).stem / f"seed{seed}"
    results = folder / "results.json"
    if results.is_file():
        return results
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", config]
    command += ["--resume=auto", *args.train_args]
    command += ["OUTPUT_DIR", str(folder), "SEED", str(seed)]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with (folder / "console.txt").open("a") as console:
        subprocess.run(
            command,
            check=True,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    return results


def collect(configs: list[str], seeds: list[int], output: Path) -> str:
    """A row for each config and task, of the runs that are finished: mean (lowest to highest)."""
    tables = []
    for config in configs:
        files = [output / Path(config).stem / f"seed{s}" / "results.json" for s in seeds]
        # Of each run its one test set.
        tables.append(
            [next(iter(json.loads(f.read_text()).values())) for f in files if f.is_file()]
        )
    tasks = dict.fromkeys(task for runs in tables for results in runs for task in results)
    rows = []
    for task, (config, found) in product(tasks or ["bbox"], zip(configs, tables, strict=True)):
        runs = [results[task] for results in found if task in results]
        if not runs and task != "bbox":
            continue
        row = [Path(config).stem, task, len(runs)]
        for metric in METRICS:
            values = [r[metric] for r in runs if r.get(metric) is not None]
            row.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
                if values
                else "-"
            )
        rows.append(row)
    return tabulate(
        rows, ["method", "task", "seeds", *METRICS], tablefmt="github", stralign="right"
    )


def main() -> None:
    args = arguments()
    for config in args.configs:
        claim(config, args)
    runs = [(config, seed) for seed in args.seeds for config in args.configs]
    progress = tqdm(total=len(runs), unit="run", desc="training")
    failed = []

    def one(item: tuple[str, int]) -> None:
        try:
            run(*item, args)
        except subprocess.CalledProcessError as error:
            failed.append((item, error))
        progress.update()

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, runs))
    progress.close()
    table = collect(args.configs, args.seeds, args.output)
    table += (
        f"\n\nMean over the seeds (lowest to highest), {args.jobs} runs at a time. {describe()}.\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(table)
    print(table)
    for (config, seed), error in failed:
        print(
            f"error: {config}, seed {seed}, ended with {error.returncode}: see "
            f"{args.output / Path(config).stem / f'seed{seed}' / 'console.txt'}",
            file=sys.stderr,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
