"""The configuration reference, read from the source that defines the keys.

    python tools/documentation/config_reference.py

prints it as markdown. Names, defaults and comments are taken from the text of `d2det/config.py`,
which is neither imported nor run: that file is the one place where a key is explained. A key's
comments are those on the lines directly above it and the one behind it. detectron2's DeepLab keys,
which `add_d2det_config` adds too, are read from detectron2's own file where that is installed.

Standard library only.
"""

from __future__ import annotations

import ast
import html
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "d2det" / "config.py"
NODE = "CN()"  # what makes a group of keys
TITLES = {
    "_add_roi_heads": "RoI heads and their soft-NMS",
    "_add_discriminative_roi_pooling": "Discriminative RoI pooling",
    "_add_deformable_roi_pooling": "Deformable RoI pooling",
    "_add_dense_regression": "Dense local regression",
    "_add_masks": "Masks",
    "_add_backbone": "Backbones",
    "_add_segmentation": "Semantic segmentation",
    "_add_mimicking": "R-CNN feature mimicking",
    "_add_solver": "Training",
    "_add_test": "Evaluation",
}
DEEPLAB = "detectron2's DeepLab"


class Key(NamedTuple):
    """One configuration key."""

    name: str  # "MODEL.ROI_HEADS.SHARED_BRANCH"
    default: str  # as the source writes it
    meaning: str  # its comments, as one line


class Section(NamedTuple):
    """The keys that one function adds."""

    title: str
    about: list[str]  # what is said of a group, or of the section, rather than of a key
    keys: list[Key]


def sections(source: str) -> list[Section]:
    """One for each function that the first function calls, in that order."""
    functions = {function.name: function for function in _functions(source)}
    comments = _comments(source)
    called = [
        node.func.id
        for node in ast.walk(functions["add_d2det_config"])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    names = sorted((name for name in called if name in functions), key=called.index)
    return [_section(TITLES[name], functions[name], source, comments) for name in names]


def deeplab_section(source: str) -> Section:
    """The keys of detectron2's `add_deeplab_config`; a comment there explains all keys below it."""
    section = _section(DEEPLAB, _functions(source)[0], source, _comments(source))
    keys: list[Key] = []
    for key in section.keys:
        keys.append(key if key.meaning or not keys else key._replace(meaning=keys[-1].meaning))
    return section._replace(keys=keys)


def read() -> list[Section]:
    """The sections of d2det's configuration; DeepLab's last where detectron2 is installed."""
    found = sections(CONFIG.read_text(encoding="utf-8"))
    deeplab = _deeplab_file()
    return [*found, deeplab_section(deeplab.read_text(encoding="utf-8"))] if deeplab else found


def markdown(found: list[Section]) -> str:
    """The page."""
    lines = [
        "# Configuration reference",
        "",
        "Every key that d2det adds to detectron2's, with its default, written from the comments of "
        "`d2det/config.py` when this page was built. Whatever detectron2 already has a key for is "
        "set by that key. Keys are set in a YAML file (`_BASE_`: the config that it changes) or "
        "behind the command line: `SOLVER.ACCUMULATE 8`. Section numbers are those of the D2Det "
        "paper unless a line says otherwise.",
    ]
    for section in found:
        lines += ["", f"## {section.title}"]
        for paragraph in section.about:
            lines += ["", _prose(paragraph)]
        if section.keys:
            lines += ["", "| key | default | meaning |", "|---|---|---|"]
        for key in section.keys:
            default = key.default.replace("|", "\\|")
            lines.append(f"| `{key.name}` | `{default}` | {_prose(key.meaning)} |")
    return "\n".join(lines) + "\n"


def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def _section(
    title: str, function: ast.FunctionDef, source: str, comments: dict[int, _Comment]
) -> Section:
    aliases, about, keys = {"cfg": ""}, [], []
    for statement in function.body:
        above = _above(comments, statement.lineno)
        behind = comments.get(statement.end_lineno or statement.lineno)
        text = " ".join([*above, *([behind.text] if behind and not behind.alone else [])])
        path, names, value = _assigned(statement, aliases, source)
        if path and value != NODE:
            keys.append(Key(path, " ".join(value.split()), text))
        elif text:
            about.append(f"{path}: {text}" if path else text)
        aliases |= names
    return Section(title, about, keys)


def _assigned(
    statement: ast.stmt, aliases: dict[str, str], source: str
) -> tuple[str, dict[str, str], str]:
    """The dotted key that is assigned to, the local names that then stand for it, the value's text.

    `cfg.MODEL.X = x = CN()` gives "MODEL.X", {"x": "MODEL.X"} and "CN()"; `x = cfg.MODEL.X` gives
    no key and the same name; what is no assignment gives nothing.
    """
    if not isinstance(statement, ast.Assign):
        return "", {}, ""
    dotted = [_path(target, aliases) for target in statement.targets]
    path = next((found for found in dotted if found), "")
    local = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    value = ast.get_source_segment(source, statement.value) or ""
    return path, dict.fromkeys(local, path or _path(statement.value, aliases)), value


def _path(node: ast.expr, aliases: dict[str, str]) -> str:
    """ "MODEL.X" of `cfg.MODEL.X`; "" of anything that is no attribute of a config."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not parts or not isinstance(node, ast.Name) or node.id not in aliases:
        return ""
    return ".".join(part for part in (aliases[node.id], *reversed(parts)) if part)


class _Comment(NamedTuple):
    text: str
    alone: bool  # on a line of its own


def _comments(source: str) -> dict[int, _Comment]:
    """The comments by line number."""
    tokens: Iterator[tokenize.TokenInfo] = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: _Comment(
            token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#")
        )
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _above(comments: dict[int, _Comment], line: int) -> list[str]:
    """The comments that stand alone on the lines directly above `line`, in their order."""
    found: list[str] = []
    while (comment := comments.get(line - 1)) is not None and comment.alone:
        found.insert(0, comment.text)
        line -= 1
    return found


def _prose(text: str) -> str:
    """The text of a comment as markdown: nothing in it is markup but the names of keys."""
    if len(text.split(" ", 1)[0]) > 1:  # "c above" is the name of a variable
        text = text[:1].upper() + text[1:]
    safe = re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(text, quote=False))
    name = r"(?<![\w.])[A-Z][A-Z0-9]*(?:(?:\\_|\.)[A-Z0-9]+)+(?![\w])"
    return re.sub(name, lambda match: f"`{match[0]}`".replace("\\", ""), safe)


def _deeplab_file() -> Path | None:
    try:
        spec = importlib.util.find_spec("detectron2.projects.deeplab")
    except ImportError:
        return None
    return Path(spec.origin).with_name("config.py") if spec and spec.origin else None


if __name__ == "__main__":
    print(markdown(read()), end="")
