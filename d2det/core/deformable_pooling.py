"""Deformable RoI pooling (DCNv1) and modulated deformable RoI pooling (DCNv2, Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2det.core.levels import assign_levels
from d2det.ops import deform_roi_pool


class DeformablePooling(nn.Module):
    """RoI pooling whose bins are moved, and scaled if modulated, as FC layers say.

        y(k) = sum_j x(p_kj + gamma * offset_k * (w, h)) * modulation_k / n_k

    The FC layers see the same RoI, plainly pooled. The last one starts at zero: pooling starts as
    RoIAlign, or as half of it where the modulation, a sigmoid, starts at 0.5. All levels share the
    layers, and the RoIs of all levels are pooled in one call.

    Args:
        in_channels: channels C of every level.
        strides: of the L levels, fine to coarse, each twice the one before.
        output_size: k, bins a side of the result.
        modulated: predict modulation beside offsets.
        hidden_dims: widths of the FC layers before the last. DCNv1 has none, DCNv2 (1024, 1024).
        offset_resolution: side of the plainly pooled features that the FC layers see.
        gamma: an offset of 1 shifts a bin by this fraction of the RoI's width or height.
        sampling_ratio: points a side in each bin.
        convention: "aligned" or "psroi".
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[float],
        *,
        output_size: int = 7,
        modulated: bool = False,
        hidden_dims: Sequence[int] = (),
        offset_resolution: int = 7,
        gamma: float = 0.1,
        sampling_ratio: int = 2,
        convention: str = "aligned",
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = output_size
        self.modulated = modulated
        self.offset_resolution = offset_resolution
        self.gamma = gamma
        self.sampling_ratio = sampling_ratio
        self.convention = convention
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_channels * offset_resolution**2
        for dim in hidden_dims:
            hidden = nn.Linear(width, dim)
            nn.init.normal_(hidden.weight, std=0.01)
            nn.init.zeros_(hidden.bias)
            layers += [hidden, nn.ReLU(inplace=True)]
            width = dim
        last = nn.Linear(width, (3 if modulated else 2) * output_size**2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.offset_fc = nn.Sequential(*layers, last)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pool.

        Args:
            features: L tensors (N, C, Hl, Wl).
            rois: (R, 5), batch index and box in pixels.

        Returns:
            (R, C, k, k).
        """
        levels = assign_levels(rois[:, 1:], self.strides)
        plain = self._sample(features, rois, levels, None, None, self.offset_resolution)
        offset, modulation = self.offsets(plain)
        return self._sample(features, rois, levels, offset, modulation, self.output_size)

    def offsets(self, plain: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets and modulation from the plainly pooled features.

        Args:
            plain: (R, C, m, m), m the `offset_resolution`.

        Returns:
            Offsets (R, 2, k, k), x before y, as fractions of the RoI before `gamma`, and modulation
            (R, 1, k, k) in (0, 1), or None.
        """
        raw = self.offset_fc(plain).unflatten(1, (-1, self.output_size, self.output_size))
        if not self.modulated:
            return raw, None
        return raw[:, :2], raw[:, 2:].sigmoid()

    def _sample(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        levels: Tensor,
        offset: Tensor | None,
        modulation: Tensor | None,
        output_size: int,
    ) -> Tensor:
        return deform_roi_pool(
            list(features),
            rois,
            levels,
            offset,
            modulation,
            output_size=output_size,
            spatial_scales=[1 / s for s in self.strides],
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
            convention=self.convention,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, strides={self.strides}, modulated={self.modulated}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, "
            f"convention={self.convention!r}"
        )
