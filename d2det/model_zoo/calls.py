"""What the LazyConfigs of the zoo call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2det.config import add_d2det_config
from d2det.engine.configs import merge_mapping
from d2det.engine.loader import TrainLoader
from d2det.engine.loader import build_train_loader as build_from_cfg

# Keys of a yaml config that are not in `model.cfg`, and where they are instead.
ELSEWHERE = {
    "SOLVER": "optimizer, lr_multiplier, train or dataloader.train.total_batch_size",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "FLOAT32_PRECISION": "train.float32_precision",
}


def read_cfg(content: Mapping[str, Any]) -> CfgNode:
    """detectron2's config from the keys in `model.cfg`; all others have their defaults.

    Raises:
        ValueError: an unknown key, one that a LazyConfig has elsewhere, or a value of the wrong
            type; the message names it.
    """
    if isinstance(content, DictConfig):
        content = cast(dict[str, Any], OmegaConf.to_container(content, resolve=True))
    for key, place in ELSEWHERE.items():
        section, _, last = key.rpartition(".")
        if last in (content.get(section, {}) if section else content):
            raise ValueError(f"model.cfg.{key} is not read: set {place}")
    cfg = add_d2det_config(get_cfg())
    merge_mapping(cfg, content, "model.cfg")
    return cfg


def build_model(cfg: Mapping[str, Any], **parts: Any) -> nn.Module:
    """The model of a config, on the CPU, in training mode.

    Args:
        cfg: keys of a yaml config; see `read_cfg`.
        parts: arguments of the meta architecture that replace those the config gives, e.g.
            `backbone`, `roi_heads` or `pixel_mean`. What they replace is still built, and dropped;
            that the rest fits them is the caller's care.
    """
    read = read_cfg(cfg)
    return META_ARCH_REGISTRY.get(read.MODEL.META_ARCHITECTURE)(read, **parts)


def build_train_loader(
    cfg: Mapping[str, Any],
    total_batch_size: int,
    seed: int = -1,
    mapper: Callable[[dict], dict | None] | None = None,
) -> TrainLoader:
    """d2det's training loader; see `d2det.engine.loader.build_train_loader`."""
    read = read_cfg(cfg)
    read.SOLVER.IMS_PER_BATCH, read.SEED = total_batch_size, seed
    return build_from_cfg(read, mapper)


def build_evaluator(cfg: Mapping[str, Any], dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """d2det's evaluator of a data set; see `d2det.evaluation.build_evaluator`."""
    from d2det.evaluation import build_evaluator as build

    read = read_cfg(cfg)
    read.OUTPUT_DIR = output_dir
    return build(read, dataset_name)


class OffsetLrFactor:
    """By a parameter's name, the factor of its learning rate: see `d2det.engine.optimizer`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, name: str) -> float:
        modules = name.split(".")[:-1]
        return self.factor if any(m.endswith("_offset") for m in modules) else 1.0


class ClippedSGD(torch.optim.SGD):
    """SGD on gradients whose norm, of all together, is bounded.

    Args:
        params: see `torch.optim.SGD`.
        max_norm: the bound.
        norm_type: 2 for the Euclidean norm.
        kwargs: of `torch.optim.SGD`.
    """

    def __init__(self, params: Any, *, max_norm: float, norm_type: float = 2.0, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.max_norm, self.norm_type = max_norm, norm_type

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        return super().step(closure)


class WarmupPolynomial(PolynomialDecayParamScheduler):
    """DeepLab's schedule, (1 - t)^power, times detectron2's warm-up.

    Args:
        power: 0.9 in DeepLab.
        warmup_factor: of the rate at the start.
        warmup_length: of the warm-up, as a part of the training.
        warmup_method: "linear" or "constant".
    """

    def __init__(
        self, power: float, warmup_factor: float, warmup_length: float, warmup_method: str
    ) -> None:
        super().__init__(base_value=1.0, power=power)
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"warmup_method {warmup_method!r} is neither 'linear' nor 'constant'")
        self.warmup_factor, self.warmup_length = warmup_factor, warmup_length
        self.warmup_method = warmup_method

    def __call__(self, where: float) -> float:
        value = super().__call__(where)
        if where >= self.warmup_length:
            return value
        done = where / self.warmup_length if self.warmup_method == "linear" else 0.0
        return value * (self.warmup_factor * (1 - done) + done)
