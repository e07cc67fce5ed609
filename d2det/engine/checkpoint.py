"""Checkpoints: written atomically, loaded with a full account of what did not fit."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from d2det.engine import weights

logger = logging.getLogger(__name__)

RESUME_CHOICES = ("no", "must", "auto")
TRAINING_ONLY = ("mimic.",)  # prefixes of parameters that no model needs outside training
_LAST = "last_checkpoint"
_SOURCES = (
    "Give the path of a .pth or .pkl file, an address such as 'detectron2://...' or 'https://...', "
    "'torchvision://resnet50', or '' to start from scratch."
)


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces `path` only once it is complete and on disk.

    A crash at any moment leaves `path` as it was or as it was to become, and at most one hidden
    temporary file beside it, which the next write of the same name replaces.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make a rename durable; not every system lets a folder be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, with atomic files, strict resuming and readable reports.

    Files are detectron2's (`{"model": ..., "trainer": ...}`), so that either reads the other's.
    `load` also takes torchvision's ResNets, as "torchvision://resnet50" or as a .pth file.

    Attributes:
        resumed: whether the last `resume_or_load` went on from a checkpoint in `save_dir`.
    """

    resumed: bool = False
    _path: str = ""
    _strict: bool = False

    def save(self, name: str, *, tag: bool = True, only_model: bool = False, **extra: Any) -> None:
        """Write `<save_dir>/<name>.pth` in the main process.

        Args:
            name: file name without its ending.
            tag: whether resuming is to go on from this file.
            only_model: leave the checkpointables out.
            extra: more to store.

        Raises:
            OSError: the file cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **extra}
        if not only_model:
            data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        logger.info("Saving checkpoint to %s", path)
        os.makedirs(self.save_dir, exist_ok=True)
        try:
            with atomic_write(path) as file:
                torch.save(data, file)
            if tag:
                self.tag_last_checkpoint(basename)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OSError(
                f"Checkpoint {path} cannot be written: {error}. Earlier checkpoints are intact; "
                "free some space and go on from the last one with --resume."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, _LAST), "w") as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether `save_dir` names a last checkpoint; the same answer in all processes.

        Raises:
            FileNotFoundError: some processes see it and others do not.
        """
        seen = comm.all_gather(super().has_checkpoint())
        if any(seen) and not all(seen):
            raise FileNotFoundError(
                f"{os.path.join(self.save_dir, _LAST)} is visible to {sum(seen)} of {len(seen)} "
                "processes: OUTPUT_DIR must be a folder that all machines share."
            )
        return seen[0]

    def resume_or_load(self, path: str, *, resume: bool | str = "auto") -> dict[str, Any]:
        """Go on from the last checkpoint in `save_dir`, or start from the weights in `path`.

        Args:
            path: weights to start from; "" for none.
            resume: "no" loads `path`; "must" goes on and fails where there is nothing to go on
                from; "auto" goes on if it can and loads `path` otherwise. detectron2's True and
                False mean "auto" and "no".

        Returns:
            What the file held beside the model and the checkpointables.

        Raises:
            FileNotFoundError: "must" without a checkpoint, or a file is missing.
            ValueError: the checkpoint does not fit what is to be resumed.
            RuntimeError: the file is damaged.
        """
        if isinstance(resume, bool):
            resume = "auto" if resume else "no"
        if resume not in RESUME_CHOICES:
            raise ValueError(f"resume must be one of {RESUME_CHOICES}, not {resume!r}")
        found = self.has_checkpoint()
        if resume == "must" and not found:
            raise FileNotFoundError(
                f"--resume: there is no {_LAST} in {self.save_dir!r}, so nothing to go on from. "
                "Check OUTPUT_DIR; to start when there is nothing yet, leave --resume out or use "
                "--resume=auto."
            )
        if resume == "no" and found:
            logger.warning(
                "%s already holds checkpoints (%s). This run starts anew and will overwrite them "
                "as it goes; to go on from the last one, use --resume.",
                self.save_dir,
                os.path.basename(self.get_checkpoint_file()),
            )
        self.resumed = found and resume != "no"
        if self.resumed:
            return self.load(self.get_checkpoint_file(), strict=True)
        return self.load(path, checkpointables=[])

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False
    ) -> dict[str, Any]:
        """Load a file's weights and, by default, all checkpointables that it holds.

        Args:
            path: see `MODEL.WEIGHTS`; "" loads nothing.
            checkpointables: names to load; None: all.
            strict: everything must be there and fit. Otherwise all that fits is loaded, and one
                message lists the rest.

        Raises:
            FileNotFoundError: no such file.
            RuntimeError: it cannot be read or downloaded.
            ValueError: nothing in it fits, or with `strict`, something does not.
        """
        self._path, self._strict = path, strict
        try:
            if path.startswith(weights.PREFIX):
                checkpoint = {"model": weights.torchvision_state_dict(path)}
                self._log_incompatible_keys(self._load_model(checkpoint))
                return checkpoint
            return super().load(self._local(path), checkpointables)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it behind after an error

    def _local(self, path: str) -> str:
        """A path that is sure to exist; with its query, which detectron2 reads."""
        if not path:
            return path
        bare, mark, query = path.partition("?")
        try:
            local = self.path_manager.get_local_path(bare)
        except Exception as error:  # whatever a handler's client raises
            raise RuntimeError(
                f"Weights {path!r} cannot be fetched: {error}. Where there is no network, download "
                "the file elsewhere and give its path as MODEL.WEIGHTS."
            ) from error
        if not os.path.isfile(local):
            if self._strict:
                raise FileNotFoundError(
                    f"Checkpoint {local!r} does not exist.{self._other_files()}"
                )
            raise FileNotFoundError(f"Weights file {path!r} does not exist. {_SOURCES}")
        return local + mark + query

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            checkpoint = super()._load_file(filename)
        except Exception as error:  # a damaged file can raise nearly anything
            raise RuntimeError(self._unreadable(filename, error)) from error
        lacking = [key for key in self.checkpointables if key not in checkpoint]
        if self._strict and lacking:
            raise ValueError(
                f"{filename} holds no state of {', '.join(lacking)}: it is no checkpoint of a "
                "training that can go on. To start a new one from its weights, give it as "
                f"MODEL.WEIGHTS, without --resume.{self._other_files()}"
            )
        return checkpoint

    def _torch_load(self, f: str) -> dict[str, Any]:
        loaded = super()._torch_load(f)
        if "model" not in loaded and isinstance(loaded.get("state_dict"), dict):
            loaded = {"model": loaded["state_dict"]}
        return loaded

    def _unreadable(self, filename: str, error: Exception) -> str:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "Weights only load failed" in str(error) and zipfile.is_zipfile(filename):
            return (
                f"{filename} holds Python objects beside tensors, which could run code when read, "
                f"so it is not loaded ({reason}). If you trust it, load it with "
                "torch.load(..., weights_only=False) and save its state dict alone."
            )
        return (
            f"{filename} cannot be read ({type(error).__name__}: {reason}): it is damaged, "
            f"incomplete, or no checkpoint. Copy or download it again.{self._other_files()}"
        )

    def _other_files(self) -> str:
        """Advice for when the last checkpoint cannot be used."""
        if not self._strict or not self.save_dir or not os.path.isdir(self.save_dir):
            return ""
        last = os.path.basename(self.get_checkpoint_file())
        others = sorted(f for f in os.listdir(self.save_dir) if f.endswith(".pth") and f != last)
        return (
            f" To go on from an earlier checkpoint, write its name into "
            f"{os.path.join(self.save_dir, _LAST)}; there are: {', '.join(others) or 'none'}."
        )

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if weights.is_torchvision_resnet(checkpoint["model"]):
            checkpoint["model"] = weights.to_detectron2_names(checkpoint["model"], self.model)
        ours = self.model.state_dict()
        if not self._strict:
            checkpoint["model"] = _without_training_only(checkpoint["model"], ours)
        names = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        # Loading reports what was skipped for its shape as missing too.
        if names and ours and set(ours) <= set(incompatible.missing_keys):
            raise ValueError(
                f"None of the {len(names)} tensors in {self._path!r} fits the model: it holds such "
                f"as {', '.join(names[:3])}, and the model such as {', '.join(list(ours)[:3])}."
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """One message with all that was left, or with `strict` one error."""
        shapes = incompatible.incorrect_shapes
        skipped = {name for name, _, _ in shapes}
        missing = [name for name in incompatible.missing_keys if name not in skipped]
        total = len(self.model.state_dict())
        lines = [f"{self._path}: {total - len(missing) - len(shapes)} of {total} tensors loaded."]
        if shapes:
            lines.append("Not loaded, because shapes differ:")
            lines += [
                f"  {n}: {there} in the file, {here} in the model" for n, there, here in shapes
            ]
        if missing:
            lines.append("Not in the file:")
            lines += _grouped(missing)
        if incompatible.unexpected_keys:
            lines.append("In the file, but not in the model:")
            lines += _grouped(incompatible.unexpected_keys)
        if len(lines) == 1:
            logger.info(lines[0])
        elif self._strict:
            raise ValueError(
                "--resume: the checkpoint does not fit the model.\n" + "\n".join(lines) + "\nUse "
                "the config of the interrupted training, or start a new one from these weights "
                "with MODEL.WEIGHTS, another OUTPUT_DIR and without --resume."
            )
        else:
            lines.append("What was not loaded starts from its initial values.")
            logger.warning("\n".join(lines))


def _without_training_only(theirs: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what served training and this model does not have: nothing is amiss."""
    return {k: v for k, v in theirs.items() if k in ours or not k.startswith(TRAINING_ONLY)}


def _grouped(names: Iterable[str]) -> list[str]:
    """'  module: weight, bias' for each module."""
    modules: dict[str, list[str]] = {}
    for name in sorted(names):
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, []).append(parameter)
    return [f"  {module or '(top)'}: {', '.join(leaf)}" for module, leaf in modules.items()]
