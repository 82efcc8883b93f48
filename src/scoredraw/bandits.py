r"""Bandits: which arm to pull next, when a pull is the only way to learn what an arm is worth.

Optimism in the face of uncertainty: an arm is rated by its mean so far plus how wrong that mean
may be,

    score_i = R_i / T_i + alpha s sqrt(2 ln(sum_j T_j) / T_i),

and the arms of largest score are pulled. R_i and T_i are an arm's sum of rewards and its number,
s the scale of rewards. Arms without a reward come first; ties are broken at random. alpha = 0 is
greedy, infinity visits all arms in turn.

A policy is a frozen dataclass of settings, `init()` gives its state, `step(state, arm, reward)`
the next one; nothing is changed in place, and a state goes to JSON and back (`state.plain()`,
`BanditState.read`), so that a run can be taken up where it stopped. `play` is the loop.

Auer, Cesa-Bianchi and Fischer, 2002, "Finite-time analysis of the multiarmed bandit problem";
with neighbours: Zhang et al., 2025, "Harnessing diversity for important data selection in
pretraining large language models", arXiv:2409.16986.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
Ties = Literal["random", "lowest"]

__all__ = [
    "UCB1",
    "BanditState",
    "ClusterUCB",
    "cumulative_regret",
    "exploration_bonus",
    "largest",
    "neighbour_weights",
    "play",
]


# ── State ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class BanditState:
    """What is known of each arm: (G,) sums and counts of rewards, own pulls, and who may play.

    counts includes what neighbours told; pulls does not. seen, mean and square are the number,
    the mean and the summed squared deviations of all rewards of pulled arms (Welford).
    """

    sums: Float
    counts: Int
    pulls: Int
    live: Bool
    seen: int = 0
    mean: float = 0.0
    square: float = 0.0

    @property
    def means(self) -> Float:
        """R_i / T_i, and 0 for arms that nothing is known of, (G,)."""
        return self.sums / np.maximum(self.counts, 1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the rewards so far; 0 before the second."""
        return math.sqrt(self.square / (self.seen - 1)) if self.seen > 1 else 0.0

    def disable(self, arms: ArrayLike) -> BanditState:
        """The state with these arms out of the game (exhausted, or unusable)."""
        live = self.live.copy()
        live[np.asarray(arms, dtype=np.int64)] = False
        return replace(self, live=live)

    def plain(self) -> dict[str, Any]:
        """The state as what JSON knows.

        >>> import json
        >>> state = UCB1(2).step(UCB1(2).init(), 1, 0.5)
        >>> BanditState.read(json.loads(json.dumps(state.plain()))).sums.tolist()
        [0.0, 0.5]
        """
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> BanditState:
        """A state from `plain`; InputError where a field is missing or of another length."""
        kinds = {"sums": np.float64, "counts": np.int64, "pulls": np.int64, "live": np.bool_}
        numbers = ("seen", "mean", "square")
        missing = [name for name in (*kinds, *numbers) if name not in data]
        require(not missing, "data", f"no {', '.join(missing)}", "the fields of a bandit's state")
        arrays: dict[str, Any] = {k: np.asarray(data[k], dtype=kind) for k, kind in kinds.items()}
        shapes = {array.shape for array in arrays.values()}
        require(len(shapes) == 1, "data", f"shapes {shapes}", "one number an arm in each field")
        return cls(**arrays, **{k: data[k] for k in numbers})


# ── Choosing ─────────────────────────────────────────────────────────────────────────────────────


def largest(
    scores: ArrayLike,
    size: int = 1,
    *,
    live: ArrayLike | None = None,
    ties: Ties = "random",
    rng: Rng = None,
) -> Int:
    """The places of the `size` largest scores, best first: int64; all live ones if fewer.

    scores: (G,), infinities allowed. live: (G,) bool, the places that count. Equal scores are put
    in random order, or by place. Raises InputError on NaN, no live place, size < 1. O(G log G).

    >>> largest([1.0, 3.0, 2.0], 2).tolist()
    [1, 2]
    """
    values = np.asarray(scores, dtype=np.float64)
    require(values.ndim == 1, "scores", f"shape {values.shape}", "one number an arm")
    require(not np.isnan(values).any(), "scores", "NaN", "numbers")
    require(size >= 1, "size", size, "at least 1")
    require(ties in ("random", "lowest"), "ties", repr(ties), "'random' or 'lowest'")
    among = np.arange(len(values)) if live is None else np.flatnonzero(live)
    require(len(among) > 0, "live", "no arm", "at least one that may be pulled")
    if ties == "random":
        among = generator(rng).permutation(among)
    order = np.argsort(-values[among], kind="stable")
    return np.asarray(among[order[:size]], dtype=np.int64)


def exploration_bonus(counts: ArrayLike, *, plus_one: bool = False) -> Float:
    """sqrt(2 ln(sum of counts) / count), (G,); infinite for a count of 0 unless `plus_one`.

    `plus_one` divides by count + 1, as the code released with arXiv:2409.16986 does.

    >>> exploration_bonus([1, 1, 0], plus_one=True).round(3).tolist()
    [0.833, 0.833, 1.177]
    """
    seen = np.asarray(counts, dtype=np.float64)
    above = 2 * math.log(max(seen.sum(), 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        bonus = np.sqrt(above / (seen + plus_one))
    return np.asarray(np.where((seen == 0) & (not plus_one), np.inf, bonus))


@dataclass(frozen=True)
class UCB1:
    """Upper confidence bounds: mean + alpha · scale · sqrt(2 ln ΣT / T), unpulled arms first.

    n_arms: G. alpha: how much exploration, from 0 (greedy) to infinity (in turn). scale: what
    alpha multiplies: a number (1 for rewards in [0, 1]), or "auto": the standard deviation of all
    rewards so far, so that alpha needs no knowledge of their unit. plus_one: T + 1 under the root.
    unpulled_first: arms nothing is known of go before all others; otherwise their mean is 0.
    ties: "random" or "lowest" place.

    Raises InputError on alpha < 0, scale <= 0, no arm; `step` on an arm that is not there or a
    reward that is not finite. A step and a choice cost O(G).

    Auer, Cesa-Bianchi and Fischer, 2002. Regret grows as log(pulls).

    >>> policy = UCB1(3)
    >>> state = policy.init()
    >>> for arm in (0, 1, 2):
    ...     state = policy.step(state, arm, float(arm == 1))
    >>> policy.select(state).tolist()
    [1]
    """

    n_arms: int
    alpha: float = 1.0
    scale: float | Literal["auto"] = 1.0
    plus_one: bool = False
    unpulled_first: bool = True
    ties: Ties = "random"

    def __post_init__(self) -> None:
        require(self.n_arms >= 1, "n_arms", self.n_arms, "at least 1")
        require(self.alpha >= 0, "alpha", self.alpha, "a number of 0 or more")  # NaN fails too
        scale: Any = self.scale
        good = scale == "auto" or (not isinstance(scale, str) and 0 < scale < np.inf)
        require(good, "scale", repr(scale), "a positive number or 'auto'")
        require(self.ties in ("random", "lowest"), "ties", repr(self.ties), "'random' or 'lowest'")

    def init(self) -> BanditState:
        """Nothing known, all arms live."""
        zeros = np.zeros(self.n_arms, dtype=np.int64)
        return BanditState(np.zeros(self.n_arms), zeros, zeros, np.ones(self.n_arms, dtype=bool))

    def scores(self, state: BanditState) -> Float:
        """The upper confidence bounds, (G,), of live and other arms alike."""
        bonus = exploration_bonus(state.counts, plus_one=self.plus_one)
        if self.alpha == 0:
            values = state.means
        elif math.isinf(self.alpha):
            values = bonus
        else:
            scale = state.deviation if self.scale == "auto" else float(self.scale)
            known = np.isfinite(bonus)  # with a scale of 0, 0 · infinity is no number
            values = np.full(self.n_arms, np.inf)
            values[known] = state.means[known] + self.alpha * scale * bonus[known]
        first = self.unpulled_first & (state.counts == 0)
        return np.asarray(np.where(first, np.inf, values))

    def select(self, state: BanditState, size: int = 1, *, rng: Rng = None) -> Int:
        """The `size` arms to pull now, best first (all live ones if there are fewer)."""
        return largest(self.scores(state), size, live=state.live, ties=self.ties, rng=rng)

    def step(self, state: BanditState, arm: int, reward: float) -> BanditState:
        """The state after `arm` was pulled and gave `reward`."""
        require(0 <= arm < self.n_arms, "arm", arm, f"0 to {self.n_arms - 1}")
        require(math.isfinite(reward), "reward", reward, "a finite number")
        pulls = state.pulls.copy()
        pulls[arm] += 1
        seen = state.seen + 1
        mean = state.mean + (reward - state.mean) / seen
        square = state.square + (reward - state.mean) * (reward - mean)
        state = replace(state, pulls=pulls, seen=seen, mean=mean, square=square)
        return self._credit(state, arm, reward)

    def _credit(self, state: BanditState, arm: int, reward: float) -> BanditState:
        sums, counts = state.sums.copy(), state.counts.copy()
        sums[arm] += reward
        counts[arm] += 1
        return replace(state, sums=sums, counts=counts)


# ── Arms that are near one another ───────────────────────────────────────────────────────────────


def neighbour_weights(places: ArrayLike, radius: float, *, of: str = "distances") -> Any:
    """w_ij = 1 - d_ij / radius where d_ij < radius, as a SciPy CSR matrix (G, G); w_ii = 1.

    places: the symmetric matrix d (G, G), or with of="points" the arms' points (G, k), whose
    Euclidean distances are searched with a tree, never held as a matrix. A neighbour at d = radius
    weighs nothing and is not listed. Raises InputError on a matrix that is not symmetric,
    negative, or not 0 on the diagonal, and on radius <= 0. Memory O(G + pairs).

    >>> neighbour_weights([[0.0], [1.0], [2.0]], 2.0, of="points").toarray().tolist()
    [[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]
    """
    from scipy import sparse
    from scipy.spatial import cKDTree

    require(of in ("distances", "points"), "of", repr(of), "'distances' or 'points'")
    require(0 < radius < np.inf, "radius", radius, "a positive number")
    given = np.asarray(places, dtype=np.float64)
    name = "distances" if of == "distances" else "places"
    require(given.ndim == 2 and len(given) > 0, name, f"shape {given.shape}", "a matrix")
    require(bool(np.isfinite(given).all()), name, "NaN or infinity", "finite numbers")
    if of == "points":
        pairs = cKDTree(given).query_pairs(radius, output_type="ndarray")
        i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
        d = np.linalg.norm(given[i] - given[j], axis=1)
        own = np.arange(len(given))
        i, j, d = np.concatenate([i, own]), np.concatenate([j, own]), np.append(d, 0.0 * own)
    else:
        square = given.shape[0] == given.shape[1]
        require(square, name, f"shape {given.shape}", "as many rows as columns")
        require(np.allclose(given, given.T), name, "a matrix that is not symmetric", "d_ij = d_ji")
        require(bool((given >= 0).all()), name, "negative numbers", "distances")
        require(not given.diagonal().any(), name, "a diagonal that is not 0", "d_ii = 0")
        i, j = np.nonzero(given < radius)
        d = given[i, j]
    near = d < radius
    weights = (1 - d / radius)[near]
    return sparse.csr_matrix((weights, (i[near], j[near])), shape=(len(given), len(given)))


@dataclass(frozen=True)
class ClusterUCB(UCB1):
    """UCB over clusters where a pull also tells about the clusters nearby.

    A pull of i with reward r adds (r - threshold) w_ij to R_j and 1 to T_j for every j with
    w_ij = 1 - d_ij / radius > 0, i itself (w = 1) included. A neighbour's word counts as a whole
    pull, whatever its weight, so that means shrink towards the threshold: so it is in the code
    released with the paper, whose conventions are ``ClusterUCB(..., scale=1.0, plus_one=True,
    unpulled_first=False, ties="lowest")`` with alpha on the scale of the rewards.

    distances: (G, G) symmetric, together with `radius`; or `weights`, from `neighbour_weights`.
    Without either no arm has neighbours and this is `UCB1` of r - threshold. `threshold` lies in
    the unit of rewards. Other arguments as `UCB1`. Raises InputError on bad distances, radius <= 0,
    distances without a radius or the other way round, a threshold that is not finite. A step costs
    O(G).

    Zhang et al., 2025, arXiv:2409.16986.

    >>> policy = ClusterUCB(3, distances=[[0, 1, 4], [1, 0, 4], [4, 4, 0]], radius=2.0)
    >>> policy.step(policy.init(), 0, 1.0).sums.tolist()
    [1.0, 0.5, 0.0]
    """

    scale: float | Literal["auto"] = "auto"
    distances: Any = None
    radius: float | None = None
    threshold: float = 0.0
    weights: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.threshold), "threshold", self.threshold, "a finite number")
        if self.radius is not None:
            require(0 < self.radius < np.inf, "radius", self.radius, "a positive number")
        alone = (self.distances is None) == (self.radius is None)
        require(alone, "radius", self.radius, "distances and a radius, or neither")
        if self.distances is not None:
            assert self.radius is not None
            object.__setattr__(self, "weights", neighbour_weights(self.distances, self.radius))
        if self.weights is not None:
            shape, wanted = self.weights.shape, (self.n_arms, self.n_arms)
            require(shape == wanted, "distances", f"shape {shape}", f"{wanted}")

    def _credit(self, state: BanditState, arm: int, reward: float) -> BanditState:
        gain = reward - self.threshold
        if self.weights is None:
            return super()._credit(state, arm, gain)
        row = slice(self.weights.indptr[arm], self.weights.indptr[arm + 1])
        near = self.weights.indices[row]
        sums, counts = state.sums.copy(), state.counts.copy()
        sums[near] += gain * self.weights.data[row]
        counts[near] += 1
        return replace(state, sums=sums, counts=counts)


# ── Playing ──────────────────────────────────────────────────────────────────────────────────────


def play(
    policy: UCB1,
    pull: Callable[[int], float],
    rounds: int,
    *,
    batch: int = 1,
    state: BanditState | None = None,
    rng: Rng = None,
) -> tuple[BanditState, Int]:
    """Pull for `rounds` rounds of `batch` arms each, from `state` on: the last state, the arms.

    pull(arm) gives the reward. All arms of a round are chosen before the first of them is pulled.

    >>> state, arms = play(UCB1(2), lambda arm: float(arm), 20, rng=0)
    >>> int(state.pulls[1]) > 10, len(arms)
    (True, 20)
    """
    require(rounds >= 1, "rounds", rounds, "at least 1")
    random = generator(rng)
    now = policy.init() if state is None else state
    if len(now.live) != policy.n_arms:
        raise InputError(f"state: got {len(now.live)} arms, want {policy.n_arms}")
    pulled: list[int] = []
    for _ in range(rounds):
        for arm in policy.select(now, batch, rng=random).tolist():
            now = policy.step(now, arm, pull(arm))
            pulled.append(arm)
    return now, np.array(pulled, dtype=np.int64)


def cumulative_regret(means: ArrayLike, arms: ArrayLike) -> Float:
    """What was lost so far against the best arm, after each pull: sum of max mu - mu_arm, (t,).

    means: (G,) the arms' true means, or (t, G) where they change from pull to pull. arms: (t,).
    Raises InputError on arms that are not there.

    >>> cumulative_regret([0.5, 0.75], [0, 1, 0]).tolist()
    [0.25, 0.25, 0.5]
    """
    mu, chosen = np.asarray(means, dtype=np.float64), np.asarray(arms, dtype=np.int64)
    fits = mu.ndim in (1, 2) and mu.size > 0 and (mu.ndim == 1 or len(mu) == len(chosen))
    require(fits, "means", f"shape {mu.shape}", "(G,), or (t, G) with a row a pull")
    inside = chosen.ndim == 1 and bool(((chosen >= 0) & (chosen < mu.shape[-1])).all())
    require(inside, "arms", "arms that are not there", f"0 to {mu.shape[-1] - 1}")
    got = mu[chosen] if mu.ndim == 1 else mu[np.arange(len(mu)), chosen]
    return np.asarray(np.cumsum(mu.max(axis=-1) - got))
