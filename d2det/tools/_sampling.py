"""Where a node's convolutions and RoI bins sample the image, and how much each place counts.

Zero shifts are added to the sampling locations of an ordinary forward pass; their gradients say how
much the node would change if a location moved. Regular convolutions and RoIAlign are run by the
deformable operators, at their regular places, so that they have locations to move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torchvision  # noqa: F401  defines torch.ops.torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2det.core.spatial_support import strength
from d2det.ops import deform_roi_pool, modulated_deform_conv2d

ROI_BINS = "RoI bins"


class Locations(NamedTuple):
    """Sampling locations of one layer.

    Attributes:
        layer: name of the module, or `ROI_BINS`.
        points: (P, 2), x and y in pixels of the network's input.
        weights: (P,), the change of the node's strength as the location moves by a pixel.
    """

    layer: str
    points: Tensor
    weights: Tensor


class _Shift(NamedTuple):
    layer: str
    leaf: Tensor  # (2, P) zeros with a gradient, in `unit` pixels of the input
    points: Tensor  # (P, 2)
    unit: Tensor  # (2, P) or broadcastable
    moved: bool  # whether the model itself had offsets there


def sampling_locations(
    model: nn.Module,
    respond: Callable[[Tensor], Tensor],
    image: Tensor,
    layers: Sequence[str] = ("res5",),
) -> list[Locations]:
    """Effective sampling locations of a node, and its RoI's bins if it has one.

    Args:
        model: a detectron2 model.
        respond: the node, on images (1, 3, H, W).
        image: (3, H, W), normalised.
        layers: parts of the names of the modules whose convolutions count, offset layers apart.
    """
    recorder = _Recorder(image.shape[-2:])
    pooler = getattr(getattr(model, "roi_heads", None), "box_pooler", None)
    chosen = [(n, m) for n, m in model.named_modules() if _samples(n, m, layers)]
    if pooler is not None:
        chosen.append((ROI_BINS, pooler))
    with _naming(recorder, chosen), recorder:
        node = strength(respond(image[None]))
    shifts = recorder.shifts
    if any(s.moved for s in shifts if s.layer == ROI_BINS):
        # Bins at regular places only served to predict those of the others.
        shifts = [s for s in shifts if s.layer != ROI_BINS or s.moved]
    if not shifts:
        return []
    gradients = torch.autograd.grad(node, [s.leaf for s in shifts], allow_unused=True)
    return [
        Locations(s.layer, s.points, torch.linalg.vector_norm(g / s.unit, dim=0))
        for s, g in zip(shifts, gradients, strict=True)
        if g is not None  # not a layer of this node
    ]


def _samples(name: str, module: nn.Module, layers: Sequence[str]) -> bool:
    weight = getattr(module, "weight", None)
    return (
        any(part in name for part in layers)
        and "offset" not in name
        and isinstance(weight, Tensor)
        and weight.ndim == 4
        and max(weight.shape[2:]) > 1
    )


@contextmanager
def _naming(recorder: _Recorder, modules: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Tell the recorder in which of the modules a call happens."""
    handles = []
    for name, module in modules:

        def enter(*_: Any, name: str = name) -> None:
            recorder.layer = name

        def leave(*_: Any) -> None:
            recorder.layer = ""

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    """Adds shifts to the sampling operators that are called inside named modules."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.layer = ""
        self.shifts: list[_Shift] = []
        self._size = size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.layer == ROI_BINS:
            if func is torch.ops.d2det.deform_roi_pool and args[1].shape[0]:
                return self._roi_pool(*args)
            if func is torch.ops.torchvision.roi_align and args[1].shape[0]:
                return self._roi_align(*args)
        elif self.layer:
            if func is torch.ops.d2det.modulated_deform_conv2d:
                return self._deform_conv(*args[:8])
            if func is torch.conv2d and not isinstance(kwargs.get("padding", args[-1]), str):
                return self._conv(*args, **kwargs)
        return func(*args, **kwargs)

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        del groups  # the deformable operator reads it off the shapes
        taps = weight.shape[2] * weight.shape[3]
        sides = [
            (x.shape[2 + i] + 2 * p - d * (weight.shape[2 + i] - 1) - 1) // s + 1
            for i, (s, p, d) in enumerate(
                zip(*map(_pair, (stride, padding, dilation)), strict=True)
            )
        ]
        offset = x.new_zeros((x.shape[0], 2 * taps, *sides))
        return self._deform_conv(x, offset, None, weight, bias, stride, padding, dilation, False)

    def _deform_conv(
        self,
        x: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        moved: bool = True,
    ) -> Tensor:
        stride, padding, dilation = map(_pair, (stride, padding, dilation))
        kernel, out = weight.shape[2:], offset.shape[2:]
        taps = kernel[0] * kernel[1]
        # (groups, taps, 2, Ho, Wo), y before x
        moves = offset.detach()[0].unflatten(0, (-1, taps, 2))
        grid = [torch.arange(out[i], device=x.device) * stride[i] - padding[i] for i in range(2)]
        tap = [torch.arange(kernel[i], device=x.device) * dilation[i] for i in range(2)]
        ys = tap[0].repeat_interleave(kernel[1])[:, None, None] + grid[0][:, None]
        xs = tap[1].repeat(kernel[0])[:, None, None] + grid[1]
        step = [2 ** round(math.log2(self._size[i] / x.shape[2 + i])) for i in range(2)]
        points = torch.stack(
            (
                (moves[:, :, 1] + xs + 0.5) * step[1] - 0.5,
                (moves[:, :, 0] + ys + 0.5) * step[0] - 0.5,
            ),
            dim=-1,
        ).reshape(-1, 2)
        leaf = self._leaf(points, x)
        shift = leaf.view(2, *moves[:, :, 0].shape).movedim(0, 2).reshape(offset[0].shape)
        unit = leaf.new_tensor(step)[:, None]
        self.shifts.append(_Shift(self.layer, leaf, points, unit, moved))
        return modulated_deform_conv2d(
            x, offset + shift, mask, weight, bias, tuple(stride), tuple(padding), tuple(dilation)
        )

    def _roi_align(
        self,
        x: Tensor,
        rois: Tensor,
        scale: float,
        height: int,
        width: int,
        ratio: int,
        aligned: bool,
    ) -> Tensor:
        if height != width:
            return torch.ops.torchvision.roi_align(x, rois, scale, height, width, ratio, aligned)
        if not aligned:
            rois = torch.cat((rois[:, :1], rois[:, 1:] + 0.5 / scale), dim=1)
        if ratio < 1:  # adaptive: as many points as the largest bin has pixels
            sides = (rois[:, 3:] - rois[:, 1:3]) * scale / height
            ratio = max(1, math.ceil(float(sides.max())))
        levels = rois.new_zeros(len(rois), dtype=torch.int64)
        settings = (None, None, height, [scale], ratio, 0.1, "aligned")
        return self._roi_pool([x], rois, levels, *settings)

    def _roi_pool(
        self,
        features: list[Tensor],
        rois: Tensor,
        levels: Tensor,
        offset: Tensor | None,
        modulation: Tensor | None,
        side: int,
        scales: list[float],
        ratio: int,
        gamma: float,
        convention: str,
    ) -> Tensor:
        moved = offset is not None
        moves = offset if moved else rois.new_zeros((len(rois), 2, side, side))
        size = (rois[:, 3:] - rois[:, 1:3])[:, :, None, None]
        steps = (torch.arange(side, device=rois.device) + 0.5) / side
        regular = torch.stack((steps.expand(side, side), steps[:, None].expand(side, side)))
        places = rois[:, 1:3, None, None] + size * (regular + gamma * moves.detach())
        points = places.movedim(1, -1).reshape(-1, 2) - 0.5
        leaf = self._leaf(points, features[0])
        shift = leaf.view(2, len(rois), side, side).movedim(0, 1)
        unit = (gamma * size).expand(-1, -1, side, side).movedim(1, 0).reshape(2, -1)
        self.shifts.append(_Shift(self.layer, leaf, points, unit, moved))
        return deform_roi_pool(
            features,
            rois,
            levels,
            moves + shift.to(moves.dtype),
            modulation,
            output_size=side,
            spatial_scales=scales,
            sampling_ratio=ratio,
            gamma=gamma,
            convention=convention,
        )

    @staticmethod
    def _leaf(points: Tensor, like: Tensor) -> Tensor:
        return like.new_zeros((2, len(points))).requires_grad_()


def _pair(value: Any) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else tuple(value)
