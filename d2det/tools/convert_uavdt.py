"""UAVDT from its archives to COCO's format, in one command.

Searches RAW_DIR for the images (UAV-benchmark-M), the annotations (UAV-benchmark-MOTD_v1.0/GT) and
the attributes (M_attr), and writes OUT_DIR/images and OUT_DIR/annotations/instances_train.json,
val, trainval (both) and test. An interrupted run can be repeated: images that are there are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from d2det.data.uavdt import IGNORE_MODES, Options, convert

EXAMPLES = """\
examples:
  python -m d2det.tools.convert_uavdt downloads/ $DETECTRON2_DATASETS/uavdt
  python -m d2det.tools.convert_uavdt UAV-benchmark-M datasets/uavdt --gt GT --attributes M_attr
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.convert_uavdt",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("raw", type=Path, metavar="RAW_DIR", help="where the archives were unpacked")
    add("output", type=Path, metavar="OUT_DIR")
    add("--gt", type=Path, metavar="DIR", help="annotations, if they are not below RAW_DIR")
    add("--attributes", type=Path, metavar="DIR", help="attributes, if they are not below RAW_DIR")
    add("--ignore-regions", choices=IGNORE_MODES, default="black",
        help="paint them black in all images, as the paper does; write them as crowd boxes; or "
        "keep them as they are; %(default)s")  # fmt: skip
    add("--classes", type=int, choices=(1, 3), default=1,
        help="1: vehicle, 3: car, truck and bus; %(default)s")  # fmt: skip
    add("--val-sequences", nargs="*", metavar="NAME",
        help="training sequences for validation; default: some of each condition, a tenth of the "
        "frames")  # fmt: skip
    add("--allow-missing-frames", action="store_true",
        help="leave out boxes whose image is missing, instead of an error")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="images that are written at a time; %(default)s")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was written and how to use it."""
    args = parse_arguments(argv)
    options = Options(
        ignore_regions=args.ignore_regions,
        three_classes=args.classes == 3,
        val_sequences=None if args.val_sequences is None else tuple(args.val_sequences),
        allow_missing_frames=args.allow_missing_frames,
    )
    folders = [folder for folder in (args.raw, args.gt, args.attributes) if folder is not None]
    try:
        written = convert(
            folders,
            args.output,
            options,
            workers=args.workers,
            warn=lambda text: tqdm.write(f"warning: {text}", file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("Written: " + ", ".join(str(path) for path in written.values()))
    print(f"Images: {args.output / 'images'}")


if __name__ == "__main__":
    main()
