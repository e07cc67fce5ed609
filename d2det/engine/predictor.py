"""Prediction on images with a trained detector, from yaml or LazyConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Instances
from omegaconf import DictConfig
from torch import nn

from d2det.evaluation.classes import fill_up, load_class_names, names_from_datasets
from d2det.evaluation.coco import in_float32
from d2det.evaluation.drawing import draw_objects, score_label

from .setup import get_cfg
from .trained import find_weights, load_trained

ImageLike = np.ndarray | str | Path


class Predictor:
    """Detect objects in images.

    >>> predictor = Predictor("quickstart", "output/quickstart/model_final.pth")
    >>> instances = predictor(cv2.imread("image.jpg"))["instances"]

    Unlike detectron2's `DefaultPredictor` it takes batches, paths, grey and transparent images,
    knows the class names that were stored beside the weights, and refuses weights that do not hold
    the whole model. It may be called from several threads.

    Args:
        config: a yaml file or a name in `configs/`, a CfgNode, or a LazyConfig as a DictConfig or a
            .py file. None: the `config.yaml` beside the weights.
        weights: a checkpoint, a URL, or an output folder (its best checkpoint, else its last).
            None: those the config names.
        device: e.g. "cpu" or "cuda:1". None: the config's, or the CPU where there is no GPU.
        score_threshold: detections with a lower score are left out. None: all that the model's
            own thresholds leave.
        amp: run in half precision (float16 on a GPU, bfloat16 on the CPU).
        batch_size: images that go through the model at a time.

    Attributes:
        model: the detector, in evaluation mode.
        class_names: a name for each class; "class 0", ... where none are known.
        metadata: `thing_classes`, for detectron2's `Visualizer`.

    Raises:
        FileNotFoundError: the config or the weights do not exist.
        ValueError: no weights are given, they do not fit the model, or the config is unfit.
    """

    def __init__(
        self,
        config: str | Path | CfgNode | DictConfig | None = None,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        score_threshold: float | None = None,
        *,
        amp: bool = False,
        batch_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if weights is None and isinstance(config, (str, Path)) and Path(config).is_dir():
            config, weights = None, config
        config = load_config(config, weights)
        build = _from_lazy if isinstance(config, DictConfig) else _from_cfg
        self.model, default_weights, self._augmentations, self._format, names = build(
            config, device
        )
        if not (weights or default_weights):
            raise ValueError("no weights are given, and the config names none (MODEL.WEIGHTS)")
        loaded = load_trained(self.model, weights or default_weights)
        self.model.eval()
        names = load_class_names(Path(loaded).parent) or names
        count = _num_classes(self.model) or len(names)
        self.class_names = fill_up(names, count)
        self.metadata = Metadata(thing_classes=self.class_names)
        self.device = next(self.model.parameters()).device
        self.score_threshold = score_threshold
        self._amp = amp
        self.batch_size = batch_size

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Detect objects in one image or several.

        Args:
            images: an array (H, W, 3) in BGR order; also (H, W), (H, W, 1) and (H, W, 4), whose
                transparency is ignored; uint8, or float from 0 to 255. Or the path of an image
                file. Or a sequence of such.

        Returns:
            For one image, detectron2's output: {"instances": Instances} in the image's own pixels,
            on the model's device. For several, a list of those.

        Raises:
            ValueError: not an image, an empty one, or one with NaN or infinite values.
            FileNotFoundError: a path that does not exist.
        """
        single = isinstance(images, (np.ndarray, str, Path))
        listed: Any = [images] if single else images
        outputs: list[dict[str, Any]] = []
        for start in range(0, len(listed), self.batch_size):
            batch = listed[start : start + self.batch_size]
            inputs = [self._prepare(item, start + i) for i, item in enumerate(batch)]
            outputs += self._predict(inputs)
        return outputs[0] if single else outputs

    def draw(self, image: np.ndarray, instances: Instances, scale: int = 1) -> np.ndarray:
        """Draw detections on a copy of an image, labelled with class and class score | mask score.

        Args:
            image: (H, W, 3) uint8, BGR.
            instances: detections in it, as returned by calling the predictor.
            scale: how much larger `image` is than the one that was predicted.
        """
        instances = instances.to("cpu")
        classes = instances.pred_classes.tolist()
        scores = instances.scores.tolist()
        ranks = (
            instances.mask_scores.tolist() if instances.has("mask_scores") else [None] * len(scores)
        )
        labels = [
            score_label(self.class_names[index], score, rank)
            for index, score, rank in zip(classes, scores, ranks, strict=True)
        ]
        masks = None
        if instances.has("pred_masks"):
            masks = [
                mask if scale == 1 else mask.repeat(scale, axis=0).repeat(scale, axis=1)
                for mask in instances.pred_masks.numpy()
            ]
        boxes = instances.pred_boxes.tensor.numpy() * scale
        return draw_objects(image, boxes, classes, labels, masks)

    def _prepare(self, item: ImageLike, position: int) -> dict[str, Any]:
        image = load_image(item, f"image {position}")
        height, width = image.shape[:2]
        if self._format == "RGB":
            image = image[:, :, ::-1]
        resized = T.AugInput(image)
        self._augmentations(resized)
        pixels = np.ascontiguousarray(resized.image.transpose(2, 0, 1).astype(np.float32))
        return {"image": torch.from_numpy(pixels), "height": height, "width": width}

    def _predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        # Not inference_mode: its tensors could not be changed in place by the caller.
        with torch.no_grad(), torch.autocast(self.device.type, dtype=half, enabled=self._amp):
            outputs = self.model(inputs)
        for output in outputs:
            if "instances" not in output:
                continue
            found = in_float32(output["instances"])
            if self.score_threshold is not None:
                found = found[found.scores >= self.score_threshold]
            output["instances"] = found
        return outputs


def load_image(item: ImageLike, name: str = "image") -> np.ndarray:
    """An image as (H, W, 3) in BGR order, uint8 or float32; see `Predictor.__call__`.

    Args:
        item: an array or the path of an image file.
        name: what to call it in errors.

    Raises:
        ValueError: not an image, an empty one, or one with NaN or infinite values.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(item, (str, Path)):
        if not Path(item).is_file():
            raise FileNotFoundError(f"image {item} does not exist")
        try:
            return read_image(str(item), format="BGR")
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{item} cannot be read as an image: {error}") from error
    if not isinstance(item, np.ndarray):
        raise ValueError(f"{name}: an array or a path is needed, not {type(item).__name__}")
    image = item[:, :, None] if item.ndim == 2 else item
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"{name}: shape {item.shape} is not (H, W), or (H, W, C) with 1, 3, 4 C")
    if image.size == 0:
        raise ValueError(f"{name}: shape {item.shape} has no pixels")
    if image.shape[2] != 3:
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"{name}: {image.dtype} is neither uint8 nor float from 0 to 255")
    if not np.isfinite(image).all():
        raise ValueError(f"{name}: has NaN or infinite values")
    return image.astype(np.float32)


def load_config(
    config: str | Path | CfgNode | DictConfig | None, weights: str | Path | None
) -> CfgNode | DictConfig:
    """The config that `Predictor` uses for these arguments."""
    if isinstance(config, (CfgNode, DictConfig)):
        return config
    if config is None:
        if not weights:
            raise ValueError("a config or weights are needed")
        config = Path(find_weights(weights)).parent / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"no config is given, and {config} does not exist")
    if str(config).endswith(".py"):
        return LazyConfig.load(str(config))
    return get_cfg(config)


# What a predictor needs of either kind of config.
_Parts = tuple[nn.Module, str, T.AugmentationList, str, list[str]]


def _from_cfg(cfg: CfgNode, device: str | torch.device | None) -> _Parts:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = _choose_device(device, cfg.MODEL.DEVICE)
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    resize = T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)
    return (
        build_model(cfg),
        cfg.MODEL.WEIGHTS,
        T.AugmentationList([resize]),
        cfg.INPUT.FORMAT,
        names_from_datasets(cfg),
    )


def _from_lazy(cfg: DictConfig, device: str | torch.device | None) -> _Parts:
    train = cfg.get("train") or {}
    model = instantiate(cfg.model).to(_choose_device(device, train.get("device") or "cuda"))
    mapper = ((cfg.get("dataloader") or {}).get("test") or {}).get("mapper") or {}
    augmentations = [instantiate(item) for item in mapper.get("augmentations") or []]
    if not augmentations:  # detectron2's usual test size
        augmentations = [T.ResizeShortestEdge([800, 800], 1333)]
    return (
        model,
        train.get("init_checkpoint") or "",
        T.AugmentationList(augmentations),
        mapper.get("image_format") or getattr(model, "input_format", None) or "BGR",
        [],
    )


def _choose_device(wanted: str | torch.device | None, configured: str) -> str:
    if wanted is not None:
        return str(wanted)
    return configured if torch.cuda.is_available() else "cpu"


def _num_classes(model: nn.Module) -> int:
    heads = getattr(model, "roi_heads", None) or getattr(model, "head", None)
    return int(getattr(heads, "num_classes", 0) or getattr(model, "num_classes", 0) or 0)
