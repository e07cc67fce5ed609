"""DeepLabV3's head for test images of any size."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import DeepLabV3Head


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3AnySizeHead(DeepLabV3Head):
    """detectron2's `DeepLabV3Head`, its image-level pooling over the whole image.

    Where training crops images, detectron2's pools over windows as large as the crop, and then
    refuses images that are not a multiple of it, as PASCAL VOC's are. The parameters are the same.
    """

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.CROP.ENABLED = False
        super().__init__(cfg, input_shape)
