"""What a run shows at its end: tables, pictures, curves, and where they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .build import inference_folder
from .coco import BOX_FILE, MASK_FILE
from .curves import write_curves
from .pictures import write_pictures
from .results import by_dataset, class_table, notes, summary_table, write_results

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_logger = logging.getLogger(__name__)


def write_report(cfg: CfgNode, results: Mapping[str, Any] | None) -> None:
    """Print the results, write all that can be looked at into OUTPUT_DIR, and print the paths.

    Run it in the main process, after the evaluation.

    Args:
        cfg: its DATASETS.TEST were evaluated.
        results: of `Trainer.test`.
    """
    keyed = by_dataset(cfg, results)
    written: list[tuple[str, Path]] = []
    if keyed:
        per_class = class_table(keyed)
        parts = (summary_table(keyed), notes(keyed), per_class)
        tables = "\n\n".join(part for part in parts if part)
        _logger.info(f"Results in percent:\n\n{tables}\n")
        written += [("table", path) for path in write_results(keyed, cfg.OUTPUT_DIR)]
    for name in cfg.DATASETS.TEST:
        for augmented in (False, True) if cfg.TEST.AUG.ENABLED else (False,):
            left = Path(inference_folder(cfg, name, augmented=augmented))
            for kind, file in (("detections", left / BOX_FILE), ("masks", left / MASK_FILE)):
                if file.is_file():
                    written.append((kind, file))
        folder = write_pictures(cfg, name)
        if folder is not None:
            written.append(("pictures", folder))
    curves = write_curves(cfg.OUTPUT_DIR)
    if curves is not None:
        written.append(("curves", curves))
    lines = "".join(f"\n  {kind + ':':<12}{path}" for kind, path in written)
    _logger.info(f"Written:{lines or ' nothing'}")
