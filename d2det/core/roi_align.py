"""RoIAlign over all feature levels in one call (the regression branch's pooling)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2det.core.levels import assign_levels
from d2det.ops import deform_roi_pool


class MultiLevelRoIAlign(nn.Module):
    """RoIAlign of RoIs from the level that fits their size.

    Args:
        output_size: bins a side, o.
        strides: of the L levels, fine to coarse, each twice the one before.
        sampling_ratio: points a side in each bin, at least 1.
        convention: "aligned" (RoIAlign with the half-pixel shift) or "psroi" (the releases').
    """

    def __init__(
        self,
        output_size: int,
        strides: Sequence[float],
        sampling_ratio: int = 2,
        convention: str = "aligned",
    ) -> None:
        super().__init__()
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
        return deform_roi_pool(
            list(features),
            rois,
            assign_levels(rois[:, 1:], self.strides),
            output_size=self.output_size,
            spatial_scales=[1 / s for s in self.strides],
            sampling_ratio=self.sampling_ratio,
            convention=self.convention,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, strides={self.strides}, "
            f"sampling_ratio={self.sampling_ratio}, convention={self.convention!r}"
        )
