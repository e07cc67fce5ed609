"""Every configuration key that d2det adds to detectron2's, with the reason for it.

Section numbers refer to the D2Det paper (Cao et al., CVPR 2020) unless a line says otherwise. A key
whose meaning detectron2 already covers is not repeated here: its own key is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_d2det_config(cfg: CfgNode) -> CfgNode:
    """Add d2det's keys, with their defaults, to a detectron2 config.

    The defaults are the paper's heads: with `MODEL.ROI_HEADS.NAME: "D2DetROIHeads"`,
    `MODEL.ROI_BOX_HEAD.POOLER_TYPE: "DiscriminativeRoIPooler"` and `POOLER_RESOLUTION: 7` a Faster
    R-CNN config becomes D2Det. The rest of the recipe is in configs/Base-D2Det-FPN.yaml. Calling it
    twice is harmless: values already changed are kept.

    Args:
        cfg: the config to extend, in place.

    Returns:
        The same object, so that calls can be chained.
    """
    from detectron2.config import CfgNode as CN

    if "ROI_DENSE_REGRESSION_HEAD" in cfg.MODEL:
        return cfg
    _add_roi_heads(cfg, CN)
    _add_discriminative_roi_pooling(cfg, CN)
    _add_deformable_roi_pooling(cfg, CN)
    _add_dense_regression(cfg, CN)
    _add_masks(cfg, CN)
    _add_backbone(cfg)
    _add_segmentation(cfg)
    _add_mimicking(cfg, CN)
    _add_solver(cfg)
    _add_test(cfg, CN)
    return cfg


def _add_roi_heads(cfg: CfgNode, CN: type) -> None:
    heads = cfg.MODEL.ROI_HEADS
    # Sec. 3: classification and regression never share features. True gives the paper's other
    # baseline (Table 2, "shared head"), possible only with dense regression switched off.
    heads.SHARED_BRANCH = False
    # The RoI branches see boxes that name their last pixel (x2 - x1 + 1 wide), as the releases'
    # weights were trained on; the rest of detectron2 goes on with boxes that end behind it.
    heads.INCLUSIVE_BOXES = False
    # Boxes that go on to dense regression after NMS on the proposals (releases: 125).
    heads.PRE_REGRESSION_TOPK = 125
    # Per-class soft-NMS on the regressed boxes (Bodla et al., ICCV 2017). Several proposals may be
    # moved onto one object: with no NMS here (ENABLED False), all of them are returned.
    heads.SOFT_NMS = CN()
    heads.SOFT_NMS.ENABLED = True  # False: no NMS after dense regression
    heads.SOFT_NMS.METHOD = "linear"  # or "gaussian"; "hard" is plain NMS
    heads.SOFT_NMS.IOU_THRESH = 0.5  # "linear", "hard": overlap that is punished
    heads.SOFT_NMS.SIGMA = 0.5  # "gaussian": width of the decay
    heads.SOFT_NMS.MIN_SCORE = 1e-3  # boxes whose score falls below this are dropped
    # Weight of the classification loss: the releases double it against the RPN's losses.
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_WEIGHT = 2.0


def _add_discriminative_roi_pooling(cfg: CfgNode, CN: type) -> None:
    # Sec. 3.2; read where ROI_BOX_HEAD.POOLER_TYPE is "DiscriminativeRoIPooler".
    cfg.MODEL.ROI_BOX_HEAD.DRP = drp = CN()
    # Side of the RoI features from which offsets are predicted. 0: half of POOLER_RESOLUTION,
    # rounded down ("light-weight"); POOLER_RESOLUTION: the full k x k of deformable RoI pooling.
    drp.OFFSET_RESOLUTION = 0
    drp.OFFSET_FC_DIM = 1024  # width of the two hidden layers that predict offsets
    drp.GAMMA = 0.1  # an offset of 1 shifts a bin by this fraction of the RoI's size
    # Points a side in each of the 2k x 2k bins; 1: the paper's four points a cell are the bins.
    drp.SAMPLING_RATIO = 1
    drp.OFFSET_SAMPLING_RATIO = 2  # the same in the bins that predict offsets
    # "normalized": sum(w f) / sum(w), w = exp(c sigmoid); as released.
    # "unnormalized": average of 2 sigmoid * f over the window; as the paper writes it.
    # "none": uniform weights, i.e. deformable RoI pooling; the paper's ablation.
    drp.WEIGHTING = "normalized"
    drp.WEIGHT_COEFFICIENT = 12.0  # c above; the releases' value
    drp.PER_LEVEL = True  # a set of parameters for each FPN level, as released; or one for all
    # "aligned": half-pixel RoIAlign; "psroi": the releases' rounding, for converted weights.
    drp.CONVENTION = "aligned"


def _add_deformable_roi_pooling(cfg: CfgNode, CN: type) -> None:
    # Read where POOLER_TYPE of ROI_BOX_HEAD, or of ROI_MASK_HEAD, is "DeformRoIPooler" (Dai et al.,
    # ICCV 2017) or "ModulatedDeformRoIPooler" (DCNv2: Zhu et al., CVPR 2019, Sec. 3.2). In
    # detectron2's own models, with ROI_HEADS.NAME "DeformableROIHeads".
    cfg.MODEL.DEFORM_ROI_POOLING = deform = CN()
    deform.GAMMA = 0.1  # an offset of 1 shifts a bin by this fraction of the RoI's size
    deform.SAMPLING_RATIO = 2  # points a side in each bin
    # Side of the RoI features from which offsets are predicted. A mask head's 14 x 14 pooling has
    # the same: 14 would cost it 51 M parameters in the first FC layer alone.
    deform.OFFSET_RESOLUTION = 7
    deform.FC_DIM = 1024  # width of the modulated form's two hidden layers; the other has none
    deform.CONVENTION = "aligned"  # or "psroi", as for DRP


def _add_dense_regression(cfg: CfgNode, CN: type) -> None:
    # Sec. 3.1.
    cfg.MODEL.ROI_DENSE_REGRESSION_HEAD = dense = CN()
    # False: a second two-FC branch with plain box deltas (the paper's baseline).
    dense.ENABLED = True
    dense.NAME = "DenseLocalRegressionHead"  # in ROI_DENSE_REGRESSION_HEAD_REGISTRY
    dense.POOLER_RESOLUTION = 14  # RoIAlign's output; the first convolution halves it
    dense.POOLER_SAMPLING_RATIO = 2  # points a side in each bin of RoIAlign
    # The tower: 8 x 576 costs 2.2 GFLOP a RoI; narrow it where only a CPU is at hand.
    dense.NUM_CONV = 8
    dense.CONV_DIM = 576  # channels of each of those convolutions
    dense.NORM = "GN"  # "" for none; "GN" uses NORM_GROUPS, where detectron2's would use 32
    dense.NORM_GROUPS = 36  # of GroupNorm; CONV_DIM is a multiple of it
    # Predicted offsets at the start, as a fraction of the proposal: 0.5 from every cell is a box
    # of about the proposal's size; 0 would be an empty box, which has no gradient.
    dense.INIT_OFFSET = 0.5
    # Sec. 3.1, binary overlap. False: all cells are averaged with equal weight (Table 3).
    dense.OVERLAP = True
    # A cell is foreground if it lies at least this far inside the box, as a fraction of the
    # proposal. 1/6 as released; 0 is Eq. 3.
    dense.OVERLAP_MARGIN = 1.0 / 6.0
    dense.OVERLAP_THRESH = 0.5  # cells at or below this probability do not vote at inference
    dense.LOSS_WEIGHT = 2.0  # of -log(IoU), averaged over all cells of the sampled RoIs
    dense.OVERLAP_LOSS_WEIGHT = 1.0  # of the binary cross-entropy over the same cells
    # Positive proposals are moved and resized by up to this fraction in training; 0: never.
    dense.JITTER = 0.15
    # Positive RoIs that train the tower: at most this many times the images on a GPU.
    dense.MAX_POSITIVE_PER_IMAGE = 96


def _add_masks(cfg: CfgNode, CN: type) -> None:
    # Sec. 3.3; read where MASK_ON is set and ROI_MASK_HEAD.NAME is "D2DetMaskHead", with
    # detectron2's CONV_DIM (256 as released) and CLS_AGNOSTIC_MASK. No POOLER_* key is: the mask
    # branch reads the tower of dense regression.
    cfg.MODEL.ROI_MASK_HEAD.DENSE = dense = CN()
    dense.NORM = "GN"  # after the first deconvolution; "" for none; "GN" uses NORM_GROUPS
    dense.NORM_GROUPS = 16  # of GroupNorm
    dense.LOSS_WEIGHT = 1.0  # of the binary cross-entropy, averaged over pixels
    # Cells of dense regression are foreground by the object's mask (28 x 28 shrunk to 7 x 7), for
    # objects that have one; False: by its box, Eq. 3.
    dense.OVERLAP_LABELS = True
    dense.OVERLAP_LABEL_THRESH = 0.5  # a shrunk mask exceeds it in foreground cells
    dense.MASK_THRESH = 0.5  # probability above which a pixel counts in the target of mask scoring
    # Mask IoU scoring (Mask Scoring R-CNN, CVPR 2019).
    cfg.MODEL.ROI_MASK_HEAD.SCORING = scoring = CN()
    scoring.ENABLED = True  # False: masks are ranked by class score, as boxes are
    scoring.FC_DIM = 1024  # width of its hidden layers
    scoring.NUM_FC = 2  # how many there are, at least 1
    scoring.LOSS_WEIGHT = 0.5  # of the squared error, averaged over the sampled RoIs with masks
    scoring.MIN_IOU = 0.1  # masks whose IoU does not exceed it do not train the prediction
    # How masks are ranked; boxes keep the class score. "sum": class score + IOU_WEIGHT * IoU, as
    # released; "product": class score * IoU (Mask Scoring R-CNN).
    scoring.RANKING = "sum"
    scoring.IOU_WEIGHT = 0.3  # of the predicted IoU in "sum"


def _add_backbone(cfg: CfgNode) -> None:
    # Read by "build_d2det_resnet_backbone" and its FPN form. True: BatchNorm keeps its fixed
    # statistics but trains scale and shift in the stages that are not frozen (recipe of the
    # releases; 38.5 against 37.9 AP in MMDetection's Table 6).
    cfg.MODEL.RESNETS.TRAIN_NORM_AFFINE = False
    # Read by "build_d2det_resnet_c5_backbone": channels of its output "c5", conv5 reduced by a
    # 1 x 1 convolution (DCNv2's detector, which has no pyramid).
    cfg.MODEL.RESNETS.C5_CHANNELS = 256


def _add_segmentation(cfg: CfgNode) -> None:
    from detectron2.projects.deeplab import add_deeplab_config

    # detectron2's DeepLab keys. Those of MODEL.RESNETS (STEM_TYPE, RES4_DILATION, RES5_MULTI_GRID)
    # are read by its own backbone alone, "build_resnet_deeplab_backbone".
    if "ASPP_CHANNELS" not in cfg.MODEL.SEM_SEG_HEAD:
        add_deeplab_config(cfg)


def _add_mimicking(cfg: CfgNode, CN: type) -> None:
    # Deformable ConvNets v2, Sec. 3.3; read where META_ARCHITECTURE is "MimickingRCNN". Training
    # only: False leaves a GeneralizedRCNN.
    cfg.MODEL.MIMIC = mimic = CN()
    mimic.ENABLED = False  # True: train with the branch; it is dropped from evaluated models
    mimic.LOSS_WEIGHT = 0.1  # of 1 - cos(R-CNN feature, detector's feature)
    mimic.CLS_LOSS_WEIGHT = 0.1  # of the R-CNN classifier's cross-entropy
    mimic.CROP_SIZE = 224  # side of the resized patches
    mimic.NUM_CROPS = 32  # RoIs an image, at most
    # "foreground" (43.1 AP in Table 3), "foreground+background" (42.1), "background" (41.7) or
    # "none" (41.7: no mimicking).
    mimic.ROIS = "foreground"
    # "sum" over an image's RoIs, as the paper writes it, averaged over the images; or "mean" over
    # all RoIs, which does not grow with their number.
    mimic.REDUCTION = "sum"


def _add_solver(cfg: CfgNode) -> None:
    # Images a step for which BASE_LR, MAX_ITER, STEPS and the periods are written. When it is not 0
    # and differs from the real number (IMS_PER_BATCH * ACCUMULATE), all of them are scaled.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # Forward and backward passes before each optimizer step; an iteration is one step.
    cfg.SOLVER.ACCUMULATE = 1
    # Learning rate of the layers that predict a deformable convolution's offsets and modulation, as
    # a multiple of the others' (DCNv2: 0.1; D2Det's releases: 1). RoI poolers are not meant.
    cfg.SOLVER.OFFSET_LR_FACTOR = 1.0
    # Precision under SOLVER.AMP.ENABLED: "fp16", "bf16", or "auto" (fp16 on GPU, bf16 on CPU).
    cfg.SOLVER.AMP.PRECISION = "auto"
    # Metric whose best value is kept as model_best.pth, e.g. "bbox/AP"; empty: not kept.
    cfg.SOLVER.BEST_CHECKPOINT = ""


def _add_test(cfg: CfgNode, CN: type) -> None:
    # "coco", "lvis", "pascal_voc" or "uavdt" for all of DATASETS.TEST; empty: what the data set
    # itself asks for (a JSON from the command line: "coco").
    cfg.TEST.EVALUATOR = ""
    # COCO evaluation (evaluator_type "coco").
    cfg.TEST.COCO = coco = CN()
    # Area ranges: [label, smallest, largest area in pixels], each a metric "AP<label>"; the default
    # is COCO's. iSAID's, with MAX_DETS 1000: [["s", 100, 20736], ["m", 20736, 262144],
    # ["l", 262144, 1e10]] (10^2, 144^2, 512^2).
    coco.AREA_RANGES = [["s", 0, 1024], ["m", 1024, 9216], ["l", 9216, 1e10]]
    # Best detections of an image that count, class by class as in pycocotools. The model returns at
    # most TEST.DETECTIONS_PER_IMAGE.
    coco.MAX_DETS = 100
    # How average precision is taken on PASCAL VOC: "11 points" (VOC 2007's), "area" (since 2010),
    # or "year", by that of the test set, as in detectron2.
    cfg.TEST.VOC_METRIC = "year"
    # Read by the evaluator "uavdt": least IoU of the paper's PASCAL VOC AP and of the data set's
    # toolkit (sources give 0.7 and 0.5); whether the former is VOC 2007's mean of 11 points.
    cfg.TEST.UAVDT = CN()
    cfg.TEST.UAVDT.VOC_IOU_THRESH = 0.7  # of the paper's AP
    cfg.TEST.UAVDT.TOOLKIT_IOU_THRESH = 0.7  # of the toolkit's AP
    cfg.TEST.UAVDT.ELEVEN_POINT = False  # True: VOC 2007's 11 points; False: the area
    # Pictures of detections beside ground truth that are written after an evaluation; 0: none.
    cfg.TEST.NUM_PICTURES = 16
    cfg.TEST.PICTURE_SCORE_THRESH = 0.3  # detections below this score are not drawn
