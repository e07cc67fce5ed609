"""The configs of LVIS, Objects365 and iSAID, shrunk but for their classes and limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage

SIZE = (96, 128)


def sample(num_classes: int) -> dict:
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 10:50, 20:60] = masks[1, 40:90, 70:120] = True
    truth = Instances(SIZE, gt_boxes=BitMasks(masks).get_bounding_boxes())
    truth.gt_classes = torch.tensor([0, num_classes - 1])
    truth.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8)
    return {"image": image, "instances": truth, "height": SIZE[0], "width": SIZE[1]}


@pytest.mark.parametrize(
    ("name", "classes", "least"),
    [
        ("LVIS/d2det_R_50_FPN", 1203, 300),
        ("Objects365/d2det_R_50_FPN_2x", 365, 300),
        ("iSAID/d2det_R_101_FPN", 15, 0),
    ],
)
def test_training_and_inference(name, classes, least, small_cfg):
    cfg = small_cfg(f"{name}.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", classes)
    # An untrained model's scores are about 1 / (K + 1), above the threshold of 1e-4.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = min(cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, 0.01)
    model = build_model(cfg)
    batch = [sample(classes) for _ in range(2)]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_cls"] > 0 and ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    model.eval()
    with torch.no_grad():
        results = [r["instances"] for r in model([{"image": b["image"]} for b in batch])]
    for found in results:
        assert least <= len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE
        assert ((found.pred_classes >= 0) & (found.pred_classes < classes)).all()
        if cfg.MODEL.MASK_ON:
            assert found.pred_masks.shape == (len(found), *SIZE)
