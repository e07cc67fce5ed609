"""The four operators of D2Det and DCNv2, each with a compiled kernel or a PyTorch reference.

`python -m d2det.ops` prints which of the two each operator uses here.
"""

from .adaptive_weighted_pool import adaptive_weighted_pool
from .deform_roi_pool import deform_roi_pool
from .modulated_deform_conv import modulated_deform_conv2d
from .soft_nms import soft_nms

__all__ = ["adaptive_weighted_pool", "deform_roi_pool", "modulated_deform_conv2d", "soft_nms"]
