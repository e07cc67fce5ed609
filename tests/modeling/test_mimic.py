"""R-CNN feature mimicking: what it trains, and that nothing of it is left at test time."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2det.core import crop_patches
from d2det.engine.checkpoint import Checkpointer
from d2det.engine.trained import load_trained
from d2det.modeling import mimic
from d2det.modeling.mimic import FeatureMimicking

ON = (
    "MODEL.META_ARCHITECTURE", "MimickingRCNN", "MODEL.MIMIC.ENABLED", True,
    "MODEL.MIMIC.CROP_SIZE", 64, "MODEL.MIMIC.NUM_CROPS", 3,
)  # fmt: skip
C5 = (
    "MODEL.BACKBONE.NAME", "build_d2det_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.RESNETS.RES5_DILATION", 2,
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RPN.IN_FEATURES", ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["res5"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2",
)  # fmt: skip
DETECTORS = {
    "d2det": ("quickstart.yaml",),
    "separate branches": ("shapes/faster_rcnn.yaml",),
    "detectron2": ("shapes/detectron2_faster_rcnn.yaml",),
    "detectron2, frozen norm, four levels": ("ablations/faster_rcnn_R_50_FPN_2x.yaml",),
    "conv5": ("shapes/detectron2_faster_rcnn.yaml", *C5),
    "conv5, deformable": (
        "shapes/faster_rcnn.yaml", *C5,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True],
        "MODEL.RESNETS.DEFORM_MODULATED", True,
    ),
}  # fmt: skip
OBJECTS = [(72, 96, [[10, 10, 60, 50], [50, 20, 90, 70]], [0, 2]), (64, 64, [[5, 5, 40, 60]], [1])]


def losses_of(model, inputs):
    model.train()
    with EventStorage(0) as storage:
        losses = model(inputs)
    return losses, storage.latest()


@pytest.mark.parametrize("name", DETECTORS)
def test_it_trains_every_kind_of_detector(name, small_cfg, batch):
    config, *overrides = DETECTORS[name]
    model = build_model(small_cfg(config, *overrides, *ON))
    losses, storage = losses_of(model, batch(*OBJECTS))
    assert {"loss_mimic", "loss_mimic_cls"} < set(losses)
    assert 1 <= storage["mimic/num_rois"][0] <= 6
    # 1 - cos is from 0 to 2; at most 3 RoIs an image.
    assert 0 < losses["loss_mimic"].item() < 0.1 * 2 * 3
    assert losses["loss_mimic_cls"].item() == pytest.approx(0.1 * math.log(4), rel=0.8)
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


def gradients(model, loss):
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n for n, g in zip(names, found, strict=True) if g is not None and g.abs().sum() > 0}


def test_gradients_go_where_they_should(small_cfg, batch):
    config, *overrides = DETECTORS["conv5, deformable"]
    model = build_model(small_cfg(config, *overrides, *ON))
    for name, parameter in model.named_parameters():  # off the start: all gradients are real
        if "conv2_offset" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    losses, _ = losses_of(model, batch(*OBJECTS))
    heard = {name: gradients(model, loss) for name, loss in losses.items()}

    classifier = {"mimic.cls_score.weight", "mimic.cls_score.bias"}
    assert classifier <= heard.pop("loss_mimic_cls")
    for names in heard.values():
        assert not classifier & names
    shared = {n for n in heard["loss_mimic"] if n.startswith(("backbone.", "roi_heads.box_head."))}
    assert heard["loss_mimic"] == shared  # neither RPN nor classifier nor box regression
    offsets = {n for n, _ in model.named_parameters() if "conv2_offset" in n}
    assert len(offsets) == 6  # weight and bias, three blocks
    assert offsets <= shared
    layer = model.backbone.res5[0].conv2_offset
    weight = torch.autograd.grad(losses["loss_mimic"], layer.weight, retain_graph=True)[0]
    moved, modulated = weight[:18], weight[18:]
    assert moved.abs().sum() > 0
    assert modulated.abs().sum() > 0


def test_both_branches_are_pulled(small_cfg, batch, monkeypatch):
    """With either side's features detached, the other's still get a gradient in the offsets."""
    config, *overrides = DETECTORS["conv5, deformable"]
    losses = FeatureMimicking.losses
    for side in range(2):
        model = build_model(small_cfg(config, *overrides, *ON))

        def half(self, *args, side=side):
            features = list(args)
            features[side] = features[side].detach()
            return losses(self, *features)

        monkeypatch.setattr(FeatureMimicking, "losses", half)
        found, _ = losses_of(model, batch(*OBJECTS))
        offsets = {n for n, _ in model.named_parameters() if "conv2_offset" in n}
        assert offsets <= gradients(model, found["loss_mimic"])


def test_each_patch_is_compared_with_its_own_roi(small_cfg, batch, monkeypatch):
    model = build_model(small_cfg("shapes/faster_rcnn.yaml", *ON))
    chosen = torch.tensor([1, 6, 17, 30])  # of 16 RoIs an image
    monkeypatch.setattr(mimic, "select_rois", lambda *args, **kwargs: chosen)
    heads, features, crops, compared = [], [], [], []
    model.roi_heads.register_forward_hook(lambda _, inputs, out: heads.append((inputs, out)))
    model.roi_heads.box_head.register_forward_hook(lambda *call: features.append(call[-1]))

    def patch_features(patches):
        crops.append(patches)
        return patches.mean(dim=(2, 3)) @ torch.ones(3, features[0].shape[1])

    monkeypatch.setattr(model, "_patch_features", patch_features)
    monkeypatch.setattr(FeatureMimicking, "losses", lambda self, *args: compared.append(args) or {})
    losses_of(model, batch(*OBJECTS))
    (((images, *_), (proposals, _)),) = heads
    ((patches, rois, gt_classes, count),) = compared
    assert torch.equal(rois, features[0].flatten(1)[chosen])
    assert torch.equal(gt_classes, torch.cat([p.gt_classes for p in proposals])[chosen])
    assert len(patches) == 4 and count == 2
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[chosen]
    index = torch.tensor([0, 0, 1, 1])
    expected = crop_patches(
        images.tensor, images.image_sizes, torch.cat((index[:, None], boxes), dim=1), 64
    )
    torch.testing.assert_close(crops[0], expected)


def test_discriminative_pooling_learns_from_the_patches(small_cfg, batch):
    model = build_model(small_cfg("quickstart.yaml", *ON))
    losses, _ = losses_of(model, batch(*OBJECTS))
    heard = gradients(model, losses["loss_mimic_cls"])
    assert any(n.startswith("roi_heads.box_pooler.levels.") for n in heard)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("foreground", 0), ("background", 3), ("foreground+background", 3)],
)
def test_a_batch_without_objects(choice, expected, small_cfg, batch):
    model = build_model(small_cfg("quickstart.yaml", *ON, "MODEL.MIMIC.ROIS", choice))
    losses, storage = losses_of(model, batch((64, 64, [], [])))
    assert storage["mimic/num_rois"][0] == expected
    for name in ("loss_mimic", "loss_mimic_cls"):
        assert losses[name].isfinite()
        assert (losses[name].item() == 0) == (expected == 0)
    (losses["loss_mimic"] + losses["loss_mimic_cls"]).backward()
    assert model.mimic.cls_score.weight.grad is not None
    assert model.backbone.bottom_up.stem.conv1.weight.grad is not None


def test_patches_of_224_pixels_are_pooled_at_stride_16(small_cfg):
    # The paper's 14 x 14 map; a pyramid's own rule finds it. Where the others hold NaN, it shows.
    for name in ("ablations/faster_rcnn_R_50_FPN_2x.yaml", "COCO-Detection/d2det_R_50_FPN_2x.yaml"):
        model = build_model(small_cfg(name, *ON, "MODEL.MIMIC.CROP_SIZE", 224)).eval()
        sides = {"p2": 56, "p3": 28, "p4": 14, "p5": 7}
        maps = {n: torch.full((2, 16, s, s), torch.nan) for n, s in sides.items()}
        maps["p4"] = torch.rand(2, 16, 14, 14)
        model.backbone.forward = lambda patches, maps=maps: maps
        with torch.no_grad():
            assert model._patch_features(torch.zeros(2, 3, 224, 224)).isfinite().all()


def test_running_statistics_are_the_images_own(small_cfg, batch):
    inputs = batch(*OBJECTS)
    states = []
    for overrides in ((), ON):
        model = build_model(small_cfg("quickstart.yaml", *overrides))
        losses_of(model, inputs)
        states.append(model.backbone.state_dict())
    assert any("running_mean" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", ["d2det", "detectron2"])
def test_nothing_of_it_is_in_an_evaluated_model(name, small_cfg, batch, tmp_path):
    config, *overrides = DETECTORS[name]
    model = build_model(small_cfg(config, *overrides, *ON))
    plain = build_model(small_cfg(config, *overrides))
    trained = {n for n, _ in model.named_parameters()}
    assert trained - {n for n, _ in plain.named_parameters()} == {
        "mimic.cls_score.weight", "mimic.cls_score.bias"
    }  # fmt: skip
    classifier = model.mimic.cls_score.weight
    model.eval(), plain.eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]

    plain.load_state_dict(model.state_dict())
    inputs = batch((64, 96, [], []))
    with torch.no_grad():
        ours, theirs = (m(inputs)[0]["instances"] for m in (model, plain))
    assert len(ours) == len(theirs) > 0
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)

    assert "mimic.cls_score.weight" in copy.deepcopy(model).train().state_dict()
    assert model.eval().train().mimic.cls_score.weight is classifier  # the optimizer's own
    assert {n for n, _ in model.named_parameters()} == trained


@pytest.mark.filterwarnings("ignore")  # the tracer's, about detectron2
def test_nothing_of_it_is_in_an_exported_model(small_cfg, batch):
    from detectron2.export import TracingAdapter

    config, *overrides = DETECTORS["detectron2"]
    model = build_model(small_cfg(config, *overrides, *ON))
    losses_of(model, batch(*OBJECTS))
    inputs = [{"image": batch((64, 96, [], []))[0]["image"]}]
    with torch.no_grad():
        adapter = TracingAdapter(
            model.eval(), inputs, lambda m, x: m.inference(x, do_postprocess=False)
        )
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        assert len(traced(*adapter.flattened_inputs)) == 4  # as the model's Instances
    state = traced.state_dict()
    assert len(state) > 100
    assert not any("mimic" in name for name in [*state, *dict(traced.named_modules())])


def test_checkpoints_go_both_ways_without_a_word(small_cfg, tmp_path, caplog):
    model = build_model(small_cfg("quickstart.yaml", *ON))
    plain = build_model(small_cfg("quickstart.yaml"))
    Checkpointer(model, str(tmp_path)).save("trained")
    saved = torch.load(tmp_path / "trained.pth")["model"]
    assert "mimic.cls_score.weight" in saved
    with caplog.at_level(logging.INFO, logger="d2det"):
        Checkpointer(plain).load(str(tmp_path / "trained.pth"))
        load_trained(model, tmp_path / "trained.pth")
        Checkpointer(plain, str(tmp_path)).save("plain")  # or exported from evaluation mode
        load_trained(model, tmp_path / "plain.pth")
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert "mimic" not in caplog.text
    with torch.no_grad():
        saved["mimic.cls_score.weight"].fill_(7)
    torch.save({"model": saved}, tmp_path / "sevens.pth")
    model.train()
    Checkpointer(model).load(str(tmp_path / "sevens.pth"))  # to go on training
    assert (model.mimic.cls_score.weight == 7).all()


def test_mixed_precision_and_channels_last(small_cfg, batch):
    model = build_model(small_cfg("quickstart.yaml", *ON)).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = losses_of(model, batch(*OBJECTS))
    assert all(v.isfinite() for v in losses.values())
    assert losses["loss_mimic"].dtype == torch.float32
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.MIMIC.CROP_SIZE", 100), "multiple of 32"),
        (("MODEL.MIMIC.NUM_CROPS", 0), "positive"),
        (("MODEL.MIMIC.ROIS", "all"), "'all'"),
        (("MODEL.MIMIC.REDUCTION", "max"), "'max'"),
        (("MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
          "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True), "CascadeROIHeads"),
        (("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True), "TRAIN_ON_PRED_BOXES"),
    ],
)  # fmt: skip
def test_settings_that_do_not_work(overrides, message, small_cfg):
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg("shapes/detectron2_faster_rcnn.yaml", *ON, *overrides))


def test_switched_off_it_is_the_plain_detector(small_cfg, batch):
    for overrides in (("MODEL.MIMIC.ENABLED", False), ("MODEL.MIMIC.ROIS", "none")):
        model = build_model(small_cfg("quickstart.yaml", *ON, *overrides))
        losses, _ = losses_of(model, batch(*OBJECTS))
        assert not any("mimic" in name for name in losses)
        assert not any("mimic" in name for name, _ in model.named_parameters())


def test_mask_rcnn(small_cfg, batch):
    from detectron2.structures import BitMasks

    cfg = small_cfg("shapes/detectron2_faster_rcnn.yaml", *ON, "MODEL.MASK_ON", True,
                    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
                    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)  # fmt: skip
    model = build_model(cfg)
    inputs = batch(OBJECTS[1])
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 5:60, 5:40] = True
    inputs[0]["instances"].gt_masks = BitMasks(mask)
    losses, _ = losses_of(model, inputs)
    assert {"loss_mask", "loss_mimic", "loss_mimic_cls"} < set(losses)
    assert not any("mask_head" in name for name in gradients(model, losses["loss_mimic"]))
