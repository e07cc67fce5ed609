"""The virtual environment of a clone: made once, commands run in it, what is installed in it.

Standard library only; `setup_env.py` says what goes in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

MINIMUM_PYTHON = (3, 11)

# What an interpreter has, in JSON. Imports are tried, not only looked up: a torch that is broken,
# or a torchvision of another release, is as good as none.
_PROBE = """
import importlib.metadata, json, os, site, sys
about = {
    "python": sys.version.split()[0],
    "in_venv": sys.prefix != sys.base_prefix,
    "site_packages": site.getsitepackages(),
}
try:
    import torch
    about |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    about["torch_folder"] = os.path.dirname(os.path.dirname(torch.__file__))
    about["gpu"] = torch.cuda.is_available()
    import torchvision
    about["torchvision"] = torchvision.__version__
    # pip's name for these releases: without "+cu132", where the package index has them so.
    names = ("torch", "torchvision")
    about["pins"] = [f"{name}=={importlib.metadata.version(name)}" for name in names]
except Exception as error:
    about["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(about))
"""


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


class Result(NamedTuple):
    """How a command ended, and the output it gave."""

    ok: bool
    output: str

    def reason(self, lines: int = 12) -> str:
        """The compiler's first errors, or else the output's end, indented."""
        output = self.output.splitlines()
        errors = [line for line in output if re.search(r"(: |^)(fatal )?error: |nvcc fatal", line)]
        return "\n".join("    " + line.strip() for line in errors[:lines] or output[-lines:])


def probe(python: str | Path) -> dict[str, Any]:
    """Asks an interpreter for its versions; "torch", "torchvision" only where they import."""
    answer = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True)
    if answer.returncode != 0:
        raise SetupError(f"{python} does not run:\n{answer.stderr.strip()}")
    return json.loads(answer.stdout.splitlines()[-1])


class Environment:
    """A virtual environment: runs commands with its programs first on PATH, and logs them."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.log = venv / "setup.log"

    def create(self, interpreter: str, link_from: dict[str, Any] | None) -> None:
        """Makes the environment anew.

        Args:
            interpreter: the Python to make it with.
            link_from: the probe of that Python if its packages (a torch that fits) are to be seen
                from inside, None for an environment of its own.
        """
        if self.venv.exists():
            shutil.rmtree(self.venv)
        command = [interpreter, "-m", "venv", str(self.venv)]
        if link_from and not link_from["in_venv"]:
            command.append("--system-site-packages")
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if made.returncode != 0:
            shutil.rmtree(self.venv, ignore_errors=True)
            raise SetupError(
                f"{interpreter} cannot make a virtual environment:\n{made.stdout.strip()}\n"
                "On Debian and Ubuntu it needs: sudo apt install python3-venv"
            )
        if link_from and link_from["in_venv"]:
            # --system-site-packages would show the packages of the Python beneath that other
            # virtual environment, not its own.
            paths = link_from["site_packages"]
            lines = [f"import site; site.addsitedir({path!r})\n" for path in paths]
            (self._site_packages() / "interpreter.pth").write_text("".join(lines))

    def is_usable(self) -> bool:
        """Whether it is there, of a Python new enough, and has pip (or gets it)."""
        check = f"import sys; sys.exit(sys.version_info < {MINIMUM_PYTHON})"
        if not self.python.exists() or self.ask(check) is None:
            return False
        if self.ask("import pip") is not None:
            return True
        return self.run(self.python, "-m", "ensurepip").ok  # made by a tool that leaves pip out

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> Result:
        """Runs a command to its end; its output goes to the log, its last line to a terminal."""
        full = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | (env or {})
        full["PATH"] = os.pathsep.join([str(self.python.parent.absolute()), full["PATH"]])
        lines = []
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n{time.strftime('%H:%M:%S')} $ {' '.join(map(str, command))}\n")
            process = subprocess.Popen(
                command,
                env=full,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for line in process.stdout or ():
                lines.append(line)
                log.write(line)
                _show_progress(line.strip())
        _show_progress("")
        return Result(process.wait() == 0, "".join(lines))

    def pip_install(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Result:
        return self.run(self.python, "-m", "pip", "install", *arguments, env=env)

    def ask(self, code: str) -> str | None:
        """Runs Python code in the environment; what it printed, or None where it failed."""
        answer = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    def _site_packages(self) -> Path:
        return next((self.venv / "lib").glob("python*/site-packages"))


def _show_progress(line: str) -> None:
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 5
        print(f"\r\033[K{'    ' + line[:width] if line else ''}", end="", flush=True)
