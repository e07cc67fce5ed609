"""RoIAlign over all feature levels in one call (the regression branch's pooling)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2det.core.levels import assign_levels
from d2det.ops import deform_roi_pool

CONVENTIONS = ("aligned", "psroi", "inclusive")


class MultiLevelRoIAlign(nn.Module):
    """RoIAlign of RoIs from the level that fits their size.

    Args:
        output_size: bins a side, o.
        strides: of the L levels, fine to coarse, each twice the one before.
        sampling_ratio: points a side in each bin, at least 1.
        convention: "aligned" (RoIAlign with the half-pixel shift), "psroi" (as the releases'
            deformable pooling) or "inclusive" (as the releases' RoIAlign: boxes name their last
            pixel and are not shifted by half a pixel of their level).

    Raises:
        ValueError: another convention.
    """

    def __init__(
        self,
        output_size: int,
        strides: Sequence[float],
        sampling_ratio: int = 2,
        convention: str = "aligned",
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
        self.output_size = output_size
        self.strides = tuple(strides)
        self.sampling_ratio = sampling_ratio
        self.convention = convention

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pool.

        Args:
            features: L tensors (N, C, Hl, Wl).
            rois: (R, 5), batch index and box in pixels.

        Returns:
            (R, C, o, o).
        """
        level = assign_levels(rois[:, 1:], self.strides, inclusive=self.convention == "inclusive")
        if self.convention == "inclusive":
            rois = unshifted(rois, level, self.strides)
        return deform_roi_pool(
            list(features),
            rois,
            level,
            output_size=self.output_size,
            spatial_scales=[1 / s for s in self.strides],
            sampling_ratio=self.sampling_ratio,
            convention="psroi" if self.convention == "psroi" else "aligned",
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, strides={self.strides}, "
            f"sampling_ratio={self.sampling_ratio}, convention={self.convention!r}"
        )


def unshifted(rois: Tensor, level: Tensor, strides: Sequence[float]) -> Tensor:
    """RoIs whose "aligned" pooling is the releases' RoIAlign of `rois`, which are inclusive.

    That one samples from x1 / stride to (x2 + 1) / stride; "aligned" takes half a pixel off both.

    Args:
        rois: (R, 5), batch index and box, the last pixel included.
        level: (R,) int64.
        strides: of the levels.

    Returns:
        (R, 5).
    """
    half = strides[0] / 2 * torch.exp2(level.to(rois.dtype))
    ends = rois.new_tensor([0, 0, 1, 1])
    return torch.cat((rois[:, :1], rois[:, 1:] + ends + half[:, None]), dim=1)
