"""Roll-outs of a step-wise policy as a tree, and what each step of it earned.

Trajectories that share their first steps and then part form a tree, in which sibling steps were
taken in the same place. With m(s) the trajectories through step s, T_k the steps of trajectory k,
R_k its outcome (+1 right, -1 wrong, 0 "cannot answer") and F(s) the format reward of the step,

    R(s at t) = G over k in m(s) of gamma^{T_k - t} R_k + F(s)              G mean, max or min
    A_fork(s) = (R(s) - mean of its siblings) / (their deviation + eps)     0 without a sibling
    A_traj(k) = (R_k - mean over the query) / (deviation + eps)
    A(k, t)   = w_traj A_traj(k) + w_fork A_fork(s_{k,t})

|F| <= gamma^{T_max} / 2 keeps every right step above every wrong one. The trajectories of a query
are grown side by side: n first steps; then every one that goes on may fork into max_fork, and as
many of all those candidates are kept, at random, as trajectories are still wanted.

Wu et al., "PORTool: tool-use LLM training with rewarded tree", 2025, arXiv 2510.26020 (no code was
released; G, the deviations, the weights and the random choice are our reading).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.arrays import on_host
from scoredraw.errors import require
from scoredraw.uniforms import generator

Int = NDArray[np.int64]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

AGGREGATES = ("mean", "max", "min")
CREDITS = ("fork", "td")
VARIANTS: dict[str, dict[str, Any]] = {  # options of `portool_advantages`
    "portool": {},
    "trajectory_only": {"w_fork": 0.0},  # on chains (max_fork=1, merge=False) this is GRPO
    "fork_only": {"w_traj": 0.0},
    "no_decay": {"gamma": 1.0},
    "no_format": {"use_format": False},
    "treerpo": {"w_traj": 0.0, "gamma": 1.0, "use_format": False},
    "tempo": {"credit": "td", "gamma": 1.0, "use_format": False},
}


# ── the tree ────────────────────────────────────────────────────────────────────────────────────


class TreeTable(NamedTuple):
    """A tree as arrays: N steps, B trajectories of at most D steps.

    parent: (N,), -1 - query at a first step; fork: (N,) a number its siblings share; depth: (N,)
    from 1; query: (N,); paths: (B, D) steps, -1 after the last; length, outcome: (B,); row, column,
    step: (pairs,) the cells of `paths` that hold a step, row after row.
    """

    parent: Int
    fork: Int
    depth: Int
    query: Int
    format_reward: Float
    share: Float
    paths: Int
    length: Int
    outcome: Float
    row: Int
    column: Int
    step: Int


class RolloutTree:
    """Steps with one parent each, and trajectories that end at some of them; one query or many.

    `tokens` holds what the caller keeps a step. Steps off every trajectory have no reward and no
    gradient. O(N D) time and O(N + B D) memory.

    >>> tree = RolloutTree()
    >>> a = tree.add_step(None, "look it up")
    >>> for text, outcome in (("answer 3", 1.0), ("answer 4", -1.0)):
    ...     tree.finish(tree.add_step(a, text), outcome)
    >>> tree.paths.tolist(), step_rewards(tree).tolist()
    ([[0, 1], [0, 2]], [0.0, 1.0, -1.0])
    """

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self._steps: list[tuple[Int, Float, Float]] = []
        self._ends: list[tuple[Int, Float]] = []
        self._table: TreeTable | None = None

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self.tokens)

    def add_step(
        self, parent: int | None, tokens: Any = None, format_reward: float = 0.0, query: int = 0
    ) -> int:
        """The number of a new step after `parent`; parent None is a first step of `query`."""
        require(query >= 0, "query", query, "a number of at least 0")
        above = [-1 - query if parent is None else parent]
        return int(self.add_steps(above, format_reward, tokens=[tokens])[0])

    def add_steps(
        self, parents: ArrayLike, format_reward: ArrayLike = 0.0, share: ArrayLike = np.nan,
        tokens: Sequence[Any] | None = None,
    ) -> Int:  # fmt: skip
        """Many steps at once, (C,); a first step of query q has parent -1 - q.

        share: how many of its parent's draws a step stands for (see `step_weights`).
        """
        above, here = _integers(parents, "parents"), len(self)
        C = len(above)
        fine = bool((above < here + np.arange(C)).all())
        require(fine, "parents", above.max(initial=-1), "steps that were added before")
        form, part = (np.broadcast_to(np.asarray(x, np.float64), C) for x in (format_reward, share))
        require(bool(np.isfinite(form).all()), "format_reward", "NaN or infinity", "finite numbers")
        kept = [None] * C if tokens is None else list(tokens)
        require(len(kept) == C, "tokens", f"{len(kept)} values", f"{C}, one a step")
        self._steps.append((above, form, part))
        self.tokens.extend(kept)
        self._table = None
        return np.arange(here, here + C)

    def finish(self, step: ArrayLike, outcome: Any) -> None:
        """Trajectories end at these steps with these outcomes; None or NaN: nobody knows."""
        ends = _integers(np.atleast_1d(step), "step")
        inside = bool(((ends >= 0) & (ends < len(self))).all())
        require(inside, "step", ends[:3].tolist(), f"steps of the tree, 0 to {len(self) - 1}")
        given = np.atleast_1d(np.array(on_host(outcome), np.float64))  # None becomes NaN
        require(given.shape == ends.shape, "outcome", given.shape, f"{ends.shape}, as the steps")
        require(not np.isinf(given).any(), "outcome", "an infinite one", "numbers, or None")
        self._ends.append((ends, given))
        self._table = None

    @classmethod
    def from_paths(
        cls, paths: Sequence[Sequence[Hashable]], outcome: Any,
        format_reward: Mapping[Any, float] | None = None, query: Sequence[int] | None = None,
    ) -> RolloutTree:  # fmt: skip
        """A tree from the names of each trajectory's steps, which become its `tokens`.

        Raises InputError for an empty trajectory and a step with two parents, as in a cycle.

        >>> RolloutTree.from_paths([["a", "b"], ["a", "c"]], [1, -1]).paths.tolist()
        [[0, 1], [0, 2]]
        """
        groups = [0] * len(paths) if query is None else list(query)
        fits = len(groups) == len(paths) and min(groups, default=0) >= 0
        require(fits, "query", groups[:3], f"{len(paths)} numbers of at least 0, one a trajectory")
        number: dict[Hashable, int] = {}
        parent: list[int] = []
        for k, path in enumerate(paths):
            require(len(path) > 0, "paths", f"no step in trajectory {k}", "at least one step each")
            above = -1 - groups[k]
            for name in path:
                at = number.setdefault(name, len(parent))
                if at == len(parent):
                    parent.append(above)
                came = f"two parents of step {name!r} in trajectory {k}"
                require(parent[at] == above, "paths", came, "one each")
                above = at
        known, tree = format_reward or {}, cls()
        tree.add_steps(parent, [known.get(name, 0.0) for name in number], tokens=list(number))
        tree.finish([number[path[-1]] for path in paths], outcome)
        return tree

    @property
    def paths(self) -> Int:
        """(B, D) int64: the steps of each trajectory, -1 after its last."""
        return self.table.paths

    @property
    def table(self) -> TreeTable:
        """The tree as arrays; raises InputError for no trajectory and for an end that goes on."""
        if self._table is None:
            ended = any(len(leaf) for leaf, _ in self._ends)
            require(ended, "tree", "no trajectory that ended", "at least one")
            parent, form, share = (np.concatenate(x) for x in zip(*self._steps, strict=True))
            leaf, outcome = (np.concatenate(x) for x in zip(*self._ends, strict=True))
            self._table = _tabulate(parent, form, share, leaf, outcome)
        return self._table


def _integers(values: ArrayLike, argument: str) -> Int:
    found = np.asarray(values)
    fine = found.ndim == 1 and (found.dtype.kind in "iu" or not found.size)
    require(fine, argument, f"{found.dtype} {found.shape}", "whole numbers, one a row")
    return found.astype(np.int64)


def _tabulate(parent: Int, form: Float, share: Float, leaf: Int, outcome: Float) -> TreeTable:
    """Level by level: depths and queries downwards, paths upwards from the leaves."""
    first = parent < 0
    depth, query = first.astype(np.int64), np.where(first, -1 - parent, -1)
    waiting = np.flatnonzero(~first)
    while len(waiting):
        above = parent[waiting]
        ready = depth[above] > 0
        depth[waiting[ready]] = depth[above[ready]] + 1
        query[waiting[ready]] = query[above[ready]]
        waiting = waiting[~ready]
    inner = np.zeros(len(parent), bool)
    inner[parent[~first]] = True
    gone_on = leaf[inner[leaf]]
    require(not gone_on.size, "leaf", gone_on[:1].tolist(), "steps that nothing follows")
    length = depth[leaf]
    paths = np.full((len(leaf), int(length.max())), -1)
    rows, at = np.arange(len(leaf)), leaf
    while len(rows):
        paths[rows, depth[at] - 1] = at
        at = parent[at]
        rows, at = rows[at >= 0], at[at >= 0]
    row, column = np.nonzero(paths >= 0)
    return TreeTable(
        parent, np.where(first, len(parent) + query, parent), depth, query, form, share, paths,
        length, outcome, row, column, paths[row, column],
    )  # fmt: skip


# ── rewards and advantages ──────────────────────────────────────────────────────────────────────


def step_rewards(
    tree: RolloutTree, gamma: float = 0.95, aggregate: str = "mean", use_format: bool = True
) -> Float:
    """R(s), (N,) float64: what the trajectories through a step achieve, discounted to it.

    Formula at the head. NaN where no trajectory with a known outcome goes through. With gamma 1
    and no format reward the mean is the value of a prefix: the R(s_t) - R(s_{t-1}) of a trajectory
    sum to its outcome less R(s_1). Raises InputError for gamma outside [0, 1] and an unknown
    aggregate. O(B D).
    """
    require(0 <= gamma <= 1, "gamma", gamma, "a number in [0, 1]")
    require(aggregate in AGGREGATES, "aggregate", repr(aggregate), ", ".join(AGGREGATES))
    t = tree.table
    decay = gamma ** np.arange(t.paths.shape[1])
    value = decay[t.length[t.row] - 1 - t.column] * t.outcome[t.row]
    known = ~np.isnan(value)
    step, value = t.step[known], value[known]
    N = len(t.parent)
    if aggregate == "mean":
        found = _mean(step, value, N)
    else:
        found = np.full(N, np.nan)
        (np.fmax if aggregate == "max" else np.fmin).at(found, step, value)
    return found + t.format_reward if use_format else found


def portool_advantages(
    tree: RolloutTree, w_traj: float = 1.0, w_fork: float = 1.0, dedup: bool = False,
    eps: float = 1e-6, *, gamma: float = 0.95, aggregate: str = "mean", use_format: bool = True,
    credit: str = "fork",
) -> Float:  # fmt: skip
    """A(k, t), (B, D) float64: formula at the head; 0 after the end of a trajectory.

    dedup: a shared step counts once, in the first trajectory through it, with the mean of A_traj
    over m(s); elsewhere it is 0, and `first_visits` is the mask of what counts. credit "td": in
    place of A_fork, (R(s_t) - R(s_{t-1})) / (deviation of the outcomes + eps), with R(s_0) the mean
    of the query; `VARIANTS` holds the published relatives that these options give. A trajectory
    without an outcome is in no mean and has advantage 0.
    Raises InputError as `step_rewards`. O(B D). Local to a query.

    >>> tree = RolloutTree.from_paths([["a", "b"], ["a", "c"]], [1, -1])
    >>> portool_advantages(tree).round(3).tolist()
    [[0.707, 1.414], [-0.707, -1.414]]
    >>> portool_advantages(tree, dedup=True).round(3).tolist()
    [[0.0, 1.414], [0.0, -1.414]]
    """
    t = tree.table
    fork = _step_credit(tree, credit, gamma, aggregate, use_format, eps)
    if dedup:
        each = w_traj * _through(tree, eps)[t.step] + w_fork * fork[t.step]
        each = each * first_visits(tree)[t.row, t.column]
    else:
        each = w_traj * trajectory_advantages(tree, eps)[t.row] + w_fork * fork[t.step]
        each = np.where(np.isnan(t.outcome[t.row]), 0.0, each)
    out = np.zeros(t.paths.shape)
    out[t.row, t.column] = each
    return out


def _through(tree: RolloutTree, eps: float) -> Float:
    """(N,): the mean of A_traj over the trajectories through a step, 0 where none is known."""
    t = tree.table
    known = ~np.isnan(t.outcome[t.row])
    a = trajectory_advantages(tree, eps)[t.row[known]]
    return np.nan_to_num(_mean(t.step[known], a, len(t.parent)))


def trajectory_advantages(tree: RolloutTree, eps: float = 1e-6) -> Float:
    """A_traj, (B,): the outcome among those of its query; 0 where all are equal."""
    t = tree.table
    return z_scores(t.outcome, t.query[t.paths[:, 0]], eps)


def fork_advantages(tree: RolloutTree, rewards: ArrayLike, eps: float = 1e-6) -> Float:
    """A_fork, (N,): each step's reward (N,) among those of its siblings; NaN rewards get 0."""
    t = tree.table
    values = np.asarray(rewards, np.float64)
    require(values.shape == t.parent.shape, "rewards", values.shape, f"{t.parent.shape}, a step")
    return z_scores(values, t.fork, eps)


def _step_credit(
    tree: RolloutTree, credit: str, gamma: float, aggregate: str, use_format: bool, eps: float
) -> Float:
    require(credit in CREDITS, "credit", repr(credit), ", ".join(CREDITS))
    R = step_rewards(tree, gamma, aggregate, use_format)
    if credit == "fork":
        return fork_advantages(tree, R, eps)
    t = tree.table
    known, Q = ~np.isnan(t.outcome), int(t.query.max()) + 1
    query, outcome = t.query[t.paths[known, 0]], t.outcome[known]
    start = _mean(query, gamma ** t.length[known] * outcome, Q)  # one step before the first
    before = np.where(t.parent >= 0, R[t.parent], start[t.query])
    spread = _deviation(_centred(outcome, query, Q), query, Q)[t.query]
    return np.nan_to_num(np.where(spread > 0, (R - before) / (spread + eps), 0.0))


def z_scores(values: Float, groups: Int, eps: float = 1e-6) -> Float:
    """(x - mean) / (unbiased deviation + eps) within groups; 0 for NaN, equals and the lone.

    values: (M,); groups: (M,) numbers of at least 0, any sizes. O(M + the largest number).

    >>> z_scores(np.array([1.0, 3.0, 9.0, np.nan]), np.array([0, 0, 5, 5])).round(3).tolist()
    [-0.707, 0.707, 0.0, 0.0]
    """
    known = ~np.isnan(values)
    g, size = groups[known], int(groups.max(initial=-1)) + 1
    away = _centred(values[known], g, size)
    out = np.zeros(len(values))
    out[known] = away / np.maximum(_deviation(away, g, size)[g] + eps, 1e-300)  # 0 / 0 is 0
    return out


def _centred(x: Float, g: Int, size: int) -> Float:
    """x less the mean of its group; exactly 0 for equals, whatever their mean rounds to."""
    low = np.full(size, np.inf)
    np.minimum.at(low, g, x)
    away = x - low[g]
    return away - _mean(g, away, size)[g]


def _deviation(centred: Float, g: Int, size: int) -> Float:
    """Unbiased deviation by group of what is centred, 0 for fewer than two."""
    squares = np.bincount(g, weights=centred**2, minlength=size)
    return np.sqrt(squares / np.maximum(np.bincount(g, minlength=size) - 1, 1))


def _mean(g: Int, x: Float, size: int) -> Float:
    """Mean of x by group, NaN for an empty one."""
    count = np.bincount(g, minlength=size)
    total = np.bincount(g, weights=x, minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def first_visits(tree: RolloutTree) -> Bool:
    """(B, D) bool: where a step is met for the first time, so that each counts once."""
    t = tree.table
    seen, first = np.zeros(t.paths.shape, bool), np.unique(t.step, return_index=True)[1]
    seen[t.row[first], t.column[first]] = True
    return seen


def step_weights(tree: RolloutTree, rule: str = "draws") -> Float:
    """How much a step counts so that the tree stands for the policy, (N,); 0 off every trajectory.

    Σ over leaves of weight · f(trajectory) estimates E f under the policy. rule "draws": of n first
    steps each has weight 1/n; where K candidates of L live steps are kept, a kept one has its
    parent's weight · L / K; merged ones add up. Without bias for any tree of `tree_rollout`: a
    live step has K / L children on average, whatever was sampled. (1/n throughout where nothing
    is merged.) rule "forks": Π 1 / |C| along the path; it sums to 1, and is without bias where no
    live step is left without a child (keep_all_live, no merging), but not under pruning, which
    drops only unfinished trajectories. Raises InputError for draws of a tree made by hand.
    O(N D).

    >>> tree = RolloutTree.from_paths(["ab", "ac", "d"], [1, 0, 0])
    >>> step_weights(tree, "forks").tolist()
    [0.5, 0.25, 0.25, 0.5]
    """
    require(rule in {"draws", "forks"}, "rule", repr(rule), "'draws' or 'forks'")
    t = tree.table
    met = np.bincount(t.step, minlength=len(t.parent)) > 0
    if rule == "draws":
        known = not np.isnan(t.share[met]).any()
        require(known, "tree", "steps without a share of draws", "a tree of tree_rollout")
        factor = t.share
    else:
        size = np.bincount(t.fork[met], minlength=int(t.fork.max()) + 1)
        factor = 1 / np.maximum(size, 1)[t.fork]
    along = np.cumprod(np.where(t.paths >= 0, factor[t.paths], 1.0), axis=1)
    weight = np.zeros(len(t.parent))
    weight[t.step] = along[t.row, t.column]
    return weight


# ── growing a tree ──────────────────────────────────────────────────────────────────────────────


class Proposals(NamedTuple):
    """Next steps, C of them: whether each ends its trajectory, and how well it did.

    outcome: NaN where nobody knows (only looked at where done). key: what is equal between
    identical steps (ints, or texts); tokens: kept in the tree.
    """

    done: ArrayLike
    outcome: Any
    format_reward: ArrayLike = 0.0
    key: Any = None
    tokens: Sequence[Any] | None = None


StepFunction = Callable[[Int, np.random.Generator], Proposals]


def tree_rollout(
    step_fn: StepFunction, n: int, max_fork: int = 2, max_depth: int = 6,
    rng: int | np.random.Generator | None = None, *, queries: int = 1, merge: bool = True,
    keep_all_live: bool = False, truncated: float | None = 0.0,
) -> RolloutTree:  # fmt: skip
    """Grow n trajectories of each query as a tree: the second paragraph at the head.

    step_fn(parents, rng) -> Proposals, one a parent: parents (C,) int64 are numbers of steps, or
    -1 - query before the first. Steps are numbered in the order in which they are proposed, merged
    ones too, so that a caller may keep his states in a list. Which candidates are kept is drawn
    before they are generated: the same law, without waste. merge: identical siblings become one
    step (then fewer than n trajectories may come out). keep_all_live: every live step keeps a
    child; with n distinct first steps nothing ever forks then. truncated: the outcome at max_depth
    of what did not end (None: unknown). Raises InputError for n < 2, max_fork or max_depth < 1.
    At most max_depth calls of step_fn. Sequential: one generator for all.
    """
    require(n >= 2, "n", n, "at least 2 trajectories")
    for name, count in (("max_fork", max_fork), ("max_depth", max_depth), ("queries", queries)):
        require(count >= 1, name, count, "at least 1")
    random, tree, late = generator(rng), RolloutTree(), np.nan if truncated is None else truncated
    query_of, wanted = np.repeat(np.arange(queries), n), np.full(queries, n)
    parents, each = -1 - query_of, np.full(queries * n, 1 / n)  # each: the share of a draw
    for depth in range(1, max_depth + 1):
        found = step_fn(parents, random)
        C = len(parents)
        done = np.asarray(found.done, bool)
        require(done.shape == (C,), "step_fn", f"done of shape {done.shape}", f"({C},)")
        kept, copies = _merged(parents, found.key if merge else None)
        shares = np.zeros(C)
        shares[kept] = each[kept] * copies
        steps = tree.add_steps(parents, found.format_reward, shares, found.tokens)
        outcome = np.broadcast_to(np.array(found.outcome, np.float64), C)
        ends = kept[done[kept] | (depth == max_depth)]
        tree.finish(steps[ends], np.where(done[ends], outcome[ends], late))
        live = kept[~done[kept]]
        if depth == max_depth or not len(live):
            break
        wanted = wanted - np.bincount(query_of[ends], minlength=queries)
        query = query_of[live]
        children = fork_counts(query, wanted, max_fork, random, keep_all_live)
        kept_now = np.bincount(query, weights=children, minlength=queries)
        ratio = np.bincount(query, minlength=queries) / np.maximum(kept_now, 1)
        parents, query_of = np.repeat(steps[live], children), np.repeat(query, children)
        each = ratio[query_of]
    return tree


def _merged(parents: Int, key: Any) -> tuple[Int, Int]:
    """The first of each set of identical siblings, and how many there were."""
    if key is None:
        return np.arange(len(parents)), np.ones(len(parents), np.int64)
    require(len(key) == len(parents), "step_fn", f"{len(key)} keys", f"{len(parents)} of them")
    if not isinstance(key, np.ndarray):
        numbers: dict[Hashable, int] = {}
        key = np.array([numbers.setdefault(name, len(numbers)) for name in key], np.int64)
    pairs = np.stack([parents, key], axis=1)
    first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)[1:]
    order = np.argsort(first)
    return first[order], count[order]


def fork_counts(
    group: Int, wanted: Int, max_fork: int, rng: np.random.Generator, keep_all_live: bool = False
) -> Int:
    """How many children each live step gets, (L,): `wanted[group]` of the group's candidates.

    Every live step has max_fork candidates; those kept are drawn evenly without replacement, all
    of them where fewer than wanted. keep_all_live: one of each first, as far as `wanted` goes.

    >>> fork_counts(np.zeros(3, int), np.array([3]), 2, np.random.default_rng(0)).sum()
    np.int64(3)
    """
    slot = np.repeat(np.arange(len(group)), max_fork)
    u = rng.random(len(slot))
    if keep_all_live:
        u[::max_fork] -= 1
    order = np.lexsort((u, group[slot]))
    size = np.bincount(group[slot], minlength=len(wanted))
    of = group[slot[order]]
    rank = np.arange(len(slot)) - (np.cumsum(size) - size)[of]
    return np.asarray(np.bincount(slot[order][rank < wanted[of]], minlength=len(group)), np.int64)
