"""Draws and repeated random sampling inside a torch `DataLoader` or a transformers `Trainer`.

Thin shells over `Draw` and `repeated_sampling`: which examples an epoch has is decided in NumPy.

Okanovic et al., "Repeated random sampling for minimizing the time-to-accuracy of learning",
ICLR 2024, arXiv 2305.18424.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch.utils.data
from numpy.typing import ArrayLike

from scoredraw.data_selection.repeated_sampling import RepeatedSampling
from scoredraw.data_selection.rounds import BernoulliRounds, Int, Rounds
from scoredraw.draws import Draw
from scoredraw.errors import import_extra, require

STREAM_BLOCK = 1024  # examples of a stream that are decided at a time


class DrawSampler(torch.utils.data.Sampler[int]):
    """The examples of any `Draw`, in a new order every epoch: what a `DataLoader` takes.

    The order of epoch t is a function of (seed, t); `set_epoch` resumes. A draw's weights are not
    applied (`draw.sample_weight` is for the loss). Raises InputError for an empty draw.

    >>> from scoredraw.sampling import top_k
    >>> sampler = DrawSampler(top_k([0.1, 3.0, 2.0], 2))
    >>> len(sampler), sorted(sampler)
    (2, [1, 2])
    """

    def __init__(self, draw: Draw, *, shuffle: bool = True, seed: int = 0) -> None:
        require(len(draw) > 0, "draw", "an empty draw", "at least one example")
        self.draw, self.shuffle, self.seed, self.epoch = draw, shuffle, seed, 0

    def set_epoch(self, t: int) -> None:
        """Make the order of epoch t the next one."""
        require(t >= 0, "t", t, "an epoch's number, 0 or more")
        self.epoch = t

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.draw))
        self.epoch += 1
        yield from self.draw.indices[order if self.shuffle else slice(None)].tolist()

    def __len__(self) -> int:
        return len(self.draw)


class RoundSampler(torch.utils.data.Sampler[int]):
    """A torch sampler that gives round t's examples in epoch t, for any `Rounds`.

    `set_epoch(t)` chooses the round, as for `DistributedSampler`, and is how to resume. After a
    whole epoch the sampler moves on by itself, so that a loop without `set_epoch` does not train
    on one fixed subset without anybody noticing. `len` is this rank's share of the round.

    >>> from scoredraw.data_selection.repeated_sampling import ResampledSubset
    >>> sampler = RoundSampler(ResampledSubset([3.0, 1.0, 2.0], num_samples=2, mode="rc"))
    >>> len(sampler), sorted(sampler)
    (2, [0, 2])
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.epoch = 0

    def set_epoch(self, t: int) -> None:
        """Make round t the next one."""
        require(t >= 0, "t", t, "a round's number, 0 or more")
        self.epoch = t

    def indices(self, t: int) -> Int:
        """This rank's examples of round t in order, whatever the current epoch: int64."""
        return self.rounds.indices(t)

    def total_steps(
        self, rounds: int, batch_size: int, *, drop_last: bool = False, accumulation: int = 1
    ) -> int:
        """The optimiser steps of `rounds` epochs, for the learning-rate schedule.

        >>> RepeatedRandomSampler(1000, ratio=0.1).total_steps(40, batch_size=32)
        160
        """
        return self.rounds.total_steps(
            rounds, batch_size, drop_last=drop_last, accumulation=accumulation
        )

    def __iter__(self) -> Iterator[int]:
        t = self.epoch
        yield from self.indices(t).tolist()
        if self.epoch == t:
            self.epoch = t + 1

    def __len__(self) -> int:
        return self.rounds.share(self.epoch)


class RepeatedRandomSampler(RoundSampler):
    """RS2 as a torch sampler: a fresh random subset every epoch.

    The arguments are those of `RepeatedSampling`. Under `DistributedDataParallel` give `rank` and
    `world_size`; under a transformers `Trainer` or accelerate do not (they split the batches of
    one sampler themselves). With `replacement=True` this draws from the law of torch's
    `RandomSampler(replacement=False, num_samples=m)`.

    Okanovic et al. 2024, arXiv 2305.18424.

    >>> sampler = RepeatedRandomSampler(10, ratio=0.5)
    >>> first, second = list(sampler), list(sampler)
    >>> sorted(first + second) == list(range(10))
    True
    """

    def __init__(
        self,
        n: int,
        ratio: float | None = None,
        num_samples: int | None = None,
        *,
        replacement: bool = False,
        wrap: str = "carry",
        labels: ArrayLike | None = None,
        stratify: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            RepeatedSampling(
                n, ratio, num_samples, replacement=replacement, wrap=wrap, labels=labels,
                stratify=stratify, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size,
                drop_last=drop_last,
            )
        )  # fmt: skip


class BernoulliSubset(torch.utils.data.IterableDataset[Any]):
    """A stream thinned to about a share r of it, another share every epoch.

    Example i of the stream stays in epoch t if hash(i, t) < r (`BernoulliRounds`): independent
    decisions, so the size is only about r N. An example's id is its position in the stream (in
    each `DataLoader` worker its own), or `key(example)`, an integer, which makes the choice
    independent of workers and order. `set_epoch(t)` before the epoch begins; with
    `persistent_workers=True` the workers keep the epoch they started with.

    >>> stream = BernoulliSubset(range(1000), ratio=0.1, seed=1)
    >>> first = list(stream)
    >>> stream.set_epoch(1)
    >>> 60 < len(first) < 140, list(stream) == first
    (True, False)
    """

    def __init__(
        self,
        stream: Any,
        ratio: float,
        *,
        seed: int = 0,
        key: Callable[[Any], int] | None = None,
    ) -> None:
        self.stream, self.key = stream, key
        self.rounds = BernoulliRounds(ratio, seed=seed)
        self.epoch = 0

    def set_epoch(self, t: int) -> None:
        """Make round t the next one."""
        require(t >= 0, "t", t, "a round's number, 0 or more")
        self.epoch = t
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(t)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        start = 0 if worker is None else worker.id << 48
        stream = iter(self.stream)
        while block := list(islice(stream, STREAM_BLOCK)):
            if self.key is None:
                keep = self.rounds.keep_block(start, start + len(block), self.epoch)
            else:
                ids = np.array([self.key(example) for example in block], dtype=np.uint64)
                keep = self.rounds.keep(ids, self.epoch)
            start += len(block)
            yield from (block[i] for i in np.flatnonzero(keep))


def epoch_callback(sampler: RoundSampler) -> Any:
    """A transformers `TrainerCallback` that sets the sampler's epoch when an epoch begins.

    For loops (old `Trainer`s, custom data loaders) that do not call `set_epoch` themselves; where
    they do, both say the same.
    """
    transformers = import_extra("transformers", "language")

    class SetEpoch(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # the Trainer counts epochs in fractions; a resumed one begins in the middle
            sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    return SetEpoch()


def install(trainer: Any, sampler: RoundSampler) -> None:
    """Make a transformers `Trainer` train on this sampler's rounds, before `trainer.train()`.

    The Trainer then counts an epoch as one round, so `num_train_epochs` is the number of rounds
    and its learning-rate schedule is the compressed one. Raises `InputError` where the sampler
    splits over ranks (the Trainer does that) or was made for a data set of another size.
    """
    world = sampler.rounds.world_size
    require(world == 1, "sampler", f"world_size {world}", "1: a Trainer splits the batches itself")
    length = len(trainer.train_dataset)
    require(sampler.rounds.n == length, "sampler", f"n {sampler.rounds.n}", f"{length} examples")
    trainer._get_train_sampler = lambda train_dataset=None: sampler
    trainer.add_callback(epoch_callback(sampler))
