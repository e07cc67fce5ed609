"""The seam between Python and the extension: schemas, the choice of kernels, the one warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import d2det.ops
from d2det.ops import _library

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "adaptive_weighted_pool",
    "deform_roi_pool",
    "modulated_deform_conv2d",
    "soft_nms",
)
# Uses two operators, forward and backward, and then says what it saw.
PROGRAM = """
import warnings
import torch
import d2det.ops as ops
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        x = torch.randn(1, 2, 4, 4, requires_grad=True)
        ops.adaptive_weighted_pool(x, x).sum().backward()
        ops.modulated_deform_conv2d(
            x, x.new_zeros(1, 18, 2, 2), None, x.new_zeros(1, 2, 3, 3)
        ).sum().backward()
messages = [str(w.message) for w in seen if "reference implementation" in str(w.message)]
print(len(messages))
print("\\n".join(messages))
"""


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(d2det.ops.__file__).resolve().parents[2],
    )


def run(*arguments: str, **environment: str) -> str:
    """Standard output of such a Python, which must end well."""
    done = start(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_schemas_equal_those_of_the_extension():
    text = (ROOT / "csrc" / "library.cpp").read_text()
    definitions = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)", text)
    found = {}
    for definition in definitions:
        schema = torch._C.parse_schema("d2det::" + "".join(re.findall(r'"([^"]*)"', definition)))
        found[schema.name.removeprefix("d2det::")] = schema
    assert set(found) == set(_library.references)
    for name, schema in found.items():
        assert schema == getattr(torch.ops.d2det, name).default._schema
        assert str(schema) == str(getattr(torch.ops.d2det, name).default._schema)


def test_every_operator_but_soft_nms_has_a_backward():
    expected = {*NAMES, *(f"{n}_backward" for n in NAMES if n != "soft_nms")}
    assert set(_library.references) == expected


def test_another_schema_in_the_extension_is_refused():
    """As after an update of the Python files without a rebuild."""
    with pytest.raises(ImportError, match=r"built from other sources.*pip install"):
        _library.define(
            "soft_nms(Tensor boxes) -> Tensor",
            reference=lambda boxes: boxes,
            fake=lambda boxes: boxes,
        )
    assert "soft_nms" in _library.references


def test_one_warning_a_process_names_what_runs_the_reference():
    count, message = run("-c", PROGRAM, D2DET_DISABLE_EXTENSION="1").split("\n", 1)
    assert count == "1"
    assert f"reference implementation of {', '.join(NAMES)} on cpu" in message
    assert "switched off by D2DET_DISABLE_EXTENSION" in message
    assert "pip install" not in message  # it would not help


def test_warning_with_what_is_installed_here_is_true():
    output = run("-c", PROGRAM, D2DET_DISABLE_EXTENSION="0")
    slow = [n for n in NAMES if _library.implementation(n, "cpu") == "reference"]
    used = {"adaptive_weighted_pool", "modulated_deform_conv2d"}
    if used & set(slow):
        assert output.startswith("1\n")
        assert f"reference implementation of {', '.join(slow)} on cpu" in output
    else:
        assert "adaptive_weighted_pool" not in output.split(" on cpu")[0]
    for name in set(NAMES) - set(slow):
        assert name not in output.split(" on cpu")[0]
    if _library.extension.path is None:
        assert "pip install --no-build-isolation ." in output


def test_disabling_the_extension_leaves_references_only():
    output = run("-m", "d2det.ops", D2DET_DISABLE_EXTENSION="1")
    assert "compiled" not in output.replace("compiled extension", "")
    assert "switched off by D2DET_DISABLE_EXTENSION" in output


def test_listing_names_every_operator():
    output = run("-m", "d2det.ops", D2DET_DISABLE_EXTENSION="0")
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()[1:] if line}
    for name in _library.references:
        assert rows[name][0] == _library.implementation(name, "cpu")


def test_an_extension_that_does_not_load_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv(_library.DISABLE_VARIABLE, raising=False)
    assert "No compiled extension is installed" in _library._Extension(tmp_path).reason
    (tmp_path / "_C.so").write_text("not a library")
    broken = _library._Extension(tmp_path)
    assert broken.path is None
    assert "does not load" in broken.reason
    assert "pip install" in broken.reason


def test_another_build_can_be_named(tmp_path):
    if _library.extension.path is None:
        pytest.skip("no compiled extension here")
    copy = shutil.copy(_library.extension.path, tmp_path)
    output = run("-m", "d2det.ops", D2DET_EXTENSION=str(tmp_path), D2DET_DISABLE_EXTENSION="0")
    assert f"extension: {copy}\n" in output


def test_a_named_build_that_is_not_there_is_an_error(tmp_path):
    """No other takes its place: a test of that build would test nothing."""
    done = start("-m", "d2det.ops", D2DET_EXTENSION=str(tmp_path), D2DET_DISABLE_EXTENSION="0")
    assert done.returncode != 0
    assert f"ImportError: D2DET_EXTENSION={tmp_path}" in done.stderr


@pytest.mark.parametrize("wanted", ["", "portable"])
def test_listing_says_what_the_extension_was_built_with(wanted):
    if _library.extension.path is None:
        pytest.skip("no compiled extension here")
    output = run("-m", "d2det.ops", D2DET_CPU_CAPABILITY=wanted, D2DET_DISABLE_EXTENSION="0")
    facts = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
    assert facts["extension"] == str(_library.extension.path)
    assert re.fullmatch(r"\S+; the extension was built with \d+\.\d+\.\d+", facts["torch"])
    assert facts["torch"].startswith(torch.__version__)
    present = facts["instruction sets"].split()
    assert present[0] == "portable"
    used = facts["instruction set used on this processor"]
    assert used in present
    assert used == (wanted or used)
    capability = torch.backends.cpu.get_cpu_capability()
    if not wanted and len(present) > 1 and capability in ("AVX2", "AVX512"):
        assert used.startswith(capability.lower())


def test_a_wrong_instruction_set_is_told_not_thrown():
    if _library.extension.path is None:
        pytest.skip("no compiled extension here")
    output = run("-m", "d2det.ops", D2DET_CPU_CAPABILITY="mmx", D2DET_DISABLE_EXTENSION="0")
    assert "D2DET_CPU_CAPABILITY must be portable, avx2, avx512 or avx512_bf16, got mmx" in output


def test_soft_nms_is_compiled_where_the_extension_is():
    if _library.extension.path is None:
        pytest.skip("no compiled extension here")
    assert _library.implementation("soft_nms", "cpu") == "compiled"
    assert _library.implementation("deform_roi_pool", "meta") == "reference"
