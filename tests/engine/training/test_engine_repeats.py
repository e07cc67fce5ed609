"""Repeat-factor sampling (LVIS): how often, against detectron2's sampler, and exact resume."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data.samplers import RepeatFactorTrainingSampler

from d2det.engine.sampler import TrainingStream

EPOCHS = 300


def records(frequencies: dict[int, int], size: int) -> list[dict]:
    """Images with class c in the first `frequencies[c]` of them."""
    return [
        {"annotations": [{"category_id": c} for c, n in frequencies.items() if i < n]}
        for i in range(size)
    ]


def test_images_appear_as_often_as_in_detectron2():
    data = records({0: 1, 1: 4, 2: 37, 3: 60}, 60)
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(data, 0.3)
    expected = [max(1.0, math.sqrt(0.3 / (n / 60))) for n in (1, 4, 37, 60)]
    per_image = [expected[0]] + [expected[1]] * 3 + [1.0] * 56
    assert factors.tolist() == pytest.approx(per_image)
    stream = TrainingStream(60, 5, seed=3, repeat_factors=factors)
    ours = torch.zeros(60)
    for epoch in range(EPOCHS):
        ours += torch.bincount(torch.tensor(stream._epoch(epoch)), minlength=60)
    theirs = torch.zeros(60)
    sampler, generator = RepeatFactorTrainingSampler(factors, seed=3), torch.Generator()
    generator.manual_seed(3)
    for _ in range(EPOCHS):
        theirs += torch.bincount(sampler._get_epoch_indices(generator).long(), minlength=60)
    for counts in (ours, theirs):
        # The fraction of a factor is a coin of at most 1/4 variance: 5 standard deviations.
        assert (counts / EPOCHS - factors).abs().max() < 5 * 0.5 / math.sqrt(EPOCHS)
    # Epochs differ in what is rounded up, and are the same whenever they are drawn again.
    assert stream._epoch(1) == TrainingStream(60, 5, seed=3, repeat_factors=factors)._epoch(1)
    assert len({len(stream._epoch(e)) for e in range(20)}) > 1


def test_all_processes_share_the_repeated_epochs():
    factors = torch.tensor([2.5, 1.0, 1.0, 1.5, 1.0, 3.0])
    ranks = [
        TrainingStream(6, 2, seed=1, rank=r, world_size=2, repeat_factors=factors) for r in range(2)
    ]
    batches = [[i for i, _ in batch] for r in ranks for batch in itertools.islice(iter(r), 10)]
    alone = TrainingStream(6, 1, seed=1, repeat_factors=factors)
    expected = [batch[0][0] for batch in itertools.islice(iter(alone), 40)]
    assert sorted(i for batch in batches for i in batch) == sorted(expected)


def test_resumed_equals_uninterrupted(tiny, tmp_path):
    """Weights after a training with repeats that was stopped after 4 of 8 iterations."""
    ends = {}
    for name, stops in (("whole", (8,)), ("cut", (4, 8))):
        for number, stop in enumerate(stops):
            tiny.register_dataset(tmp_path / "data")
            cfg = tiny.tiny_cfg(
                tmp_path / name,
                DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler",
                DATALOADER__REPEAT_THRESHOLD=1.6,  # each class is in every image: sqrt(1.6) = 1.26
                SOLVER__MAX_ITER=8,
                SOLVER__CHECKPOINT_PERIOD=4,
                SEED=3 if number == 0 else 77,
            )
            tiny.seed_model(cfg.SEED)
            trainer = tiny.TinyTrainer(cfg)
            assert trainer.data_loader.stream.repeat_factors.unique().tolist() == pytest.approx(
                [math.sqrt(1.6)]
            )
            trainer.max_iter = stop
            trainer.resume_or_load("no" if number == 0 else "must")
            trainer.train()
        ends[name] = trainer
    assert ends["cut"].start_iter == 4
    first, second = (tiny.parameters(ends[name].model) for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
