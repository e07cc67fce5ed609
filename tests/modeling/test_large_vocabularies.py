"""A small detector with as many classes as LVIS and Objects365 have."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from d2det.engine.setup import get_cfg

SIZE = (96, 128)


def sample(num_classes: int) -> dict:
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 10:50, 20:60] = masks[1, 40:90, 70:120] = True
    truth = Instances(SIZE, gt_boxes=BitMasks(masks).get_bounding_boxes())
    truth.gt_classes = torch.tensor([0, num_classes - 1])
    truth.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8)
    return {"image": image, "instances": truth, "height": SIZE[0], "width": SIZE[1]}


@pytest.mark.parametrize("num_classes", [365, 1203])
def test_training_and_inference(num_classes):
    cfg = get_cfg("shapes/d2det_masks")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1e-4
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.3
    cfg.MODEL.ROI_HEADS.PRE_REGRESSION_TOPK = cfg.TEST.DETECTIONS_PER_IMAGE = 40
    model = build_model(cfg)
    batch = [sample(num_classes) for _ in range(2)]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_cls"] > 0 and losses["loss_mask"] > 0
    model.eval()
    with torch.no_grad():
        results = [r["instances"] for r in model([{"image": b["image"]} for b in batch])]
    for found in results:
        # Untrained, every class has a score of about 1 / (K + 1), which exceeds 1e-4.
        assert len(found) == 40 and found.pred_masks.shape == (40, *SIZE)
        assert 0 <= found.pred_classes.min() and found.pred_classes.max() < num_classes
        assert isinstance(found.pred_boxes, Boxes)
