"""From command line to a checked, frozen config, before anything long starts."""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2det.config import add_d2det_config
from d2det.data.checks import check_datasets
from d2det.data.coco import register_coco
from d2det.evaluation.classes import save_class_names

from .configs import config_names, find_config, merge_file, merge_overrides
from .scale import scale_to_batch
from .trained import check_weights_exist

if TYPE_CHECKING:
    from detectron2.config import CfgNode

TRAIN_NAME = "custom_train"
VAL_NAME = "custom_val"

_logger = logging.getLogger(__name__)


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, and what to do."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Within, errors that input causes become `InputError`: the launcher shows only its message."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, say: the traceback is needed
            raise
        raise InputError(str(error)) from error


def get_cfg(name_or_path: str | Path | None = None) -> CfgNode:
    """detectron2's config with d2det's keys, optionally with a yaml file merged into it.

    Without a GPU, MODEL.DEVICE becomes "cpu" (with one warning).

    Args:
        name_or_path: a yaml file, or a name relative to the project's `configs/`, e.g.
            "quickstart" or "COCO-Detection/d2det_R_50_FPN_2x".

    Raises:
        FileNotFoundError: no such config; the message lists close matches.
        ValueError: a LazyConfig (.py), or a file with unknown keys or unfit values.
    """
    cfg = add_d2det_config(detectron2_get_cfg())
    if name_or_path is not None:
        merge_file(cfg, find_config(name_or_path))
    use_available_device(cfg)
    return cfg


def use_available_device(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to "cpu" where the config asks for a GPU and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        _warn_no_gpu()


@functools.cache  # once per process
def _warn_no_gpu() -> None:
    if comm.is_main_process():
        _logger.warning("No GPU is available: running on the CPU (MODEL.DEVICE cpu).")


def setup(args: Namespace) -> CfgNode:
    """`prepare`, then detectron2's set-up: logs, environment, seed, `OUTPUT_DIR/config.yaml`.

    Also writes the class names to `OUTPUT_DIR/classes.json`, for prediction elsewhere.

    Args:
        args: of `argument_parser`.

    Raises:
        InputError: see `prepare`.
    """
    cfg = prepare(args)
    args = Namespace(**{**vars(args), "config_file": str(find_config(args.config_file))})
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="d2det", configure_stdout=False)
    default_setup(cfg, args)
    if comm.is_main_process() and not args.eval_only:
        save_class_names(cfg)
    return cfg


def prepare(args: Namespace) -> CfgNode:
    """Build the frozen config and check it, its data sets and its weights; write nothing.

    The order is: the file, data sets given on the command line, overrides, scaling to the batch
    size, the device.

    Raises:
        InputError: an unknown config or key, missing or unfit data or weights, or nothing to
            resume.
    """
    if not logging.getLogger("d2det").handlers:
        setup_logger(distributed_rank=comm.get_rank(), name="d2det")
    with input_errors():
        cfg = _build(args)
        if not getattr(args, "checked", False):
            _check(cfg, args)
    return cfg


def _build(args: Namespace) -> CfgNode:
    if not args.config_file:
        raise ValueError(f"--config-file is needed: a yaml file, or one of {config_names()}")
    cfg = get_cfg(args.config_file)
    _register_data(cfg, args)
    merge_overrides(cfg, args.opts or [])
    if args.num_processes > 0:
        cfg.MODEL.DEVICE = "cpu"
    use_available_device(cfg)
    # What was typed is meant as it is; the file's schedule follows the batch size.
    scale_to_batch(cfg, keep=(args.opts or [])[::2])
    cfg.freeze()
    return cfg


def _register_data(cfg: CfgNode, args: Namespace) -> None:
    for split in ("train", "val"):
        given = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if any(given) and not all(given):
            raise ValueError(f"--{split}-json and --{split}-images belong together")
    if not args.train_json and not args.val_json:
        return
    train = val = 0
    if args.train_json:
        train = _register(TRAIN_NAME, args.train_json, args.train_images, purpose="train")
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN_NAME,), ()
        if not args.val_json and comm.is_main_process():
            _logger.warning("No --val-json is given: nothing will be evaluated.")
    if args.val_json:
        source = TRAIN_NAME if args.train_json else None
        val = _register(VAL_NAME, args.val_json, args.val_images, "test", source)
        cfg.DATASETS.TEST = (VAL_NAME,)
    if train or val:  # a test set may come without categories
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = train or val


def _register(
    name: str, json_file: str, images: str, purpose: str, categories_of: str | None = None
) -> int:
    if name in DatasetCatalog.list():  # of an earlier call in this process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    return register_coco(name, json_file, images, purpose=purpose, categories_of=categories_of)


def _check(cfg: CfgNode, args: Namespace) -> None:
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    if args.resume == "must" and not last.is_file():
        raise FileNotFoundError(
            f"nothing to resume: {last} does not exist. Give the OUTPUT_DIR of the run to go on "
            "with, or --resume=auto to start where there is none"
        )
    goes_on = args.resume != "no" and last.is_file()
    if not goes_on:
        check_weights_exist(cfg.MODEL.WEIGHTS)
    if args.eval_only:
        if not cfg.MODEL.WEIGHTS and not goes_on:
            raise ValueError(
                "--eval-only: MODEL.WEIGHTS is empty. Give trained weights (MODEL.WEIGHTS "
                "model_final.pth), or --resume to take the last of OUTPUT_DIR"
            )
        if not cfg.DATASETS.TEST:
            raise ValueError("--eval-only: DATASETS.TEST is empty; give it, or --val-json")
    elif not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; give it, or --train-json")
    elif cfg.MODEL.MIMIC.ENABLED and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        raise ValueError(
            "MODEL.MIMIC.ENABLED needs MODEL.META_ARCHITECTURE MimickingRCNN: GeneralizedRCNN does "
            "not read it"
        )
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        raise ValueError("TEST.AUG.ENABLED: detectron2 has it for detectors, not for segmentation")
    used = cfg.clone()
    used.defrost()
    if args.eval_only:  # data that will not be read need not be there
        used.DATASETS.TRAIN = ()
    _explain_custom_names(used)
    check_datasets(used)


def _explain_custom_names(cfg: CfgNode) -> None:
    registered = DatasetCatalog.list()
    for name, option in ((TRAIN_NAME, "--train-json"), (VAL_NAME, "--val-json")):
        if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) and name not in registered:
            raise ValueError(
                f"data set {name} was given on the command line of another run: give {option} and "
                f"{option.replace('json', 'images')} again, or override DATASETS"
            )
