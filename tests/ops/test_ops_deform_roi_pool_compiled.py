"""The compiled CPU kernel of deform_roi_pool against its reference in float64, and torchvision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from d2det.ops import _library, deform_roi_pool

pytestmark = pytest.mark.skipif(
    _library.implementation("deform_roi_pool", "cpu") != "compiled",
    reason="no compiled kernel of deform_roi_pool for the CPU here",
)

SIZES, SCALES = ((24, 37), (12, 19), (6, 9)), [1 / 4, 1 / 8, 1 / 16]
NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def layout(value: Tensor, channels_last: bool) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if channels_last else value


def make(
    rois: int,
    channels: int,
    size: int = 3,
    layouts: tuple[bool, ...] = (False, False, False),
    moved: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Float64 arguments: features of 2 images, RoIs inside and across borders, in any order."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    corner = torch.rand(rois, 2, generator=g, dtype=torch.float64) * 140 - 20
    extent = 2 ** (torch.rand(rois, 2, generator=g, dtype=torch.float64) * 6)
    image = torch.randint(0, 2, (rois, 1), generator=g)
    return {
        "features": [
            layout(normal(2, channels, *s), last) for s, last in zip(SIZES, layouts, strict=True)
        ],
        "rois": torch.cat([image, corner, corner + extent], 1),
        "levels": torch.randint(0, 3, (rois,), generator=g),
        "offset": normal(rois, 2, size, size) if moved else None,
        "modulation": normal(rois, 1, size, size) if moved else None,
        "grad": normal(rois, channels, size, size),
    }


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A case, or a part of one, in another dtype; memory formats are kept."""
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def run(
    case: dict[str, Any],
    forward: Any,
    backward: Any,
    ratio: int = 2,
    convention: str = "aligned",
    gamma: float = 0.3,
) -> list[Tensor]:
    """Output and the gradients of all maps, offset and modulation."""
    args = [case[k] for k in ("features", "rois", "levels", "offset", "modulation")]
    settings = (case["grad"].shape[-1], SCALES, ratio, gamma, convention)
    moved = case["offset"] is not None
    with torch.no_grad():
        output = forward(*args, *settings)
        mask = [True, moved, moved]
        maps, *others = backward(case["grad"], *args, *settings, mask, False)
    return [output, *maps, *others]


def compiled(case: dict[str, Any], **settings: Any) -> list[Tensor]:
    ops = torch.ops.d2det
    return run(case, ops.deform_roi_pool, ops.deform_roi_pool_backward, **settings)


def reference(case: dict[str, Any], **settings: Any) -> list[Tensor]:
    names = ("deform_roi_pool", "deform_roi_pool_backward")
    return run(case, *(_library.references[n] for n in names), **settings)


def check(case: dict[str, Any], dtype: torch.dtype, **settings: Any) -> None:
    """Against the reference in float64 on the same (rounded) numbers."""
    case = cast(case, dtype)
    found = compiled(case, **settings)
    expected = reference(cast(case, torch.float64), **settings)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        if f.numel() and f.dtype == dtype:
            error = (f.double() - e).abs().max() / e.abs().max().clamp(min=1e-3)
            assert error <= bound[dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layouts", [(False,) * 3, (True,) * 3, (True, False, True)], ids=["nchw", "nhwc", "mixed"]
)
@pytest.mark.parametrize("channels", [1, 3, 17, 64, 130])
def test_equals_the_reference(channels, layouts, dtype):
    check(make(17, channels, layouts=layouts), dtype)


@pytest.mark.parametrize("convention", ["aligned", "psroi"])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("rois", [0, 1, 65])
def test_samples_and_conventions(rois, moved, ratio, convention):
    for dtype in (torch.float64, torch.float32):
        check(make(rois, 33, moved=moved), dtype, ratio=ratio, convention=convention)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [5, 48])
def test_without_offset_equals_roi_align(channels, channels_last):
    from torchvision.ops import roi_align  # here: test_ops_roi_capabilities.py does without

    case = cast(make(40, channels, 7, (channels_last,) * 3, moved=False), torch.float32)
    found = compiled(case, ratio=2)
    leaves = [f.detach().requires_grad_() for f in case["features"]]
    expected = torch.zeros_like(found[0])
    for level, (feature, scale) in enumerate(zip(leaves, SCALES, strict=True)):
        chosen = (case["levels"] == level).nonzero()[:, 0]
        pooled = roi_align(feature, case["rois"][chosen], 7, scale, 2, aligned=True)
        expected = expected.index_put((chosen,), pooled)
    grads = torch.autograd.grad(expected, leaves, case["grad"])
    for a, b in zip(found[:4], (expected, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tiny_huge_outside_and_whole_number_rois():
    boxes = [
        [0, 500.0, 500.0, 540.0, 560.0],
        [1, -90.0, -80.0, -10.0, -6.0],
        [0, 40.0, 40.0, 40.0, 40.0],
        [1, 60.0, 50.0, 20.0, 10.0],
        [0, -1e6, -1e6, 1e6, 1e6],
        [1, 1e6, 1e6, 1e6 + 8, 1e6 + 8],
        [0, 2.0, 2.0, 42.0, 42.0],  # whole-number positions at stride 4 and ratio 1
        [1, -2.0, -2.0, 150.0, 98.0],  # the first sample lies half a bin from the margin
    ]
    for level in range(3):
        for moved in (False, True):
            case = make(len(boxes), 18, 5, (True, False, True), moved=moved)
            case["rois"] = torch.tensor(boxes, dtype=torch.float64)
            case["levels"] = torch.full((len(boxes),), level)
            for convention in ("aligned", "psroi"):
                for ratio in (1, 2):
                    check(case, torch.float64, convention=convention, ratio=ratio)
                    # Coordinates of 1e6 and margins: the reference of the same precision.
                    single = cast(case, torch.float32)
                    found = compiled(single, convention=convention, ratio=ratio)
                    expected = reference(single, convention=convention, ratio=ratio)
                    for a, b in zip(found, expected, strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_margins_are_those_of_the_reference():
    """Positions on the margin itself, where rounding decides: float32 must decide alike."""
    g = torch.Generator().manual_seed(3)
    case = cast(make(400, 1, 7, moved=True), torch.float32)
    case["features"] = [torch.ones_like(f) for f in case["features"]]
    # Each RoI is as large as its map and begins so that its first samples lie at -1.
    steps = torch.randint(1, 500, (400,), generator=g) / 7
    scale = torch.tensor(SCALES)[case["levels"]]
    case["rois"][:, 1] = -0.5 / scale - steps / 14
    case["rois"][:, 3] = case["rois"][:, 1] + steps
    case["rois"][:, 2], case["rois"][:, 4] = case["rois"][:, 1], case["rois"][:, 3]
    case["offset"] = torch.randint(-20, 20, case["offset"].shape, generator=g) / 14
    for gamma in (0.1, 1.0):
        for convention in ("aligned", "psroi"):
            found = compiled(case, gamma=gamma, convention=convention, ratio=1)
            expected = reference(case, gamma=gamma, convention=convention, ratio=1)
            torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("convention", ["aligned", "psroi"])
def test_nan_and_infinite_coordinates(channels, convention):
    for dtype in (torch.float32, torch.float64):
        case = cast(make(9, channels, layouts=(True, False, True)), dtype)
        case["rois"][0, 1] = NAN
        case["rois"][1, 4] = NAN
        case["rois"][2, 3] = math.inf
        case["offset"][3, 0, 1, 1] = NAN
        case["offset"][4, 1, 0, 2] = -math.inf
        case["modulation"][5, 0, 2, 2] = NAN
        case["features"][0][0, 1, 3, 4] = NAN
        case["features"][1][1, 0, 2, 2] = math.inf
        found = compiled(case, convention=convention)
        expected = reference(case, convention=convention)
        assert expected[0].isnan().any()
        torch.testing.assert_close(found[0], expected[0], equal_nan=True)
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(a.isnan(), b.isnan())


def test_regular_grid_of_an_infinite_roi():
    case = cast(make(2, 4, moved=False), torch.float32)
    case["rois"][0, 3] = math.inf
    for a, b in zip(compiled(case), reference(case), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_half_features_beside_float32_offsets(channels_last):
    """Nothing is cast but the result, and each gradient has its own dtype."""
    full = cast(make(12, 40, layouts=(channels_last,) * 3), torch.float32)
    half = {**full, "features": cast(full["features"], torch.bfloat16)}
    half["grad"] = full["grad"].bfloat16()
    wide = {**half, "features": cast(half["features"], torch.float32)}
    wide["grad"] = half["grad"].float()
    found, expected = compiled(half), compiled(wide)
    assert [f.dtype for f in found] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-6)
        assert a.stride() == b.stride()


def test_gradients_have_the_strides_of_their_maps():
    case = cast(make(5, 6, layouts=(True, False, True)), torch.float32)
    case["features"][1] = torch.randn(12, 19, 2, 6).permute(2, 3, 0, 1)  # dense, in no format
    found = compiled(case)
    for map_, grad in zip(case["features"], found[1:4], strict=True):
        assert grad.stride() == map_.stride() == torch.empty_like(map_).stride()
    sliced = {
        **case,
        "features": [f[:, ::2] for f in case["features"]],
        "grad": case["grad"][:, ::2],
    }
    for a, b in zip(compiled(sliced), reference(sliced), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_gradients_do_not_depend_on_which_are_asked_for(wanted, channels_last):
    case = cast(make(17, 80, layouts=(channels_last,) * 3), torch.float32)
    args = [case[k] for k in ("features", "rois", "levels", "offset", "modulation")]
    backward = torch.ops.d2det.deform_roi_pool_backward
    settings = (3, SCALES, 1, 0.3, "aligned")
    everything = backward(case["grad"], *args, *settings, [True] * 3, False)
    found = backward(case["grad"], *args, *settings, [i in wanted for i in range(3)], False)
    for i in range(3):
        if i not in wanted:
            assert len(found[i]) == 0
        else:
            torch.testing.assert_close(found[i], everything[i], rtol=1e-6, atol=1e-6)


def test_runs_agree_to_the_bit():
    """From run to run; output and gradients of maps also for any number of threads."""
    case = cast(make(65, 96, layouts=(True, False, True)), torch.float32)
    before = torch.get_num_threads()
    first = None
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            a, b = compiled(case), compiled(case)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            first = first or a
            assert all(torch.equal(x, y) for x, y in zip(a[:4], first[:4], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("convention", ["aligned", "psroi"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_by_differences(convention, channels_last):
    case = make(4, 3, 2, (channels_last,) * 3)
    features = [f.requires_grad_() for f in case["features"]]
    leaves = (case["offset"].requires_grad_(), case["modulation"].requires_grad_(), *features)

    def pool(offset: Tensor, modulation: Tensor, *maps: Tensor) -> Tensor:
        return deform_roi_pool(
            maps,
            case["rois"],
            case["levels"],
            offset,
            modulation,
            output_size=2,
            spatial_scales=SCALES,
            sampling_ratio=2,
            convention=convention,
        )

    assert torch.autograd.gradcheck(pool, leaves, fast_mode=True)


def test_kernel_refuses_rois_of_no_image_or_level():
    """The kernel itself, past the public function's check: an error, never a crash."""
    for image, level in ((2.0, 0), (-1.0, 0), (NAN, 0), (1e30, 0), (0.0, 3), (0.0, -(2**62))):
        case = cast(make(3, 4), torch.float32)
        case["rois"][1, 0] = image
        case["levels"][1] = level
        message = "rois and levels must refer to 2 images and 3 levels, but RoI 1 has batch index"
        ops = torch.ops.d2det
        for forward in (ops.deform_roi_pool, lambda *_: None):  # the second: on to the backward
            with pytest.raises(RuntimeError, match=message):
                run(case, forward, ops.deform_roi_pool_backward)
