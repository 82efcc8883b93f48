r"""Collecting round by round while the learning curves are not known: ask, collect, measure, tell.

The greedy rule looks one batch ahead, and what one batch would add can be read off the data at
hand: train on parts of what is held, fit a curve, go on a little. So each round

    1.  measure performances at some sizes up to n_g, and tell them
    2.  refit each group's curve to all that was told, each measurement weighing its n
    3.  ask: the batch goes where it adds most utility for its price

One unlucky measurement can make a group look finished; without new data it is never measured
again and starves for ever. So after t rounds of s examples every group has had ε s t of them, and
whoever is behind is served first.

Cai, Encarnacion, Chern, Corbett-Davies, Bogen, Bergman and Goel, "Adaptive sampling strategies to
construct equitable training datasets", FAccT 2022, arXiv 2202.01327; the exploration is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.collection_budget import marginal_utilities
from scoredraw.data_selection.fixed_allocations import CENT, budget_terms
from scoredraw.data_selection.group_utilities import UtilityLike, group_utility, numbers
from scoredraw.data_selection.learning_curves import (
    FAMILIES,
    Family,
    LearningCurve,
    fit_learning_curve,
    free_parameters,
)
from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path
from scoredraw.uniforms import Rng, RowUniforms

Float = NDArray[np.float64]
Int = NDArray[np.int64]

VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """A performance r of group `group`'s model at n examples, told in round `round`."""

    group: int
    n: float
    r: float
    weight: float
    round: int


@dataclass(frozen=True)
class CollectionState:
    """All that a campaign is, between two calls: plain numbers, never changed in place.

    counts: examples that each group holds, those asked for last included. start: what it held at
    first. batches: what each round asked for. key: of the random ties.
    """

    start: tuple[int, ...]
    counts: tuple[int, ...]
    key: tuple[int, int]
    batches: tuple[tuple[int, ...], ...] = ()
    measurements: tuple[Measurement, ...] = ()


class AdaptiveSampler:
    """From which group to collect the next batch, by what was measured so far.

    `ask` returns the next batch, int64 (G,), and books it; `tell` takes measurements; `done` says
    that no batch can be paid. `save` and `load` keep a campaign of weeks in one JSON file.

    Parameters
    ----------
    costs : (G,) of one example. budget : for all examples, those held at the start included.
    utility, weights, floor : as in `group_utilities.group_utility`. The floor is where log and
        roots go on along their tangent: noisy curves do go below 0.
    batch : examples a round. step : the size in which a batch is handed out, the whole batch by
        default. The last part of a round may be smaller.
    family : of the curves; "root", one parameter, does best with few and noisy measurements.
    fit : further arguments of `fit_learning_curve` (known, shrink, bounds), for every group.
    explore : ε; each group gets at least this share of each round's batch, over time. At most 1/G.
    n0 : (G,) examples held at the start. pool : (G,) examples that exist.
    transfer : (G, G) τ; group g's model learns from Σ_h τ_gh n_h examples, and measurements of g
        are told at that size.
    stop_early : end where no batch adds anything; else such a batch goes to the smallest group.
    rng : settles which of the groups that have too few measurements is explored first.

    A group measured at too few sizes for its family is explored before anything else is bought.
    Raises InputError for what `allocate` refuses, and for an explore outside [0, 1/G].

    Time a round: G fits and (batch / step) G evaluations. Sequential: one ordered process.

    Cai et al. 2022, arXiv 2202.01327.

    >>> sampler = AdaptiveSampler([1, 1], 100, n0=[10, 10], batch=10, explore=0.1, rng=0)
    >>> while not sampler.done:
    ...     for group, n in enumerate(sampler.counts):
    ...         sampler.tell(n, 1 - (1, 2)[group] * n**-0.5, group)
    ...     batch = sampler.ask()
    >>> sampler.counts.tolist()
    [42, 58]
    """

    def __init__(
        self,
        costs: ArrayLike,
        budget: float,
        utility: UtilityLike = "sum",
        weights: ArrayLike | None = None,
        batch: int = 10,
        family: Family = "root",
        explore: float = 0.1,
        rng: Rng = 0,
        *,
        n0: ArrayLike = 0,
        step: int | None = None,
        pool: ArrayLike | None = None,
        transfer: ArrayLike | None = None,
        fit: Mapping[str, Any] | None = None,
        floor: float | None = 1e-3,
        stop_early: bool = False,
    ) -> None:
        self.costs, held, self.pool = budget_terms(costs, budget, n0, pool)
        groups = len(self.costs)
        require(bool((held == np.floor(held)).all()), "n0", "a fraction", "whole numbers")
        require(batch >= 1 and int(batch) == batch, "batch", batch, "a whole number, 1 or more")
        rest = self.pool - held
        short = (rest > 0) & (rest < batch)
        at = int(np.argmax(short))
        require(not short.any(), "batch", batch, f"{rest[at]:g} or less, the rest of pool {at}")
        size = batch if step is None else step
        require(1 <= size <= batch and int(size) == size, "step", step, f"from 1 to {batch}")
        require(family in FAMILIES, "family", repr(family), ", ".join(FAMILIES))
        share = 0 <= explore <= 1 / groups
        require(share, "explore", explore, f"a share from 0 to {1 / groups:.3g}, 1 / groups")
        self.utility = group_utility(utility, groups, weights, floor)
        self.budget, self.batch, self.step, self.explore = float(budget), batch, size, explore
        self.family, self.fit, self.stop_early = family, dict(fit or {}), stop_early
        self._needed = free_parameters(family, self.fit.get("known"), self.fit.get("shrink"))
        self.transfer = None
        if transfer is not None:
            self.transfer = np.asarray(transfer, np.float64)
            good = self.transfer.shape == (groups, groups) and bool((self.transfer >= 0).all())
            wanted = f"({groups}, {groups}) numbers, 0 or more"
            require(good, "transfer", f"shape {self.transfer.shape}", wanted)
        self._named = {"utility": utility, "weights": weights, "floor": floor}
        first = tuple(int(n) for n in held)
        high, low = RowUniforms(rng).key.tolist()
        self.state = CollectionState(first, first, (high, low))
        self._fits: dict[tuple[int, int], LearningCurve] = {}

    # ── where it stands ─────────────────────────────────────────────────────────────────────────

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.costs)

    @property
    def counts(self) -> Int:
        """Examples held or asked for, int64 (G,)."""
        return np.asarray(self.state.counts, np.int64)

    @property
    def spent(self) -> float:
        """What they cost."""
        return float(self.costs @ self.counts)

    @property
    def done(self) -> bool:
        """Whether `ask` has nothing more to ask for."""
        return not self._batch().any()

    def curve(self, group: int) -> LearningCurve | None:
        """The group's curve as it looks now, or None where it was measured at too few sizes."""
        own = [m for m in self.state.measurements if m.group == group]
        if len({m.n for m in own if m.weight > 0}) < self._needed:
            return None
        key = (group, len(own))
        if key not in self._fits:
            n, r, w = np.array([(m.n, m.r, m.weight) for m in own]).T
            self._fits[key] = fit_learning_curve(n, r, self.family, w, **self.fit)
        return self._fits[key]

    # ── ask and tell ────────────────────────────────────────────────────────────────────────────

    def ask(self) -> Int:
        """How many examples of each group to collect next, int64 (G,); zeros at the end.

        They count as held from now on; `correct` mends that where fewer came in.
        """
        batch = self._batch()
        if batch.any():
            counts = tuple((self.counts + batch).tolist())
            batches = (*self.state.batches, tuple(batch.tolist()))
            self.state = replace(self.state, counts=counts, batches=batches)
        return batch

    def tell(self, n: ArrayLike, r: ArrayLike, group: int, weight: ArrayLike | None = None) -> None:
        """Report performances r measured for a group after training on n of its examples.

        n, r: numbers or (m,). weight: their precisions, n by default (the noise of a performance
        falls as 1/√n). Raises InputError for NaN, an unknown group, or n beyond what it holds.
        """
        known = isinstance(group, int | np.integer) and 0 <= group < self.groups
        require(known, "group", group, f"0 to {self.groups - 1}")
        sizes = np.atleast_1d(np.asarray(n, np.float64))
        held = self._effective(self.counts)[group]
        inside = bool((np.isfinite(sizes) & (sizes > 0) & (sizes <= held * (1 + CENT))).all())
        came = f"{sizes.tolist()} for group {group}"
        require(inside, "n", came, f"sizes above 0 and at most the {held:g} that it holds")
        values = numbers(r if np.ndim(r) else [r], "r", len(sizes))
        precision = sizes if weight is None else numbers(weight, "weight", len(sizes))
        require(bool((precision >= 0).all()), "weight", "a negative one", "0 or more")
        now = len(self.state.batches)
        new = [
            Measurement(int(group), float(size), float(value), float(w), now)
            for size, value, w in zip(sizes, values, precision, strict=True)
        ]
        self.state = replace(self.state, measurements=(*self.state.measurements, *new))

    def correct(self, counts: ArrayLike) -> None:
        """Set how many examples each group truly holds, (G,), where other than asked for came."""
        held = numbers(counts, "counts", self.groups)
        whole = bool(((held >= 0) & (held == np.floor(held)) & (held <= self.pool)).all())
        require(whole, "counts", held.tolist(), "whole numbers from 0 to the pools")
        self.state = replace(self.state, counts=tuple(int(one) for one in held))

    def _batch(self) -> Int:
        batch = np.zeros(self.groups, np.int64)
        owed = self._owed()
        for g in np.argsort(-owed, kind="stable"):  # exploration, the most starved first
            batch[g] = self._fitting(g, int(owed[g]), batch)
        curves = [self.curve(g) for g in range(self.groups)]
        while (room := self.batch - int(batch.sum())) > 0:
            size = min(self.step, room)
            can = np.array([self._fitting(g, size, batch) == size for g in range(self.groups)])
            g = self._choose(curves, batch, size, can) if can.any() else None
            if g is None:
                break
            batch[g] += size
        return batch

    def _owed(self) -> Int:
        """What each group is behind ε s t after this round, (G,)."""
        due = math.floor(self.explore * self.batch * (len(self.state.batches) + 1) + CENT)
        return np.maximum(due - (self.counts - np.asarray(self.state.start)), 0)

    def _fitting(self, g: int, size: int, batch: Int) -> int:
        """How many of `size` more examples of g the round, its pool and the money allow."""
        money = self.budget * (1 + CENT) - float(self.costs @ (self.counts + batch))
        rest = self.pool[g] - self.counts[g] - batch[g]
        room = self.batch - int(batch.sum())
        return max(int(min(size, room, rest, money // self.costs[g])), 0)

    def _choose(
        self, curves: Sequence[LearningCurve | None], batch: Int, size: int, can: NDArray[np.bool_]
    ) -> int | None:
        n = (self.counts + batch).astype(np.float64)
        unknown = can & np.array([curve is None for curve in curves])
        if unknown.any():
            return self._smallest(n, unknown)
        scores = np.where(can, self._scores(curves, n, size), -math.inf)
        g = int(np.argmax(scores))
        worst_first = self.utility.name == "maximin" and self.transfer is None
        if scores[g] > (-math.inf if worst_first else 0.0):
            return g
        return None if self.stop_early else self._smallest(n, can)

    def _scores(self, curves: Sequence[LearningCurve | None], n: Float, size: int) -> Float:
        """Marginal utility per cost of `size` more examples of each group, (G,)."""
        after = self._effective(n + size * np.eye(self.groups))
        now = self._performances(curves, self._effective(n)[None])[0]
        then = self._performances(curves, after)
        own = then if self.transfer is not None else np.diag(then)
        return marginal_utilities(self.utility, now, own, self.costs * size)

    def _performances(self, curves: Sequence[LearningCurve | None], n: Float) -> Float:
        """Of sizes (k, G); a group without a curve, which nothing changes, counts as at 1."""
        columns = [
            np.ones(len(n)) if curve is None else curve.predict(np.maximum(n[:, g], 1e-9))
            for g, curve in enumerate(curves)
        ]
        return np.stack(columns, axis=1)

    def _effective(self, n: Float | Int) -> Float:
        sizes = np.asarray(n, np.float64)
        return sizes if self.transfer is None else np.asarray(sizes @ self.transfer.T)

    def _smallest(self, n: Float, among: NDArray[np.bool_]) -> int:
        """The group with the fewest examples, a random one among equals."""
        uniforms = RowUniforms(0)
        uniforms.key = np.asarray(self.state.key, np.uint64)
        u = uniforms.block(0, self.groups, stream="tie", round=len(self.state.batches))
        order = np.lexsort((u, np.where(among, n, math.inf)))
        return int(order[0])

    # ── on paper ────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Everything, as what JSON knows. Raises InputError for a utility that is a function."""
        named = not callable(self._named["utility"])
        require(named, "utility", "a callable, which no file can hold", "a name")
        settings = {
            "costs": self.costs, "budget": self.budget, "batch": self.batch, "step": self.step,
            "family": self.family, "explore": self.explore, "fit": self.fit,
            "transfer": self.transfer, "stop_early": self.stop_early, **self._named,
            "pool": [None if math.isinf(size) else size for size in self.pool],
        }  # fmt: skip
        plain = {
            k: v if v is None or isinstance(v, str | bool | dict) else np.asarray(v).tolist()
            for k, v in settings.items()
        }
        return {"version": VERSION, "settings": plain, "state": asdict(self.state)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> AdaptiveSampler:
        """The sampler that `state_dict` describes. Raises InputError where it does not."""
        try:
            require(
                saved["version"] == VERSION, "state", f"version {saved['version']}", str(VERSION)
            )
            settings, state = dict(saved["settings"]), dict(saved["state"])
            settings["pool"] = [math.inf if size is None else size for size in settings["pool"]]
            sampler = cls(n0=state["start"], **settings)
            sampler.state = CollectionState(
                tuple(state["start"]),
                tuple(state["counts"]),
                (int(state["key"][0]), int(state["key"][1])),
                tuple(tuple(batch) for batch in state["batches"]),
                tuple(Measurement(**one) for one in state["measurements"]),
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            came = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"state: got {came}, want what state_dict returned") from None
        return sampler

    def save(self, path: str | Path) -> None:
        """Write `state_dict` as JSON, a whole file or none. Raises InputError as it does."""
        text = json.dumps(self.state_dict(), indent=1, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> AdaptiveSampler:
        """Go on where `save` stopped. Raises InputError for a file that is not one of its."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise InputError(f"path: got {path} ({why}), want a saved campaign") from None
        require(isinstance(saved, dict), "path", f"{path}, a list or number", "a saved campaign")
        return cls.from_state(saved)
