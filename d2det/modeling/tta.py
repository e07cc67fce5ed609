"""Test-time augmentation over scales and flips, merged before soft-NMS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, detector_postprocess
from detectron2.structures import Boxes, Instances
from fvcore.transforms import HFlipTransform, TransformList
from torch import Tensor, nn

from d2det.core import Candidates, pool_candidates

Inputs = list[dict[str, Any]]


def build_tta(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """The model with TEST.AUG's augmentation: `D2DetWithTTA` for D2Det, else detectron2's.

    Raises:
        ValueError: the model is not a two-stage one, or it predicts keypoints.
    """
    model = getattr(model, "module", model)  # within DistributedDataParallel
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG.ENABLED needs a model of the R-CNN family; {type(model).__name__} is none"
        )
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "TEST.AUG.ENABLED serves neither MODEL.KEYPOINT_ON nor MODEL.LOAD_PROPOSALS"
        )
    return (D2DetWithTTA if merges_candidates(model) else GeneralizedRCNNWithTTA)(cfg, model)


def merges_candidates(model: nn.Module) -> bool:
    """Whether the model gives its boxes before they compete, as `D2DetROIHeads` does."""
    heads = getattr(getattr(model, "module", model), "roi_heads", None)
    return hasattr(heads, "box_candidates") and hasattr(heads, "detections")


class D2DetWithTTA(GeneralizedRCNNWithTTA):
    """A D2Det model on several views of each image: other scales and their mirror images.

    detectron2's class merges what is left after each view's own suppression by plain NMS, which
    undoes soft-NMS. Here the scored and regressed boxes of all views are pooled first, and compete
    once, by the model's own rule. The merged boxes then get their masks from every view: mask
    probabilities and mask scores are averaged.

    Views of one size go through the model together, so that none is padded; an image that is given
    at its original size is resized once for each view. With a single view at the model's own scale
    the result is the plain model's.

    Args:
        cfg: TEST.AUG describes the views.
        model: a D2Det model; see `merges_candidates`.
        tta_mapper: makes the views of an image; default detectron2's `DatasetMapperTTA`. Its
            transforms may resize and flip horizontally.
        batch_size: views that go through the model at a time.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict[str, Any]], Inputs] | None = None,
        batch_size: int = 2,
    ) -> None:
        super().__init__(cfg, model, tta_mapper, batch_size)
        if not merges_candidates(self.model):
            raise ValueError(f"{type(self.model.roi_heads).__name__} is not D2DetROIHeads")

    def _inference_one_image(self, input: dict[str, Any]) -> dict[str, Instances]:
        size = (input["height"], input["width"])
        views, transforms = self._get_augmented_inputs(input)
        candidates = pool_candidates(self._candidates(views, transforms))
        heads = self.model.roi_heads
        found = heads.detections(candidates, [size], pooled=len(views) > 1)[0]
        if heads.mask_on:
            self._add_masks(found, views, transforms)
        return {"instances": detector_postprocess(found, *size)}

    def _candidates(self, views: Inputs, transforms: list[TransformList]) -> list[Candidates]:
        """Each view's candidates, in the pixels of the original image."""
        results: list[Candidates] = [None] * len(views)  # type: ignore[list-item]
        for group in self._groups(views):
            images = self.model.preprocess_image([views[i] for i in group])
            features = self.model.backbone(images.tensor)
            proposals, _ = self.model.proposal_generator(images, features, None)
            found = self.model.roi_heads.box_candidates(features, proposals)
            for position, index in enumerate(group):
                mine = found.take(found.images == position)
                boxes = move_boxes(mine.boxes, transforms[index].inverse())
                results[index] = mine._replace(boxes=boxes, images=torch.zeros_like(mine.images))
        return results

    def _add_masks(self, found: Instances, views: Inputs, transforms: list[TransformList]) -> None:
        if len(found) == 0:  # one view is enough to get the fields
            views, transforms = views[:1], transforms[:1]
        masks: list[Tensor] = []
        scores: list[Tensor] = []
        for group in self._groups(views):
            given = []
            for index in group:
                instances = Instances(tuple(views[index]["image"].shape[1:]))
                instances.pred_boxes = Boxes(move_boxes(found.pred_boxes.tensor, transforms[index]))
                instances.scores, instances.pred_classes = found.scores, found.pred_classes
                given.append(instances)
            outputs = self.model.inference([views[i] for i in group], given, do_postprocess=False)
            for index, output in zip(group, outputs, strict=True):
                mask = output.pred_masks.float()
                masks.append(mask.flip(3) if is_flipped(transforms[index]) else mask)
                if output.has("mask_scores"):
                    scores.append(output.mask_scores.float())
        found.pred_masks = torch.stack(masks).mean(dim=0)
        if scores:
            found.mask_scores = torch.stack(scores).mean(dim=0)

    def _groups(self, views: Inputs) -> list[list[int]]:
        """Indices of views of one size, `batch_size` at most together."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, view in enumerate(views):
            by_size.setdefault(tuple(view["image"].shape), []).append(index)
        step = self.batch_size
        return [same[i : i + step] for same in by_size.values() for i in range(0, len(same), step)]


def move_boxes(boxes: Tensor, transform: TransformList) -> Tensor:
    """Boxes (M, 4) after a transform of their image."""
    moved = transform.apply_box(boxes.float().cpu().numpy())
    return torch.as_tensor(moved, dtype=torch.float32, device=boxes.device).reshape(-1, 4)


def is_flipped(transform: TransformList) -> bool:
    """Whether a view shows its image as in a mirror."""
    return sum(isinstance(t, HFlipTransform) for t in transform.transforms) % 2 == 1
