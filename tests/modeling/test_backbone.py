from __future__ import annotations

import pytest
import torch
from torchvision.ops import deform_conv2d

pytest.importorskip("detectron2")

from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

from d2det.modeling.deform_conv import DeformConv2d

DCN = "COCO-Detection/d2det_R_101_DCNv2_FPN_2x.yaml"


def test_narrow_resnet18(small_cfg):
    cfg = small_cfg("quickstart.yaml", "MODEL.RESNETS.RES2_OUT_CHANNELS", 8)
    backbone = build_backbone(cfg)
    outputs = backbone(torch.zeros(1, 3, 64, 64))
    assert {k: tuple(v.shape[1:]) for k, v in outputs.items()} == {
        "p3": (16, 8, 8), "p4": (16, 4, 4), "p5": (16, 2, 2), "p6": (16, 1, 1)
    }  # fmt: skip
    assert sum(isinstance(m, torch.nn.Conv2d) for m in backbone.bottom_up.modules()) == 20
    for key, value in (("NUM_GROUPS", 2), ("RES5_DILATION", 4), ("DEPTH", 20)):
        wrong = small_cfg("quickstart.yaml", f"MODEL.RESNETS.{key}", value)
        with pytest.raises(ValueError, match=f"MODEL.RESNETS.{key} is {value}"):
            build_backbone(wrong)


@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_stages_compute_what_torchvision_does(modulated, small_cfg):
    cfg = small_cfg(DCN, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.DEFORM_MODULATED", modulated)
    backbone = build_backbone(cfg).bottom_up
    layers = [m for m in backbone.modules() if isinstance(m, DeformConv2d)]
    assert len(layers) == 4 + 6 + 3
    layer = layers[0]
    layer.norm = None
    x = torch.randn(2, layer.weight.shape[1], 10, 12)
    offset = torch.randn(2, 18, 10, 12)
    mask = torch.rand(2, 9, 10, 12) if modulated else None
    stride, padding = layer.stride, layer.padding
    side = (10 + 2 * (padding if isinstance(padding, int) else padding[0]) - 3) // (
        stride if isinstance(stride, int) else stride[0]
    ) + 1
    offset = offset[:, :, :side, : (12 - 1) // (10 // side) + 1]
    mask = mask[:, :, : offset.shape[2], : offset.shape[3]] if modulated else None
    expected = deform_conv2d(x, offset, layer.weight, None, stride, padding, 1, mask)
    torch.testing.assert_close(layer(x, offset, mask), expected, rtol=1e-4, atol=1e-4)


def test_parameter_names_are_detectron2s(small_cfg):
    ours = build_backbone(small_cfg(DCN)).state_dict()
    plain = build_backbone(
        small_cfg(DCN, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    ).state_dict()
    assert list(ours) and set(ours) == set(plain)
    assert all(ours[k].shape == plain[k].shape for k in plain)


def test_affine_norms_train_with_fixed_statistics(small_cfg):
    backbone = build_backbone(small_cfg("COCO-Detection/d2det_R_50_FPN_2x.yaml"))
    trainable = {n for n, p in backbone.bottom_up.named_parameters() if p.requires_grad}
    norms = {n for n in trainable if ".norm." in n}
    assert norms and all(n.startswith(("res3", "res4", "res5")) for n in norms)
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone.train()(torch.randn(2, 3, 64, 64))["p5"].sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in backbone.named_buffers())
    assert backbone.bottom_up.res5[0].conv1.norm.weight.grad.abs().max() > 0
    frozen = build_backbone(
        small_cfg("quickstart.yaml", "MODEL.RESNETS.NORM", "FrozenBN")
    ).bottom_up
    assert not {n for n, _ in frozen.named_parameters() if ".norm." in n}


def test_any_backbone_of_detectron2(small_cfg, batch):
    """One level without a pyramid, and a pyramid of other levels and width."""
    single = small_cfg(
        "quickstart.yaml",
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.OUT_FEATURES", ["res4"],
        "MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]],
    )  # fmt: skip
    other = small_cfg(
        "quickstart.yaml",
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.DEPTH", 50, "MODEL.FPN.OUT_CHANNELS", 20,
        "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]],
    )  # fmt: skip
    inputs = batch((96, 128, [[10, 10, 60, 50], [70, 20, 120, 90]], [0, 2]))
    for cfg, levels in ((single, 1), (other, 5)):
        model = build_model(cfg)
        assert len(model.roi_heads.box_pooler.levels) == levels
        with EventStorage(0):
            sum(model(inputs).values()).backward()
        assert all(p.grad is not None for p in model.roi_heads.parameters())
        with torch.no_grad():
            assert "instances" in model.eval()(inputs)[0]
