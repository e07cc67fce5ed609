"""deform_roi_pool against torchvision's RoIAlign, and against a loop over points in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from d2det.ops import deform_roi_pool

SCALES = [1 / 4, 1 / 8, 1 / 16]


def make_features(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, batch: int = 2
) -> list[Tensor]:
    sizes = ((24, 30), (12, 15), (6, 8))
    return [torch.randn(batch, 3, *s, dtype=dtype).to(device).requires_grad_() for s in sizes]


def make_rois(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """Inside, across each border, outside, tiny, 10:1, larger than the image, inverted."""
    return torch.tensor(
        [
            [0, 10.2, 12.7, 70.1, 60.3],
            [1, -20.5, -12.5, 30.5, 40.5],
            [1, 90.0, 70.0, 150.0, 120.0],
            [0, 300.0, 300.0, 340.0, 350.0],
            [0, 33.3, 44.4, 33.9, 44.6],
            [1, 3.0, 50.0, 103.0, 60.0],
            [1, -500.0, -500.0, 900.0, 900.0],
            [0, 60.0, 50.0, 20.0, 10.0],
        ],
        dtype=dtype,
        device=device,
    )


def make_levels(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2, 2, 0], device=device)


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
@pytest.mark.parametrize("output_size", [1, 5])
def test_without_offset_equals_roi_align_of_each_level(sampling_ratio, output_size, device):
    features, rois, levels = make_features(device), make_rois(device), make_levels(device)
    found = deform_roi_pool(
        features,
        rois,
        levels,
        output_size=output_size,
        spatial_scales=SCALES,
        sampling_ratio=sampling_ratio,
    )
    expected = torch.zeros_like(found)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        chosen = (levels == level).nonzero()[:, 0]
        pooled = roi_align(feature, rois[chosen], output_size, scale, sampling_ratio, aligned=True)
        expected = expected.index_put((chosen,), pooled)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, features, grad),
        torch.autograd.grad(expected, features, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def bilinear(feature: Tensor, y: float, x: float) -> Tensor:
    """(C,) at a point within [0, H - 1] x [0, W - 1]."""
    low_y, low_x = math.floor(y), math.floor(x)
    high_y, high_x = math.ceil(y), math.ceil(x)
    fy, fx = y - low_y, x - low_x
    top = feature[:, low_y, low_x] * (1 - fx) + feature[:, low_y, high_x] * fx
    bottom = feature[:, high_y, low_x] * (1 - fx) + feature[:, high_y, high_x] * fx
    return top * (1 - fy) + bottom * fy


def half_away(value: float) -> float:
    return math.copysign(math.floor(abs(value) + 0.5), value)


def slow_pool(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    modulation: Tensor | None,
    size: int,
    points: int,
    gamma: float,
    convention: str,
) -> Tensor:
    """One point after the other, from the definition."""
    out = torch.zeros(len(rois), features[0].shape[1], size, size, dtype=torch.float64)
    for r, (image, *box) in enumerate(rois.tolist()):
        feature, scale = features[int(levels[r])][int(image)], SCALES[int(levels[r])]
        height, width = feature.shape[1:]
        if convention == "aligned":
            x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
            w, h = x2 - x1, y2 - y1
        else:
            x1, y1 = (half_away(v) * scale - 0.5 for v in box[:2])
            x2, y2 = ((half_away(v) + 1) * scale - 0.5 for v in box[2:])
            w, h = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
        for i in range(size):
            for j in range(size):
                dx, dy = (0.0, 0.0) if offset is None else (gamma * offset[r, :, i, j]).tolist()
                total, count = torch.zeros(feature.shape[0], dtype=torch.float64), 0
                for a in range(points):
                    for b in range(points):
                        half = 0.5 if convention == "aligned" else 0.0
                        y = y1 + (i + (a + half) / points) * h / size + dy * h
                        x = x1 + (j + (b + half) / points) * w / size + dx * w
                        if convention == "aligned":
                            count += 1
                            if y < -1 or y > height or x < -1 or x > width:
                                continue
                        else:
                            if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
                                continue
                            count += 1
                        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
                        total += bilinear(feature, y, x)
                mean = total / count if count else total
                out[r, :, i, j] = mean * (1.0 if modulation is None else modulation[r, 0, i, j])
    return out


@pytest.mark.parametrize("convention", ["aligned", "psroi"])
@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize(("moved", "modulated"), [(False, False), (True, False), (True, True)])
def test_equals_a_loop_over_points(convention, points, moved, modulated, device):
    features = [f.detach() for f in make_features()]
    rois, levels = make_rois(), make_levels()
    offset = torch.randn(8, 2, 4, 4, dtype=torch.float64) * 3 if moved else None
    modulation = torch.rand(8, 1, 4, 4, dtype=torch.float64) if modulated else None
    settings: dict[str, Any] = {"gamma": 0.1, "convention": convention}
    expected = slow_pool(features, rois, levels, offset, modulation, 4, points, *settings.values())
    found = deform_roi_pool(
        [f.to(device) for f in features],
        rois.to(device),
        levels.to(device),
        None if offset is None else offset.to(device),
        None if modulation is None else modulation.to(device),
        output_size=4,
        spatial_scales=SCALES,
        sampling_ratio=points,
        **settings,
    )
    torch.testing.assert_close(found.cpu(), expected)


def test_psroi_rounds_halves_away_from_zero():
    """2.5 is 3 and -2.5 is -3; round-half-even would make both of them 2."""
    feature = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    level = torch.zeros(1, dtype=torch.int64)

    def pool(*box: float) -> Tensor:
        rois = torch.tensor([[0, *box]], dtype=torch.float64)
        return deform_roi_pool(
            [feature],
            rois,
            level,
            output_size=3,
            spatial_scales=[1.0],
            sampling_ratio=2,
            convention="psroi",
        )

    assert torch.equal(pool(2.5, -2.5, 10.5, 8.5), pool(3, -3, 11, 9))
    assert not torch.allclose(pool(2.5, -2.5, 10.5, 8.5), pool(2, -2, 10, 8))


def test_offset_of_one_bin_is_the_neighbouring_bin():
    """x comes before y, and gamma scales the RoI's size: 0.25 of the width is one of four bins."""
    features, rois = make_features()[:1], make_rois()[:1]
    settings: dict[str, Any] = {
        "output_size": 4,
        "spatial_scales": SCALES[:1],
        "sampling_ratio": 2,
        "gamma": 0.1,
    }
    level = torch.zeros(1, dtype=torch.int64)
    plain = deform_roi_pool(features, rois, level, **settings)
    offset = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    offset[:, 0] = 2.5
    moved = deform_roi_pool(features, rois, level, offset, **settings)
    torch.testing.assert_close(moved[..., :3], plain[..., 1:])


def pool(*args: Any, **changes: Any) -> Tensor:
    settings = {"output_size": 2, "spatial_scales": SCALES, "sampling_ratio": 1}
    return deform_roi_pool(*args, **{**settings, **changes})


@pytest.mark.parametrize("batch", [0, 2])
def test_no_rois(batch, device):
    features = make_features(device, torch.float32, batch)
    rois, levels = torch.zeros(0, 5, device=device), make_levels(device)[:0]
    offset = torch.zeros(0, 2, 2, 2, device=device, requires_grad=True)
    out = pool(features, rois, levels, offset)
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    assert offset.grad is not None
    assert all(torch.equal(f.grad, torch.zeros_like(f)) for f in features)


@pytest.mark.parametrize("convention", ["aligned", "psroi"])
@pytest.mark.parametrize("value", [1e6, -1e30, float("inf")])
def test_offsets_far_outside_read_zeros(convention, value, device):
    features = make_features(device, torch.float32)
    rois = make_rois(device, torch.float32)
    offset = torch.full((8, 2, 2, 2), value, device=device, requires_grad=True)
    out = pool(features, rois, make_levels(device), offset, convention=convention)
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), [*features, offset]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_nan_offset_is_seen_in_its_bin_only():
    offset = torch.zeros(8, 2, 2, 2)
    offset[0, 0, 1, 1] = float("nan")
    features = make_features(dtype=torch.float32)
    bad = pool(features, make_rois(dtype=torch.float32), make_levels(), offset).isnan()
    assert bad[0, :, 1, 1].all()
    assert bad.sum() == 3


def test_mixed_dtypes_and_autocast(device):
    """Half-precision features beside float32 RoIs: nothing is cast, coordinates stay exact."""
    features = [f.detach().bfloat16() for f in make_features(device)]
    rois, levels = make_rois(device, torch.float32), make_levels(device)
    offset = torch.randn(8, 2, 2, 2, device=device)
    out = pool(features, rois, levels, offset)
    exact = pool([f.float() for f in features], rois, levels, offset)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(pool(features, rois, levels, offset), out)
        uneven = [features[0], *[f.float() for f in features[1:]]]
        torch.testing.assert_close(pool(uneven, rois, levels, offset), exact, rtol=0, atol=0)


def rois_of(**changes: float) -> Tensor:
    rois = make_rois(dtype=torch.float32)
    for column, value in changes.items():
        rois[3, "ixyab".index(column)] = value
    return rois


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": []}, ValueError, "one entry for each level, got 0 and 3"),
    ({"spatial_scales": [0.25]}, ValueError, "one entry for each level, got 3 and 1"),
    ({"rois": torch.zeros(8, 4)}, ValueError, r"rois must have shape \(R, 5\), got \(8, 4\)"),
    ({"levels": torch.zeros(8)}, TypeError, "levels must be torch.int64, got torch.float32"),
    ({"levels": torch.zeros(7).long()}, ValueError, r"levels .*\(8,\).*\(8, 5\), got \(7,\)"),
    ({"levels": torch.full((8,), 3)}, ValueError, "3 levels, but RoI 0 .* level 3"),
    ({"levels": torch.full((8,), -1)}, ValueError, "RoI 0 has batch index 0 and level -1"),
    ({"rois": rois_of(i=2)}, ValueError, "2 images and .* RoI 3 has batch index 2"),
    ({"rois": rois_of(i=-1)}, ValueError, "RoI 3 has batch index -1"),
    ({"offset": torch.zeros(8, 2, 3, 3)}, ValueError, r"\(8, 2, 2, 2\).*got \(8, 2, 3, 3\)"),
    ({"modulation": torch.zeros(8, 2, 2, 2)}, ValueError, r"modulation .*\(8, 1, 2, 2\)"),
    ({"offset": torch.zeros(8, 2, 2, 2, device="meta")}, ValueError, "offset is on meta"),
    ({"sampling_ratio": 0}, ValueError, "sampling_ratio must be at least 1, got 0"),
    ({"output_size": (7, 7)}, TypeError, "output_size must be an int, got tuple"),
    ({"convention": "roi"}, ValueError, 'convention must be "aligned" or "psroi", got \'roi\''),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, error, message):
    arguments: dict[str, Any] = {
        "features": make_features(dtype=torch.float32),
        "rois": rois_of(),
        "levels": make_levels(),
        "output_size": 2,
        "spatial_scales": SCALES,
        "sampling_ratio": 1,
    }
    deform_roi_pool(**arguments)
    with pytest.raises(error, match=message):
        deform_roi_pool(**{**arguments, **change})


@pytest.mark.parametrize("other", [(2, 4, 5, 6), (1, 3, 5, 6), (2, 3, 0, 6)])
def test_levels_must_fit_each_other(other):
    features = [*make_features(dtype=torch.float32)[:2], torch.zeros(other)]
    with pytest.raises(ValueError, match=r"features\[2\] has shape .*features\[0\]"):
        pool(features, rois_of(), make_levels())


def test_levels_must_share_a_dtype():
    features = [*make_features(dtype=torch.float32)[:2], torch.zeros(2, 3, 5, 6).half()]
    with pytest.raises(TypeError, match=r"features\[2\] is torch.float16"):
        pool(features, rois_of(), make_levels())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_roi_of_no_image_is_nan_without_a_synchronisation():
    features = [f.detach() for f in make_features("cuda", torch.float32)]
    rois, levels = rois_of(i=7).cuda(), make_levels("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = pool(features, rois, levels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().flatten(1).all(1).tolist() == [r == 3 for r in range(8)]
