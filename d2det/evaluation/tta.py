"""Evaluation with test-time augmentation, and what it costs."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from detectron2.data.transforms import AugInput, ResizeShortestEdge
from detectron2.utils import comm
from torch import nn

from d2det.modeling.tta import build_tta, merges_candidates

from .build import build_evaluator, inference_folder

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from detectron2.engine import DefaultTrainer

_TIMED = 5  # images on which the plain model is run as well, to compare

_logger = logging.getLogger(__name__)


def evaluate_with_tta(
    trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module
) -> dict[str, dict[str, Any]]:
    """Evaluate with test-time augmentation, as TEST.AUG describes it, and log what it costs.

    D2Det's views are merged before soft-NMS (`d2det.modeling.tta.D2DetWithTTA`), and made of images
    at their original size. Other models have detectron2's `GeneralizedRCNNWithTTA`. Predictions are
    written to `OUTPUT_DIR/inference_TTA/<data set>/`.

    Returns:
        As `trainer.test`, every key followed by "_TTA".

    Raises:
        ValueError: a model that detectron2's test-time augmentation does not serve.
    """
    _logger.info("Evaluating with test-time augmentation ...")
    evaluators = [
        build_evaluator(cfg, name, inference_folder(cfg, name, augmented=True))
        for name in cfg.DATASETS.TEST
    ]
    measured = MeasuredTTA(cfg, model)
    if merges_candidates(model):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # the loader leaves the images as they are
    results = trainer.test(cfg, measured, evaluators)
    measured.report()
    return {f"{name}_TTA": value for name, value in results.items()}


class MeasuredTTA(nn.Module):
    """The augmented model, timed beside the plain one on the first images.

    Args:
        cfg: TEST.AUG and INPUT describe the views and the plain test.
        model: the plain model.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__()
        self.plain = getattr(model, "module", model)
        self.augmented = build_tta(cfg, model)
        self._short, self._long = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._aug = cfg.TEST.AUG
        self._seconds: list[tuple[float, float]] = []  # an image: augmented, plain
        self._pixels = [0, 0]  # augmented, plain
        self._reported = False

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(self._seconds) > _TIMED:
            self.report()
            return self.augmented(inputs)
        outputs = []
        for item in inputs:
            self._count(item["height"], item["width"])
            start = self._now()
            outputs += self.augmented([item])
            middle = self._now()
            self._plain(item)
            self._seconds.append((middle - start, self._now() - middle))
        return outputs

    def report(self) -> None:
        """Log the cost in one line, once, in the main process."""
        if self._reported or not self._seconds:
            return
        self._reported = True
        # The first image pays for warming up.
        timed = self._seconds[1:] or self._seconds
        augmented, plain = (sum(seconds) / len(timed) for seconds in zip(*timed, strict=True))
        sizes = ", ".join(str(size) for size in self._aug.MIN_SIZES)
        flips = ", each mirrored too" if self._aug.FLIP else ""
        if comm.is_main_process():
            _logger.info(
                f"Test-time augmentation: {self._num_views} views an image (shorter sides {sizes}"
                f"{flips}), {self._pixels[0] / max(1, self._pixels[1]):.1f} times the pixels of "
                f"the single-scale test; {augmented:.2f} s an image beside {plain:.2f} s "
                f"({augmented / plain:.1f} times; mean of {len(timed)})."
            )

    @property
    def _num_views(self) -> int:
        return len(self._aug.MIN_SIZES) * (2 if self._aug.FLIP else 1)

    def _count(self, height: int, width: int) -> None:
        for short in self._aug.MIN_SIZES:
            new = ResizeShortestEdge.get_output_shape(height, width, short, self._aug.MAX_SIZE)
            self._pixels[0] += new[0] * new[1] * (2 if self._aug.FLIP else 1)
        plain = (height, width)
        if self._short > 0:
            plain = ResizeShortestEdge.get_output_shape(height, width, self._short, self._long)
        self._pixels[1] += plain[0] * plain[1]

    def _plain(self, item: dict[str, Any]) -> None:
        resized = AugInput(item["image"].permute(1, 2, 0).numpy())
        ResizeShortestEdge([self._short] * 2, self._long)(resized)
        image = torch.as_tensor(resized.image.transpose(2, 0, 1).copy())
        self.plain([{**item, "image": image}])

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
