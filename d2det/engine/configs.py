"""Finding yaml configs by name, and merging files and overrides with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def config_folders() -> list[Path]:
    """Folders that hold the project's configs: in the installed package, then in a clone."""
    package = Path(__file__).resolve().parents[1]
    return [
        folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()
    ]


def config_names() -> list[str]:
    """Names that `find_config` knows, e.g. "COCO-Detection/d2det_R_50_FPN_2x"; no bases."""
    names = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in config_folders()
        for path in folder.rglob("*.yaml")
    }
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("Base-"))


def find_config(name_or_path: str | Path) -> Path:
    """Resolve a path, or a name relative to the project's `configs/`, with or without ".yaml".

    Raises:
        FileNotFoundError: neither a file nor a known name; the message lists close matches.
        ValueError: a Python file, i.e. a LazyConfig, which is no yaml config.
    """
    name = str(name_or_path)
    if name.endswith(".py"):
        raise ValueError(
            f"{name} is a LazyConfig: load it with detectron2.config.LazyConfig.load, or give it "
            "to d2det.Predictor; only yaml configs can be used here"
        )
    short = name.removeprefix("configs/")
    places = [Path(name).expanduser(), *(folder / short for folder in config_folders())]
    for place in places:
        for path in (place, place.with_name(place.name + ".yaml")):
            if path.is_file():
                return path
    raise FileNotFoundError(f"config {name} does not exist; {_suggest_config(short)}")


def merge_file(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file and its bases into `cfg`, in place.

    Raises:
        FileNotFoundError: the file or one of its bases does not exist.
        ValueError: not a yaml mapping, a key that `cfg` lacks, or a value of the wrong type. All
            unknown keys are named with their files and the keys they resemble.
    """
    unknown = [
        f"{file}: unknown config key {key}{_suggest_key(cfg, key)}"
        for file, content in _with_bases(Path(path))
        for key in _unknown_keys(content, cfg)
    ]
    before = cfg.clone()
    try:
        # detectron2 renames the keys of its first version while merging, so unknown keys are an
        # error only if it does not know them either.
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        cfg.clear()
        cfg.update(before)
        reason = "\n".join(unknown) if unknown else f"{path}: {_text(error)}"
        raise ValueError(reason) from error


def merge_mapping(cfg: CfgNode, content: Mapping[str, Any], source: str) -> None:
    """Merge nested plain values into `cfg`, in place.

    Args:
        cfg: changed.
        content: of dicts and plain values; lists where `cfg` has tuples will do.
        source: what errors call it.

    Raises:
        ValueError: a key that `cfg` lacks, or a value of the wrong type.
    """
    unknown = [
        f"{source}: unknown config key {key}{_suggest_key(cfg, key)}"
        for key in _unknown_keys(content, cfg)
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    try:
        cfg.merge_from_other_cfg(type(cfg)(content))
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"{source}: {_text(error)}") from error


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Merge "KEY VALUE KEY VALUE ..." from a command line into `cfg`, in place.

    Raises:
        ValueError: an unknown key, a key without a value, an option among the keys, or a value of
            the wrong type.
    """
    for key in overrides[::2]:
        if str(key).startswith("--"):
            raise ValueError(f"option {key} stands after config keys: options come first")
        if not _has_key(cfg, str(key)):
            raise ValueError(
                f"command line: unknown config key {key}{_suggest_key(cfg, str(key))}"
                " (overrides are pairs: KEY VALUE)"
            )
    if len(overrides) % 2:
        raise ValueError(f"command line: config key {overrides[-1]} has no value")
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"command line: {_text(error)}") from error


def _with_bases(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    import yaml  # comes with detectron2; the names of the configs are known without

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid yaml: {error}") from error
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a config: a mapping of keys to values is needed")
    bases = content.pop("_BASE_", [])
    yield path, content
    for base in [bases] if isinstance(bases, str) else bases:
        if base.startswith(("http://", "https://")):
            continue
        base_path = path.parent / Path(base).expanduser()
        if not base_path.is_file():
            raise FileNotFoundError(f"{path}: its _BASE_ {base_path} does not exist")
        yield from _with_bases(base_path)


def _unknown_keys(
    content: Mapping[str, Any], cfg: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    unknown: list[str] = []
    for key, value in content.items():
        full = f"{prefix}{key}"
        if key not in cfg:
            unknown.append(full)
        elif isinstance(value, Mapping) and isinstance(cfg[key], Mapping):
            unknown += _unknown_keys(value, cfg[key], full + ".")
    return unknown


def _has_key(cfg: Mapping[str, Any], key: str) -> bool:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _all_keys(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _all_keys(value, f"{prefix}{key}.")


def _suggest_key(cfg: Mapping[str, Any], key: str) -> str:
    keys = list(_all_keys(cfg))
    last = key.rpartition(".")[2].upper()
    moved = [known for known in keys if known.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key.upper(), keys, n=3, cutoff=0.75)
    found = list(dict.fromkeys([*close, *moved]))[:3]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _suggest_config(name: str) -> str:
    names = config_names()
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    by_file = {known.rpartition("/")[2]: known for known in names}
    close = [
        *difflib.get_close_matches(stem, names, n=4, cutoff=0.6),
        *(by_file[file] for file in difflib.get_close_matches(Path(stem).name, by_file, n=4)),
    ]
    close = list(dict.fromkeys(close))
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known names: {', '.join(names)}" if names else "no configs come with this installation"


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
