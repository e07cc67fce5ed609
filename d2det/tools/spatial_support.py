"""Draw what a node of a detector sees in an image, for one model or two side by side.

Three views, those of the DCNv2 paper's Figures 1 and 2: where its convolutions (and RoI bins)
sample and how much each place counts; the effective receptive field; and the error-bounded saliency
region, the least of the image that gives the node nearly the same response.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from torch import Tensor
from tqdm import tqdm

from d2det.core.spatial_support import (
    box_mask,
    centred_boxes,
    drop_superpixels,
    grow_box,
    masked_errors,
    receptive_field,
)
from d2det.engine.predictor import Predictor, load_image
from d2det.tools._nodes import FeatureNode, Node, RoINode
from d2det.tools._sampling import ROI_BINS, Locations, sampling_locations
from d2det.tools._support_figure import View, draw_views

EXAMPLES = """\
examples:
  python -m d2det.tools.spatial_support --image photo.jpg --point 300 200 \\
      --weights output/regular output/deformable --output support.png
  python -m d2det.tools.spatial_support --image photo.jpg --box 100 80 420 310 \\
      --weights output/mine

Coordinates are in pixels of the image file. The saliency region needs scikit-image:
  pip install 'd2det[tools]'
"""
GROW_STEPS = 40  # sizes that the region's rectangle is tried at


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2det.tools.spatial_support",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image", required=True, metavar="FILE")
    add("--weights", required=True, nargs="+", metavar="PATH",
        help="checkpoint or output folder of one or two models")  # fmt: skip
    add("--config-file", nargs="+", metavar="FILE",
        help="as many; without it, the config.yaml beside each checkpoint")  # fmt: skip
    add("--names", nargs="+", metavar="NAME", help="titles; without it, the folders' names")
    node = parser.add_mutually_exclusive_group(required=True)
    node.add_argument("--point", nargs=2, type=float, metavar=("X", "Y"),
                      help="node: the position of a feature map over this pixel")  # fmt: skip
    node.add_argument("--box", nargs=4, type=float, metavar=("X1", "Y1", "X2", "Y2"),
                      help="node: the box head's feature of this RoI")  # fmt: skip
    add("--layer", default="res5", metavar="NAME",
        help="feature map of --point: p4, res5, or a module's path (%(default)s)")  # fmt: skip
    add("--sampling-layers", nargs="+", default=["res5"], metavar="NAME",
        help="parts of the names of modules whose sampling is drawn (%(default)s)")  # fmt: skip
    add("--locations", type=int, default=800, metavar="N",
        help="draw at most the N that count most (%(default)s)")  # fmt: skip
    add("--epsilon", type=float, default=0.1, metavar="E",
        help="bound on 1 - cos of the saliency region's response (%(default)s)")  # fmt: skip
    add("--segments", type=int, default=100, metavar="N",
        help="super-pixels in the image; the time grows with its square (%(default)s)")  # fmt: skip
    add("--no-saliency", action="store_true", help="leave the slowest view out")
    add("--short-side", type=int, metavar="S", help="resize to it; without it, as the config says")
    add("--max-size", type=int, default=640, metavar="S",
        help="longest side that the network gets (%(default)s)")  # fmt: skip
    add("--device", help="e.g. cpu; without it, the config's, if it is there")
    add("--output", default="spatial_support.png", metavar="FILE",
        help="png, svg or pdf (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if len(args.weights) > 2:
        parser.error("--weights: one model or two")
    for name in ("config_file", "names"):
        given = getattr(args, name)
        if given and len(given) != len(args.weights):
            parser.error(f"--{name.replace('_', '-')}: one for each of --weights is needed")
    if args.box and (args.box[2] <= args.box[0] or args.box[3] <= args.box[1]):
        parser.error("--box: x2 and y2 must exceed x1 and y1")
    if not 0 < args.epsilon < 2:
        parser.error("--epsilon must be between 0 and 2")
    return args


def find_slic() -> Callable[..., np.ndarray]:
    """scikit-image's SLIC.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError(
            "the saliency region needs scikit-image, which is not installed: "
            "pip install 'd2det[tools]' (or pip install scikit-image), or give --no-saliency"
        ) from error
    return slic


def prepare(
    predictor: Predictor, image: np.ndarray, short_side: int | None, max_size: int
) -> tuple[Tensor, np.ndarray]:
    """The image as the network gets it: (3, H, W) normalised and unpadded, and as RGB pixels.

    Args:
        predictor: holds the model.
        image: (H, W, 3), BGR.
        short_side: to resize to; None as the predictor does.
        max_size: limit for the longer side.
    """
    resize = predictor._augmentations
    if short_side is None:
        height, width = predictor._prepare(image, 0)["image"].shape[1:]
        short_side = min(height, width)
    predictor._augmentations = T.AugmentationList(
        [T.ResizeShortestEdge([short_side, short_side], max_size)]
    )
    pixels = predictor._prepare(image, 0)["image"]
    predictor._augmentations = resize
    model = predictor.model
    normalised = (pixels.to(model.device) - model.pixel_mean) / model.pixel_std
    rgb = pixels if predictor._format == "RGB" else pixels.flip(0)
    return normalised, rgb.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def padded_response(model: Any, node: Node) -> Callable[[Tensor], Tensor]:
    """The node's response to images of any size, padded as the backbone needs."""
    divisor = max(1, model.backbone.size_divisibility)

    def respond(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = torch.nn.functional.pad(images, (0, -width % divisor, 0, -height % divisor))
        return node.respond(model, images)

    return respond


def look(predictor: Predictor, image: np.ndarray, args: argparse.Namespace, name: str) -> View:
    """Compute all views of one model."""
    pixels, rgb = prepare(predictor, image, args.short_side, args.max_size)
    node = scaled_node(args, image.shape[:2], rgb.shape[:2])
    respond = padded_response(predictor.model, node)
    found = sampling_locations(predictor.model, respond, pixels, args.sampling_layers)
    locations, weights = strongest([f for f in found if f.layer != ROI_BINS], args.locations)
    bins, bin_weights = strongest([f for f in found if f.layer == ROI_BINS], args.locations)
    field = receptive_field(respond, pixels).cpu().numpy()
    region, error = None, 0.0
    if not args.no_saliency:
        region, error = saliency_region(respond, pixels, rgb, node, args)
    return View(
        name, rgb, node.center, node.box if isinstance(node, RoINode) else None,
        locations, weights, bins, bin_weights, field, region, error,
    )  # fmt: skip


def scaled_node(args: argparse.Namespace, size: Sequence[int], resized: Sequence[int]) -> Node:
    """The node that the command line names, in pixels of the resized image.

    Raises:
        ValueError: it lies outside the image.
    """
    (height, width), (new_height, new_width) = size, resized
    values = args.point or args.box
    sides = (width, height) * (len(values) // 2)
    if not all(0 <= v <= side for v, side in zip(values, sides, strict=True)):
        raise ValueError(f"{values} is not inside the image of {width} x {height} pixels")
    scales = (new_width / width, new_height / height) * (len(values) // 2)
    scaled = tuple(v * scale for v, scale in zip(values, scales, strict=True))
    return RoINode(scaled) if args.box else FeatureNode(args.layer, *scaled)


def strongest(found: Sequence[Locations], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The locations that count most (P, 2), the first of them last, and their weights over the
    largest (P,)."""
    if not found:
        return np.zeros((0, 2)), np.zeros(0)
    points = torch.cat([f.points for f in found])
    weights = torch.cat([f.weights for f in found])
    order = weights.argsort(descending=True)[:limit].flip(0)
    order = order[weights[order] > 0]
    weights = weights[order]
    top = weights.max() if len(weights) else 1
    return points[order].cpu().numpy(), (weights / top).cpu().numpy()


def saliency_region(
    respond: Callable[[Tensor], Tensor],
    pixels: Tensor,
    rgb: np.ndarray,
    node: Node,
    args: argparse.Namespace,
) -> tuple[np.ndarray, float]:
    """The error-bounded saliency region (H, W) and its error."""
    slic = find_slic()
    errors = masked_errors(respond, pixels)
    size = tuple(pixels.shape[1:])

    def on_device(masks: Tensor) -> Tensor:
        return errors(masks.to(pixels.device)).cpu()

    box = grow_box(
        on_device, centred_boxes(node.center, node.aspect, size, GROW_STEPS), size, args.epsilon
    )
    mask = box_mask(box, size)
    labels = torch.from_numpy(slic(rgb, n_segments=args.segments, start_label=0)).long()
    with tqdm(total=labels[mask].unique().numel(), unit="super-pixel", desc="saliency") as progress:
        mask = drop_superpixels(on_device, mask, labels, args.epsilon, progress.update)
    return mask.numpy(), float(on_device(mask[None])[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the views and write the picture."""
    args = parse_arguments(argv)
    setup_logger(name="d2det")
    setup_logger(name="fvcore").setLevel("WARNING")
    output = Path(args.output).expanduser()
    views = []
    try:
        if not args.no_saliency:
            find_slic()
        image = load_image(args.image)
        for i, weights in enumerate(args.weights):
            config = args.config_file[i] if args.config_file else None
            predictor = Predictor(config, weights, args.device)
            path = Path(weights)
            name = args.names[i] if args.names else (path if path.is_dir() else path.parent).name
            views.append(look(predictor, image, args, name))
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_views(views, output)
    except (ValueError, FileNotFoundError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    for view in views:
        if view.region is not None:
            print(f"{view.name}: saliency region {100 * view.region.mean():.1f} % of the image")
    print(f"Drawn: {output}")


if __name__ == "__main__":
    main()
