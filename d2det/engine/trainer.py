"""The trainer: detectron2's, made exact to resume, and fit for CPUs and several processes."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.evaluation.evaluator import inference_context
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from d2det.engine.amp import amp_dtype, autocast_calls
from d2det.engine.checkpoint import Checkpointer
from d2det.engine.hooks import BestCheckpoint, Evaluation, PeriodicCheckpoint, PreciseBN
from d2det.engine.loader import TrainLoader, build_train_loader
from d2det.engine.optimizer import scale_offset_lr
from d2det.engine.resume import keep_earlier, set_rng_state, trim_metrics
from d2det.engine.step import StepTrainer, distribute, share_buffers

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates what a config describes.

    As detectron2's `DefaultTrainer`, but: a training that was killed and is resumed equals one that
    was not, bit for bit on a CPU; mixed precision and several processes work on CPUs too; gradients
    can be accumulated (SOLVER.ACCUMULATE); a loss that is not finite is reported with its images;
    checkpoints are atomic and the best one is kept (SOLVER.BEST_CHECKPOINT).

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes "full_model" beside detectron2's "value" and "norm": the
    norm of all gradients together, where "norm" bounds each parameter's by itself.

    Args:
        cfg: a config with d2det's keys. All processes of a run build the trainer together.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's: it hands device_ids to the wrapper for several processes.
        TrainerBase.__init__(self)
        for name in ("detectron2", "d2det"):
            if not logging.getLogger(name).hasHandlers():
                setup_logger(name=name, distributed_rank=comm.get_rank())
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        self._trainer = StepTrainer(
            distribute(model),
            self.build_train_loader(cfg),
            optimizer,
            accumulate=cfg.SOLVER.ACCUMULATE,
            dtype=amp_dtype(cfg, next(model.parameters()).device),
            max_grad_norm=clip.CLIP_VALUE if _clips_full_model(cfg) else None,
            norm_type=clip.NORM_TYPE,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.rng_states: list[dict[str, Any]] = []  # one a process, for the next checkpoint
        self._resumed_rng: dict[str, Any] | None = None
        self._last_eval_results: dict[str, Any] = {}
        self.register_hooks(self.build_hooks())

    @property
    def last_eval_results(self) -> dict[str, Any]:
        """Results of the last evaluation, in the main process; empty before the first."""
        return self._last_eval_results

    def resume_or_load(self, resume: bool | str = "no") -> None:
        """Go on from the last checkpoint in OUTPUT_DIR, or start from MODEL.WEIGHTS.

        Args:
            resume: "no", "must" or "auto"; see `Checkpointer.resume_or_load`, also for the errors.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1  # the checkpoint names the last finished iteration

    def train(self) -> dict[str, Any]:
        """Train, evaluating as TEST.EVAL_PERIOD says and at the end.

        Returns:
            The last evaluation's results, in the main process.
        """
        TrainerBase.train(self, self.start_iter, self.max_iter)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def before_train(self) -> None:
        if comm.is_main_process():
            if self.start_iter == 0:
                keep_earlier(self.cfg.OUTPUT_DIR)
            trim_metrics(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
        super().before_train()
        if self._resumed_rng is not None:  # last, as anything above may draw random numbers
            set_rng_state(self._resumed_rng)
            self._resumed_rng = None

    def build_hooks(self) -> list[HookBase | None]:
        cfg = self.cfg
        checkpoints = PeriodicCheckpoint(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        best = None
        if cfg.SOLVER.BEST_CHECKPOINT:
            best = BestCheckpoint(self.checkpointer, cfg.SOLVER.BEST_CHECKPOINT, cfg.DATASETS.TEST)
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._precise_bn(),
            checkpoints,
            Evaluation(cfg.TEST.EVAL_PERIOD, self._evaluation(), checkpoints, best),
            hooks.PeriodicWriter(self.build_writers()) if comm.is_main_process() else None,
        ]

    def _precise_bn(self) -> HookBase | None:
        if not self.cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)  # its own, so that training's position stays
        return PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluation(self) -> Callable[[], dict[str, Any]]:
        trainer = weakref.proxy(self)  # hooks must not own the trainer

        def evaluate() -> dict[str, Any]:
            trainer._last_eval_results = trainer.test(trainer.cfg, trainer.model)
            return trainer._last_eval_results

        return evaluate

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "rng": self.rng_states}
        if isinstance(self.data_loader, TrainLoader):
            state["data"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if isinstance(self.data_loader, TrainLoader) and "data" in state_dict:
            self.data_loader.load_state_dict(state_dict["data"])
        rng = state_dict.get("rng", [])
        if len(rng) == comm.get_world_size():
            self._resumed_rng = rng[comm.get_rank()]
        else:
            logger.warning(
                "The checkpoint has the random states of %d processes, this run has %d: training "
                "goes on, but not bit for bit as without the interruption.",
                len(rng),
                comm.get_world_size(),
            )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if _clips_full_model(cfg):  # done in the step; detectron2 does not know it
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)
        scale_offset_lr(optimizer, model, cfg.SOLVER.OFFSET_LR_FACTOR)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """detectron2's, and DeepLab's "WarmupPolyLR"."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        from d2det.evaluation import build_evaluator

        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate on all of DATASETS.TEST, in the precision that SOLVER.AMP asks for.

        Args:
            cfg: as for training.
            model: with the weights to evaluate, the same in all processes. Its mode is left as it
                was; its buffers become those of the first process.
            evaluators: one for each test set; None: `build_evaluator`'s.

        Returns:
            Results by task and metric; with several test sets, by data set first.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module
        share_buffers(model)
        device = next(model.parameters()).device
        with inference_context(model):
            call = autocast_calls(model, device, amp_dtype(cfg, device))
            return super().test(cfg, call, evaluators)


def _clips_full_model(cfg: CfgNode) -> bool:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE == "full_model"
