"""The command of the error analysis: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2det.tools import error_analysis

SETTINGS = ["C75", "C50", "Loc", "Sim", "Oth", "BG", "FN"]


@pytest.fixture
def files(tmp_path):
    """Ground truth of three classes, of which one is not there, and two result files."""
    square = [10, 10, 40, 40]
    truth = {
        "images": [{"id": 1, "width": 200, "height": 100}],
        "categories": [
            {"id": 3, "name": "a|b", "supercategory": "x"},
            {"id": 5, "name": "big one", "supercategory": "x"},
            {"id": 6, "name": "absent", "supercategory": "y"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": square, "area": 1600},
            {"id": 2, "image_id": 1, "category_id": 5, "bbox": [60, 0, 100, 100]},
        ],
    }
    good = [
        {"image_id": 1, "category_id": 3, "bbox": square, "score": 0.9},
        {"image_id": 1, "category_id": 5, "bbox": [60, 0, 100, 90], "score": 0.8},
    ]
    confused = [good[0], {**good[1], "category_id": 3, "score": 0.95}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for name, content in (("good", good), ("confused", confused)):
        file = tmp_path / name / "inference" / "coco_instances_results.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    return tmp_path


def run(files, *args, names=("good", "confused"), gt="truth.json"):
    results = [str(files / n / "inference/coco_instances_results.json") for n in names]
    line = ["--gt", str(files / gt), "--output", str(files / "out"), "--results", *results]
    error_analysis.main([*line, *map(str, args)])


def test_tables_of_two_files(files, capsys):
    run(files)
    assert sorted(p.name for p in (files / "out").iterdir()) == [
        "errors.json", "errors.md", "mean.png", "mean.svg",
    ]  # fmt: skip
    content = json.loads((files / "out/errors.json").read_text())
    assert list(content) == ["good", "confused"]  # what tells their paths apart
    assert list(content["good"]) == ["all", "large"]
    assert list(content["good"]["all"]) == SETTINGS
    mean = {s: content["confused"]["all"][s]["mean"] for s in SETTINGS}
    # The small object: 1/2 behind the confusion, 1 from Sim on. The big one: never found.
    assert mean == {
        "C75": 0.25,
        "C50": 0.25,
        "Loc": 0.25,
        "Sim": 0.5,
        "Oth": 0.5,
        "BG": 0.5,
        "FN": 1,
    }
    assert content["confused"]["all"]["Sim"]["classes"] == {"a|b": 1, "big one": 0, "absent": None}
    assert content["confused"]["all"]["Sim"]["curve"] == [0.5] * 101
    assert content["good"]["large"]["C75"]["classes"] == {"a|b": None, "big one": 1, "absent": None}
    text = (files / "out/errors.md").read_text()
    rows = [
        [c.strip() for c in line.split("|")] for line in text.splitlines() if "confused" in line
    ]
    assert rows[0][2:9] == ["25.0", "25.0", "25.0", "50.0", "50.0", "50.0", "100.0"]
    assert "a\\|b" in text and "## confused, large, by class" in text
    printed = capsys.readouterr().out
    assert "## large" in printed and "by class" not in printed and "mean.svg" in printed


def test_figures(files):
    run(files, "--per-class", "--areas", "large", "all", names=("confused",))
    with Image.open(files / "out/mean.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colors = {tuple(pixel) for pixel in np.unique(pixels, axis=0)}
    assert {(0xEE, 0x66, 0x77), (0xFF, 0xB0, 0x00)} <= colors  # Sim and FN have an area
    svg = (files / "out/mean.svg").read_text()
    assert svg.index(">all<") < svg.index(">large<") and "[50.0] Sim" in svg
    names = sorted(p.name for p in (files / "out/classes").iterdir())
    assert names == [
        "3_a_b.png", "3_a_b.svg", "5_big_one.png", "5_big_one.svg", "6_absent.png", "6_absent.svg",
    ]  # fmt: skip
    assert "no ground truth" in (files / "out/classes/6_absent.svg").read_text()
    assert not list((files / "out").rglob(".*"))


def test_names_of_result_files():
    def names(*paths):
        return error_analysis.result_names([Path(path) for path in paths])

    assert names("/x/A.json", "/x/B.json") == ["A", "B"]
    assert names("/x/A/r.json", "/x/B/r.json") == ["A", "B"]
    assert names("/x/A/1/r.json", "/x/B/1/r.json", "/x/A/2/r.json") == ["A/1/r", "B/1/r", "A/2/r"]
    with pytest.raises(ValueError, match="given twice"):
        names("/x/A.json", "/x/A.json")


def test_what_the_ground_truth_lacks_is_said(files):
    truth = json.loads((files / "truth.json").read_text())
    for category in truth["categories"]:
        category["supercategory"] = "none"  # as some exports write for all classes
    truth["annotations"][0]["id"] = 0
    (files / "truth.json").write_text(json.dumps(truth))
    run(files)
    text = (files / "out/errors.md").read_text()
    assert "No two classes share a supercategory: Sim equals Loc." in text
    assert "An annotation has the id 0" in text
    content = json.loads((files / "out/errors.json").read_text())
    assert content["good"]["all"]["C75"]["classes"]["a|b"] == 1
    assert content["confused"]["all"]["Sim"]["mean"] == 0.25
    assert content["confused"]["all"]["Oth"]["mean"] == 0.5


def test_wrong_input_is_refused(files, capsys):
    with pytest.raises(SystemExit, match="error: .*truth.json is not in COCO's result format"):
        error_analysis.main(
            ["--gt", str(files / "truth.json"), "--results", str(files / "truth.json"),
             "--output", str(files / "out")]
        )  # fmt: skip
    with pytest.raises(SystemExit, match="error: .*no.json .* is not there"):
        run(files, gt="no.json")
    with pytest.raises(SystemExit):
        run(files, "--names", "one")
    assert "--names: one for each" in capsys.readouterr().err
    assert not (files / "out").exists()
