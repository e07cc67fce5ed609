from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

import d2det
from d2det.core import DensePrediction, DiscriminativePooling
from d2det.modeling import (
    ROI_DENSE_REGRESSION_HEAD_REGISTRY,
    ROI_POOLER_REGISTRY,
    D2DetROIHeads,
    DenseLocalRegressionHead,
    DiscriminativeRoIPooler,
    build_box_pooler,
    build_dense_regression_head,
)
from d2det.modeling.roi_heads import image_index

SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}


def default_cfg():
    cfg = d2det.add_d2det_config(get_cfg())
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "DiscriminativeRoIPooler"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    return cfg


def test_defaults_are_the_papers():
    head = build_dense_regression_head(default_cfg(), ShapeSpec(channels=256, height=14, width=14))
    convs = [m for m in head.tower if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in head.tower if isinstance(m, torch.nn.GroupNorm)]
    assert [c.out_channels for c in convs] == [576] * 8
    assert [c.stride[0] for c in convs] == [2] + [1] * 7
    assert {n.num_groups for n in norms} == {36}
    assert all(c.bias is None for c in convs)
    assert head.overlap_margin == pytest.approx(1 / 6)
    assert (head.loss_weight, head.overlap_loss_weight) == (2.0, 1.0)
    pooler = build_box_pooler(default_cfg(), SHAPES)
    assert isinstance(pooler, DiscriminativeRoIPooler)
    assert len(pooler.levels) == 4 and pooler.offset_resolution == 3
    assert (pooler.gamma, pooler.coefficient, pooler.weighting) == (0.1, 12.0, "normalized")


def test_pooler_takes_boxes_and_gives_the_cores_result():
    torch.manual_seed(0)
    pooler = build_box_pooler(default_cfg(), SHAPES)
    maps = [torch.randn(2, 8, 64 // s, 64 // s) for s in (1, 2, 4, 8)]
    boxes = [
        Boxes(torch.tensor([[4.0, 4.0, 60.0, 90.0]])),
        Boxes(torch.tensor([[0.0, 0, 240, 250]])),
    ]
    rois = torch.tensor([[0, 4.0, 4.0, 60.0, 90.0], [1, 0.0, 0.0, 240.0, 250.0]])
    expected = DiscriminativePooling.forward(pooler, maps, rois)
    assert torch.equal(pooler(maps, boxes), expected)
    assert expected.shape == (2, 8, 7, 7)


def test_heads_and_poolers_of_other_people():
    @ROI_POOLER_REGISTRY.register()
    class TestOnlyPooler(torch.nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

        def forward(self, features, boxes):
            return features[0].new_zeros(sum(len(b) for b in boxes), 8, 7, 7)

    @ROI_DENSE_REGRESSION_HEAD_REGISTRY.register()
    class TestOnlyHead(torch.nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

        def forward(self, pooled):
            return DensePrediction(pooled.new_zeros(len(pooled), 4, 7, 7), None)

        def boxes(self, prediction, proposals):
            return proposals

    cfg = default_cfg()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "TestOnlyPooler"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.NAME = "TestOnlyHead"
    heads = D2DetROIHeads(cfg, SHAPES)
    assert isinstance(heads.box_pooler, TestOnlyPooler)
    assert isinstance(heads.dense_head, TestOnlyHead)


def test_errors_name_the_key():
    cfg = default_cfg()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "RoiAline"
    with pytest.raises(ValueError, match=r"POOLER_TYPE is 'RoiAline'.*DiscriminativeRoIPooler"):
        build_box_pooler(cfg, SHAPES)
    cfg = default_cfg()
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p7"]
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['p7'\].*'p2'"):
        build_box_pooler(cfg, SHAPES)
    with pytest.raises(ValueError, match="differ in channels"):
        build_box_pooler(default_cfg(), {**SHAPES, "p3": ShapeSpec(channels=9, stride=8)})
    cfg = default_cfg()
    cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM = 100
    with pytest.raises(ValueError, match="CONV_DIM 100 is not a multiple of NORM_GROUPS 36"):
        build_dense_regression_head(cfg, ShapeSpec(channels=8))


def test_norms_of_detectron2():
    for norm, kind in (("BN", "BatchNorm2d"), ("LN", "LayerNorm"), ("", "ReLU")):
        head = DenseLocalRegressionHead(
            input_shape=ShapeSpec(channels=8), conv_dim=12, num_conv=1, norm=norm
        )
        assert type(head.tower[1]).__name__ == kind
        assert (head.tower[0].bias is None) == (norm != "")


def test_config_can_be_extended_twice():
    cfg = default_cfg()
    cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM = 72
    assert d2det.add_d2det_config(cfg).MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM == 72


def test_constructor_refuses_contradictions(small_cfg):
    from detectron2.modeling import build_model

    heads = build_model(small_cfg("quickstart.yaml")).roi_heads
    arguments = D2DetROIHeads.from_config(small_cfg("quickstart.yaml"), SHAPES)
    with pytest.raises(ValueError, match="come together"):
        D2DetROIHeads(**{**arguments, "dense_pooler": None})
    with pytest.raises(ValueError, match="exclude each other"):
        D2DetROIHeads(**arguments, delta_branch=heads.box_head)
    with pytest.raises(ValueError, match="TRAIN_ON_PRED_BOXES"):
        D2DetROIHeads(**{**arguments, "train_on_pred_boxes": True})


def test_image_index():
    assert image_index([2, 0, 1], torch.device("cpu")).tolist() == [0, 0, 2]
    assert image_index([], torch.device("cpu")).shape == (0,)
