"""Modulated deformable convolution in PyTorch: gather into columns, then a matrix product.

Letters: N images, G offset groups, K = kh * kw taps, L = Ho * Wo output pixels, S weight groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import (
    accumulation_dtype,
    as_images,
    channels_last_rows,
    new_output,
    row_products,
    weighted_rows,
    weighted_rows_transposed,
)

# Elements in a column buffer (128 MiB in float32); images are taken in groups that fit.
_COLUMN_LIMIT = 1 << 25


class _Corners(NamedTuple):
    """Four pixels around each sampling point; each field is (N, L, K, G, 4)."""

    rows: Tensor  # rows of the table of (N * H * W * G, C / G)
    weight: Tensor  # bilinear weight, 0 for corners outside the map
    slope_y: Tensor  # its derivative with respect to y
    slope_x: Tensor


def forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    allow_tf32: bool,
) -> Tensor:
    """See `d2det.ops.modulated_deform_conv2d`."""
    dtype = accumulation_dtype(input)
    n, _, ho, wo = offset.shape
    output = new_output(input, (n, weight.shape[0], ho, wo))
    for part in _image_groups(input, offset, weight):
        corners = _corners(input[part], offset[part], weight, stride, padding, dilation)
        taps = _flat_mask(mask[part], weight, dtype) if mask is not None else None
        columns = _columns(input[part], taps, corners)
        result = _matmul(columns, weight.to(dtype))
        if bias is not None:
            result = result + bias.to(dtype)
        output[part] = result.view(-1, ho, wo, weight.shape[0]).permute(0, 3, 1, 2)
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_mask: list[bool],
    allow_tf32: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, offset, mask and weight; those not asked for are empty."""
    dtype = accumulation_dtype(input)
    need_input, need_offset, need_mask, need_weight = output_mask
    grad_input = torch.empty_like(input) if need_input else input.new_empty(0)
    grad_offset = torch.empty_like(offset) if need_offset else offset.new_empty(0)
    grad_mask = torch.empty_like(mask) if need_mask and mask is not None else input.new_empty(0)
    sum_weight = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype)
    for part in _image_groups(input, offset, weight):
        images, moves = input[part], offset[part]
        taps = _flat_mask(mask[part], weight, dtype) if mask is not None else None
        corners = _corners(images, moves, weight, stride, padding, dilation)
        grad = grad_output[part].permute(0, 2, 3, 1).to(dtype).reshape(-1, weight.shape[0])
        if need_weight:
            columns = _columns(images, taps, corners)
            sum_weight += _weight_gradient(grad, columns, weight)
        if not (need_input or need_offset or need_mask):
            continue
        channels = images.shape[1] // corners.rows.shape[3]
        groups = images.shape[1] // weight.shape[1]
        grad_columns = _column_gradient(grad, weight.to(dtype), groups).reshape(-1, channels)
        scaled = corners.weight if taps is None else corners.weight * taps[..., None]
        if need_input:
            rows = weighted_rows_transposed(
                grad_columns,
                corners.rows.reshape(-1, 4),
                scaled.reshape(-1, 4),
                images.numel() // channels,
            )
            grad_input[part] = as_images(rows.view(-1, images.shape[1]), images)
        if need_offset or need_mask:
            table = channels_last_rows(images, dtype).reshape(-1, channels)
            products = row_products(grad_columns, table, corners.rows.reshape(-1, 4))
            products = products.view_as(corners.weight)
            if need_offset:
                shift = torch.stack(
                    [(products * corners.slope_y).sum(-1), (products * corners.slope_x).sum(-1)], -1
                )
                if taps is not None:
                    shift = shift * taps[..., None]
                # (n, L, K, G, 2) to (n, G, K, 2, L)
                grad_offset[part] = shift.permute(0, 3, 2, 4, 1).reshape(moves.shape)
            if need_mask and mask is not None:
                values = (products * corners.weight).sum(-1)
                grad_mask[part] = values.permute(0, 3, 2, 1).reshape(mask[part].shape)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return grad_input, grad_offset, grad_mask, grad_weight.copy_(sum_weight)


def _image_groups(input: Tensor, offset: Tensor, weight: Tensor) -> list[slice]:
    """Slices of images whose columns fit the limit."""
    n, _, ho, wo = offset.shape
    per_image = ho * wo * input.shape[1] * weight.shape[2] * weight.shape[3]
    step = max(1, _COLUMN_LIMIT // max(1, per_image))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _flat_mask(mask: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, G * K, Ho, Wo) as (n, L, K, G)."""
    taps = weight.shape[2] * weight.shape[3]
    groups = mask.shape[1] // taps
    return mask.to(dtype).reshape(mask.shape[0], groups, taps, -1).permute(0, 3, 2, 1)


def _corners(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> _Corners:
    n, _, height, width = input.shape
    kh, kw = weight.shape[2:]
    ho, wo = offset.shape[2:]
    dtype, device = accumulation_dtype(input), input.device
    groups = offset.shape[1] // (2 * kh * kw)
    moves = offset.to(dtype).reshape(n, groups, kh * kw, 2, ho * wo).permute(0, 4, 2, 1, 3)

    def grid(out: int, kernel: int, axis: int) -> Tensor:
        start = torch.arange(out, device=device, dtype=dtype) * stride[axis] - padding[axis]
        return start[:, None] + torch.arange(kernel, device=device, dtype=dtype) * dilation[axis]

    y = grid(ho, kh, 0)[:, None, :, None].expand(ho, wo, kh, kw).reshape(1, ho * wo, kh * kw, 1)
    x = grid(wo, kw, 1)[None, :, None, :].expand(ho, wo, kh, kw).reshape(1, ho * wo, kh * kw, 1)
    y_index, y_weight, y_slope = _axis(y + moves[..., 0], height)
    x_index, x_weight, x_slope = _axis(x + moves[..., 1], width)

    def outer(first: Tensor, second: Tensor) -> Tensor:
        return (first[..., :, None] * second[..., None, :]).flatten(-2)

    image = torch.arange(n, device=device).view(n, 1, 1, 1, 1) * (height * width)
    pixel = image + (y_index[..., :, None] * width + x_index[..., None, :]).flatten(-2)
    rows = pixel * groups + torch.arange(groups, device=device)[:, None]
    return _Corners(
        rows, outer(y_weight, x_weight), outer(y_slope, x_weight), outer(y_weight, x_slope)
    )


def _axis(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, weights and slopes of the two neighbours on one axis, zero outside [0, size)."""
    limited = position.clamp(-2, size + 1)  # keeps NaN; every index below then fits
    low = limited.floor()
    fraction = limited - low
    whole = low.nan_to_num(0.0).long()
    neighbours = torch.stack([whole, whole + 1], -1)
    inside = (neighbours >= 0) & (neighbours < size)
    weight = torch.stack([1 - fraction, fraction], -1).masked_fill(~inside, 0.0)
    one = torch.ones_like(fraction)
    slope = torch.stack([-one, one], -1).masked_fill(~inside, 0.0)
    return neighbours.clamp(0, size - 1), weight, slope


def _columns(input: Tensor, taps: Tensor | None, corners: _Corners) -> Tensor:
    """(n * L, K, Cin): the sampled and modulated values under each tap of each output pixel."""
    n, pixels, kernel, groups, _ = corners.weight.shape
    channels = input.shape[1] // groups
    table = channels_last_rows(input, corners.weight.dtype).reshape(-1, channels)
    weight = corners.weight
    if taps is not None:
        weight = weight * taps[..., None]
    rows = weighted_rows(table, corners.rows.reshape(-1, 4), weight.reshape(-1, 4))
    return rows.view(n * pixels, kernel, groups * channels)


def _matmul(columns: Tensor, weight: Tensor) -> Tensor:
    """(n * L, Cout) from columns (n * L, K, Cin) and weight (Cout, Cin / S, kh, kw)."""
    split = _by_group(columns, weight)
    product = torch.matmul(split, _flat_weight(weight, split.shape[0]).mT)
    return product.transpose(0, 1).reshape(columns.shape[0], weight.shape[0])


def _column_gradient(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """(n * L, K, Cin) from grad (n * L, Cout); S is `groups`."""
    flat = _flat_weight(weight, groups)
    per_group, taps = weight.shape[1], weight.shape[2] * weight.shape[3]
    split = grad.view(grad.shape[0], groups, -1).transpose(0, 1)
    columns = torch.matmul(split, flat).view(groups, -1, taps, per_group)
    return columns.permute(1, 2, 0, 3).reshape(-1, taps, groups * per_group)


def _weight_gradient(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """The weight's shape, from grad (n * L, Cout) and columns (n * L, K, Cin)."""
    groups = columns.shape[2] // weight.shape[1]
    split = grad.view(grad.shape[0], groups, -1).permute(1, 2, 0)
    flat = torch.matmul(split, _by_group(columns, weight))
    return flat.view(weight.shape[0], -1, weight.shape[1]).mT.reshape(weight.shape)


def _by_group(columns: Tensor, weight: Tensor) -> Tensor:
    """(n * L, K, Cin) as (S, n * L, K * Cin / S)."""
    pixels, taps, _ = columns.shape
    split = columns.view(pixels, taps, -1, weight.shape[1]).permute(2, 0, 1, 3)
    return split.reshape(split.shape[0], pixels, -1)


def _flat_weight(weight: Tensor, groups: int) -> Tensor:
    """(Cout, Cin / S, kh, kw) as (S, Cout / S, K * Cin / S)."""
    taps_first = weight.flatten(2).mT
    return taps_first.reshape(groups, weight.shape[0] // groups, -1)
