"""Both hosts are the same detector: parameters interchange and results agree."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import d2det
from d2det.core import DetectionSettings
from d2det.modeling import D2DetROIHeads


@pytest.fixture(params=["boxes", "masks", "inclusive"])
def both(request, tiny, mask_settings):
    """The RoI heads of both hosts, the second one with the first one's state dict."""
    masks, inclusive = request.param == "masks", request.param == "inclusive"
    convention = "psroi" if inclusive else "aligned"
    ours = tiny(
        masks=mask_settings if masks else False,
        inclusive_boxes=inclusive,
        pooling={"offset_fc_dim": 8, "convention": convention},
    ).roi_heads
    cfg = d2det.add_d2det_config(get_cfg())
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["0", "1", "2"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.03
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10_000  # no sampling
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    box = cfg.MODEL.ROI_BOX_HEAD
    box.NAME, box.NUM_FC, box.FC_DIM = "FastRCNNConvFCHead", 2, 16
    box.POOLER_TYPE, box.POOLER_RESOLUTION = "DiscriminativeRoIPooler", 7
    box.DRP.OFFSET_FC_DIM = 8
    dense = cfg.MODEL.ROI_DENSE_REGRESSION_HEAD
    dense.NUM_CONV, dense.CONV_DIM, dense.NORM_GROUPS, dense.JITTER = 1, 12, 3, 0.0
    cfg.MODEL.ROI_HEADS.INCLUSIVE_BOXES = inclusive
    box.DRP.CONVENTION = convention
    if masks:
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_HEADS.NAME = "D2DetROIHeads"
        mask = cfg.MODEL.ROI_MASK_HEAD
        mask.NAME, mask.CONV_DIM, mask.DENSE.NORM, mask.SCORING.FC_DIM = "D2DetMaskHead", 8, "", 8
        ours.settings = DetectionSettings()
        torch.nn.init.constant_(ours.mask_head.masks.predictor.bias, 1.0)  # masks are not empty
    shapes = {str(i): ShapeSpec(channels=8, stride=8 * 2**i) for i in range(3)}
    theirs = D2DetROIHeads(cfg, shapes)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def maps(generator):
    return {
        str(i): torch.randn(2, 8, 16 // 2**i, 16 // 2**i, generator=generator) for i in range(3)
    }


def proposals(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat((corner, corner + 8 + torch.rand(count, 2, generator=generator) * 40), dim=1)


def filled(boxes, size):
    """Masks (G, H, W) that fill their boxes."""
    y, x = torch.meshgrid(*(torch.arange(s) + 0.5 for s in size), indexing="ij")
    x1, y1, x2, y2 = boxes.T[:, :, None, None]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def test_detections_agree(both):
    ours, theirs = both
    generator = torch.Generator().manual_seed(2)
    features, sizes = maps(generator), [(128, 120), (100, 128)]
    boxes = [proposals(generator, 30), proposals(generator, 17)]
    instances = [
        Instances(size, proposal_boxes=Boxes(b), objectness_logits=torch.zeros(len(b)))
        for size, b in zip(sizes, boxes, strict=True)
    ]
    with torch.no_grad():
        computed, _ = ours.eval()(features, boxes, sizes)
        expected, _ = theirs.eval()(None, features, instances)
    for a, b in zip(computed, expected, strict=True):
        assert len(a["boxes"]) > 10
        torch.testing.assert_close(a["boxes"], b.pred_boxes.tensor)
        torch.testing.assert_close(a["scores"], b.scores)
        assert torch.equal(a["labels"], b.pred_classes + 1)
        assert ("masks" in a) == b.has("pred_masks")
        if "masks" in a:
            torch.testing.assert_close(a["masks"], b.pred_masks)
            torch.testing.assert_close(a["mask_scores"], b.mask_scores)


def test_losses_agree(both):
    ours, theirs = both
    generator = torch.Generator().manual_seed(3)
    features, sizes = maps(generator), [(128, 120), (100, 128)]
    gt = [proposals(generator, 4), proposals(generator, 3)]
    labels = [torch.tensor([1, 3, 2, 2]), torch.tensor([3, 1, 1])]
    boxes = [
        torch.cat((proposals(generator, 20), g + torch.randn(g.shape, generator=generator)))
        for g in gt
    ]
    ours.fg_bg_sampler.batch_size_per_image = 10_000
    ours.fg_bg_sampler.positive_fraction = 1.0
    ours.jitter = 0.0
    targets = [{"boxes": b, "labels": c} for b, c in zip(gt, labels, strict=True)]
    masks = [filled(g, size) for g, size in zip(gt, sizes, strict=True)]
    for target, mask in zip(targets, masks, strict=True):
        target["masks"] = mask.byte()
    _, computed = ours.train()(features, [b.clone() for b in boxes], sizes, targets)
    instances, truth = [], []
    for size, b, g, c, m in zip(sizes, boxes, gt, labels, masks, strict=True):
        found = Instances(size)
        found.proposal_boxes = Boxes(b)
        found.objectness_logits = torch.zeros(len(b))
        instances.append(found)
        there = Instances(size)
        there.gt_boxes = Boxes(g)
        there.gt_classes = c - 1
        there.gt_masks = BitMasks(m)
        truth.append(there)
    with EventStorage():
        _, expected = theirs.train()(None, features, instances, truth)
    torch.testing.assert_close(computed["loss_classifier"], expected["loss_cls"])
    assert set(computed) - {"loss_classifier"} == set(expected) - {"loss_cls"}
    for name in set(expected) - {"loss_cls"}:
        assert computed[name] > 0
        torch.testing.assert_close(computed[name], expected[name])
