from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("detectron2")

from d2det.engine.sampler import TrainingStream, derive_seed


def take(stream: TrainingStream, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(stream, count))


def indices(batches: list[list[tuple[int, int]]]) -> list[int]:
    return [index for batch in batches for index, _ in batch]


def test_each_epoch_has_each_image_once_over_all_processes():
    ranks = [TrainingStream(12, 2, seed=1, rank=r, world_size=3) for r in range(3)]
    for epoch in range(3):
        seen = [i for r in ranks for i in indices(take(r, 2 * epoch + 2)[2 * epoch :])]
        assert sorted(seen) == list(range(12))


def test_order_changes_with_epoch_and_seed():
    stream = indices(take(TrainingStream(50, 5, seed=1), 20))
    assert stream[:50] != stream[50:]
    assert stream != indices(take(TrainingStream(50, 5, seed=2), 20))
    assert stream == indices(take(TrainingStream(50, 5, seed=1), 20))


@pytest.mark.parametrize("start", [0, 1, 7, 40])
def test_start_skips_exactly_that_many_batches(start):
    def make() -> TrainingStream:
        factors = torch.linspace(0.3, 2.7, 11)
        groups = [0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0]
        return TrainingStream(
            11, 3, seed=4, rank=1, world_size=2, repeat_factors=factors, groups=groups
        )

    later = make()
    later.start = start
    assert take(later, 5) == take(make(), start + 5)[start:]


def test_batches_hold_one_group_and_no_image_is_lost():
    groups = [0] * 7 + [1] * 3
    batches = take(TrainingStream(10, 4, seed=0, groups=groups), 50)
    assert all(len({groups[i] for i, _ in batch}) == 1 for batch in batches)
    counts = [indices(batches).count(i) for i in range(10)]
    # 200 images are 20 epochs, of which at most 3 + 3 images wait for company.
    assert min(counts) >= 19 - 1 and max(counts) <= 21


def test_repeat_factors_are_reached_on_average():
    factors = torch.tensor([0.0, 1.0, 2.0, 2.5])
    stream = TrainingStream(4, 1, seed=0, repeat_factors=factors)
    epochs = [stream._epoch(e) for e in range(400)]
    for epoch in epochs:
        assert epoch.count(0) == 0 and epoch.count(1) == 1 and epoch.count(2) == 2
        assert epoch.count(3) in (2, 3)
    # 400 fair coins: 5 standard deviations are 50 heads.
    assert abs(sum(e.count(3) for e in epochs) - 1000) < 50


def test_every_sample_has_its_own_seed():
    batches = take(TrainingStream(6, 2, seed=0), 30)
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    other = [s for batch in take(TrainingStream(6, 2, seed=1), 30) for _, s in batch]
    assert not set(seeds) & set(other)
    assert derive_seed(0, 0, 5) != derive_seed(0, 1, 5)


def test_another_batch_size_goes_on_after_as_many_images(engine_log):
    state = TrainingStream(10, 4, seed=7, world_size=2).state_dict(9)  # 72 images
    stream = TrainingStream(10, 3, seed=0, world_size=4)
    stream.load_state_dict(state)
    assert (stream.start, stream.seed) == (6, 7)
    assert "not bit for bit" in engine_log.text

    same = TrainingStream(10, 4, seed=7, world_size=2)
    engine_log.clear()
    same.load_state_dict(state)
    assert same.start == 9 and not engine_log.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, "size"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"groups": [0]}, "groups has 1 entries for 3 images"),
        ({"repeat_factors": torch.zeros(3)}, "positive sum"),
    ],
)
def test_bad_arguments(keys, message):
    with pytest.raises(ValueError, match=message):
        TrainingStream(**({"size": 3, "batch_size": 1, "seed": 0} | keys))
