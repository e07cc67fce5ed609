"""Deformable ResNets: every depth and stage, others' weights, what they equal at the start."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

pytest.importorskip("detectron2")

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone
from detectron2.modeling.backbone import resnet as detectron2_resnet

from d2det.core import split_offsets
from d2det.engine.optimizer import scale_offset_lr
from d2det.engine.weights import to_detectron2_names
from d2det.modeling.backbone import replace_deform_convs
from d2det.modeling.deform_conv import DeformConv2d
from d2det.modeling.resnet_blocks import DeformBasicBlock, DeformBottleneckBlock

RGB = ShapeSpec(channels=3)
C3_TO_C5 = [False, True, True, True]


@pytest.fixture
def resnet(small_cfg):
    """A function from a depth and `MODEL.RESNETS` overrides to a narrow ResNet without pyramid."""

    def build(depth: int = 18, *, base="build_d2det_resnet_backbone", **overrides):
        settings = {
            "DEPTH": depth, "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8 if depth < 50 else 16,
            "WIDTH_PER_GROUP": 4, "NORM": "BN", **overrides,
        }  # fmt: skip
        flat = [v for key, value in settings.items() for v in (f"MODEL.RESNETS.{key}", value)]
        cfg = small_cfg("quickstart.yaml", "MODEL.BACKBONE.NAME", base, *flat)
        return build_backbone(cfg)

    return build


def randomise_norms(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith((".norm.weight", ".norm.running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith((".norm.bias", ".norm.running_mean")):
            value.normal_(std=0.1)


def randomise_offsets(model: nn.Module, std: float = 0.2) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "conv2_offset" in name:
            nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)),
     (152, (3, 8, 36, 3))],
)  # fmt: skip
def test_any_stage_of_any_depth(depth, blocks, modulated, resnet):
    for stage in range(4):
        stages = [i == stage for i in range(4)]
        with torch.device("meta"):
            model = resnet(depth, DEFORM_ON_PER_STAGE=stages, DEFORM_MODULATED=modulated)
        deformed = {n for n, m in model.named_modules() if isinstance(m, DeformConv2d)}
        assert deformed == {f"res{stage + 2}.{i}.conv2" for i in range(blocks[stage])}
        for name in deformed:
            assert model.get_submodule(f"{name}_offset").out_channels == (27 if modulated else 18)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_offsets_start_at_zero_and_train(depth, modulated, resnet):
    model = resnet(depth, DEFORM_ON_PER_STAGE=[True] * 4, DEFORM_MODULATED=modulated)
    offsets = [p for n, p in model.named_parameters() if "conv2_offset" in n]
    assert all(not p.any() for p in offsets)
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    sum(v.square().sum() for v in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for parameter in offsets:  # first those of offsets, then those of modulation
        parts = parameter.grad.split(18)
        assert len(parts) == (2 if modulated else 1)
        assert all(part.abs().max() > 0 for part in parts)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("depth", [18, 50])
def test_strides(depth, dilation, resnet):
    model = resnet(depth, DEFORM_ON_PER_STAGE=C3_TO_C5, RES5_DILATION=dilation)
    side = {name: spec.stride for name, spec in model.output_shape().items()}
    assert side == {"res2": 4, "res3": 8, "res4": 16, "res5": 32 // dilation}
    outputs = model.eval()(torch.zeros(1, 3, 64, 64))
    assert {k: 64 // v.shape[2] for k, v in outputs.items()} == side
    block = model.res5[1]
    assert block.conv2.dilation == block.conv2_offset.dilation == (dilation, dilation)


def test_c5_is_reduced(small_cfg):
    cfg = small_cfg("DCNv2/faster_rcnn_R_50_C5.yaml", "MODEL.RESNETS.C5_CHANNELS", 24)
    backbone = build_backbone(cfg)
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert {k: tuple(v.shape[1:]) for k, v in outputs.items()} == {
        "res4": (64, 4, 6), "c5": (24, 4, 6)
    }  # fmt: skip
    shapes = {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()}
    assert shapes == {"res4": (64, 16), "c5": (24, 16)}
    assert outputs["c5"].min() >= 0


# Whose weights load

SHARED = {"DEFORM_ON_PER_STAGE": C3_TO_C5, "OUT_FEATURES": ["res5"], "NORM": "FrozenBN"}


@pytest.mark.parametrize(
    "settings",
    [
        {"DEPTH": 50},
        {"DEPTH": 101, "DEFORM_MODULATED": True},
        {"DEPTH": 50, "DEFORM_MODULATED": True, "DEFORM_NUM_GROUPS": 2, "RES5_DILATION": 2},
        {"DEPTH": 152, "DEFORM_MODULATED": True, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4},
    ],
)
def test_detectron2s_deformable_checkpoints_load(settings, small_cfg):
    flat = [v for k, x in {**SHARED, **settings}.items() for v in (f"MODEL.RESNETS.{k}", x)]
    cfg = small_cfg("quickstart.yaml", "MODEL.BACKBONE.NAME", "build_d2det_resnet_backbone", *flat)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64, 256
    with torch.device("meta"):
        theirs, ours = build_resnet_backbone(cfg, RGB), build_backbone(cfg)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("resnet18", {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        ("resnet34", {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
        ("resnet50", {"DEPTH": 50}),
        ("resnet101", {"DEPTH": 101}),
        ("resnet152", {"DEPTH": 152}),
        ("resnext50_32x4d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        ("resnext101_32x8d", {"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8}),
    ],
)
@pytest.mark.parametrize("name", ["build_d2det_resnet_backbone", "build_d2det_resnet_c5_backbone"])
def test_plain_imagenet_weights_load(name, architecture, settings, small_cfg):
    wide = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 64}
    settings = {**SHARED, **wide, "STRIDE_IN_1X1": False, "DEFORM_MODULATED": True, **settings}
    flat = [v for k, x in settings.items() for v in (f"MODEL.RESNETS.{k}", x)]
    with torch.device("meta"):
        model = build_backbone(small_cfg("quickstart.yaml", "MODEL.BACKBONE.NAME", name, *flat))
        state = torchvision.models.get_model(architecture, weights=None).state_dict()
    result = model.load_state_dict(to_detectron2_names(state, model), strict=False)
    assert set(result.unexpected_keys) == {"fc.weight", "fc.bias"}
    new = {n for n in result.missing_keys if "conv2_offset" not in n}
    assert new == ({"reduction.weight", "reduction.bias"} if "c5" in name else set())


# What they compute

VARIANTS = [
    (18, {}),
    (18, {"RES5_DILATION": 2, "NORM": "FrozenBN"}),
    (50, {"NORM": "FrozenBN"}),
    (50, {"RES5_DILATION": 2}),
    (50, {"NUM_GROUPS": 4, "DEFORM_NUM_GROUPS": 2}),
    (50, {"NORM": "GN", "RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 8, "STEM_OUT_CHANNELS": 32}),
]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("depth", "settings"), VARIANTS)
def test_at_the_start_a_deformable_network_equals_the_plain_one(depth, settings, modulated, resnet):
    """A modulation of 0.5 halves a convolution's output: its weights are doubled to make up."""
    if settings.get("NORM") == "GN":
        settings = {**settings, "WIDTH_PER_GROUP": 8 * 4 // settings["NUM_GROUPS"]}
    plain = resnet(depth, **settings).eval()
    randomise_norms(plain)
    model = resnet(
        depth, **settings, DEFORM_ON_PER_STAGE=[True] * 4, DEFORM_MODULATED=modulated
    ).eval()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".conv2_offset." in n for n in result.missing_keys)
    if modulated:
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, DeformConv2d):
                    layer.weight.mul_(2)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = plain(x), model(x)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kind", [DeformBasicBlock, DeformBottleneckBlock])
def test_blocks_compute_what_torchvisions_layer_does(kind, dilation, groups, modulated):
    arguments = {"stride": 2, "dilation": dilation, "norm": "BN", "deform_modulated": modulated}
    arguments["deform_num_groups"] = groups[1]
    if kind is DeformBottleneckBlock:
        arguments |= {"bottleneck_channels": 8, "num_groups": groups[0]}
    block = kind(12, 16, **arguments).eval()
    randomise_norms(block)
    randomise_offsets(block)
    x = torch.randn(2, 12, 18, 14)
    with torch.no_grad():
        found = block(x)
        inner = block.conv1(x).relu()
        offset, mask = split_offsets(block.conv2_offset(inner), modulated)
        layer = block.conv2
        out = torchvision.ops.deform_conv2d(
            inner, offset, layer.weight, None, layer.stride, layer.padding, layer.dilation, mask
        )
        out = layer.norm(out)
        if kind is DeformBottleneckBlock:
            out = block.conv3(out.relu())
        expected = (out + block.shortcut(x)).relu()
    assert offset.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [DeformBasicBlock, DeformBottleneckBlock])
def test_blocks_compile_into_one_graph(kind):
    extra = {"bottleneck_channels": 4} if kind is DeformBottleneckBlock else {}
    block = kind(8, 12, stride=2, deform_modulated=True, norm="BN", **extra).eval()
    randomise_offsets(block)
    x = torch.randn(1, 8, 12, 10)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.gpu
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_blocks_compute_what_detectron2s_do(groups, modulated):
    """detectron2's kernels run on a GPU only."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = {"bottleneck_channels": 8, "stride": 2, "norm": "BN", "num_groups": groups[0],
                 "deform_modulated": modulated, "deform_num_groups": groups[1]}  # fmt: skip
    theirs = detectron2_resnet.DeformBottleneckBlock(12, 16, **arguments).cuda().eval()
    randomise_norms(theirs)
    randomise_offsets(theirs)
    ours = DeformBottleneckBlock(12, 16, **arguments).cuda().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 18, 14, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_detectron2s_models_get_the_operator(small_cfg):
    cfg = small_cfg("COCO-Detection/d2det_R_101_DCNv2_FPN_2x.yaml", "MODEL.RESNETS.DEPTH", 50)
    ours = build_backbone(cfg).eval()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    theirs = build_backbone(cfg).eval()
    replace_deform_convs(theirs)
    randomise_offsets(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-6)


# How they train


@pytest.mark.parametrize("norm", ["BN", "GN", "SyncBN", "FrozenBN"])
def test_norms(norm, resnet):
    """Outside of several processes SyncBN is BN."""
    settings = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 32}  # GN has 32 groups
    settings |= {"DEFORM_ON_PER_STAGE": C3_TO_C5, "DEFORM_MODULATED": True}
    model = resnet(18, NORM=norm, **settings).train()
    x = torch.randn(2, 3, 64, 64)
    outputs = model(x)
    outputs["res5"].square().sum().backward()
    assert model.res3[0].conv2_offset.weight.grad.abs().max() > 0
    assert model.res5[0].conv2.weight.grad.abs().max() > 0
    if norm == "SyncBN":
        assert isinstance(model.res5[0].conv2.norm, nn.SyncBatchNorm)
        plain = resnet(18, NORM="BN", **settings).train()
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(plain(x)["res5"], outputs["res5"])


@pytest.mark.parametrize("depth", [18, 50])
def test_bf16_autocast(depth, resnet):
    model = resnet(depth, DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True, NORM="FrozenBN")
    randomise_offsets(model, 0.05)  # large ones turn rounding of the features into other pixels
    x = torch.randn(2, 3, 64, 64)
    exact = model(x)["res5"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)["res5"]
    assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    rounded.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for n, p in model.named_parameters() if "conv2_offset" in n)


@pytest.mark.parametrize("depth", [18, 50])
def test_channels_last(depth, resnet):
    model = resnet(depth, DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True).eval()
    randomise_offsets(model)
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)["res5"]
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    found = model(x.to(memory_format=torch.channels_last))["res5"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert error < 1e-3, name


@pytest.mark.parametrize("bias_factor", [1.0, 2.0])
def test_offset_layers_have_a_learning_rate_of_their_own(bias_factor, resnet):
    from detectron2.solver import get_default_optimizer_params

    model = resnet(18, DEFORM_ON_PER_STAGE=C3_TO_C5)

    def optimizer(factor: float) -> torch.optim.Optimizer:
        groups = get_default_optimizer_params(
            model, base_lr=0.02, weight_decay_norm=0.0, bias_lr_factor=bias_factor
        )
        made = torch.optim.SGD(groups, lr=0.02, weight_decay=1e-4)
        scale_offset_lr(made, model, factor)
        return made

    def rates(made: torch.optim.Optimizer) -> dict[str, float]:
        by_id = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
        return {n: by_id[id(p)] for n, p in model.named_parameters()}

    plain, scaled = optimizer(1.0), optimizer(0.1)
    before, after = rates(plain), rates(scaled)
    assert before.keys() == after.keys()
    for name in before:
        factor = 0.1 if "conv2_offset" in name else 1.0
        assert after[name] == pytest.approx(before[name] * factor), name
    decay = {g["weight_decay"] for g in scaled.param_groups}
    assert decay == {0.0, 1e-4}
    assert sum(len(g["params"]) for g in scaled.param_groups) == len(before)
    with pytest.raises(ValueError, match="OFFSET_LR_FACTOR"):
        optimizer(-1.0)


def test_the_key_reaches_the_optimizer(small_cfg):
    from detectron2.modeling import build_model

    from d2det.engine.trainer import Trainer

    cfg = small_cfg(
        "shapes/faster_rcnn.yaml",
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE", C3_TO_C5, "SOLVER.OFFSET_LR_FACTOR", 0.25,
    )  # fmt: skip
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    offset = model.backbone.bottom_up.res5[0].conv2_offset.weight
    rates = {g["lr"] for g in optimizer.param_groups if any(p is offset for p in g["params"])}
    assert rates == {cfg.SOLVER.BASE_LR * 0.25}
    assert {g["lr"] for g in optimizer.param_groups} == {0.02, 0.005}
