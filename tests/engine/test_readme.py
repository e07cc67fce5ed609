"""The README's commands and code are those that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

from d2det.engine.arguments import argument_parser
from d2det.engine.setup import get_cfg

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands(program: str) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", "", README)
    lines = [line for line in joined.splitlines() if line.startswith(f".venv/bin/python {program}")]
    return [shlex.split(line)[2:] for line in lines]


def test_python_block_runs(finished_run, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").symlink_to(finished_run)
    cv2.imwrite("photo.jpg", np.random.default_rng(0).integers(0, 256, (60, 90, 3)))
    exec(code, {})
    assert "Boxes" in capsys.readouterr().out


def test_train_net_commands_parse_and_name_real_keys():
    lines = commands("train_net.py")
    assert lines
    for line in lines:
        args = argument_parser().parse_args(line)
        cfg = get_cfg(args.config_file)
        cfg.merge_from_list(args.opts)


def test_keys_that_the_text_names_exist():
    cfg = get_cfg()
    names = set(re.findall(r"`((?:MODEL|SOLVER|TEST)\.[A-Z0-9_.]+)", README))
    assert len(names) >= 8
    for name in names:
        node = cfg
        for part in name.split("."):
            assert part in node, name
            node = node[part]


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (Path(__file__).parents[2] / target).exists()
