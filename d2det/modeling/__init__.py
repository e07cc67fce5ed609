"""The detectron2 plugin's models: importing this registers them with detectron2."""

from d2det.modeling.backbone import (
    build_d2det_resnet_backbone,
    build_d2det_resnet_c5_backbone,
    build_d2det_resnet_fpn_backbone,
)
from d2det.modeling.box_branches import ClassPredictor
from d2det.modeling.dense_head import (
    ROI_DENSE_REGRESSION_HEAD_REGISTRY,
    DenseLocalRegressionHead,
    build_dense_regression_head,
)
from d2det.modeling.mask_head import D2DetMaskHead
from d2det.modeling.mimic import FeatureMimicking, MimickingRCNN
from d2det.modeling.pooler import (
    ROI_POOLER_REGISTRY,
    DeformRoIPooler,
    DiscriminativeRoIPooler,
    ModulatedDeformRoIPooler,
    build_box_pooler,
)
from d2det.modeling.roi_heads import D2DetROIHeads
from d2det.modeling.standard_heads import DeformableROIHeads
from d2det.modeling.tta import D2DetWithTTA, build_tta

__all__ = [
    "ROI_DENSE_REGRESSION_HEAD_REGISTRY",
    "ROI_POOLER_REGISTRY",
    "ClassPredictor",
    "D2DetMaskHead",
    "D2DetROIHeads",
    "D2DetWithTTA",
    "DeformRoIPooler",
    "DeformableROIHeads",
    "DenseLocalRegressionHead",
    "DiscriminativeRoIPooler",
    "ModulatedDeformRoIPooler",
    "FeatureMimicking",
    "MimickingRCNN",
    "build_box_pooler",
    "build_d2det_resnet_backbone",
    "build_d2det_resnet_c5_backbone",
    "build_d2det_resnet_fpn_backbone",
    "build_dense_regression_head",
    "build_tta",
]
