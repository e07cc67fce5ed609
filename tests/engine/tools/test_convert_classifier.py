"""Classifiers' checkpoints as detectors' backbones: same features, every tensor accounted for."""

from __future__ import annotations

import argparse
import pickle

import numpy as np
import pytest
import torch
import torchvision
import yaml
from torch import nn

pytest.importorskip("detectron2")
pytest.importorskip("timm")

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from d2det.classification import DeformResNet
from d2det.engine.checkpoint import Checkpointer
from d2det.engine.setup import get_cfg
from d2det.tools._conversion import ConversionError, read_checkpoint
from d2det.tools.convert_classifier import backbone_cfg, convert, main, settings


def shake(model: nn.Module) -> nn.Module:
    """Norms and offset layers as after a training."""
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and (value.ndim == 1 or "conv_offset" in name):
            value.normal_(std=0.1)
    return model.eval()


def narrow(block, layers, cls=DeformResNet, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return shake(cls(block, layers, channels=(16, 32, 64, 128), num_classes=3, **kwargs))


CLASSIFIERS = {
    "R18": lambda: shake(torchvision.models.resnet18()),
    "R18-v2": lambda: narrow(BasicBlock, (2, 2, 2, 2)),
    "R34-v1": lambda: narrow(BasicBlock, (3, 4, 6, 3), modulated=False),
    "R50": lambda: narrow(Bottleneck, (3, 4, 6, 3), ResNet),
    "R50-v2": lambda: narrow(Bottleneck, (3, 4, 6, 3)),
    "R50-v2-groups": lambda: narrow(Bottleneck, (3, 4, 6, 3), offset_groups=2),
    "R50-GN": lambda: narrow(Bottleneck, (3, 4, 6, 3), norm_layer="groupnorm", base_width=128),
    "X101-v1": lambda: narrow(
        Bottleneck, (3, 4, 23, 3), cardinality=4, base_width=16, modulated=False,
        deform_stages=(False, False, False, True),
    ),
}  # fmt: skip


def stages(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
    found = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        found.append(x)
    return found


def detector_cfg(lines: str, name: str = "build_d2det_resnet_backbone") -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(lines)))
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


@pytest.mark.parametrize(
    ("name", "suffix"), [*((n, ".pth") for n in CLASSIFIERS), ("R18", ".pkl"), ("R50-v2", ".pkl")]
)
def test_backbone_computes_the_classifiers_features(name, suffix, tmp_path, capsys, caplog):
    """The backbone is built from the lines that the command prints."""
    model = CLASSIFIERS[name]()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    main([str(tmp_path / "in.pth"), str(tmp_path / f"out{suffix}")])
    text = capsys.readouterr().out
    assert "missing: none" in text
    for tensor in model.state_dict():  # every single one is spoken of
        assert tensor in text
    cfg = detector_cfg(text[text.index("MODEL:") :])
    backbone = build_backbone(cfg).eval()
    with caplog.at_level("INFO"):
        Checkpointer(backbone).load(cfg.MODEL.WEIGHTS)
    total = len(backbone.state_dict())
    assert f"{total} of {total} tensors loaded" in caplog.text
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "checkpoint" in r.name]
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = list(backbone(x).values())
        expected = stages(model, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_below_a_pyramid_in_a_training_checkpoint_of_timm(tmp_path, capsys, caplog):
    """Moving average first; other objects beside the weights; a prefix; half precision."""
    average, plain = narrow(BasicBlock, (2, 2, 2, 2)), narrow(BasicBlock, (2, 2, 2, 2)).half()
    nn.init.constant_(plain.bn1.bias, 0.25)
    content = {
        "epoch": 3, "arch": "resnet18_dcnv2", "args": argparse.Namespace(lr=0.1), "version": 2,
        "optimizer": {"state": {}, "param_groups": []},
        "state_dict": {f"module.{n}": v for n, v in plain.state_dict().items()},
        "state_dict_ema": average.state_dict(),
    }  # fmt: skip
    source, target = tmp_path / "last.pth.tar", tmp_path / "sub" / "out.pth"
    torch.save(content, source)
    main([str(source), str(target), "--quiet"])
    text = capsys.readouterr().out
    assert "state_dict_ema, saved as resnet18_dcnv2" in text
    cfg = detector_cfg(text[text.index("MODEL:") :], "build_d2det_resnet_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    backbone = build_backbone(cfg)
    Checkpointer(backbone).load(str(target))
    found = backbone.bottom_up.res4[1].conv2_offset.weight
    torch.testing.assert_close(found, average.layer3[1].conv2.conv_offset.weight)
    assert "fpn_lateral4" in caplog.text  # missing there, as it should be
    assert "res4" not in caplog.text

    main([str(source), str(target), "--weights", "plain"])
    assert ", state_dict, saved as" in capsys.readouterr().out
    state = torch.load(target, weights_only=True)["model"]
    assert state["stem.conv1.norm.bias"].eq(0.25).all()
    assert {v.dtype for v in state.values()} == {torch.float32}

    torch.save({"model": plain.state_dict()}, source)
    with pytest.raises(SystemExit, match="holds no moving average of weights"):
        main([str(source), str(target), "--weights", "ema"])


def test_a_deformable_classifier_as_model_weights(tmp_path):
    """Without conversion: the engine knows the same names."""
    model = CLASSIFIERS["R50-v2"]()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    backbone = build_backbone(detector_cfg(settings(backbone_cfg(model.state_dict()), "")))
    Checkpointer(backbone).load(str(tmp_path / "in.pth"))
    offset = backbone.res5[2].conv2_offset.bias
    torch.testing.assert_close(offset, model.layer4[2].conv2.conv_offset.bias)


def test_offset_order_is_kept():
    """y before x, then modulation: a shift down by one row is one down in both."""
    model = narrow(BasicBlock, (2, 2, 2, 2))
    for module in model.modules():
        if hasattr(module, "conv_offset"):
            nn.init.zeros_(module.conv_offset.weight)
            nn.init.zeros_(module.conv_offset.bias)
    nn.init.ones_(model.layer4[1].conv2.conv_offset.bias[0:18:2])
    done = convert(model.state_dict())
    backbone = build_backbone(backbone_cfg(model.state_dict())).eval()
    backbone.load_state_dict(done.state, strict=False)
    block, x = backbone.res5[1], torch.randn(1, 128, 6, 7)
    with torch.no_grad():
        inner = torch.relu(block.conv1(x))
        down = torch.cat((inner[:, :, 1:], torch.zeros(1, 128, 1, 7)), 2)  # what lies one row below
        padded = nn.functional.pad(down, (1, 1, 1, 1))
        padded[:, :, 0, 1:-1] = inner[:, :, 0]
        expected = nn.functional.conv2d(padded, block.conv2.weight) / 2
        expected = torch.relu(block.conv2.norm(expected) + x)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


FIT = "DCNv2/faster_rcnn_R_50_C5_dconv_c3-c5"


def test_fit_to_a_detector():
    def cfg(name: str) -> CfgNode:
        found = get_cfg(name)
        found.MODEL.RESNETS.RES2_OUT_CHANNELS, found.MODEL.RESNETS.WIDTH_PER_GROUP = 64, 16
        return found

    plain, v2 = CLASSIFIERS["R50"]().state_dict(), CLASSIFIERS["R50-v2"]().state_dict()
    done = convert(plain, cfg(FIT))
    assert set(done.missing.values()) == {"starts at zero"}
    assert len(done.missing) == 2 * 13
    assert f"missing: 26 tensors\n  starts at zero: {next(iter(done.missing))}" in done.report()
    assert not convert(v2, cfg(FIT.replace("dconv_c3-c5", "mdconv_c3-c5_mdpool"))).missing
    with pytest.raises(ConversionError, match=r"conv_offset.weight is \(27, 32, 3, 3\), the back"):
        convert(v2, cfg(FIT))
    with pytest.raises(ConversionError, match="the config's backbone has no res3.0.conv2_offset"):
        convert(v2, cfg("DCNv2/faster_rcnn_R_50_C5"))
    with pytest.raises(ConversionError, match="the config's backbone has res4.6.conv1.weight"):
        convert(plain, cfg("COCO-Detection/d2det_R_101_FPN_2x"))
    c4 = cfg("DCNv2/faster_rcnn_R_50_C5")  # conv5 in the RoI heads
    c4.MODEL.BACKBONE.NAME, c4.MODEL.RESNETS.OUT_FEATURES = "build_resnet_backbone", ["res4"]
    c4.MODEL.RESNETS.RES5_DILATION = 1
    assert not convert(plain, c4).missing


def refused() -> dict[str, tuple[dict, str]]:
    r18 = narrow(BasicBlock, (2, 2, 2, 2), ResNet).state_dict()
    nan = {**r18, "bn1.bias": torch.full((64,), torch.nan)}
    offset = {f"layer2.{i}.conv2.conv_offset.{leaf}": torch.zeros(shape) for i in range(2)
              for leaf, shape in (("weight", (20, 32, 3, 3)), ("bias", (20,)))}  # fmt: skip
    deep = narrow(BasicBlock, (2, 2, 2, 2), ResNet, stem_type="deep", stem_width=32, avg_down=True)
    se = narrow(BasicBlock, (2, 2, 2, 2), ResNet, block_args={"attn_layer": "se"})
    pooled = narrow(Bottleneck, (3, 4, 6, 3), ResNet, avg_down=True)
    twice = {f"{who}.{n}": v for who in ("student", "teacher") for n, v in r18.items()}
    return {
        "depth": (narrow(BasicBlock, (1, 1, 1, 1), ResNet).state_dict(),
                  r"\(1, 1, 1, 1\) blocks without a bottleneck: no ResNet of depth 18, 34"),
        "deep stem": (deep.state_dict(), "holds no ResNets"),
        "attention": (se.state_dict(), "se.fc1.weight: the backbone has nothing of that kind"),
        "pooled shortcut": (pooled.state_dict(), r"downsample\.1\.weight is \(\d+, \d+, 1, 1\)"),
        "two": (twice, "holds 2 ResNets"),
        "lacking": ({n: v for n, v in r18.items() if n != "layer3.1.bn2.bias"},
                    "not whole: nothing for res4.1.conv2.norm.bias"),
        "no weight": ({n: v for n, v in r18.items() if n != "layer1.0.conv2.weight"},
                      "not whole: it has no layer1.0.conv2.weight"),
        "not finite": (nan, "bn1.bias holds values that are not finite"),
        "offsets": ({**r18, **offset}, "has 20 channels: no multiple of 18 or 27"),
        "some offsets": ({**r18, **{n: v.repeat_interleave(9, 0)[:27] for n, v in offset.items()
                                    if ".1." in n}}, "nothing for res3.0.conv2_offset"),
        "no ResNet": (torchvision.models.squeezenet1_0().state_dict(), "holds no ResNets"),
    }  # fmt: skip


def test_what_does_not_fit_is_refused():
    for name, (state, message) in refused().items():
        with pytest.raises(ConversionError, match=message):
            pytest.fail(f"{name}: {convert(state).report()}")


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_files(tmp_path, capsys):
    def fails(content, message, name="x.pth", out="out.pth"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(SystemExit, match=message):
            main([str(path), str(tmp_path / out)])

    fails(None, "is not there", "nowhere.pth")
    fails(b"nothing of the kind", "cannot be read")
    fails(b"nothing of the kind", "cannot be read", "x.pkl")
    fails([torch.zeros(2)], "holds a list, not a dictionary")
    fails({"epoch": 3}, "holds no weights")
    fails({"model": Evil()}, "cannot be read")
    fails(pickle.dumps({"model": Evil()}), "cannot be read: it holds a builtins.print", "x.pkl")
    fails({}, "must end in .pth or .pkl", out="out.bin")
    assert "code was run" not in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))
    arrays = {"model": {"a": np.arange(3.0), "b": np.float32(2)}, "__author__": "me"}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays))
    assert read_checkpoint(tmp_path / "arrays.pkl")["model"]["a"].tolist() == [0, 1, 2]


def test_safetensors(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(CLASSIFIERS["R18-v2"]().state_dict(), tmp_path / "in.safetensors")
    main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.pkl"), "--quiet"])
    assert "missing: none" in capsys.readouterr().out
