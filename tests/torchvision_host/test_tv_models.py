from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from d2det.core import DeformableConv2d
from d2det.torchvision import (
    d2det_quickstart,
    d2det_resnet50_dcnv2_fpn,
    d2det_resnet50_fpn,
    deformable_resnet_fpn_backbone,
    fpn_backbone,
    make_deformable,
)


def test_training_gives_losses_and_every_parameter_a_gradient(tiny, scene):
    model = tiny()
    losses = model(*scene)
    assert set(losses) == {
        "loss_classifier",
        "loss_dense_reg",
        "loss_overlap",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("empty", [1, 2])
def test_images_without_objects_train(tiny, scene, empty):
    images, targets = scene
    for target in targets[:empty]:
        target["boxes"] = torch.zeros(0, 4)
        target["labels"] = torch.zeros(0, dtype=torch.int64)
    losses = tiny()(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    if empty == 2:
        assert losses["loss_dense_reg"] == 0
    sum(losses.values()).backward()


def test_predictions_are_torchvisions(tiny, scene):
    images, _ = scene
    model = tiny().eval()
    with torch.no_grad():
        found = model(images)
    for prediction, image in zip(found, images, strict=True):
        assert set(prediction) == {"boxes", "labels", "scores"}
        assert 0 < len(prediction["boxes"]) <= 100
        assert prediction["labels"].min() >= 1 and prediction["labels"].max() <= 3
        height, width = image.shape[-2:]
        limit = torch.tensor([width, height, width, height])
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"] <= limit + 1e-3).all()
        scores = prediction["scores"]
        assert (scores[:-1] >= scores[1:]).all()


def test_no_detections_above_the_threshold(tiny, scene):
    model = tiny().eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[-1] = 100.0  # background
        found = model(scene[0])
    assert [len(f["boxes"]) for f in found] == [0, 0]


def test_masks_train_and_come_out_in_the_images_size(tiny, with_masks, mask_settings):
    images, targets = with_masks
    model = tiny(masks=mask_settings)
    losses = model(images, targets)
    assert losses["loss_mask"] > 0 and "loss_mask_iou" in losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        found = model(images)
    for prediction, image in zip(found, images, strict=True):
        count = len(prediction["boxes"])
        assert count > 0 and prediction["masks"].shape == (count, 1, *image.shape[-2:])
        assert prediction["mask_scores"].shape == (count,)


def test_images_without_masks_train_their_boxes(tiny, with_masks, mask_settings):
    images, targets = with_masks
    del targets[1]["masks"]
    mixed = tiny(masks=mask_settings)(images, targets)
    assert mixed["loss_mask"] > 0
    del targets[0]["masks"]
    none = tiny(masks=mask_settings)(images, targets)
    assert none["loss_mask"] == 0 and none["loss_dense_reg"] > 0


def test_no_detections_have_no_masks(tiny, scene, mask_settings):
    model = tiny(masks=mask_settings).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[-1] = 100.0  # background
        found = model(scene[0])
    assert [f["masks"].shape[0] for f in found] == [0, 0]


def test_the_papers_settings_for_masks(tiny):
    model = tiny(masks={"conv_dim": 16}, rpn_post_nms_top_n_test=None)
    settings = model.roi_heads.settings
    assert (settings.score_threshold, settings.nms_threshold, settings.soft_nms) == (
        0.05,
        0.3,
        None,
    )
    assert model.rpn._post_nms_top_n["testing"] == 700


@pytest.mark.parametrize("label", [0, 4])
def test_labels_outside_the_classes_are_refused(tiny, scene, label):
    images, targets = scene
    targets[1]["labels"] = torch.tensor([label])
    with pytest.raises(ValueError, match=r"targets\[1\].*3 classes"):
        tiny()(images, targets)


def test_one_class_is_the_least(tiny):
    with pytest.raises(ValueError, match="at least 2"):
        tiny(num_classes=1)


def test_a_training_learns_one_image(tiny, scene):
    images, targets = scene
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    totals = []
    for _ in range(30):
        losses = model(images[:1], targets[:1])
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])


def test_the_papers_defaults():
    model = d2det_resnet50_fpn(weights_backbone=None)
    heads = model.roi_heads
    convs = [m for m in heads.dense_head.tower if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [576] * 8
    assert {m.num_groups for m in heads.dense_head.tower if isinstance(m, nn.GroupNorm)} == {36}
    assert heads.num_classes == 90 and heads.box_predictor.cls_score.out_features == 91
    assert heads.settings.score_threshold == 0.03 and heads.settings.pre_regression_topk == 125
    assert heads.settings.soft_nms.method == "linear"


def test_dcnv2_is_in_the_last_three_stages():
    body = d2det_resnet50_dcnv2_fpn(weights_backbone=None).backbone.body
    deformable = {n for n, m in body.named_modules() if isinstance(m, DeformableConv2d)}
    assert len(deformable) == 4 + 6 + 3
    assert {name.partition(".")[0] for name in deformable} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_resnet_starts_as_the_plain_one(block, modulated):
    torch.manual_seed(0)
    plain = fpn_backbone(ResNet(block, [1, 1, 1, 1]), out_channels=8).eval()
    deformable = fpn_backbone(
        make_deformable(ResNet(block, [1, 1, 1, 1]), modulated=modulated), out_channels=8
    ).eval()
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".conv2.conv_offset." in name for name in missing)
    if modulated:
        # Modulation starts at 0.5: twice the weights give the plain convolution.
        with torch.no_grad():
            for module in deformable.modules():
                if isinstance(module, DeformableConv2d):
                    module.weight *= 2
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, computed = plain(image), deformable(image)
    for name, value in expected.items():
        torch.testing.assert_close(computed[name], value, atol=1e-4, rtol=1e-4)


def test_frozen_stages_still_learn_their_offsets():
    backbone = deformable_resnet_fpn_backbone("resnet18", deformable=["layer2"], trainable_layers=1)
    trained = {n for n, p in backbone.body.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"layer2", "layer4"}
    assert all("conv_offset" in name for name in trained if name.startswith("layer2"))


@pytest.mark.parametrize("stage", ["layer5", "fc"])
def test_unknown_stages_are_refused(stage):
    with pytest.raises(ValueError, match="no stage"):
        make_deformable(ResNet(BasicBlock, [1, 1, 1, 1]), [stage])


def test_not_a_resnet():
    with pytest.raises(ValueError, match="not a ResNet"):
        deformable_resnet_fpn_backbone("mobilenet_v3_small")


def test_the_quick_start_is_small():
    model = d2det_quickstart()
    assert model.backbone.out_channels == 32 and model.roi_heads.num_classes == 6


def test_inclusive_boxes_decode_as_the_releases_do(tiny, scene):
    """Cells at fractions of x2 - x1, where x2 names the last pixel; results end behind it again."""
    heads = tiny(inclusive_boxes=True).roi_heads.eval()
    calls = []
    heads.dense_head.register_forward_hook(lambda _, __, out: calls.append(out))
    generator = torch.Generator().manual_seed(5)
    maps = {str(i): torch.randn(1, 8, 16 >> i, 16 >> i, generator=generator) for i in range(3)}
    proposal = torch.tensor([[20.0, 30.0, 81.0, 75.0]])
    with torch.no_grad():
        ((found,), _) = heads(maps, [proposal], [(128, 128)])
    ((offsets, logits),) = calls
    x1, y1, x2, y2 = 20.0, 30.0, 80.0, 74.0
    boxes = []
    for m in range(len(offsets)):
        cells = []
        for i in range(7):
            for j in range(7):
                if logits[m, 0, i, j] > 0:
                    x, y = x1 + (j + 0.5) * (x2 - x1) / 7, y1 + (i + 0.5) * (y2 - y1) / 7
                    left, top, right, bottom = offsets[m, :, i, j].tolist()
                    cells.append(
                        [
                            x - left * (x2 - x1),
                            y - top * (y2 - y1),
                            x + right * (x2 - x1) + 1,
                            y + bottom * (y2 - y1) + 1,
                        ]
                    )
        assert cells
        boxes.append(torch.tensor(cells).mean(dim=0).clamp(0, 128))
    assert len(found["boxes"]) > 0
    for box in found["boxes"]:
        assert min((box - b).abs().max() for b in boxes) < 1e-3


def test_boxes_stay_in_float32_under_autocast(tiny, scene):
    """torchvision makes anchors, and with them proposals and targets, in the maps' type."""
    images, targets = scene
    targets[0]["boxes"][0] = torch.tensor([16.97, 20.33, 60.11, 60.07])
    model = tiny()
    seen = {}
    model.rpn.anchor_generator.register_forward_hook(lambda *x: seen.update(anchors=x[-1][0]))
    losses_of = model.roi_heads.dense_head.losses

    def record(prediction, proposals, gt_boxes, *more):
        seen.update(proposals=proposals, gt=gt_boxes)
        return losses_of(prediction, proposals, gt_boxes, *more)

    model.roi_heads.dense_head.losses = record
    with torch.autocast("cpu", torch.bfloat16):
        model(images, targets)
    assert {v.dtype for v in seen.values()} == {torch.float32}
    scale = 96 / 80  # the image's shorter side is resized
    distances = (seen["gt"] - targets[0]["boxes"][0] * scale).abs().amax(dim=1)
    assert distances.min() < 1e-3
