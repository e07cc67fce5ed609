"""What is installed, and that building it asks for no more than the machine has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import toolchain
from project import Project

import d2det

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "tools", "configs", "d2det")
BUILD_WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"

needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project whose one kernel source is plain C++, quick to compile."""
    tree = tmp_path / "tree"
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").write_text("readme\n")
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "cpu" / "marker.cpp").write_text('extern "C" int marker() { return 7; }\n')
    return tree


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel as pip does, but in this environment and hence without a network."""
    environ = os.environ | {"FORCE_CUDA": "0"} | variables
    command = [sys.executable, "-c", BUILD_WHEEL]
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)


def contents(tree: Path) -> tuple[str, set[str]]:
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist())


def test_without_torch_the_wheel_is_complete_but_for_kernels(tree: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # What an import of torch comes to in pip's isolated build.
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    built = build(tree, PYTHONPATH=str(hidden))
    assert built.returncode == 0, built.stderr
    assert "no compiled kernels: torch cannot be imported" in built.stderr
    name, files = contents(tree)
    assert name == f"d2det-{d2det.__version__}-py3-none-any.whl"
    modules = {path.relative_to(tree).as_posix() for path in (tree / "d2det").rglob("*.py")}
    configs = {f"d2det/{p.relative_to(tree)}" for p in (tree / "configs").rglob("*.yaml")}
    assert len(configs) > 5
    assert modules | configs | {"d2det/py.typed"} <= files
    assert not [file for file in files if file.startswith(("tests", "tools", "configs", "csrc"))]


def test_without_a_compiler_the_wheel_has_no_kernels(tree: Path) -> None:
    built = build(tree, CXX="no-such-compiler")
    assert built.returncode == 0, built.stderr
    assert "no compiled kernels: there is no C++ compiler" in built.stderr
    assert "py3-none-any" in contents(tree)[0]


@needs_compiler
def test_with_a_compiler_the_wheel_has_kernels(tree: Path) -> None:
    built = build(tree)
    assert built.returncode == 0, built.stdout + built.stderr
    name, files = contents(tree)
    assert "d2det/_C.abi3.so" in files
    # For every Python from 3.11 on, on this kind of machine only.
    assert "-cp311-abi3-" in name and "any.whl" not in name


@needs_compiler
def test_a_compiler_that_fails_ends_the_build(tree: Path) -> None:
    (tree / "csrc" / "broken.cpp").write_text("#error this cannot be compiled\n")
    built = build(tree)
    assert built.returncode != 0
    assert "this cannot be compiled" in built.stdout + built.stderr


def test_cuda_kernels_that_are_insisted_on_are_not_left_out_silently(tree: Path) -> None:
    (tree / "csrc" / "op.cu").touch()
    built = build(tree, FORCE_CUDA="1", CUDA_HOME="nowhere")
    assert built.returncode != 0
    assert "FORCE_CUDA=1, but" in built.stderr


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert Project.read(ROOT).version == d2det.__version__


def test_one_commit_of_detectron2_is_named_everywhere() -> None:
    found = {
        match
        for text in _texts().values()
        for match in re.findall(r"detectron2(?:\.git)?@([0-9a-f]{7,40})\b", text)
    }
    assert found <= {d2det.DETECTRON2_COMMIT}


def test_no_path_of_somebodys_machine_is_in_the_tree() -> None:
    # Assembled, so that this line is not found itself.
    places = "|".join(["home", "root", "work", "Users", "mnt", "opt", "tmp", "data"])
    pattern = re.compile(rf"(?<![\w.}})$*-])/(?:{places})/[\w.]+")
    texts = _texts()
    assert len(texts) > 50
    found = {name: hits for name, text in texts.items() if (hits := pattern.findall(text))}
    assert found == {}


def _texts() -> dict[str, str]:
    """The project's text files by name, those that git ignores left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    texts = {}
    for name in listed.stdout.splitlines():
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture, or a file deleted just now
    return texts
