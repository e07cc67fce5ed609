"""Weighted sums of rows of a table: the work that deformable sampling comes down to.

Feature maps are laid out as a table of T rows (pixels) by C channels. Each of B outputs is a
weighted sum of K rows. `embedding_bag` does exactly this in one pass, without the (B, K, C) tensor
that indexing would make, and its order of summation is fixed on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements in the temporary of `row_products`: within cache on CPU, large on a GPU.
_CHUNK = {"cpu": 1 << 17, "other": 1 << 25}


def accumulation_dtype(value: Tensor) -> torch.dtype:
    """float64 for float64, else float32: what coordinates and sums are computed in."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """out[b] = sum_k weight[b, k] * table[index[b, k]].

    Args:
        table: (T, C). index: (B, K) int64. weight: (B, K), the table's dtype.

    Returns:
        (B, C).
    """
    if index.numel() == 0 or table.numel() == 0:
        return table.new_zeros((index.shape[0], table.shape[1]))
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def weighted_rows_transposed(grad: Tensor, index: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Gradient of `weighted_rows` with respect to the table.

    The entries are sorted by row, and each row gathers what it is owed: a scatter without atomics,
    deterministic on every device.

    Args:
        grad: (B, C). index, weight: (B, K) as given to `weighted_rows`. rows: T.

    Returns:
        (T, C).
    """
    if index.numel() == 0 or grad.numel() == 0 or rows == 0:
        return grad.new_zeros((rows, grad.shape[1]))
    row, order = index.flatten().sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(rows, device=row.device))
    return F.embedding_bag(
        order.div(index.shape[1], rounding_mode="floor"),
        grad.contiguous(),
        offsets=starts,
        per_sample_weights=weight.flatten()[order],
        mode="sum",
    )


def row_products(grad: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Gradient of `weighted_rows` with respect to the weights: <grad[b], table[index[b, k]]>.

    Args:
        grad: (B, C). table: (T, C). index: (B, K).

    Returns:
        (B, K).
    """
    products = grad.new_zeros(index.shape)
    if index.numel() == 0 or table.numel() == 0:
        return products
    limit = _CHUNK["cpu" if grad.device.type == "cpu" else "other"]
    step = max(1, limit // max(1, grad.shape[1]))
    for start in range(0, index.shape[0], step):
        part = slice(start, start + step)
        for k in range(index.shape[1]):
            rows = table.index_select(0, index[part, k])
            products[part, k] = rows.mul_(grad[part]).sum(1)
    return products


def channels_last_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) as a table of (N * H * W, C)."""
    rows = features.permute(0, 2, 3, 1).to(dtype)
    return rows.reshape(-1, features.shape[1])


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """A table of (N * H * W, C) as a view with the shape of `like`, (N, C, H, W)."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def new_output(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of another shape that is channels_last where `like` is."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format
    if channels_last and not like.is_contiguous():
        layout = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
