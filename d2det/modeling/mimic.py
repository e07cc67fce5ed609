"""R-CNN feature mimicking for detectron2's R-CNNs (Deformable ConvNets v2, Sec. 3.3).

A meta-architecture, so that it works with D2Det's RoI heads and with detectron2's own alike. All of
it is training: in evaluation mode the model is a `GeneralizedRCNN` and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2det.core.mimicking import REDUCTIONS, ROI_CHOICES, crop_patches, mimic_loss, select_rois
from d2det.modeling.batch import image_index


class FeatureMimicking(nn.Module):
    """The R-CNN branch: settings, and the one layer it does not share with the detector.

    Args:
        in_features: C, features that the box head gives for a RoI.
        num_classes: foreground classes.
        loss_weight: of the mimic loss (paper: 0.1).
        cls_loss_weight: of the classifier's cross-entropy (paper: 0.1).
        crop_size: side of the resized patches.
        num_crops: patches an image, at most.
        rois: "foreground", "background" or "foreground+background".
        reduction: of the mimic loss; see `d2det.core.mimicking.mimic_loss`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss_weight: float = 0.1,
        cls_loss_weight: float = 0.1,
        crop_size: int = 224,
        num_crops: int = 32,
        rois: str = "foreground",
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("rois", rois, ROI_CHOICES),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"mimicking: {name} must be one of {known}, not {value!r}")
        if crop_size < 1 or num_crops < 1:
            raise ValueError(
                f"mimicking: crop size {crop_size} and number of crops {num_crops} must be positive"
            )
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.cls_loss_weight = cls_loss_weight
        self.crop_size = crop_size
        self.num_crops = num_crops
        self.rois = rois
        self.reduction = reduction
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def losses(
        self, patch_features: Tensor, roi_features: Tensor, gt_classes: Tensor, images: int
    ) -> dict[str, Tensor]:
        """ "loss_mimic" and "loss_mimic_cls" of P patches (P, C), (P, C), (P,) in `images` images.

        The cross-entropy is averaged over the patches, as the detector's own is over its RoIs.
        """
        logits = self.cls_score(patch_features)
        total = F.cross_entropy(logits.float(), gt_classes, reduction="sum")
        mimic = mimic_loss(patch_features, roi_features, images, self.reduction)
        return {
            "loss_mimic": self.loss_weight * mimic,
            "loss_mimic_cls": self.cls_loss_weight * total / max(gt_classes.numel(), 1),
        }

    def extra_repr(self) -> str:
        return (
            f"rois={self.rois!r}, num_crops={self.num_crops}, crop_size={self.crop_size}, "
            f"weights=({self.loss_weight}, {self.cls_loss_weight}), reduction={self.reduction!r}"
        )


@META_ARCH_REGISTRY.register()
class MimickingRCNN(GeneralizedRCNN):
    """A `GeneralizedRCNN` whose RoI features learn to be those of an R-CNN on the cropped object.

    In training, some of the RoIs that the heads trained on are cropped from the batch, resized, and
    sent through the same backbone, the same pooler with the whole patch as its RoI, and the same
    box head. The pooler is called as for any box: where a pyramid gives it a choice, its own rule
    puts a patch of 224 pixels at stride 16 (a map of 14 × 14), one of 112 pixels at stride 8.

    BatchNorm that trains normalises the patches by their own statistics and keeps them out of the
    running ones: at test time there are no patches.

    The parameters are under `mimic` in training mode, and in the checkpoints that training writes.
    In evaluation mode `mimic` is no part of the model: it is not among its modules, parameters,
    state or exports. `train()` brings it back.
    """

    mimic: FeatureMimicking | None

    @configurable
    def __init__(self, *, mimic: FeatureMimicking | None = None, **kwargs: Any) -> None:
        """Besides the arguments of detectron2's `GeneralizedRCNN`:

        Args:
            mimic: the branch; None for none, which is a `GeneralizedRCNN`.

        Raises:
            ValueError: RoI heads without one box head for all RoIs, or a crop size that the
                backbone does not take.
        """
        super().__init__(**kwargs)
        self._set_aside: tuple[FeatureMimicking, ...] = ()  # a tuple is not searched for modules
        self.mimic = mimic
        if mimic is not None:
            _check(self, mimic)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        keys = cfg.MODEL.MIMIC
        if not keys.ENABLED or keys.ROIS == "none":
            return arguments
        shape = getattr(getattr(arguments["roi_heads"], "box_head", None), "output_shape", None)
        if shape is None:
            raise ValueError(_UNFIT.format(name=cfg.MODEL.ROI_HEADS.NAME))
        arguments["mimic"] = FeatureMimicking(
            shape.channels * (shape.height or 1) * (shape.width or 1),
            cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            loss_weight=keys.LOSS_WEIGHT,
            cls_loss_weight=keys.CLS_LOSS_WEIGHT,
            crop_size=keys.CROP_SIZE,
            num_crops=keys.NUM_CROPS,
            rois=keys.ROIS,
            reduction=keys.REDUCTION,
        )
        return arguments

    def train(self, mode: bool = True) -> MimickingRCNN:
        if mode and self._set_aside:
            (self.mimic,) = self._set_aside
            self.mimic.to(self.device)
            self._set_aside = ()
        elif not mode and self.mimic is not None:
            self._set_aside = (self.mimic,)
            self.mimic = None
        return super().train(mode)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        if not self.training or self.mimic is None:
            return super().forward(batched_inputs)
        with (
            _recorded(self.roi_heads) as heads_calls,
            _recorded(self.roi_heads.box_head) as box_calls,
        ):
            losses = super().forward(batched_inputs)
        (((images, *_), (proposals, _)),) = heads_calls
        ((_, box_features),) = box_calls
        losses.update(self._mimic_losses(images, proposals, box_features.flatten(1)))
        return losses

    def _mimic_losses(
        self, images: Any, proposals: list[Instances], roi_features: Tensor
    ) -> dict[str, Tensor]:
        mimic = self.mimic
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals]).detach()
        index = image_index([len(p) for p in proposals], boxes.device)
        chosen = select_rois(
            gt_classes, index, mimic.num_classes, choice=mimic.rois, limit=mimic.num_crops
        )
        get_event_storage().put_scalar("mimic/num_rois", chosen.numel())
        rois = torch.cat((index[chosen, None].to(boxes.dtype), boxes[chosen]), dim=1)
        if not chosen.numel():
            # One patch that counts for nothing: processes that wait for each other in the
            # backbone (SyncBN) all have to enter it.
            height, width = images.image_sizes[0]
            rois = boxes.new_tensor([[0, 0, 0, width, height]])
        patches = crop_patches(images.tensor, images.image_sizes, rois, mimic.crop_size)
        features = self._patch_features(patches)
        nothing = 0 * features[chosen.numel() :].sum()
        losses = mimic.losses(
            features[: chosen.numel()],
            roi_features[chosen],
            gt_classes[chosen],
            len(proposals),
        )
        return {name: loss + nothing for name, loss in losses.items()}

    def _patch_features(self, patches: Tensor) -> Tensor:
        """(P, C): the patches through backbone, pooler and box head, each as a whole."""
        heads = self.roi_heads
        with _running_statistics_kept(self.backbone), _running_statistics_kept(heads):
            maps = self.backbone(patches)
            side = float(patches.shape[-1])
            boxes = patches.new_tensor([[0.0, 0.0, side, side]])
            pooled = heads.box_pooler(
                [maps[name] for name in heads.box_in_features], [Boxes(boxes)] * len(patches)
            )
            return heads.box_head(pooled).flatten(1)


_UNFIT = (
    "MODEL.MIMIC needs RoI heads with one box head for all RoIs, such as D2DetROIHeads and "
    "detectron2's StandardROIHeads; {name} has none"
)


def _check(model: GeneralizedRCNN, mimic: FeatureMimicking) -> None:
    heads = model.roi_heads
    if not isinstance(heads, StandardROIHeads) or isinstance(heads.box_head, nn.ModuleList):
        raise ValueError(_UNFIT.format(name=type(heads).__name__))
    if heads.train_on_pred_boxes:
        raise ValueError(
            "MODEL.MIMIC: the features of RoIs belong to their proposals, which "
            "TRAIN_ON_PRED_BOXES replaces"
        )
    divisor = model.backbone.size_divisibility
    if divisor > 1 and mimic.crop_size % divisor:
        raise ValueError(
            f"MODEL.MIMIC.CROP_SIZE {mimic.crop_size} is not a multiple of {divisor}, as the "
            "backbone needs"
        )


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """(inputs, output) of every call of `module` in the block."""
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch's statistics and leave its running ones alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.track_running_stats) for norm in norms]
    for norm in norms:
        # detectron2's NaiveSyncBatchNorm reads the momentum alone.
        norm.momentum, norm.track_running_stats = 0.0, False
    try:
        yield
    finally:
        for norm, (momentum, track) in zip(norms, before, strict=True):
            norm.momentum, norm.track_running_stats = momentum, track
