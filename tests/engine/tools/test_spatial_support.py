"""The spatial-support tool: sampling locations against known gradients, and the whole command."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.layers import Conv2d
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from d2det.core import DiscriminativePooling
from d2det.modeling.deform_conv import DeformConv2d
from d2det.tools import spatial_support
from d2det.tools._nodes import FeatureNode, RoINode
from d2det.tools._sampling import ROI_BINS, sampling_locations


class Backbone(nn.Module):
    """Stride 2, then a 3 x 3 convolution, plain or with offsets that a test sets."""

    size_divisibility = 0

    def __init__(self, offset=None):
        super().__init__()
        self.stem = nn.AvgPool2d(2)
        self.offset = offset
        self.conv = Conv2d(3, 2, 3, padding=1, bias=False)
        if offset is not None:
            self.conv = DeformConv2d(self.conv.weight, None, 1, 1, 1)

    def forward(self, images):
        x = self.stem(images)
        if self.offset is None:
            return {"c1": self.conv(x)}
        offset = self.offset.view(1, 18, 1, 1).expand(len(x), -1, *x.shape[2:])
        return {"c1": self.conv(x, offset)}


class Model(nn.Module):
    def __init__(self, backbone, pooler=None):
        super().__init__()
        self.backbone = backbone
        self.roi_heads = nn.Module()
        self.roi_heads.box_in_features = ["c1"]
        self.roi_heads.box_pooler = pooler
        self.roi_heads.box_head = nn.Flatten()


def locations(model, node, image, layers=("conv",)):
    return sampling_locations(model, lambda x: node.respond(model, x), image, layers)


def test_a_regular_convolution_samples_its_3_by_3_neighbours():
    image = torch.rand(3, 16, 24)
    model = Model(Backbone())
    node = FeatureNode("c1", 13.0, 9.0)  # column 6, row 4 of the map
    (found,) = locations(model, node, image)
    used = found.weights > 0
    assert found.layer == "backbone.conv"
    # Cell 6 of stride 2 lies over pixels 12 and 13.
    expected = {(2 * x + 0.5, 2 * y + 0.5) for x in (5, 6, 7) for y in (3, 4, 5)}
    assert {tuple(p) for p in found.points[used].tolist()} == expected
    with torch.no_grad():
        response = node.respond(model, image[None])
    with torch.no_grad():
        plain = model.backbone(image[None])["c1"][:, :, 4, 6]
    assert torch.equal(response, plain)


def test_contributions_are_the_derivative_with_respect_to_the_place():
    # On a ramp of slope (a, b) per map pixel, moving tap k changes f by w_k (a, b).
    ys, xs = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    image = (3 * xs + 4 * ys).expand(3, -1, -1)  # per input pixel; 6 and 8 per map pixel
    model = Model(Backbone(torch.full((18,), 0.25)))
    nn.init.constant_(model.backbone.conv.weight, 0.0)
    with torch.no_grad():
        model.backbone.conv.weight[0, 0] = torch.arange(9.0).view(3, 3)
    (found,) = locations(model, FeatureNode("c1", 13.0, 9.0), image)
    used = found.weights > 0
    # |(3, 4)| = 5 for each input pixel.
    torch.testing.assert_close(found.weights[used], 5 * torch.arange(1.0, 9.0))
    first = found.points[used][0] - torch.tensor([2 * 6 + 0.5, 2 * 3 + 0.5])  # tap (0, 1)
    torch.testing.assert_close(first, torch.full((2,), 2 * 0.25))


def test_roi_bins_of_roi_align_and_of_discriminative_pooling():
    image = torch.rand(3, 32, 32)
    node = RoINode((4.0, 8.0, 20.0, 24.0))
    align = ROIPooler(4, [0.5], 0, "ROIAlignV2")
    model = Model(Backbone(), align)
    with torch.no_grad():
        expected = node.respond(model, image[None])
    seen = []

    def respond(x):
        seen.append(node.respond(model, x))
        return seen[-1]

    found = sampling_locations(model, respond, image, ())
    torch.testing.assert_close(seen[0].detach(), expected)
    assert [f.layer for f in found] == [ROI_BINS]
    grid = {(4 + 16 * (i + 0.5) / 4 - 0.5, 8 + 16 * (j + 0.5) / 4 - 0.5)
            for i in range(4) for j in range(4)}  # fmt: skip
    assert {tuple(p) for p in found[0].points.tolist()} == grid
    assert (found[0].weights > 0).all()

    class Pooler(DiscriminativePooling):
        def forward(self, maps, boxes):
            return super().forward(maps, torch.cat([nn.functional.pad(b.tensor, (1, 0))
                                                    for b in boxes]))  # fmt: skip

    pooler = Pooler(2, [2.0], output_size=4, offset_fc_dim=8)
    nn.init.constant_(pooler.levels[0].offsets[-2].bias, 0.5)  # all to the right and down
    (found,) = sampling_locations(
        Model(Backbone(), pooler), lambda x: node.respond(Model(Backbone(), pooler), x), image, ()
    )
    assert len(found.points) == 64  # the moved 8 x 8, not the 2 x 2 that predicted their offsets
    assert found.points[0].tolist() == pytest.approx([4 + 1 - 0.5 + 0.8, 8 + 1 - 0.5 + 0.8])


def test_nothing_is_left_behind_in_the_model():
    model = Model(Backbone(), ROIPooler(4, [0.5], 2, "ROIAlignV2"))
    locations(model, FeatureNode("c1", 3.0, 3.0), torch.rand(3, 16, 16))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"c9.*c1.*stem"):
        FeatureNode("c9", 1.0, 1.0).respond(Model(Backbone()), torch.rand(1, 3, 8, 8))


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((12, 12, 1)))
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), pixels.astype(np.uint8))
    return path


@pytest.mark.parametrize(
    "node", [("--point", 40, 30), ("--point", 40, 30, "--layer", "p3"), ("--box", 10, 8, 60, 50)]
)
def test_the_command_draws_two_models(node, photo, finished_run, tmp_path, capsys):
    pytest.importorskip("skimage")
    output = tmp_path / "out" / "support.png"
    line = ["--image", photo, "--weights", finished_run, finished_run, "--names", "A", "B",
            "--segments", 6, "--output", output, *node]  # fmt: skip
    spatial_support.main([str(item) for item in line])
    drawn = cv2.imread(str(output))
    assert drawn.shape[0] > 300
    assert drawn.std() > 10
    assert "A: saliency region" in capsys.readouterr().out


def test_svg_without_the_slow_view(photo, finished_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    output = tmp_path / "support.svg"
    line = ["--image", photo, "--weights", finished_run, "--point", "5", "5", "--output", output]
    with pytest.raises(SystemExit, match=r"d2det\[tools\]"):
        spatial_support.main([str(item) for item in line])
    spatial_support.main([*(str(item) for item in line), "--no-saliency"])
    assert output.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--point", "500", "5"], "inside the image of 96 x 72"),
        (["--point", "5", "5", "--layer", "p9"], "p9"),
        (["--box", "5", "5", "5", "9"], "exceed"),
        (["--box", "5", "5", "9", "9", "--names", "A", "B"], "--names"),
    ],
)
def test_mistakes_are_explained(extra, message, photo, finished_run, capsys):
    line = ["--image", str(photo), "--weights", str(finished_run), "--no-saliency", *extra]
    with pytest.raises(SystemExit) as stopped:
        spatial_support.main(line)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
