"""Training and evaluation by Lightning and torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

try:
    import lightning as L
    from torchmetrics.detection import MeanAveragePrecision
except ImportError as error:
    raise ImportError(
        "training on torchvision's host needs Lightning and torchmetrics: pip install "
        "'d2det[torchvision]'"
    ) from error


class DetectorModule(L.LightningModule):
    """A torchvision detector with SGD, warm-up and steps; evaluated as COCO does.

    Args:
        model: takes images and targets, gives losses or predictions.
        lr: after warm-up.
        max_steps: of the training; the rate falls to a tenth after 77 % and 92 % of them.
        warmup_steps: over which the rate rises linearly from a hundredth.
        class_names: for AP by class.
        masks: evaluate masks too, ranked by "mask_scores" where the model gives them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        max_steps: int,
        warmup_steps: int,
        class_names: list[str],
        masks: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.class_names = class_names
        self.metrics: Any = nn.ModuleDict({"bbox/": MeanAveragePrecision(class_metrics=True)})
        if masks:
            self.metrics["segm/"] = MeanAveragePrecision(iou_type="segm", class_metrics=True)
        metric: Any
        for metric in self.metrics.values():
            metric.warn_on_many_detections = False

    def training_step(self, batch: tuple[list[Tensor], list[Any]], index: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        total = sum(losses.values())
        assert isinstance(total, Tensor)
        if not torch.isfinite(total):
            values = {name: float(value) for name, value in losses.items()}
            raise FloatingPointError(f"the loss is not finite at step {self.global_step}: {values}")
        self.log_dict(losses, batch_size=len(images))
        self.log("loss", total, prog_bar=True, batch_size=len(images))
        return total

    def validation_step(self, batch: tuple[list[Tensor], list[Any]], index: int) -> None:
        images, targets = batch
        found = self.model(images)
        self.metrics["bbox/"].update(found, targets)
        if "segm/" in self.metrics:
            self.metrics["segm/"].update([_by_mask_score(f) for f in found], targets)

    def on_validation_epoch_end(self) -> None:
        for task, metric in self.metrics.items():
            result = metric.compute()
            metric.reset()
            for theirs, ours in (("map", "AP"), ("map_50", "AP50"), ("map_75", "AP75")):
                self.log(f"{task}{ours}", _percent(result[theirs]), prog_bar=True)
            per_class = result["map_per_class"].reshape(-1).tolist()
            present = result["classes"].reshape(-1).tolist()
            for label, value in zip(present, per_class, strict=True):
                self.log(f"{task}AP-{self.class_names[label - 1]}", _percent(value))

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        schedulers = torch.optim.lr_scheduler
        warmup = schedulers.LinearLR(optimizer, 0.01, total_iters=max(self.warmup_steps, 1))
        milestones = [round(0.77 * self.max_steps), round(0.92 * self.max_steps)]
        steps = schedulers.MultiStepLR(optimizer, milestones)
        schedule = schedulers.ChainedScheduler([warmup, steps], optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _percent(value: Tensor | float) -> float:
    """NaN where there is no ground truth, for which torchmetrics has -1."""
    return math.nan if value < 0 else 100 * float(value)


def _by_mask_score(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predictions of masks: binary, (M, H, W), with the scores that rank them."""
    return {
        "masks": found["masks"][:, 0] > 0.5,
        "labels": found["labels"],
        "scores": found.get("mask_scores", found["scores"]),
    }
