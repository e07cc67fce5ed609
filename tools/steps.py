"""The steps of the set-up, one function each, in their order. Standard library only.

A step that this machine cannot take returns a `Gap` and the set-up goes on; one that was taken and
failed raises `SetupError`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import toolchain
from environment import Environment, SetupError, probe
from project import Project, release_of

DETECTRON2_URL = "https://github.com/facebookresearch/detectron2.git"
GET_COMPILER = (
    "install a C++ compiler (Debian, Ubuntu: sudo apt install g++; macOS: xcode-select "
    "--install), then type the same command again"
)
PIP_FAILED = (
    "pip could not install the packages. It says:\n{reason}\n"
    "Where the package index does not answer, check the network (`pip config list` shows which "
    "index and proxy are used), then type the same command again. All of the output: {log}"
)


class Gap(NamedTuple):
    """Something that could not be set up on this machine."""

    missing: str
    why: str
    works: str
    remedy: str
    retry: bool = False  # worth another try at every call, without any change here


def has_fitting_torch(about: dict[str, Any], minimum: tuple[int, int]) -> bool:
    """Whether an interpreter (see `probe`) imports a torch that is new enough, and torchvision."""
    return release_of(about.get("torch", "")) >= minimum and "torchvision" in about


def say(step: int, text: str) -> None:
    print(f"[{step}/5] {text}", flush=True)


def make_environment(env: Environment, project: Project, interpreter: str, remake: bool) -> None:
    if env.is_usable() and not remake:
        say(1, f"virtual environment {env.venv}: there")
        return
    base = probe(interpreter)
    keeps = has_fitting_torch(base, project.minimum_torch)
    what = f", sharing its torch {base['torch']}" if keeps else ""
    say(1, f"virtual environment {env.venv}, made with Python {base['python']}{what}")
    env.create(interpreter, base if keeps else None)


def install_torch(env: Environment, project: Project) -> dict[str, Any]:
    """Installs torch and torchvision unless they fit; returns the environment's `probe`."""
    about = probe(env.python)
    if has_fitting_torch(about, project.minimum_torch):
        say(2, f"torch {about['torch']}, torchvision {about['torchvision']}: there, kept")
        return about
    say(2, "torch and torchvision (some GB to download, once)")
    wanted = project.torch_requirements
    _pip_or_stop(env, *wanted)
    about = probe(env.python)
    if not has_fitting_torch(about, project.minimum_torch):
        found = about.get("error", f"torch {about.get('torch')}")
        raise SetupError(f"{' and '.join(wanted)} were installed and do not work: {found}")
    return about


def install_packages(env: Environment, project: Project, about: dict[str, Any]) -> None:
    say(3, "the other packages")
    # "wheel" and "ninja": detectron2 is built without isolation, and in parallel with ninja.
    packages = [*project.build_requires, *project.dependencies, *project.development]
    _pip_or_stop(env, *_pins(env, about), "wheel", "ninja", *packages)


def install_detectron2(env: Environment, project: Project, about: dict[str, Any]) -> Gap | None:
    """Builds detectron2 at the pinned commit against the torch that is there."""
    commit = project.detectron2_commit
    if _detectron2_fits(env, commit):
        say(4, f"detectron2 {commit[:7]}: there, kept")
        return None
    obstacle = detectron2_obstacle()
    if obstacle:
        say(4, "detectron2: not possible here, see below")
        return obstacle
    say(4, f"detectron2 {commit[:7]} (compiles, some minutes)")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "detectron2.git")
        # Fetched apart from the build, so that a network that fails and a compiler that fails are
        # not taken for one another.
        git = {"GIT_TERMINAL_PROMPT": "0", "GIT_HTTP_LOW_SPEED_LIMIT": "1000"}
        git["GIT_HTTP_LOW_SPEED_TIME"] = "60"
        fetched = env.run("git", "clone", "--quiet", "--bare", DETECTRON2_URL, clone, env=git)
        if not fetched.ok:
            return _no_github(fetched.reason(1).strip())
        # pip is given the true address, for its records, and git the copy behind it.
        redirect = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{clone}.insteadOf",
            "GIT_CONFIG_VALUE_0": DETECTRON2_URL,
        }
        built = env.pip_install(
            *("--no-build-isolation", "--no-cache-dir", "--no-deps", "--force-reinstall"),
            f"git+{DETECTRON2_URL}@{commit}",
            env=redirect | detectron2_build_variables(about),
        )
    if not built.ok:
        raise SetupError(
            f"detectron2 was fetched and could not be built. It says:\n"
            f"{built.reason()}\nAll of it: {env.log}"
        )
    _pip_or_stop(env, *_pins(env, about), "detectron2")  # there already: adds what it needs
    if not _detectron2_fits(env, commit):
        raise SetupError(
            "detectron2 was built and cannot be imported: "
            f"\"{env.python} -c 'import detectron2._C'\" says why"
        )
    return None


def install_d2det(env: Environment, project: Project, about: dict[str, Any]) -> Gap | None:
    """Installs d2det editable and compiles its kernels where there is a compiler."""
    has_sources = any((project.root / "csrc").rglob("*.cpp"))
    cuda_sources = any((project.root / "csrc").rglob("*.cu"))
    say(5, "d2det, editable" + (" (compiles its kernels)" if has_sources else ""))
    home, reason = toolchain.find_cuda_toolkit(about["torch_cuda"])
    variables = {}
    if cuda_sources and home is not None and not about["gpu"] and "FORCE_CUDA" not in os.environ:
        variables["FORCE_CUDA"] = "0"  # minutes of compiling what nothing here can run
        print("      CPU kernels only: no GPU here (FORCE_CUDA=1 builds for CUDA too)", flush=True)
    installed = env.pip_install(
        "--no-build-isolation", "--no-deps", "-e", project.root, env=variables
    )
    if not installed.ok:
        raise SetupError(
            f"d2det could not be built. It says:\n{installed.reason()}\nAll of it: {env.log}"
        )
    if has_sources and toolchain.find_cxx() is None:
        return Gap(
            missing="d2det's compiled kernels",
            why="there is no C++ compiler",
            works="everything, through the reference implementations in PyTorch (slower)",
            remedy=GET_COMPILER,
        )
    if cuda_sources and home is None:
        print(f"      CPU kernels only: {reason}", flush=True)
        if about["gpu"]:
            return Gap(
                missing="d2det's CUDA kernels",
                why=reason,
                works="everything; on the GPU through the reference implementations (slower)",
                remedy=f"install a CUDA toolkit {about['torch_cuda']} (nvcc on PATH or CUDA_HOME), "
                "then type the same command again",
            )
    return None


def describe(project: Project, about: dict[str, Any], gaps: list[Gap]) -> str:
    detectron2 = f"detectron2 {project.detectron2_commit[:7]}"
    if any(gap.missing == "detectron2" for gap in gaps):
        detectron2 = "no detectron2"
    return (
        f"Python {about['python']}, torch {about['torch']}, "
        f"torchvision {about['torchvision']}, {detectron2}, d2det {project.version}"
    )


def detectron2_obstacle() -> Gap | None:
    """What keeps detectron2 from being built here, as far as can be known before trying."""
    if shutil.which("git") is None:
        return _no_detectron2("there is no git", "install git, then type the same command again")
    if toolchain.find_cxx() is None:
        return _no_detectron2("there is no C++ compiler", GET_COMPILER)
    if not toolchain.has_python_headers():
        return _no_detectron2(
            "Python's C headers are not installed",
            "install them (Debian, Ubuntu: sudo apt install python3-dev), then type the same "
            "command again",
        )
    return None


def detectron2_build_variables(about: dict[str, Any]) -> dict[str, str]:
    """Lets detectron2 build for CUDA only with a toolkit that can; its own check does not ask."""
    home, _ = toolchain.find_cuda_toolkit(about["torch_cuda"])
    if home is None:
        return {"CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0"}
    headers = [str(path) for path in toolchain.cuda_header_dirs(home, about["torch_folder"])]
    named = os.environ.get("CPLUS_INCLUDE_PATH")
    variables = {"CUDA_HOME": str(home)}
    if headers:
        variables["CPLUS_INCLUDE_PATH"] = ":".join([named, *headers] if named else headers)
    return variables


def _pins(env: Environment, about: dict[str, Any]) -> list[str]:
    """pip's arguments that keep other packages from moving torch to another release."""
    file = env.venv / "constraints.txt"
    file.write_text("\n".join(about["pins"]) + "\n")
    return ["-c", str(file)]


def _pip_or_stop(env: Environment, *arguments: str) -> None:
    result = env.pip_install(*arguments)
    if not result.ok:
        raise SetupError(PIP_FAILED.format(reason=result.reason(), log=env.log))


def _detectron2_fits(env: Environment, commit: str) -> bool:
    """Whether detectron2 imports, compiled part included, and, in .venv, is of our commit."""
    answer = env.ask(
        "import importlib.metadata, json, pathlib, sys\n"
        "import torch, detectron2._C, detectron2.model_zoo\n"
        "if pathlib.Path(sys.prefix) in pathlib.Path(detectron2.__file__).parents:\n"
        "    about = importlib.metadata.distribution('detectron2').read_text('direct_url.json')\n"
        "    print(json.loads(about or '{}').get('vcs_info', {}).get('commit_id'))\n"
        "else:\n"
        "    print('interpreter')\n"  # brought along by the interpreter: its owner's choice
    )
    return answer in (commit, "interpreter")


def _no_detectron2(why: str, remedy: str, retry: bool = False) -> Gap:
    return Gap(
        missing="detectron2",
        why=why,
        works="d2det.ops, d2det.core and d2det.torchvision, on which make demo and make test run; "
        "not train_net.py and the configs",
        remedy=remedy,
        retry=retry,
    )


def _no_github(reason: str) -> Gap:
    return _no_detectron2(
        f"its repository cannot be fetched ({reason})",
        f"let git reach {DETECTRON2_URL} (network, proxy), then type the same command again",
        retry=True,
    )
