"""Deformable RoI pooling over all pyramid levels (D2Det, Sec. 3.2): schema, fake kernel, autograd.

Letters: L levels, N images, C channels, R RoIs, o the side of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    autocast_is_on,
    check_integers,
    check_positive,
    check_same_dtype,
    check_shape,
    check_tensor,
    shape,
)
from ._library import define, differentiate
from .reference import deform_roi_pool as reference
from .reference.gather import new_output

CONVENTIONS = ("aligned", "psroi")


def deform_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None = None,
    modulation: Tensor | None = None,
    *,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    gamma: float = 0.1,
    convention: str = "aligned",
) -> Tensor:
    """Average of bilinear samples in each bin of each RoI, the bins moved by `offset`.

    Bin (i, j) of a RoI of w x h pixels is shifted by gamma * (offset_x * w, offset_y * h), and its
    mean is multiplied by its modulation. All levels are pooled in one call.

    Conventions:
        "aligned": RoIAlign's half-pixel convention. Points more than one pixel outside the map
            count as zero. Without offset and modulation it equals
            `torchvision.ops.roi_align(..., aligned=True)` on each RoI's level.
        "psroi": that of the authors' releases, for converted weights. Corners are rounded to
            whole pixels, half away from zero; a RoI goes from x1 * s - 0.5 to (x2 + 1) * s - 0.5
            and is at least 0.1 wide; a sub-bin is sampled at its start; points outside
            [-0.5, size - 0.5] are left out of the mean.

    Coordinates and sums are in float32 (float64 for float64 features), whatever the inputs' dtypes.
    Under autocast nothing is cast, except that features of several dtypes get their widest one:
    half-precision features are pooled as they are, beside float32 RoIs and offsets.

    Args:
        features: L tensors of shape (N, C, Hl, Wl), of one dtype.
        rois: (R, 5): batch index, x1, y1, x2, y2, in image pixels. Not differentiable.
        levels: (R,) int64, which of `features` each RoI is pooled from.
        offset: (R, 2, o, o), x before y, as a fraction of the RoI's size before `gamma`; optional.
        modulation: (R, 1, o, o); optional.
        output_size: o.
        spatial_scales: L numbers, 1 / stride of each level.
        sampling_ratio: points a side in each bin, at least 1 (there is no adaptive number).
        gamma: scale of the offsets.
        convention: "aligned" or "psroi".

    Returns:
        (R, C, o, o), in the dtype and memory format of `features[0]`.

    Raises:
        TypeError: an argument is not a tensor of the right kind of dtype.
        ValueError: shapes, devices or settings do not fit; on CPU also where a batch index or level
            is out of range. On a GPU, where that check would stall, such a RoI comes out as NaN.
    """
    features, spatial_scales = list(features), [float(s) for s in spatial_scales]
    _check(features, rois, levels, offset, modulation, output_size, spatial_scales)
    check_positive("sampling_ratio", sampling_ratio)
    if convention not in CONVENTIONS:
        raise ValueError(f'convention must be "aligned" or "psroi", got {convention!r}')
    # The compiled kernel checks this as well, but it can raise nothing better than a RuntimeError.
    # A subclass may be a tensor without values, as in tracing.
    if rois.device.type == "cpu" and type(rois) is Tensor and not torch.compiler.is_compiling():
        reference.check_references(features, rois, levels)
    return torch.ops.d2det.deform_roi_pool(
        features,
        rois,
        levels,
        offset,
        modulation,
        output_size,
        spatial_scales,
        sampling_ratio,
        float(gamma),
        convention,
    )


def _check(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    modulation: Tensor | None,
    output_size: int,
    spatial_scales: list[float],
) -> None:
    if not features or len(features) != len(spatial_scales):
        raise ValueError(
            f"features and spatial_scales must have one entry for each level, got {len(features)} "
            f"and {len(spatial_scales)}"
        )
    first = ("features[0]", features[0])
    for i, f in enumerate(features):
        check_tensor(f"features[{i}]", f, 4, first if i else None)
        if f.shape[:2] != features[0].shape[:2] or 0 in f.shape[1:]:
            raise ValueError(
                f"features must share batch and channels and none may be empty: features[{i}] has "
                f"shape {shape(f)}, features[0] {shape(features[0])}"
            )
        if not autocast_is_on(f):
            check_same_dtype(f"features[{i}]", f, first)
    check_tensor("rois", rois, 2, first)
    if rois.shape[1] != 5:
        raise ValueError(f"rois must have shape (R, 5), got {shape(rois)}")
    check_integers("levels", levels, ("rois", rois), rois.shape[0])
    check_positive("output_size", output_size)
    for name, value, channels in (("offset", offset, 2), ("modulation", modulation, 1)):
        if value is not None:
            check_tensor(name, value, 4, first)
            expected = (rois.shape[0], channels, output_size, output_size)
            check_shape(name, value, expected, ("rois", rois))


def _autocast(dtype: torch.dtype, features: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    widest = features[0].dtype
    for f in features[1:]:
        widest = torch.promote_types(widest, f.dtype)
    return ([f.to(widest) for f in features], *rest)


def _fake(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    modulation: Tensor | None,
    output_size: int,
    spatial_scales: list[float],
    sampling_ratio: int,
    gamma: float,
    convention: str,
) -> Tensor:
    shape = (rois.shape[0], features[0].shape[1], output_size, output_size)
    return new_output(features[0], shape)


def _fake_backward(
    grad_output: Tensor,
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    modulation: Tensor | None,
    output_size: int,
    spatial_scales: list[float],
    sampling_ratio: int,
    gamma: float,
    convention: str,
    output_mask: list[bool],
    deterministic: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    grads = [torch.empty_like(f) for f in features] if output_mask[0] else []
    shift, scale = (
        torch.empty_like(t) if needed and t is not None else rois.new_empty(0)
        for t, needed in zip((offset, modulation), output_mask[1:], strict=True)
    )
    return grads, shift, scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, offset, modulation, *settings = inputs
    ctx.save_for_backward(rois, levels, offset, modulation, *features)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, offset, modulation, *features = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = [any(needs[0]), bool(needs[3]), bool(needs[4])]
    grads, shift, scale = torch.ops.d2det.deform_roi_pool_backward(
        grad,
        features,
        rois,
        levels,
        offset,
        modulation,
        *ctx.settings,
        needed,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grads if needed[0] else [None] * len(features),
        None,
        None,
        shift if needed[1] else None,
        scale if needed[2] else None,
        *[None] * len(ctx.settings),
    )


_ARGUMENTS = (
    "Tensor[] features, Tensor rois, Tensor levels, Tensor? offset, Tensor? modulation, "
    "int output_size, float[] spatial_scales, int sampling_ratio, float gamma, str convention"
)
define(
    f"deform_roi_pool({_ARGUMENTS}) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    autocast=_autocast,
)
define(
    f"deform_roi_pool_backward(Tensor grad_output, {_ARGUMENTS}, bool[3] output_mask, "
    "bool deterministic) -> (Tensor[], Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
)
differentiate("deform_roi_pool", _backward, _setup_context)
