"""Arithmetic and rows of the benchmarks' tables; no time is tested."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import BOTH, FORWARD, Case, Contestant
from table import Row, table

from d2det.tools.measuring import timing

BENCHES = sorted(p.stem for p in Path(harness.__file__).parent.glob("bench_*.py"))


def cells(text: str) -> list[list[str]]:
    """A markdown table's rows without the header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]


def options(**changes: Any) -> argparse.Namespace:
    args = harness.parser(None).parse_args(["--quick", "--device", "cpu", "--no-memory"])
    return argparse.Namespace(**{**vars(args), **changes})


def test_calls_alternate_until_each_has_had_its_time():
    """slow takes 4 s a call, fast 1 s; with 6 s for each, slow stops after three samples."""
    log: list[str] = []
    calls = {"fast": lambda: 1.0, "slow": lambda: 4.0}

    def clock(call, repeats):
        assert repeats == 1
        log.append("fast" if call is calls["fast"] else "slow")
        return call()

    found = timing.alternate(calls, 6.0, "cpu", clock)
    warm_up = ["fast"] * 2 + ["slow"] * 2
    rounds = ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert log == warm_up + rounds + ["fast"] * 3
    assert found["fast"].times == [1.0] * 6
    assert found["slow"].times == [4.0] * 3


def test_short_calls_are_repeated_within_a_sample():
    found = timing.alternate({"f": lambda: None}, 0.0, "cpu", lambda call, n: n * 1e-4)
    assert found["f"].times == pytest.approx([1e-4] * 3)


def test_quartiles():
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_ratios_are_of_medians_to_the_first_row_of_the_case():
    rows = [
        Row(("a",), FORWARD, "d2det", [0.001, 0.002, 0.009], peak=1 << 20, buffer=1 << 22),
        Row(("a",), FORWARD, "peer", [0.004, 0.006, 0.008], peak=3 << 19, buffer=1 << 22),
        Row(("a",), BOTH, "d2det", [0.010] * 3),
        Row(("a",), BOTH, "peer", note="failed: no such kernel"),
    ]
    assert cells(table(["size"], rows)) == [
        ["a", FORWARD, "d2det", "2", "1.5 to 5.5", "1.00", "1.00", "1.0", "0.25"],
        ["a", FORWARD, "peer", "6", "5 to 7", "3.00", "0.33", "1.5", "0.38"],
        ["a", BOTH, "d2det", "10", "10 to 10", "1.00", "1.00", "-", "-"],
        ["a", BOTH, "peer", "failed: no such kernel", "-", "-", "-", "-", "-"],
    ]


def test_without_a_time_of_d2det_there_are_no_ratios():
    rows = [Row((), FORWARD, "d2det", note="failed: x"), Row((), FORWARD, "peer", [0.001] * 3)]
    assert cells(table([], rows))[1][-3:] == ["-", "-", "-"]


def test_a_contestant_that_fails_or_is_absent_is_a_row():
    x = torch.ones(3, requires_grad=True)

    def broken() -> torch.Tensor:
        raise RuntimeError("out | of luck\nand more")

    def broken_later() -> torch.Tensor:
        return x.detach() * 2  # has no gradient

    case = Case(
        ("case",),
        lambda: [
            Contestant("d2det", lambda: x * 2, [x]),
            Contestant("broken", broken, [x]),
            Contestant("broken later", broken_later, [x]),
            Contestant("absent", missing="not installed"),
            Contestant("unwanted", lambda: x * 3, [x]),
        ],
    )
    rows = harness.measure(case, options(without=["unw"]))
    assert [(r.phase, r.name) for r in rows] == [
        (phase, name)
        for phase in (FORWARD, BOTH)
        for name in ("d2det", "broken", "broken later", "absent", "unwanted")
    ]
    assert [r.note for r in rows[:5]] == [
        "", "failed: out / of luck", "", "not installed", "left out",
    ]  # fmt: skip
    assert rows[7].note.startswith("failed: ")
    assert not rows[7].times
    assert len(rows[5].times) >= 3


def test_of_a_family_the_fastest_is_shown():
    contestants = [Contestant(name, family="conv") for name in "abc"]
    rows = {"a": Row((), FORWARD, "a", note="failed"), "b": Row((), FORWARD, "b", [2.0])}
    rows["c"] = Row((), FORWARD, "c", [1.0])
    assert [r.name for r in harness._fastest(contestants, rows)] == ["c"]


def test_forward_and_backward_differentiate_every_input():
    a, b = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    contestant = Contestant("product", lambda: a * b, [a, b])
    output, grad_a, grad_b = contestant.runner(BOTH)()
    torch.testing.assert_close(grad_a / grad_b, b / a)
    assert not contestant.runner(FORWARD)().requires_grad
    assert output.requires_grad


EXPECTED = {
    "bench_deform_conv": (8, ["d2det", "torchvision", "detectron2", "mmcv", "F.conv2d"]),
    "bench_roi_pooling": (
        4,
        ["d2det", "reference, level", "reference, one", "torchvision", "detectron2", "mmcv"],
    ),
    "bench_adaptive_weighting": (8, ["d2det", "eager PyTorch", "torch.compile"]),
    "bench_masks": (1, ["d2det", "d2det, boxes only", "detectron2's Mask R-CNN"]),
    "bench_soft_nms": (2, ["d2det", "PyTorch loop", "reference"]),
}


def test_every_benchmark_is_tested():
    assert sorted(EXPECTED) == BENCHES


@pytest.mark.parametrize("name", BENCHES)
def test_quick_tables_have_a_row_for_each_contestant(name, monkeypatch, capsys, tmp_path):
    groups, names = EXPECTED[name]
    output = tmp_path / "results" / "table.md"
    script = str(Path(harness.__file__).with_name(f"{name}.py"))
    flags = ["--quick", "--device", "cpu", "--no-memory", "--without", "torch.compile"]
    threads = ["--threads", "1", "--seconds", "0.001"]
    monkeypatch.setattr("sys.argv", [script, *flags, *threads, "--output", str(output)])
    importlib.import_module(name).main()
    text = output.read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert f"python benchmarks/{name}.py --quick" in text
    assert torch.__version__ in text
    headers = next(li for li in text.splitlines() if li.startswith("|")).split("|")[1:-1]
    column = [h.strip() for h in headers].index("contestant")
    rows = cells(text)
    assert len(rows) == groups * len(names)
    for index, row in enumerate(rows):
        assert row[column].startswith(names[index % len(names)])
        time = row[column + 1]
        absent = ("not installed", "not measured: ", "left out")
        assert time.startswith(absent) or float(time) > 0, row


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    if reason := harness.memory.unavailable("cpu"):
        pytest.skip(reason)
    script = str(Path(harness.__file__).with_name("bench_soft_nms.py"))
    monkeypatch.setattr("sys.argv", [script, "--quick", "--device", "cpu", "--classes", "3"])
    importlib.import_module("bench_soft_nms").main()
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 3
    assert all(float(row[-1]) >= 0 for row in rows)
