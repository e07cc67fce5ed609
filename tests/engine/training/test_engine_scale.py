from __future__ import annotations

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg

from d2det.config import add_d2det_config
from d2det.engine.scale import scale_to_batch


def config(**solver):
    cfg = add_d2det_config(get_cfg())
    values = {
        "REFERENCE_IMS_PER_BATCH": 16,
        "BASE_LR": 0.02,
        "BASE_LR_END": 0.002,
        "MAX_ITER": 90000,
        "STEPS": (60000, 80000),
        "WARMUP_ITERS": 1000,
        "CHECKPOINT_PERIOD": 5000,
    } | solver
    for key, value in values.items():
        cfg.SOLVER[key] = value
    cfg.TEST.EVAL_PERIOD = 10000
    return cfg


@pytest.mark.parametrize("keys", [{"IMS_PER_BATCH": 4}, {"IMS_PER_BATCH": 2, "ACCUMULATE": 2}])
def test_a_quarter_of_the_images(keys, engine_log):
    cfg = config(**keys)
    assert scale_to_batch(cfg) is cfg
    solver = cfg.SOLVER
    assert solver.BASE_LR == pytest.approx(0.005)
    assert solver.BASE_LR_END == pytest.approx(0.0005)
    assert solver.MAX_ITER == 360000
    assert solver.STEPS == (240000, 320000)
    assert solver.WARMUP_ITERS == 4000
    assert solver.CHECKPOINT_PERIOD == 20000
    assert cfg.TEST.EVAL_PERIOD == 40000
    assert solver.IMS_PER_BATCH == keys["IMS_PER_BATCH"]
    assert (
        "from 16 to 4 images" in engine_log.text and "MAX_ITER 90000 -> 360000" in engine_log.text
    )

    after = cfg.dump()
    assert scale_to_batch(cfg).dump() == after


def test_typed_values_stand():
    cfg = config(IMS_PER_BATCH=4)
    scale_to_batch(cfg, keep=["SOLVER.MAX_ITER", "SOLVER.STEPS", "TEST.EVAL_PERIOD"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (90000, (60000, 80000))
    assert cfg.TEST.EVAL_PERIOD == 10000
    assert cfg.SOLVER.WARMUP_ITERS == 4000


def test_more_images_keep_what_is_never_and_never_reach_it():
    cfg = config(IMS_PER_BATCH=64, WARMUP_ITERS=0, CHECKPOINT_PERIOD=1, MAX_ITER=90002)
    cfg.TEST.EVAL_PERIOD = 0
    cfg.freeze()
    scale_to_batch(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.08)
    assert cfg.SOLVER.MAX_ITER == 22500  # 22500.5, to even
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (
        0,
        1,
        0,
    )
    assert cfg.is_frozen()


@pytest.mark.parametrize("reference", [0, 16])
def test_nothing_to_scale(reference):
    cfg = config(REFERENCE_IMS_PER_BATCH=reference, IMS_PER_BATCH=16)
    before = cfg.dump()
    assert scale_to_batch(cfg).dump() == before


@pytest.mark.parametrize("key", ["IMS_PER_BATCH", "ACCUMULATE"])
def test_bad_numbers(key):
    with pytest.raises(ValueError, match=f"SOLVER.{key} must be at least 1"):
        scale_to_batch(config(**{key: 0}))
