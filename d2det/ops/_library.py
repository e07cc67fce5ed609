"""Where the operators' kernels come from: the compiled extension, or PyTorch reference code.

Every operator lives in the dispatcher as `torch.ops.d2det.<name>`. The compiled extension (sources
in `csrc/`) defines the schemas and registers kernels: `d2det/_C.*` under the key CPU,
`d2det/_C_cuda.*` under CUDA. Where it is absent, the same schemas are defined here. The reference
implementation is always registered as CompositeExplicitAutograd, which the dispatcher uses only for
a device that has no kernel of its own: a kernel that is added to the extension replaces it with no
change in Python.
"""

from __future__ import annotations

import importlib.machinery
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "d2det"
DISABLE_VARIABLE = "D2DET_DISABLE_EXTENSION"
FOLDER_VARIABLE = "D2DET_EXTENSION"  # names the folder of another build, e.g. with a sanitizer
BUILD_COMMAND = "pip install --no-build-isolation ."

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
references: dict[str, Callable[..., Any]] = {}  # of every operator, in the order of definition
_warned = False


class _Extension:
    """Outcome of looking for the compiled libraries.

    Attributes:
        path: the loaded library with the schemas and the kernels for CPU; None without one.
        cuda_path: the loaded library with the kernels for CUDA; None without one.
        reason: why there is no `path`.
        cuda_reason: why there is no `cuda_path`.
    """

    def __init__(self, directory: Path) -> None:
        self.path: Path | None = None
        self.cuda_path: Path | None = None
        self.reason = self.cuda_reason = ""
        if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
            self.reason = f"The compiled extension is switched off by {DISABLE_VARIABLE}."
            self.cuda_reason = self.reason
            return
        self.path, self.reason = _load(directory, "_C")
        if self.path is None:
            self.cuda_reason = self.reason
            return
        self.cuda_path, self.cuda_reason = _load(directory, "_C_cuda")


def _load(directory: Path, name: str) -> tuple[Path | None, str]:
    """Loads a library of the extension; its path, or None and why not."""
    candidates = [directory / f"{name}{s}" for s in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None and name == "_C":
        return None, (
            "No compiled extension is installed. To build its kernels run "
            f"`{BUILD_COMMAND}` in a clone of d2det, with a C++ compiler and, "
            "for a GPU, an installed CUDA toolkit."
        )
    if path is None:
        return None, (
            "It was built without kernels for CUDA; a GPU build needs an installed CUDA toolkit."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # an older torch, or one without CUDA: the reference still works
        return None, (
            f"The compiled extension {path} does not load ({str(error).splitlines()[0]}); "
            f"rebuild it with `{BUILD_COMMAND}` in a clone of d2det."
        )
    return path, ""


def _find_extension() -> _Extension:
    """Loads the extension from beside this package, or from the folder that is named instead.

    Raises:
        ImportError: there is none that loads in the named folder; no other takes its place.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    found = _Extension(Path(named).absolute() if named else Path(__file__).resolve().parent.parent)
    if named and found.path is None:
        raise ImportError(f"{FOLDER_VARIABLE}={named}: {found.reason}")
    return found


extension = _find_extension()


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autocast: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Add an operator to the dispatcher, with whatever the extension does not bring itself.

    Args:
        schema: `name(arguments) -> results`; must equal the extension's, which is checked.
        reference: PyTorch implementation for any device. It runs below autograd, with autocast off.
        fake: shapes, dtypes and strides of the results, for torch.compile and meta tensors.
        autocast: given the autocast dtype and the operator's arguments, returns the arguments to
            call it with. None leaves them as they are: for operators that accept mixed precision.

    Raises:
        ImportError: the extension on disk was built from other sources.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        found = getattr(getattr(torch.ops, NAMESPACE), name).default._schema
        if found != torch._C.parse_schema(f"{qualified}{schema[len(name) :]}"):
            raise ImportError(
                f"The compiled extension {extension.path} was built from other sources: it has "
                f"`{found}`, this version of d2det has `{qualified}{schema[len(name) :]}`. Rebuild "
                f"it with `{BUILD_COMMAND}` in a clone, or set {DISABLE_VARIABLE}=1."
            )
    else:
        _library.define(schema)
    references[name] = reference
    _library.impl(name, _reference_kernel(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if autocast is not None:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
                _library.impl(name, _autocast_kernel(name, device_type, autocast), key)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register the derivative of an operator; `<name>_backward` then refuses to be derived."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )

    def no_double_backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"d2det.ops: {name} has no second derivative")

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}_backward", no_double_backward, lib=_library
    )


def implementation(name: str, device_type: str) -> str:
    """ "compiled" or "reference": what runs for an operator on a device type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type, "")
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return "compiled"
    return "reference"


def _reference_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        device_type = _first_tensor(args).device.type
        _warn_once(device_type)
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            # The precision was settled at the operator's border: what happens inside is ours.
            with torch.autocast(device_type, enabled=False):
                return function(*args)
        return function(*args)

    return kernel


def _autocast_kernel(
    name: str, device_type: str, rule: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        arguments = rule(torch.get_autocast_dtype(device_type), *args)
        with torch.autocast(device_type, enabled=False):
            return getattr(getattr(torch.ops, NAMESPACE), name)(*arguments)

    return kernel


def _first_tensor(args: Sequence[Any]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
    raise TypeError("an operator of d2det was called without a tensor")


def _warn_once(device_type: str) -> None:
    """Say, at the first use of any reference implementation, which ones run and why."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(reference_message(device_type), UserWarning, stacklevel=2)


def reference_message(device_type: str) -> str:
    """The warning's text, from what the dispatcher holds now."""
    device_types = [device_type]
    if torch.cuda.is_available() and device_type != "cuda":
        device_types.append("cuda")
    parts = []
    for kind in device_types:
        slow = [n for n in references if implementation(n, kind) == "reference"]
        # A backward operator is worth a word only where its forward one is compiled.
        slow = [n for n in slow if n.removesuffix("_backward") not in slow or n[-9:] != "_backward"]
        fast = [n for n in references if implementation(n, kind) == "compiled"]
        fast = [n for n in fast if not n.endswith("_backward")]
        if slow:
            compiled = f" (compiled: {', '.join(fast)})" if fast else ""
            parts.append(f"{', '.join(slow)} on {kind}{compiled}")
    reason = extension.reason
    if not reason:
        reason = f"The compiled extension {extension.path} has no kernels for them."
        if "cuda" in device_types and extension.cuda_path is None:
            reason += f" {extension.cuda_reason}"
    return (
        "d2det runs the PyTorch reference implementation of "
        f"{'; '.join(parts)}: same results, slower. {reason} "
        "`python -m d2det.ops` lists what each operator uses."
    )
