"""Tables of results, class names beside the weights, and training curves."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("detectron2")
from d2det.engine.setup import get_cfg
from d2det.evaluation.classes import fill_up, load_class_names, save_class_names
from d2det.evaluation.curves import _is_plotted, read_metrics, write_curves
from d2det.evaluation.results import (
    by_dataset,
    class_table,
    notes,
    summary_table,
    write_results,
)

BOXES = {"AP": 41.25, "AP50": 60.0, "AP90": 12.0, "APs": math.nan, "AP-x|y": 40.0, "AP-z": 42.5}
MASKS = {"AP": 38.0, "AP50": 55.5, "AP-x|y": 37.0, "AP-z": math.nan}


def cells(line):
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]


def test_results_are_keyed_by_data_set():
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("one",)
    assert by_dataset(cfg, {"bbox": BOXES}) == {"one": {"bbox": BOXES}}
    assert by_dataset(cfg, None) == {"one": {}}
    cfg.DATASETS.TEST = ("one", "two")
    results = by_dataset(cfg, {"two": {"bbox": BOXES}})
    assert results == {"one": {}, "two": {"bbox": BOXES}}
    cfg.DATASETS.TEST = ()
    assert by_dataset(cfg, {}) == {}


def test_summary_has_a_row_for_each_task():
    rows = [
        cells(line)
        for line in summary_table({"d": {"bbox": BOXES, "segm": MASKS}, "e": {}}).splitlines()
    ]
    assert rows[0] == ["data set", "task", "AP", "AP50", "AP90", "APs"]
    assert rows[2] == ["d", "bbox", "41.25", "60.00", "12.00", "-"]
    assert rows[3] == ["d", "segm", "38.00", "55.50", "-", "-"]
    assert rows[4] == ["e", "no ground truth", "-", "-", "-", "-"]


def test_class_table_puts_tasks_beside_each_other():
    rows = [cells(line) for line in class_table({"d": {"bbox": BOXES, "segm": MASKS}}).splitlines()]
    assert rows[0] == ["d: class", "AP (bbox)", "AP (segm)"]
    assert rows[2:] == [["x¦y", "40.00", "37.00"], ["z", "42.50", "-"]]
    assert class_table({"d": {"bbox": {"AP": 1.0}}, "e": {}}) == ""


def test_files_hold_the_results(tmp_path):
    json_path, markdown_path = write_results({"d": {"bbox": BOXES}}, tmp_path / "new")

    def refuse(constant):
        raise AssertionError(f"{constant} is not valid JSON")

    content = json.loads(json_path.read_text(), parse_constant=refuse)
    assert content["d"]["bbox"]["AP"] == 41.25
    assert content["d"]["bbox"]["APs"] is None
    assert "41.25" in markdown_path.read_text()


def test_tasks_that_are_not_cocos_are_explained(tmp_path):
    gain = {"AP": 1.5, "AP50": -0.25}
    tasks = {"segm": MASKS, "segm_class_score": MASKS, "mask_scoring_gain": gain}
    text = write_results({"d": tasks}, tmp_path)[1].read_text()
    assert "segm_class_score: the same masks ranked by class score" in text
    rows = [cells(line) for line in text.splitlines() if line.startswith("| d ")]
    assert rows[-1] == ["d", "mask_scoring_gain", "1.50", "-0.25"]
    assert notes({"d": {"bbox": BOXES}}) == ""
    assert notes({"d": {"bbox": BOXES, "bbox_TTA": BOXES}}).endswith("test-time augmentation.")


def test_curves_have_each_ranking_of_masks_once():
    plotted = [f"segm/{m}" for m in ("AP", "AP50", "AP75", "AP90")] + [
        "bbox/AP",
        "segm_class_score/AP",
    ]
    left_out = ["segm_class_score/AP50", "mask_scoring_gain/AP", "segm/APs", "bbox/AP-a", "lr"]
    for prefix in ("", "set/"):
        assert all(_is_plotted(prefix + key) for key in plotted)
        assert not any(_is_plotted(prefix + key) for key in left_out)


def test_class_names_are_written_and_read(tmp_path):
    from detectron2.data import MetadataCatalog

    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TRAIN = ("not_registered",)
    save_class_names(cfg)
    assert load_class_names(tmp_path) == []
    assert "not_registered" not in MetadataCatalog.list()  # looking must not create it
    cfg.DATASETS.TRAIN = ("coco_2017_val",)
    save_class_names(cfg)
    assert load_class_names(tmp_path)[:2] == ["person", "bicycle"]
    (tmp_path / "classes.json").unlink()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2  # not the 80 of the data set
    save_class_names(cfg)
    assert load_class_names(tmp_path) == []
    (tmp_path / "classes.json").write_text("[1]")
    assert load_class_names(tmp_path) == []
    assert fill_up(["a"], 2) == ["class 0", "class 1"]
    assert fill_up(["a", "b"], 2) == ["a", "b"]


def test_curves_of_a_resumed_and_a_cut_off_run(tmp_path):
    assert write_curves(tmp_path) is None
    entries = [
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0},
        {"iteration": 39, "total_loss": 9.0},
        {"iteration": 39, "total_loss": 1.5, "bbox/AP": 10.0, "bbox/APs": math.nan},
        {"iteration": 39, "two/segm/AP": 5.0},
    ]
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / "metrics.json").write_text("\n".join(lines) + '\n{"iterat')
    merged = read_metrics(tmp_path / "metrics.json")
    assert [entry["iteration"] for entry in merged] == [19, 39]
    assert merged[1]["total_loss"] == 1.5
    assert merged[1]["bbox/AP"] == 10.0
    path = write_curves(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_curves_of_nothing(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "lr": 0.1, "bbox/AP": NaN}\n')
    assert write_curves(tmp_path) is None
