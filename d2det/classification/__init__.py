"""Deformable ResNets and ResNeXts as image classifiers, in timm's form.

Importing this registers `resnet50_dcnv1`, `resnet50_dcnv2`, ... with timm (`MODELS` lists them;
the plain ones are timm's own). timm's training script, run by `python -m d2det.classification`,
then knows them; `d2det.tools.convert_classifier` makes a detector's backbone of the result.
"""

from __future__ import annotations

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError(
        "d2det.classification needs timm, which is not installed: pip install timm"
    ) from error

from d2det.classification.resnet import MODELS, DeformableConv2d, DeformResNet

__all__ = ["MODELS", "DeformableConv2d", "DeformResNet"]
