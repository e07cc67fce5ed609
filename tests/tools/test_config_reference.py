"""The configuration reference says of every key what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "documentation"))

import config_reference  # noqa: E402  (found through the line above)

SOURCE = """
def add_d2det_config(cfg):
    _add_test(cfg)
    _add_solver(cfg)

def _add_solver(cfg):
    # Above,
    # in two lines: a | b, x * y, <tag>, SOLVER.OTHER_KEY.
    cfg.SOLVER.FIRST = 1.0 / 6.0  # and behind

    # Not directly above.

    cfg.SOLVER.SILENT = "x"

def _add_test(cfg):
    # What the group is.
    cfg.TEST.GROUP = group = CN()
    group.KEY = [
        1,
        2,
    ]  # c above
    inner = cfg.TEST.GROUP
    inner.DEEPER = CN()
    inner.DEEPER.KEY = "# no comment"  # of DEEPER
"""


@pytest.fixture(scope="module")
def parsed() -> list[config_reference.Section]:
    return config_reference.sections(SOURCE)


def test_sections_follow_the_calls(parsed: list[config_reference.Section]) -> None:
    assert [section.title for section in parsed] == ["Evaluation", "Training"]


def test_names_defaults_and_comments(parsed: list[config_reference.Section]) -> None:
    test, solver = parsed
    assert test.about == ["TEST.GROUP: What the group is."]
    assert test.keys == [
        ("TEST.GROUP.KEY", "[ 1, 2, ]", "c above"),
        ("TEST.GROUP.DEEPER.KEY", '"# no comment"', "of DEEPER"),
    ]
    first, silent = solver.keys
    assert first[:2] == ("SOLVER.FIRST", "1.0 / 6.0")
    assert first.meaning.startswith("Above, in two lines:")
    assert first.meaning.endswith("and behind")
    assert silent.meaning == ""


def test_comments_are_not_markup(parsed: list[config_reference.Section]) -> None:
    page = config_reference.markdown(parsed)
    assert r"a \| b, x \* y, &lt;tag&gt;, `SOLVER.OTHER_KEY`" in page
    assert '| `TEST.GROUP.DEEPER.KEY` | `"# no comment"` | Of DEEPER |' in page
    assert "| c above |" in page  # a variable's name keeps its case


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        found |= _flat(value, f"{path}.") if hasattr(value, "items") else {path: value}
    return found


def test_every_key_is_there_with_its_default() -> None:
    detectron2 = pytest.importorskip("detectron2.config")
    from d2det.config import add_d2det_config

    plain = _flat(detectron2.get_cfg())
    added = {
        key: value
        for key, value in _flat(add_d2det_config(detectron2.get_cfg())).items()
        if key not in plain
    }
    documented = [key for section in config_reference.read() for key in section.keys]

    assert sorted(key.name for key in documented) == sorted(added)
    assert [key.name for key in documented if not key.meaning] == []
    for key in documented:
        # 1.0 / 6.0 is no literal; nothing else is computed.
        names: dict[str, Any] = {"__builtins__": {}}
        default = eval(compile(ast.parse(key.default, mode="eval"), key.name, "eval"), names)
        assert default == added[key.name], key.name


def test_needs_nothing_installed() -> None:
    """As a program, without site-packages: no detectron2, no torch."""
    done = subprocess.run(
        [sys.executable, "-S", "-I", config_reference.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| `MODEL.MIMIC.CROP_SIZE` | `224` | Side of the resized patches |" in done.stdout
    assert config_reference.DEEPLAB not in done.stdout
