"""Learning rate and schedule for another batch size than the config was written for."""

from __future__ import annotations

import logging
from collections.abc import Collection

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def scale_to_batch(cfg: CfgNode, keep: Collection[str] = ()) -> CfgNode:
    """Scale the schedule from SOLVER.REFERENCE_IMS_PER_BATCH to the real images a step.

    With f = IMS_PER_BATCH * ACCUMULATE / REFERENCE_IMS_PER_BATCH, learning rates are multiplied by
    f (Goyal et al. 2017) and numbers of iterations divided by f, so that the same number of images
    is seen. The reference is then set to the real number: calling it again changes nothing.

    Args:
        cfg: changed in place, frozen or not; untouched if the reference is 0 or the real number.
        keep: keys, such as "SOLVER.MAX_ITER", whose values are meant as they stand.

    Returns:
        The same object.

    Raises:
        ValueError: a number of images or passes that is not positive.
    """
    solver = cfg.SOLVER
    for key in ("IMS_PER_BATCH", "ACCUMULATE"):
        if solver[key] < 1:
            raise ValueError(f"SOLVER.{key} must be at least 1, not {solver[key]}")
    images, reference = solver.IMS_PER_BATCH * solver.ACCUMULATE, solver.REFERENCE_IMS_PER_BATCH
    if reference < 0:
        raise ValueError(f"SOLVER.REFERENCE_IMS_PER_BATCH must be at least 0, not {reference}")
    if reference in (0, images):
        return cfg
    frozen = cfg.is_frozen()
    cfg.defrost()
    factor = images / reference
    before = _schedule(cfg)

    def scaled(iterations: int) -> int:
        # 0 means "never" or "none"; anything else must not become it.
        return max(1, round(iterations / factor)) if iterations > 0 else iterations

    for key in ("BASE_LR", "BASE_LR_END"):
        if f"SOLVER.{key}" not in keep:
            solver[key] *= factor
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        if f"SOLVER.{key}" not in keep:
            solver[key] = scaled(solver[key])
    if "SOLVER.STEPS" not in keep:
        solver.STEPS = tuple(scaled(step) for step in solver.STEPS)
    if "TEST.EVAL_PERIOD" not in keep:
        cfg.TEST.EVAL_PERIOD = scaled(cfg.TEST.EVAL_PERIOD)
    solver.REFERENCE_IMS_PER_BATCH = images
    changes = ", ".join(f"{k} {before[k]} -> {v}" for k, v in _schedule(cfg).items())
    logger.info("Schedule scaled from %d to %d images a step: %s", reference, images, changes)
    if frozen:
        cfg.freeze()
    return cfg


def _schedule(cfg: CfgNode) -> dict[str, object]:
    keys = ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD")
    return {key: cfg.SOLVER[key] for key in keys} | {"EVAL_PERIOD": cfg.TEST.EVAL_PERIOD}
