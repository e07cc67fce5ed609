"""Statistics, curves, pictures and notes, each by itself, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

from d2det.evaluation.drawing import beside
from d2det.tools.experiments.calls import note_call, read_calls
from d2det.tools.experiments.collect import collect_curves, seconds_per_iteration, shared_settings
from d2det.tools.experiments.experiment import Experiment, Method
from d2det.tools.experiments.folders import discover, last_metrics, runs_of
from d2det.tools.experiments.pictures import find_examples, split_picture
from d2det.tools.experiments.plots import plot_curves
from d2det.tools.experiments.speed import Recorder, cell_name, read_speed
from d2det.tools.experiments.summary import band, summarize, summarize_gain
from d2det.tools.experiments.tables import Cell, Table, markdown


def test_summary_leaves_out_what_is_undefined():
    found = summarize([2.0, None, 4.0, math.nan, 9.0])
    assert found[:2] == (3, 5.0) and found[3:] == (2.0, 9.0)
    assert found.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert summarize([None, math.inf]) is None
    assert math.isnan(summarize([3.0]).deviation)


def test_gain_is_of_the_seeds_that_both_have():
    found = summarize_gain({1: 5.0, 2: 9.0, 3: None, 4: 1.0}, {1: 4.0, 2: 5.0, 3: 1.0, 5: 0.0})
    assert (found.number, found.mean, found.low, found.high) == (2, 2.5, 1.0, 4.0)
    assert summarize_gain({1: 5.0}, {2: 5.0}) is None


def test_band_interpolates_within_and_is_silent_beyond_a_runs_ends():
    found = band([([10, 30], [1.0, 3.0]), ([10, 20, 40], [3.0, 6.0, 2.0])])
    assert found.x.tolist() == [10, 20, 30, 40]
    assert found.mean.tolist() == [2.0, 4.0, 3.5, 2.0]  # at 20: 2 and 6; at 30: 3 and 4
    assert found.low.tolist() == [1.0, 2.0, 3.0, 2.0]
    assert found.high.tolist() == [3.0, 6.0, 4.0, 2.0]
    assert band([]).x.size == 0


def test_curves_count_iterations_done(folder):
    folder.run("m", 1, losses=(3.0, 2.0), ap={40: 7.0})
    folder.run("m", 2, losses=(), ap={})
    curves = collect_curves(runs_of(discover(folder.path), folder.path))
    assert curves == {
        "total_loss": {"m": [([20, 40], [3.0, 2.0])]},
        "bbox/AP": {"m": [([40], [7.0])]},
    }
    assert seconds_per_iteration(folder.path / "m" / "seed1") == 0.5
    assert seconds_per_iteration(folder.path / "m" / "seed2") is None
    # A single evaluation makes no curve.
    assert plot_curves("bbox/AP", curves["bbox/AP"], [Method("m", "m", "")]) is None


def test_last_line_of_a_long_file_that_is_being_written(tmp_path):
    lines = [json.dumps({"iteration": i, "filler": "x" * 500}) for i in range(200)]
    (tmp_path / "metrics.json").write_text("\n".join(lines) + '\n{"iteration": 2')
    assert last_metrics(tmp_path)["iteration"] == 199
    assert last_metrics(tmp_path / "none") == {}


def test_picture_is_split_at_the_gap_that_the_evaluation_leaves():
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 256, (40, 64, 3), np.uint8) for _ in range(2))
    found = split_picture(beside(left, right))
    assert np.array_equal(found[0], left) and np.array_equal(found[1], right)
    assert split_picture(np.concatenate([left, right], axis=1)) is None
    assert split_picture(np.full((40, 12, 3), 255, np.uint8)) is None
    data = cv2.imencode(".jpg", beside(left, right))[1]  # noise: the worst for JPEG
    assert split_picture(cv2.imdecode(data, cv2.IMREAD_COLOR)) is not None


def test_pictures_without_ground_truth_are_shown_whole(folder):
    folder.run("m", 1, results={"val": {}}, pictures=1)  # images without annotations
    (example,) = find_examples(runs_of(discover(folder.path), folder.path), wanted=6)
    assert [label for label, _ in example.views] == ["m"]
    (folder.path / "m/seed1/pictures/val/000_im0.jpg").write_bytes(b"no picture")
    assert find_examples(runs_of(discover(folder.path), folder.path), wanted=6) == []


def test_settings_are_said_once_where_methods_share_them():
    found = {"a": {"x": 1, "y": 2, "z": 0}, "b": {"x": 1, "y": 3}}
    assert shared_settings(found) == ({"x": 1}, ["y", "z"])
    assert shared_settings({}) == ({}, [])


def test_markdown_cells_keep_their_columns():
    table = Table("T", ("a|b", "n"), ((Cell("x|y\nz"), Cell("1", "low|high", "best")),), "note")
    lines = markdown(table).splitlines()
    assert lines[0] == "**T**" and lines[-1] == "note"
    assert lines[4].replace(" ", "") == "|x\\|yz|**1**(low\\|high)|"


def test_speed_of_other_settings_is_dropped(tmp_path):
    first = Recorder(tmp_path, {"machine": "a"}, {"date": "d"})
    first.get("m", "inference", 1, "float32")["times"] = [1.0, 2.0, 3.0]
    first.save()
    name = cell_name("m", "inference", 1, "float32")
    again = Recorder(tmp_path, {"machine": "a"}, {"date": "e"})
    assert not again.dropped and again.cells[name]["times"] == [1.0, 2.0, 3.0]
    other = Recorder(tmp_path, {"machine": "b"}, {"date": "e"})
    assert other.dropped and other.cells == {}
    assert read_speed(tmp_path)["date"] == "d"  # nothing is lost before something is saved


def test_calls_are_noted_one_after_the_other(tmp_path):
    for command in ("one", "two"):
        note_call(tmp_path, command, "cpu")
    calls = read_calls(tmp_path)
    assert [call.command for call in calls] == ["one", "two"]
    assert "torch" in calls[0].machine and "threads" not in calls[0].machine
    assert calls[0].versions.startswith("d2det ")


def test_runs_take_turns():
    experiment = Experiment((Method("a", "a", ""), Method("b", "b", "")), seeds=(2, 1))
    names = [(run.method.name, run.seed) for run in runs_of(experiment, Path())]
    assert names == [("a", 2), ("b", 2), ("a", 1), ("b", 1)]
