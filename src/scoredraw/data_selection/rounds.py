"""One subset of the examples per round: sizes, steps, shares of ranks, scored and streamed rounds.

A learner that takes another subset every round asks three things of it: which examples round t
has, without replaying the rounds before; which of them are this process's; and how many optimiser
steps there will be in all, for the learning-rate schedule. `Rounds` answers them. Uniform subsets
are in `repeated_sampling`; here are subsets by score, drawn again every round, and the subsets of
a stream whose length nobody knows.

Okanovic, Waleffe, Mageirakos, Nikolakakis, Karbasi, Kalogerias, Gurel and Rekatsinas, "Repeated
random sampling for minimizing the time-to-accuracy of learning", ICLR 2024, arXiv 2305.18424.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require
from scoredraw.inclusion import as_scores
from scoredraw.sampling import exponential_keys, top_k
from scoredraw.uniforms import RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]


def subset_size(n: int, ratio: float | None = None, num_samples: int | None = None) -> int:
    """How many examples a round has: m = max(1, round(ratio n)), or `num_samples` itself.

    The rounding is Python's: a half goes to the even neighbour.

    >>> subset_size(1000, 0.05), subset_size(10, 0.25), subset_size(3, 0.01)
    (50, 2, 1)
    """
    require(n >= 1, "n", n, "one or more examples")
    both = f"ratio={ratio}, num_samples={num_samples}"
    require((ratio is None) != (num_samples is None), "ratio", both, "exactly one of the two")
    if ratio is not None:
        require(0 < ratio <= 1, "ratio", ratio, "a share in (0, 1]")
        return max(1, round(ratio * n))
    assert num_samples is not None
    require(1 <= num_samples <= n, "num_samples", num_samples, f"a count in 1 .. {n}")
    return int(num_samples)


def compressed_schedule(total_rounds: int, m: int, batch_size: int, drop_last: bool = False) -> int:
    """The optimiser steps of a whole run, for a learning-rate schedule: X ceil(m / B).

    This is `T_max` of a cosine or the length of a decay: the schedule ends with the last round.
    With `drop_last` a round has floor(m / B) steps. Raises `InputError` where that is none.

    >>> compressed_schedule(200, 5000, 128), compressed_schedule(200, 5000, 128, drop_last=True)
    (8000, 7800)
    """
    require(total_rounds >= 1, "total_rounds", total_rounds, "one or more")
    require(m >= 1, "m", m, "one or more examples a round")
    require(batch_size >= 1, "batch_size", batch_size, "one or more")
    steps = m // batch_size if drop_last else -(-m // batch_size)
    require(
        steps > 0, "batch_size", batch_size,
        f"at most the {m} examples of a round: drop_last leaves no batch",
    )  # fmt: skip
    return total_rounds * steps


class Rounds(ABC):
    """One subset of m of n examples per round, addressed by the round's number, split over ranks.

    `subset(t)` is the round's subset, `indices(t)` this rank's share of it: places rank,
    rank + world_size, ... of the subset, after its first few examples are repeated at the end
    (or, with `drop_last`, its last few left out) so that all shares are equally long. So it is in
    `torch.utils.data.DistributedSampler`.
    """

    def __init__(
        self, n: int, m: int, *, seed: int, rank: int, world_size: int, drop_last: bool
    ) -> None:
        integer = isinstance(seed, int | np.integer) and seed >= 0
        require(integer, "seed", seed, "an integer >= 0, the same one on every rank")
        require(world_size >= 1, "world_size", world_size, "one or more")
        require(world_size <= m, "world_size", world_size, f"at most the {m} examples of a round")
        require(0 <= rank < world_size, "rank", rank, f"0 .. {world_size - 1}")
        self.n, self.m, self.seed = n, m, int(seed)
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.uniforms = RowUniforms(self.seed)

    @abstractmethod
    def subset(self, t: int) -> Int:
        """The examples of round t, distinct: int64 (m,)."""

    def size(self, t: int) -> int:
        """How many examples round t has over all ranks."""
        return self.m

    def indices(self, t: int) -> Int:
        """This rank's examples of round t, in training order: int64."""
        subset = self.subset(t)
        share = self._share(len(subset))
        places = np.arange(self.rank, share * self.world_size, self.world_size)
        return subset[places % len(subset)]

    def share(self, t: int) -> int:
        """How many examples of round t this rank (every rank) gets: `len(indices(t))`."""
        return self._share(self.size(t))

    def total_steps(
        self, rounds: int, batch_size: int, *, drop_last: bool = False, accumulation: int = 1
    ) -> int:
        """This rank's optimiser steps in rounds 0 .. rounds - 1: what a schedule needs to know.

        sum over t of ceil(ceil(m_t / B) / accumulation), floor(m_t / B) under `drop_last`; m_t is
        this rank's share of round t. For rounds of one size see `compressed_schedule`.
        """
        require(rounds >= 1, "rounds", rounds, "one or more")
        require(batch_size >= 1, "batch_size", batch_size, "one or more")
        require(accumulation >= 1, "accumulation", accumulation, "one or more")
        shares = np.array([self.share(t) for t in range(rounds)])
        batches = shares // batch_size if drop_last else -(-shares // batch_size)
        wanted = f"at most the {shares.max()} examples of a round: drop_last leaves no batch"
        require(bool(batches.max() > 0), "batch_size", batch_size, wanted)
        return int((-(-batches // accumulation)).sum())

    def _share(self, m: int) -> int:
        return max(1, m // self.world_size) if self.drop_last else -(-m // self.world_size)

    def _shuffled(self, rows: Int, t: int) -> Int:
        """Sorted rows in the order of their uniforms of round t."""
        return rows[np.argsort(self.uniforms.at(rows, stream="order", round=t), kind="stable")]


class ResampledSubset(Rounds):
    """Another subset every round by score: the score-based methods, each given RS2's repetition.

    mode="rs": an m-subset without replacement with probabilities softmax(s / T), the m largest of
    log softmax(s / T) + Gumbel noise (of exponential keys, which is the same);
    mode="rc": the m examples of largest score.

    `scores` (n,) real numbers, or a function of the round that returns them (then give `n`):
    scores recomputed as the model learns. Fixed scores under "rc" are ordinary one-off pruning.
    Under several ranks all of them must compute the same scores. The order of training is
    random (`shuffle=False`: ascending). Ties are broken by each row's uniform.

    Raises `InputError` as `RepeatedSampling` does, and on NaN or infinite scores. Time
    O(n log m) a round, memory O(n).

    Okanovic et al. 2024, arXiv 2305.18424, the "RS" and "RC" variants of the pruning methods.

    >>> subset = ResampledSubset([0.0, 9.0, 0.0, 9.0], num_samples=2, mode="rc").indices(0)
    >>> sorted(subset.tolist())
    [1, 3]
    """

    def __init__(
        self,
        scores: ArrayLike | Callable[[int], ArrayLike],
        ratio: float | None = None,
        num_samples: int | None = None,
        *,
        n: int | None = None,
        mode: str = "rs",
        temperature: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        require(mode in ("rs", "rc"), "mode", mode, "rs or rc")
        require(temperature > 0, "temperature", temperature, "a positive number")
        self._rescore: Callable[[int], ArrayLike] | None
        self._fixed: Float | None
        if callable(scores):
            self._rescore, self._fixed = scores, None
            require(n is not None, "n", n, "the number of examples, as scores is a function")
        else:
            self._rescore, self._fixed = None, as_scores(scores)
            length = len(self._fixed)
            require(n in (None, length), "n", n, f"{length}, as many as scores")
            n = length
        assert n is not None
        m = subset_size(n, ratio, num_samples)
        super().__init__(n, m, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last)
        self.mode, self.temperature, self.shuffle = mode, temperature, shuffle

    def subset(self, t: int) -> Int:
        """The examples of round t over all ranks, in training order: int64 (m,)."""
        require(t >= 0, "t", t, "a round's number, 0 or more")
        scores = self._fixed if self._rescore is None else self._checked(self._rescore(t))
        assert scores is not None
        seed = int(np.random.SeedSequence([self.seed, t]).generate_state(1, np.uint64)[0])
        if self.mode == "rc":
            draw = top_k(scores, self.m, rng=seed)
        else:
            draw = exponential_keys(scores / self.temperature, self.m, rng=seed, log=True)
        rows = np.sort(draw.indices)
        return self._shuffled(rows, t) if self.shuffle else rows

    def _checked(self, scores: ArrayLike) -> Float:
        checked = as_scores(scores)
        require(len(checked) == self.n, "scores", f"{len(checked)} values", f"{self.n}")
        return checked


class BernoulliRounds:
    """Rounds over a stream of unknown length: example i is in round t if hash(i, t) < r.

    Independent over examples and rounds, so a round has *about* r N examples (standard deviation
    sqrt(N r (1 - r))), and the coverage law is that of sampling with replacement. `ids` are
    whatever unsigned integers name the examples, such as their positions or `uniforms.hash_ids`;
    the hash is the row's uniform, so a decision does not depend on workers, shards or order.

    >>> rounds = BernoulliRounds(0.25, seed=3)
    >>> kept = rounds.keep(np.arange(10_000), t=5)
    >>> bool(2300 < kept.sum() < 2700), bool((rounds.keep([42], t=5) == kept[42]).all())
    (True, True)
    """

    def __init__(self, ratio: float, *, seed: int = 0) -> None:
        require(0 < ratio <= 1, "ratio", ratio, "a share in (0, 1]")
        self.ratio, self.seed = ratio, seed
        self.uniforms = RowUniforms(seed)

    def keep(self, ids: ArrayLike, t: int) -> NDArray[np.bool_]:
        """Which of the examples with these ids belong to round t: bool (k,)."""
        require(t >= 0, "t", t, "a round's number, 0 or more")
        return self.uniforms.at(ids, stream="bernoulli", round=t) < self.ratio

    def keep_block(self, start: int, stop: int, t: int) -> NDArray[np.bool_]:
        """`keep(arange(start, stop), t)`, faster: bool (stop - start,)."""
        return self.uniforms.block(start, stop, stream="bernoulli", round=t) < self.ratio
