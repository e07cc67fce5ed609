from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

LAZY = Path(__file__).parents[2] / "configs" / "lazy" / "d2det_R_50_FPN_2x.py"


def test_lazy_config_is_the_yaml_config(small_cfg, batch):
    """Both, shrunken alike, have the same parameters and, given the same values, detections."""
    yaml = build_model(small_cfg("COCO-Detection/d2det_R_50_FPN_2x.yaml")).eval()
    cfg = LazyConfig.load(str(LAZY)).model
    bottom_up = cfg.backbone.bottom_up
    bottom_up.stem.out_channels = 8
    bottom_up.stages = [
        {
            "bottleneck_channels": 8 * 2**i,
            "in_channels": 8 if i == 0 else 16 * 2 ** (i - 1),
            "out_channels": 16 * 2**i,
        }
        for i in range(4)
    ]
    from detectron2.config import LazyCall as L
    from detectron2.modeling import ResNet
    from detectron2.modeling.backbone.resnet import BottleneckBlock

    bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=blocks,
            stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
            norm="FrozenBN",
            stride_in_1x1=False,
            **stage,
        )
        for i, (blocks, stage) in enumerate(zip((3, 4, 6, 3), bottom_up.stages, strict=True))
    ]
    cfg.backbone.out_channels = 16
    cfg.proposal_generator.head.in_channels = 16
    cfg.proposal_generator.pre_nms_topk = (60, 30)
    cfg.proposal_generator.post_nms_topk = (40, 20)
    heads = cfg.roi_heads
    heads.num_classes = 3
    heads.box_pooler.in_channels = 16
    heads.box_pooler.offset_fc_dim = 16
    heads.box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
    heads.box_head.fc_dims = [16, 16]
    heads.box_predictor.in_features = 16
    heads.dense_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
    heads.dense_head.update(num_conv=2, conv_dim=12, norm_groups=4)
    lazy = instantiate(cfg).eval()
    lazy.load_state_dict(yaml.state_dict())
    inputs = batch((96, 128, [], []))
    with torch.no_grad():
        a, b = (model(inputs)[0]["instances"] for model in (yaml, lazy))
    assert len(a) == len(b) > 0
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores)
    for name in ("score_thresh", "nms_thresh", "pre_regression_topk", "jitter", "soft_nms"):
        assert getattr(yaml.roi_heads, name) == getattr(lazy.roi_heads, name), name


def test_lazy_config_is_whole():
    cfg = LazyConfig.load(str(LAZY))
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(cfg)
    heads = instantiate(cfg.model).roi_heads
    assert heads.dense_head.tower[0].out_channels == 576
    assert heads.num_classes == 80
