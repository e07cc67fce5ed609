"""What the project's own files ask for: read here, written in no second place."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import NamedTuple


class Project(NamedTuple):
    """What the project's own files ask for."""

    root: Path
    build_requires: list[str]
    dependencies: list[str]
    development: list[str]
    detectron2_commit: str
    version: str

    @classmethod
    def read(cls, root: Path) -> Project:
        toml = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        constants = _string_constants(root / "d2det" / "__init__.py")
        return cls(
            root=root,
            build_requires=toml["build-system"]["requires"],
            dependencies=toml["project"]["dependencies"],
            development=toml["project"]["optional-dependencies"]["dev"],
            detectron2_commit=constants["DETECTRON2_COMMIT"],
            version=constants["__version__"],
        )

    @property
    def torch_requirements(self) -> list[str]:
        return [name for name in self.dependencies if re.match(r"torch(vision)?\b", name)]

    @property
    def minimum_torch(self) -> tuple[int, int]:
        torch = next(name for name in self.dependencies if re.match(r"torch\b", name))
        return release_of(torch.partition(">=")[2])


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number: (2, 15) for "2.15.0+cu132"."""
    match = re.match(r"\s*(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _string_constants(path: Path) -> dict[str, str]:
    """The module's top-level NAME = "string" assignments, read without importing it."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {name: str(node.value.value) for name in names}
    return found
