"""What a detector's average precision is lost to (D2Det, Figure 5), from COCO result files.

Writes precision-recall curves under ever more forgiving settings as PNG and SVG, and their areas
as Markdown and JSON: C75 and C50 (IoU thresholds), Loc (IoU 0.1), Sim and Oth (confusions with
similar classes, with any class, ignored), BG (no false positives), FN (nothing missed).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from d2det.analysis.coco_files import IOU_TYPES, CocoTruth, read_detections, read_ground_truth
from d2det.analysis.errors import AREAS, CONFUSIONS, SETTINGS, error_curves

from ._error_figure import draw_errors

EXAMPLES = """\
examples:
  python -m d2det.tools.error_analysis --gt DATA/val.json --output output/errors \\
      --results output/mine/inference/custom_val/coco_instances_results.json
  python -m d2det.tools.error_analysis --gt DATA/val.json --results A.json B.json \\
      --names "Faster R-CNN" D2Det --per-class --output output/errors
"""


class Analysis(NamedTuple):
    """One result file: its name, and (A, 7, K, 101) curves."""

    name: str
    curves: np.ndarray


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.error_analysis",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gt", type=Path, required=True, metavar="JSON", help="ground truth in COCO's format")
    add("--results", type=Path, nargs="+", required=True, metavar="JSON",
        help="detections in COCO's result format; two or more files side by side")  # fmt: skip
    add("--names", nargs="+", metavar="NAME", help="of the results; else of their files or folders")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--iou-type", choices=IOU_TYPES, default="bbox", help="boxes or masks; %(default)s")
    add("--areas", nargs="+", choices=list(AREAS), default=["all", "large"],
        help="size ranges; %(default)s")  # fmt: skip
    add("--per-class", action="store_true", help="a figure for each class beside that of the mean")
    add("--max-detections", type=int, default=100, metavar="N",
        help="best ones of each image and class that are evaluated; %(default)s")  # fmt: skip
    add("--confusions", choices=CONFUSIONS, default="match",
        help="in Sim and Oth an object of another class matches once, at IoU 0.1, as in COCO's "
        "own analysis, or is a crowd region, as in MMDetection's tool; %(default)s")  # fmt: skip
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.results):
        parser.error("--names: one for each of --results is needed")
    if args.max_detections < 1:
        parser.error("--max-detections must be positive")
    args.areas = [area for area in AREAS if area in args.areas]
    return args


def result_names(files: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart: the file's, else the least of the path that does."""
    parts = [[*file.resolve().parent.parts, file.stem] for file in files]
    if len(set(files)) < len(files):
        raise ValueError("a result file is given twice")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            different = [part[-depth] for part in parts]
            return different if len(set(different)) == len(different) else names
    return [str(file) for file in files]


def analyse(args: argparse.Namespace) -> tuple[CocoTruth, list[Analysis]]:
    """Read the files and compute the curves.

    Raises:
        FileNotFoundError, ValueError: a file is missing or unusable.
    """
    names = args.names or result_names(args.results)
    areas = {area: AREAS[area] for area in args.areas}
    with tqdm(total=2 * len(names) + 1, unit="step", desc="ground truth", leave=False) as progress:
        truth = read_ground_truth(args.gt, args.iou_type)
        progress.update()
        analyses = []
        for name, file in zip(names, args.results, strict=True):
            progress.set_description(f"reading {name}")
            detections = read_detections(file, truth, args.iou_type)
            progress.update()
            progress.set_description(f"matching {name}")
            curves = error_curves(
                truth.objects,
                detections,
                truth.supercategory,
                areas,
                max_detections=args.max_detections,
                confusions=args.confusions,
            )
            progress.update()
            analyses.append(Analysis(name, curves))
    return truth, analyses


def class_mean(curves: np.ndarray) -> np.ndarray:
    """(..., K, 101) to (..., 101): the mean over the classes that have ground truth, else NaN."""
    there = ~np.isnan(curves)
    count = there.sum(axis=-2)
    total = np.where(there, curves, 0.0).sum(axis=-2)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def notes(truth: CocoTruth, args: argparse.Namespace) -> list[str]:
    """What a reader of the figures has to know about this ground truth."""
    found = []
    if (truth.supercategory < 0).all():
        found.append("No two classes share a supercategory: Sim equals Loc.")
    if truth.zero_id:
        found.append(
            "An annotation has the id 0, with which pycocotools counts a match as a miss; here it "
            "counts as a match."
        )
    if args.confusions == "crowd":
        found.append("Sim and Oth treat objects of other classes as crowd regions.")
    return found


def tables(truth: CocoTruth, analyses: Sequence[Analysis], args: argparse.Namespace) -> str:
    """Area under each curve in percent, of the mean and of each class, in Markdown."""
    parts = []
    for a, area in enumerate(args.areas):
        rows = [[name, *_percent(class_mean(curves[a]))] for name, curves in analyses]
        parts += [f"## {area}", "", _table(rows, ["results", *SETTINGS]), ""]
    for name, curves in analyses:
        for a, area in enumerate(args.areas):
            rows = [
                [class_name, *_percent(curves[a, :, k])] for k, class_name in enumerate(truth.names)
            ]
            parts += [f"## {name}, {area}, by class", "", _table(rows, ["class", *SETTINGS]), ""]
    head = ["# Error analysis", "", f"AP in percent ({args.iou_type}) of {truth.path.name}.", ""]
    return "\n".join([*head, *(f"{note}\n" for note in notes(truth, args)), *parts])


def _percent(curves: np.ndarray) -> list[str]:
    values = 100 * curves.mean(axis=-1)
    return ["-" if np.isnan(value) else f"{value:.1f}" for value in values]


def _table(rows: list[list[str]], headers: list[str]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    align = ["left", *("right" for _ in headers[1:])]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def as_json(truth: CocoTruth, analyses: Sequence[Analysis], args: argparse.Namespace) -> str:
    """AP (0 to 1) by results, size range and setting: "mean", "classes", and the mean "curve"."""
    content = {}
    for name, curves in analyses:
        content[name] = {
            area: {
                setting: {
                    "mean": _plain(class_mean(curves[a, s]).mean()),
                    "classes": dict(
                        zip(truth.names, map(_plain, curves[a, s].mean(axis=-1)), strict=True)
                    ),
                    "curve": [_plain(value) for value in class_mean(curves[a, s])],
                }
                for s, setting in enumerate(SETTINGS)
            }
            for a, area in enumerate(args.areas)
        }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 9)


def write_figures(
    truth: CocoTruth, analyses: Sequence[Analysis], args: argparse.Namespace
) -> list[Path]:
    """The figure of the mean, and of each class where wanted."""
    columns = [analysis.name for analysis in analyses]
    areas = range(len(args.areas))

    def draw(title: str, stem: Path, curves: Sequence[np.ndarray]) -> list[Path]:
        return draw_errors(
            [[c[a] for c in curves] for a in areas], args.areas, columns, title, stem
        )

    means = [class_mean(analysis.curves) for analysis in analyses]
    title = f"mean of {len(truth.names)} classes" if len(truth.names) > 1 else truth.names[0]
    files = draw(f"{title} ({args.iou_type})", args.output / "mean", means)
    if args.per_class:
        folder = args.output / "classes"
        folder.mkdir(exist_ok=True)
        for k, name in enumerate(tqdm(truth.names, unit="figure", leave=False)):
            stem = f"{truth.category_ids[k]}_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}"
            draw(f"{name} ({args.iou_type})", folder / stem, [a.curves[:, :, k] for a in analyses])
        files.append(folder)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse, write, and print the table of the means."""
    args = parse_arguments(argv)
    try:
        truth, analyses = analyse(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    text = tables(truth, analyses, args)
    written = []
    for name, content in (("errors.md", text), ("errors.json", as_json(truth, analyses, args))):
        partial = args.output / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        written.append(partial.replace(args.output / name))
    written += write_figures(truth, analyses, args)
    print(text.split("by class")[0].rpartition("\n##")[0].strip())
    print("Written: " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    main()
