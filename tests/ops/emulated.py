"""The CUDA kernels compiled for the CPU, so that they are tested where there is no GPU.

`csrc/cuda/*.cu` are compiled as C++ with tests/cuda_emulator in place of CUDA's headers. Their
operators live in the dispatcher as `torch.ops.d2det_emulated.<name>`, with the schemas of
`torch.ops.d2det.<name>`, and take tensors on the CPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import toolchain
import torch

import d2det.ops  # noqa: F401  defines torch.ops.d2det
from d2det.ops import _library

NAMESPACE = "d2det_emulated"
ORDERS = ("forward", "reversed", "shuffled")
ORDER_VARIABLE = "D2DET_EMULATOR_ORDER"

_ROOT = Path(__file__).resolve().parents[2]
_EMULATOR = _ROOT / "tests" / "cuda_emulator"
_CACHE = _ROOT / "build" / "cuda_emulator"

_libraries: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def emulated() -> Any:
    """`torch.ops.d2det_emulated`, built once and kept in build/ until a source changes."""
    compiler = toolchain.find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA kernels cannot be emulated")
    if not _libraries:
        path = _build(compiler)
        library = torch.library.Library(NAMESPACE, "DEF")
        for name in _library.references:
            schema = str(getattr(torch.ops.d2det, name).default._schema)
            library.define(schema.removeprefix("d2det::"))
        _libraries.append(library)
        torch.ops.load_library(str(path))
    return getattr(torch.ops, NAMESPACE)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each order in which the threads of a block and the blocks of a grid may run."""
    monkeypatch.setenv(ORDER_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_kernels(request: pytest.FixtureRequest) -> tuple[Any, torch.device]:
    """The operators whose CUDA kernels are tested, and the device of their tensors."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated"), torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if _library.implementation("deform_roi_pool", "cuda") != "compiled":
        pytest.skip("the extension was built without CUDA")
    return torch.ops.d2det, torch.device("cuda")


def _build(compiler: str) -> Path:
    sources = [*sorted((_ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(_EMULATOR.glob("*.cpp"))]
    headers = [*(_ROOT / "csrc").rglob("*.h"), *(_ROOT / "csrc").rglob("*.cuh")]
    headers += _EMULATOR.glob("*.h")
    flags = _flags()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    shared = _digest([torch.__version__, version, *flags], sorted(headers))
    _CACHE.mkdir(parents=True, exist_ok=True)
    objects = [_CACHE / f"{s.stem}-{_digest([shared], [s])}.o" for s in sources]
    library = _CACHE / f"emulated-{_digest([shared], sources)}.so"
    if library.is_file():
        return library
    missing = [(s, o) for s, o in zip(sources, objects, strict=True) if not o.is_file()]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for failure in pool.map(lambda pair: _run([compiler, *flags, "-c"], *pair), missing):
            if failure:
                pytest.fail(failure, pytrace=False)
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    names = [str(o) for o in objects]
    if failure := _run([compiler, "-shared", *names, *link], None, library):
        pytest.fail(failure, pytrace=False)
    _remove_old(library, *objects)
    return library


def _flags() -> list[str]:
    """As setup.py compiles, but for a CPU, and quickly."""
    setup = (_ROOT / "setup.py").read_text()
    target = re.search(r'"TORCH_TARGET_VERSION", "(\w+)"', setup)
    assert target is not None
    include = Path(torch.__file__).parent / "include"
    return [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-DD2DET_EMULATE_CUDA",
        f"-DTORCH_TARGET_VERSION={target[1]}",
        f"-I{_ROOT / 'csrc'}",
        f"-I{_EMULATOR}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
    ]


def _run(command: list[str], source: Path | None, target: Path) -> str:
    """Runs a compiler; returns what went wrong, or ""."""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    inputs = ["-x", "c++", str(source)] if source else []
    done = subprocess.run(
        [*command, *inputs, "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"{' '.join([*command, *inputs])}\n{done.stdout}{done.stderr}"
    partial.replace(target)  # whole, whoever else builds at the same time
    return ""


def _digest(texts: list[str], files: list[Path]) -> str:
    content = hashlib.sha256("\0".join(texts).encode())
    for path in files:
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def _remove_old(*current: Path) -> None:
    """Keeps the newest few builds of the cache."""
    files = sorted(_CACHE.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in files[60:]:
        if path not in current:
            path.unlink(missing_ok=True)
