from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from d2det.engine.loader import SeededDataset, TrainLoader, build_train_loader
from d2det.engine.resume import preserved_rng
from d2det.engine.sampler import TrainingStream


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        return {"file_name": f"{index}.png", "index": index}


def draw(record: dict) -> dict:
    """A mapper that uses all three generators."""
    return record | {"draw": (random.random(), np.random.rand(), torch.rand(1).item())}


def batches(loader, count: int) -> list:
    return [
        [(x["file_name"], x["image"].shape, x["image"].sum().item()) for x in batch]
        for batch in itertools.islice(loader, count)
    ]


@pytest.fixture
def cfg(tiny, tmp_path):
    return tiny.tiny_cfg(tmp_path / "out", tiny.register_dataset(tmp_path / "data"))


def test_same_batches_with_and_without_workers_and_after_a_restart(cfg):
    reference = batches(build_train_loader(cfg), 9)
    assert len({shape for batch in reference for _, shape, _ in batch}) > 2  # scales and ratios

    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    assert batches(loader, 5) == reference[:5]
    state = loader.state_dict()
    assert state["batches"] == 5  # not those the workers prepared beyond

    resumed = build_train_loader(cfg)
    resumed.load_state_dict(state)
    assert batches(resumed, 4) == reference[5:]

    cfg.SEED = 4
    assert batches(build_train_loader(cfg), 9) != reference


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generators_alone(workers):
    loader = TrainLoader(SeededDataset(Numbers(), draw), TrainingStream(5, 2, seed=0), workers)
    with preserved_rng():
        untouched = draw({})
    list(itertools.islice(loader, 4))
    assert draw({}) == untouched


def test_a_sample_depends_on_its_seed_alone():
    dataset = SeededDataset(Numbers(), draw)
    first = dataset[2, 11]["draw"]
    dataset[1, 5]
    assert dataset[2, 11]["draw"] == first
    assert not set(dataset[2, 12]["draw"]) & set(first)


def test_refused_samples_are_replaced_in_a_fixed_way():
    dataset = SeededDataset(Numbers(), lambda r: r if r["index"] != 3 else None)
    replaced = [dataset[3, seed]["index"] for seed in range(20)]
    assert 3 not in replaced and len(set(replaced)) > 1
    assert replaced == [dataset[3, seed]["index"] for seed in range(20)]
    with pytest.raises(RuntimeError, match="refused 10 images"):
        SeededDataset(Numbers(), lambda r: None)[0, 0]


def test_an_unreadable_image_is_named(cfg, tmp_path):
    victim = Path(tmp_path / "data" / "4.png")
    victim.write_bytes(b"not an image")
    with pytest.raises(RuntimeError, match=r"Training image .*4\.png cannot be loaded"):
        batches(build_train_loader(cfg), 12)


def test_images_without_annotations(tiny, tmp_path):
    cfg = tiny.tiny_cfg(tmp_path, tiny.register_dataset(tmp_path / "data", empty_every=3))
    names = [{n for b in batches(build_train_loader(cfg), 12) for n, *_ in b}]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    names.append({n for b in batches(build_train_loader(cfg), 12) for n, *_ in b})
    assert [len(n) for n in names] == [8, 12]

    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    tiny.register_dataset(tmp_path / "data", empty_every=1)
    with pytest.raises(ValueError, match="Nothing to train on.*FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(cfg)


def test_rare_classes_are_repeated(tiny, tmp_path):
    from detectron2.data import DatasetCatalog

    cfg = tiny.tiny_cfg(tmp_path, tiny.register_dataset(tmp_path / "data"))
    for record in DatasetCatalog.get("tiny")[1:]:
        record["annotations"] = record["annotations"][:1]  # class 1 remains in image 0 alone
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.75
    factors = build_train_loader(cfg).stream.repeat_factors
    # sqrt(0.75 / (1 / 12)) = 3
    assert factors.tolist() == pytest.approx([3.0] + [1.0] * 11)

    cfg.DATALOADER.SAMPLER_TRAIN = "Other"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN 'Other'"):
        build_train_loader(cfg)


def test_a_negative_seed_is_picked_and_logged(cfg, engine_log):
    cfg.SEED = -1
    seed = build_train_loader(cfg).stream.seed
    assert seed >= 0 and str(seed) in engine_log.text


@pytest.mark.parametrize(
    ("sampling", "sizes", "allowed"),
    [("choice", (40, 56, 72), {40, 56, 72}), ("range", (40, 72), set(range(40, 73)))],
)
def test_several_scales_with_workers_and_after_a_restart(cfg, sampling, sizes, allowed):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = sizes, 200
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sampling
    reference = batches(build_train_loader(cfg), 16)
    seen = {min(shape[1:]) for batch in reference for _, shape, _ in batch}
    assert seen <= allowed
    assert seen == allowed if sampling == "choice" else len(seen) > 8

    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    assert batches(loader, 7) == reference[:7]
    resumed = build_train_loader(cfg)
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed, 9) == reference[7:]


@pytest.mark.parametrize(
    ("sampling", "sizes", "message"),
    [
        (
            "range",
            (400, 800, 1400),
            r"\(400, 800, 1400\): .*'range' needs two sizes, the smallest",
        ),
        ("range", (800, 400), r"\(800, 400\): .*'range' needs two sizes, the smallest"),
        ("list", (400, 800), r"SAMPLING 'list' is not one of 'choice', 'range'"),
        ("choice", (), r"INPUT.MIN_SIZE_TRAIN is empty"),
    ],
)
def test_unfit_scales_are_refused(cfg, sampling, sizes, message):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sizes, sampling
    with pytest.raises(ValueError, match=message):
        build_train_loader(cfg)
