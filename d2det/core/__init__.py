"""The method, on plain tensors: no detectron2, no torchvision models.

Shape letters used throughout: R, number of RoIs; C, channels; k, side of the RoI grid; K, number of
classes; L, number of feature levels. Boxes are (x1, y1, x2, y2) in pixels, widths are x2 - x1.
"""

from d2det.core.deformable_pooling import DeformablePooling
from d2det.core.dense_regression import DensePrediction, DenseRegression
from d2det.core.discriminative_pooling import DiscriminativePooling
from d2det.core.grid import average_boxes, cell_centers, decode_offsets, encode_offsets
from d2det.core.jitter import jitter_boxes
from d2det.core.levels import assign_levels
from d2det.core.losses import dense_iou_loss, overlap_loss
from d2det.core.mask_branch import MaskBranch
from d2det.core.mask_targets import MaskTargets, crop_masks
from d2det.core.mimicking import crop_patches, mimic_loss, select_rois
from d2det.core.overlap import overlap_targets
from d2det.core.roi_align import MultiLevelRoIAlign
from d2det.core.sampling import sample_positives
from d2det.core.selection import (
    Candidates,
    SoftNMS,
    clip_boxes,
    nms_candidates,
    pool_candidates,
    suppress,
    threshold_candidates,
)

__all__ = [
    "Candidates",
    "DeformablePooling",
    "DensePrediction",
    "DenseRegression",
    "DiscriminativePooling",
    "MaskBranch",
    "MaskTargets",
    "MultiLevelRoIAlign",
    "SoftNMS",
    "assign_levels",
    "average_boxes",
    "cell_centers",
    "clip_boxes",
    "crop_masks",
    "crop_patches",
    "decode_offsets",
    "dense_iou_loss",
    "encode_offsets",
    "jitter_boxes",
    "mimic_loss",
    "nms_candidates",
    "overlap_loss",
    "overlap_targets",
    "pool_candidates",
    "sample_positives",
    "select_rois",
    "suppress",
    "threshold_candidates",
]
