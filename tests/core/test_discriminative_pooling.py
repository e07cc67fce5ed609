from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from d2det.core import DiscriminativePooling, MultiLevelRoIAlign, assign_levels

STRIDES = (4, 8)
ROIS = torch.tensor(
    [
        [0, 8.0, 8.0, 50.0, 40.0],
        [1, 3.3, 1.1, 130.0, 140.2],
        [0, 0.0, 0.0, 160.0, 160.0],
        [1, 100.0, 60.0, 101.0, 159.0],
    ]
)


def features(channels: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, channels, 160 // s, 160 // s, generator=generator, dtype=dtype)
        for s in STRIDES
    ]


def pooling(**kwargs) -> DiscriminativePooling:
    torch.manual_seed(0)
    arguments = {"output_size": 4, "offset_fc_dim": 16}
    return DiscriminativePooling(4, STRIDES, **{**arguments, **kwargs}).double()


def randomise(module: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def bilinear(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """RoIAlign's rule: zero beyond one pixel outside, clamped at the border."""
    height, width = plane.shape[-2:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(plane.shape[0], dtype=plane.dtype)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    return (
        plane[:, y0, x0] * (1 - fy) * (1 - fx)
        + plane[:, y0, x1] * (1 - fy) * fx
        + plane[:, y1, x0] * fy * (1 - fx)
        + plane[:, y1, x1] * fy * fx
    )


def loop_drp(model: DiscriminativePooling, maps: list[torch.Tensor], roi: torch.Tensor):
    """Facts, section 3, one RoI and one sampling point at a time."""
    k = model.output_size
    n, (x1, y1, x2, y2) = int(roi[0]), roi[1:].tolist()
    level = min(max(math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 56)), 0), 1)
    plane, scale = maps[level][n], 1 / STRIDES[level]
    parameters = model.levels[level if len(model.levels) > 1 else 0]
    w, h = (x2 - x1) * scale, (y2 - y1) * scale
    left, top = x1 * scale - 0.5, y1 * scale - 0.5

    def bins(side, shift, ratio):
        result = torch.zeros(plane.shape[0], side, side, dtype=plane.dtype)
        for i in range(side):
            for j in range(side):
                dx, dy = shift(i, j)
                for a in range(ratio):
                    for b in range(ratio):
                        y = top + (i + (a + 0.5) / ratio) * h / side + dy * 0.1 * h
                        x = left + (j + (b + 0.5) / ratio) * w / side + dx * 0.1 * w
                        result[:, i, j] += bilinear(plane, y, x) / ratio**2
        return result

    small = bins(model.offset_resolution, lambda i, j: (0.0, 0.0), 2)
    linear = [m for m in parameters.offsets if isinstance(m, nn.Linear)]
    hidden = (linear[0].weight @ small.flatten() + linear[0].bias).clamp(min=0)
    hidden = (linear[1].weight @ hidden + linear[1].bias).clamp(min=0)
    offsets = (linear[2].weight @ hidden + linear[2].bias).view(2, k, k)
    sampled = bins(2 * k, lambda i, j: offsets[:, i // 2, j // 2].tolist(), model.sampling_ratio)
    if model.weighting == "none":
        return sampled.view(-1, k, 2, k, 2).mean(dim=(2, 4))

    conv, norm = parameters.weights.conv.weight, parameters.weights.norm
    logits = torch.zeros_like(sampled)
    for i in range(2 * k):
        for j in range(2 * k):
            for a in range(3):
                for b in range(3):
                    y, x = i + a - 1, j + b - 1
                    if 0 <= y < 2 * k and 0 <= x < 2 * k:
                        logits[:, i, j] += conv[:, :, a, b] @ sampled[:, y, x]
    mean = logits.mean(dim=(1, 2), keepdim=True)
    var = ((logits - mean) ** 2).mean(dim=(1, 2), keepdim=True)
    logits = (logits - mean) / (var + norm.eps).sqrt()
    logits = logits * norm.weight[:, None, None] + norm.bias[:, None, None]
    sigma = 1 / (1 + (-logits).exp())
    weights = (12 * sigma).exp() if model.weighting == "normalized" else 2 * sigma
    result = torch.zeros(plane.shape[0], k, k, dtype=plane.dtype)
    for i in range(k):
        for j in range(k):
            top_sum, weight_sum = 0.0, 0.0
            for y in range(2 * i - 1, 2 * i + 2):
                for x in range(2 * j - 1, 2 * j + 2):
                    if 0 <= y < 2 * k and 0 <= x < 2 * k:
                        top_sum = top_sum + weights[:, y, x] * sampled[:, y, x]
                        weight_sum = weight_sum + weights[:, y, x]
            result[:, i, j] = top_sum / (weight_sum if model.weighting == "normalized" else 9)
    return result


@pytest.mark.parametrize("weighting", ["normalized", "unnormalized", "none"])
@pytest.mark.parametrize("per_level", [True, False])
def test_equals_a_loop(weighting, per_level):
    model = pooling(weighting=weighting, per_level=per_level)
    randomise(model)
    maps, rois = features(), ROIS.double()
    expected = torch.stack([loop_drp(model, maps, roi) for roi in rois])
    torch.testing.assert_close(model(maps, rois), expected, rtol=1e-9, atol=1e-9)


def test_equals_a_loop_with_more_points_and_full_resolution_offsets():
    model = pooling(sampling_ratio=2, offset_resolution=4, weighting="none")
    randomise(model)
    maps, rois = features(), ROIS.double()
    expected = torch.stack([loop_drp(model, maps, roi) for roi in rois])
    torch.testing.assert_close(model(maps, rois), expected, rtol=1e-9, atol=1e-9)


def test_without_weighting_starts_as_roi_align():
    maps, rois = features(), ROIS.double()
    pooled = pooling(weighting="none")(maps, rois)
    for level, plane in enumerate(maps):
        index = assign_levels(rois[:, 1:], STRIDES) == level
        expected = roi_align(plane, rois[index], 4, 1 / STRIDES[level], 2, aligned=True)
        torch.testing.assert_close(pooled[index], expected)


def test_light_weight_offsets_read_half_the_side():
    assert pooling(output_size=7).offset_resolution == 3
    assert pooling(output_size=7, offset_resolution=7).offset_resolution == 7
    # k // 2 = 3: 9 C inputs where the full form has 49 C.
    assert pooling(output_size=7).levels[0].offsets[1].in_features == 9 * 4


@pytest.mark.parametrize("per_level", [True, False])
def test_every_parameter_learns_or_has_a_zero_gradient(per_level):
    model = pooling(per_level=per_level)
    maps = [m.requires_grad_() for m in features()]
    small = ROIS.double()[:1]  # the second level has no RoI
    model(maps, small).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(m.grad is not None for m in maps)
    assert model.levels[0].weights.conv.weight.grad.abs().max() > 0
    if per_level:
        assert all(p.grad.eq(0).all() for p in model.levels[1].parameters())


def test_no_rois():
    model = pooling()
    pooled = model(features(), torch.zeros(0, 5, dtype=torch.float64))
    assert pooled.shape == (0, 4, 4, 4)
    pooled.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_results_do_not_depend_on_the_order_of_rois():
    model = pooling()
    randomise(model)
    order = torch.tensor([2, 0, 3, 1])
    maps, rois = features(), ROIS.double()
    torch.testing.assert_close(model(maps, rois[order]), model(maps, rois)[order])


def test_errors():
    with pytest.raises(ValueError, match="weighting must be one of .*'max'"):
        pooling(weighting="max")
    with pytest.raises(ValueError, match="output_size must be at least 2, got 1"):
        pooling(output_size=1)


def test_multi_level_roi_align_equals_torchvision():
    maps, rois = features(), ROIS.double()
    pooled = MultiLevelRoIAlign(14, STRIDES, 2)(maps, rois)
    for level, plane in enumerate(maps):
        index = assign_levels(rois[:, 1:], STRIDES) == level
        assert index.any()
        expected = roi_align(plane, rois[index], 14, 1 / STRIDES[level], 2, aligned=True)
        torch.testing.assert_close(pooled[index], expected)
