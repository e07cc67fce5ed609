"""A yaml config as a detectron2 LazyConfig.

The model is one call of `calls.build_model` with the yaml's keys rather than a tree of calls with
explicit arguments: it is the yaml's model by construction, for every architecture, and each key is
overridden by its documented name. Optimizer, schedule and test data are detectron2's own calls.
"""

from __future__ import annotations

import math
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig

from d2det.model_zoo import calls

_CFG = "${model.cfg}"
# detectron2 offers torchvision's weights in its own form, which its checkpointer can read.
_IN_DETECTRON2 = {
    "torchvision://resnet50": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "torchvision://resnet101": "detectron2://ImageNetPretrained/torchvision/R-101.pkl",
}


def to_lazy(cfg: CfgNode) -> DictConfig:
    """See `d2det.model_zoo.get_lazy_config`.

    Raises:
        ValueError: the config has something that only d2det's trainer does.
    """
    _check(cfg)
    content = {
        "model": L(calls.build_model)(cfg=_plain(cfg)),
        "dataloader": _dataloader(cfg),
        "optimizer": _optimizer(cfg),
        "lr_multiplier": _lr_multiplier(cfg),
        "train": _train(cfg),
    }
    return DictConfig(content, flags={"allow_objects": True})


def _check(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    clip = solver.CLIP_GRADIENTS
    unfit = {
        f"SOLVER.ACCUMULATE {solver.ACCUMULATE}": solver.ACCUMULATE != 1,
        f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE}": clip.ENABLED
        and clip.CLIP_TYPE != "full_model",
        "SOLVER.BIAS_LR_FACTOR beside SOLVER.OFFSET_LR_FACTOR": solver.BIAS_LR_FACTOR != 1
        and solver.OFFSET_LR_FACTOR != 1,
        f"SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}": solver.LR_SCHEDULER_NAME
        not in ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPolyLR"),
        "SOLVER.POLY_LR_CONSTANT_ENDING": solver.POLY_LR_CONSTANT_ENDING != 0,
        "TEST.PRECISE_BN.ENABLED": cfg.TEST.PRECISE_BN.ENABLED,
        "TEST.AUG.ENABLED": cfg.TEST.AUG.ENABLED,
    }
    found = [key for key, is_unfit in unfit.items() if is_unfit]
    if found:
        raise ValueError(f"no LazyConfig has a counterpart of {', '.join(found)}: use train_net.py")


def _plain(cfg: CfgNode) -> dict[str, Any]:
    """Nested dicts of the keys, without those that the LazyConfig has elsewhere."""
    content = {
        key: _plain(value) if isinstance(value, CfgNode) else value
        for key, value in cfg.items()
        if key not in calls.ELSEWHERE
    }
    if "META_ARCHITECTURE" in content:
        content = {k: v for k, v in content.items() if f"MODEL.{k}" not in calls.ELSEWHERE}
    return content


def _dataloader(cfg: CfgNode) -> dict[str, Any]:
    loaders: dict[str, Any] = {
        "train": L(calls.build_train_loader)(
            cfg=_CFG, total_batch_size=cfg.SOLVER.IMS_PER_BATCH, seed="${train.seed}"
        )
    }
    if not cfg.DATASETS.TEST:
        return loaders
    loaders["test"] = L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names="${model.cfg.DATASETS.TEST[0]}", filter_empty=False
        ),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length="${model.cfg.INPUT.MIN_SIZE_TEST}",
                    max_size="${model.cfg.INPUT.MAX_SIZE_TEST}",
                    sample_style="choice",
                )
            ],
            image_format="${model.cfg.INPUT.FORMAT}",
        ),
        num_workers="${model.cfg.DATALOADER.NUM_WORKERS}",
    )
    loaders["evaluator"] = L(calls.build_evaluator)(
        cfg=_CFG, dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}"
    )
    return loaders


def _optimizer(cfg: CfgNode) -> DictConfig:
    solver = cfg.SOLVER
    params: dict[str, Any] = {
        # params.model is set by the training script.
        "base_lr": "${..lr}",
        "weight_decay_norm": solver.WEIGHT_DECAY_NORM,
        "bias_lr_factor": solver.BIAS_LR_FACTOR,
        "weight_decay_bias": solver.WEIGHT_DECAY_BIAS,
    }
    if solver.OFFSET_LR_FACTOR != 1:
        params["lr_factor_func"] = L(calls.OffsetLrFactor)(factor=solver.OFFSET_LR_FACTOR)
    arguments: dict[str, Any] = {
        "params": L(get_default_optimizer_params)(**params),
        "lr": solver.BASE_LR,
        "momentum": solver.MOMENTUM,
        "nesterov": solver.NESTEROV,
        "weight_decay": solver.WEIGHT_DECAY,
    }
    clip = solver.CLIP_GRADIENTS
    if not clip.ENABLED:
        return L(torch.optim.SGD)(**arguments)
    return L(calls.ClippedSGD)(**arguments, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)


def _lr_multiplier(cfg: CfgNode) -> DictConfig:
    solver = cfg.SOLVER
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return L(calls.WarmupPolynomial)(
            power=solver.POLY_LR_POWER,
            warmup_factor=solver.WARMUP_FACTOR,
            warmup_length=warmup,
            warmup_method=solver.WARMUP_METHOD,
        )
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        scheduler = L(CosineParamScheduler)(
            start_value=1.0, end_value=solver.BASE_LR_END / solver.BASE_LR
        )
    else:
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        scheduler = L(MultiStepParamScheduler)(
            values=[math.pow(solver.GAMMA, k) for k in range(len(steps) + 1)],
            milestones=steps,
            num_updates=solver.MAX_ITER,
        )
    return L(WarmupParamScheduler)(
        scheduler=scheduler,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=warmup,
        warmup_method=solver.WARMUP_METHOD,
        rescale_interval=solver.RESCALE_INTERVAL,
    )


def _train(cfg: CfgNode) -> dict[str, Any]:
    return {
        "output_dir": cfg.OUTPUT_DIR,
        "init_checkpoint": _IN_DETECTRON2.get(cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS),
        "max_iter": cfg.SOLVER.MAX_ITER,
        "amp": {"enabled": cfg.SOLVER.AMP.ENABLED},
        "ddp": {
            "broadcast_buffers": False,
            "find_unused_parameters": False,
            "fp16_compression": False,
        },
        "checkpointer": {"period": cfg.SOLVER.CHECKPOINT_PERIOD, "max_to_keep": 100},
        "eval_period": cfg.TEST.EVAL_PERIOD,
        "log_period": 20,
        "device": cfg.MODEL.DEVICE,
        "seed": cfg.SEED,
        "cudnn_benchmark": cfg.CUDNN_BENCHMARK,
        "float32_precision": cfg.FLOAT32_PRECISION,
    }
