#!/usr/bin/env python3
"""Detect objects in images and videos. `demo.py --help` tells how."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode, LazyConfig
from detectron2.structures import BoxMode, Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

import d2det  # noqa: F401  registers the detector
from d2det.engine.configs import merge_overrides
from d2det.engine.predictor import Predictor, load_config, load_image
from d2det.evaluation.drawing import enlarge, write_image
from d2det.evaluation.masks import encode_masks

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
MIN_SIDE = 400  # smaller images are drawn enlarged, so that labels can be read

EXAMPLES = """\
examples:
  %(prog)s --weights output/quickstart --input photos/
  %(prog)s --weights model_final.pth --config-file quickstart --input 'a*.jpg' clip.mp4
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", metavar="PATH", help="checkpoint, or output folder of a training"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config or its name; without it, the config.yaml beside the weights",
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="images, videos, folders or globs"
    )
    parser.add_argument(
        "--webcam",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="record a camera instead, until Ctrl-C",
    )
    parser.add_argument("--output", default="output/demo", metavar="DIR", help="%(default)s")
    parser.add_argument(
        "--score-thresh", type=float, default=0.3, metavar="S", help="lowest score (%(default)s)"
    )
    parser.add_argument("--device", help="e.g. cpu; without it, the config's, if it is there")
    parser.add_argument("--amp", action="store_true", help="half precision")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to override, after all other options",
    )
    args = parser.parse_args(argv)
    if not args.input and args.webcam is None:
        parser.error("--input or --webcam is needed")
    if not args.weights and not args.config_file:
        parser.error("--weights or --config-file is needed")
    return args


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The predictor that the command line describes."""
    config = load_config(args.config_file, args.weights)
    if isinstance(config, CfgNode):
        merge_overrides(config, args.opts)
    else:
        config = LazyConfig.apply_overrides(config, args.opts)
    return Predictor(
        config,
        args.weights,
        args.device,
        args.score_thresh,
        amp=args.amp,
        batch_size=args.batch_size,
    )


def find_inputs(patterns: Sequence[str], output: Path) -> list[Path]:
    """All files that paths, folders and globs stand for, each once.

    Raises:
        FileNotFoundError: one of them stands for nothing.
        ValueError: drawn images would overwrite the inputs.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [f for f in sorted(path.iterdir()) if f.suffix.lower() in IMAGES | VIDEOS]
        elif path.is_file():
            found = [path]
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise FileNotFoundError(f"--input {pattern}: no image or video there")
        files += found
    if any(file.parent.resolve() == output.resolve() for file in files):
        raise ValueError(f"--output {output} holds inputs, which drawn images could overwrite")
    return list(dict.fromkeys(files))


class Results:
    """Detections of all inputs, in COCO's format, with category ids from 1; and their folder."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = folder
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._names = class_names
        self._taken: set[str] = set()

    def file_for(self, source: Path, ending: str) -> Path:
        """Where to draw an input, apart from others of the same name in this run."""
        name, number = source.stem, 1
        while name + ending in self._taken:
            number += 1
            name = f"{source.stem}_{number}"
        self._taken.add(name + ending)
        return self.folder / (name + ending)

    def add(self, file_name: str, image: np.ndarray, found: Instances, **extra: Any) -> None:
        """Add an image and what was found in it; `extra` goes to the image's entry."""
        image_id = len(self.images) + 1
        height, width = image.shape[:2]
        entry = {"id": image_id, "file_name": file_name, "width": width, "height": height, **extra}
        self.images.append(entry)
        masks = encode_masks(found.pred_masks) if found.has("pred_masks") else None
        found = found.to("cpu")
        boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        for i, box in enumerate(boxes.tolist()):
            index = int(found.pred_classes[i])
            annotation = {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": index + 1,
                "category_name": self._names[index],
                "bbox": [round(value, 2) for value in box],
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "score": round(float(found.scores[i]), 5),
            }
            if masks is not None:
                annotation["segmentation"] = masks[i]
                annotation["area"] = int(mask_util.area(masks[i]))
            if found.has("mask_scores"):
                annotation["mask_score"] = round(float(found.mask_scores[i]), 5)
            self.annotations.append(annotation)

    def write(self) -> Path:
        """Write all as one JSON file; returns its path."""
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self._names)]
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        path = self.folder / "detections.json"
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def run_images(predictor: Predictor, files: Sequence[Path], results: Results) -> int:
    """Predict and draw images; returns how many could be read."""
    done = 0
    with tqdm(total=len(files), unit="image", disable=not files) as progress:
        for batch in _chunks(_read(files, progress), predictor.batch_size):
            outputs = predictor([image for _, image in batch])
            for (file, image), prediction in zip(batch, outputs, strict=True):
                found = prediction["instances"]
                results.add(str(file), image, found)
                canvas, scale = enlarge(image, MIN_SIDE)
                drawn = predictor.draw(canvas, found, scale)
                write_image(results.file_for(file, ".jpg"), drawn)
                done += 1
                progress.update()
    return done


def run_video(predictor: Predictor, source: str | int, name: Path, results: Results) -> int:
    """Predict and draw all frames of a video file or camera; returns how many there were."""
    capture = cv2.VideoCapture(source)
    writer, done = None, 0
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps < 1000 else 25.0  # cameras and damaged files report nonsense
    total = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    try:
        with tqdm(total=total, unit="frame", desc=name.name) as progress:
            for frames in _chunks(_frames(capture), predictor.batch_size):
                for frame, prediction in zip(frames, predictor(frames), strict=True):
                    if writer is None:
                        writer = _video_writer(results.file_for(name, ".mp4"), fps, frame)
                    found = prediction["instances"]
                    results.add(str(name), frame, found, frame=done, seconds=round(done / fps, 4))
                    writer.write(predictor.draw(frame, found))
                    done += 1
                    progress.update()
    except KeyboardInterrupt:
        if not isinstance(source, int):  # that is how a recording ends
            raise
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    return done


def main(argv: Sequence[str] | None = None) -> None:
    """Predict all inputs and write what was found."""
    args = parse_arguments(argv)
    setup_logger(name="d2det")
    setup_logger(name="fvcore").setLevel("WARNING")
    output = Path(args.output).expanduser()
    try:
        files = find_inputs(args.input, output)
        predictor = build_predictor(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    output.mkdir(parents=True, exist_ok=True)
    results = Results(output, predictor.class_names)
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    read = run_images(predictor, [file for file in files if file not in videos], results)
    sources: list[tuple[str | int, Path]] = [(str(video), video) for video in videos]
    if args.webcam is not None:
        sources.append((args.webcam, Path("webcam")))
    for source, name in sources:
        if run_video(predictor, source, name, results):
            read += 1
        else:
            print(f"warning: {name} cannot be read as a video: skipped", file=sys.stderr)
    skipped = len(files) + (args.webcam is not None) - read
    if read == 0:
        sys.exit("error: none of the inputs could be read")
    path = results.write()
    note = f", {skipped} inputs skipped" if skipped else ""
    print(
        f"{len(results.annotations)} objects in {len(results.images)} images{note}.\n"
        f"Drawn: {output}\nDetections: {path}"
    )


def _read(files: Sequence[Path], progress: tqdm) -> Iterator[tuple[Path, np.ndarray]]:
    for file in files:
        try:
            yield file, load_image(file)
        except (ValueError, OSError) as error:
            progress.write(f"warning: {error}: skipped", file=sys.stderr)
            progress.update()


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield frame


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _video_writer(path: Path, fps: float, frame: np.ndarray) -> cv2.VideoWriter:
    size = frame.shape[1], frame.shape[0]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise RuntimeError(f"{path} cannot be written: this OpenCV has no encoder for mp4")
    return writer


if __name__ == "__main__":
    main()
