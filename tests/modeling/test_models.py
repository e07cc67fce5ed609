"""Whole detectors through detectron2: every config trains and predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torchvision.ops import box_iou

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob("*.yaml")
    # test_dcnv2.py has those of DCNv2.
    if not p.name.startswith("Base-") and p.parent.name != "DCNv2"
)
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
DENSE = RPN | {"loss_cls", "loss_dense_reg", "loss_overlap"}
DELTA = RPN | {"loss_cls", "loss_box_reg"}
MIMIC = {"loss_mimic", "loss_mimic_cls"}


def train_step(model, inputs):
    model.train()
    with EventStorage(0) as storage:
        losses = model(inputs)
        sum(losses.values()).backward()
    return losses, storage


def expected_losses(name: str) -> set[str]:
    if "mimic" in name:
        return DELTA | MIMIC
    if "deformable" in name:
        return DELTA
    if "no_overlap" in name:
        return DENSE - {"loss_overlap"}
    return DELTA if "faster_rcnn" in name or "drp" in name else DENSE


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_trains_and_predicts(name, small_cfg, batch):
    model = build_model(small_cfg(name))
    inputs = batch(
        (96, 128, [[10, 10, 60, 50], [70, 20, 120, 90]], [0, 2]), (80, 64, [[5, 5, 40, 70]], [1])
    )
    losses, _ = train_step(model, inputs)
    assert set(losses) == expected_losses(name)
    assert all(v.isfinite() for v in losses.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    for given, output in zip(inputs, outputs, strict=True):
        found = output["instances"]
        assert found.image_size == (given["height"], given["width"])
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert found.pred_classes.numel() == 0 or found.pred_classes.max() < 3


def test_the_four_rows_differ_only_in_their_branches(small_cfg):
    rows = {
        name: build_model(small_cfg(f"ablations/{name}_R_50_FPN_2x.yaml")).roi_heads
        for name in ("faster_rcnn", "dlr", "drp")
    }
    rows["d2det"] = build_model(small_cfg()).roi_heads
    dense = {name: heads.dense_head is not None for name, heads in rows.items()}
    pooler = {name: type(heads.box_pooler).__name__ for name, heads in rows.items()}
    assert dense == {"faster_rcnn": False, "dlr": True, "drp": False, "d2det": True}
    assert pooler["faster_rcnn"] == pooler["dlr"] == "ROIPooler"
    assert pooler["drp"] == pooler["d2det"] == "DiscriminativeRoIPooler"
    assert rows["faster_rcnn"].delta_branch is not None
    assert len({type(heads) for heads in rows.values()}) == 1


def test_shared_and_separate_heads(small_cfg):
    shared = build_model(small_cfg("ablations/faster_rcnn_shared_R_50_FPN_2x.yaml")).roi_heads
    assert shared.delta_branch is None
    with pytest.raises(ValueError, match="SHARED_BRANCH"):
        build_model(small_cfg("quickstart.yaml", "MODEL.ROI_HEADS.SHARED_BRANCH", True))


@pytest.mark.parametrize(
    "name", ["COCO-Detection/d2det_R_50_FPN_2x.yaml", "ablations/drp_R_50_FPN_2x.yaml"]
)
@pytest.mark.parametrize(
    "images",
    [
        [(64, 64, [], []), (64, 96, [], [])],  # nothing to find anywhere
        [(64, 64, [], []), (64, 96, [[8, 8, 50, 50]], [1])],
        [(64, 300, [[10, 5, 11, 60], [20, 30, 290, 58]], [0, 2])],  # one pixel wide; about 10:1
        [(33, 47, [[0, 0, 47, 33]], [2])],  # an object as large as its image
    ],
)
def test_unusual_images_train(name, images, small_cfg, batch):
    model = build_model(small_cfg(name))
    losses, _ = train_step(model, batch(*images))
    assert all(v.isfinite() for v in losses.values())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_positive_rois_are_capped(small_cfg, batch):
    cfg = small_cfg(
        "quickstart.yaml",
        "MODEL.ROI_DENSE_REGRESSION_HEAD.MAX_POSITIVE_PER_IMAGE", 2,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.9,
    )  # fmt: skip
    boxes = [[4 + i, 4, 60 + i, 60] for i in range(12)]
    _, storage = train_step(build_model(cfg), batch((64, 96, boxes, [0] * 12), (64, 64, [], [])))
    assert storage.latest()["dense_reg/num_rois"][0] == 4


def test_an_image_of_one_colour_predicts_and_a_non_finite_one_is_refused(small_cfg):
    for name in ("quickstart.yaml", "shapes/faster_rcnn.yaml"):
        model = build_model(small_cfg(name)).eval()
        gray = torch.full((3, 64, 64), 127.0)
        with torch.no_grad():
            assert "instances" in model([{"image": gray}])[0]
            gray[0, 5, 5] = float("nan")
            with pytest.raises(FloatingPointError, match="NaN or Inf"):
                model([{"image": gray}])


def test_no_detections(small_cfg, batch):
    model = build_model(small_cfg("quickstart.yaml", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0))
    with torch.no_grad():
        outputs = model.eval()(batch((64, 64, [], []), (64, 80, [], [])))
    assert [len(o["instances"]) for o in outputs] == [0, 0]


def test_a_batch_predicts_what_its_images_do_alone(small_cfg, batch):
    # Images of one size: batch padding would change the border features of any detector.
    model = build_model(small_cfg("COCO-Detection/d2det_R_50_FPN_2x.yaml")).eval()
    inputs = batch((96, 96, [], []), (96, 96, [], []))
    with torch.no_grad():
        together = model(inputs)
        alone = [model([x])[0] for x in inputs]
    for a, b in zip(together, alone, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-2, rtol=1e-4)


def test_masks_come_from_detectron2(small_cfg, batch):
    from detectron2.structures import BitMasks

    cfg = small_cfg("quickstart.yaml", "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME",
                    "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)  # fmt: skip
    cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg)
    inputs = batch((64, 64, [[8, 8, 50, 50]], [1]))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 8:50, 8:50] = True
    inputs[0]["instances"].gt_masks = BitMasks(mask)
    losses, _ = train_step(model, inputs)
    assert "loss_mask" in losses
    with torch.no_grad():
        assert model.eval()(inputs)[0]["instances"].has("pred_masks")


def test_a_faster_rcnn_lends_its_weights(small_cfg):
    plain = build_model(small_cfg("shapes/detectron2_faster_rcnn.yaml"))
    model = build_model(small_cfg("shapes/dlr.yaml"))
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("roi_heads.dense_head.") for name in result.missing_keys)
    assert set(result.unexpected_keys) == {
        "roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred.bias"
    }  # fmt: skip


@pytest.mark.slow
def test_overfits_one_image(small_cfg, batch):
    torch.manual_seed(0)
    cfg = small_cfg(
        "quickstart.yaml", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 32,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
    )  # fmt: skip
    model = build_model(cfg)
    boxes = [[10, 12, 58, 50], [60, 30, 120, 90], [20, 60, 44, 92]]
    inputs = batch((96, 128, boxes, [0, 1, 2]))
    for (x1, y1, x2, y2), colour in zip(boxes, (20, 120, 220), strict=True):
        inputs[0]["image"][:, y1:y2, x1:x2] = colour
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=200)
    for _ in range(200):
        optimizer.zero_grad()
        train_step(model, inputs)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    # The three best detections are the three objects, each with its class: AP50 is 1.
    iou = box_iou(torch.tensor(boxes).float(), found[:3].pred_boxes.tensor)
    match = iou.argmax(dim=1)
    assert sorted(match.tolist()) == [0, 1, 2]
    assert found.pred_classes[match].tolist() == [0, 1, 2]
    assert iou.max(dim=1).values.min() > 0.75
