"""More than 2^31 elements in a tensor: indices of 64 bits.

The tensors are NumPy's zeros, which take memory only where they are written to: at their far end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2det import ops
from d2det.ops._library import implementation

SIDE = 10240


def compiled(name: str) -> None:
    if implementation(name, "cpu") != "compiled":
        pytest.skip("the reference would copy the whole tensor")


def far_map() -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (3, 8, SIDE, SIDE) in channels_last, and a view of the last one's last 8 x 8 pixels."""
    maps = torch.from_numpy(np.zeros((3, SIDE, SIDE, 8), np.float32)).permute(0, 3, 1, 2)
    assert maps.numel() > 2**31
    corner = maps[2:, :, -8:, -8:]
    corner.copy_(torch.randn(1, 8, 8, 8))
    return maps, corner


def test_deformable_convolution_reads_behind_2_to_the_31():
    compiled("modulated_deform_conv2d")
    maps, corner = far_map()
    weight, stride = torch.randn(4, 8, 3, 3), SIDE - 3
    # Outputs (2, 2) an image; the last one's window is the map's last 3 x 3 pixels.
    offset, mask = torch.rand(3, 18, 2, 2) - 0.5, torch.rand(3, 9, 2, 2)
    found = ops.modulated_deform_conv2d(maps, offset, mask, weight, stride=stride)
    near_offset, near_mask = torch.zeros(1, 18, 6, 6), torch.ones(1, 9, 6, 6)
    near_offset[..., 5, 5], near_mask[..., 5, 5] = offset[2:, :, 1, 1], mask[2:, :, 1, 1]
    expected = ops.modulated_deform_conv2d(corner.contiguous(), near_offset, near_mask, weight)
    assert not found[:2].any()
    assert expected[..., 5, 5].abs().min() > 0
    torch.testing.assert_close(found[2:, :, 1, 1], expected[..., 5, 5], rtol=0, atol=0.02)


def test_roi_pooling_reads_behind_2_to_the_31():
    compiled("deform_roi_pool")
    maps, corner = far_map()
    box = torch.tensor([[1.2, 1.7, 6.4, 6.1]])
    level = torch.zeros(1, dtype=torch.int64)
    settings = {"output_size": 2, "spatial_scales": [1.0], "sampling_ratio": 2}
    far = torch.cat([torch.tensor([[2.0]]), box + SIDE - 8], 1)
    near = torch.cat([torch.tensor([[0.0]]), box], 1)
    found = ops.deform_roi_pool([maps], far, level, **settings)
    expected = ops.deform_roi_pool([corner.contiguous()], near, level, **settings)
    # Coordinates near 10240 have 10 bits less behind the point.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert found.abs().sum() > 0


@pytest.mark.slow
def test_adaptive_weighting_reads_behind_2_to_the_31():
    compiled("adaptive_weighted_pool")
    rois = 2**31 // (256 * 14 * 14) + 2
    features = torch.from_numpy(np.zeros((rois, 256, 14, 14), np.int16)).view(torch.bfloat16)
    assert features.numel() > 2**31
    features[-1] = torch.randn(256, 14, 14)
    last = features[-1:]
    assert torch.equal(
        ops.adaptive_weighted_pool(features, features)[-1:], ops.adaptive_weighted_pool(last, last)
    )
