"""Training inputs with masks, and what training on them should do."""

from __future__ import annotations

from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage

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
