"""Cut large images, their masks and their annotations into patches.

For any data set in COCO's format, and with --preset isaid for iSAID as it is released. Images that
are finished are skipped, so an interrupted command can be repeated. Below OUTPUT/SPLIT it writes
images/, instancesonly_filtered_SPLIT.json (the patches) and whole_SPLIT.json (the images uncut,
with the same categories: what merged detections are evaluated on).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2det.data import isaid
from d2det.data.coco import read_coco
from d2det.data.coco_images import check_files
from d2det.data.cut_annotations import Rules
from d2det.data.cut_dataset import cut_dataset
from d2det.data.cutting import Job
from d2det.data.patches import Grid

EXAMPLES = """\
examples:
  iSAID from its JSON, from its mask images, and its test images:
    python -m d2det.tools.cut_patches --preset isaid --json iSAID/train/iSAID_train.json \\
        --images iSAID/train/images --output $DETECTRON2_DATASETS/isaid --split train
    python -m d2det.tools.cut_patches --preset isaid --images iSAID/val/images \\
        --output $DETECTRON2_DATASETS/isaid --split val
    python -m d2det.tools.cut_patches --preset isaid --images iSAID/test/images --images-only \\
        --output $DETECTRON2_DATASETS/isaid --split test
  your own:
    python -m d2det.tools.cut_patches --json DATA/train.json --images DATA/train \\
        --output DATA/patches --split train --size 1024 --cut-when either --min-visible 0.3
"""
_MASK_IMAGES = (isaid.CLASS_SUFFIX, isaid.INSTANCE_SUFFIX)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.cut_patches",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the large images")
    add("--json", type=Path, metavar="FILE",
        help="their annotations in COCO's format; with --preset isaid, the mask images are read "
        "without it")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="parent folder of the split")
    add("--split", required=True, metavar="NAME", help="train, val, test, ...")
    add("--preset", choices=("isaid",),
        help="iSAID's classes and ids, its contours (--pixel-contours), --min-area 11, --skip "
        "P1527 P1530, and its mask images cut as well")  # fmt: skip
    add("--images-only", action="store_true", help="there are no annotations: a test set")
    add("--size", type=int, default=800, metavar="N", help="side of a patch; %(default)s")
    add("--overlap", type=int, default=200, metavar="N", help="of neighbours; %(default)s")
    add("--cut-when", choices=("both", "either"), default="both",
        help="both: an image is kept whole unless both sides exceed the size, as in iSAID; either: "
        "every side that exceeds it is cut; %(default)s")  # fmt: skip
    add("--min-area", type=float, metavar="PIXELS", help="drop smaller pieces; 1, iSAID 11")
    add("--min-visible", type=float, default=0.0, metavar="SHARE",
        help="drop pieces that show less of their object; %(default)s")  # fmt: skip
    add("--empty", choices=("keep", "drop"), default="keep",
        help="patches without objects; training leaves them out anyway; %(default)s")  # fmt: skip
    add("--masks", choices=("polygon", "rle"), default="polygon",
        help="as which masks are written; %(default)s")  # fmt: skip
    add("--pixel-contours", action=argparse.BooleanOptionalAction,
        help="polygons run through the border pixels, as OpenCV traces them; else along the "
        "pixels' edges, as COCO rasterises them")  # fmt: skip
    add("--skip", nargs="*", metavar="STEM", help="images to leave out, without extension")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes; 0: this one; %(default)s")  # fmt: skip
    args = parser.parse_args(argv)
    if args.json and args.images_only:
        parser.error("--json and --images-only exclude each other")
    if not (args.json or args.images_only or args.preset):
        parser.error("--json is needed, or --images-only, or --preset isaid with its mask images")
    if args.images_only and args.empty == "drop":
        parser.error(
            "--images-only has nothing but patches without objects: leave out --empty drop"
        )
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    isaid_data = args.preset == "isaid"
    if args.min_area is None:
        args.min_area = isaid.MIN_AREA if isaid_data else 1
    if args.pixel_contours is None:
        args.pixel_contours = isaid_data
    if args.skip is None:
        args.skip = list(isaid.SKIPPED) if isaid_data else []
    return args


def plan(args: argparse.Namespace) -> tuple[list[Job], list[dict[str, Any]]]:
    """The images to cut, and the categories of the result.

    Raises:
        ValueError, FileNotFoundError: the data are not usable; the message says what and where.
    """
    grid = Grid(args.size, args.overlap, args.cut_when)
    rules = Rules(args.min_area, args.min_visible, args.masks, args.pixel_contours)
    content = read_coco(args.json) if args.json else _list_images(args.images)
    images = [i for i in content["images"] if Path(i["file_name"]).stem not in args.skip]
    if not images:
        raise ValueError(f"no image of {args.json or args.images} is left to cut")
    _check_names(images, args.json or args.images)
    if args.json:
        check_files(images, args.images, args.json)
    categories, groups = _annotations(content, images, args)
    from_masks = not args.json and not args.images_only
    companions = _companions(images, args, required=from_masks)
    masks = any(a.get("segmentation") for group in groups.values() for a in group)
    jobs = [
        Job(
            {"id": image["id"], "file_name": image["file_name"]},
            None if from_masks else groups[image["id"]],
            masks,
            args.images,
            args.output / args.split,
            grid,
            rules,
            args.empty == "keep",
            companions,
        )
        for image in images
    ]
    return jobs, categories


def _list_images(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}, the folder of the images, is not there")
    extensions = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in extensions and not path.stem.endswith(_MASK_IMAGES)
    )
    if not names:
        raise FileNotFoundError(f"{folder} holds no image")
    return {"images": [{"id": i + 1, "file_name": name} for i, name in enumerate(names)]}


def _check_names(images: Sequence[dict[str, Any]], where: Path) -> None:
    stems = Counter(Path(image["file_name"]).with_suffix("") for image in images)
    twice = [str(stem) for stem, count in stems.items() if count > 1]
    if twice:
        raise ValueError(
            f"{where}: several images are called {twice[0]}, and so would their patches be: rename "
            "them, or leave all but one out"
        )


def _annotations(
    content: dict[str, Any], images: Sequence[dict[str, Any]], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[Any, list[dict[str, Any]]]]:
    """Categories of the result, and the annotations of each image with their ids."""
    found = content.get("categories", [])
    if args.preset == "isaid":
        categories, ids = isaid.categories(), isaid.official_ids(found)
    else:
        categories, ids = list(found), {category["id"]: category["id"] for category in found}
    listed = {image["id"] for image in content["images"]}
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    orphans = 0
    for annotation in content.get("annotations", []):
        if annotation["image_id"] not in listed:
            orphans += 1
            continue
        category = annotation.get("category_id")
        if category not in ids:
            raise ValueError(
                f"{args.json}: annotation {annotation['id']} has the category id {category!r}, "
                "which 'categories' does not list"
            )
        groups[annotation["image_id"]].append({**annotation, "category_id": ids[category]})
    if orphans:
        print(f"warning: {orphans} annotations of images that {args.json} does not list dropped")
    return categories, groups


def _companions(
    images: Sequence[dict[str, Any]], args: argparse.Namespace, *, required: bool
) -> tuple[str, ...]:
    """Suffixes of the mask images to cut: iSAID's, where all of them are there."""
    if args.preset != "isaid" or args.images_only:
        return ()
    paths = [
        path.with_name(f"{path.stem}{suffix}.png")
        for path in (args.images / image["file_name"] for image in images)
        for suffix in _MASK_IMAGES
    ]
    missing = [path.name for path in paths if not path.is_file()]
    if not missing:
        return _MASK_IMAGES
    if required or len(missing) < len(paths):
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} mask images are not in {args.images}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; give --json, or "
            "--images-only for a test set"
        )
    return ()


def main(argv: Sequence[str] | None = None) -> None:
    """Cut what is not cut yet, and say what came of it."""
    args = parse_arguments(argv)
    folder = args.output / args.split
    patches_json, _ = isaid.split_paths(args.output, args.split)
    whole_json = folder / f"whole_{args.split}.json"
    try:
        jobs, categories = plan(args)
        folder.mkdir(parents=True, exist_ok=True)
        summary = cut_dataset(
            jobs,
            categories,
            patches_json=patches_json,
            whole_json=whole_json,
            annotated=not args.images_only,
            workers=args.workers,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(summary)
    print(f"Written: {patches_json}, {whole_json}, {folder / 'images'}")


if __name__ == "__main__":
    main()
