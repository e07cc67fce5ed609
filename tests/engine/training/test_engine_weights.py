from __future__ import annotations

import pytest
import torch
import torchvision

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from d2det.engine import weights
from d2det.engine.checkpoint import Checkpointer


def backbone(depth: int, *, stride_in_1x1: bool = False, norm: str = "FrozenBN"):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    return build_backbone(cfg).eval()


def random_resnet(name: str) -> torch.nn.Module:
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.4, 0.8)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def stages(model: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    features = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        features.append(x)
    return features


@pytest.mark.parametrize(("name", "depth"), [("resnet50", 50), ("resnet18", 18)])
def test_features_equal_torchvisions(tmp_path, name, depth, engine_log):
    theirs, ours = random_resnet(name), backbone(depth)
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    Checkpointer(ours).load(str(tmp_path / "plain.pth"))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = stages(theirs, image), ours.bottom_up(image)
    for stage, reference in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        torch.testing.assert_close(found[stage], reference, rtol=1e-4, atol=1e-4)
    assert "In the file, but not in the model:\n  fc: bias, weight" in engine_log.text
    assert "num_batches_tracked" not in engine_log.text
    assert "Not in the file:\n  fpn_lateral2: bias, weight" in engine_log.text
    assert "bottom_up" not in engine_log.text and "STRIDE_IN_1X1" not in engine_log.text


@pytest.mark.parametrize(
    ("address", "entry"),
    [
        ("torchvision://resnet101", "ResNet101_Weights.IMAGENET1K_V1"),
        ("torchvision://resnet101/IMAGENET1K_V2", "ResNet101_Weights.IMAGENET1K_V2"),
        ("torchvision://ResNet101_Weights.IMAGENET1K_V2", "ResNet101_Weights.IMAGENET1K_V2"),
    ],
)
def test_addresses(monkeypatch, address, entry):
    asked = []

    def get_state_dict(self, *args, **kwargs):
        asked.append(str(self))
        return {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1)}

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    model = backbone(50)
    Checkpointer(model).load(address)
    assert asked == [entry]
    assert bool((model.bottom_up.stem.conv1.weight == 1).all())


@pytest.mark.parametrize("name", ["resnet5", "resnet50/V9", "ResNet50_Weights.V9", ""])
def test_unknown_addresses(name):
    with pytest.raises(ValueError, match="torchvision has no such weights"):
        Checkpointer(backbone(50)).load("torchvision://" + name)


def test_no_network(monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(RuntimeError, match=r"no route.*resnet50.*\.pth elsewhere.*MODEL.WEIGHTS"):
        weights.torchvision_state_dict("torchvision://resnet50")


def test_a_model_that_uses_them_otherwise_is_warned_about(engine_log):
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    weights.to_detectron2_names(state, backbone(50, stride_in_1x1=True))
    assert "STRIDE_IN_1X1 False" in engine_log.text
    with pytest.raises(ValueError, match="0 ResNet backbones"):
        weights.to_detectron2_names(state, torch.nn.Linear(2, 2))


def test_batch_norm_counters_are_kept_where_the_model_has_them():
    theirs, ours = random_resnet("resnet18"), backbone(18, norm="BN")
    theirs.bn1.num_batches_tracked.fill_(9)
    renamed = weights.to_detectron2_names(theirs.state_dict(), ours)
    assert renamed["bottom_up.stem.conv1.norm.num_batches_tracked"] == 9
