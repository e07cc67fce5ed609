"""A real experiment, tiny: two configs, one run killed and resumed; and its speed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import d2det
from d2det.tools.experiments.__main__ import main


@pytest.fixture
def experiment(tmp_path, monkeypatch, tiny_yaml, coco_data):
    """An experiment of two tiny methods on tiny data, in `tmp_path`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(d2det.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    images, data = coco_data / "images", ("train", "val")
    files = " ".join(f"--{n}-json {coco_data / n}.json --{n}-images {images}" for n in data)
    keys = "SOLVER.MAX_ITER 120 SOLVER.CHECKPOINT_PERIOD 20 TEST.EVAL_PERIOD 60"
    Path("tiny_experiment.yaml").write_text(
        f"title: Tiny\nseeds: [1]\ntrain_args: {files} {keys}\nmethods:\n"
        f"- {{label: Plain, config: {tiny_yaml}}}\n"
        f"- {{label: Wide, name: wide, config: {tiny_yaml}, overrides: "
        "{MODEL.ROI_BOX_HEAD.FC_DIM: 32}}\n"
    )
    return Path("tiny_experiment.yaml")


@pytest.mark.slow
def test_killed_resumed_measured_and_reported(experiment, capsys):
    line = ["run", str(experiment), "--output", "out"]
    plain, wide = Path("out/tiny/seed1"), Path("out/wide/seed1")
    with subprocess.Popen(
        [sys.executable, "-m", "d2det.tools.experiments", *line], stderr=subprocess.DEVNULL
    ) as tool:
        try:
            end = time.monotonic() + 900  # on a machine that has much else to do
            while not (plain / "last_checkpoint").is_file():
                assert tool.poll() is None and time.monotonic() < end, console(plain)
                time.sleep(0.02)
        finally:
            tool.send_signal(signal.SIGTERM)  # it ends its children
            status = tool.wait(60)
    assert status == 128 + signal.SIGTERM
    assert not (plain / "results.json").exists() and not wide.exists()

    speed = ["--speed", "--batch-sizes", "2", "--precisions", "float32", "--seconds", "0.01"]
    assert main([*line, *speed]) == 0, console(plain) + console(wide)
    assert "Starting training from iteration 0" in console(plain)
    (resumed,) = re.findall(r"Starting training from iteration ([1-9]\d*)", console(plain))
    assert int(resumed) % 20 == 0 and int(resumed) < 120
    assert "| **" in capsys.readouterr().out
    html = Path("out/report.html").read_text()
    assert "2 of 2 runs done" in html and "MODEL.ROI_BOX_HEAD.FC_DIM 32" in html
    for folder in (plain, wide):
        ap = json.loads((folder / "results.json").read_text())["custom_val"]["bbox"]["AP"]
        assert f"{ap:.1f}" in html
    assert html.count("data:image/jpeg") == 2 * 3  # TEST.NUM_PICTURES; ground truth, two methods
    assert "bbox/AP over the iterations" in html

    found = json.loads(Path("out/speed.json").read_text())
    assert set(found["cells"]) == {
        f"{method}|{phase}|2|float32"
        for method in ("tiny", "wide")
        for phase in ("inference", "training")
    }
    assert all(len(cell["times"]) == 3 for cell in found["cells"].values())
    assert all(cell.get("peak", 1) > 0 for cell in found["cells"].values())
    # 7 * 7 * 16 inputs, and 3 + 1 classes and 3 boxes, of 16 features more.
    counts = {name: found["models"][name]["parameters"] for name in ("tiny", "wide")}
    assert counts["wide"] - counts["tiny"] == 16 * (7 * 7 * 16 + 1) + 16 * (4 + 4 * 3)
    assert all(weights for weights in found["key"]["weights"].values())
    # Once more: nothing is measured, trained or evaluated again.
    before = {path: path.stat().st_mtime_ns for path in (plain / "results.json", speed_file())}
    assert main([*line, *speed]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def speed_file() -> Path:
    return Path("out/speed.json")


def console(folder: Path) -> str:
    file = folder / "console.txt"
    return file.read_text() if file.is_file() else ""
