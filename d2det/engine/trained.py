"""Finding trained weights, and loading them whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .checkpoint import Checkpointer

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def find_weights(path: str | Path) -> str:
    """Resolve a file, URL or output folder to one checkpoint.

    In an output folder, `model_best.pth` is preferred to the last checkpoint.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
    """
    text = str(path)
    found = Path(text).expanduser()
    if "://" in text or not found.is_dir():
        check_weights_exist(text)
        return text
    candidates = [found / "model_best.pth", *last_checkpoint(found)]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(f"folder {found} has no checkpoint (model_best.pth or last_checkpoint)")


def last_checkpoint(folder: str | Path) -> list[Path]:
    """The checkpoint that `folder/last_checkpoint` names, as a list; [] where there is none."""
    tag = Path(folder) / "last_checkpoint"
    return [tag.parent / tag.read_text().strip()] if tag.is_file() else []


def check_weights_exist(path: str) -> None:
    """Raise FileNotFoundError where `path` is a local file that does not exist. "" is fine."""
    if not path or "://" in path:
        return
    file = Path(path.partition("?")[0]).expanduser()  # detectron2 allows a query after the name
    if not file.is_file():
        raise FileNotFoundError(
            f"weights {path} do not exist (MODEL.WEIGHTS; an empty value starts from scratch)"
        )


def load_trained(model: nn.Module, path: str | Path) -> str:
    """Load a whole trained model, for evaluation or prediction.

    Args:
        model: a detectron2 model, changed in place; put in evaluation mode, as parts that only
            training has need not be in the file.
        path: as in `find_weights`.

    Returns:
        The file or URL that was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is damaged or cannot be fetched.
        ValueError: parts of the model are missing in the file or have other shapes: detections
            would come from untrained parts.
    """
    weights = find_weights(path)
    model.eval()
    _WholeCheckpointer(model).load(weights)
    return weights


def weights_to_evaluate(cfg: CfgNode, resume: str) -> str:
    """MODEL.WEIGHTS, or with `resume` ("must", "auto") the last checkpoint of OUTPUT_DIR."""
    last = last_checkpoint(cfg.OUTPUT_DIR) if resume != "no" else []
    return str(last[0]) if last else cfg.MODEL.WEIGHTS


class _WholeCheckpointer(Checkpointer):
    def _log_incompatible_keys(self, incompatible: Any) -> None:
        problems = [
            f"{key}: {tuple(there)} in the file, {tuple(here)} in the model"
            for key, there, here in incompatible.incorrect_shapes
        ]
        wrong = {key for key, _, _ in incompatible.incorrect_shapes}
        problems += [
            f"{key}: not in the file"
            for key in incompatible.missing_keys
            if key not in wrong and not key.endswith("num_batches_tracked")
        ]
        if problems:
            shown = "\n  ".join(problems[:8]) + ("\n  ..." if len(problems) > 8 else "")
            raise ValueError(
                f"the weights {self._path} do not hold the whole model; {len(problems)} parts do "
                f"not fit (made with another config or class count?):\n  {shown}"
            )
        super()._log_incompatible_keys(incompatible)
