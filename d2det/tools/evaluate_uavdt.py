"""UAVDT's metrics of a COCO result file, at any threshold, without running the model again.

Prints PASCAL VOC AP (as in the D2Det paper) and AP as UAVDT's toolkit computes it, over all images
and by attribute; with --text, writes the detections in the toolkit's format.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from d2det.data.coco import read_coco
from d2det.evaluation.uavdt import read_results, uavdt_results, write_text_results

EXAMPLES = """\
example:
  python -m d2det.tools.evaluate_uavdt --gt datasets/uavdt/annotations/instances_test.json \\
      --results output/inference/uavdt_test/coco_instances_results.json --iou 0.5 0.7
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.evaluate_uavdt",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gt", type=Path, required=True, metavar="JSON", help="of convert_uavdt")
    add("--results", type=Path, required=True, metavar="JSON", help="coco_instances_results.json")
    add("--iou", type=float, nargs="+", default=[0.7], metavar="T", help="thresholds; 0.7")
    add("--eleven-point", action="store_true", help="VOC 2007's AP")
    add("--text", type=Path, metavar="DIR", help="write the toolkit's text files there")
    args = parser.parse_args(argv)
    if not all(0 < threshold <= 1 for threshold in args.iou):
        parser.error("--iou must lie above 0, and at most be 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table: a row for all images and for each attribute."""
    args = parse_arguments(argv)
    try:
        content = read_coco(args.gt)
        found = read_results(args.results, content)
        rows: dict[str, list[str]] = {}
        for threshold in args.iou:
            results = uavdt_results(
                content,
                found,
                voc_iou_threshold=threshold,
                toolkit_iou_threshold=threshold,
                eleven_point=args.eleven_point,
            )
            for metrics in results.values():
                for name, value in metrics.items():
                    attribute = name.partition(" ")[2] or "all"
                    rows.setdefault(attribute, []).append(f"{value:.2f}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    headers = [f"{kind} AP{100 * t:g}" for t in args.iou for kind in ("VOC", "toolkit")]
    table = [[attribute, *values] for attribute, values in rows.items()]
    align = ["left", *("right" for _ in headers)]
    print(tabulate(table, ["", *headers], "github", disable_numparse=True, colalign=align))
    if args.text:
        write_text_results(content["images"], found, args.text)
        print(f"Written: {args.text}")


if __name__ == "__main__":
    main()
