"""One build for every processor: what may use AVX is only what the choice at run time guards."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from d2det.ops import _library

pytestmark = pytest.mark.skipif(
    _library.extension.path is None or shutil.which("objdump") is None,
    reason="no compiled extension, or no objdump",
)
WIDE_REGISTER = re.compile(r"%[yz]mm\d")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def functions_with_wide_registers() -> set[str]:
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(_library.extension.path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, name = set(), ""
    for line in listing.splitlines():
        if label := FUNCTION.match(line):
            name = label[1]
        elif WIDE_REGISTER.search(line):
            found.add(name)
    return found


def test_wide_instructions_are_only_in_what_is_chosen_at_run_time():
    """A template of the standard library compiled for AVX would be shared with the portable code:
    the linker keeps one copy (csrc/cpu/kernels.h)."""
    found = functions_with_wide_registers()
    guarded = ("d2det::avx2::", "d2det::avx512::", "d2det::avx512_bf16::")
    if platform.machine() == "x86_64":
        assert any("d2det::avx512::" in name for name in found)
    assert {name for name in found if not any(g in name for g in guarded)} == set()
