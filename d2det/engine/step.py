"""One training iteration: accumulated gradients, mixed precision, several processes."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.train_loop import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2det.engine.amp import autocast

_REMEDIES = (
    "Things to try: a lower SOLVER.BASE_LR or a longer SOLVER.WARMUP_ITERS, "
    "SOLVER.CLIP_GRADIENTS.ENABLED True, SOLVER.AMP.PRECISION 'bf16' in place of 'fp16', and a "
    "look at the images above and their boxes. Go on from an earlier checkpoint with --resume."
)


def distribute(model: nn.Module) -> nn.Module:
    """Wrap `model` for training in several processes, on GPUs or CPUs; as it is in a single one.

    Many of detectron2's heads leave out parameters where a process has no positive RoI (D2Det's do
    not), hence `find_unused_parameters`. All processes start from the weights of the first.
    """
    model.register_forward_hook(_connect_losses)
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    )


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, as they are in checkpoints.

    BatchNorm's running statistics follow each process's own images. Training does not read them,
    evaluation does, and its result must not depend on which process sees which image.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _connect_losses(model: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Where no loss depends on any parameter, make them depend on all, with gradient 0.

    Otherwise the backward pass fails, and in several processes the others wait for ever.
    """
    if not model.training or not isinstance(outputs, dict) or not torch.is_grad_enabled():
        return outputs
    if not outputs or any(getattr(loss, "requires_grad", True) for loss in outputs.values()):
        return outputs
    nothing = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
    return {name: loss + nothing for name, loss in outputs.items()}


class StepTrainer(SimpleTrainer):
    """Runs an iteration, which is one step of the optimizer.

    Args:
        model: returns losses by name in training; possibly wrapped by `distribute`.
        data_loader: batches, lists of dicts.
        optimizer: any.
        accumulate: forward and backward passes an iteration; their losses are averaged.
        dtype: half precision of the forward pass, or None. Losses are scaled for float16 alone.
        max_grad_norm: bound on the norm of all gradients together; None: no bound.
        norm_type: which norm.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if accumulate < 1:
            raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, not {accumulate}")
        self.accumulate = accumulate
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.norm_type = norm_type
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Run one iteration.

        Raises:
            FloatingPointError: a loss is not finite; in all processes, before any weight changes.
        """
        if not self.model.training:
            raise RuntimeError("The model is not in training mode: something called eval() on it.")
        self.optimizer.zero_grad()
        passes: list[tuple[dict[str, torch.Tensor], list[str]]] = []
        data_time = 0.0
        for number in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._synchronization(last=number == self.accumulate - 1):
                losses = self._forward(data)
                self.grad_scaler.scale(sum(losses.values()) / self.accumulate).backward()
            passes.append(({k: v.detach() for k, v in losses.items()}, _image_names(data)))
        self.after_backward()
        self._report(passes, data_time)
        self._update()

    def _synchronization(self, *, last: bool) -> Any:
        """Gradients travel between processes in the last pass of an iteration only."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if wrapped and not last else nullcontext()

    def _forward(self, data: Any) -> dict[str, torch.Tensor]:
        try:
            with autocast(self.device, self.dtype):
                losses = self.model(data)
        except FloatingPointError as error:  # detectron2's RPN looks at its own predictions
            raise FloatingPointError(self._complaint(str(error), _image_names(data))) from error
        return losses if isinstance(losses, dict) else {"total_loss": losses}

    def _complaint(self, what: str, images: list[str]) -> str:
        where = f"iteration {self.iter}, process {comm.get_rank()}"
        return f"{what} ({where}).\nImages of the batch: {', '.join(images)}.\n{_REMEDIES}"

    def _report(
        self, passes: list[tuple[dict[str, torch.Tensor], list[str]]], data_time: float
    ) -> None:
        """Write the mean losses of all processes to the event storage, or stop in all of them."""
        mean: dict[str, float] = {}
        problem = None
        for losses, images in passes:
            values = torch.stack([v.float() for v in losses.values()]).tolist()
            for name, value in zip(losses, values, strict=True):
                mean[name] = mean.get(name, 0.0) + value / len(passes)
            if problem is None and not all(map(math.isfinite, values)):
                shown = ", ".join(f"{k} = {v:.4g}" for k, v in zip(losses, values, strict=True))
                problem = self._complaint(f"Training diverged: {shown}", images)
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        reports = comm.all_gather((mean, data_time, problem))
        for *_, their_problem in reports:
            if their_problem is not None:
                raise FloatingPointError(their_problem)
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(seconds for _, seconds, _ in reports))
        names = dict.fromkeys(name for losses, *_ in reports for name in losses)
        total = {n: sum(losses.get(n, 0.0) for losses, *_ in reports) / len(reports) for n in names}
        storage.put_scalar("total_loss", sum(total.values()))
        if len(total) > 1:
            storage.put_scalars(**total)

    def _update(self) -> None:
        if self.max_grad_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm, self.norm_type)
            get_event_storage().put_scalar("grad_norm", norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            theirs = [len(group["params"]) for group in state_dict["optimizer"]["param_groups"]]
            ours = [len(group["params"]) for group in self.optimizer.param_groups]
            raise ValueError(
                f"--resume: the checkpoint's optimizer has groups of {theirs} parameters, this run "
                f"has {ours} ({error}). Use the config of the interrupted training: frozen layers, "
                "weight decay and bias keys decide the groups."
            ) from error
        # Both are empty without float16; a run that changes its precision starts a new scale.
        if state_dict.get("grad_scaler") and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _image_names(data: Any) -> list[str]:
    return [str(d.get("file_name", "?")) if isinstance(d, dict) else "?" for d in data]
