"""What the search for memory errors takes for a finding, and how it ends."""

from __future__ import annotations

import subprocess

import pytest
import sanitize

ASAN = "==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x6040 at pc 0x7f"
FINDINGS = [
    ASAN,
    "csrc/cpu/a.cpp:12:7: runtime error: signed integer overflow: 1 + 2147483647",
    "========= Invalid __global__ write of size 4 bytes",
    "========= Uninitialized __global__ memory read of size 4 bytes",
    "========= Error: Race reported between Write access at 0x90 and Read access at 0xa0",
    "========= ERROR SUMMARY: 1 error",
]


def ended(code: int) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout="70 passed in 8.00s\n", stderr="")


@pytest.mark.parametrize("line", FINDINGS)
def test_findings_are_seen_though_the_tests_pass(line, capsys):
    assert not sanitize.report("CPU, avx2", ended(0), f"first\n{line}\n    #0 0x7f\n{line}\n")
    assert "CPU, avx2: 1 findings; 70 passed" in capsys.readouterr().out


def test_a_finding_is_told_once_with_its_place_in_the_sources():
    trace = "WRITE of size 4 at 0x60\n    #0 0x7f in run<float> x/csrc/cpu/a.cpp:140\n\n"
    other = ASAN.replace("0x6040", "0x6055").replace("==7==", "==8==")
    text = f"{ASAN}\n{trace}passing\n{other}\n{trace}{FINDINGS[1]}\n{FINDINGS[2]}\n"
    assert sanitize.findings_of(text) == [
        "ERROR: AddressSanitizer: heap-buffer-overflow [csrc/cpu/a.cpp:140]",
        FINDINGS[1],
        FINDINGS[2],
    ]


@pytest.mark.parametrize(
    "text", ["", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"]
)
def test_no_finding_is_clean_if_the_tests_pass(text):
    assert sanitize.report("GPU, memcheck", ended(0), text)
    assert not sanitize.report("GPU, memcheck", ended(1), text)


def test_what_cannot_run_fails_only_where_it_was_asked_for(monkeypatch, capsys):
    def cannot(args):
        raise sanitize.CannotRun("no GPU")

    monkeypatch.setattr(sanitize, "check_cpu", lambda args: True)
    monkeypatch.setattr(sanitize, "check_gpu", cannot)
    for flags, code in (([], 0), (["--device", "cpu"], 0), (["--device", "cuda"], 1)):
        monkeypatch.setattr("sys.argv", ["sanitize.py", *flags])
        with pytest.raises(SystemExit) as end:
            sanitize.main()
        assert end.value.code == code
    assert "cuda: NOT RUN: no GPU" in capsys.readouterr().out
