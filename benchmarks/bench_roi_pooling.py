#!/usr/bin/env python3
"""How long does pooling the RoIs of D2Det take, with offsets and without?

14x14x256 bins over four pyramid levels of an 800x1344 image. The RoIs' sizes run from 16 to 512
pixels, evenly in their logarithm. roi_align has no offsets: where the others have them, it still
stands for the same number of samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import harness
import torch
from harness import Case, Contestant, missing
from torch import Tensor
from torchvision.ops import roi_align

from d2det import ops
from d2det.core import assign_levels
from d2det.ops._library import references

STRIDES, HEIGHT, WIDTH = (4, 8, 16, 32), 800, 1344
SCALES = [1 / s for s in STRIDES]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GAMMA = 0.1
# (features of one level, its RoIs, its offsets, spatial scale) -> pooled
PoolLevel = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


class Reference(torch.autograd.Function):
    """deform_roi_pool's PyTorch reference with its derivative, compiled kernels or not."""

    @staticmethod
    def forward(ctx: Any, rois: Tensor, levels: Tensor, offset: Tensor, *rest: Any) -> Tensor:
        *features, settings = rest
        ctx.save_for_backward(rois, levels, offset, *features)
        ctx.settings = settings
        return references["deform_roi_pool"](features, rois, levels, offset, None, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rois, levels, offset, *features = ctx.saved_tensors
        grads, shift, _ = references["deform_roi_pool_backward"](
            grad, features, rois, levels, offset, None, *ctx.settings,
            [True, offset is not None, False], False,
        )  # fmt: skip
        return (None, None, shift if offset is not None else None, *grads, None)


def reference(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    size: int,
    scales: list[float],
    samples: int,
) -> Tensor:
    settings = (size, scales, samples, GAMMA, "aligned")
    return Reference.apply(rois, levels, offset, *features, settings)


def by_level(
    pool: PoolLevel,
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    size: int,
) -> Tensor:
    """A loop over the levels with boolean indexing, as in detectron2's ROIPooler."""
    shape = (rois.shape[0], features[0].shape[1], size, size)
    output = features[0].new_zeros(shape)
    for level, f in enumerate(features):
        chosen = (levels == level).nonzero()[:, 0]
        moved = None if offset is None else offset[chosen]
        output.index_put_((chosen,), pool(f, rois[chosen], moved, SCALES[level]))
    return output


def make_rois(count: int, batch: int, device: str) -> Tensor:
    """(R, 5), sorted by image."""
    size = 2 ** (4 + 5 * torch.rand(count, 2, device=device))
    corner = torch.rand(count, 2, device=device) * (size.new_tensor([WIDTH, HEIGHT]) - size)
    image = torch.arange(count, device=device) * batch // count
    return torch.cat((image[:, None].to(size), corner, corner + size), dim=1)


def roi_pooler(
    features: list[Tensor], rois: Tensor, batch: int, size: int, samples: int
) -> Callable[[], Tensor]:
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    pooler = ROIPooler(size, SCALES, samples, "ROIAlignV2")
    boxes = [Boxes(rois[rois[:, 0] == image, 1:]) for image in range(batch)]
    return lambda: pooler(features, boxes)


def mmcv_level(
    f: Tensor, rois: Tensor, offset: Tensor | None, scale: float, size: int, samples: int
) -> Tensor:
    from mmcv.ops import deform_roi_pool

    # NCHW, all in one dtype; its offsets are fractions of the RoI's size too.
    return deform_roi_pool(
        f.contiguous(), rois.to(f.dtype), offset, (size, size), scale, samples, GAMMA
    )


def contestants(
    count: int, batch: int, samples: int, moved: bool, dtype: torch.dtype, layout: str,
    channels: int, size: int, device: str,
) -> list[Contestant]:  # fmt: skip
    features = [
        torch.randn(batch, channels, HEIGHT // s, WIDTH // s, device=device)
        .to(dtype, memory_format=LAYOUTS[layout])
        .requires_grad_()
        for s in STRIDES
    ]
    rois = make_rois(count, batch, device)
    levels = assign_levels(rois[:, 1:], STRIDES)
    offset = torch.randn(count, 2, size, size, device=device).requires_grad_() if moved else None
    leaves = features if offset is None else [*features, offset]

    def d2det() -> Tensor:
        return ops.deform_roi_pool(
            features, rois, levels, offset,
            output_size=size, spatial_scales=SCALES, sampling_ratio=samples, gamma=GAMMA,
        )  # fmt: skip

    def level_reference(f: Tensor, boxes: Tensor, shift: Tensor | None, scale: float) -> Tensor:
        zeros = torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
        return reference([f], boxes, zeros, shift, size, [scale], samples)

    def level_align(f: Tensor, boxes: Tensor, _: Tensor | None, scale: float) -> Tensor:
        return roi_align(f, boxes.to(f.dtype), size, scale, samples, aligned=True)

    def level_mmcv(f: Tensor, boxes: Tensor, shift: Tensor | None, scale: float) -> Tensor:
        shift = None if shift is None else shift.to(f.dtype)
        return mmcv_level(f, boxes, shift, scale, size, samples)

    less = " (no offsets)" if moved else ""
    loop = partial(by_level, features=features, rois=rois, levels=levels, size=size)
    result = [
        Contestant(harness.ours("deform_roi_pool", device), d2det, leaves),
        Contestant(
            "reference, level by level", partial(loop, level_reference, offset=offset), leaves
        ),
        Contestant(
            "reference, one pass",
            partial(reference, features, rois, levels, offset, size, SCALES, samples),
            leaves,
        ),
        Contestant(
            f"torchvision roi_align, level by level{less}",
            partial(loop, level_align, offset=None),
            features,
        ),
    ]
    name, gap = f"detectron2 ROIPooler{less}", missing("detectron2.modeling.poolers")
    call = None if gap else roi_pooler(features, rois, batch, size, samples)
    result.append(Contestant(name, call, features, missing=gap))
    result.append(
        Contestant(
            "mmcv deform_roi_pool, level by level",
            partial(loop, level_mmcv, offset=offset),
            leaves,
            missing=missing("mmcv.ops"),
        )
    )
    return result


def cases(args: argparse.Namespace) -> Iterator[Case]:
    channels, size = (8, 4) if args.quick else (256, 14)
    for count in [16] if args.quick else args.rois:
        for batch in [2] if args.quick else args.batch:
            for samples in [2] if args.quick else args.samples:
                for moved in (False, True):
                    for dtype in args.dtype:
                        for layout in args.layout:
                            offsets = "offsets" if moved else "no offsets"
                            yield Case(
                                (dtype, str(count), str(batch), str(samples), offsets, layout),
                                partial(
                                    contestants, count, batch, samples, moved, DTYPES[dtype],
                                    layout, channels, size, args.device,
                                ),
                            )  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rois", nargs="+", type=int, default=[512, 1024], help="of all images")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 2], help="a side in each bin")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["NCHW"])
    args = parser.parse_args()
    harness.run(
        "Deformable RoI pooling, 14x14x256, four levels of an 800x1344 image",
        ["dtype", "RoIs", "batch", "sampling", "", "layout"],
        list(cases(args)),
        args,
    )


if __name__ == "__main__":
    main()
