"""What an experiment is: methods (a config with overrides each), seeds, shared arguments."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from d2det.engine.configs import find_config

_KEYS = {"title", "description", "methods", "seeds", "train_args"}
_METHOD_KEYS = {"name", "label", "config", "overrides", "published"}
_NAME = re.compile(r"[\w][\w.+-]*")

# task ("bbox", ...) -> metric -> percent
Published = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: of its folder in the experiment's.
        label: what tables and plots call it.
        config: path of a yaml config.
        overrides: KEY VALUE KEY VALUE ..., after the experiment's own.
        published: figures of a paper, shown beside those measured.
    """

    name: str
    label: str
    config: str
    overrides: tuple[str, ...] = ()
    published: Published = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Experiment:
    """Methods times seeds, on the same data, with the same `train_args`.

    Attributes:
        methods: the first is what the others are compared with.
        train_args: go to `train_net.py`: options, then KEY VALUE pairs.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    train_args: tuple[str, ...] = ()
    title: str = ""
    description: str = ""


def is_experiment(path: str | Path) -> bool:
    """Whether a file lists methods; otherwise it is a config."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return False
    return isinstance(content, dict) and "methods" in content


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment file; `docs/experiments.md` describes the format.

    Raises:
        ValueError: the file is not an experiment; the message names file and key.
        FileNotFoundError: one of its configs does not exist.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid yaml: {error}") from error
    _check_keys(content, _KEYS, str(path))
    listed = content.get("methods")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: methods: a list of at least one is needed")
    methods = [
        _read_method(item, path.parent, f"{path}: method {number}")
        for number, item in enumerate(listed, start=1)
    ]
    seeds = content.get("seeds", [1, 2, 3])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ValueError(f"{path}: seeds: a list of whole numbers is needed, not {seeds!r}")
    return Experiment(
        methods=_distinct(methods),
        seeds=tuple(dict.fromkeys(seeds)),
        train_args=_words(content.get("train_args"), f"{path}: train_args"),
        title=str(content.get("title", path.stem)),
        description=str(content.get("description", "")).strip(),
    )


def from_configs(
    configs: Sequence[str], seeds: Sequence[int], train_args: Sequence[str]
) -> Experiment:
    """An experiment of configs as they are, each named as its file.

    Raises:
        FileNotFoundError: a config does not exist.
        ValueError: two configs of one name.
    """
    methods = []
    for given in configs:
        path = find_config(given)
        methods.append(Method(path.stem, path.stem, str(path)))
    return Experiment(_distinct(methods), tuple(dict.fromkeys(seeds)), tuple(train_args))


def merge(earlier: Experiment | None, now: Experiment) -> Experiment:
    """What a folder holds after one more call: `now`'s methods first, then those it had before."""
    if earlier is None:
        return now
    names = {method.name for method in now.methods}
    return replace(
        now,
        methods=now.methods + tuple(m for m in earlier.methods if m.name not in names),
        seeds=tuple(sorted({*now.seeds, *earlier.seeds})),
        title=now.title or earlier.title,
        description=now.description or earlier.description,
    )


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Plain data that `from_json` reads."""
    return json.loads(json.dumps(asdict(experiment)))


def from_json(content: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_json`."""
    methods = tuple(
        Method(**{**method, "overrides": tuple(method["overrides"])})
        for method in content["methods"]
    )
    return Experiment(
        **{
            **content,
            "methods": methods,
            "seeds": tuple(content["seeds"]),
            "train_args": tuple(content["train_args"]),
        }
    )


def _read_method(item: Any, folder: Path, where: str) -> Method:
    if isinstance(item, str):
        item = {"config": item}
    _check_keys(item, _METHOD_KEYS, where)
    if not item.get("config"):
        raise ValueError(f"{where}: config is missing")
    given = str(item["config"])
    beside = folder / given
    path = beside if beside.is_file() else find_config(given)
    name = str(item.get("name", path.stem))
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name {name!r} is no folder's name: letters, digits, _ . + -")
    published = item.get("published", {})
    if not isinstance(published, dict) or not all(isinstance(v, dict) for v in published.values()):
        raise ValueError(f"{where}: published: {{task: {{metric: percent}}}} is needed")
    overrides = _overrides(item.get("overrides"), f"{where}: overrides")
    return Method(name, str(item.get("label", name)), str(path), overrides, published)


def _overrides(given: Any, where: str) -> tuple[str, ...]:
    if isinstance(given, dict):
        pairs = _flatten(given)
        return tuple(text for pair in pairs for text in pair)
    return _words(given, where)


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else repr(value)


def _words(given: Any, where: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        return tuple(shlex.split(given))
    if isinstance(given, list):
        return tuple(word if isinstance(word, str) else repr(word) for word in given)
    raise ValueError(f"{where}: a line of words or a list is needed, not {given!r}")


def _check_keys(content: Any, known: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a mapping with the keys {', '.join(sorted(known))} is needed")
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


def _distinct(methods: Sequence[Method]) -> tuple[Method, ...]:
    for field_name in ("name", "label"):
        values = [getattr(method, field_name) for method in methods]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"methods with the same {field_name}, {', '.join(twice)}: give each its own in an "
                "experiment file"
            )
    return tuple(methods)
