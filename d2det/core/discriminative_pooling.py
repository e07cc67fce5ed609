"""Discriminative RoI pooling: light-weight offsets, then adaptive weighting (Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2det.core.levels import assign_levels
from d2det.ops import adaptive_weighted_pool, deform_roi_pool

WEIGHTINGS = ("normalized", "unnormalized", "none")


class OffsetPredictor(nn.Sequential):
    """Three FC layers from small RoI features (R, C, m, m) to offsets (R, 2, k, k), x before y.

    The last layer starts at zero: pooling starts as plain RoIAlign.
    """

    def __init__(self, in_channels: int, resolution: int, fc_dim: int, output_size: int) -> None:
        last = nn.Linear(fc_dim, 2 * output_size**2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        hidden = [nn.Linear(in_channels * resolution**2, fc_dim), nn.Linear(fc_dim, fc_dim)]
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(
            nn.Flatten(),
            hidden[0],
            nn.ReLU(inplace=True),
            hidden[1],
            nn.ReLU(inplace=True),
            last,
            nn.Unflatten(1, (2, output_size, output_size)),
        )


class WeightPredictor(nn.Module):
    """Logits of the adaptive weights: InstanceNorm(conv3x3(F)), over each RoI's map.

    The convolution starts at zero and the norm's shift is zero, so all logits start at 0 and all
    weights alike.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)
        # One group a channel is InstanceNorm, but, unlike nn.InstanceNorm2d, takes zero RoIs.
        self.norm = nn.GroupNorm(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features))


class _LevelParameters(nn.Module):
    """The offset and weight predictors of one level, or of all."""

    offsets: OffsetPredictor
    weights: WeightPredictor | None

    def __init__(self, offsets: OffsetPredictor, weights: WeightPredictor | None) -> None:
        super().__init__()
        self.offsets = offsets
        self.weights = weights


class DiscriminativePooling(nn.Module):
    """Discriminative RoI pooling over several feature levels.

    Args:
        in_channels: channels C of every level.
        strides: of the L levels, fine to coarse, each twice the one before.
        output_size: k, bins a side of the result.
        offset_resolution: m, side of the RoI features that predict the offsets; 0 means k // 2
            ("light-weight").
        offset_fc_dim: width of the two hidden layers of the offset predictor.
        gamma: an offset of 1 shifts a bin by this fraction of the RoI's width or height.
        sampling_ratio: points a side in each of the 2k x 2k bins.
        offset_sampling_ratio: points a side in each of the m x m bins.
        weighting: "normalized", "unnormalized" or "none" (the average of each cell's four bins).
        coefficient: of the sigmoid in the normalised weights' exponent.
        per_level: parameters for each level, as released, or one set for all.
        convention: "aligned", or "psroi" for the releases'.
        inclusive_boxes: RoIs name their last pixel, as the first release's do: levels are chosen by
            sides one pixel longer.

    Raises:
        ValueError: an unknown weighting, or an output size below 2.

    With parameters per level, the RoIs are ordered by level, and the number at each level is read
    back in one host synchronisation for all of them; shared parameters need none.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[float],
        *,
        output_size: int = 7,
        offset_resolution: int = 0,
        offset_fc_dim: int = 1024,
        gamma: float = 0.1,
        sampling_ratio: int = 1,
        offset_sampling_ratio: int = 2,
        weighting: str = "normalized",
        coefficient: float = 12.0,
        per_level: bool = True,
        convention: str = "aligned",
        inclusive_boxes: bool = False,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
        if output_size < 2:
            raise ValueError(f"output_size must be at least 2, got {output_size}")
        self.strides = tuple(strides)
        self.output_size = output_size
        self.offset_resolution = offset_resolution or output_size // 2
        self.gamma = gamma
        self.sampling_ratio = sampling_ratio
        self.offset_sampling_ratio = offset_sampling_ratio
        self.weighting = weighting
        self.coefficient = coefficient
        self.convention = convention
        self.inclusive_boxes = inclusive_boxes
        self.levels = nn.ModuleList(
            _LevelParameters(
                OffsetPredictor(in_channels, self.offset_resolution, offset_fc_dim, output_size),
                WeightPredictor(in_channels) if weighting != "none" else None,
            )
            for _ in range(len(self.strides) if per_level else 1)
        )

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pool.

        Args:
            features: L tensors (N, C, Hl, Wl).
            rois: (R, 5), batch index and box in pixels.

        Returns:
            (R, C, k, k).
        """
        level = assign_levels(rois[:, 1:], self.strides, inclusive=self.inclusive_boxes)
        if len(self.levels) == 1:
            return self._pool(features, rois, level, [rois.shape[0]])
        # Sorted by level, each level's RoIs are a contiguous slice for its own parameters.
        order = level.argsort(stable=True)
        counts = torch.bincount(level, minlength=len(self.levels)).tolist()
        pooled = self._pool(features, rois[order], level[order], counts)
        return pooled[order.argsort()]

    def _pool(
        self, features: Sequence[Tensor], rois: Tensor, level: Tensor, counts: list[int]
    ) -> Tensor:
        small = self._sample(
            features, rois, level, None, self.offset_resolution, self.offset_sampling_ratio
        )
        offsets = self._by_level("offsets", small, counts)
        if self.weighting == "none":
            # The mean over a cell's 2 x 2 bins is a cell with twice the points a side.
            return self._sample(
                features, rois, level, offsets, self.output_size, 2 * self.sampling_ratio
            )
        offsets = F.interpolate(offsets, scale_factor=2, mode="nearest")
        sampled = self._sample(
            features, rois, level, offsets, 2 * self.output_size, self.sampling_ratio
        )
        logits = self._by_level("weights", sampled, counts)
        return adaptive_weighted_pool(
            sampled,
            logits,
            coefficient=self.coefficient,
            normalize=self.weighting == "normalized",
        )

    def _sample(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        level: Tensor,
        offsets: Tensor | None,
        output_size: int,
        sampling_ratio: int,
    ) -> Tensor:
        return deform_roi_pool(
            list(features),
            rois,
            level,
            offsets,
            output_size=output_size,
            spatial_scales=[1 / s for s in self.strides],
            sampling_ratio=sampling_ratio,
            gamma=self.gamma,
            convention=self.convention,
        )

    def _by_level(self, name: str, inputs: Tensor, counts: list[int]) -> Tensor:
        modules = [getattr(level, name) for level in self.levels]
        # Levels without RoIs run on empty slices: their parameters keep a (zero) gradient, which
        # distributed training waits for.
        if len(modules) == 1:
            return modules[0](inputs)
        parts = inputs.split(counts)
        return torch.cat([m(p) for m, p in zip(modules, parts, strict=True)])
