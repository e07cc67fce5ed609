"""A tiny detector, data set and evaluator; also a program, for tests that need processes.

`python tiny_training.py FOLDER OPTION=VALUE...` trains in FOLDER and saves what it ended with.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks, launch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image

from d2det.config import add_d2det_config
from d2det.engine.step import StepTrainer, distribute
from d2det.engine.trainer import Trainer

SIZE = 64


def register_dataset(folder: Path, name: str = "tiny", *, empty_every: int = 0) -> str:
    """Twelve images, half of them portraits, each with two bright rectangles of two classes.

    With `empty_every` n, the images n-1, 2n-1, ... have no annotations.
    """
    rng = np.random.default_rng(5)
    records = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        width, height = (SIZE, SIZE - 16) if number % 2 else (SIZE - 16, SIZE)
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        annotations = []
        for category in range(2):
            x, y = (int(v) for v in rng.integers(0, 20, 2))
            w, h = (int(v) for v in rng.integers(16, 26, 2))
            pixels[y : y + h, x : x + w, category] = 230
            annotations.append(
                {
                    "bbox": [x, y, w, h],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": category,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        if empty_every and number % empty_every == empty_every - 1:
            annotations = []
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "width": width,
                "height": height,
                "annotations": annotations,
            }
        )
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["red", "green"])
    return name


D2DET = {
    "MODEL.ROI_HEADS.NAME": "D2DetROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "DiscriminativeRoIPooler",
    "MODEL.ROI_BOX_HEAD.DRP.OFFSET_FC_DIM": 16,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV": 2,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM": 32,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NORM_GROUPS": 4,
}


def tiny_cfg(
    output: Path, name: str = "tiny", *, detector: str = "faster_rcnn", **keys: Any
) -> Any:
    """A detector of some ten thousand weights, six iterations; `keys` with "__" for the dots."""
    cfg = add_d2det_config(get_cfg())
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "INPUT.MAX_SIZE_TRAIN": 96,
        "INPUT.MIN_SIZE_TEST": 48,
        "DATALOADER.NUM_WORKERS": 0,
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SEED": 3,
        "OUTPUT_DIR": str(output),
    }
    values |= D2DET if detector == "d2det" else {}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    return cfg


class MeanScore(DatasetEvaluator):
    """Mean score of all detections, and how many images the processes saw together."""

    def reset(self) -> None:
        self.scores: list[float] = []
        self.images: list[int] = []

    def process(self, inputs: list, outputs: list) -> None:
        self.images += [x["image_id"] for x in inputs]
        for output in outputs:
            self.scores += output["instances"].scores.tolist()
        torch.rand(7), np.random.rand(3)  # an evaluator may draw what it likes

    def evaluate(self) -> dict:
        parts = comm.gather((self.scores, self.images))
        scores = [s for part, _ in parts for s in part]
        images = {i for _, part in parts for i in part}
        return {"bbox": {"AP": sum(scores) / max(len(scores), 1), "images": len(images)}}


class TinyTrainer(Trainer):
    """The trainer under test, with an evaluator that needs no annotation file."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        return MeanScore()


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    module = getattr(model, "module", model)
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def seed_model(seed: int) -> None:
    """What detectron2's default_setup does before a trainer is built."""
    torch.manual_seed(seed)
    np.random.seed(seed)


class Branches(torch.nn.Module):
    """Two weights; the first process never uses the second one, and sometimes none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(1.0))
        self.b = torch.nn.Parameter(torch.tensor(1.0 + comm.get_rank()))  # the first one's counts

    def forward(self, batch: list[float]) -> dict[str, torch.Tensor]:
        (x,) = batch
        if comm.get_rank() > 0:
            return {"loss_a": self.a * x, "loss_b": self.b * x}
        return {"loss_a": self.a * x if x else torch.zeros(())}


def train_branches() -> list[float]:
    """One iteration of two passes, and one in which the first process has no gradient at all."""
    model = distribute(Branches())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = [[1.0], [3.0], [0.0], [0.0]] if comm.get_rank() == 0 else [[2.0], [4.0], [8.0], [0.0]]
    trainer = StepTrainer(model, data, optimizer, accumulate=2)
    with EventStorage() as trainer.storage:
        for trainer.iter in range(2):
            trainer.run_step()
    return [model.module.a.item(), model.module.b.item()]


def main(folder: str, options: dict[str, str]) -> None:
    torch.set_num_threads(1)
    output, rank = Path(folder), comm.get_rank()
    data = output.parent / f"data{rank}"
    register_dataset(data, empty_every=int(options.pop("empty_every", 0)))
    kill_at = int(options.pop("kill_at", -1))
    resume = options.pop("resume", "no")
    branches = train_branches() if int(options.pop("processes", 1)) > 1 else []
    cfg = tiny_cfg(output, **options)
    seed_model(cfg.SEED + rank)
    trainer = TinyTrainer(cfg)
    trainer.resume_or_load(resume)

    def kill(trainer: Trainer) -> None:
        if trainer.iter == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.register_hooks([hooks.CallbackHook(after_step=kill)])
    results = trainer.train()
    state = {
        "model": parameters(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "results": results,
        "start": trainer.start_iter,
        "branches": branches,
    }
    torch.save(state, output / f"end{rank}.pth")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    launch(main, int(given.get("processes", 1)), dist_url="auto", args=(sys.argv[1], given))
