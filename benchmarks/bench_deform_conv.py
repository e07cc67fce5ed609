#!/usr/bin/env python3
"""What does a modulated deformable convolution (DCNv2) cost, beside its peers and a plain one?

The 3x3 convolutions of ResNet-101's last three stages on an 800x1333 image. "of im2col": peak
temporary memory as a share of the im2col buffer in the input's dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Case, Contestant, missing
from torch import Tensor
from torchvision.ops import deform_conv2d

from d2det import ops

STAGES = {128: (100, 167), 256: (50, 84), 512: (25, 42)}
PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Operator = Callable[..., Tensor]  # (x, offset, mask, weight)


@contextmanager
def float32_precision(value: str) -> Iterator[None]:
    """ "ieee" or "tf32" for all float32 products on a GPU, those of the peers' GEMMs too."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [b.fp32_precision for b in backends]
    try:
        for backend in backends:
            backend.fp32_precision = value
        yield
    finally:
        for backend, old in zip(backends, before, strict=True):
            backend.fp32_precision = old


def d2det(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return ops.modulated_deform_conv2d(x, offset, mask, weight, padding=1)


def torchvision(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, padding=1, mask=mask)


def detectron2(*tensors: Tensor) -> Tensor:
    from detectron2.layers.deform_conv import modulated_deform_conv

    # NCHW only, and not all of it checked. (torchvision makes the same copies itself.)
    return modulated_deform_conv(*(t.contiguous() for t in tensors), None, 1, 1)


def mmcv(*tensors: Tensor) -> Tensor:
    from mmcv.ops import modulated_deform_conv2d

    return modulated_deform_conv2d(*(t.contiguous() for t in tensors), None, 1, 1)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def peer_dtype(operator: Operator, dtype: torch.dtype, device: str) -> torch.dtype:
    """What a peer without bfloat16 runs in: float16, or float32 on CPU, which emulates float16."""
    shapes = ((1, 8, 4, 4), (1, 18, 4, 4), (1, 9, 4, 4), (8, 8, 3, 3))
    if dtype == torch.bfloat16:
        try:
            operator(*(torch.zeros(s, dtype=dtype, device=device) for s in shapes))
        except (RuntimeError, NotImplementedError):
            return torch.float32 if device == "cpu" else torch.float16
    return dtype


def peer(name: str, operator: Operator, module: str, values: list[Tensor]) -> Contestant:
    """A peer's operator; it wants all tensors in one dtype."""
    device, dtype = values[0].device.type, values[0].dtype
    gap = missing(module)
    if module == "detectron2" and not gap:
        gap = missing("detectron2._C")
        if device == "cpu":
            gap = "not measured: it has no CPU kernel"
    if gap:
        return Contestant(name, missing=gap)
    usable = peer_dtype(operator, dtype, device)
    name = name if usable == dtype else f"{name} ({str(usable).removeprefix('torch.')})"
    leaves = [v.detach().to(usable).requires_grad_() for v in values]
    return Contestant(name, lambda: operator(*leaves), leaves)


def contestants(
    batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype, layout: str, device: str
) -> list[Contestant]:
    shapes = [(batch, c, *size) for c in (channels, 18, 9)] + [(channels, channels, 3, 3)]
    x, offset, mask, weight = (
        torch.randn(s, device=device).to(memory_format=LAYOUTS[layout]) for s in shapes
    )
    # Pixels. Ours keeps float32 offsets and masks beside a half-precision input.
    values = [x.to(dtype), offset * 2, mask.sigmoid(), (weight / (3 * channels**0.5)).to(dtype)]
    leaves = [v.requires_grad_() for v in values]
    result = [
        Contestant(harness.ours("modulated_deform_conv2d", device), lambda: d2det(*leaves), leaves),
        peer("torchvision deform_conv2d", torchvision, "torchvision", values),
        peer("detectron2 modulated_deform_conv", detectron2, "detectron2", values),
        peer("mmcv modulated_deform_conv2d", mmcv, "mmcv.ops", values),
    ]
    for name, memory_format in LAYOUTS.items():
        # torch.channels_last needs a copy that detach() alone would not make.
        pair = [
            v.detach().clone(memory_format=memory_format).requires_grad_()
            for v in (values[0], values[3])
        ]
        call = partial(plain, *pair)
        result.append(Contestant(f"F.conv2d ({name})", call, pair, family="F.conv2d"))
    return result


def cases(args: argparse.Namespace) -> Iterator[Case]:
    stages = {16: (5, 7)} if args.quick else {c: STAGES[c] for c in args.channels}
    for precision in args.precision:
        dtype, products = PRECISIONS[precision]
        for channels, size in stages.items():
            for batch in [2] if args.quick else args.batch:
                for layout in args.layout:
                    yield Case(
                        (precision, f"{batch} x {channels} x {size[0]} x {size[1]}", layout),
                        partial(contestants, batch, channels, size, dtype, layout, args.device),
                        buffer=batch * channels * 9 * size[0] * size[1] * dtype.itemsize,
                        setting=partial(float32_precision, products),
                    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 16])
    parser.add_argument("--channels", nargs="+", type=int, choices=STAGES, default=[*STAGES])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="on CPU not tf32")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    args = parser.parse_args()
    if args.precision is None:
        args.precision = [p for p in PRECISIONS if p != "tf32" or args.device != "cpu"]
    elif args.device == "cpu" and "tf32" in args.precision:
        parser.error("a CPU has no tf32")
    harness.run(
        "Modulated deformable convolution (DCNv2)",
        ["precision", "input", "layout"],
        list(cases(args)),
        args,
    )


if __name__ == "__main__":
    main()
