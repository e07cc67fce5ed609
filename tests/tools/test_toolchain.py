"""tools/toolchain.py: which compiler and which CUDA toolkit a build may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import toolchain


def program(path: Path, says: str = "", status: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, release: str, headers: tuple[str, ...] = ()) -> Path:
    program(home / "bin" / "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    (home / "include").mkdir()
    for name in ("cuda_runtime.h", *headers):
        (home / "include" / name).touch()
    return home


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither compilers nor toolkits, but for those a test makes."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    standard = Path("/usr/local/cuda")
    found = toolchain._toolkit_candidates
    monkeypatch.setattr(
        toolchain, "_toolkit_candidates", lambda: [home for home in found() if home != standard]
    )


def test_compiler_is_looked_for_under_its_usual_names(tmp_path: Path) -> None:
    assert toolchain.find_cxx() is None
    clang = program(tmp_path / "path" / "clang++")
    assert toolchain.find_cxx() == str(clang)
    gcc = program(tmp_path / "path" / "g++")
    assert toolchain.find_cxx() == str(gcc)


def test_a_named_compiler_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "path" / "g++")
    ccache = program(tmp_path / "path" / "ccache")
    monkeypatch.setenv("CXX", "ccache my-g++ -m64")
    assert toolchain.find_cxx() == str(ccache)
    monkeypatch.setenv("CXX", "not-installed-g++")
    assert toolchain.find_cxx() is None


def test_toolkit_needs_the_major_release_torch_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolchain.find_cuda_toolkit("13.2") == (home, "")
    found, reason = toolchain.find_cuda_toolkit("12.8")
    assert found is None
    assert "13.0" in reason
    assert "12.8" in reason


def test_no_toolkit_and_no_cuda_are_told_apart() -> None:
    assert toolchain.find_cuda_toolkit("13.2") == (None, "no CUDA toolkit (nvcc)")
    assert toolchain.find_cuda_toolkit(None) == (None, "this torch is built without CUDA")


def test_a_wrapper_on_path_is_not_taken_for_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "wrapper" / "bin" / "nvcc", "release 13.0")
    home = toolkit(tmp_path / "real", "13.1")
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper" / "bin"))
    assert toolchain.find_cuda_toolkit("13.2")[0] is None  # a compiler without its headers
    monkeypatch.setenv("CUDA_PATH", str(home))
    assert toolchain.find_cuda_toolkit("13.2")[0] == home


def test_a_linked_nvcc_leads_to_its_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "real", "13.1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert toolchain.find_cuda_toolkit("13.2")[0] == home


def test_header_packages_fill_in_only_for_a_slim_toolkit(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    (packages / "nvidia" / "cu13" / "include").mkdir(parents=True)
    full = toolkit(tmp_path / "full", "13.0", ("cublas_v2.h", "cusparse.h", "cusolverDn.h"))
    assert toolchain.cuda_header_dirs(full, packages) == []
    slim = toolkit(tmp_path / "slim", "13.0", ("cublas_v2.h",))
    assert toolchain.cuda_header_dirs(slim, packages) == [packages / "nvidia" / "cu13" / "include"]


def test_headers_of_a_toolkit_that_keeps_them_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "conda"
    program(home / "bin" / "nvcc", "release 13.0")
    headers = home / "targets" / "x86_64-linux" / "include"
    headers.mkdir(parents=True)
    for name in ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"):
        (headers / name).touch()
    assert toolchain.cuda_header_dirs(home, tmp_path) == [headers]
