"""modulated_deform_conv2d against torchvision's deformable and PyTorch's plain convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from d2det.ops import modulated_deform_conv2d
from d2det.ops.reference import modulated_deform_conv as reference

#      kernel, stride, padding, dilation, groups, offset groups, modulated, bias
SETTINGS = [
    ((3, 3), 1, 1, 1, 1, 1, True, True),
    ((3, 3), 1, 1, 1, 1, 1, False, False),
    ((3, 3), 2, 1, 1, 2, 1, True, False),
    ((3, 3), 1, 2, 2, 1, 2, True, True),
    ((2, 4), (1, 2), (0, 3), (2, 1), 2, 4, True, True),
    ((1, 1), 1, 0, 1, 4, 2, False, True),
    ((5, 3), (2, 1), (2, 0), 1, 1, 4, True, False),
]


def make(
    settings: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    batch: int = 3,
    reach: float = 3.0,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """(input, offset, mask, weight, bias) as leaves, and the keywords."""
    (kh, kw), stride, padding, dilation, groups, offset_groups, modulated, bias = settings
    steps = {"stride": stride, "padding": padding, "dilation": dilation}
    x = torch.randn(batch, 8, 9, 11, dtype=dtype)
    weight = torch.randn(4, 8 // groups, kh, kw, dtype=dtype)
    # A plain convolution of one image tells the output's size.
    ho, wo = F.conv2d(torch.zeros(1, 8, 9, 11), torch.zeros(4, 8, kh, kw), **steps).shape[2:]
    offset = torch.randn(batch, 2 * offset_groups * kh * kw, ho, wo, dtype=dtype) * reach
    mask = torch.rand(batch, offset_groups * kh * kw, ho, wo, dtype=dtype) if modulated else None
    tensors = [x, offset, mask, weight, torch.randn(4, dtype=dtype) if bias else None]
    return [t if t is None else t.to(device).requires_grad_() for t in tensors], steps


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_torchvision(settings, device):
    tensors, steps = make(settings, device)
    x, offset, mask, weight, bias = tensors
    found = modulated_deform_conv2d(x, offset, mask, weight, bias, **steps)
    expected = deform_conv2d(x, offset, weight, bias, mask=mask, **steps)
    torch.testing.assert_close(found, expected)
    leaves = [t for t in tensors if t is not None]
    grad = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_images_taken_in_groups_give_the_same(monkeypatch):
    """The column buffer's limit splits a batch of 3 into 2 + 1."""
    tensors, steps = make(SETTINGS[0], torch.device("cpu"))
    x, offset, mask, weight, bias = tensors
    outputs = []
    for limit in (1 << 25, 2 * 9 * 11 * 8 * 9):
        monkeypatch.setattr(reference, "_COLUMN_LIMIT", limit)
        y = modulated_deform_conv2d(x, offset, mask, weight, bias, **steps)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_offset_and_unit_mask_are_plain_convolution(device):
    x, weight, bias = torch.randn(2, 6, 7, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    offset, mask = x.new_zeros(2, 18, 7, 8), x.new_ones(2, 9, 7, 8)
    found = modulated_deform_conv2d(x, offset, mask, weight, bias, padding=1)
    expected = F.conv2d(x, weight, bias, padding=1, groups=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [1e4, 1e20, float("inf"), -float("inf")])
def test_offsets_far_outside_read_zeros(value, device):
    tensors, steps = make(SETTINGS[0], device, torch.float32)
    x, offset, mask, weight, bias = tensors
    far = torch.full_like(offset, value).requires_grad_()
    y = modulated_deform_conv2d(x, far, mask, weight, bias, **steps)
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y))
    for grad in torch.autograd.grad(y.sum(), [x, far, mask, weight]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_nan_offset_is_seen_in_its_pixel_only():
    tensors, steps = make(SETTINGS[0], torch.device("cpu"), torch.float32)
    x, offset, mask, weight, bias = (t.detach() for t in tensors)
    offset[1, 4, 5, 6] = float("nan")
    y = modulated_deform_conv2d(x, offset, mask, weight, bias, **steps)
    bad = y.isnan().any(1)
    assert bad[1, 5, 6]
    assert bad.sum() == 1


def test_empty_batch(device):
    tensors, steps = make(SETTINGS[1], device, torch.float32, batch=0)
    x, offset, _, weight, _ = tensors
    y = modulated_deform_conv2d(x, offset, None, weight, **steps)
    assert y.shape == (0, 4, 9, 11)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_offsets_beside_half_input(dtype, device):
    """Offsets of 0.3 at pixel 200 are lost in half precision: 200.3 rounds to 200.25 or 200."""
    x = torch.arange(256.0, device=device).view(1, 1, 1, 256).to(dtype)
    offset = torch.zeros(1, 2, 1, 256, device=device)
    offset[:, 1] = 0.3
    weight = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    y = modulated_deform_conv2d(x, offset, None, weight)
    assert y.dtype == dtype
    exact = x.double()[..., :-1] * 0.7 + x.double()[..., 1:] * 0.3
    torch.testing.assert_close(y[..., :-1], exact.to(dtype), rtol=0, atol=0)


def test_autocast(device):
    """Operands are cast as a convolution's are, offsets are not; gradients come back in float32."""
    tensors, steps = make(SETTINGS[0], device, torch.float32, reach=0.5)
    x, offset, mask, weight, bias = tensors
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = modulated_deform_conv2d(x, offset, mask, weight, bias, **steps)
        mixed = modulated_deform_conv2d(x.bfloat16(), offset.half(), mask, weight, bias, **steps)
    expected = modulated_deform_conv2d(
        x.bfloat16(), offset, mask, weight.bfloat16(), bias.bfloat16(), **steps
    )
    assert y.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    leaves = [x, offset, mask, weight, bias]
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))


def test_autocast_leaves_float64(device):
    tensors, steps = make(SETTINGS[0], device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert modulated_deform_conv2d(*tensors, **steps).dtype == torch.float64


ERRORS = [
    ({"input": torch.zeros(3, 4, 5)}, ValueError, r"input must have 4 dim.*\(3, 4, 5\)"),
    ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.int64)}, TypeError, "input must be floating"),
    ({"weight": torch.zeros(4, 3, 3, 3)}, ValueError, r"\(4, 3, 3, 3\).*\(2, 4, 5, 6\)"),
    ({"weight": torch.zeros(3, 2, 3, 3)}, ValueError, r"\(3, 2, 3, 3\).*\(2, 4, 5, 6\)"),
    ({"weight": torch.zeros(4, 4, 3, 3, dtype=torch.float64)}, TypeError, "weight is .*float64"),
    ({"weight": torch.zeros(4, 4, 9, 9)}, ValueError, r"larger than the padded.*\(2, 4, 5, 6\)"),
    ({"offset": torch.zeros(2, 17, 5, 6)}, ValueError, r"offset of shape \(2, 17, 5, 6\)"),
    ({"offset": torch.zeros(2, 54, 5, 6)}, ValueError, r"\(2, 54, 5, 6\).*\(2, 4, 5, 6\)"),
    ({"offset": torch.zeros(2, 18, 5, 5)}, ValueError, r"\(2, 18, 5, 6\).*got \(2, 18, 5, 5\)"),
    ({"offset": torch.zeros(2, 18, 5, 6).half()}, TypeError, "offset must be .*float16"),
    ({"offset": torch.zeros(2, 18, 5, 6, device="meta")}, ValueError, "offset is on meta"),
    ({"mask": torch.zeros(2, 8, 5, 6)}, ValueError, r"mask .*\(2, 9, 5, 6\).*\(2, 8, 5, 6\)"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias .*\(4,\).*\(4, 4, 3, 3\), got \(5,\)"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"padding": (1, 2, 3)}, ValueError, "padding must be an int or two"),
    ({"dilation": 1.5}, TypeError, "dilation must be an int, got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, error, message):
    arguments = {
        "input": torch.zeros(2, 4, 5, 6),
        "offset": torch.zeros(2, 18, 5, 6),
        "mask": torch.zeros(2, 9, 5, 6),
        "weight": torch.zeros(4, 4, 3, 3),
        "padding": 1,
    }
    modulated_deform_conv2d(**arguments)
    with pytest.raises(error, match=message):
        modulated_deform_conv2d(**{**arguments, **change})


def test_public_function_compiles_into_one_graph():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    offset, mask = torch.randn(1, 18, 3, 3), torch.rand(1, 9, 3, 3)

    def run(x: Tensor) -> Tensor:
        return modulated_deform_conv2d(x, offset, mask, weight)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)
