"""Checkpoints and evaluation during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from d2det.engine.checkpoint import Checkpointer
from d2det.engine.resume import get_rng_state, preserved_rng

logger = logging.getLogger(__name__)


class PeriodicCheckpoint(HookBase):
    """Writes model_<iteration>.pth every `period` iterations (0: never) and model_final.pth.

    To be registered in all processes, as each one's generator states go into the file.
    """

    def __init__(self, checkpointer: Checkpointer, period: int) -> None:
        self._checkpointer = checkpointer
        self._period = period

    def after_step(self) -> None:
        self._save(self._due())

    def save_again(self) -> None:
        """Write the file to resume from once more, if this iteration has one."""
        self._save(self._due()[-1:])

    def _due(self) -> list[str]:
        done = self.trainer.iter + 1
        names = [f"model_{done - 1:07d}"] if self._period > 0 and done % self._period == 0 else []
        return names + (["model_final"] if done == self.trainer.max_iter else [])

    def _save(self, names: list[str]) -> None:
        if names:
            self.trainer.rng_states = comm.all_gather(get_rng_state())
        for name in names:
            self._checkpointer.save(name, iteration=self.trainer.iter)


class BestCheckpoint:
    """Keeps the weights with the highest value of one metric as model_best.pth.

    The file holds weights only and is never one to resume from.

    Args:
        checkpointer: writes the file.
        metric: flattened name, such as "bbox/AP"; with several test sets, of the first one unless
            the name starts with that of a set.
        datasets: names of the test sets.
    """

    def __init__(
        self, checkpointer: Checkpointer, metric: str, datasets: tuple[str, ...] = ()
    ) -> None:
        self._checkpointer = checkpointer
        self._names = [metric, *(f"{name}/{metric}" for name in datasets[:1])]
        self.value = -math.inf
        self.iteration = -1

    def update(self, results: dict[str, float], iteration: int) -> None:
        """Compare flattened results with the best so far; the main process calls this."""
        found = [results[name] for name in self._names if name in results]
        if not found:
            logger.warning(
                "SOLVER.BEST_CHECKPOINT %r is not among the results, so no best checkpoint is kept "
                "now. There are: %s",
                self._names[0],
                ", ".join(results) or "none",
            )
        elif found[0] > self.value:  # false for NaN
            self.value, self.iteration = found[0], iteration
            logger.info("Best %s so far: %.4f. Saving it.", self._names[0], self.value)
            self._checkpointer.save(
                "model_best",
                tag=False,
                only_model=True,
                iteration=iteration,
                metric={self._names[0]: self.value},
            )

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.iteration = state["value"], state["iteration"]


class Evaluation(HookBase):
    """Evaluates every `period` iterations (0: only at the end), without touching the training.

    A checkpoint of the same iteration is written before, so that a failing evaluation costs no
    training, and again after, so that it knows the best value. If the training was killed between
    the two, the evaluation is made up for when it is resumed. A training that is resumed after its
    last iteration is evaluated only.

    Args:
        period: in iterations.
        evaluate: returns results as detectron2's `test` does; called in all processes.
        checkpoints: the hook that writes checkpoints, registered before this one.
        best: keeps the best weights, if wanted.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        checkpoints: PeriodicCheckpoint,
        best: BestCheckpoint | None = None,
    ) -> None:
        self._period = period
        self._evaluate = evaluate
        self._checkpoints = checkpoints
        self._best = best
        self._evaluated = 0  # iterations done at the last evaluation

    def before_train(self) -> None:
        start = self.trainer.start_iter
        made_up_for = start > 0 and self._evaluated < start and self._is_due(start)
        if made_up_for or start >= self.trainer.max_iter:
            self._run(start)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._is_due(done):
            self._run(done)
            self._checkpoints.save_again()

    def _is_due(self, done: int) -> bool:
        return done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0)

    def _run(self, done: int) -> None:
        with preserved_rng():
            results = self._evaluate() or {}
        if comm.is_main_process():
            flat = {name: float(v) for name, v in flatten_results_dict(results).items()}
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
            if self._best is not None and flat:
                self._best.update(flat, done - 1)
        self._evaluated = done
        comm.synchronize()  # evaluation takes processes different times

    def state_dict(self) -> dict[str, Any]:
        state = {"evaluated": self._evaluated}
        return state | ({"best": self._best.state_dict()} if self._best is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated = state["evaluated"]
        if self._best is not None and "best" in state:
            self._best.load_state_dict(state["best"])


class PreciseBN(hooks.PreciseBN):
    """detectron2's hook, always on the same first images and without touching the training."""

    def update_stats(self) -> None:
        self._data_iter = None
        with preserved_rng():
            super().update_stats()
