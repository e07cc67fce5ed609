"""Deformable ResNets as timm's classifiers, and timm's scripts with them."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
import torchvision
from torch import nn

pytest.importorskip("timm")

import timm
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from d2det.classification import MODELS, DeformableConv2d, DeformResNet
from d2det.classification.__main__ import main

TINY = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 5}


def tiny(block=BasicBlock, cls=DeformResNet, **settings):
    torch.manual_seed(0)
    settings = {"zero_init_last": False, **TINY, **settings}
    return cls(block, settings.pop("layers"), **settings).eval()


def randomise_offsets(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.conv_offset.weight, std=0.1)
            nn.init.normal_(module.conv_offset.bias, std=0.5)


def offset_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in model.named_modules() if n.endswith("conv_offset")}


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_starts_as_the_plain_network(block, modulated):
    model = tiny(block, modulated=modulated)
    plain = tiny(block, ResNet)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if modulated:  # undo the modulation of 0.5
        for name in offset_layers(model):
            state[name.replace(".conv_offset", ".weight")] *= 2
    rest = plain.load_state_dict(model.state_dict(), strict=False)
    assert not rest.missing_keys
    assert all(".conv_offset." in name for name in rest.unexpected_keys)
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (BasicBlock, {"offset_groups": 2}),
        (BasicBlock, {"modulated": False, "output_stride": 16}),
        (Bottleneck, {"cardinality": 2, "base_width": 32, "offset_groups": 4}),
    ],
)
def test_computes_what_torchvisions_layer_does(block, settings, monkeypatch):
    model = tiny(block, **settings)
    randomise_offsets(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = model(x)

    def theirs(self: DeformableConv2d, x: torch.Tensor) -> torch.Tensor:
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            first, second, mask = offset.chunk(3, 1)
            offset, mask = torch.cat((first, second), 1), mask.sigmoid()
        return torchvision.ops.deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    monkeypatch.setattr(DeformableConv2d, "forward", theirs)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_registered_models(name):
    assert timm.is_model(name)
    assert timm.list_models(f"{name}*") == [name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
        plain = timm.create_model(name.rpartition("_")[0], num_classes=7)
    layers = offset_layers(model)
    v1 = name.endswith("v1")
    stages = {n.partition(".")[0] for n in layers}
    assert stages == ({"layer4"} if v1 else {"layer2", "layer3", "layer4"})
    assert {m.out_channels for m in layers.values()} == {18 if v1 else 27}
    assert len(layers) == sum(len(getattr(plain, stage)) for stage in stages)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    channels = [plain.get_submodule(n.removesuffix(".conv_offset")).in_channels for n in layers]
    assert added == sum((9 * c + 1) * (18 if v1 else 27) for c in channels)


def test_timms_ways_of_building():
    x = torch.randn(1, 3, 64, 64)
    features = timm.create_model("resnet18_dcnv2", features_only=True, out_indices=(2, 4))
    assert [f.shape[1] for f in features(x)] == [128, 512]
    model = timm.create_model("resnet18_dcnv1", deform_stages=(True,) * 4, in_chans=1)
    assert {n.partition(".")[0] for n in offset_layers(model)} == {f"layer{i}" for i in range(1, 5)}
    assert model(x[:, :1]).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"deform_stages needs one value for each of 4 stages"):
        tiny(deform_stages=(True, True))


def test_offsets_start_at_zero_and_train():
    model = tiny().train()
    model.set_grad_checkpointing()
    assert all(not p.any() for m in offset_layers(model).values() for p in m.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    for name, layer in offset_layers(model).items():
        assert all(part.abs().max() > 0 for part in layer.weight.grad.split(18)), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(m.weight.any() for m in offset_layers(model).values())
    model.init_weights()
    assert all(not p.any() for m in offset_layers(model).values() for p in m.parameters())


RATES = """
import json, sys, timm, torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
model = timm.create_model("resnet18_dcnv2", num_classes=3)
optimizer = create_optimizer_v2(model, "sgd", lr=0.5, weight_decay=0.01, **json.loads(sys.argv[2]))
names = {id(p): n for n, p in model.named_parameters()}
schedule, _ = create_scheduler_v2(
    optimizer, "cosine", num_epochs=6, min_lr=0.01, warmup_epochs=2, warmup_lr=0.001
)
found = []
for epoch in range(7):
    found.append({names[id(p)]: (g["lr"], g["weight_decay"])
                  for g in optimizer.param_groups for p in g["params"]})
    schedule.step(epoch + 1)
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}])
def test_offset_layers_have_a_learning_rate_of_their_own(options, tmp_path, monkeypatch):
    """At every step of a schedule with warm-up, whatever groups timm has made."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(timm.optim, "create_optimizer_v2", timm.optim.create_optimizer_v2)
    script = tmp_path / "train.py"
    script.write_text(RATES)
    rates = {}
    for factor in (1.0, 0.1):
        out = tmp_path / f"{factor}.json"
        with monkeypatch.context() as patch:
            patch.setattr(timm.optim, "create_optimizer_v2", timm.optim.create_optimizer_v2)
            main(["--offset-lr-factor", str(factor), str(script), str(out), json.dumps(options)])
        rates[factor] = json.loads(out.read_text())
    assert len({entry["fc.weight"][0] for entry in rates[1.0]}) > 4
    for plain, scaled in zip(rates[1.0], rates[0.1], strict=True):
        assert plain.keys() == scaled.keys()
        for name, (lr, decay) in plain.items():
            factor = 0.1 if "conv_offset" in name else 1.0
            assert scaled[name] == [pytest.approx(lr * factor), decay], name


def test_a_missing_script_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["nowhere/train.py", "--model", "resnet18_dcnv2"])
    assert f"tag v{timm.__version__}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--offset-lr-factor", "-1", __file__])
    assert "must not be negative" in capsys.readouterr().err


def test_without_timm_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "d2det.classification")
    with pytest.raises(ImportError, match=r"d2det.classification needs timm.*pip install timm"):
        importlib.import_module("d2det.classification")
