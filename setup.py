"""Builds the compiled kernels where that is possible; all else is said in pyproject.toml.

Without torch (pip's isolated build), without a C++ compiler or without sources there is no
extension, and every operator runs its reference implementation in PyTorch. A compiler that is
there and fails ends the build.

Environment: FORCE_CUDA=1 insists on the CUDA kernels, FORCE_CUDA=0 leaves them out;
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to torch.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402  (found through the line above)

# Where no GPU tells what to build for: Ampere, Ada and Hopper, newer ones through PTX.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"

# The extension uses torch's stable ABI as of torch 2.11, so that it runs with every later torch,
# whichever one it was built with.
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000")]


class BuildPyWithConfigs(build_py):
    """Puts configs/ into the package as d2det/configs. A clone uses the folder where it lies."""

    def _configs(self) -> list[tuple[Path, Path]]:
        if self.editable_mode:
            return []
        sources = (p for p in sorted((ROOT / "configs").rglob("*")) if p.is_file())
        target = Path(self.build_lib, "d2det", "configs")
        pairs = [(path, target / path.relative_to(ROOT / "configs")) for path in sources]
        return [pair for pair in pairs if "__pycache__" not in pair[0].parts]

    def run(self) -> None:
        super().run()
        for source, target in self._configs():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [str(path) for _, path in self._configs()]


def sources(suffix: str) -> list[str]:
    """The files of csrc/ with this suffix, relative to the project, as setuptools wants them."""
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob(suffix))]


def extension_arguments() -> dict[str, Any]:
    """The part of setup()'s arguments that depends on the machine; empty without a build."""
    if not sources("*.cpp"):
        return {}
    try:
        import torch
    except (ImportError, OSError) as error:
        return _without_kernels(f"torch cannot be imported here ({error})")
    cxx = toolchain.find_cxx()
    if cxx is None:
        return _without_kernels("there is no C++ compiler")
    if shutil.which("c++") is None:
        os.environ.setdefault("CXX", cxx)  # torch would otherwise insist on c++

    cuda = _cuda_home(torch.version.cuda)
    if cuda is not None:
        os.environ["CUDA_HOME"] = str(cuda)  # read when cpp_extension is imported
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = _present_gpus() or DEFAULT_ARCHITECTURES
    from torch.utils import cpp_extension

    flags = ["-O3", "-g0", "-fvisibility=hidden"]
    common = {
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": STABLE_ABI,
        "depends": sources("*.h") + sources("*.cuh"),
        "py_limited_api": True,
    }
    extensions = [
        cpp_extension.CppExtension(
            "d2det._C", sources("*.cpp"), extra_compile_args={"cxx": flags}, **common
        )
    ]
    if cuda is not None:
        # A library of its own: where it does not load, for a torch without CUDA, the other does.
        headers = toolchain.cuda_header_dirs(cuda, Path(torch.__file__).parent.parent)
        system = [part for folder in headers for part in ("-isystem", str(folder))]
        common["define_macros"] = [
            *STABLE_ABI,
            ("USE_CUDA", None),  # opens torch's CUDA calls
            ("D2DET_CUDA_ARCHITECTURES", os.environ["TORCH_CUDA_ARCH_LIST"]),
        ]
        nvcc = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden", *system]
        extensions.append(
            cpp_extension.CUDAExtension(
                "d2det._C_cuda",
                sources("*.cu"),
                extra_compile_args={"cxx": flags + system, "nvcc": nvcc},
                **common,
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        # They use nothing of Python's: one wheel for every Python that d2det runs on.
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def _present_gpus() -> str:
    """The architectures of this machine's GPUs, the newest one's also for later ones (PTX)."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX" * bool(found)


def _cuda_home(torch_cuda: str | None) -> Path | None:
    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0" or not sources("*.cu"):
        return None
    home, reason = toolchain.find_cuda_toolkit(torch_cuda)
    if home is None and forced == "1":
        raise SystemExit(f"d2det: FORCE_CUDA=1, but {reason}")
    if home is None:
        print(f"d2det: CPU kernels only: {reason}", file=sys.stderr)
    return home


def _without_kernels(reason: str) -> dict[str, Any]:
    print(f"d2det: no compiled kernels: {reason}", file=sys.stderr)
    return {}


arguments = extension_arguments()
arguments.setdefault("cmdclass", {})["build_py"] = BuildPyWithConfigs
setup(**arguments)
