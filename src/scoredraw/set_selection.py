r"""Growing a set one item at a time: a chooser sees a little of it and a few candidates.

Greedy selection adds argmax_x V(S ∪ {x}) - V(S) over the whole rest R of a pool, again and again.
Where V is a language model's opinion, it cannot be asked about every x. So each step shows a window
of the set and a window of the rest, and whoever chooses names one of those candidates:

    A <- a of S,  B <- b of R,     x = chooser(A, B),     S <- S ∪ {x},  R <- R \ {x}

K items cost K - |seeds| answers, whatever the size of the pool. With both windows full and a
utility as the chooser it is classic greedy; with A full and b = ceil(n/K ln(1/ε)) it is stochastic
greedy, 1 - 1/e - ε in expectation for a monotone submodular V (Mirzasoleiman et al., 2015). A
window of A gives that guarantee up. With b = 1, or a chooser that looks at positions only, it is a
uniform draw.

`init` and `step` work on a `SelectionState`; `add_one_in` runs them to the end. A window is a
function of the seed and of what was picked before it, so that a log of the picks resumes a run.

Li et al., "Add-One-In: Incremental sample selection for large language models via a choice-based
greedy paradigm", EMNLP 2025, arXiv 2503.02359.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scoredraw.choosers import (
    Choice,
    Chooser,
    SelectionError,
    SelectionLog,
    Step,
    UtilityChooser,
    Window,
    ask_window,
    random_at,
    viewer,
)
from scoredraw.errors import require
from scoredraw.group_quotas import Quotas, group_quotas
from scoredraw.journal import Journal
from scoredraw.uniforms import Rng, RowUniforms

Int = npt.NDArray[np.int64]
Context = Literal["uniform", "recent", "nearest"]

__all__ = [
    "Choice",
    "Chooser",
    "SelectionError",
    "SelectionLog",
    "SelectionState",
    "Step",
    "UtilityChooser",
    "Windows",
    "add_one_in",
    "init",
    "step",
]


# ── The state ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Windows:
    """What is shown, and how: the options of `add_one_in` of the same names."""

    context_window: int | None = 10
    candidate_window: int | None = 10
    context: Context = "uniform"
    vectors: Any = None
    batch: int = 1
    n_orders: int = 1
    max_retries: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", _unit(self.vectors))


@dataclass
class Shard:
    """A part of the pool that grows a set of its own: `chosen[:size]`, out of `rest[:left]`."""

    chosen: Int
    rest: Int
    size: int
    left: int


@dataclass
class SelectionState:
    """A set on its way from its seeds to k items; `step` advances it in place.

    order: the set so far. where: int64 (n,), an item's place in its shard's `rest`.
    failures: windows skipped since the last pick; error: what the chooser raised last.
    """

    n: int
    k: int
    windows: Windows
    key: Any
    shards: list[Shard]
    where: Int
    quotas: Quotas | None = None
    order: list[int] = field(default_factory=list)
    n_seed: int = 0
    round: int = 0
    failures: int = 0
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the set has its k items."""
        return len(self.order) == self.k


def init(
    n: int,
    k: int,
    windows: Windows | None = None,
    *,
    n_seed: int | None = None,
    seed_set: Sequence[int] | None = None,
    n_shards: int = 1,
    by: Any = None,
    quotas: Mapping[Any, Any] | None = None,
    rng: Rng = 0,
) -> SelectionState:
    """The state before the first step: the pool dealt into shards, and the seeds drawn.

    Arguments and errors as in `add_one_in`. Time and memory O(n).

    >>> state = init(10, 4, n_seed=2, rng=0)
    >>> len(state.order), state.shards[0].left, state.done
    (2, 8, False)
    """
    windows = windows or Windows()
    _check(n, k, windows, n_shards)
    alone = by is None or (n_shards == 1 and windows.batch == 1)
    require(alone, "by", "groups with shards or batches", "one shard and batch=1")
    require(by is not None or quotas is None, "quotas", "quotas without groups", "by")
    given = np.asarray([] if seed_set is None else seed_set, np.int64)
    proper = len(np.unique(given)) == len(given) and ((given >= 0) & (given < n)).all()
    require(bool(proper), "seed_set", given.tolist(), f"distinct positions from 0 to {n - 1}")
    seeds = _seed_count(k, windows, n_seed, None if seed_set is None else len(given), n_shards)

    key = RowUniforms(rng).key
    random = random_at(key, "deal")
    order = random.permutation(n)
    order = np.concatenate([given, order[~np.isin(order, given)]])  # every shard gets its share
    shards, where = [], np.empty(n, np.int64)
    for s in range(n_shards):  # dealt like cards: items, seeds and places in the set
        rest = order[s::n_shards].astype(np.int64)
        where[rest] = np.arange(len(rest))
        shards.append(Shard(np.empty(len(range(s, k, n_shards)), np.int64), rest, 0, len(rest)))
    groups = None if by is None else group_quotas(by, quotas, n, k)
    state = SelectionState(n, k, windows, key, shards, where, groups, n_seed=seeds)
    _close_full_groups(state)
    for i in range(seeds):
        shard = shards[i % n_shards]
        item = int(given[i] if i < len(given) else shard.rest[random.integers(shard.left)])
        fits = groups is None or groups.open(k - i)[groups.group[item]]
        require(bool(fits), "seed_set", f"item {item}, whose group is full", "what quotas allow")
        _add(state, i % n_shards, item)
    return state


def step(
    state: SelectionState,
    chooser: Chooser,
    *,
    records: Any = None,
    workers: int = 1,
    known: Sequence[Step] = (),
    on_step: Callable[[Step], Any] | None = None,
) -> list[Step]:
    """Ask about one window, or a batch of them in each shard, and add what is picked.

    The windows of a step are independent: they show the set as it was before, and no candidate
    twice. known: outcomes of the first of them, from a log, which are not asked for again;
    on_step gets each new one. The state is advanced in place.

    >>> state = init(10, 4, n_seed=2, rng=0)
    >>> outcome = step(state, lambda context, candidates: 0)[0]
    >>> outcome.pick == outcome.candidates[0] == state.order[-1], len(state.order)
    (True, 3)
    """
    shown = [window for s in range(len(state.shards)) for window in _draw_windows(state, s)]
    steps = list(known[: len(shown)])
    for window, old in zip(shown, steps, strict=False):
        shows = (tuple(window.context.tolist()), tuple(window.candidates.tolist()))
        same = (old.context, old.candidates) == shows
        require(same, "log", "steps of another run", "the log of this run, or none")
    view = viewer(records)
    rest = shown[len(steps) :]

    def ask(window: Window) -> tuple[Step, Exception | None]:
        w = state.windows
        return ask_window(
            chooser, window, view, state.key, n_orders=w.n_orders, max_retries=w.max_retries
        )

    for new, error in _in_order(ask, rest, workers):
        state.failures = 0 if new.pick is not None else state.failures + 1
        state.error = error or state.error
        steps.append(new)
        if on_step is not None:
            on_step(new)
    for outcome in steps:
        if outcome.pick is not None:
            _add(state, outcome.shard, outcome.pick)
    state.round += 1
    return steps


def add_one_in(
    records: Any,
    k: int,
    chooser: Chooser,
    *,
    context_window: int | None = 10,
    candidate_window: int | None = 10,
    n_seed: int | None = None,
    seed_set: Sequence[int] | None = None,
    n_shards: int = 1,
    batch: int = 1,
    context: Context = "uniform",
    vectors: Any = None,
    by: Any = None,
    quotas: Mapping[Any, Any] | None = None,
    n_orders: int = 1,
    max_retries: int = 5,
    max_consecutive_failures: int = 10,
    workers: int = 1,
    rng: Rng = 0,
    log: str | Path | None = None,
    progress: Callable[[int, int], Any] | None = None,
    callback: Callable[[Step], Any] | None = None,
) -> SelectionLog:
    r"""Grow a set to k items; each step a chooser names one of b candidates, shown a of the set.

    .. math:: x_t = \mathrm{chooser}(A_t, B_t),\quad A_t\subseteq S_{t-1},\; B_t\subseteq
       R_{t-1},\quad S_t = S_{t-1}\cup\{x_t\},\; R_t = R_{t-1}\setminus\{x_t\}.

    Parameters
    ----------
    records : n texts or other records, or the number n itself; then positions are shown.
    chooser : called with (context, candidates); gives the pick's position among the candidates, a
        `Choice`, or None for no verdict.
    context_window, candidate_window : a and b; None shows all (the candidates in ascending order).
    n_seed : how many to start from, drawn uniformly; by default a in each shard (10, where a is
        None or 0).
    seed_set : the first ones, given. The rest of `n_seed` is drawn.
    n_shards : the pool is dealt at random into so many parts with a set each; they sum to k.
    batch : windows a step and shard, with no candidate in common; `workers` threads ask them.
    context : "uniform", "recent", or "nearest": those with the largest cosine of `vectors` (n, d)
        to any of the candidates.
    by, quotas : group labels (n,), and {label: count or (least, most)}; by default in proportion.
    n_orders : each window is shown in so many orders, cyclic shifts of the first. The scores of a
        chooser that has them are added up; otherwise a pick needs more than half of the votes.
    max_retries : a window without a verdict, or whose chooser raised, is asked again in a new
        order, so often at most; then it is skipped and another drawn.
    max_consecutive_failures : windows skipped in a row before `SelectionError` is raised.
    log : a file that every step is appended to. A second call with the same arguments goes on
        where the log ends, and gives what one call would have given.
    progress : called with (size so far, k); callback : called with every `Step`.

    Returns
    -------
    SelectionLog; its `draw` is a `Draw` in the order of selection.

    Raises
    ------
    InputError
        k outside 1 .. n, windows of no candidate, quotas that cannot be met, the log of another
        run. A set that its seeds fill is a warning.
    SelectionError
        the chooser fails again and again. (The authors' loop asks for ever.)

    At most (k - n_seed + skipped) (1 + max_retries) n_orders calls. O(n + k (a + b)) time besides
    them, O(n) memory. Sequential: one ordered process. The released code reaches only multiples of
    its shards, and never sees the tail of a pool that they do not divide.

    Li et al., 2025, arXiv 2503.02359.

    >>> best = UtilityChooser(lambda context, candidates: candidates)
    >>> add_one_in(100, 4, best, n_seed=1, candidate_window=None, rng=0).indices[1:].tolist()
    [99, 98, 97]
    """
    windows = Windows(
        context_window, candidate_window, context, vectors, batch, n_orders, max_retries
    )
    wanted = "at least 1"
    require(workers >= 1, "workers", workers, wanted)
    limit = max_consecutive_failures
    require(limit >= 1, "max_consecutive_failures", limit, wanted)
    counted = isinstance(records, int | np.integer)
    n, shown = (int(records), None) if counted else (len(records), records)
    journal = None if log is None else Journal(log)
    lines = [] if journal is None else journal.records()
    state = init(
        n, k, windows, n_seed=n_seed, seed_set=seed_set, n_shards=n_shards, by=by, quotas=quotas,
        rng=_logged_key(lines) if rng is None and lines else rng,
    )  # fmt: skip
    known = _read_log(lines, state, shown, journal)

    def on_step(new: Step) -> None:
        if journal is not None:
            journal.append(asdict(new))
        if callback is not None:
            callback(new)

    steps: list[Step] = []
    most = n_shards * batch
    while not state.done:
        old = known[len(steps) : len(steps) + most]
        steps += step(state, chooser, records=shown, workers=workers, known=old, on_step=on_step)
        if progress is not None:
            progress(len(state.order), k)
        if state.failures >= limit:
            done = SelectionLog(np.array(state.order), tuple(steps), state.n, state.n_seed)
            why = steps[-1].failures[-1]
            text = f"{state.failures} windows in a row without a pick, {len(done.indices)} of {k}"
            raise SelectionError(f"chooser: {text} chosen; last: {why}", done) from state.error
    return SelectionLog(np.array(state.order), tuple(steps), state.n, state.n_seed)


# ── Drawing windows and adding picks ────────────────────────────────────────────────────────────


def _draw_windows(state: SelectionState, s: int) -> list[Window]:
    shard, w = state.shards[s], state.windows
    m = min(w.batch, len(shard.chosen) - shard.size)
    if m == 0:
        return []
    random = random_at(state.key, "windows", state.round, s)
    if w.candidate_window is None:
        candidates = np.sort(shard.rest[: shard.left])[None]
    else:
        b = min(w.candidate_window, shard.left // m)
        candidates = shard.rest[random.choice(shard.left, m * b, replace=False)].reshape(m, b)
    return [
        Window(state.round, s, j, _context(w, shard.chosen[: shard.size], row, random), row)
        for j, row in enumerate(candidates)
    ]


def _context(w: Windows, chosen: Int, candidates: Int, random: np.random.Generator) -> Int:
    if w.context_window is None or w.context_window >= len(chosen):
        return chosen.copy()
    a = w.context_window
    if w.context == "uniform":
        return chosen[random.choice(len(chosen), a, replace=False)]
    if w.context == "recent":
        return chosen[len(chosen) - a :].copy()
    nearness = (w.vectors[chosen] @ w.vectors[candidates].T).max(axis=1)
    return chosen[np.argsort(-nearness, kind="stable")[:a]]


def _add(state: SelectionState, s: int, item: int) -> None:
    """Move an item from the rest of its shard to the set: the last of the rest takes its place."""
    shard, place = state.shards[s], int(state.where[item])
    shard.left -= 1
    moved = shard.rest[shard.left]
    shard.rest[place], shard.rest[shard.left] = moved, item
    state.where[moved], state.where[item] = place, shard.left
    shard.chosen[shard.size] = item
    shard.size += 1
    state.order.append(item)
    if state.quotas is not None:
        state.quotas.count[state.quotas.group[item]] += 1
        _close_full_groups(state)


def _close_full_groups(state: SelectionState) -> None:
    """Take the groups that may get no more out of the rest, once for each of them."""
    if state.quotas is None or state.done:
        return
    shard, quotas = state.shards[0], state.quotas
    rest = shard.rest[: shard.left]
    keep = quotas.open(state.k - len(state.order))[quotas.group[rest]]
    if not keep.all():
        shard.rest[: shard.left] = np.concatenate([rest[keep], rest[~keep]])
        state.where[shard.rest] = np.arange(len(shard.rest))
        shard.left = int(keep.sum())


# ── Checks and the log ──────────────────────────────────────────────────────────────────────────


def _check(n: int, k: int, w: Windows, n_shards: int) -> None:
    require(n >= 1, "records", "none", "at least one")
    whole = isinstance(k, int | np.integer) and 1 <= k <= n
    require(whole, "k", k, f"a count from 1 to the pool's {n}")
    for name, value, least in (
        ("context_window", w.context_window, 0),
        ("candidate_window", w.candidate_window, 1),
        ("batch", w.batch, 1),
        ("n_orders", w.n_orders, 1),
        ("max_retries", w.max_retries, 0),
    ):
        require(value is None or value >= least, name, value, f"at least {least}")
    require(1 <= n_shards <= k, "n_shards", n_shards, f"from 1 to k, which is {k}")
    alone = w.candidate_window is not None or w.batch == 1
    require(alone, "batch", w.batch, "1 where all candidates are shown")
    kinds = ("uniform", "recent", "nearest")
    require(w.context in kinds, "context", repr(w.context), f"one of {', '.join(kinds)}")
    if w.context == "nearest":
        shape = np.shape(w.vectors)
        require(len(shape) == 2 and shape[0] == n, "vectors", f"shape {shape}", f"({n}, d)")
        require(bool(np.isfinite(w.vectors).all()), "vectors", "NaN or infinity", "finite numbers")


def _unit(vectors: Any) -> Any:
    """Rows of length one (zero rows stay zero), for cosines."""
    if vectors is None:
        return None
    v = np.asarray(vectors, np.float64)
    norms = np.sqrt((v * v).sum(axis=-1, keepdims=True))
    return v / np.where(norms > 0, norms, 1.0)


def _seed_count(k: int, w: Windows, asked: int | None, given: int | None, n_shards: int) -> int:
    least = given or 0
    require(least <= k, "seed_set", f"{least} items", f"at most k, which is {k}")
    if asked is None:
        asked = least if given is not None else n_shards * (w.context_window or 10)
    require(asked >= least, "n_seed", asked, f"at least the {least} of seed_set")
    if asked >= k and least < k:
        text = f"n_seed: {asked} of the {k} items are drawn at random, so that none is chosen"
        warnings.warn(text, stacklevel=4)
    return min(asked, k)


def _in_order(
    ask: Callable[[Window], tuple[Step, Exception | None]], windows: list[Window], workers: int
) -> Iterator[tuple[Step, Exception | None]]:
    if min(workers, len(windows)) <= 1:
        yield from map(ask, windows)
        return
    with ThreadPoolExecutor(min(workers, len(windows))) as pool:
        yield from pool.map(ask, windows)


def _logged_key(lines: list[dict[str, Any]]) -> RowUniforms:
    """Fresh entropy was asked for, and the log says what it was."""
    uniforms = RowUniforms(0)
    key = lines[0].get("key", [])
    require(len(key) == 2, "log", "lines that are no steps of a selection", "this run's log")
    uniforms.key = np.array(key, np.uint64)
    return uniforms


def _read_log(
    lines: list[dict[str, Any]], state: SelectionState, records: Any, journal: Journal | None
) -> list[Step]:
    """The steps that a log holds already; an empty one gets its heading."""
    if journal is None:
        return []
    w = state.windows
    texts = [] if records is None else [records[i] for i in range(state.n)]
    heading = {
        "n": state.n, "k": state.k, "key": [int(word) for word in state.key],
        "seeds": state.order[:], "n_shards": len(state.shards), "context": w.context,
        "windows": [w.context_window, w.candidate_window, w.batch, w.n_orders, w.max_retries],
        "records": zlib.crc32(repr(texts).encode()),
    }  # fmt: skip
    if not lines:
        journal.append(heading)
        return []
    came = f"{journal.path}, the log of another run"
    require(lines[0] == heading, "log", came, "this run's, or no such file")
    lists = ("context", "candidates", "failures", "replies")
    return [Step(**{**line, **{k: tuple(line[k]) for k in lists}}) for line in lines[1:]]
