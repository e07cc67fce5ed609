"""Sets up everything `make demo`, `make test`, ... need, in .venv.

    python tools/setup_env.py [--interpreter-chosen] [--require detectron2]

Steps: the virtual environment, torch and torchvision, the other packages, detectron2 built from a
pinned commit, d2det itself (editable). What is there already and fits is kept, a torch that the
interpreter brings among it. Where a step cannot be done on this machine (no GitHub, no compiler)
the end says what is missing, what works without it and what to do; a compiler that is there and
fails stops the set-up. A second call returns at once unless something it depends on has changed.

Standard library only.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (before anything that an older Python lacks)
    sys.exit(
        f"d2det needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}. "
        "Name another, for example: make test PYTHON=python3.12"
    )

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import steps
import toolchain
from environment import Environment, SetupError
from project import Project
from steps import Gap

ROOT = Path(__file__).resolve().parent.parent
STAMP = "d2det-setup.json"
# A change in any of these, in the tools at hand or in these variables changes what is to be built.
WATCHED = (
    "pyproject.toml",
    "setup.py",
    "tools/*.py",
    "csrc/**/*.cpp",
    "csrc/**/*.cu",
    "csrc/**/*.cuh",
    "csrc/**/*.h",
)
BUILD_VARIABLES = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")


def fingerprint(project: Project) -> str:
    """A digest of all that the set-up depends on."""
    digest = hashlib.sha256()
    for pattern in WATCHED:
        for path in sorted(project.root.glob(pattern)):
            digest.update(path.relative_to(project.root).as_posix().encode() + path.read_bytes())
    facts = {
        "root": str(project.root),
        "release": [project.version, project.detectron2_commit],
        "compiler": [toolchain.find_cxx(), toolchain.has_python_headers()],
        "programs": [shutil.which(name) for name in ("git", "nvcc")],
        "variables": [os.environ.get(name) for name in BUILD_VARIABLES],
    }
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def read_stamp(env: Environment) -> dict[str, Any]:
    """What the last complete set-up left, or nothing."""
    try:
        return json.loads((env.venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def is_current(stamp: dict[str, Any], now: str) -> bool:
    """Whether nothing needs doing. What failed for want of a network is tried every time."""
    retry = any(gap["retry"] for gap in stamp.get("gaps", []))
    return stamp.get("fingerprint") == now and not retry


def set_up(env: Environment, project: Project, interpreter: str, remake: bool) -> dict[str, Any]:
    """Takes all steps and returns the stamp to leave: what was done, with what, and the gaps."""
    steps.make_environment(env, project, interpreter, remake)
    about = steps.install_torch(env, project)
    steps.install_packages(env, project, about)
    tried = [step(env, project, about) for step in (steps.install_detectron2, steps.install_d2det)]
    gaps = [gap for gap in tried if gap is not None]
    return {
        "fingerprint": fingerprint(project),
        "interpreter": interpreter,
        "gaps": [gap._asdict() for gap in gaps],
        "installed": steps.describe(project, about, gaps),
    }


def report(gaps: list[Gap]) -> None:
    for gap in gaps:
        print(
            f"\nMissing: {gap.missing}, because {gap.why}.\n"
            f"  Still works: {gap.works}.\n"
            f"  To mend it:  {gap.remedy}.\n",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sets up d2det's development environment.")
    parser.add_argument(
        "--interpreter-chosen",
        action="store_true",
        help="this Python was named on purpose: an environment made with another is made anew",
    )
    parser.add_argument(
        "--require", choices=["detectron2"], help="fail where this could not be installed"
    )
    options = parser.parse_args(arguments)

    os.chdir(ROOT)
    env = Environment(Path(".venv"))
    project = Project.read(ROOT)
    stamp = read_stamp(env) if env.python.exists() else {}
    # With .venv activated, "python3" is the environment's own Python: nothing to make anew.
    inside = Path(sys.prefix) == env.venv.absolute()
    interpreter = stamp.get("interpreter", sys.executable) if inside else sys.executable
    remake = options.interpreter_chosen and stamp.get("interpreter", interpreter) != interpreter
    if remake or not is_current(stamp, fingerprint(project)):
        start = time.monotonic()
        (env.venv / STAMP).unlink(missing_ok=True)
        try:
            stamp = set_up(env, project, interpreter, remake)
        except SetupError as error:
            print(f"\nThe set-up stopped. {error}", file=sys.stderr)
            return 1
        (env.venv / STAMP).write_text(json.dumps(stamp, indent=1))
        print(f"Set-up done in {time.monotonic() - start:.0f} s: {stamp['installed']}", flush=True)

    gaps = [Gap(**gap) for gap in stamp["gaps"]]
    report(gaps)
    lacking = [gap for gap in gaps if gap.missing == options.require]
    for gap in lacking:
        print(f"This command needs {gap.missing}. Do this: {gap.remedy}.", file=sys.stderr)
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
