#!/usr/bin/env python3
"""How far trained deformable layers go: lengths of offsets, and modulation, of each layer.

Averages over all taps, positions and images (RoIs for pooling) of a model's test set. Offsets of a
convolution are in cells of its input map and in pixels of the image, those of RoI pooling in
percent of the RoI's side.

    python benchmarks/deformation.py output/deformable/dcnv2/seed1 --images 100
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from d2det.core import DeformablePooling, split_offsets
from d2det.engine.predictor import Predictor
from d2det.modeling.resnet_blocks import DeformBasicBlock, DeformBottleneckBlock


class Spread:
    """Mean and standard deviation of values that come in parts."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.squares += float(values.double().square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def deviation(self) -> float:
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5


def offset_lengths(offset: Tensor) -> Tensor:
    """(N, 2 G taps, H, W), y and x of each tap in turn, to lengths (N, G taps, H, W)."""
    return offset.unflatten(1, (-1, 2)).norm(dim=2)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, dict[str, Spread]]]:
    """What the model's deformable layers predict in the block: layer -> quantity -> its spread."""
    found: dict[str, dict[str, Spread]] = defaultdict(lambda: defaultdict(Spread))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (DeformBasicBlock, DeformBottleneckBlock)):

            def convolution(
                _: Any, inputs: Any, raw: Tensor, name: str = name, block: Any = module
            ) -> None:
                offset, modulation = split_offsets(raw, block.deform_modulated)
                found[name]["cells"].add(offset_lengths(offset))
                if modulation is not None:
                    found[name]["modulation"].add(modulation)

            handles.append(module.conv2_offset.register_forward_hook(convolution))
        elif isinstance(module, DeformablePooling):

            def pooling(
                _: Any, inputs: Any, raw: Tensor, name: str = name, pooler: Any = module
            ) -> None:
                raw = raw.unflatten(1, (-1, pooler.output_size**2))
                found[name]["percent"].add(100 * pooler.gamma * raw[:, :2].norm(dim=1))
                if pooler.modulated:
                    found[name]["modulation"].add(raw[:, 2].sigmoid())

            handles.append(module.offset_fc.register_forward_hook(pooling))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_net.py")
    parser.add_argument("--images", type=int, default=100, help="first ones of the test set")
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        predictor = Predictor(run)
        strides = predictor.model.backbone.bottom_up._out_feature_strides
        records = DatasetCatalog.get(test_set(run))[: args.images]
        with recorded(predictor.model) as found:
            for record in tqdm(records, desc=str(run), unit="image"):
                predictor(record["file_name"])
        for layer, values in found.items():
            stage = next((s for s in strides if s in layer), None)
            cells, percent = values.get("cells"), values.get("percent")
            modulation = values.get("modulation")
            rows.append([
                run, layer.removeprefix("backbone.bottom_up."),
                f"{cells.mean:.2f}" if cells else "",
                f"{cells.mean * strides[stage]:.1f}" if cells and stage else "",
                f"{percent.mean:.1f}" if percent else "",
                f"{modulation.mean:.2f} ± {modulation.deviation:.2f}" if modulation else "",
            ])  # fmt: skip
    headers = ["run", "layer", "offset, cells", "pixels", "% of the RoI", "modulation"]
    print(tabulate(rows, headers, tablefmt="github"))


def test_set(run: Path) -> str:
    """The first test set of a run's config."""
    with (run / "config.yaml").open() as stream:
        return CfgNode.load_cfg(stream).DATASETS.TEST[0]


if __name__ == "__main__":
    main()
