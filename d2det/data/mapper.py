"""Training samples of images some of whose objects have boxes but no masks."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.structures import Boxes


class TrainMapper(DatasetMapper):
    """detectron2's mapper, which knows only images whose objects all have masks, or none.

    An object without one gets an empty mask, by which `D2DetMaskHead` knows it; for other mask
    heads, to which an empty mask is a mask, it is left out.
    """

    @configurable
    def __init__(self, is_train: bool, *, masks_may_lack: bool = False, **kwargs: Any) -> None:
        """Besides the arguments of detectron2's `DatasetMapper`:

        Args:
            masks_may_lack: whether the model trains on objects without masks.
        """
        super().__init__(is_train, **kwargs)
        self.masks_may_lack = masks_may_lack

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        return {**arguments, "masks_may_lack": masks_may_lack(cfg)}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        found = [a for a in dataset_dict["annotations"] if not a.get("iscrowd")]
        lacking = torch.tensor(["segmentation" not in a for a in found], dtype=torch.bool)
        if not (self.use_instance_mask and lacking.any()):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        if not self.masks_may_lack:
            dataset_dict["annotations"] = [a for a in found if "segmentation" in a]
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        del dataset_dict["annotations"]
        moved = []
        for annotation in found:
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            annotation = utils.transform_instance_annotations(
                annotation,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            moved.append({"segmentation": [], **annotation})
        instances = utils.annotations_to_instances(
            moved, image_shape, mask_format=self.instance_mask_format
        )
        drawn = instances.gt_masks.nonempty()
        if self.recompute_boxes:
            tight = instances.gt_masks.get_bounding_boxes().tensor
            boxes = torch.where(drawn[:, None], tight, instances.gt_boxes.tensor)
            instances.gt_boxes = Boxes(boxes)
        kept = instances.gt_boxes.nonempty(threshold=1e-5) & (drawn | lacking)
        dataset_dict["instances"] = instances[kept]


def masks_may_lack(cfg: CfgNode) -> bool:
    """Whether the config's model trains on objects without masks, beside others that have them."""
    if not cfg.MODEL.MASK_ON:
        return True
    head = ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)
    return bool(getattr(head, "masks_may_lack", False))
