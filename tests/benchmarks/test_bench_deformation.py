"""Lengths of offsets and modulation of models whose offset layers say what they were told to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from deformation import Spread, offset_lengths, recorded

from d2det.core import DeformablePooling
from d2det.modeling.resnet_blocks import DeformBasicBlock, DeformBottleneckBlock


def test_spread_of_parts_is_that_of_the_whole():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 5
    spread = Spread()
    for part in values.split([1, 499, 500]):
        spread.add(part)
    assert spread.mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert spread.deviation == pytest.approx(values.std(unbiased=False).item(), rel=1e-5)


def test_lengths_pair_y_and_x_of_a_tap():
    offset = torch.tensor([3.0, 4.0, 5.0, 12.0]).view(1, 4, 1, 1).expand(2, 4, 3, 3)
    lengths = offset_lengths(offset)
    assert lengths.shape == (2, 2, 3, 3)
    assert lengths[:, 0].eq(5).all()
    assert lengths[:, 1].eq(13).all()


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("block", [DeformBasicBlock, DeformBottleneckBlock])
def test_convolutions(block, modulated):
    extra = {} if block is DeformBasicBlock else {"bottleneck_channels": 4}
    model = torch.nn.ModuleDict({"res4": block(8, 8, norm="", deform_modulated=modulated, **extra)})
    layer = model["res4"].conv2_offset
    with torch.no_grad():
        layer.bias[:18].view(9, 2).copy_(torch.tensor([0.6, -0.8]))  # every tap by one cell
        if modulated:
            layer.bias[18:] = 1.0
        with recorded(model) as found:
            model["res4"](torch.randn(2, 8, 5, 6))
            model["res4"](torch.randn(1, 8, 4, 4))
    values = found["res4"]
    assert values["cells"].count == 9 * (2 * 5 * 6 + 16)
    assert values["cells"].mean == pytest.approx(1.0, rel=1e-5)
    assert ("modulation" in values) == modulated
    if modulated:
        assert values["modulation"].mean == pytest.approx(torch.tensor(1.0).sigmoid().item())
        assert values["modulation"].deviation == pytest.approx(0.0, abs=1e-3)
    assert not layer._forward_hooks


@pytest.mark.parametrize("modulated", [False, True])
def test_pooling_is_in_percent_of_the_roi(modulated):
    pooler = DeformablePooling(4, [8], modulated=modulated, hidden_dims=(16,), gamma=0.1)
    model = torch.nn.ModuleDict({"box_pooler": pooler})
    with torch.no_grad():
        pooler.offset_fc[-1].bias[:49] = 0.3
        pooler.offset_fc[-1].bias[49:98] = 0.4
        with recorded(model) as found:
            pooler([torch.randn(1, 4, 9, 9)], torch.tensor([[0.0, 8.0, 8.0, 40.0, 50.0]]))
    values = found["box_pooler"]
    assert values["percent"].count == 49
    assert values["percent"].mean == pytest.approx(5.0, rel=1e-5)
    assert ("modulation" in values) == modulated
    if modulated:
        assert values["modulation"].mean == pytest.approx(0.5)
