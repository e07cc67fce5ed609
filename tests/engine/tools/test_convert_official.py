"""The authors' weights: every name and shape of the releases, their orders, what does not fit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model

from d2det.engine.checkpoint import Checkpointer
from d2det.engine.setup import get_cfg
from d2det.tools._conversion import ConversionError
from d2det.tools.convert_official import convert, identify, main

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def official(depth=50, *, release=1, dcn=False, masks=False, classes=80, early=False, convs=8):
    """A state dict with all names and shapes of a release, filled with random numbers."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape):
        state[name] = torch.randn(shape, generator=generator) * 0.01

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{key}", channels)
        state[f"{name}.running_var"].abs_().add_(0.5)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def both(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("backbone.conv1.weight", 64, 3, 7, 7)
    norm("backbone.bn1", 64)
    width = 64
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        middle, out = 64 * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"backbone.layer{stage}.{block}"
            shapes = ((middle, width, 1, 1), (middle, middle, 3, 3), (out, middle, 1, 1))
            for i, shape in enumerate(shapes, start=1):
                add(f"{name}.conv{i}.weight", *shape)
                norm(f"{name}.bn{i}", shape[0])
            if dcn and stage > 1:
                both(f"{name}.conv2{'' if early else '.conv'}_offset", 27, middle, 3, 3)
            if block == 0:
                add(f"{name}.downsample.0.weight", out, width, 1, 1)
                norm(f"{name}.downsample.1", out)
            width = out
    for i in range(4):
        both(f"neck.lateral_convs.{i}.conv", 256, 256 * 2**i, 1, 1)
        both(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    both("rpn_head.rpn_conv", 256, 256, 3, 3)
    both("rpn_head.rpn_cls", 3, 256, 1, 1)
    both("rpn_head.rpn_reg", 12, 256, 1, 1)
    head = "roi_head." if release == 2 else ""
    for i in range(4):
        layer = f"{head}bbox_roi_extractor.roi_layers.{i}"
        add(f"{layer}.awp.weight.conv.weight", 256, 256, 3, 3)
        add(f"{layer}.awp.weight.bn.weight", 256)
        add(f"{layer}.awp.weight.bn.bias", 256)
        both(f"{layer}.offset_fc.0", 1024, 256 * 9)
        both(f"{layer}.offset_fc.2", 1024, 1024)
        both(f"{layer}.offset_fc.4", 98, 1024)
    both(f"{head}bbox_head.shared_fcs.0", 1024, 256 * 49)
    both(f"{head}bbox_head.shared_fcs.1", 1024, 1024)
    both(f"{head}bbox_head.fc_cls", classes + 1, 1024)
    for i in range(convs):
        add(f"{head}D2Det_head.convs.{i}.conv.weight", 576, 576 if i else 256, 3, 3)
        add(f"{head}D2Det_head.convs.{i}.gn.weight", 576)
        add(f"{head}D2Det_head.convs.{i}.gn.bias", 576)
    both(f"{head}D2Det_head.D2Det_reg", 4, 576, 3, 3)
    both(f"{head}D2Det_head.D2Det_mask", 1, 576, 3, 3)
    if masks:
        add(f"{head}D2Det_head.deconv1.weight", 576, 256, 2, 2)
        add(f"{head}D2Det_head.deconv2.weight", 256, 256, 2, 2)
        for name in ("deconv1.bias", "deconv2.bias", "norm1.weight", "norm1.bias"):
            add(f"{head}D2Det_head.{name}", 256)
        both(f"{head}D2Det_head.D2Det_instance", classes + 1, 256, 3, 3)
        both(f"{head}D2Det_head.fcs.0", 1024, 577 * 49)
        both(f"{head}D2Det_head.fcs.1", 1024, 1024)
        both(f"{head}D2Det_head.fc_instance_iou", classes + 1, 1024)
    return state


@pytest.fixture(scope="module")
def plain():
    return official()


def test_every_tensor_finds_its_place(plain):
    done, source = convert(plain)
    assert source == (1, 50, False, False, 80, 8) and source.overrides == []
    assert source.config == "COCO-Detection/d2det_R_50_FPN_official"
    assert not done.missing
    assert set(done.left) == {n for n in plain if n.endswith("num_batches_tracked")}
    assert len(done.used) == len(done.state) == len(plain) - len(done.left)


def test_what_keeps_its_rows(plain):
    state = convert(plain)[0].state
    for theirs, ours in {
        "backbone.layer2.0.downsample.1.bias": "backbone.bottom_up.res3.0.shortcut.norm.bias",
        "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
        "neck.lateral_convs.3.conv.weight": "backbone.fpn_lateral5.weight",
        "neck.fpn_convs.0.conv.bias": "backbone.fpn_output2.bias",
        "rpn_head.rpn_reg.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
        "bbox_head.shared_fcs.1.weight": "roi_heads.box_head.fc2.weight",
        "bbox_roi_extractor.roi_layers.2.awp.weight.bn.bias": (
            "roi_heads.box_pooler.levels.2.weights.norm.bias"
        ),
        "bbox_roi_extractor.roi_layers.1.offset_fc.4.bias": (
            "roi_heads.box_pooler.levels.1.offsets.5.bias"
        ),
        "D2Det_head.convs.7.conv.weight": "roi_heads.dense_head.tower.21.weight",
        "D2Det_head.convs.7.gn.weight": "roi_heads.dense_head.tower.22.weight",
        "D2Det_head.D2Det_mask.bias": "roi_heads.dense_head.overlap_predictor.bias",
    }.items():
        assert torch.equal(state[ours], plain[theirs]), theirs


def test_rows_in_our_order(plain):
    state = convert(plain)[0].state
    left, right, top, bottom = plain["D2Det_head.D2Det_reg.bias"].tolist()
    ours = state["roi_heads.dense_head.offset_predictor.bias"].tolist()
    assert ours == [left, top, right, bottom]
    theirs = plain["bbox_head.fc_cls.weight"]
    scores = state["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(scores[:80], theirs[1:]) and torch.equal(scores[80], theirs[0])


def test_the_second_release_has_background_last():
    theirs = official(101, release=2, masks=True, classes=5, convs=1)
    done, source = convert(theirs)
    assert source == (2, 101, False, True, 5, 1)
    assert source.config == "COCO-InstanceSegmentation/d2det_R_101_FPN_official"
    cfg = get_cfg(source.config)
    cfg.merge_from_list(source.overrides)
    assert cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV == 1
    assert not cfg.MODEL.ROI_HEADS.INCLUSIVE_BOXES and cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.0
    state = done.state
    name = "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(state["roi_heads.box_predictor.cls_score.weight"], theirs[name])
    masks = theirs["roi_head.D2Det_head.D2Det_instance.weight"]
    assert torch.equal(state["roi_heads.mask_head.masks.predictor.weight"], masks[:5])


@pytest.mark.slow
def test_masks_of_background_are_left_out():
    theirs = official(101, masks=True, classes=3)
    state = convert(theirs)[0].state
    for ours, name in {
        "masks.predictor": "D2Det_instance",
        "scorer.predictor": "fc_instance_iou",
    }.items():
        for kind in ("weight", "bias"):
            value = theirs[f"D2Det_head.{name}.{kind}"]
            assert torch.equal(state[f"roi_heads.mask_head.{ours}.{kind}"], value[1:])


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_deformable_backbones_of_both_spellings(early):
    theirs = official(101, dcn=True, early=early)
    done, source = convert(theirs)
    assert source.config == "COCO-Detection/d2det_R_101_DCNv2_FPN_official"
    name = f"backbone.layer3.5.conv2{'' if early else '.conv'}_offset.weight"
    assert torch.equal(done.state["backbone.bottom_up.res4.5.conv2_offset.weight"], theirs[name])


def drop(state):
    del state["D2Det_head.convs.3.gn.bias"]


def add_unknown(state):
    state["mask_head.conv.weight"] = torch.zeros(1)


def reshape(state):
    state["rpn_head.rpn_reg.weight"] = torch.zeros(4, 256, 1, 1)


def of_another_detector(state):
    for name in [n for n in state if "D2Det" in n]:
        del state[name]


def shallow(state):
    for name in [n for n in state if n.startswith("backbone.layer3.5")]:
        del state[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "not whole.*tower.10.bias"),
        (add_unknown, "mask_head.conv.weight.*nothing of that kind"),
        (reshape, r"rpn_reg.weight gives \(4, 256, 1, 1\).*\(12, 256, 1, 1\)"),
        (of_another_detector, "no D2Det of the releases"),
        (shallow, "5 blocks in layer3"),
    ],
)
def test_what_does_not_fit_is_refused(plain, spoil, message):
    state = dict(plain)
    spoil(state)
    with pytest.raises(ConversionError, match=message):
        convert(state)


def test_combinations_that_were_never_released():
    with pytest.raises(ConversionError, match="deformable ResNet-50"):
        identify(official(50, dcn=True))
    with pytest.raises(ConversionError, match="masks but with a plain ResNet-101"):
        identify(official(50, masks=True))


def test_a_converted_checkpoint_runs_through_the_plugin(tmp_path, capsys):
    path, out = tmp_path / "D2Det.pth", tmp_path / "converted.pth"
    state = official(classes=3)
    torch.save({"meta": {}, "state_dict": {f"{k}": v for k, v in state.items()}}, path)
    main([str(path), str(out), "--quiet"])
    printed = capsys.readouterr().out
    assert "release 1, ResNet-50" in printed and "missing: none" in printed
    assert "NUM_CLASSES 3" in printed
    cfg = get_cfg("COCO-Detection/d2det_R_50_FPN_official")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    model = build_model(cfg).eval()
    Checkpointer(model).load(str(out))
    weights = model.state_dict()
    for theirs, ours in convert(state)[0].used.items():
        if "fc_cls" not in theirs and "D2Det_reg" not in theirs:
            assert torch.equal(weights[ours], state[theirs]), ours
    with torch.no_grad():
        (found,) = model([{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}])
    assert found["instances"].pred_boxes.tensor.shape[1] == 4


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, path)
    with pytest.raises(SystemExit, match=r"other.pth: this is no D2Det of the releases"):
        main([str(path), str(tmp_path / "out.pth")])
