"""What a build can use here: the C++ compiler, the CUDA toolkit, the header folders.

`setup.py` builds by these answers and `setup_env.py` reports by them, so they are given in one
place. Standard library only: both run before anything is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

# Headers that torch's CUDA headers include and that a slim toolkit lacks; pip's `nvidia-*`
# packages, which torch depends on, bring them.
_LIBRARY_HEADERS = ("cublas_v2.h", "cusparse.h", "cusolverDn.h")


def find_cxx() -> str | None:
    """Returns the C++ compiler's path: `$CXX`, or else c++, g++ or clang++; None without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    names = named[:1] or ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def has_python_headers() -> bool:
    """Whether Python.h is there; Linux distributions ship it apart (python3-dev)."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def find_cuda_toolkit(torch_cuda: str | None) -> tuple[Path | None, str]:
    """Finds the CUDA toolkit that can compile for a torch built with CUDA `torch_cuda`.

    Args:
        torch_cuda: `torch.version.cuda`, such as "13.2"; None for a torch without CUDA.

    Returns:
        The toolkit's folder and "", or None and the reason in words.
    """
    if torch_cuda is None:
        return None, "this torch is built without CUDA"
    reason = "no CUDA toolkit (nvcc)"
    for home in _toolkit_candidates():
        nvcc = home / "bin" / "nvcc"
        if not nvcc.is_file() or not _runtime_headers(home):
            continue
        release = _nvcc_release(nvcc)
        if release.split(".")[0] == torch_cuda.split(".")[0]:
            return home, ""
        reason = f"nvcc is of CUDA {release or '(unknown)'}, torch is built for CUDA {torch_cuda}"
    return None, reason


def cuda_header_dirs(home: Path, torch_folder: str | Path) -> list[Path]:
    """Returns the folders a CUDA build needs besides `home`/include, which torch adds itself.

    They are the toolkit's own, where it keeps its headers elsewhere (conda), and those of pip's
    `nvidia-*` packages, where the toolkit has not all the libraries' headers. They belong after
    the toolkit's own in the search order (-isystem): the packages may be of a newer release.

    Args:
        home: the toolkit's folder.
        torch_folder: the site-packages that torch, and the packages it depends on, lie in.
    """
    own = _runtime_headers(home)
    extra = [folder for folder in own if folder != home / "include"]
    if not all(any((folder / name).is_file() for folder in own) for name in _LIBRARY_HEADERS):
        extra += sorted(Path(torch_folder, "nvidia").glob("*/include"))
    return extra


def _toolkit_candidates() -> list[Path]:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    homes = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        # The one on PATH may be a link or a wrapper script: both places are looked at, first.
        homes = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent, *homes]
    return list(dict.fromkeys(homes))


def _runtime_headers(home: Path) -> list[Path]:
    folders = [home / "include", *sorted(home.glob("targets/*/include"))]
    found = [folder for folder in folders if (folder / "cuda_runtime.h").is_file()]
    # targets/*/include is often where include/ points to.
    return list({folder.resolve(): folder for folder in reversed(found)}.values())


def _nvcc_release(nvcc: Path) -> str:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    match = re.search(r"release (\d+\.\d+)", answer)
    return match.group(1) if match else ""
