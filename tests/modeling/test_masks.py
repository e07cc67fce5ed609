"""Instance segmentation through detectron2: targets, training, inference, its own tools."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from d2det.modeling.mask_targets import SharedMasks, mask_targets, share_masks

QUICK = "quickstart_masks.yaml"
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_dense_reg", "loss_overlap", "loss_mask"}
SCORED = LOSSES | {"loss_mask_iou"}
TWO = (
    (96, 128, [[10, 10, 60, 50], [70, 20, 120, 90]], [0, 2]),
    (80, 64, [[5, 5, 40, 70]], [1]),
)


def add_masks(inputs, kind="bitmask", lacking=()):
    """Give each object the triangle below its box's falling diagonal; none to `lacking` images."""
    for number, given in enumerate(inputs):
        instances = given["instances"]
        boxes = instances.gt_boxes.tensor.tolist()
        if number in lacking or not boxes:
            continue
        polygons = PolygonMasks([[[x1, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes])
        if kind == "bitmask":
            polygons = BitMasks.from_polygon_masks(polygons, *instances.image_size)
        instances.gt_masks = polygons
    return inputs


def train_step(model, inputs):
    model.train()
    with EventStorage(0) as storage:
        losses = model(inputs)
        sum(losses.values()).backward()
    return losses, storage.latest()


def check_training(model, inputs, expected=SCORED):
    losses, scalars = train_step(model, inputs)
    assert set(losses) == expected
    assert all(v.isfinite() for v in losses.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return losses, scalars


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


# ------------------------------------------------------------------------------------- targets


def objects(kind):
    """Random quadrilaterals, and boxes near their own."""
    generator = np.random.default_rng(0)
    polygons = []
    for _ in range(12):
        angle = np.sort(generator.uniform(0, 2 * np.pi, 5))
        radius = generator.uniform(10, 28, 5)
        points = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
        polygons.append([(points + generator.uniform(32, 64, 2)).ravel()])
    masks = PolygonMasks(polygons)
    boxes = masks.get_bounding_boxes().tensor
    size = boxes[:, 2:] - boxes[:, :2]
    noise = torch.from_numpy(generator.uniform(-0.15, 0.15, (12, 4))).float()
    boxes = boxes + noise * size.repeat(1, 2)
    return (masks if kind == "polygon" else BitMasks.from_polygon_masks(masks, 96, 96)), boxes


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_targets_are_detectron2s_crops(kind):
    masks, boxes = objects(kind)
    targets = SharedMasks(masks, torch.arange(12)).targets(boxes, 28)
    expected = masks.crop_and_resize(boxes, 28)
    # pycocotools' polygons are rounded to the pixel of the target, ours to a quarter of it.
    assert (targets.masks == expected).float().mean() > (0.985 if kind == "bitmask" else 0.96)
    assert 0.2 < expected.float().mean() < 0.9
    assert targets.valid.all()


def test_polygons_and_bitmaps_have_the_same_targets():
    polygons, boxes = objects("polygon")
    bitmaps, _ = objects("bitmask")
    index = torch.tensor([3, 3, 0, 11])
    boxes = boxes[index]
    boxes[1, 2:] -= 6
    a, b = (SharedMasks(m, index).targets(boxes, 28) for m in (polygons, bitmaps))
    assert (a.masks == b.masks).float().mean() > 0.97
    torch.testing.assert_close(a.shares, b.shares, atol=0.02, rtol=0)
    assert a.shares[1] < a.shares[0]


def test_polygons_with_holes_of_annotation_and_lines():
    masks = PolygonMasks([[], [[5.0, 5.0, 30.0, 30.0, 5.0, 5.0]], [[2.0, 2, 20, 2, 20, 20, 2, 20]]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [5.0, 5, 30, 30], [0.0, 0, 20, 20]])
    targets = SharedMasks(masks, torch.arange(3)).targets(boxes, 28)
    assert targets.valid[0].item() is False and targets.valid[2].item() is True
    assert not targets.masks[0].any()
    assert all(x.isfinite().all() for x in targets)


def test_shared_masks_are_indexed_without_copies():
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9], [5.0, 5, 20, 20]]))
    instances.gt_masks = BitMasks(torch.ones(2, 20, 30, dtype=torch.bool))
    (shared,) = share_masks([instances])
    assert isinstance(instances.gt_masks, BitMasks)
    many = shared[torch.tensor([1, 1, 0, 1])][torch.tensor([True, False, True, True])]
    assert many.gt_masks.index.tolist() == [1, 0, 1]
    assert many.gt_masks.masks is instances.gt_masks
    assert len(many) == len(many.gt_masks) == 3
    assert many.gt_masks[1].index.tolist() == [0]
    plain = Instances((20, 30), gt_boxes=Boxes(torch.zeros(0, 4)))
    assert not share_masks([plain])[0].has("gt_masks")


def test_targets_of_a_batch_belong_to_their_proposals():
    proposals = []
    for size, fill in (((20, 30), 0), ((16, 16), None), ((40, 40), 1)):
        p = Instances(size)
        p.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [4.0, 4, 16, 16]]))
        if fill is not None:
            masks = torch.zeros(2, *size, dtype=torch.bool)
            masks[fill] = True
            p.gt_masks = SharedMasks(BitMasks(masks), torch.arange(2))
        proposals.append(p)
    rows, images = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([0, 0, 1, 2, 2])
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5)
    targets = mask_targets(proposals, rows, images, boxes, 28)
    assert targets.valid.tolist() == [True, False, False, False, True]
    assert targets.masks.flatten(1).all(1).tolist() == targets.valid.tolist()


# ------------------------------------------------------------------------------------ training


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


# ----------------------------------------------------------------------------------- inference


def test_boxes_are_pooled_again_for_masks_and_suppressed_before_regression_only(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    heads, calls = model.roi_heads, []
    heads.dense_pooler.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    with torch.no_grad():
        (found,) = model.inference(batch(TWO[0]), do_postprocess=False)
        (_, first), (maps, second) = calls[0][0], calls[1][0]
        assert torch.equal(second[:, 1:], found.pred_boxes.tensor)
        assert not torch.equal(first, second)
        # The candidates of NMS are all returned, in their order: nothing suppresses afterwards.
        assert len(first) == len(second)
        trunk = heads.dense_head.tower(heads.dense_pooler(maps, second))
        masks, ranks = heads.mask_head.predict(trunk, found.pred_classes, found.scores)
    assert torch.equal(found.pred_masks, masks) and torch.equal(found.mask_scores, ranks)
    assert found.scores.diff().max() <= 0


def test_masks_of_given_boxes(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    inputs = batch(*TWO)
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)
        expected = [(x.pred_masks, x.mask_scores) for x in found]
        given = []
        for x in found:
            y = Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes)
            given.append(y)
            y.scores = x.scores
        again = model.inference(inputs, given, do_postprocess=False)
        for x, (masks, ranks) in zip(again, expected, strict=True):
            torch.testing.assert_close(x.pred_masks, masks)
            torch.testing.assert_close(x.mask_scores, ranks)
        scores = [x.scores for x in given]
        for x in given:
            x.remove("scores")
        for x, s in zip(model.inference(inputs, given, do_postprocess=False), scores, strict=True):
            # As certain as can be: the rank is 1 where it was the class score.
            torch.testing.assert_close(x.mask_scores + s - 1, expected.pop(0)[1])


def test_no_detections(small_cfg, batch):
    model = build_model(small_cfg(QUICK, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)).eval()
    inputs = batch((64, 64, [], []), (64, 80, [], []))
    with torch.no_grad():
        for output in model(inputs):
            assert output["instances"].mask_scores.shape == (0,)
            assert output["instances"].pred_masks.shape[0] == 0


def test_a_batch_predicts_what_its_images_do_alone(small_cfg, batch):
    model = build_model(small_cfg("COCO-InstanceSegmentation/d2det_R_50_FPN_2x.yaml")).eval()
    inputs = batch((96, 96, [], []), (96, 96, [], []))
    with torch.no_grad():
        together = model.inference(inputs, do_postprocess=False)
        alone = [model.inference([x], do_postprocess=False)[0] for x in inputs]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.mask_scores, b.mask_scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.pred_masks, b.pred_masks, atol=1e-4, rtol=1e-4)


def test_masks_are_pasted_where_their_boxes_are(small_cfg, batch):
    model = build_model(small_cfg(QUICK)).eval()
    torch.nn.init.zeros_(model.roi_heads.mask_head.masks.predictor.weight)
    torch.nn.init.ones_(model.roi_heads.mask_head.masks.predictor.bias)  # the mask fills its box
    inputs = batch((64, 80, [], []))
    inputs[0]["height"], inputs[0]["width"] = 128, 160
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
    assert found.pred_masks.shape[1:] == (128, 160)
    boxes = BitMasks(found.pred_masks).get_bounding_boxes().tensor
    large = found.pred_boxes.area() > 100
    assert large.any()
    assert (boxes - found.pred_boxes.tensor)[large].abs().max() < 2.5


def photo(height: int = 96, width: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_default_predictor_and_test_time_augmentation(small_cfg, tmp_path):
    cfg = small_cfg(QUICK)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = 96, (64, 96), True
    found = DefaultPredictor(cfg)(photo())["instances"]
    assert found.pred_masks.shape == (len(found), 96, 128) and len(found) > 0
    image = torch.as_tensor(photo().transpose(2, 0, 1).copy())
    given = {"image": image, "height": 192, "width": 256, "file_name": ""}
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([given])[0]["instances"]
    assert found.pred_masks.shape == (len(found), 192, 256) and len(found) > 0


def test_coco_evaluator_takes_the_predictions(small_cfg, batch, tmp_path):
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    model = build_model(small_cfg(QUICK)).eval()
    with torch.no_grad():
        found = model(batch(TWO[0]))[0]["instances"]
    rows = instances_to_coco_json(found, 1)
    assert len(rows) == len(found) and all("segmentation" in row for row in rows)
    assert [row["score"] for row in rows] == found.scores.tolist()


def test_masks_are_counted_with_the_second_pass_of_the_tower(small_cfg):
    from d2det.tools.count import count

    name = "COCO-InstanceSegmentation/d2det_R_50_FPN_2x.yaml"
    cfg = small_cfg(name, "TEST.DETECTIONS_PER_IMAGE", 4)
    with_masks = count(cfg, 64, 64)
    without = count(small_cfg(name, "MODEL.MASK_ON", False), 64, 64)
    # Of a RoI, in multiply-adds: two 3x3 convolutions of the tower, two deconvolutions, three masks
    # of 8 channels, three FC layers.
    tower = 49 * 9 * (16 * 12 + 12 * 12)
    masks = 49 * 4 * 12 * 8 + 196 * 4 * 8 * 8 + 784 * 9 * 8 * 3
    scores = 13 * 49 * 16 + 16 * 16 + 16 * 3
    assert with_masks.products - without.products == 4 * (tower + masks + scores)


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
