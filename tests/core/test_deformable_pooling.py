from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from d2det.core import DeformablePooling, assign_levels

STRIDES = (4, 8)
ROIS = torch.tensor(
    [
        [0, 8.0, 8.0, 50.0, 40.0],
        [1, 3.3, 1.1, 130.0, 140.2],
        [0, 0.0, 0.0, 160.0, 160.0],
        [1, 100.0, 60.0, 101.0, 159.0],
    ]
)
V2 = {"modulated": True, "hidden_dims": (12, 10)}
KINDS = pytest.mark.parametrize("kind", [{}, V2], ids=["v1", "v2"])


def features(channels: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, channels, 160 // s, 160 // s, generator=generator, dtype=dtype)
        for s in STRIDES
    ]


def pooling(**kwargs) -> DeformablePooling:
    arguments = {"output_size": 4, "offset_resolution": 3}
    return DeformablePooling(4, STRIDES, **{**arguments, **kwargs}).double()


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


def loop(model: DeformablePooling, maps: list[torch.Tensor], roi: torch.Tensor) -> torch.Tensor:
    """Eq. 2, one sampling point at a time."""
    n, (x1, y1, x2, y2) = int(roi[0]), roi[1:].tolist()
    level = min(max(math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 56)), 0), 1)
    plane, scale = maps[level][n], 1 / STRIDES[level]
    w, h = (x2 - x1) * scale, (y2 - y1) * scale
    left, top = x1 * scale - 0.5, y1 * scale - 0.5

    def bins(side, shift, factor):
        result = torch.zeros(plane.shape[0], side, side, dtype=plane.dtype)
        for i in range(side):
            for j in range(side):
                dx, dy = shift(i, j)
                for a in (0.25, 0.75):
                    for b in (0.25, 0.75):
                        y = top + (i + a) * h / side + dy * model.gamma * h
                        x = left + (j + b) * w / side + dx * model.gamma * w
                        result[:, i, j] += factor(i, j) * bilinear(plane, y, x) / 4
        return result

    k = model.output_size
    hidden = bins(model.offset_resolution, lambda i, j: (0, 0), lambda i, j: 1).flatten()
    linear = [m for m in model.offset_fc if isinstance(m, nn.Linear)]
    for layer in linear[:-1]:
        hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
    raw = (linear[-1].weight @ hidden + linear[-1].bias).view(-1, k, k)
    factor = raw[2] if model.modulated else None
    return bins(
        k,
        lambda i, j: (raw[0, i, j].item(), raw[1, i, j].item()),
        lambda i, j: 1 if factor is None else 1 / (1 + (-factor[i, j]).exp()),
    )


@KINDS
def test_equals_one_point_at_a_time(kind):
    model = pooling(gamma=0.2, **kind)
    randomise(model)
    maps = features()
    found = model(maps, ROIS.double())
    for roi, pooled in zip(ROIS.double(), found, strict=True):
        torch.testing.assert_close(pooled, loop(model, maps, roi))


@KINDS
def test_starts_as_roi_align(kind):
    """Half of it where modulated."""
    model, maps, rois = pooling(**kind), features(), ROIS.double()
    level = assign_levels(rois[:, 1:], STRIDES)
    expected = torch.stack(
        [
            roi_align(maps[i], roi[None], 4, 1 / STRIDES[i], 2, aligned=True)[0]
            for i, roi in zip(level.tolist(), rois, strict=True)
        ]
    )
    torch.testing.assert_close(model(maps, rois), expected / 2 if kind else expected)


@KINDS
def test_gradients_reach_features_and_all_layers(kind):
    model = pooling(**kind)
    maps = [m.requires_grad_() for m in features()]
    last = model.offset_fc[-1]
    model(maps, ROIS.double()).square().sum().backward()
    # The last layer starts at zero: it learns at once, what is below it from the next step on.
    rows = last.weight.grad.abs().amax(dim=1).view(-1, 16)
    assert rows.shape[0] == (3 if kind else 2)  # x and y of the offsets, and modulation
    assert (rows.amax(dim=1) > 0).all()
    assert all(m.grad.abs().max() > 0 for m in maps)
    randomise(model)
    model.zero_grad()
    model(maps, ROIS.double()).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@KINDS
def test_no_rois(kind):
    model = pooling(**kind)
    maps = [m.requires_grad_() for m in features()]
    pooled = model(maps, ROIS.double()[:0])
    assert pooled.shape == (0, 4, 4, 4)
    pooled.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@KINDS
@pytest.mark.parametrize("convention", ["aligned", "psroi"])
def test_compiles_into_one_graph(kind, convention):
    model = pooling(convention=convention, **kind)
    randomise(model)
    maps, rois = features(), ROIS.double()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, rois), model(maps, rois))


@KINDS
def test_bf16_autocast(kind):
    model = pooling(**kind).float()
    randomise(model)
    maps = [m.float() for m in features()]
    exact = model(maps, ROIS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model([m.bfloat16() for m in maps], ROIS)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_finer_output_than_what_its_offsets_are_predicted_from():
    model = pooling(output_size=6, **V2)
    assert model.offset_fc[1].in_features == 4 * 9
    assert model.offset_fc[-1].out_features == 3 * 36
    assert model(features(), ROIS.double()).shape == (4, 4, 6, 6)


def test_parameters_of_the_paper():
    """DCNv2, Table 1, at 256 channels: + 1.2 M; and 12,544 -> 1024 -> 1024 -> 147."""

    def count(**kwargs):
        return sum(p.numel() for p in DeformablePooling(256, (16,), **kwargs).parameters())

    assert count() == 12544 * 98 + 98
    expected = 12544 * 1024 + 1024 * 1024 + 1024 * 147 + 1024 + 1024 + 147
    assert count(modulated=True, hidden_dims=(1024, 1024)) == expected
