"""Reports of folders that the test wrote: figures worked out by hand, and what must be said."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

from d2det.tools.experiments.__main__ import main

VOID = {"meta", "wbr", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in order; collects resources, ids, headings and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.images: list[dict] = []
        self.elements: list[str] = []
        self.cells: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self._caption = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.resources += [found[k] for k in ("src", "href", "xlink:href") if k in found]
        self.references += re.findall(r"url\(#([^)]*)\)", " ".join(map(str, found.values())))
        if tag == "img":
            self.images.append(found)
        if tag == "table":
            self._table = []
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.cells[self._caption] = self._table
            self._table = None

    def handle_data(self, data):
        if self.open and self.open[-1] == "caption":
            self._caption = data
        elif self._table and self._table[-1]:
            self._table[-1][-1] += " " * (self.open[-1] == "small") + data.strip()


def make(path: Path, *arguments: str) -> tuple[Page, str, str]:
    assert main(["report", str(path), *arguments]) == 0
    html, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    return Page(html), html, text


def rows(page: Page, caption: str) -> dict[str, list[str]]:
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.cells[caption]}


def test_figures_equal_those_worked_out(full_folder, capsys):
    page, _, text = make(full_folder.path)
    table = rows(page, "val: bbox")
    assert table["method"] == ["seeds", "AP", "AP50", "AP over the first"]
    # 10, 11, 15: mean 12, deviations -2, -1, 3, so sqrt(14 / 2) = 2.65.
    assert table["base"] == ["3", "12.0 ± 2.6 10.0 to 15.0", "30.0 ± 0.0 30.0 to 30.0", "-"]
    # One seed of three; beside the first method's run of the same seed, 14 - 10.
    assert table["ours"] == ["1 of 3", "14.0", "20.0", "+4.0"]
    assert "| base" in text and "12.0 ± 2.6 (10.0 to 15.0)" in text and "**14.0**" in text
    assert "**14.0**" in capsys.readouterr().out
    assert rows(page, "val: AP of each class (bbox)")["b"] == ["2.0 ± 0.0 2.0 to 2.0", "-"]


def test_runs_that_failed_or_are_missing_are_named(full_folder):
    page, html, text = make(full_folder.path)
    table = rows(page, "Runs")
    assert table["base"][0] == "done 0.5 s an iteration"
    assert table["ours"] == ["done 0.5 s an iteration", "failed 20 of 100 iterations", "missing"]
    assert "4 of 6 runs done (1 failed, 1 missing)" in html and "4 of 6 runs done" in text
    assert "RuntimeError: &lt;out&gt; of | memory" in html  # as text, not as an element
    assert "RuntimeError: <out> of | memory" in text
    assert "ours/seed2/console.txt" in text


def test_page_is_well_formed_and_self_contained(full_folder, speed_json):
    speed_json()
    page, html, _ = make(full_folder.path)
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "script" not in page.elements and "link" not in page.elements
    assert len(page.ids) == len(set(page.ids))
    targets = {r[1:] for r in page.resources if r.startswith("#")} | set(page.references)
    assert targets <= set(page.ids)
    assert '<html lang="en">' in html and html.startswith("<!doctype html>")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        tree = ElementTree.fromstring(svg)
        assert tree.get("role") == "img"
        title = tree.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.get("id") == tree.get("aria-labelledby") and title.text
    for image in page.images:
        assert image["alt"]
    assert html.count("<table>") == html.count("<caption>") == html.count("<thead>")
    assert html.count('scope="row"') >= html.count("<tbody>")


def test_pictures_of_one_image_side_by_side(full_folder):
    page, _, text = make(full_folder.path)
    # "ours" has two of the three images; the ground truth is shown once for each.
    alts = [image["alt"] for image in page.images]
    assert alts[:3] == ["im0: ground truth", "im0: detections of base", "im0: detections of ours"]
    assert len(alts) == 6
    truth, base = (
        cv2.imdecode(
            np.frombuffer(base64.b64decode(page.images[i]["src"].partition(",")[2]), np.uint8), 1
        )
        for i in (0, 1)
    )
    assert truth.shape == base.shape == (90, 120, 3)
    assert np.abs(truth.mean((0, 1)) - (40, 60, 20)).max() < 3
    assert np.abs(base.mean((0, 1)) - (20, 60, 40)).max() < 3
    for name in re.findall(r"report_files/[\w.]+", text):
        assert (full_folder.path / name).is_file()
    page, _, _ = make(full_folder.path, "--pictures", "1")
    assert len(page.images) == 3
    assert len(list((full_folder.path / "report_files").glob("example*"))) == 3


def test_speed_is_given_as_ratios_to_the_first(full_folder, speed_json):
    speed_json()
    page, html, text = make(full_folder.path)
    table = [[c.strip() for c in row] for row in page.cells["Speed and memory"]]
    assert table[1] == ["base", "float32", "1", "0.1 0.09 to 0.12", "1.00", "8",
                        "50 41.7 to 55.6", "1.00", "4"]  # fmt: skip
    assert table[2] == ["ours", "float32", "1", "0.25 0.225 to 0.3", "2.50", "-",
                        "33.3 27.8 to 37", "1.50", "6"]  # fmt: skip
    assert table[4][3:] == ["- not measured", "-", "-", "- failed: out of memory", "-", "-"]
    counted = rows(page, "Parameters and FLOPs")
    assert counted["ours"] == ["160 x 224", "3.00 1.50 of the first", "-", "- not counted: reason"]
    assert "Untrained weights, which may find more or fewer objects: ours." in html
    # The paper's Figure 1: AP against milliseconds.
    assert "base 12.0 at 20 ms, ours 14.0 at 30 ms" in text
    assert (full_folder.path / "report_files" / "ap_against_time.png").is_file()


def test_several_tasks_sets_and_unknown_metrics(folder):
    results = {
        "a": {"bbox": {"AP": 5.0, "AP75": 1.0, "AP50": 9.0}, "segm": {"AP": 4.0},
              "segm_class_score": {"AP": 3.5}},
        "b": {"voc": {"night": 7.0}},
        "c": {},
    }  # fmt: skip
    folder.run("only", 7, results=results)
    page, html, _ = make(folder.path)
    assert rows(page, "a: bbox")["method"] == ["seeds", "AP", "AP50", "AP75"]
    assert rows(page, "a: segm_class_score")["only"] == ["1", "3.5"]
    assert rows(page, "b: voc") == {"method": ["seeds", "night"], "only": ["1", "7.0"]}
    assert "<strong>5.0</strong>" not in html  # alone, nothing is best


def test_published_figures_stand_beside(folder, tmp_path):
    folder.run("faster_rcnn", 1, {"AP": 37.2})
    experiment = tmp_path / "e.yaml"
    experiment.write_text(
        "title: A & B\nseeds: [1]\nmethods:\n"
        "- {label: Base, config: shapes/faster_rcnn, published: {bbox: {AP: 38.0}}}\n"
    )
    page, html, _ = make(folder.path, str(experiment))
    assert rows(page, "val: bbox")["Base"] == ["1", "37.2 paper 38.0"]
    assert "<title>A &amp; B</title>" in html
    assert rows(page, "Methods")["Base"][0] == "configs/shapes/faster_rcnn.yaml"


def test_nothing_done_yet(folder):
    (folder.path / "m" / "seed1").mkdir(parents=True)
    page, html, text = make(folder.path)
    assert "No run has results yet." in html and "No run has results yet." in text
    assert rows(page, "Runs")["m"] == ["missing"]
    assert "img" not in page.elements and "svg" not in page.elements


def test_half_a_result_file_is_no_result(folder):
    (folder.run("m", 1, {"AP": 1.0}) / "results.json").write_text('{"val": {"bb')
    page, _, _ = make(folder.path)
    assert rows(page, "Runs")["m"][0].startswith("unfinished")


def test_ten_methods_and_five_seeds(folder):
    for method in range(10):
        for seed in range(5):
            folder.run(f"m{method}", seed, {"AP": 10.0 + method + seed}, ap={50: 5.0, 100: 9.0})
    page, html, _ = make(folder.path)
    assert len(rows(page, "val: bbox")) == 11
    assert html.count("<strong>16.0") == 0 and html.count("<strong>21.0 ± 1.6") == 1
    assert len(html) < 600_000
    assert [name for name in page.elements if name == "svg"] == ["svg", "svg"]


def test_no_folder_no_runs_no_configs(folder, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
    folder.path.mkdir()
    assert main(["report", str(folder.path)]) == 1
    assert "holds no runs" in capsys.readouterr().err
    folder.run("m", 1, {"AP": 1.0})
    assert main(["speed", str(folder.path)]) == 1
    assert "does not say what its configs are" in capsys.readouterr().err
    (folder.path / "experiment.json").write_text(json.dumps({"methods": 3}))
    assert main(["report", str(folder.path)]) == 1
    assert "experiment.json cannot be read" in capsys.readouterr().err
