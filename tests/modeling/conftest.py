"""A D2Det that is small enough for unit tests, and images to feed it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"

SHRINK = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 60, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 30, "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_BOX_HEAD.DRP.OFFSET_FC_DIM", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV", 2,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM", 12,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NORM_GROUPS", 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.DENSE.NORM_GROUPS", 4,
    "MODEL.ROI_MASK_HEAD.SCORING.FC_DIM", 16,
]  # fmt: skip


@pytest.fixture
def small_cfg():
    """A function from a config's path below configs/ and overrides to a shrunken CfgNode."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg

    from d2det import add_d2det_config

    def build(name: str = "COCO-Detection/d2det_R_50_FPN_2x.yaml", *overrides):
        torch.manual_seed(0)
        cfg = add_d2det_config(get_cfg())
        cfg.merge_from_file(str(CONFIGS / name))
        cfg.merge_from_list([*SHRINK, *overrides])
        return cfg

    return build


@pytest.fixture
def batch():
    """A function that makes training inputs: (height, width, boxes, classes) for each image."""
    structures = pytest.importorskip("detectron2.structures")

    def build(*images):
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for height, width, boxes, classes in images:
            instances = structures.Instances((height, width))
            instances.gt_boxes = structures.Boxes(torch.tensor(boxes).float().reshape(-1, 4))
            instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
            image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
            inputs.append(
                {"image": image, "height": height, "width": width, "instances": instances}
            )
        return inputs

    return build
