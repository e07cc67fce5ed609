"""Parameters and FLOPs of classifiers, beside DCNv2's Table 6."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("timm")

from d2det.tools.count_classifiers import PAPER, count, main, table


def test_what_deformation_adds():
    """ResNet-18 at 64 x 64: sides of 8, 4 and 2 with 128, 256 and 512 channels, two blocks each."""
    plain, v2 = count("resnet18", 64), count("resnet18_dcnv2", 64)
    layers = [(128, 8), (256, 4), (512, 2)] * 2
    assert v2.parameters - plain.parameters == sum(27 * (9 * c + 1) for c, _ in layers)
    assert v2.products - plain.products == sum(27 * 9 * c * side**2 for c, side in layers)
    assert v2.sampling == sum(4 * 9 * c * side**2 for c, side in layers)
    assert plain.sampling == 0


def test_table_6(capsys):
    """FLOPs as published to their last digit; added parameters to rounding (docs/dcnv2.md)."""
    main(["resnet50_dcnv2"])
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert cells[:9] == [
        "resnet50_dcnv2", "26.43", "27.4", "+0.87", "+0.8", "4.28", "4.3", "+0.19", "+0.2"
    ]  # fmt: skip
    assert {name.partition("_dcnv2")[0] for name in PAPER} < set(PAPER)


def test_names(capsys):
    rows = table(["resnet18", "resnet18_dcnv1"], 64).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["resnet18", "resnet18_dcnv1"]
    assert [row.split("|")[3].strip() for row in rows] == ["", ""]  # not in the paper
    with pytest.raises(SystemExit):
        main(["resnet18_dcnv3"])
    assert "timm has no model resnet18_dcnv3" in capsys.readouterr().err
