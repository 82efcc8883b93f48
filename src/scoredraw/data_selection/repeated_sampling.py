"""Repeated random sampling: every round trains on a fresh random subset, under a shorter schedule.

RS2 keeps no subset. Round t of X draws m = round(r N) of the N examples again, and the learning
rate runs through its whole schedule in the X ceil(m / B) steps that are left. There is nothing to
score, so selection is free, and over the rounds the learner sees (nearly) everything:

    with replacement     S_t a uniform m-subset, independent of the other rounds;
                         after k rounds 1 - (1 - m/N)^k of the examples have been seen
    without replacement  S_t the next m places of a permutation, reshuffled once it is used up;
                         min(1, k m/N) have been seen, each floor(k m/N) or ceil(k m/N) times

Said plainly: without replacement, X rounds at ratio r *are* rX ordinary epochs. The same batches
come in the same order; what RS2 adds is that the schedule knows how few of them there will be.

Nothing is replayed. The permutation of pass k is the order of the rows' uniforms
(`uniforms.RowUniforms`, stream "pass", round k), so round t after a restart is the round t before.

Okanovic, Waleffe, Mageirakos, Nikolakakis, Karbasi, Kalogerias, Gurel and Rekatsinas, "Repeated
random sampling for minimizing the time-to-accuracy of learning", ICLR 2024, arXiv 2305.18424.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.rounds import (
    BernoulliRounds,
    ResampledSubset,
    Rounds,
    compressed_schedule,
    subset_size,
)
from scoredraw.errors import require
from scoredraw.inclusion import allocate
from scoredraw.uniforms import RowUniforms

Int = NDArray[np.int64]
Float = NDArray[np.float64]

__all__ = [
    "BernoulliRounds",
    "RepeatedSampling",
    "ResampledSubset",
    "Rounds",
    "compressed_schedule",
    "expected_coverage",
    "rs2_schedule",
    "subset_size",
]

WRAPS = ("carry", "drop", "official")


def expected_coverage(
    ratio: float, rounds: int, replacement: bool = False, wrap: str = "carry"
) -> Float:
    """The expected share of examples seen at least once after 1 .. `rounds` rounds, (rounds,).

    1 - (1 - r)^k with replacement, min(1, r k) without. Where `wrap="drop"` leaves the last
    c = 1 - r floor(1/r) of each pass unseen, 1 - c^j (1 - r i) after j passes and i rounds.
    `ratio` is m / N, not the ratio that was asked for and rounded.

    >>> expected_coverage(0.5, 3, replacement=True).tolist()
    [0.5, 0.75, 0.875]
    >>> expected_coverage(0.5, 3).tolist()
    [0.5, 1.0, 1.0]
    """
    require(0 < ratio <= 1, "ratio", ratio, "a share in (0, 1]")
    require(rounds >= 1, "rounds", rounds, "one or more")
    require(wrap in WRAPS, "wrap", wrap, " or ".join(WRAPS))
    k: Float = np.arange(1, rounds + 1, dtype=np.float64)
    if replacement:
        coverage = 1 - (1 - ratio) ** k
    elif wrap == "drop":
        a_pass = math.floor(1 / ratio + 1e-9)
        missed = max(0.0, 1 - ratio * a_pass)
        coverage = 1 - missed ** (k // a_pass) * (1 - ratio * (k % a_pass))
    else:
        coverage = np.minimum(1.0, ratio * k)
    return coverage


def rs2_schedule(
    n: int,
    ratio: float,
    rounds: int,
    *,
    replacement: bool = False,
    wrap: str = "carry",
    seed: int = 0,
) -> list[Int]:
    """The subsets of rounds 0 .. rounds - 1 as a list of int64 (m,): `RepeatedSampling` unrolled.

    Memory O(r n rounds); a training loop asks `RepeatedSampling.indices(t)` round by round.

    >>> schedule = rs2_schedule(10, 0.5, 4)
    >>> sorted(np.concatenate(schedule[:2]).tolist()) == list(range(10))
    True
    """
    require(rounds >= 1, "rounds", rounds, "one or more")
    sampler = RepeatedSampling(n, ratio, replacement=replacement, wrap=wrap, seed=seed)
    return [sampler.subset(t) for t in range(rounds)]


class RepeatedSampling(Rounds):
    """RS2: a fresh uniform subset of the examples every round, without selection cost.

    Give `ratio` r or `num_samples` m. `replacement=False` walks through permutations, pass after
    pass; `replacement=True` draws every round afresh (still distinct within the round). A round
    in which a permutation ends (m does not divide n) is settled by `wrap`:

    - "carry" finishes the old permutation and fills up with the first examples of the next one
      that are not yet in the round; these are not seen again in that pass. No duplicates, and
      after k rounds each example was seen floor(k m/n) or ceil(k m/n) times.
    - "drop" leaves the n mod m last places of each permutation out.
    - "official" is the authors' released program with NumPy's `RandomState(seed)`, bit for bit
      (for `replacement=True` as well). Its round at the end of a permutation has m - 1 examples
      (the end is reduced modulo n + 1) and takes what it lacks from the *start of the old*
      permutation: those examples are seen twice before the rest of the next pass. Only for
      reproducing their runs.

    `stratify=True` takes from each class of `labels` (n,) its share of m by largest remainder,
    but at least one, each class being sampled as above. `shuffle=False` gives each round's
    examples in ascending order (reads from disk in sequence) instead of random order.

    Raises `InputError` on a ratio outside (0, 1], a count outside 1 .. n, both or neither, more
    ranks than examples a round, or fewer examples a round than classes.

    Time O(n log n) a pass (a round with replacement O(n)), memory O(n). Any round is found
    without replaying the rounds before it, except with `wrap="official"` (a stateful generator),
    and with "carry" for m > n/2, where passes since the last one that began with a round are
    walked; both remember where they stopped, so going forward costs nothing extra.

    Okanovic et al. 2024, arXiv 2305.18424, algorithms 1 and 2.

    >>> sampler = RepeatedSampling(10, ratio=0.3, seed=1)
    >>> [len(sampler.indices(t)) for t in range(4)]
    [3, 3, 3, 3]
    >>> seen = np.bincount(np.concatenate([sampler.indices(t) for t in range(7)]), minlength=10)
    >>> sorted(set(seen.tolist()))
    [2, 3]
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
        m = subset_size(n, ratio, num_samples)
        require(wrap in WRAPS, "wrap", wrap, " or ".join(WRAPS))
        super().__init__(n, m, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last)
        self.replacement, self.wrap, self.shuffle = replacement, wrap, shuffle
        self._official = _Official(n, m, replacement, seed) if wrap == "official" else None
        strata = [(np.arange(n), m)]
        if stratify:
            require(labels is not None, "labels", None, "one label an example to stratify by")
            require(wrap != "official", "stratify", True, "False: the released code has no strata")
            strata = _strata(np.asarray(labels), n, m)
        self._strata = [
            (rows, self._part(len(rows), share, f"/{c}")) for c, (rows, share) in enumerate(strata)
        ]

    def _part(self, n: int, m: int, suffix: str) -> _Fresh | _Passes:
        if self.replacement:
            return _Fresh(n, m, self.uniforms, "round" + suffix)
        return _Passes(n, m, self.wrap, self.uniforms, "pass" + suffix)

    def size(self, t: int) -> int:
        """How many examples round t has: m, but m - 1 where the official code wraps.

        >>> [RepeatedSampling(10, 0.3, wrap="official").size(t) for t in range(5)]
        [3, 3, 3, 2, 3]
        """
        if self._official is None or self.replacement:
            return self.m
        rounds = -(-self.n // self.m)
        short = self.n % self.m > 0 and t % rounds == rounds - 1
        return self.m - short

    def subset(self, t: int) -> Int:
        """The examples of round t over all ranks, in training order: int64 (m,)."""
        require(t >= 0, "t", t, "a round's number, 0 or more")
        if self._official is not None:
            subset = self._official.round(t)
        else:
            parts = [rows[part.round(t)] for rows, part in self._strata]
            one = len(parts) == 1  # and then in random order already
            subset = parts[0] if one else self._shuffled(np.sort(np.concatenate(parts)), t)
        return subset if self.shuffle else np.sort(subset)


class _Fresh:
    """With replacement: round t is the m smallest of the round's n uniforms."""

    def __init__(self, n: int, m: int, uniforms: RowUniforms, stream: str) -> None:
        self.n, self.m, self.uniforms, self.stream = n, m, uniforms, stream

    def round(self, t: int) -> Int:
        u = self.uniforms.block(0, self.n, stream=self.stream, round=t)
        rows = np.argpartition(u, self.m - 1)[: self.m] if self.m < self.n else np.arange(self.n)
        return np.asarray(rows[np.argsort(u[rows], kind="stable")], dtype=np.int64)


class _Passes:
    """Without replacement: round t is places t m .. (t + 1) m of the passes laid end to end."""

    def __init__(self, n: int, m: int, wrap: str, uniforms: RowUniforms, stream: str) -> None:
        self.n, self.m, self.wrap, self.uniforms, self.stream = n, m, wrap, uniforms, stream
        self._raw: dict[int, Int] = {}
        self._carried: dict[int, Int] = {}

    def round(self, t: int) -> Int:
        n, m = self.n, self.m
        if self.wrap == "drop":
            k, place = divmod(t, n // m)
            return self.raw(k)[place * m : (place + 1) * m]
        k, start = divmod(t * m, n)
        this = self.carried(k)
        if start + m <= n:
            return this[start : start + m]
        return np.concatenate([this[start:], self.carried(k + 1)[: start + m - n]])

    def raw(self, k: int) -> Int:
        """The permutation of pass k: the rows in the order of its uniforms."""
        if k not in self._raw:
            u = self.uniforms.block(0, self.n, stream=self.stream, round=k)
            _keep(self._raw, k, np.argsort(u, kind="stable"))
        return self._raw[k]

    def carried(self, k: int) -> Int:
        """Pass k after the round that it shares with pass k - 1 has taken its fill.

        The fill reorders only the first m places. If m <= n/2 the tail of pass k - 1 is therefore
        its raw tail; otherwise walk from the last pass that begins with a round, or from one that
        is remembered.
        """
        if k not in self._carried:
            aligned = self.m // math.gcd(self.n, self.m)
            first = k - 1 if 2 * self.m <= self.n and k % aligned else k - k % aligned
            j = max((p for p in self._carried if first <= p < k), default=first)
            current = self._carried[j] if j in self._carried else self.raw(j)
            while j < k:
                j += 1
                current = self._filled(j, current)
            _keep(self._carried, k, current)
        return self._carried[k]

    def _filled(self, k: int, before: Int) -> Int:
        """Raw pass k with the fill moved to its front; `before` is pass k - 1."""
        left = k * self.n % self.m  # places of the shared round that lie in pass k - 1
        if left == 0:
            return self.raw(k)
        held = np.zeros(self.n, dtype=bool)
        held[before[self.n - left :]] = True
        head, rest = np.split(self.raw(k), [self.m])
        late = held[head]
        late |= np.cumsum(~late) > self.m - left
        return np.concatenate([head[~late], head[late], rest])


def _keep(passes: dict[int, Int], k: int, order: Int) -> None:
    """Remember pass k and its neighbours, forget the others."""
    for old in [p for p in passes if abs(p - k) > 1]:
        del passes[old]
    passes[k] = order


class _Official:
    """The released program: one stateful generator, one array shuffled in place, its wrap fault."""

    def __init__(self, n: int, m: int, replacement: bool, seed: int) -> None:
        self.n, self.m, self.replacement, self.seed = n, m, replacement, seed
        self._restart()

    def _restart(self) -> None:
        self._random = np.random.RandomState(self.seed)  # what they used
        self._array = np.arange(self.n)
        self._cursor, self._next, self._last = 0, 0, np.empty(0, dtype=np.int64)

    def round(self, t: int) -> Int:
        if t < self._next - 1:
            self._restart()
        while self._next <= t:
            self._last = self._fresh() if self.replacement else self._advance()
            self._next += 1
        return self._last.copy()

    def _fresh(self) -> Int:
        return np.asarray(self._random.choice(self.n, self.m, replace=False), dtype=np.int64)

    def _advance(self) -> Int:
        if self._cursor == 0:
            self._random.shuffle(self._array)
        start, end = self._cursor, (self._cursor + self.m) % (self.n + 1)
        if end < start:
            self._cursor = 0
            return np.concatenate([self._array[start:], self._array[:end]])
        self._cursor = 0 if end == self.n else end
        return self._array[start:end].copy()


def _strata(labels: NDArray[np.generic], n: int, m: int) -> list[tuple[Int, int]]:
    """The rows of each class and its share of m: proportional, at least one, summing to m."""
    require(labels.shape == (n,), "labels", labels.shape, f"shape ({n},)")
    classes, code, counts = np.unique(labels, return_inverse=True, return_counts=True)
    require(m >= len(classes), "num_samples", m, f"{len(classes)} or more, one for each class")
    shares = allocate(counts, m)
    rows = np.split(np.argsort(code, kind="stable"), np.cumsum(counts)[:-1])
    return [(r, int(s)) for r, s in zip(rows, shares, strict=True)]
