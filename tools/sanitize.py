#!/usr/bin/env python3
"""Look for memory errors and undefined behaviour in the compiled kernels; exit 1 if there are any.

On CPU the extension is built into a temporary folder with AddressSanitizer and
UndefinedBehaviorSanitizer (GCC), and the operators' tests run against it, once for each instruction
set of this processor. On a GPU the same tests run under compute-sanitizer, for the kernels that are
installed. What cannot run here is said, and is no failure unless it was asked for by name.

    python tools/sanitize.py                        # CPU, and the GPU where there is one
    python tools/sanitize.py --device cpu --isa avx2 -- -k soft_nms
    python tools/sanitize.py --device cuda --tool memcheck racecheck initcheck
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import toolchain

ROOT = Path(__file__).resolve().parent.parent
# Two files that test no kernel: the seam to Python, and which instructions the compiler chose.
TESTS = ["tests/ops", "--ignore=tests/ops/test_ops_library.py", "-p", "no:cacheprovider"]
TESTS += ["--ignore=tests/ops/test_ops_portability.py"]
# Both would come between the sanitizers' reports, on standard error, and us.
TESTS += ["-p", "no:faulthandler", "--capture=no"]
FLAGS = "-fsanitize=address,undefined -fsanitize-recover=address -fno-omit-frame-pointer -g"
# Python and torch leak by design; a wrong access is reported, and the run goes on to the next.
ASAN = "detect_leaks=0:halt_on_error=0:detect_odr_violation=0:alloc_dealloc_mismatch=0"
FINDING = re.compile(
    r"ERROR: AddressSanitizer: .*|.*: runtime error: .*"
    r"|={9} (?:Invalid|Uninitialized|Error: |Barrier error) ?.*|={9} ERROR SUMMARY: [1-9].*"
)
_TRACE_LINES = 40
PROBE = (
    "from d2det.ops._build_info import build_info as b; from d2det.ops._library import extension as"
    " e; i = b(e.path); print(i['instruction sets'], i['instruction set'], sep='\\n')"
)
PROBE_GPU = (
    "import torch; from d2det.ops._library import extension as e; "
    "print(torch.cuda.is_available(), e.cuda_path)"
)


class CannotRun(Exception):
    """A check that this machine cannot do; the message says why."""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def preloaded(compiler: str) -> str:
    """Libraries that must be in the process before Python: ASan's, and the one with C++ throw."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(path).is_absolute():
            raise CannotRun(f"{compiler} has no {name}: GCC with its sanitizers is needed")
        paths.append(path)
    return " ".join(paths)


def build(folder: Path, compiler: str) -> Path:
    """Build the CPU library with the sanitizers; returns the folder that it is in."""
    done = python(
        *("setup.py", "-q", "build_ext"),
        *("--build-temp", str(folder / "objects"), "--build-lib", str(folder)),
        CXX=compiler,
        CFLAGS=FLAGS,
        LDFLAGS=FLAGS,
        FORCE_CUDA="0",
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nthe build with sanitizers failed")
    return folder / "d2det"


def findings_of(text: str) -> list[str]:
    """Each finding once, with the first place in csrc/ that its stack trace names."""
    found = []
    for match in FINDING.finditer(text):
        trace = text[match.end() : match.end() + 4000].split("\n\n")[0]
        place = None if "csrc/" in match.group() else re.search(r"csrc/\S+:\d+", trace)
        # Addresses and process numbers differ from run to run.
        what = re.sub(r"==\d+==| on (unknown )?address.*| at (pc )?0x.*", "", match.group())
        found.append(f"{what.strip()}{f' [{place.group()}]' if place else ''}")
    return list(dict.fromkeys(found))


def report(title: str, done: subprocess.CompletedProcess[str], text: str) -> bool:
    """Print how a run of the tests ended, its findings and the first trace; whether all is well."""
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    findings = findings_of(text)
    print(f"{title}: {len(findings)} findings; {summary}", flush=True)
    for finding in findings:
        print(f"  {finding}")
    if findings:
        first = FINDING.search(text)
        lines = text[first.start() if first else 0 :].splitlines()[:_TRACE_LINES]
        print("\n".join(["first report:", *(f"    {line[:160]}" for line in lines), ""]))
    elif done.returncode:
        print(f"{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return not findings and done.returncode == 0


def check_cpu(args: argparse.Namespace) -> bool:
    compiler = toolchain.find_cxx()
    if compiler is None or sys.platform != "linux":
        raise CannotRun("a C++ compiler on Linux is needed")
    libraries = preloaded(compiler)
    with tempfile.TemporaryDirectory(prefix="d2det-sanitize-") as name:
        folder = (args.folder or Path(name)).absolute()
        extension = build(folder, compiler)
        common = {
            "D2DET_EXTENSION": str(extension),
            "D2DET_DISABLE_EXTENSION": "0",
            "LD_PRELOAD": libraries,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "ASAN_OPTIONS": ASAN,
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        probe = python("-c", PROBE, **{**common, "D2DET_CPU_CAPABILITY": ""})
        if probe.returncode:
            sys.exit(f"{probe.stderr}\nthe extension with sanitizers does not load")
        compiled, best = (line.split() for line in probe.stdout.splitlines()[-2:])
        present = compiled[: compiled.index(best[0]) + 1]
        clean = True
        for isa in args.isa or present:
            if isa not in present:
                raise CannotRun(f"this processor runs {', '.join(present)}, not {isa}")
            command = ("-m", "pytest", "-q", *TESTS, "-m", "not gpu", *args.pytest)
            done = python(*command, **common, D2DET_CPU_CAPABILITY=isa)
            clean &= report(f"CPU, {isa}", done, done.stderr)
    return clean


def check_gpu(args: argparse.Namespace) -> bool:
    available, _, library = (
        python("-c", PROBE_GPU).stdout.strip().rpartition("\n")[2].partition(" ")
    )
    if available != "True":
        raise CannotRun("torch sees no CUDA device")
    if library == "None":
        raise CannotRun("no kernels for CUDA are installed (python -m d2det.ops)")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin"
    )
    if tool is None:
        raise CannotRun("no compute-sanitizer, which comes with the CUDA toolkit")
    clean = True
    for name in args.tool:
        # torch's allocator would hide what runs past a tensor; only d2det's kernels are looked at.
        options = ["--tool", name, "--kernel-name", "kns=d2det", "--error-exitcode", "9"]
        options += ["--report-api-errors", "no"]  # torch tries calls that may fail
        tests = [sys.executable, "-m", "pytest", "-q", *TESTS, "-m", "gpu", *args.pytest]
        done = subprocess.run(
            [tool, *options, "--target-processes", "all", *tests],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        clean &= report(f"GPU, {name}", done, done.stdout + done.stderr)
    return clean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default both")
    parser.add_argument("--isa", nargs="+", help="instruction sets; by default all there are")
    parser.add_argument(
        "--tool", nargs="+", default=["memcheck"],
        choices=("memcheck", "racecheck", "initcheck", "synccheck"),
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="build there, and keep it for another run")
    parser.add_argument("pytest", nargs="*", help="after --: further arguments for pytest")
    args = parser.parse_args()
    clean = True
    for device, check in (("cpu", check_cpu), ("cuda", check_gpu)):
        if args.device in (None, device):
            try:
                clean &= check(args)
            except CannotRun as error:
                print(f"{device}: NOT RUN: {error}")
                clean &= args.device is None
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
