"""Deformable RoI pooling over all pyramid levels in PyTorch: one table of pixels, one gather.

Letters: R RoIs, C channels, o output side, s points a side in a bin, T pixels of all levels and
images. The bilinear weight of a point is a product of one factor for each axis, so each bin reads
2s rows of pixels times 2s columns, with everything but the feature gather done per axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import (
    accumulation_dtype,
    as_images,
    new_output,
    row_products,
    weighted_rows,
    weighted_rows_transposed,
)


class _Axis(NamedTuple):
    """Pixels that a bin reads along one axis; each field broadcasts to (R, o, o, 2s)."""

    pixels: Tensor  # int64, within the map
    weight: Tensor  # already divided by the number of points averaged over
    slope: Tensor  # derivative of the weight with respect to the position, in pixels
    extent: Tensor  # (R, 1, 1, 1): the RoI's size on this axis, in pixels of its level


class _Bins(NamedTuple):
    """What every bin reads: rows of the table, and the two factors of their weights."""

    rows: Tensor  # (R * o * o, 4 * s * s)
    y: _Axis
    x: _Axis


def forward(
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
    """See `d2det.ops.deform_roi_pool`."""
    r, c, o = rois.shape[0], features[0].shape[1], output_size
    output = new_output(features[0], (r, c, o, o))
    bins = _bins(
        features, rois, levels, offset, o, spatial_scales, sampling_ratio, gamma, convention
    )
    weight = _outer(bins.y.weight, bins.x.weight, bins.rows)
    if modulation is not None:
        weight = weight * modulation.to(weight.dtype).reshape(-1, 1)
    pooled = weighted_rows(_table(features), bins.rows, weight)
    return output.copy_(pooled.view(r, o, o, c).permute(0, 3, 1, 2))


def backward(
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
    """Gradients of features, offset and modulation; those not asked for are empty."""
    need_features, need_offset, need_modulation = output_mask
    r, c, o = rois.shape[0], features[0].shape[1], output_size
    bins = _bins(
        features, rois, levels, offset, o, spatial_scales, sampling_ratio, gamma, convention
    )
    dtype = bins.y.weight.dtype
    grad = grad_output.permute(0, 2, 3, 1).to(dtype).reshape(-1, c)
    scale = None if modulation is None else modulation.to(dtype).reshape(-1, 1)
    weight = _outer(bins.y.weight, bins.x.weight, bins.rows)
    grad_features: list[Tensor] = []
    if need_features:
        sizes = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
        scaled = weight if scale is None else weight * scale
        rows = weighted_rows_transposed(grad, bins.rows, scaled, sum(sizes))
        parts = rows.split(sizes)
        grad_features = [
            torch.empty_like(f).copy_(as_images(g, f)) for g, f in zip(parts, features, strict=True)
        ]
    grad_offset, grad_modulation = rois.new_empty(0), rois.new_empty(0)
    if need_offset or need_modulation:
        products = row_products(grad, _table(features), bins.rows)
        if need_modulation and modulation is not None:
            total = (products * weight).sum(1).view(modulation.shape)
            grad_modulation = torch.empty_like(modulation).copy_(total)
        if need_offset and offset is not None:
            if scale is not None:
                products = products * scale
            shifts = []
            for axis, first, second in (
                (bins.x, bins.y.weight, bins.x.slope),
                (bins.y, bins.y.slope, bins.x.weight),
            ):
                moved = (products * _outer(first, second, bins.rows)).sum(1)
                shifts.append(moved.view(r, o, o) * axis.extent[..., 0] * gamma)
            grad_offset = torch.empty_like(offset).copy_(torch.stack(shifts, 1))
    return grad_features, grad_offset, grad_modulation


def refers_to_something(features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """(R,): whether each RoI's batch index and level exist."""
    images = rois[:, 0].long()
    valid = (levels >= 0) & (levels < len(features))
    return valid & (images >= 0) & (images < features[0].shape[0])


def check_references(
    features: list[Tensor], rois: Tensor, levels: Tensor, valid: Tensor | None = None
) -> None:
    """Raise a ValueError that names the first RoI of no image or level; `valid` if it is known."""
    valid = refers_to_something(features, rois, levels) if valid is None else valid
    if not bool(valid.all()):
        bad = int((~valid).nonzero()[0])
        raise ValueError(
            f"rois and levels must refer to {features[0].shape[0]} images and {len(features)} "
            f"levels, but RoI {bad} has batch index {rois[bad, 0].item():g} and level "
            f"{levels[bad].item()}"
        )


def _table(features: list[Tensor]) -> Tensor:
    """(T, C): the pixels of every level, channels last."""
    c = features[0].shape[1]
    sizes = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
    table = features[0].new_empty((sum(sizes), c), dtype=accumulation_dtype(features[0]))
    for part, f in zip(table.split(sizes), features, strict=True):
        as_images(part, f).copy_(f)
    return table


def _bins(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    output_size: int,
    spatial_scales: list[float],
    sampling_ratio: int,
    gamma: float,
    convention: str,
) -> _Bins:
    dtype = accumulation_dtype(features[0])
    boxes, images = rois[:, 1:].to(dtype), rois[:, 0].long()
    valid = refers_to_something(features, rois, levels)
    if rois.device.type == "cpu":
        check_references(features, rois, levels, valid)
    images = images.clamp(0, max(0, features[0].shape[0] - 1))
    scale = _per_roi(levels, spatial_scales, dtype)
    # On a GPU a check would stall the queue: a RoI that refers to nothing comes out as NaN.
    scale = scale.masked_fill(~valid, float("nan"))
    heights = _per_roi(levels, [f.shape[2] for f in features], torch.int64).clamp(min=1)
    widths = _per_roi(levels, [f.shape[3] for f in features], torch.int64).clamp(min=1)
    starts = [0]
    for f in features[:-1]:
        starts.append(starts[-1] + f.shape[0] * f.shape[2] * f.shape[3])
    base = _per_roi(levels, starts, torch.int64) + images * heights * widths

    def axis(low: int, size: Tensor, dim: int) -> _Axis:
        shift = None if offset is None else offset[:, dim].to(dtype) * gamma
        start, extent = _span(boxes[:, low], boxes[:, low + 2], scale, convention)
        return _axis(start, extent, size, shift, output_size, sampling_ratio, convention, dim)

    y, x = axis(1, heights, 1), axis(0, widths, 0)
    row = base.view(-1, 1, 1, 1) + y.pixels * widths.view(-1, 1, 1, 1)
    index = (row[..., :, None] + x.pixels[..., None, :]).flatten(-2)
    points = 4 * sampling_ratio * sampling_ratio
    return _Bins(index.reshape(rois.shape[0] * output_size * output_size, points), y, x)


def _per_roi(levels: Tensor, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
    """The value of each RoI's level, without copying a table to the device."""
    out = torch.zeros_like(levels, dtype=dtype)
    for level, value in enumerate(values):
        out.masked_fill_(levels == level, value)
    return out


def _span(low: Tensor, high: Tensor, scale: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    """Start and size of the RoIs on one axis, in pixels of their level; both (R,)."""
    if convention == "aligned":
        return low * scale - 0.5, (high - low) * scale
    start = _round_half_away(low) * scale - 0.5
    end = (_round_half_away(high) + 1) * scale - 0.5
    return start, (end - start).clamp(min=0.1)


def _round_half_away(value: Tensor) -> Tensor:
    """Round as C's `round` does; torch.round goes to the even neighbour at halves."""
    return value.sign() * (value.abs() + 0.5).floor()


def _axis(
    start: Tensor,
    extent: Tensor,
    size: Tensor,
    shift: Tensor | None,
    output_size: int,
    points: int,
    convention: str,
    dim: int,
) -> _Axis:
    """Pixels along one axis.

    Args:
        start, extent: (R,) from `_span`. size: (R,), pixels of the map.
        shift: (R, o, o), a fraction of the extent; None: the grid is regular.
        points: s. dim: 0 for x (bins along the last dimension), 1 for y.
    """
    start, extent, size = (v.view(-1, 1, 1, 1) for v in (start, extent, size))
    arange = torch.arange(output_size * points, device=start.device, dtype=start.dtype)
    # "psroi" samples at the start of a sub-bin, "aligned" in its middle.
    step = arange + 0.5 if convention == "aligned" else arange
    step = (step / (output_size * points)).view(output_size, points)
    step = step[None, :, :] if dim == 0 else step[:, None, :]
    position = start + step * extent
    if shift is not None:
        position = position + shift[..., None] * extent
    margin = 1.0 if convention == "aligned" else 0.5
    last = size - 1
    outside = (position < -margin) | (position > last + margin)
    # NaN fails both comparisons and stays in the weight, so that it is seen in the result.
    clamped = position.clamp(min=0.0).minimum(last.to(position.dtype))
    low = clamped.floor()
    fraction = clamped - low
    first = low.nan_to_num(0.0).long()
    if convention == "aligned":
        share = torch.full_like(position, 1.0 / points).masked_fill_(outside, 0.0)
    else:
        kept = (~outside).sum(-1, keepdim=True).clamp(min=1)
        share = (1.0 / kept.to(position.dtype)).expand_as(position).masked_fill(outside, 0.0)
    flat = (position < 0) | (position > last)  # clamped: the value does not depend on position
    slope = share.masked_fill(flat, 0.0)
    index = torch.stack([first, torch.minimum(first + 1, last)], -1)
    weight = torch.stack([(1 - fraction) * share, fraction * share], -1)
    slopes = torch.stack([-slope, slope], -1)
    return _Axis(index.flatten(-2), weight.flatten(-2), slopes.flatten(-2), extent)


def _outer(y: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Products of the factors of both axes, in the order of `_Bins.rows`."""
    return (y[..., :, None] * x[..., None, :]).reshape(index.shape)
