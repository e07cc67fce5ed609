"""D2Det R50-FPN as a LazyConfig: the layers of COCO-Detection/d2det_R_50_FPN_2x.yaml.

Train it with detectron2's `tools/lazyconfig_train_net.py`. Data, optimizer and schedule (2x, 16
images a step) are detectron2's own; unlike in the yaml file, scale and shift of the backbone's
norms stay frozen.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from d2det.core import MultiLevelRoIAlign, SoftNMS
from d2det.modeling import (
    ClassPredictor,
    D2DetROIHeads,
    DenseLocalRegressionHead,
    DiscriminativeRoIPooler,
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.proposal_generator.pre_nms_topk = (2000, 1000)
model.proposal_generator.post_nms_topk = (2000, 1000)
model.proposal_generator.anchor_boundary_thresh = 0
model.proposal_generator.smooth_l1_beta = 0.1111

STRIDES = (4, 8, 16, 32)
model.roi_heads = L(D2DetROIHeads)(
    num_classes=80,
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=model.roi_heads.proposal_matcher,
    box_in_features=["p2", "p3", "p4", "p5"],
    box_pooler=L(DiscriminativeRoIPooler)(
        in_channels=256, strides=STRIDES, output_size=7, sampling_ratio=2
    ),
    box_head=L(FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=256, height=7, width=7), conv_dims=[], fc_dims=[1024, 1024]
    ),
    box_predictor=L(ClassPredictor)(
        in_features=1024, num_classes="${..num_classes}", loss_weight=2.0
    ),
    dense_pooler=L(MultiLevelRoIAlign)(output_size=14, strides=STRIDES, sampling_ratio=2),
    dense_head=L(DenseLocalRegressionHead)(
        input_shape=ShapeSpec(channels=256, height=14, width=14)
    ),
    soft_nms=L(SoftNMS)(),
)

dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.test.mapper.image_format = "RGB"
optimizer.params.weight_decay_norm = 1e-4
train.max_iter = 180000  # where lr_multiplier_2x ends
# torchvision's weights as detectron2 offers them: RGB, with the statistics above.
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
