"""D2Det and deformable convolution for detectron2.

`import d2det` registers the detector with detectron2 where detectron2 is installed. Without it, the
operators (`d2det.ops`), the method itself (`d2det.core`) and the detector in torchvision's R-CNN
(`d2det.torchvision`) are still usable.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"

# Plugin features, looked up on first use: each imports detectron2.
_PLUGIN = {
    "add_d2det_config": "d2det.config",
    "get_cfg": "d2det.engine.setup",
    "Predictor": "d2det.engine.predictor",
}

__all__ = ["DETECTRON2_COMMIT", "__version__", "model_zoo", *_PLUGIN]


def __getattr__(name: str) -> Any:
    if name == "model_zoo":
        return import_module("d2det.model_zoo")
    if name not in _PLUGIN:
        raise AttributeError(f"module 'd2det' has no attribute {name!r}")
    if not _has_detectron2():
        raise ImportError(
            f"d2det.{name} needs detectron2, which is not installed. Install it with\n"
            "  pip install 'setuptools>=77.0.3,<82' wheel\n"
            "  pip install --no-build-isolation --no-cache-dir "
            f"'git+https://github.com/facebookresearch/detectron2.git@{DETECTRON2_COMMIT}'"
        )
    return getattr(import_module(_PLUGIN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), "model_zoo", *_PLUGIN})


def _has_detectron2() -> bool:
    return find_spec("detectron2") is not None


if _has_detectron2():
    import d2det.data
    import d2det.modeling  # noqa: F401  registers the heads, poolers and backbones
