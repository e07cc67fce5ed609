"""The training loader: batches that depend on the seed and their number alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from d2det.data.mapper import TrainMapper
from d2det.engine.resume import seeded_rng
from d2det.engine.sampler import TrainingStream, derive_seed

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 10


class SeededDataset(Dataset):
    """Maps records with the random generators set by the sample's own seed.

    Which worker makes a sample, and what it made before, then no longer matters.

    Args:
        dataset: records in detectron2's format, by index.
        mapper: makes a training sample of a record; None as its result asks for another image.
    """

    def __init__(self, dataset: Dataset, mapper: Callable[[dict], dict | None]) -> None:
        self.dataset = dataset
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, seed = item
        for attempt in range(_MAX_REPLACEMENTS):
            record = self.dataset[index]
            name = record.get("file_name", f"number {index}")
            with seeded_rng(seed):
                try:
                    sample = self.mapper(record)
                except Exception as error:
                    raise RuntimeError(
                        f"Training image {name} cannot be loaded: {type(error).__name__}: {error}. "
                        "Mend the file, or take it out of the annotation file."
                    ) from error
            if sample is not None:
                return sample
            index = derive_seed(seed, attempt) % len(self)
        raise RuntimeError(
            f"The data mapper refused {_MAX_REPLACEMENTS} images in a row, the last one {name}."
        )


class TrainLoader:
    """Endless batches, with a position that can be saved and restored.

    Batches that workers have prepared but training has not taken are not counted: they come again.

    Args:
        dataset: samples by (index, seed).
        stream: which samples make up which batch.
        num_workers: data processes; 0 loads in this one.
    """

    def __init__(self, dataset: Dataset, stream: TrainingStream, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.stream = stream
        self.num_workers = num_workers
        self._used = 0

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.stream,
            num_workers=self.num_workers,
            collate_fn=_as_list,
            # Without one, the workers' base seed would be drawn from the model's generator.
            generator=torch.Generator().manual_seed(self.stream.seed),
        )
        self._used = self.stream.start
        for batch in loader:
            self._used += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict(self._used)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes effect at the next `iter()`."""
        self.stream.load_state_dict(state)
        self._used = self.stream.start


def _as_list(batch: list[dict]) -> list[dict]:
    return batch


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], dict | None] | None = None
) -> TrainLoader:
    """The training loader of a config. All processes must call it together.

    Read from the config: DATASETS.TRAIN, DATALOADER.{SAMPLER_TRAIN, REPEAT_THRESHOLD, REPEAT_SQRT,
    FILTER_EMPTY_ANNOTATIONS, ASPECT_RATIO_GROUPING, NUM_WORKERS}, SOLVER.IMS_PER_BATCH, SEED (a
    negative one: a random seed, logged), and INPUT by `TrainMapper`.

    Raises:
        ValueError: the batch size does not fit the number of processes, the sampler is unknown, the
            scales are unfit, or no image is left to train on.
        TypeError: the data set can only be iterated over.
    """
    _check_scales(cfg)
    records = _training_records(cfg)
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH <= 0 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a positive multiple of the "
            f"number of processes, {world_size}."
        )
    seed = cfg.SEED
    if seed < 0:
        seed = comm.shared_random_seed()
        logger.info("SEED is negative: the order of the images uses the random seed %d.", seed)
    stream = TrainingStream(
        len(records),
        cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
        repeat_factors=_repeat_factors(cfg, records),
        groups=_aspect_ratio_groups(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
    )
    # One buffer that forked workers share, instead of a copy of all records in each.
    dataset = DatasetFromList(records, copy=False) if isinstance(records, list) else records
    mapper = TrainMapper(cfg, is_train=True) if mapper is None else mapper
    return TrainLoader(SeededDataset(dataset, mapper), stream, cfg.DATALOADER.NUM_WORKERS)


def _check_scales(cfg: CfgNode) -> None:
    """What detectron2 would refuse without the name of the key, or in the middle of training."""
    given, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    sizes = (given, given) if isinstance(given, int) else tuple(given)
    if sampling not in ("choice", "range"):
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING {sampling!r} is not one of 'choice', 'range'"
        )
    if not sizes:
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty; (0,) leaves images as they are")
    if sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN {sizes}: MIN_SIZE_TRAIN_SAMPLING 'range' needs two sizes, the "
            "smallest and the largest"
        )


def _training_records(cfg: CfgNode) -> list[dict] | Dataset:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # detectron2's way to say that nothing is there
        raise ValueError(
            f"Nothing to train on in DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: {error} Images "
            "without annotations count only with DATALOADER.FILTER_EMPTY_ANNOTATIONS False."
        ) from error
    if isinstance(records, IterableDataset):
        raise TypeError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} is an iterable data set; training needs "
            "one whose images can be asked for by index."
        )
    return records


def _repeat_factors(cfg: CfgNode, records: list[dict]) -> torch.Tensor | None:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} is not supported; use 'TrainingSampler' or "
        "'RepeatFactorTrainingSampler'."
    )


def _aspect_ratio_groups(records: list[dict]) -> list[int]:
    """0 for images wider than high, 1 for the others, as in detectron2."""
    try:
        return [0 if record["width"] > record["height"] else 1 for record in records]
    except KeyError as error:
        raise ValueError(
            f"DATALOADER.ASPECT_RATIO_GROUPING needs {error} in every record of DATASETS.TRAIN; "
            "give it or set the key to False."
        ) from error
