"""The order of the training images: a pure function of a seed and of the position in the stream.

detectron2's samplers are generators inside the data workers, so that a resumed training starts
their order anew. Here the batches are formed in the main process, from a seed, and any of them can
be reached again: that is what makes a resumed training equal to an uninterrupted one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

# What a derived seed is for; keeps the two families of seeds independent.
_EPOCH, _SAMPLE = 0, 1


def derive_seed(seed: int, *path: int) -> int:
    """A 63-bit seed for one purpose, derived from the seed of the whole run.

    Args:
        seed: the seed of the run, at least 0.
        path: any numbers that tell the purposes apart; different paths give independent seeds.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> 1)


class TrainingStream(Sampler):
    """An endless stream of batches for one process; batch n is always the same one.

    All processes draw the same epochs and each takes every `world_size`-th image. Images of one
    group (such as landscape or portrait) share batches; a batch comes out when its group has enough
    images, and images that wait for company are kept across epochs.

    Args:
        size: number of images in the data set.
        batch_size: images a batch in this process.
        seed: seed of the order and of the samples' augmentations, at least 0.
        rank, world_size: this process among all.
        repeat_factors: (size,) how often each image is to appear in an epoch; the fraction is
            rounded up or down at random (LVIS, appendix B.2). None: once each.
        groups: (size,) label of each image's group; None: all images may share batches.

    Yields:
        Lists of `batch_size` pairs (index of the image, seed of the sample).
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeat_factors: torch.Tensor | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        if size <= 0 or batch_size <= 0:
            raise ValueError(f"size and batch_size must be positive, not {size} and {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        if repeat_factors is not None and not float(repeat_factors.sum()) > 0:
            raise ValueError("repeat_factors must have a positive sum: no image would be drawn")
        for name, values in (("repeat_factors", repeat_factors), ("groups", groups)):
            if values is not None and len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries for {size} images")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat_factors = repeat_factors
        self.groups = groups
        self.start = 0  # number of the first batch that the next iteration delivers

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(self._batches(), self.start, None):
            yield [(i, derive_seed(self.seed, _SAMPLE, position)) for i, position in batch]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        mine = itertools.islice(self._images(), self.rank, None, self.world_size)
        for index, position in mine:
            group = self.groups[index] if self.groups is not None else 0
            batch = waiting.setdefault(group, [])
            batch.append((index, position))
            if len(batch) == self.batch_size:
                del waiting[group]
                yield batch

    def _images(self) -> Iterator[tuple[int, int]]:
        position = itertools.count()
        for epoch in itertools.count():
            yield from zip(self._epoch(epoch), position, strict=False)

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _EPOCH, epoch))
        indices = torch.arange(self.size)
        if self.repeat_factors is not None:
            whole = self.repeat_factors.floor()
            once_more = torch.rand(self.size, generator=generator) < self.repeat_factors - whole
            indices = indices.repeat_interleave(whole.long() + once_more.long())
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    def state_dict(self, batches: int) -> dict[str, Any]:
        """The state after `batches` batches of each process have been used."""
        return {
            "batches": batches,
            "seed": self.seed,
            "size": self.size,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        With another number of images a batch or of processes, the stream goes on after as many
        images as had been used; with another data set, after as many batches. Both are logged, as
        the images' order then differs from that of an uninterrupted run.
        """
        if state["seed"] != self.seed:
            logger.info(
                "The order of the images goes on with the checkpoint's seed %d.", state["seed"]
            )
        self.seed = state["seed"]
        before = state["batch_size"] * state["world_size"]
        now = self.batch_size * self.world_size
        self.start = state["batches"] * before // now
        for key in ("batch_size", "world_size", "size"):
            if state[key] != getattr(self, key):
                logger.warning(
                    "The checkpoint was trained with %s=%d, this run has %d: training goes on, but "
                    "not bit for bit as it would have without the interruption.",
                    {"size": "images", "batch_size": "images per process"}.get(key, "processes"),
                    state[key],
                    getattr(self, key),
                )
