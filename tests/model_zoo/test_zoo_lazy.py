"""LazyConfigs of the yaml configs: the same model, optimizer, schedule and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier
from omegaconf import OmegaConf
from torch import nn

from d2det import model_zoo
from d2det.data.coco import register_coco
from d2det.data.generated import write_dataset
from d2det.engine.trainer import Trainer
from d2det.evaluation import CocoEvaluator
from d2det.model_zoo import calls

ZOO = Path(__file__).parents[2] / "configs" / "lazy" / "zoo.py"

# Of each folder, of each architecture and of each kind of backbone, pooler and head.
FAMILIES = (
    "COCO-Detection/d2det_R_50_FPN_2x",
    "COCO-Detection/d2det_R_101_DCNv2_FPN_official",
    "COCO-InstanceSegmentation/d2det_R_50_FPN_2x",
    "DCNv2/faster_rcnn_R_50_C5_mdconv_c3-c5_mdpool_mimic",
    "DCNv2/mask_rcnn_R_50_C5_dconv_c3-c5_dpool",
    "LVIS/d2det_R_50_FPN",
    "Objects365/d2det_R_50_FPN_2x",
    "PascalVOC-Detection/faster_rcnn_R_101_C5",
    "Segmentation/deeplab_v3_R_101_DCNv2_VOC",
    "Segmentation/semantic_fpn_R_50_DCNv2_VOC",
    "UAVDT/faster_rcnn_R_101_FPN",
    "ablations/drp_R_50_FPN_2x",
    "iSAID/d2det_R_101_FPN",
    "quickstart_masks",
    "shapes/deformable/dcnv2_mdpool_mimic",
)
SMALL: dict[str, Any] = {
    "MODEL.RESNETS.DEPTH": 50,  # 101 untrained layers with frozen norms overflow
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.DRP.OFFSET_FC_DIM": 16,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV": 2,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.CONV_DIM": 12,
    "MODEL.ROI_DENSE_REGRESSION_HEAD.NORM_GROUPS": 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.DENSE.NORM_GROUPS": 4,
    "MODEL.ROI_MASK_HEAD.SCORING.FC_DIM": 16,
}
FEW = {
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    # Below what an untrained model gives, so that there are detections to compare.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}


def both(name: str, changes: Mapping[str, Any]) -> tuple[CfgNode, Any]:
    """The yaml config and its LazyConfig with the same keys changed, each in its own way."""
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    cfg.MODEL.DEVICE = "cpu"
    lazy = model_zoo.get_lazy_config(name)
    for key, value in changes.items():
        OmegaConf.update(lazy.model.cfg, key, value)
    return cfg, lazy


def flat(output: dict[str, Any]) -> list[torch.Tensor]:
    if "instances" not in output:
        return [output["sem_seg"]]
    fields = output["instances"].get_fields()
    assert len(output["instances"]) > 0
    return [getattr(value, "tensor", value) for _, value in sorted(fields.items())]


def no_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: no_tuples(item) for key, item in value.items()}
    return [no_tuples(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_that_of_the_yaml(name):
    small = SMALL if not name.startswith(("quickstart", "shapes")) else {}
    cfg, lazy = both(name, {**small, **FEW})
    torch.manual_seed(0)
    expected = build_model(cfg)
    model = instantiate(lazy.model)
    assert type(model) is type(expected)
    assert str(model) == str(expected)
    assert model.training
    model.load_state_dict(expected.state_dict())
    expected.eval()
    model.eval()
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    inputs = [{"image": image, "height": 64, "width": 96}]
    with torch.no_grad():
        a, b = (flat(m([dict(inputs[0])])[0]) for m in (expected, model))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def check_keys(name: str) -> None:
    cfg, lazy = both(name, {})
    read = calls.read_cfg(lazy.model.cfg)
    for node in (cfg, read):
        for key in calls.ELSEWHERE:
            section, _, last = key.rpartition(".")
            del (node[section] if section else node)[last]
    assert no_tuples(read) == no_tuples(cfg)


def test_keys_come_through():
    check_keys("quickstart")


@pytest.mark.slow
@pytest.mark.parametrize("name", model_zoo.names())
def test_keys_of_all_come_through(name):
    check_keys(name)


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",  # clipped by the full model
        "DCNv2/faster_rcnn_R_50_C5_mdconv_c3-c5_mdpool",  # offsets with a rate of their own
        "Segmentation/deeplab_v3_R_101_DCNv2_VOC",  # polynomial schedule
    ],
)
def test_optimizer_and_schedule_are_those_of_the_yaml(name):
    small = SMALL if name != "quickstart" else {}
    cfg, lazy = both(name, small)
    model = build_model(cfg)
    expected = Trainer.build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)

    def rates(optimizer):
        return {
            id(p): (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert rates(optimizer) == rates(expected)
    assert isinstance(optimizer, calls.ClippedSGD) == cfg.SOLVER.CLIP_GRADIENTS.ENABLED

    a = Trainer.build_lr_scheduler(cfg, expected)
    b = LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), max_iter=lazy.train.max_iter)
    middle = (cfg.SOLVER.MAX_ITER + 1) // 2
    for step in (0, 1, cfg.SOLVER.WARMUP_ITERS - 1, cfg.SOLVER.WARMUP_ITERS, middle):
        a.last_epoch = b.last_epoch = step
        first = max(a.get_lr())
        assert first == pytest.approx(max(b.get_lr()), rel=1e-6), step


def test_full_model_clipping():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = calls.ClippedSGD([weight], lr=1.0, max_norm=1.0)
    weight.grad = torch.tensor([3.0, 4.0])  # norm 5
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]), rtol=1e-5, atol=0)


def test_overrides_and_parts():
    lazy = model_zoo.get_lazy_config("quickstart")
    lazy = LazyConfig.apply_overrides(
        lazy, ["model.cfg.MODEL.ROI_HEADS.NUM_CLASSES=3", "optimizer.lr=0.5"]
    )
    lazy.model.pixel_mean = [1.0, 2.0, 3.0]
    lazy.model.roi_heads = LazyCall(nn.Identity)()
    model = instantiate(lazy.model)
    assert model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert isinstance(model.roi_heads, nn.Identity)
    del lazy.model.roi_heads
    model = instantiate(lazy.model)
    assert model.roi_heads.num_classes == 3
    lazy.optimizer.params.model = model
    assert {group["lr"] for group in instantiate(lazy.optimizer).param_groups} == {0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.cfg.MODEL.ROI_HEADS.NUM_CLASES=3", "did you mean MODEL.ROI_HEADS.NUM_CLASSES"),
        ("model.cfg.SOLVER.BASE_LR=1.0", "set optimizer"),
        ("model.cfg.MODEL.WEIGHTS=x.pth", "set train.init_checkpoint"),
        ("model.cfg.MODEL.ROI_HEADS.NUM_CLASSES=many", "NUM_CLASSES"),
    ],
)
def test_wrong_keys_are_named(override, message):
    lazy = LazyConfig.apply_overrides(model_zoo.get_lazy_config("quickstart"), [override])
    with pytest.raises(ValueError, match=message):
        instantiate(lazy.model)


def test_what_only_our_trainer_does_is_refused(tmp_path):
    file = tmp_path / "accumulate.yaml"
    file.write_text("SOLVER: {ACCUMULATE: 4}\n")
    with pytest.raises(ValueError, match="ACCUMULATE 4"):
        model_zoo.get_lazy_config(file)


def test_a_step_and_an_evaluation(tmp_path):
    """What detectron2's lazyconfig_train_net.py does with the parts, on two images."""
    json_file = write_dataset(tmp_path / "data", "val", num_images=2, size=96)
    images = str(json_file.parent / "images")
    register_coco("zoo_lazy", str(json_file), images, purpose="train")
    try:
        lazy = model_zoo.get_lazy_config("quickstart")
        lazy.model.cfg.DATASETS.TRAIN = lazy.model.cfg.DATASETS.TEST = ["zoo_lazy"]
        lazy.model.cfg.DATALOADER.NUM_WORKERS = 0
        lazy.dataloader.train.total_batch_size = 2
        lazy.train.output_dir = str(tmp_path / "out")
        model = instantiate(lazy.model)
        lazy.optimizer.params.model = model
        optimizer = instantiate(lazy.optimizer)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        trainer = SimpleTrainer(model, instantiate(lazy.dataloader.train), optimizer)
        scheduler = instantiate(lazy.lr_multiplier)
        trainer.register_hooks([hooks.LRScheduler(scheduler=scheduler)])
        trainer.train(0, 1)
        after = [p for p in model.parameters() if p.requires_grad]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        loader = instantiate(lazy.dataloader.test)
        mapper = DatasetMapper(model_zoo.get_config("quickstart"), is_train=False)
        assert str(loader.dataset._map_func._obj.augmentations) == str(mapper.augmentations)
        assert loader.dataset._map_func._obj.image_format == mapper.image_format
        evaluator = instantiate(lazy.dataloader.evaluator)
        assert isinstance(evaluator, CocoEvaluator)
        results = inference_on_dataset(model, loader, evaluator)
        assert "AP" in results["bbox"]
        assert (tmp_path / "out" / "inference" / "zoo_lazy").is_dir()
    finally:
        DatasetCatalog.remove("zoo_lazy")
        MetadataCatalog.remove("zoo_lazy")


def test_generic_file(monkeypatch, tmp_path):
    monkeypatch.setenv("D2DET_CONFIG", "COCO-Detection/d2det_R_50_FPN_2x")
    lazy = LazyConfig.load(str(ZOO))
    assert set(lazy) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert lazy.train.init_checkpoint == "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert lazy.dataloader.evaluator.dataset_name == "coco_2017_val"
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))  # as detectron2's set-up does
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert again.model.cfg == lazy.model.cfg
    assert again.model._target_ == "d2det.model_zoo.calls.build_model"
    monkeypatch.delenv("D2DET_CONFIG")
    with pytest.raises(ValueError, match="D2DET_CONFIG"):
        LazyConfig.load(str(ZOO))
