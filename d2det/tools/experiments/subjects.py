"""The models whose speed is measured, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import cycle, islice, repeat
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from d2det.engine.amp import autocast
from d2det.engine.arguments import argument_parser
from d2det.engine.setup import prepare
from d2det.engine.step import StepTrainer
from d2det.engine.trained import last_checkpoint, load_trained
from d2det.engine.trainer import Trainer
from d2det.tools.count import count

from .experiment import Method
from .folders import Run

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
INFERENCE, TRAINING = "inference", "training"


def available_precisions(device: str) -> list[str]:
    """Precisions that a device can both train and predict in."""
    if not device.startswith("cuda"):
        return ["float32", "bfloat16"]
    return ["float32", *["bfloat16"] * torch.cuda.is_bf16_supported(), "float16"]


def method_config(method: Method, train_args: Sequence[str], device: str) -> CfgNode:
    """A method's frozen config, checked, with its data sets registered.

    Raises:
        d2det.engine.setup.InputError: data or weights that the config names are missing.
    """
    given = ["--config-file", method.config, *train_args, *method.overrides]
    return prepare(argument_parser().parse_args([*given, "MODEL.DEVICE", device]))


class Subject:
    """A method's model on a device, with images to predict and to train on.

    Args:
        name: the method's.
        cfg: as `method_config` returns it.
        weights: a checkpoint; "": the model is as it starts.
        images: images of each kind that are kept, the most a batch has.
        training: whether training will be measured.
    """

    def __init__(
        self, name: str, cfg: CfgNode, weights: str, images: int, *, training: bool
    ) -> None:
        self.name = name
        self.cfg = cfg
        torch.manual_seed(0)
        self.model = Trainer.build_model(cfg)
        if weights:
            load_trained(self.model, weights)
        loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
        self.test_images = _take((sample for batch in loader for sample in batch), images)
        self.train_images: list[dict[str, Any]] = []
        if training:
            batches = iter(Trainer.build_train_loader(cfg))
            self.train_images = _take((sample for batch in batches for sample in batch), images)

    def call(self, phase: str, batch: int, precision: str) -> Callable[[], Any]:
        """A function that does one inference, or one step of training, on `batch` images."""
        if phase == INFERENCE:
            return self._inference(batch, PRECISIONS[precision])
        return self._step(batch, PRECISIONS[precision])

    def _inference(self, batch: int, dtype: torch.dtype | None) -> Callable[[], Any]:
        inputs = self.test_images[:batch]
        device = next(self.model.parameters()).device
        self.model.eval()

        def infer() -> Any:
            with torch.no_grad(), autocast(device, dtype) if dtype else nullcontext():
                return self.model(inputs)

        return infer

    def _step(self, batch: int, dtype: torch.dtype | None) -> Callable[[], Any]:
        optimizer = Trainer.build_optimizer(self.cfg, self.model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # all the work, but the weights stay: later figures are of the same
        self.model.train()
        trainer = StepTrainer(self.model, repeat(self.train_images[:batch]), optimizer, dtype=dtype)

        def step() -> None:
            with EventStorage():
                trainer.iter = 0
                trainer.run_step()
            optimizer.zero_grad()  # gradients count as memory that a step takes

        return step

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers, which training changes even at a rate of 0."""
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def restore(self, buffers: dict[str, torch.Tensor]) -> None:
        """Undo what training has done since `snapshot`."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])


def trained_weights(runs: Sequence[Run], method: Method) -> str:
    """The last checkpoint of a method's first run that has one; "" where none has."""
    for run in runs:
        if run.method.name == method.name:
            for file in last_checkpoint(run.folder):
                if file.is_file():
                    return str(file)
    return ""


def count_model(cfg: CfgNode) -> dict[str, Any]:
    """Parameters and multiply-adds at the config's test size; "note" where they cannot be had."""
    height, width = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    size = f"{height} x {width}"
    try:
        found = count(cfg, height, width)
    except Exception as error:  # a model of another architecture than the counter knows
        return {"size": size, "note": f"not counted: {type(error).__name__}: {error}"[:200]}
    return {
        "size": size,
        "parameters": found.parameters,
        "products": found.products,
        "sampling": found.sampling,
    }


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _take(samples: Any, number: int) -> list[dict[str, Any]]:
    found = list(islice(samples, number))
    if not found:
        raise ValueError("the data set has no images to measure with")
    return list(islice(cycle(found), number))
