"""train_net.py on PASCAL VOC's layout: detection, and segmentation on deformable backbones."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from PIL import Image

from d2det.data.voc_segmentation import register_voc_segmentation
from d2det.engine.launch import InputError
from d2det.engine.trainer import Trainer
from d2det.modeling.deform_conv import DeformConv2d

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = ("red", "green", "blue")
OBJECTS = {
    f"{number:06d}": [
        ("red", (3 + number, 4, 24 + number, 40), False),
        ("green", (40, 20 + number, 60, 50), number == 2),
    ]
    for number in range(4)
}

SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32, "INPUT.CROP.SIZE", [64, 96],
    "INPUT.MIN_SIZE_TRAIN", (48, 96), "INPUT.MIN_SIZE_TEST", 50, "DATALOADER.NUM_WORKERS", 0,
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2,
    "SOLVER.WARMUP_ITERS", 1, "SEED", 1, "TEST.NUM_PICTURES", 2,
    "DATASETS.TRAIN", ("voc_train_net",), "DATASETS.TEST", ("voc_train_net",),
]  # fmt: skip


@pytest.fixture
def train_net(program, tmp_path):
    """A function that runs train_net's main in this process; returns its results."""
    module = program("train_net")

    def run(config, *opts, flags=()):
        line = ["--config-file", str(config), *flags, "OUTPUT_DIR", str(tmp_path / "run"), *opts]
        return module.main(module.argument_parser().parse_args([str(item) for item in line]))

    return run


@pytest.fixture
def registered():
    """Forgets the data set of one test."""
    yield
    DatasetCatalog.remove("voc_train_net")
    MetadataCatalog.remove("voc_train_net")


@pytest.fixture
def detection(write_voc, registered):
    folder = write_voc(OBJECTS, "test")
    register_pascal_voc("voc_train_net", str(folder), "test", 2007, CLASSES)
    MetadataCatalog.get("voc_train_net").evaluator_type = "pascal_voc"


@pytest.fixture
def segmentation(write_voc, registered):
    folder = write_voc(OBJECTS, "val")
    names = ("background", *CLASSES)
    register_voc_segmentation("voc_train_net", folder, "val", classes=names)
    return folder


def test_detection_on_voc(detection, train_net, tiny_yaml, tmp_path):
    data = ["DATASETS.TRAIN", ("voc_train_net",), "DATASETS.TEST", ("voc_train_net",)]
    results = train_net(tiny_yaml, *data, "TEST.VOC_METRIC", "area")
    metrics = ["AP", "AP50", "AP70", "AP75", "AP-red", "AP-green", "AP-blue"]
    assert list(results["bbox"]) == metrics
    table = (tmp_path / "run/results.md").read_text()
    assert [c.strip() for c in table.splitlines()[4].split("|")[1:-1]] == [
        "data set", "task", "AP", "AP50", "AP70", "AP75"
    ]  # fmt: skip
    assert "| blue" in table
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert written["voc_train_net"]["bbox"]["AP-blue"] is None  # no such object
    sheet = cv2.imread(str(tmp_path / "run/pictures/voc_train_net/index.jpg"))
    assert sheet is not None
    assert (tmp_path / "run/curves.png").is_file()


LEAVES = sorted(
    str(p.relative_to(CONFIGS))
    for p in (CONFIGS / "Segmentation").glob("*.yaml")
    if not p.name.startswith("Base-")
)


@pytest.mark.parametrize("name", LEAVES)
def test_every_segmentation_config(name, train_net, segmentation, tmp_path):
    """Two iterations, an evaluation at the pictures' own size, results in the tables."""
    results = train_net(CONFIGS / name, *SMALL)
    metrics = results["sem_seg"]
    assert 0 <= metrics["mIoU"] <= 100
    assert metrics["pACC"] > 0
    assert {f"IoU-{c}" for c in ("background", *CLASSES)} <= set(metrics)
    table = (tmp_path / "run/results.md").read_text()
    header = [c.strip() for c in table.splitlines()[4].split("|")[1:-1]]
    assert header == ["data set", "task", "mIoU", "fwIoU", "mACC", "pACC"]
    assert "IoU (sem_seg)" in table and "ACC (sem_seg)" not in table
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert "BoundaryIoU-red" in written["voc_train_net"]["sem_seg"]
    state = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    offsets = [n for n in state["model"] if ".conv2_offset." in n]
    assert bool(offsets) == ("DCNv2" in name)
    if offsets:  # and they have trained
        assert all(state["model"][n].any() for n in offsets if n.endswith("weight"))


def test_training_learns_the_pictures(train_net, segmentation, tmp_path):
    """The labels reach the model as classes, in their places, from a palette's indices."""
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.BASE_LR", 0.05, "MODEL.RESNETS.DEPTH", 18]
    opts += ["MODEL.RESNETS.NORM", "BN", "SOLVER.AMP.ENABLED", True, "TEST.EVAL_PERIOD", 0]
    opts += [
        "INPUT.MIN_SIZE_TRAIN",
        (64, 64),
        "INPUT.MIN_SIZE_TEST",
        64,
        "INPUT.CROP.SIZE",
        [64, 96],
    ]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32]
    results = train_net(CONFIGS / "Segmentation/semantic_fpn_R_50_DCNv2_VOC.yaml", *SMALL, *opts)
    sheet = cv2.imread(str(tmp_path / "run/pictures/voc_train_net/index.jpg"))
    assert sheet.shape[1] > 2 * 960
    assert results["sem_seg"]["IoU-red"] > 50
    assert results["sem_seg"]["IoU-background"] > 80


def test_resumed_with_the_polynomial_schedule(train_net, segmentation, tmp_path):
    config = CONFIGS / "Segmentation/semantic_fpn_R_50_DCNv2_VOC.yaml"
    opts = [*SMALL, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", ()]
    train_net(config, *opts)
    whole = torch.load(tmp_path / "run/model_final.pth", weights_only=False)["model"]
    (tmp_path / "run/last_checkpoint").write_text("model_0000001.pth")
    train_net(config, *opts, flags=["--resume"])
    resumed = torch.load(tmp_path / "run/model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_polynomial_schedule(train_net):
    from d2det.engine.setup import get_cfg

    cfg = get_cfg(CONFIGS / "Segmentation/deeplab_v3_R_101_DCNv2_VOC.yaml")
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER = 0, 10
    layer = torch.nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups)
    schedule = Trainer.build_lr_scheduler(cfg, optimizer)
    for done in range(10):
        expected = (1 - done / 10) ** 0.9
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.5 * expected, 0.05 * expected])
        optimizer.step()
        schedule.step()
    with pytest.raises(ValueError, match="WarmupPolyLR"):
        build_lr_scheduler(cfg, optimizer)  # detectron2's alone
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS = "WarmupMultiStepLR", (5,)
    assert Trainer.build_lr_scheduler(cfg, optimizer) is not None


def test_bad_input_is_explained_before_training(train_net, segmentation):
    config = CONFIGS / "Segmentation/deeplab_v3_R_101_VOC.yaml"
    with pytest.raises(InputError, match="SEM_SEG_HEAD.NUM_CLASSES is 21, but data set 'voc_train"):
        train_net(config, *SMALL, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 21)
    with pytest.raises(InputError, match="TEST.AUG.ENABLED"):
        train_net(config, *SMALL, "TEST.AUG.ENABLED", True)
    with pytest.raises(InputError, match=r"'shapes_train' has no classes of pixels"):
        train_net(config, *SMALL, "DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ())
    with pytest.raises(InputError, match=r'TYPE is .relative.; semantic segmentation needs "abs'):
        train_net(config, *SMALL, "INPUT.CROP.TYPE", "relative")
    pretrained = CONFIGS / "Segmentation/deeplab_v3_R_101_DCNv2_pretrained_VOC.yaml"
    with pytest.raises(InputError, match=r"weights/resnet101_dcnv2.pth do not exist"):
        train_net(pretrained, *SMALL[:2], *SMALL[4:])
    first = next((segmentation / "SegmentationClass").iterdir())
    Image.open(first).convert("RGB").save(first)
    with pytest.raises(RuntimeError, match=r"is a picture of kind RGB: labels are one channel"):
        train_net(config, *SMALL, "SOLVER.MAX_ITER", 8)


def test_demo_and_predictor(program, tmp_path, segmentation):
    from d2det import Predictor
    from d2det.engine.setup import get_cfg

    cfg = get_cfg(CONFIGS / "Segmentation/deeplab_v3_R_101_DCNv2_VOC.yaml")
    cfg.merge_from_list(SMALL)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    image = next((segmentation / "JPEGImages").iterdir())
    found = Predictor(cfg, tmp_path / "model.pth")(image)
    assert found["sem_seg"].shape == (4, 64, 80)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    line = ["--weights", tmp_path / "model.pth", "--input", image, "--output", tmp_path / "drawn"]
    with pytest.raises(SystemExit, match="error: this program draws detections"):
        program("demo").main([str(item) for item in line])


@pytest.mark.parametrize("dilation", [1, 2])
def test_any_size_head_equals_detectron2s(dilation):
    """On an image as large as the crop, with the same weights."""
    from d2det.engine.setup import get_cfg

    cfg = get_cfg(CONFIGS / "Segmentation/deeplab_v3_R_101_DCNv2_VOC.yaml")
    cfg.merge_from_list(SMALL)
    cfg.MODEL.RESNETS.RES5_DILATION = dilation
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 32 // dilation
    ours = build_model(cfg).eval()
    assert sum(isinstance(m, DeformConv2d) for m in ours.modules()) == 13
    assert ours.backbone.res5[0].conv2.dilation == (dilation, dilation)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3Head"
    theirs = build_model(cfg).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 96)))
    with torch.no_grad():
        found, expected = (m([{"image": image}])[0]["sem_seg"] for m in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert ours([{"image": image[:, :50, :40]}])[0]["sem_seg"].shape == (4, 50, 40)
        with pytest.raises(ValueError, match="pool_kernel_size"):
            theirs([{"image": image[:, :50, :40]}])
