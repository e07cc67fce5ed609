"""D2Det models in torchvision's style: images and targets in, losses or predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from d2det.core import DenseRegression, DiscriminativePooling, MaskBranch, MultiLevelRoIAlign
from d2det.core.detection import DetectionSettings
from d2det.torchvision.roi_heads import ClassificationHead, ClassScores, D2DetRoIHeads


class _Anchors(AnchorGenerator):
    """Anchors in float32: torchvision makes them in the maps' type, and bfloat16 has 8 bits."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [maps.float() for maps in feature_maps])


class _RPNHead(RPNHead):
    """Predictions in float32, from which torchvision decodes proposals in the same type."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


# The paper's for instance segmentation: 100 boxes, no soft-NMS.
MASK_DETECTION = DetectionSettings(
    score_threshold=0.05,
    nms_threshold=0.3,
    pre_regression_topk=100,
    detections_per_image=100,
    soft_nms=None,
)


class D2Det(GeneralizedRCNN):
    """D2Det (Cao et al., CVPR 2020) on a backbone with a feature pyramid.

    Called as torchvision's `FasterRCNN`: a list of images (3, H, W) in [0, 1], RGB, and in training
    a list of targets with "boxes" (G, 4), x1, y1, x2, y2 in pixels, and "labels" (G,) int64 from 1.
    Returns losses in training, else for each image "boxes" (M, 4), "labels" (M,), "scores" (M,).

    With masks, targets may have "masks" (G, H, W) uint8, and predictions have "masks" (M, 1, H, W),
    probabilities, and "mask_scores" (M,), by which masks are ranked.

    Args:
        backbone: gives maps "0", "1", ..., each half as large as the one before, and "pool"; has
            `out_channels`.
        num_classes: with background, as in torchvision.
        strides: of the maps "0", "1", ..., from which RoIs are pooled.
        min_size, max_size, image_mean, image_std: as torchvision's `FasterRCNN`.
        anchor_sizes: one for each map, "pool" included.
        rpn_*: as torchvision's `FasterRCNN`; 700 proposals at test time with masks, else 1000.
        batch_size_per_image, positive_fraction, fg_iou_thresh, bg_iou_thresh: RoIs that train.
        fc_dim: width of the classification branch.
        pooling: arguments of `d2det.core.DiscriminativePooling`.
        regression: arguments of `d2det.core.DenseRegression`; the releases' tower by default.
        detection: from scores to detections; the releases' test settings by default, with masks
            those for instance segmentation.
        inclusive_boxes: see `D2DetRoIHeads`; for weights of the authors' releases.
        masks: predict masks too (Sec. 3.3): True, or arguments of `d2det.core.MaskBranch`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        strides: tuple[int, ...] = (4, 8, 16, 32),
        min_size: int | tuple[int, ...] = 800,
        max_size: int = 1333,
        image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
        anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int | None = None,
        rpn_nms_thresh: float = 0.7,
        rpn_batch_size_per_image: int = 256,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.5,
        fc_dim: int = 1024,
        pooling: Mapping[str, Any] | None = None,
        regression: Mapping[str, Any] | None = None,
        detection: DetectionSettings | None = None,
        masks: Mapping[str, Any] | bool = False,
        inclusive_boxes: bool = False,
    ) -> None:
        with_masks = masks is not False
        if rpn_post_nms_top_n_test is None:
            rpn_post_nms_top_n_test = 700 if with_masks else 1000
        channels = backbone.out_channels
        assert isinstance(channels, int)
        anchors = _Anchors(
            tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        )
        rpn = RegionProposalNetwork(
            anchors,
            _RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=0.5,
            pre_nms_top_n={"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            post_nms_top_n={
                "training": rpn_post_nms_top_n_train,
                "testing": rpn_post_nms_top_n_test,
            },
            nms_thresh=rpn_nms_thresh,
        )
        box_pooler = DiscriminativePooling(
            channels, strides, **{"inclusive_boxes": inclusive_boxes, **(pooling or {})}
        )
        classes = num_classes - 1
        if classes < 1:
            raise ValueError(f"num_classes counts background: at least 2, got {num_classes}")
        dense_head = DenseRegression(channels, **{"norm": group_norm, **(regression or {})})
        mask_head = None
        if with_masks:
            settings = {"norm": mask_norm, **(masks if isinstance(masks, Mapping) else {})}
            mask_head = MaskBranch(dense_head.conv_dim, 7, classes, **settings)
        roi_heads = D2DetRoIHeads(
            box_pooler=box_pooler,
            box_head=ClassificationHead(channels * box_pooler.output_size**2, fc_dim),
            box_predictor=ClassScores(fc_dim, classes),
            dense_pooler=MultiLevelRoIAlign(
                14, strides, 2, "inclusive" if inclusive_boxes else "aligned"
            ),
            inclusive_boxes=inclusive_boxes,
            dense_head=dense_head,
            mask_head=mask_head,
            feature_names=[str(i) for i in range(len(strides))],
            num_classes=classes,
            settings=detection or (MASK_DETECTION if with_masks else DetectionSettings()),
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
        )
        transform = GeneralizedRCNNTransform(
            min_size,
            max_size,
            list(image_mean),
            list(image_std),
        )
        super().__init__(backbone, rpn, roi_heads, transform)


def group_norm(channels: int) -> nn.GroupNorm:
    """The releases' GroupNorm of the regression tower: 36 groups."""
    return nn.GroupNorm(36, channels)


def mask_norm(channels: int) -> nn.GroupNorm:
    """The releases' GroupNorm of the mask branch: 16 groups."""
    return nn.GroupNorm(16, channels)
