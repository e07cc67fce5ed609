"""Data sets that this package draws itself: hard to localise, hard to classify, free to share.

Shapes of six look-alike classes over textured backgrounds; each image depends only on the data set,
the seed, the split and its own number. "shapes" has occlusion and clutter; in "shapes_deformed"
geometry is what is hard: scale, rotation, stretch, shear and bends. The boxes and polygons are
those of the whole shape inside the image, also where another object covers it.

    python -m d2det.data.generated --root datasets/shapes --split train --num-images 2000
    python -m d2det.data.generated --dataset shapes_deformed --split val
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .generated_names import DEFAULT_SEED, DEFAULT_SIZE, SPLITS, VERSION, dataset_folder
from .shapes import CLASSES, RECIPES

_JPEG_QUALITY = 92


def generate_image(
    seed: int, split: str, index: int, size: int, dataset: str = "shapes"
) -> tuple[np.ndarray, list[dict]]:
    """Draw one image.

    Args:
        seed: of the data set.
        split: e.g. "train"; different splits share no image.
        index: number of the image.
        size: nominal side in pixels; the real sides differ by up to a sixth.
        dataset: one of `RECIPES`.

    Returns:
        uint8 BGR array (H, W, 3), and COCO annotations without ids.
    """
    from .shapes import sample_scene
    from .shapes_render import render_scene

    recipe = RECIPES[dataset]
    stream = split if dataset == "shapes" else f"{dataset}_{split}"
    rng = np.random.default_rng([VERSION, seed, zlib.crc32(stream.encode()), index])
    scene = sample_scene(rng, size, recipe)
    image = render_scene(rng, scene, size, recipe)
    return image, [_annotation(shape, scene.width, scene.height) for shape in scene.objects]


def write_dataset(
    root: str | os.PathLike[str],
    split: str,
    *,
    num_images: int,
    size: int = DEFAULT_SIZE,
    seed: int = DEFAULT_SEED,
    dataset: str = "shapes",
) -> Path:
    """Write images and a COCO JSON, unless they are there already.

    Several processes may ask at once: one writes, the others wait. The folder gets its name when it
    is complete, so an interrupted run leaves nothing that could be taken for a data set.

    Args:
        root: parent of the versioned folder; see `dataset_folder`.
        split: name of the split, part of the file names and of the seed.
        num_images: at least 1.
        size: nominal side of the images in pixels, at least 48.
        seed: at least 0.
        dataset: one of `RECIPES`.

    Returns:
        Path of `instances_{split}.json`; the images are in the folder `images` beside it.
    """
    from filelock import FileLock

    if dataset not in RECIPES:
        raise ValueError(f"no generated data set {dataset!r}; choose one of {list(RECIPES)}")
    if num_images < 1 or size < 48 or seed < 0 or not split.isidentifier():
        raise ValueError(
            "a generated data set needs num_images >= 1, size >= 48, seed >= 0 and a split named "
            f"like an identifier, not {num_images}, {size}, {seed} and {split!r}"
        )
    options: dict[str, Any] = {"num_images": num_images, "size": size, "seed": seed}
    folder = dataset_folder(root, split, **options, dataset=dataset)
    json_file = folder / f"instances_{split}.json"
    if json_file.is_file():
        return json_file
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if json_file.is_file():
            return json_file
        partial = folder.with_name(folder.name + ".partial")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        (partial / "images").mkdir(parents=True)
        content = _write_images(partial / "images", split, dataset=dataset, **options)
        (partial / json_file.name).write_text(json.dumps(content))
        partial.rename(folder)
    return json_file


def _write_images(
    folder: Path, split: str, *, num_images: int, size: int, seed: int, dataset: str
) -> dict[str, Any]:
    import cv2
    from tqdm import tqdm

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(num_images), desc=f"drawing {dataset}_{split}", unit="image"):
        image, objects = generate_image(seed, split, index, size, dataset)
        height, width = image.shape[:2]
        name = f"{index + 1:06d}.jpg"
        if not cv2.imwrite(str(folder / name), image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]):
            raise OSError(f"could not write {folder / name}: is the disk full?")
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **entry})
    return {
        "info": {
            "description": f"d2det generated {dataset}",
            "version": VERSION,
            "split": split,
            "num_images": num_images,
            "size": size,
            "seed": seed,
        },
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }


def _annotation(shape: Any, width: int, height: int) -> dict[str, Any]:
    from .shapes_polygons import clip_polygon, clipped_box, polygon_area

    polygon = clip_polygon(shape.polygon, width, height)
    x1, y1, x2, y2 = np.round(clipped_box(shape.polygon, width, height), 2).tolist()
    return {
        "category_id": shape.label + 1,
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "area": round(polygon_area(polygon), 2),
        "segmentation": [np.round(polygon, 2).ravel().tolist()],
        "iscrowd": 0,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line: write one split and print the path of its JSON."""
    parser = argparse.ArgumentParser(description="Draw a data set of shapes.")
    parser.add_argument("--root", default="datasets/shapes", help="parent folder")
    parser.add_argument("--dataset", default="shapes", choices=list(RECIPES))
    parser.add_argument("--split", default="train")
    parser.add_argument("--num-images", type=int, help="default: 2000 for train, else 400")
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="nominal side in pixels")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    args = parser.parse_args(arguments)
    number = args.num_images or SPLITS.get(args.split, SPLITS["val"])
    options = {"num_images": number, "size": args.size, "seed": args.seed, "dataset": args.dataset}
    print(write_dataset(args.root, args.split, **options))


if __name__ == "__main__":
    main()
