from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from d2det.torchvision import D2Det, fpn_backbone


@pytest.fixture(scope="session")
def tiny():
    """Makes a small D2Det with random weights that are not at their start values."""

    def make(num_classes=4, **kwargs):
        torch.manual_seed(0)
        backbone = fpn_backbone(
            ResNet(BasicBlock, [1, 1, 1, 1]), returned_layers=(2, 3, 4), out_channels=8
        )
        model = D2Det(
            backbone,
            num_classes,
            **{
                "strides": (8, 16, 32),
                "anchor_sizes": (24, 48, 96, 160),
                "min_size": 96,
                "max_size": 128,
                "rpn_post_nms_top_n_test": 20,
                "rpn_post_nms_top_n_train": 30,
                "batch_size_per_image": 16,
                "fc_dim": 16,
                "pooling": {"offset_fc_dim": 8},
                "regression": {"num_conv": 1, "conv_dim": 12, "norm": partial(nn.GroupNorm, 3)},
                **kwargs,
            },
        )
        with torch.no_grad():
            for parameter in model.roi_heads.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


@pytest.fixture
def scene():
    torch.manual_seed(1)
    images = [torch.rand(3, 80, 100), torch.rand(3, 64, 96)]
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10, 60, 60], [30, 30, 98, 79]]),
            "labels": torch.tensor([1, 3]),
        },
        {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([2])},
    ]
    return images, targets


@pytest.fixture
def with_masks(scene):
    """The scene's objects as filled boxes."""
    images, targets = scene
    for image, target in zip(images, targets, strict=True):
        masks = torch.zeros(len(target["boxes"]), *image.shape[-2:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target["masks"] = masks
    return images, targets


MASKS = {"conv_dim": 8, "norm": None, "score_fc_dim": 8}


@pytest.fixture
def mask_settings():
    return dict(MASKS)
