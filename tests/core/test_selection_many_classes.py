"""NMS that looks at the best candidates first, against NMS over all of them."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import batched_nms

from d2det.core import nms_candidates, selection, threshold_candidates


def scene(
    num_rois: int, num_classes: int, *, spread: float, sharpness: float = 1.0, images: int = 1
):
    """Random boxes, scores of a softmax, and the image of each box."""
    centres = torch.rand(num_rois, 2) * spread
    sizes = 20 + 30 * torch.rand(num_rois, 2)
    boxes = torch.cat((centres - sizes / 2, centres + sizes / 2), dim=1)
    scores = (sharpness * torch.randn(num_rois, num_classes + 1)).softmax(dim=1)
    return boxes, scores, torch.randint(images, (num_rois,))


def expected(candidates, iou_threshold: float, limit: int) -> list[tuple[int, int, int]]:
    """(image, RoI, class) of what NMS over all candidates of an image leaves, the best `limit`."""
    found = []
    for image in candidates.images.unique():
        own = candidates.take(candidates.images == image)
        kept = batched_nms(own.boxes.double(), own.scores.double(), own.classes, iou_threshold)
        kept = kept[:limit]
        found += zip(
            [int(image)] * len(kept),
            own.rois[kept].tolist(),
            own.classes[kept].tolist(),
            strict=True,
        )
    return sorted(found)


def result(candidates, iou_threshold: float, limit: int, num_images: int):
    kept = nms_candidates(
        candidates, iou_threshold=iou_threshold, limit=limit, num_images=num_images
    )
    assert (kept.scores.diff() <= 0).all()
    return sorted(zip(kept.images.tolist(), kept.rois.tolist(), kept.classes.tolist(), strict=True))


@pytest.mark.parametrize("spread", [0.0, 30.0, 400.0])
@pytest.mark.parametrize(("num_classes", "limit"), [(1, 5), (3, 20), (60, 7), (60, 1)])
def test_equals_nms_over_all(num_classes, limit, spread):
    """Also where nearly all boxes lie on one another, so that many have to be looked at."""
    for images in (1, 3):
        boxes, scores, of = scene(150, num_classes, spread=spread, images=images)
        candidates = threshold_candidates(boxes, scores, of, 1e-4)
        found = result(candidates, 0.3, limit, images)
        assert found == expected(candidates, 0.3, limit)


def test_an_image_with_few_candidates_beside_one_with_many():
    boxes, scores, of = scene(200, 40, spread=200)
    of[:] = 1
    of[:3] = 0
    candidates = threshold_candidates(boxes, scores, of, 1e-4)
    assert result(candidates, 0.3, 10, 3) == expected(candidates, 0.3, 10)


def test_nothing_and_no_detections_wanted():
    boxes, scores, of = scene(50, 10, spread=100)
    candidates = threshold_candidates(boxes, scores, of, 2.0)
    assert result(candidates, 0.3, 10, 1) == []
    candidates = threshold_candidates(boxes, scores, of, 0.0)
    assert result(candidates, 0.3, 0, 1) == []


@pytest.mark.parametrize("num_classes", [365, 1203])
def test_large_vocabularies_compare_few_boxes(monkeypatch, num_classes):
    """1000 proposals at the start of a training: nearly all pairs exceed 1e-4."""
    compared = []
    true_nms = selection.nms

    def counting(boxes, scores, iou_threshold):
        compared.append(len(boxes))
        return true_nms(boxes, scores, iou_threshold)

    monkeypatch.setattr(selection, "nms", counting)
    boxes, scores, of = scene(1000, num_classes, spread=1000, sharpness=0.5)
    candidates = threshold_candidates(boxes, scores, of, 1e-4)
    assert len(candidates.scores) > 900 * num_classes
    kept = nms_candidates(candidates, iou_threshold=0.3, limit=300, num_images=1)
    assert len(kept.scores) == 300 and max(compared) <= 8 * 300
