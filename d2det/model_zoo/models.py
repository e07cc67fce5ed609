"""Names, configs and models of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2det.model_zoo.weights import fetch, pretrained

if TYPE_CHECKING:
    import torch
    from detectron2.config import CfgNode
    from omegaconf import DictConfig
    from torch import nn


def names() -> list[str]:
    """Names of all configs that are installed, or in the clone: "COCO-Detection/...", ..."""
    from d2det.engine.configs import config_names

    return config_names()


def get_config(name: str | Path) -> CfgNode:
    """A config by name; the same as `d2det.get_cfg(name)`.

    Args:
        name: of `names()`, or the path of a yaml file.

    Raises:
        FileNotFoundError: no such config; the message lists close matches.
        ValueError: a LazyConfig, or a file with unknown keys or unfit values.
    """
    import d2det

    return d2det.get_cfg(name)


def get_lazy_config(name: str | Path) -> DictConfig:
    """A yaml config as a LazyConfig: the same model, data, optimizer and schedule.

    It has what detectron2's `tools/lazyconfig_train_net.py` reads: `model`, `dataloader`,
    `optimizer`, `lr_multiplier` and `train`. The yaml's keys that make the model and its data are
    in `model.cfg` (`model.cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3`); an argument of the meta
    architecture replaces what they build (`model.backbone = LazyCall(...)(...)`). Those of SOLVER
    are `optimizer`, `lr_multiplier`, `train` and `dataloader.train.total_batch_size`.

    Args:
        name: of `names()`, or the path of a yaml file.

    Returns:
        The whole: its parts refer to each other, so take the model alone, or all of it.

    Raises:
        FileNotFoundError: no such config; the message lists close matches.
        ValueError: an unfit file, or one with something that only d2det's trainer does.
    """
    cfg = get_config(name)
    from d2det.model_zoo.lazy import to_lazy

    return to_lazy(cfg)


def get(
    name: str | Path,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    sha256: str | None = None,
    overrides: Sequence[Any] = (),
) -> nn.Module:
    """Build a model, in evaluation mode.

    Args:
        name: of `names()`, or the path of a yaml file.
        weights: None: random values, nothing is read or downloaded. Else weights of the whole
            model: a file, an output folder (its best checkpoint, else its last), an http(s) or
            file address, which needs `sha256`, or "pretrained": the project's own.
        device: e.g. "cpu" or "cuda:1". None: the config's, or the CPU where there is no GPU.
        sha256: 64 hexadecimal digits that the file must have; see `fetch`.
        overrides: KEY, VALUE, KEY, VALUE, ... of the config.

    Raises:
        FileNotFoundError: no such config or weights.
        LookupError: "pretrained", and the project publishes no weights of this model.
        ValueError: the weights do not fit the model or the hash, or the overrides the config.
        RuntimeError: the weights cannot be downloaded or read.
    """
    if weights == "pretrained":
        entry = pretrained(_zoo_name(name))
        weights, sha256 = entry.url, entry.sha256
    if weights is None and sha256 is not None:
        raise ValueError("sha256 is given without weights")
    cfg = get_config(name)

    from detectron2.modeling import build_model

    from d2det.engine.configs import merge_overrides
    from d2det.engine.setup import use_available_device
    from d2det.engine.trained import find_weights, load_trained

    merge_overrides(cfg, overrides)
    if device is not None:
        cfg.MODEL.DEVICE = str(device)
    else:
        use_available_device(cfg)
    # Before the model, which takes longer: a wrong path or hash is known at once.
    file = None if weights is None else fetch(find_weights(weights), sha256)
    model = build_model(cfg).eval()
    if file is not None:
        load_trained(model, file)
    return model


def _zoo_name(name: str | Path) -> str:
    return str(name).removeprefix("configs/").removesuffix(".yaml")
