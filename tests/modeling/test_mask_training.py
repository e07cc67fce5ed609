"""Instance segmentation through detectron2: every config, training and its options."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage

from .mask_batches import LOSSES, QUICK, SCORED, TWO, add_masks, check_training, train_step


@pytest.mark.parametrize(
    "name",
    [
        QUICK,
        "shapes/d2det_masks.yaml",
        "COCO-InstanceSegmentation/d2det_R_50_FPN_2x.yaml",
        "COCO-InstanceSegmentation/d2det_R_101_FPN_2x.yaml",
    ],
)
@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_every_config_trains_and_predicts(name, kind, small_cfg, batch):
    model = build_model(small_cfg(name))
    inputs = add_masks(batch(*TWO), kind)
    _, scalars = check_training(model, inputs)
    assert {"mask/accuracy", "mask/mean_iou", "mask/iou_error"} <= set(scalars)
    with torch.no_grad():
        outputs = model.eval()(inputs)
    for given, output in zip(inputs, outputs, strict=True):
        found = output["instances"]
        assert set(found.get_fields()) == {
            "pred_boxes", "scores", "pred_classes", "pred_masks", "mask_scores"
        }  # fmt: skip
        assert found.pred_masks.shape == (len(found), given["height"], given["width"])
        assert found.pred_masks.dtype == torch.bool
        assert found.mask_scores.isfinite().all()
    assert sum(len(output["instances"]) for output in outputs) > 0


def test_detectron2s_mask_rcnn_trains_on_the_same(small_cfg, batch):
    model = build_model(small_cfg("shapes/detectron2_mask_rcnn.yaml"))
    losses, _ = train_step(model, add_masks(batch(*TWO), "polygon"))
    assert "loss_mask" in losses and "loss_dense_reg" not in losses


def test_released_inference(small_cfg):
    from detectron2.config import get_cfg

    from d2det import add_d2det_config

    from .conftest import CONFIGS

    for name in ("R_50", "R_101"):
        cfg = add_d2det_config(get_cfg())
        cfg.merge_from_file(str(CONFIGS / f"COCO-InstanceSegmentation/d2det_{name}_FPN_2x.yaml"))
        heads = cfg.MODEL.ROI_HEADS
        assert (cfg.MODEL.RPN.POST_NMS_TOPK_TEST, heads.SCORE_THRESH_TEST) == (700, 0.05)
        assert (heads.NMS_THRESH_TEST, heads.SOFT_NMS.ENABLED) == (0.3, False)
        assert (heads.PRE_REGRESSION_TOPK, cfg.TEST.DETECTIONS_PER_IMAGE) == (100, 100)


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
@pytest.mark.parametrize("lacking", [(0,), (1,), (0, 1)])
def test_images_without_masks_in_the_batch(kind, lacking, small_cfg, batch):
    model = build_model(small_cfg(QUICK))
    losses, _ = check_training(model, add_masks(batch(*TWO), kind, lacking))
    assert (losses["loss_mask"] > 0) == (len(lacking) < 2)
    assert losses["loss_dense_reg"] > 0


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
@pytest.mark.parametrize(
    "images",
    [
        [(64, 64, [], []), (64, 96, [], [])],  # no positives at all
        [(64, 64, [], []), (64, 96, [[8, 8, 50, 50]], [1])],
        [(64, 64, [[30, 20, 31, 21]], [1])],  # one pixel
        [(64, 64, [[-20, -10, 30, 40], [40, 30, 90, 70]], [0, 2])],  # cut by the border
    ],
)
def test_unusual_images_train(kind, images, small_cfg, batch):
    check_training(build_model(small_cfg(QUICK)), add_masks(batch(*images), kind))


def test_an_empty_mask_trains_by_its_box(small_cfg, batch):
    model = build_model(small_cfg(QUICK))
    inputs = add_masks(batch(TWO[0]))
    inputs[0]["instances"].gt_masks.tensor[:] = False
    losses, _ = check_training(model, inputs)
    assert losses["loss_mask"] == losses["loss_mask_iou"] == 0
    assert losses["loss_dense_reg"] > 0


@pytest.mark.parametrize("labels", [True, False])
def test_masks_label_the_cells_of_dense_regression(labels, small_cfg, batch, monkeypatch):
    model = build_model(small_cfg(QUICK, "MODEL.ROI_MASK_HEAD.DENSE.OVERLAP_LABELS", labels))
    given, losses = [], model.roi_heads.dense_head.losses
    monkeypatch.setattr(
        model.roi_heads.dense_head, "losses", lambda *a: given.append(a) or losses(*a)
    )
    train_step(model, add_masks(batch(*TWO), "bitmask", lacking=(1,)))
    ((_, boxes, _, overlap),) = given
    assert (overlap is not None) == labels
    if labels:
        cells, valid = overlap
        assert cells.shape == (len(boxes), 1, 7, 7) and valid.shape == (len(boxes),)
        assert 0 < valid.sum() < len(boxes)  # the second image has no masks
        share = cells[valid].mean()  # of triangles that fill half of their boxes
        assert 0.2 < share < 0.7 and cells[~valid].sum() == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True], SCORED),
        (["MODEL.ROI_MASK_HEAD.SCORING.ENABLED", False], LOSSES),
        (["MODEL.ROI_MASK_HEAD.DENSE.NORM", ""], SCORED),
        (["MODEL.ROI_DENSE_REGRESSION_HEAD.OVERLAP", False], SCORED - {"loss_overlap"}),
        (["MODEL.ROI_DENSE_REGRESSION_HEAD.POOLER_RESOLUTION", 10], SCORED),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 117], SCORED),
    ],
)
def test_options(overrides, expected, small_cfg, batch):
    model = build_model(small_cfg(QUICK, *overrides))
    inputs = add_masks(batch(*TWO))
    check_training(model, inputs, expected)
    with torch.no_grad():
        found = model.eval().inference(inputs, do_postprocess=False)[0]
    side = 20 if "MODEL.ROI_DENSE_REGRESSION_HEAD.POOLER_RESOLUTION" in overrides else 28
    assert found.pred_masks.shape == (len(found), 1, side, side)
    assert found.has("mask_scores") == ("loss_mask_iou" in expected)


def test_widths_come_from_the_config(small_cfg):
    model = build_model(small_cfg(QUICK, "MODEL.ROI_HEADS.NUM_CLASSES", 5))
    head = model.roi_heads.mask_head
    assert head.masks.deconv1.in_channels == 12 and head.masks.deconv1.out_channels == 8
    assert head.masks.norm1.num_groups == 4
    assert head.masks.predictor.out_channels == head.scorer.predictor.out_features == 5
    assert head.scorer.fcs[0].in_features == 13 * 49
    assert head.side == 28


def test_mixed_precision_and_channels_last(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).to(memory_format=torch.channels_last)
    inputs = add_masks(batch(*TWO))
    with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.eval()(inputs)[0]["instances"]
    assert found.mask_scores.dtype == torch.float32


def test_clear_errors(small_cfg):
    with pytest.raises(ValueError, match="CONV_DIM 8 is not a multiple of DENSE.NORM_GROUPS 3"):
        build_model(small_cfg(QUICK, "MODEL.ROI_MASK_HEAD.DENSE.NORM_GROUPS", 3))
    with pytest.raises(ValueError, match="not 'best'"):
        build_model(small_cfg(QUICK, "MODEL.ROI_MASK_HEAD.SCORING.RANKING", "best"))
    with pytest.raises(ValueError, match="ROI_DENSE_REGRESSION_HEAD.ENABLED True"):
        build_model(small_cfg(QUICK, "MODEL.ROI_DENSE_REGRESSION_HEAD.ENABLED", False))
    cfg = small_cfg("shapes/detectron2_mask_rcnn.yaml")
    cfg.MODEL.ROI_MASK_HEAD.NAME = "D2DetMaskHead"
    with pytest.raises(ValueError, match="StandardROIHeads has not: set that to D2DetROIHeads"):
        build_model(cfg)


def test_a_detectors_checkpoint_lacks_the_mask_head_only(small_cfg):
    detector = build_model(small_cfg("quickstart.yaml"))
    model = build_model(small_cfg(QUICK))
    result = model.load_state_dict(detector.state_dict(), strict=False)
    assert not result.unexpected_keys
    mask = {n for n, _ in model.named_parameters() if n.startswith("roi_heads.mask_head.")}
    assert set(result.missing_keys) == mask and mask


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_overfits_one_image(kind, small_cfg, batch):
    torch.manual_seed(0)
    cfg = small_cfg(
        QUICK, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
        "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
        "MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    )  # fmt: skip
    model = build_model(cfg)
    boxes = [[10, 12, 58, 50], [60, 30, 120, 90], [20, 60, 44, 92]]
    inputs = add_masks(batch((96, 128, boxes, [0, 1, 2])), kind)
    polygons = PolygonMasks([[[x1, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes])
    masks = BitMasks.from_polygon_masks(polygons, 96, 128).tensor
    for mask, colour in zip(masks, (20, 120, 220), strict=True):
        inputs[0]["image"][:, mask] = colour
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=300)
    for _ in range(300):
        optimizer.zero_grad()
        train_step(model, inputs)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    overlaps, expected = [], []
    for mask, cls in zip(masks, range(3), strict=True):
        best = (found.pred_classes == cls).nonzero()[0, 0]  # highest score first
        guess = found.pred_masks[best]
        overlaps.append(((guess & mask).sum() / (guess | mask).sum()).item())
        expected.append((found.mask_scores - found.scores)[best].item() / 0.3)
    # A mask that fills its box would have 0.5.
    assert min(overlaps) > 0.6 and sum(overlaps) / 3 > 0.75, overlaps
    assert expected == pytest.approx(overlaps, abs=0.25)
