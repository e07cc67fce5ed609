"""Test-time augmentation: against the plain model, and against loops over the views."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou, roi_align

pytest.importorskip("detectron2")

from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, ImageList, Instances

from d2det.core import Candidates, SoftNMS
from d2det.evaluation.tta import MeasuredTTA
from d2det.modeling import D2DetROIHeads
from d2det.modeling.tta import D2DetWithTTA, build_tta

MASKS = "shapes/d2det_masks.yaml"
CONFIGS = [
    "COCO-Detection/d2det_R_50_FPN_2x.yaml",
    "ablations/drp_R_50_FPN_2x.yaml",
    "ablations/faster_rcnn_R_50_FPN_2x.yaml",
    MASKS,
]


def picture(height=96, width=128, seed=0):
    rng = np.random.default_rng(seed)
    return torch.as_tensor(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


def given(image, scale=1):
    return {
        "image": image,
        "height": scale * image.shape[1],
        "width": scale * image.shape[2],
        "file_name": "",
    }


@pytest.fixture
def views(small_cfg):
    """A function that builds (cfg, model) with TEST.AUG set, and scores and masks that differ."""

    def build(name=CONFIGS[0], sizes=(96,), flip=False, *overrides):
        cfg = small_cfg(name, *overrides)
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = sizes, 400, flip
        model = build_model(cfg).eval()
        for name, parameter in model.roi_heads.named_parameters():
            if name.endswith("cls_score.weight") or name.startswith("mask_head"):
                # Scores that are all alike, or all 0 and 1, would tell little.
                nn.init.normal_(parameter, std=0.05 if name.startswith("mask") else 0.005)
        return cfg, model

    return build


def same(a, b, tolerance=None):
    assert a.image_size == b.image_size
    assert set(a.get_fields()) == set(b.get_fields())
    assert len(a) == len(b) > 0
    compare = torch.equal if tolerance is None else None
    for name, value in a.get_fields().items():
        one = value.tensor if isinstance(value, Boxes) else value
        other = b.get(name).tensor if isinstance(value, Boxes) else b.get(name)
        if compare:
            assert compare(one, other), name
        elif one.dtype == torch.bool:
            assert (one != other).float().mean() < 1e-3
        else:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_single_view_at_the_same_scale_is_the_plain_model(views, name, scale):
    cfg, model = views(name)
    inputs = [given(picture(), scale), given(picture(96, 112, seed=1), scale)]
    with torch.no_grad():
        plain = model(inputs[:1]) + model(inputs[1:])
        augmented = build_tta(cfg, model)(inputs)
    for one, other in zip(plain, augmented, strict=True):
        same(one["instances"], other["instances"])


def test_images_at_their_original_size_are_resized_once(views):
    cfg, model = views()
    original = picture(120, 150)
    resized = ResizeShortestEdge(96, 400).get_transform(original.permute(1, 2, 0).numpy())
    small = torch.as_tensor(
        resized.apply_image(original.permute(1, 2, 0).numpy()).transpose(2, 0, 1).copy()
    )
    with torch.no_grad():
        plain = model([{"image": small, "height": 120, "width": 150}])[0]["instances"]
        augmented = build_tta(cfg, model)([given(original)])[0]["instances"]
    same(plain, augmented, tolerance=1e-3)


def soft_nms_by_loop(boxes, scores, classes, limit, threshold=0.5, min_score=1e-3):
    """Linear soft-NMS in float64, one class after the other: (class, score, box) by score."""
    kept = []
    for label in set(classes.tolist()):
        mine = [(s, b) for s, b, c in zip(scores, boxes, classes, strict=True) if c == label]
        while mine:
            best = max(range(len(mine)), key=lambda i: mine[i][0])
            score, box = mine.pop(best)
            kept.append((label, float(score), box))
            rest = []
            for other, candidate in mine:
                iou = box_iou(box[None], candidate[None])[0, 0]
                other = other * (1 - iou) if iou > threshold else other
                if other >= min_score:
                    rest.append((other, candidate))
            mine = rest
    return sorted(kept, key=lambda item: -item[1])[:limit]


def test_merging_equals_a_loop_over_views_classes_and_boxes(views):
    cfg, model = views(
        CONFIGS[0], (64, 96), True, "TEST.DETECTIONS_PER_IMAGE", 25,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 12,
    )  # fmt: skip
    image = picture(96, 128)
    with torch.no_grad():
        found = build_tta(cfg, model)([given(image)])[0]["instances"]
        boxes, scores, classes = [], [], []
        for short in (64, 96):
            pixels = image.permute(1, 2, 0).numpy()
            pixels = ResizeShortestEdge(short, 400).get_transform(pixels).apply_image(pixels)
            for flip in (False, True):
                view = torch.as_tensor(pixels[:, ::-1].copy() if flip else pixels.copy())
                images = model.preprocess_image([{"image": view.permute(2, 0, 1)}])
                features = model.backbone(images.tensor)
                proposals, _ = model.proposal_generator(images, features, None)
                part = model.roi_heads.box_candidates(features, proposals)
                scale = torch.tensor([128 / view.shape[1], 96 / short] * 2, dtype=torch.float64)
                x1, y1, x2, y2 = (part.boxes * scale).unbind(1)
                x1, x2 = (128 - x2, 128 - x1) if flip else (x1, x2)
                boxes.append(torch.stack((x1, y1, x2, y2), dim=1))
                scores.append(part.scores.double())
                classes.append(part.classes)
    wanted = soft_nms_by_loop(torch.cat(boxes), torch.cat(scores), torch.cat(classes), 25)
    assert len(found) == len(wanted) == 25
    assert found.pred_classes.tolist() == [label for label, _, _ in wanted]
    np.testing.assert_allclose(found.scores, [score for _, score, _ in wanted], atol=1e-5)
    np.testing.assert_allclose(
        found.pred_boxes.tensor, torch.stack([box for _, _, box in wanted]), atol=1e-3
    )


def test_masks_and_their_scores_are_averages_over_the_views(views, monkeypatch):
    cfg, model = views(MASKS, (64, 96), True)
    image = picture(96, 128)
    monkeypatch.setattr("d2det.modeling.tta.detector_postprocess", lambda found, *_: found)
    with torch.no_grad():
        found = build_tta(cfg, model)([given(image)])[0]["instances"]
        masks, scores = [], []
        for short in (64, 96):
            pixels = image.permute(1, 2, 0).numpy()
            pixels = ResizeShortestEdge(short, 400).get_transform(pixels).apply_image(pixels)
            height, width = pixels.shape[:2]
            for flip in (False, True):
                view = torch.as_tensor(pixels[:, ::-1].copy() if flip else pixels.copy())
                x1, y1, x2, y2 = found.pred_boxes.tensor.unbind(1)
                x1, x2 = x1 * (width / 128), x2 * (width / 128)
                y1, y2 = y1 * (height / 96), y2 * (height / 96)
                x1, x2 = (width - x2, width - x1) if flip else (x1, x2)
                boxes = Instances((height, width))
                boxes.pred_boxes = Boxes(torch.stack((x1, y1, x2, y2), dim=1))
                boxes.pred_classes, boxes.scores = found.pred_classes, found.scores
                output = model.inference(
                    [{"image": view.permute(2, 0, 1)}], [boxes], do_postprocess=False
                )[0]
                mask = output.pred_masks.numpy()
                masks.append(mask[..., ::-1] if flip else mask)
                scores.append(output.mask_scores.numpy())
    assert len(found) > 0
    np.testing.assert_allclose(found.pred_masks, np.mean(masks, axis=0), atol=1e-4)
    np.testing.assert_allclose(found.mask_scores, np.mean(scores, axis=0), atol=1e-4)
    assert np.std(masks, axis=0).max() > 1e-3  # the views differ


class ToyHeads(nn.Module):
    """Finds rectangles by their grey value: the same in an image and in its mirror image."""

    detections = D2DetROIHeads.detections
    dense_head, nms_thresh, detections_per_image = "some", 0.5, 10

    def __init__(self, mask_on, soft_nms):
        super().__init__()
        self.mask_on, self.soft_nms = mask_on, soft_nms

    def box_candidates(self, features, proposals):
        boxes, scores, classes, images = [], [], [], []
        for number, image in enumerate(features["image"][:, 0]):
            for grey in image.unique()[1:].tolist():
                rows, columns = (image == grey).nonzero(as_tuple=True)
                ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                boxes.append([float(end) for end in ends])
                scores.append(grey / 200)
                classes.append(int(grey) % 3)
                images.append(number)
        boxes = torch.tensor(boxes).reshape(-1, 4)
        index = torch.tensor(images, dtype=torch.int64)
        labels = torch.tensor(classes, dtype=torch.int64)
        return Candidates(boxes, torch.tensor(scores), labels, index, torch.arange(len(index)))

    def forward_with_given_boxes(self, features, instances):
        for number, found in enumerate(instances):
            boxes = found.pred_boxes.tensor
            rois = torch.cat((torch.full((len(boxes), 1), float(number)), boxes), dim=1)
            crop = roi_align(features["image"][:, :1] / 255, rois, 28, aligned=True)
            found.pred_masks = crop
            found.mask_scores = found.scores + 0.3 * crop.amax(dim=(1, 2, 3))
        return instances


class Toy(GeneralizedRCNN):
    def __init__(self, mask_on=True, soft_nms=SoftNMS()):  # noqa: B008
        nn.Module.__init__(self)
        self.roi_heads = ToyHeads(mask_on, soft_nms)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))  # its device is the model's
        self.backbone = lambda tensor: {"image": tensor}
        self.proposal_generator = lambda *_: ([], {})

    def preprocess_image(self, inputs):
        return ImageList.from_tensors([x["image"].float() for x in inputs])


def rectangles():
    image = torch.zeros(3, 50, 81, dtype=torch.uint8)
    image[:, 5:25, 3:30], image[:, 12:20, 8:14], image[:, 30:47, 20:75] = 90, 150, 60
    image[:, 2:9, 60:80] = 33
    return image


@pytest.mark.parametrize("soft_nms", [SoftNMS(), None], ids=["soft", "none"])
def test_mirror_images_add_nothing_where_the_model_sees_the_same(small_cfg, soft_nms):
    model = Toy(soft_nms=soft_nms).eval()
    cfg = small_cfg()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (50,), 400
    found = []
    for cfg.TEST.AUG.FLIP in (False, True):
        found.append(D2DetWithTTA(cfg, model)([given(rectangles())])[0]["instances"])
    assert len(found[0]) == 4
    same(*found, tolerance=1e-6)
    assert [3, 5, 30, 25] in found[1].pred_boxes.tensor.int().tolist()


def test_pooled_boxes_that_nothing_suppresses_are_merged_by_plain_nms(views):
    """Models with masks have no soft-NMS: without a rule of its own, each view would repeat all."""
    cfg, model = views(MASKS, (96, 100), True)
    model.roi_heads.soft_nms = None
    with torch.no_grad():
        found = build_tta(cfg, model)([given(picture())])[0]["instances"]
    for label in found.pred_classes.unique():
        boxes = found.pred_boxes.tensor[found.pred_classes == label]
        ious = box_iou(boxes, boxes).fill_diagonal_(0)
        assert ious.max() <= model.roi_heads.nms_thresh + 1e-4


@pytest.mark.parametrize("mask_on", [True, False])
def test_nothing_found(small_cfg, mask_on):
    cfg = small_cfg()
    cfg.TEST.AUG.MIN_SIZES = (50, 60)
    empty = torch.zeros(3, 50, 81, dtype=torch.uint8)
    found = D2DetWithTTA(cfg, Toy(mask_on).eval())([given(empty)])[0]["instances"]
    assert len(found) == 0 and found.image_size == (50, 81)
    assert found.has("pred_masks") == found.has("mask_scores") == mask_on
    if mask_on:
        assert found.pred_masks.shape == (0, 50, 81)


def test_views_of_one_size_go_through_together_and_others_do_not(views):
    cfg, model = views(CONFIGS[0], (64, 96), True)
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        build_tta(cfg, model)([given(picture())])
    assert shapes == [(2, 3, 64, 96), (2, 3, 96, 128)]  # padded to a multiple of 32, no further


def test_detectron2s_models_keep_detectron2s_augmentation(small_cfg):
    cfg = small_cfg(CONFIGS[0])
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    model = build_model(cfg)
    assert type(build_tta(cfg, model)) is GeneralizedRCNNWithTTA
    with pytest.raises(ValueError, match="StandardROIHeads is not D2DetROIHeads"):
        D2DetWithTTA(cfg, model)


def test_models_that_it_does_not_serve(small_cfg):
    cfg = small_cfg()
    with pytest.raises(ValueError, match="needs a model of the R-CNN family; Linear is none"):
        build_tta(cfg, nn.Linear(1, 1))
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="neither MODEL.KEYPOINT_ON"):
        build_tta(cfg, Toy())


def test_the_cost_is_logged_once(views, caplog):
    cfg, model = views(CONFIGS[0], (64, 96), True)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 400
    measured = MeasuredTTA(cfg, model)
    image = picture(120, 160)
    logging.getLogger("d2det").propagate = True
    with caplog.at_level(logging.INFO, "d2det"), torch.no_grad():
        outputs = [measured([given(image)])[0]["instances"] for _ in range(3)]
        assert not caplog.records
        measured.report()
        measured.report()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "4 views an image (shorter sides 64, 96, each mirrored too)" in line
    ratio = 2 * (64 * 85 + 96 * 128) / (64 * 85)
    assert f"{ratio:.1f} times the pixels" in line
    assert re.search(r"\d+\.\d\d s an image beside \d+\.\d\d s .*mean of 2\)", line)
    with torch.no_grad():
        same(outputs[0], build_tta(cfg, model)([given(image)])[0]["instances"])
