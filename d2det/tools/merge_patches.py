"""Merge detections on patches back to the whole images.

Split objects are rejoined where two patches' pieces agree in the strip that both show; duplicates
in overlapping patches are suppressed, pieces that a patch's side cuts giving way to whole objects.
The rules in full: `d2det/evaluation/merging.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from d2det.evaluation.patch_detections import MergeRules
from d2det.evaluation.patch_results import merge_results, read_patches, read_results, write_results
from d2det.evaluation.patch_truth import compare_with_truth, truth_as_results
from d2det.evaluation.whole_images import SIDES, evaluate, isaid_protocol

EXAMPLES = """\
examples:
  python -m d2det.tools.merge_patches \\
      output/isaid/inference/isaid_val/coco_segm_results.json \\
      --patches isaid/val/instancesonly_filtered_val.json \\
      --output merged.json --evaluate isaid/val/whole_val.json
  what cutting and merging lose, if the detector is perfect:
    python -m d2det.tools.merge_patches --ground-truth \\
        --patches isaid/val/instancesonly_filtered_val.json --whole isaid/val/whole_val.json
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    rules = MergeRules()
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.merge_patches",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("results", nargs="?", type=Path, metavar="RESULTS", help="COCO results on the patches")
    add("--patches", type=Path, required=True, metavar="FILE", help="JSON of the patches")
    add("--whole", type=Path, metavar="FILE",
        help="JSON of the whole images; needed where that of the patches, not being cut_patches', "
        "does not name them")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="default: RESULTS_merged.json beside RESULTS")
    add("--evaluate", type=Path, metavar="FILE", help="annotations to compute AP on")
    add(
        "--area-sides",
        nargs=3,
        type=float,
        default=SIDES,
        metavar="SIDE",
        help="small, medium and large objects begin at the squares of these; iSAID's: 10 144 512",
    )
    add("--max-dets", type=int, default=1000, metavar="N",
        help="detections of an image and class that are evaluated; %(default)s")  # fmt: skip
    add("--ground-truth", action="store_true",
        help="merge the patches' own annotations, say what comes back; needs --whole")  # fmt: skip
    add("--method", choices=("nms", "soft-nms", "none"), default=rules.method,
        help="for duplicates; %(default)s")  # fmt: skip
    add("--join-iou", type=float, default=rules.join_iou, metavar="IOU",
        help="agreement of two pieces in the shared strip; %(default)s")  # fmt: skip
    add("--border", type=float, default=rules.border, metavar="PIXELS",
        help="a detection this close to a patch's side is cut by it; %(default)s")  # fmt: skip
    add("--nms-iou", type=float, default=rules.nms_iou, metavar="IOU",
        help="from which two detections are one object; %(default)s")  # fmt: skip
    add("--nms-ios", type=float, default=rules.nms_ios, metavar="SHARE",
        help="of a cut detection that lies in another one, from which they are one object; "
        "%(default)s")  # fmt: skip
    add("--cut-weight", type=float, default=rules.cut_weight, metavar="W",
        help="of a cut detection's score, when it is decided which of two is dropped; "
        "%(default)s")  # fmt: skip
    add("--min-score", type=float, default=rules.min_score, metavar="S", help="%(default)s")
    add("--limit", type=int, default=rules.limit, metavar="N",
        help="best detections of a whole image; 0: all")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes; 0: this one; %(default)s")  # fmt: skip
    args = parser.parse_args(argv)
    if args.ground_truth == (args.results is not None):
        parser.error("either RESULTS or --ground-truth is needed")
    if args.ground_truth and not args.whole:
        parser.error("--ground-truth needs --whole")
    if args.evaluate and args.ground_truth:
        parser.error("--evaluate is for RESULTS")
    return args


def _rules(args: argparse.Namespace) -> MergeRules:
    return MergeRules(
        join_iou=args.join_iou,
        border=args.border,
        method=args.method,
        nms_iou=args.nms_iou,
        nms_ios=args.nms_ios,
        cut_weight=args.cut_weight,
        min_score=args.min_score,
        limit=args.limit,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, write, and say how many were merged."""
    args = parse_arguments(argv)
    try:
        rules = _rules(args)
        patches = read_patches(args.patches, args.whole)
        found = truth_as_results(args.patches) if args.ground_truth else read_results(args.results)
        merged, counts = merge_results(found, patches, rules, workers=args.workers)
        print(
            f"{counts['found']} detections on patches of {counts['images']} images, "
            f"{counts['merged']} on whole images: {counts['pieces']} pieces rejoined to "
            f"{counts['rejoined']} objects, {counts['duplicates']} duplicates dropped"
        )
        if args.ground_truth:
            print(compare_with_truth(merged, args.patches, args.whole))
        if args.results or args.output:
            default = args.results and args.results.with_name(f"{args.results.stem}_merged.json")
            output = args.output or default
            write_results(merged, output)
            print(f"Written: {output}")
        if args.evaluate:
            protocol = isaid_protocol(args.area_sides, args.max_dets)
            print(evaluate(merged, args.evaluate, protocol))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
