"""The tutorial's commands exist; the method's figures can be drawn."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "documentation"))


def _commands() -> list[list[str]]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith(".venv/bin/python ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_commands_of_the_tutorial(command: list[str]) -> None:
    pytest.importorskip("detectron2")
    from d2det.engine.arguments import argument_parser
    from d2det.engine.configs import find_config, merge_overrides
    from d2det.engine.setup import get_cfg

    program, *arguments = command
    if program == "-m":
        assert importlib.util.find_spec(arguments[0]) is not None
        source = Path(importlib.util.find_spec(arguments[0]).origin or "").read_text()
        for option in re.findall(r"(?<= )--[a-z-]+", " " + " ".join(arguments)):
            assert f'"{option}"' in source, option
        return
    if program == "demo.py":
        source = (ROOT / program).read_text()
        for option in re.findall(r"(?<= )--[a-z-]+", " " + " ".join(arguments)):
            assert f'"{option}"' in source, option
        return
    assert program == "train_net.py"
    args = argument_parser().parse_args(arguments)
    merge_overrides(get_cfg(), args.opts)  # an unknown key, or a wrong type, is an error
    if not args.config_file.startswith("output/"):
        assert Path(find_config(args.config_file)).is_file()


def test_figures_of_the_method(tmp_path: Path) -> None:
    import method_figures

    for path in method_figures.main(tmp_path):
        committed = ROOT / "docs" / path.name
        assert committed.stat().st_size < 150_000
        with Image.open(path) as drawn, Image.open(committed) as kept:
            assert drawn.size == kept.size
            assert len(set(drawn.convert("L").resize((64, 16)).tobytes())) > 20  # not blank
