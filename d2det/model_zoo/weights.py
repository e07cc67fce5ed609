"""Weights that the project publishes, and files that are checked against their hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse


@dataclass(frozen=True)
class Weights:
    """A published file.

    Args:
        url: an http(s) address.
        sha256: of the file, 64 hexadecimal digits.
    """

    url: str
    sha256: str


# By the config's name. Empty: the project publishes no weights. A file is listed here only together
# with the measured results of exactly that file.
WEIGHTS: Mapping[str, Weights] = {}

_DOWNLOADED = ("http", "https", "file")


def pretrained(name: str) -> Weights:
    """The published weights of a config.

    Raises:
        LookupError: there are none; the message says what to give instead.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    known = f"only of {', '.join(sorted(WEIGHTS))}" if WEIGHTS else "so far of no model"
    raise LookupError(
        f"the project publishes no pretrained weights of {name} ({known}). Give weights of your "
        "own (a file, an output folder, or an address with its sha256), train them with "
        f"train_net.py --config-file {name}, or convert the authors' as docs/official_weights.md "
        "describes"
    )


def fetch(source: str | Path, sha256: str | None = None, folder: str | Path | None = None) -> str:
    """The path of a local file that has the hash; an address is downloaded once.

    Nothing of the user's is ever removed: a download lies under a temporary name until it is whole
    and right, and a file that does not match is left where it is.

    Args:
        source: a file; an http(s) or file address; or an address that only detectron2 knows
            ("detectron2://..."), which is returned as it is.
        sha256: 64 hexadecimal digits. An address that is downloaded needs it, as weights are read
            by programs that trust them; a file may have it.
        folder: for downloads; default `checkpoints` in `torch.hub.get_dir()`. The beginning of the
            hash becomes part of the file's name, as in torch.hub's own files.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the hash is missing, malformed, or not that of the file.
        RuntimeError: the address cannot be downloaded.
    """
    text = str(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 {sha256!r} is not 64 hexadecimal digits")
    if "://" not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"weights {source} do not exist")
        if sha256 is not None:
            _check(path, sha256, str(path), "Is it the right file, and copied completely?")
        return str(path)
    scheme = text.partition("://")[0].lower()
    if scheme not in _DOWNLOADED:
        if sha256 is not None:
            raise ValueError(f"{text}: sha256 is for files and for http, https and file addresses")
        return text
    if sha256 is None:
        raise ValueError(
            f"{text} is to be downloaded: give the file's sha256, as its publisher states it "
            "(of a file that you trust: sha256sum FILE)"
        )
    return str(_download(text, sha256.lower(), folder))


def _download(url: str, sha256: str, folder: str | Path | None) -> Path:
    # Imported here: d2det's import stays light.
    import torch

    place = Path(folder) if folder else Path(torch.hub.get_dir(), "checkpoints")
    name = PurePosixPath(urlparse(url).path)
    beginning = sha256[:8]
    stem = name.stem.removesuffix(f"-{beginning}") or "weights"
    path = place / f"{stem}-{beginning}{name.suffix}"
    if path.is_file():
        _check(path, sha256, str(path), "Delete it to have it downloaded again.")
        return path
    place.mkdir(parents=True, exist_ok=True)
    part = place / f".{path.name}.{os.getpid()}"
    try:
        torch.hub.download_url_to_file(url, str(part), progress=True)
        _check(part, sha256, url, "What was downloaded is not kept.")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        raise RuntimeError(
            f"{url} cannot be downloaded: {error}. Where there is no network, fetch it elsewhere "
            "and give the file's path"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _check(path: Path, sha256: str, name: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ValueError(f"{name} has sha256 {found}, not {sha256.lower()}. {remedy}")
