"""The accuracy benchmark's command lines mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import accuracy

from d2det.tools.experiments.arguments import parse_arguments


def test_lines_of_the_readme_are_those_of_the_runner():
    line = ["a.yaml", "b.yaml", "--seeds", "1", "2", "--jobs", "2", "--output", "out"]
    line += ["--train-args", "--train-json", "t.json", "SOLVER.MAX_ITER", "600"]
    args = parse_arguments(accuracy.command(line))
    assert (args.command, args.configs, args.output) == ("run", ["a.yaml", "b.yaml"], Path("out"))
    assert (args.seeds, args.jobs, args.train_args) == ([1, 2], 2, line[-4:])
    assert parse_arguments(accuracy.command(["a.yaml"])).output == Path("output/accuracy")
