"""What converters of weights share: reading any file, an account of every tensor, writing."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2det.engine.checkpoint import atomic_write

EMA_KEYS = ("state_dict_ema", "model_ema", "ema")
PLAIN_KEYS = ("state_dict", "model")
FORMATS = (".pth", ".pkl")


class ConversionError(ValueError):
    """A file that cannot be converted; the message says why, and what to do."""


@dataclass
class Conversion:
    """New weights, and what became of every tensor of the old ones.

    Attributes:
        state: new name to tensor.
        used: old name to new name.
        left: old name to the reason why it is not used.
        missing: name of what the new model has and the file does not, to what becomes of it.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def take(self, source: str, target: str, value: Tensor) -> None:
        """Use a tensor under a new name, in float32 if it has a floating point type.

        Raises:
            ConversionError: the new name is taken, or a value is not finite.
        """
        if target in self.state:
            other = next(old for old, new in self.used.items() if new == target)
            raise ConversionError(f"{source} and {other} would both become {target}")
        if value.is_floating_point():
            value = value.float()
            if not value.isfinite().all():
                raise ConversionError(f"{source} holds values that are not finite")
        self.used[source] = target
        self.state[target] = value.detach().contiguous()

    def report(self, *, every_tensor: bool = True) -> str:
        """Lines on all that was used, left and missing; used ones only counted if so wanted."""
        values = sum(value.numel() for value in self.state.values())
        lines = [f"used: {len(self.used)} tensors, {values / 1e6:.2f} M values"]
        if every_tensor:
            for old, new in self.used.items():
                lines.append(f"  {old} -> {new} {tuple(self.state[new].shape)}")
        for title, names in (("left", self.left), ("missing", self.missing)):
            lines.append(f"{title}: {len(names)} tensors" if names else f"{title}: none")
            for reason in dict.fromkeys(names.values()):
                same = [name for name, why in names.items() if why == reason]
                lines.append(f"  {reason}: {', '.join(same)}")
        return "\n".join(lines)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth or .pt (or .pth.tar), a .safetensors, or a .pkl of NumPy arrays.

    No code in the file is run: a pickle may hold tensors, arrays and plain containers only.

    Raises:
        ConversionError: there is no such file, it cannot be read, or is no dictionary.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConversionError(f"{path} is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        elif zipfile.is_zipfile(path) or path.suffix != ".pkl":
            # timm keeps the command line's arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged or foreign file can raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConversionError(
            f"{path} cannot be read: {reason}. Is it complete, and a checkpoint? One that holds "
            "Python objects has to be saved anew with its state dict alone."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Lets through what arrays are made of."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "OrderedDict")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles of Python 2
            return super().find_class(module, name)
        if module.split(".")[0] in ("numpy", "collections") and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def find_state_dict(content: Mapping[str, Any], weights: str = "auto") -> tuple[dict, str]:
    """The state dict in a checkpoint, and the key that it was under ("" for the file itself).

    Args:
        content: of a file.
        weights: "ema", "plain", or "auto": the moving average where there is one.

    Raises:
        ConversionError: there is none, or not the one that is asked for.
    """
    choices = {"auto": EMA_KEYS + PLAIN_KEYS, "ema": EMA_KEYS, "plain": PLAIN_KEYS}[weights]
    for key in choices:
        if isinstance(content.get(key), Mapping):
            return _tensors(content[key]), key
    state = _tensors(content)
    if not state or weights == "ema":
        wanted = "moving average of weights" if weights == "ema" else "weights"
        raise ConversionError(
            f"the file holds no {wanted} (looked for {', '.join(choices)}); its keys are "
            f"{', '.join(map(str, list(content)[:8]))}"
        )
    return state, ""


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            found[str(name)] = value
    return found


def write_weights(
    path: str | Path, state: Mapping[str, Tensor], author: str, *, by_ending: bool = True
) -> None:
    """Write weights for MODEL.WEIGHTS, complete or not at all.

    Args:
        path: ending in .pth, or in .pkl for detectron2's older form, of NumPy arrays.
        state: by name.
        author: what made the file; detectron2 asks for it in a .pkl.
        by_ending: detectron2 is to match the names to a model's by their ends, so that those of a
            backbone fit under "backbone." as well as under "backbone.bottom_up.".

    Raises:
        ConversionError: another ending.
    """
    path = Path(path).expanduser()
    check_format(path)
    content = {"model": dict(state), "__author__": author, "matching_heuristics": by_ending}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path)) as file:
        if path.suffix == ".pth":
            torch.save(content, file)
        else:
            content["model"] = {name: value.numpy() for name, value in state.items()}
            pickle.dump(content, file)


def check_format(path: str | Path) -> None:
    """Raise ConversionError where `write_weights` does not know the ending."""
    if Path(path).suffix not in FORMATS:
        raise ConversionError(f"{path}: the output must end in {' or '.join(FORMATS)}")
