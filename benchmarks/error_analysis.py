"""Time and peak memory of d2det.tools.error_analysis on generated detections; --help has the sizes.

The ground truth is like COCO's val2017 in numbers: 80 classes in 12 supercategories, some crowds.
A detection is a moved object, at times of another class, or background.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 640, 480
SUPERCATEGORIES = 12


def write_files(
    folder: Path,
    *,
    images: int,
    objects: int,
    detections: int,
    classes: int,
    confused: float = 0.3,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write truth.json and found.json.

    Args:
        folder: where to.
        images: number of images.
        objects: of an image, on average.
        detections: of an image.
        classes: number of classes.
        confused: share of the detected objects whose class is drawn by lot.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    count = images * objects
    image = np.sort(rng.integers(0, images, count))
    side = np.exp(rng.normal(4.2, 0.9, (count, 2))).clip(6, 400)
    corner = rng.uniform(0, 1, (count, 2)) * np.maximum([WIDTH, HEIGHT] - side, 1)
    box = np.concatenate([corner, side], axis=1).round(2)
    label = rng.integers(0, classes, count)
    crowd = rng.random(count) < 0.01
    truth = {
        "images": [{"id": i + 1, "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "categories": [
            {"id": k + 1, "name": f"class {k}", "supercategory": f"kind {k % SUPERCATEGORIES}"}
            for k in range(classes)
        ],
        "annotations": [
            {
                "id": n + 1,
                "image_id": int(image[n]) + 1,
                "category_id": int(label[n]) + 1,
                "bbox": box[n].tolist(),
                "area": float(0.7 * side[n].prod()),
                "iscrowd": int(crowd[n]),
            }
            for n in range(count)
        ],
    }
    found = []
    first = np.searchsorted(image, np.arange(images + 1))
    for i in range(images):
        here = np.arange(first[i], first[i + 1])
        random = np.concatenate(
            [rng.uniform(0, 400, (detections, 2)), rng.uniform(10, 200, (detections, 2))], axis=1
        )
        kind = rng.integers(0, classes, detections)
        score = rng.beta(0.5, 4, detections)
        if len(here):
            source = rng.choice(here, detections)
            close = rng.random(detections) < 0.6
            scale = rng.choice([0.03, 0.12, 0.35], (detections, 1))
            moved = box[source] + scale * rng.normal(size=(detections, 4)) * np.tile(
                side[source], 2
            )
            random[close] = moved[close]
            kind = np.where(close & (rng.random(detections) >= confused), label[source], kind)
            quality = np.where(close, 0.35 * (0.4 - scale[:, 0]), 0)
            score = np.minimum(score + quality, 1)
        random[:, 2:] = random[:, 2:].clip(2)
        for n in range(detections):
            entry = {"image_id": i + 1, "category_id": int(kind[n]) + 1}
            found.append(
                {**entry, "bbox": random[n].round(2).tolist(), "score": round(float(score[n]), 5)}
            )
    paths = folder / "truth.json", folder / "found.json"
    for path, content in zip(paths, (truth, found), strict=True):
        path.write_text(json.dumps(content))
    return paths


def main() -> None:
    """Run the tool once in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=7, help="of an image, on average")
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--confused", type=float, default=0.3, help="share of wrong classes")
    parser.add_argument("--keep", type=Path, help="folder for the files and the figures")
    parser.add_argument("tool", nargs="*", help="further arguments of the tool, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        truth, found = write_files(
            folder,
            images=args.images,
            objects=args.objects,
            detections=args.detections,
            classes=args.classes,
            confused=args.confused,
        )
        command = [sys.executable, "-m", "d2det.tools.error_analysis", "--gt", str(truth)]
        command += ["--results", str(found), "--output", str(folder / "errors"), *args.tool]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{seconds:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of processor time, "
            f"{usage.ru_maxrss / 2**20:.2f} GiB at most"
        )


if __name__ == "__main__":
    main()
