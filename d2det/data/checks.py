"""Do the data sets that a config names exist, and do they fit the model?"""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2det.evaluation.lvis import check_lvis

from .mapper import masks_may_lack

if TYPE_CHECKING:
    from detectron2.config import CfgNode


# Share of objects without a mask up to which mask heads train that have to leave them out.
MAX_WITHOUT_MASK = 0.05


def check_datasets(cfg: CfgNode) -> None:
    """Check everything about DATASETS.TRAIN and DATASETS.TEST that would fail later, or mislead.

    Either may be empty, but not both. Data sets whose class names are known only after loading
    are loaded; generated ones are not drawn.

    Args:
        cfg: a complete config.

    Raises:
        FileNotFoundError: files of a data set are missing.
        ValueError: an unknown name, an empty data set, one without boxes or masks where the
            training needs them, classes that differ between data sets or from the model, or a
            package that the data set needs is missing.
    """
    train, test = tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST)
    names = tuple(dict.fromkeys(train + test))
    if not names:
        raise ValueError(
            "no data set is given: set DATASETS.TRAIN or DATASETS.TEST, or give --train-json and "
            "--train-images"
        )
    for name in names:
        _check_known(name)
        _check_files(name)
        if MetadataCatalog.get(name).get("evaluator_type") == "lvis":
            check_lvis()
        _load_if_needed(name)
    _check_classes(cfg, names)
    for name in train:
        _check_trainable(cfg, name)


def _check_known(name: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "there is none of a similar name."
    raise ValueError(
        f"data set {name!r} is not registered; {hint} Data in COCO's format needs no name: give "
        "--train-json and --train-images, --val-json and --val-images"
    )


def _check_files(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("generated"):
        return  # drawn when it is first asked for
    for key in ("json_file", "image_root", "dirname", "image_dir", "gt_dir", "sem_seg_root"):
        path = metadata.get(key)
        if not path or os.path.exists(path):
            continue
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise FileNotFoundError(
            f"data set {name!r}: {os.path.abspath(path)} is not there. detectron2 looks for its "
            f"named data sets in the folder DETECTRON2_DATASETS, now {os.path.abspath(root)}: set "
            "this environment variable, or put the data there"
        )


def _load_if_needed(name: str) -> None:
    """Load a data set that tells its classes only then, as detectron2's own registration does."""
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes") or metadata.get("stuff_classes")
    if known or metadata.get("has_annotations") is not None:
        return
    if len(DatasetCatalog.get(name)) == 0:
        raise ValueError(f"data set {name!r} is empty: it has no images")


def _check_classes(cfg: CfgNode, names: tuple[str, ...]) -> None:
    kind = "stuff_classes" if _is_segmentation(cfg) else "thing_classes"
    classes = {name: list(MetadataCatalog.get(name).get(kind) or []) for name in names}
    # A test set without annotations may do without categories; others may not be of things.
    classes = {name: found for name, found in classes.items() if found}
    if not classes:
        return
    first, wanted = next(iter(classes.items()))
    for name, found in classes.items():
        if found != wanted:
            raise ValueError(
                f"data sets {first!r} and {name!r} have different classes: "
                f"{_first_gap(wanted, found)}. The same names are needed, in the same order of ids"
            )
    key = _class_count_key(cfg)
    if key is None:
        return
    count = cfg
    for part in key.split("."):
        count = count[part]
    if count != len(wanted):
        raise ValueError(
            f"{key} is {count}, but data set {first!r} has {len(wanted)} classes: set "
            f"{key} {len(wanted)}"
        )


def _class_count_key(cfg: CfgNode) -> str | None:
    if cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS"):
        return "MODEL.RETINANET.NUM_CLASSES"
    if _is_segmentation(cfg):
        return "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return None  # it knows no classes of objects
    return "MODEL.ROI_HEADS.NUM_CLASSES"


def _is_segmentation(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"


def _first_gap(wanted: list[str], found: list[str]) -> str:
    for place, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a != b:
            return f"class {place} is {a!r} in the one and {b!r} in the other"
    return f"{len(wanted)} in the one and {len(found)} in the other"


def _check_labels(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if not metadata.get("stuff_classes"):
        raise ValueError(
            f"data set {name!r} has no classes of pixels (stuff_classes): semantic segmentation "
            "needs them"
        )


def _check_trainable(cfg: CfgNode, name: str) -> None:
    metadata = MetadataCatalog.get(name)
    where = metadata.get("json_file", name)
    if _is_segmentation(cfg):
        _check_labels(name)
        return
    if metadata.get("has_annotations") is False:
        raise ValueError(
            f"data set {name!r} ({where}) has no boxes: it can be tested, but not trained on"
        )
    if not cfg.MODEL.MASK_ON:
        return
    if metadata.get("has_masks") is False:
        raise ValueError(
            f"MODEL.MASK_ON is True, but data set {name!r} ({where}) has no masks: set "
            "MODEL.MASK_ON False, or choose a config without masks"
        )
    share = metadata.get("without_mask", 0.0)
    if share > MAX_WITHOUT_MASK and not masks_may_lack(cfg):
        raise ValueError(
            f"data set {name!r} ({where}) has no valid mask for {share:.0%} of its objects, which "
            f"{cfg.MODEL.ROI_MASK_HEAD.NAME} would learn as background: choose a config with "
            "D2DetMaskHead, or set MODEL.MASK_ON False"
        )
    if metadata.get("mask_format") == "bitmask" and cfg.INPUT.MASK_FORMAT == "polygon":
        raise ValueError(
            f"data set {name!r} ({where}) holds masks as RLE: set INPUT.MASK_FORMAT bitmask"
        )
