"""The mask branch on the tower of dense regression (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskPredictor(nn.Module):
    """Two deconvolutions, from k x k to 4k x 4k, and a convolution to one mask for each class.

    Args:
        in_channels: channels of the tower.
        num_masks: masks of a RoI: K, or 1 where all classes share it.
        conv_dim: channels of the deconvolutions.
        norm: makes the normalisation layer after the first deconvolution; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        num_masks: int,
        *,
        conv_dim: int = 256,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(in_channels, conv_dim, kernel_size=2, stride=2)
        self.norm1 = nn.Identity() if norm is None else norm(conv_dim)
        self.deconv2 = nn.ConvTranspose2d(conv_dim, conv_dim, kernel_size=2, stride=2)
        self.predictor = nn.Conv2d(conv_dim, num_masks, kernel_size=3, padding=1)
        for deconv in (self.deconv1, self.deconv2):
            nn.init.kaiming_normal_(deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for bias in (self.deconv1.bias, self.deconv2.bias, self.predictor.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, trunk: Tensor) -> Tensor:
        """Mask logits (R, num_masks, 4k, 4k), in float32 at least, of the tower's (R, C, k, k)."""
        x = F.relu(self.norm1(self.deconv1(trunk)), inplace=True)
        x = F.relu(self.deconv2(x), inplace=True)
        return self.predictor(x).to(torch.promote_types(trunk.dtype, torch.float32))


def choose_class(masks: Tensor, classes: Tensor) -> Tensor:
    """The mask (R, m, m) of each RoI's class, out of (R, K, m, m), or (R, 1, m, m) for any class.

    Args:
        masks: masks or logits of all classes.
        classes: (R,) int64 in [0, K).
    """
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


def mask_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy of masks, averaged over the pixels of the RoIs that have one.

    Args:
        logits: (R, m, m), of the RoI's class.
        targets: (R, m, m), 0 or 1.
        valid: (R,) bool: which RoIs have a mask.

    Returns:
        A scalar; 0, from which gradients flow, where no RoI has a mask.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return (loss.mean(dim=(1, 2)) * valid).sum() / valid.sum().clamp(min=1)
