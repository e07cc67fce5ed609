"""One set of samples for all operators: gradients, opcheck, compilation and kernels run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated import cuda_kernels, emulated, order  # noqa: F401  fixtures
from torch import Tensor

import d2det.ops  # noqa: F401  defines torch.ops.d2det

# Positions of the arguments that have a gradient.
DIFFERENTIABLE = {
    "modulated_deform_conv2d": (0, 1, 2, 3, 4),
    "deform_roi_pool": (0, 3, 4),
    "adaptive_weighted_pool": (0, 1),
    "soft_nms": (),
}


class Maker:
    """Random tensors of one dtype on one device, the same values for all."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return value.to(self.device, self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        value = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (value * (high - low) + low).to(self.device, self.dtype)

    def integers(self, count: int, high: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.generator).to(self.device)

    def coordinates(self, *values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.device, self.dtype)


@dataclass(frozen=True)
class OpSample:
    """Arguments of one operator of torch.ops.d2det."""

    op: str
    label: str
    make: Callable[[Maker], tuple[Any, ...]]

    def arguments(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", grad: bool = True
    ) -> tuple[Any, ...]:
        """Fresh arguments; `grad` makes leaves of those that have a gradient."""
        args = self.make(Maker(dtype, torch.device(device)))
        if grad:
            for position in DIFFERENTIABLE[self.op]:
                arg = args[position]
                for tensor in arg if isinstance(arg, list) else [arg]:
                    if tensor is not None:
                        tensor.requires_grad_()
        return args

    def leaves(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors among the arguments that ask for a gradient."""
        flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
        return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def _conv(m: Maker) -> tuple[Any, ...]:
    offset = m.uniform(2, 2 * 2 * 6, 3, 2, low=-2.0, high=2.0)
    mask, weight = m.uniform(2, 2 * 6, 3, 2), m.normal(4, 2, 2, 3)
    return m.normal(2, 4, 5, 6), offset, mask, weight, m.normal(4), [2, 2], [1, 1], [1, 2], False


def _conv_plain(m: Maker) -> tuple[Any, ...]:
    x, weight = channels_last(m.normal(1, 2, 3, 4)), channels_last(m.normal(2, 2, 3, 3))
    return (
        x,
        channels_last(m.normal(1, 18, 3, 2)),
        None,
        weight,
        None,
        [1, 2],
        [1, 1],
        [1, 1],
        False,
    )


def _conv_empty(m: Maker) -> tuple[Any, ...]:
    x, offset, mask, weight, *rest = _conv(m)
    return x[:0].clone(), offset[:0].clone(), mask[:0].clone(), weight, *rest


_BOXES = ([0, 2.3, 3.7, 25.1, 21.9], [1, -7.3, 12.2, 18.4, 30.3], [1, 5.1, 4.2, 50.7, 31.9])


def _roi(m: Maker, convention: str, moved: bool, points: int) -> tuple[Any, ...]:
    features = [m.normal(2, 2, 7, 9), m.normal(2, 2, 4, 5)]
    rois, levels = m.coordinates(*_BOXES), torch.tensor([0, 1, 0], device=m.device)
    offset = m.normal(3, 2, 3, 3) if moved else None
    modulation = m.uniform(3, 1, 3, 3) if moved else None
    settings = (3, [1 / 4, 1 / 8], points, 0.3, convention)
    return features, rois, levels, offset, modulation, *settings


def _roi_channels_last(m: Maker) -> tuple[Any, ...]:
    features, rois, levels, offset, modulation, *settings = _roi(m, "aligned", True, 2)
    features = [channels_last(f) for f in features]
    return features, rois, levels, channels_last(offset), channels_last(modulation), *settings


def _roi_empty(m: Maker) -> tuple[Any, ...]:
    features, rois, levels, offset, modulation, *settings = _roi(m, "aligned", True, 1)
    return features, rois[:0], levels[:0], offset[:0].clone(), modulation[:0].clone(), *settings


def _weighted(m: Maker, normalize: bool) -> tuple[Any, ...]:
    return m.normal(2, 2, 4, 4), m.normal(2, 2, 4, 4), 12.0, 3, 2, 1, normalize


def _weighted_odd(m: Maker) -> tuple[Any, ...]:
    return channels_last(m.normal(1, 2, 3, 6)), m.normal(1, 2, 3, 6), -2.0, 2, 1, 0, True


def _nms(m: Maker, method: str, count: int = 30) -> tuple[Any, ...]:
    corner, size = m.uniform(count, 2, high=20.0), m.uniform(count, 2, low=5.0, high=15.0)
    boxes = torch.cat([corner, corner + size], 1)
    return boxes, m.uniform(count), m.integers(count, 3), 0.3, method, 0.5, 0.05


SAMPLES = [
    OpSample("modulated_deform_conv2d", "groups", _conv),
    OpSample("modulated_deform_conv2d", "v1-channels-last", _conv_plain),
    OpSample("modulated_deform_conv2d", "empty", _conv_empty),
    OpSample("deform_roi_pool", "aligned", lambda m: _roi(m, "aligned", True, 2)),
    OpSample("deform_roi_pool", "aligned-regular", lambda m: _roi(m, "aligned", False, 2)),
    OpSample("deform_roi_pool", "psroi", lambda m: _roi(m, "psroi", True, 2)),
    OpSample("deform_roi_pool", "psroi-regular", lambda m: _roi(m, "psroi", False, 1)),
    OpSample("deform_roi_pool", "channels-last", _roi_channels_last),
    OpSample("deform_roi_pool", "empty", _roi_empty),
    OpSample("adaptive_weighted_pool", "normalized", lambda m: _weighted(m, True)),
    OpSample("adaptive_weighted_pool", "unnormalized", lambda m: _weighted(m, False)),
    OpSample("adaptive_weighted_pool", "odd-channels-last", _weighted_odd),
    OpSample("soft_nms", "linear", lambda m: _nms(m, "linear")),
    OpSample("soft_nms", "gaussian", lambda m: _nms(m, "gaussian")),
    OpSample("soft_nms", "hard", lambda m: _nms(m, "hard")),
    OpSample("soft_nms", "empty", lambda m: _nms(m, "linear", 0)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`op_sample`: every sample; `grad_sample`: those of operators that have a gradient."""
    for fixture, chosen in (
        ("op_sample", SAMPLES),
        ("grad_sample", [s for s in SAMPLES if DIFFERENTIABLE[s.op]]),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, chosen, ids=[f"{s.op}-{s.label}" for s in chosen])
