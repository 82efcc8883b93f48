r"""Diffusion tree sampling: rewards of past denoisings steer the next ones, and nothing is lost.

Wanted are samples from  π(x_0) ∝ p(x_0) exp(λ r(x_0)),  p being what a Markov chain from noise to
data makes (`tree_proposals`) and r any function. With the soft values

    V(x_0) = r(x_0),    V(x) = (1/λ) log E[exp(λ V(x')) | x]

the chain with kernel  p(x' | x) exp(λ V(x'))  has that law. A tree of states estimates them. Each
iteration walks down from the root: at a node that has C N^α children or more it goes on to one of
them, else it adds a child, runs the chain to its end, all of which becomes nodes, and backs up

    v(parent) = (1/λ) log (1/k) Σ_children exp(λ v + log p/q),    N(parent) += 1

along its way. DTS walks by softmax(λ v + log p/q) and so do its samples, at no further calls.
DTS* (`search`) walks by  v + c sqrt(log N(node) / N(child))  and looks for the best sample.

Where C N^α stays below N, values are biased downwards: a child that was unlucky first is rarely
seen again, and most children are young. The bias decays slowly at α = 0.8, and for α near 1 a tree
becomes independent rollouts, weighted.

Here nodes are rows of growing arrays, and several walks of a batch share every array operation.

Jain, Sareen, Pedramfar and Ravanbakhsh, "Diffusion tree sampling: scalable inference-time
alignment of diffusion models", NeurIPS 2025, arXiv 2506.20701.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import on_host
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.time_grids import whole
from scoredraw.diffusion.tree_nodes import (
    COLUMNS,
    Float,
    Int,
    Nodes,
    Reward,
    States,
    Walks,
    arrivals,
    backup,
    check_lam,
    checked_reward,
    inverted,
    joined,
    on_cpu,
    runs,
    soft_backup,
    softmax,
    uct_scores,
    widening_limit,
)
from scoredraw.diffusion.tree_proposals import MarkovChain, diffusion_chain, paper_branches
from scoredraw.errors import require
from scoredraw.journal import atomic_path

__all__ = ["DiffusionTree", "soft_backup", "tree_sample", "uct_scores", "widening_limit"]

BACKUPS = ("soft", "snis")
IDLE = 100_000  # walks in a row that end at old leaves before a budget of calls is given up


# ── the tree ────────────────────────────────────────────────────────────────────────────────────


class DiffusionTree:
    """A tree of denoisings that samples p(x) exp(λ r(x)), or searches for the best sample.

    chain: a `MarkovChain`. reward(x) -> (B,): -inf for what must not be drawn. lam: λ > 0; inf
    backs up the largest. C, alpha: a node visited N times may have C N^α children; alpha = 1 is
    independent rollouts, and warns. search: DTS*, with c_uct. batch_size: walks that are chosen
    from the same values and run together; visits and children on their way count already.
    backup: "soft", or "snis", an extension: a node's value is that of the rollouts that began at
    it, one a child, without what was learned below. offload: keep states on the CPU.
    generator: a seed, a NumPy generator, or a `torch.Generator` for chains of tensors; one stream
    serves the walks and the chain.

    `grow` as often as one likes (`last_leaves`: where the last walks ended; `nfe`: calls so far);
    then `sample`, `best`, `root_value`, `implied_law`, `to_arrays`, `save`. An iteration that fails
    leaves the tree as it was.

    Raises InputError for lam <= 0, C <= 0, alpha outside (0, 1], a budget below one rollout, a
    reward that is NaN or +inf, with its place, and whatever the chain does. Warns where a chain
    that is not discrete makes equal children.
    Time: calls of new edges, and O(children) a level and batch. Memory: the states of all nodes.
    Sequential. Jain et al. 2025, arXiv 2506.20701.

    >>> from scoredraw.diffusion.tree_proposals import finite_chain
    >>> coin = finite_chain([1.0, 0.0], [[[0.5, 0.5], [0.5, 0.5]]])
    >>> tree = DiffusionTree(coin, lambda x: np.log([1.0, 3.0])[x], generator=0).grow(500)
    >>> tree.nfe <= 500, bool(0.6 < tree.sample(1000).mean() < 0.85)
    (True, True)
    """

    def __init__(
        self,
        chain: MarkovChain,
        reward: Reward,
        *,
        lam: float = 1.0,
        C: float = 2.0,
        alpha: float = 0.8,
        c_uct: float = 1.0,
        search: bool = False,
        batch_size: int = 1,
        backup: str = "soft",
        offload: bool = False,
        generator: Any = None,
    ) -> None:
        check_lam(lam)
        require(0 < C < np.inf, "C", C, "a positive number")
        require(0 < alpha <= 1, "alpha", alpha, "in (0, 1)")
        require(0 <= c_uct < np.inf, "c_uct", c_uct, "a number >= 0")
        require(backup in BACKUPS, "backup", repr(backup), " or ".join(BACKUPS))
        if alpha == 1:
            warnings.warn(
                "alpha: 1 adds a child in almost every visit, so nothing is reused", stacklevel=2
            )
        self.chain, self.reward, self.lam, self.search = chain, reward, float(lam), bool(search)
        self.C, self.alpha, self.c_uct, self.backup = float(C), float(alpha), float(c_uct), backup
        self.batch_size = whole(batch_size, "batch_size", 1)
        self.generator = chain.source(generator)
        self.nodes, self.states = Nodes(), States(offload)
        self.depth = len(chain.edges)
        self.calls = np.array(chain.calls, np.int64)
        self.iterations = self.nfe = 0
        self.last_leaves: Int = np.empty(0, np.int64)
        self.varied = chain.discrete

    # ---------------------------------------------------------------- growing

    def grow(
        self,
        n_iters: int | None = None,
        nfe: int | None = None,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1000,
    ) -> DiffusionTree:
        """Add n_iters iterations, or as many as `nfe` further calls allow; of both the fewer.

        checkpoint: a file that the tree is saved to after every `every` iterations and at the end;
        `load` it and grow what is left, and the tree is that of a run without a break.
        """
        require(n_iters is not None or nfe is not None, "n_iters, nfe", "neither", "a budget")
        left = math.inf if n_iters is None else whole(n_iters, "n_iters", 1)
        cost = int(self.calls.sum())
        budget = math.inf if nfe is None else whole(nfe, "nfe", 1)
        require(budget >= cost, "nfe", nfe, f"at least the {cost} calls of one rollout")
        save_at, idle = self.iterations + whole(every, "every", 1), 0
        while left > 0:
            walks = self._walk(int(min(self.batch_size, left)))
            spent = np.cumsum(self._costs(walks.depth))
            fits = int(np.searchsorted(spent, budget, side="right"))
            if fits == 0:
                break
            self._extend(walks.first(fits))
            left, budget = left - fits, budget - int(spent[fits - 1])
            idle = 0 if spent[fits - 1] else idle + fits
            if nfe is not None and idle > IDLE:
                warnings.warn(f"C, alpha: no new child in {idle} iterations", stacklevel=2)
                break
            if checkpoint is not None and self.iterations >= save_at:
                self.save(checkpoint)
                save_at = self.iterations + every
        if checkpoint is not None:
            self.save(checkpoint)
        return self

    def _costs(self, depth: Int) -> Int:
        """Calls that walks of these depths need."""
        return np.append(np.cumsum(self.calls[::-1])[::-1], 0)[depth]

    def _walk(self, count: int) -> Walks:
        """Choose where the next iterations add a child; shorter where nothing is known yet."""
        nodes = np.full((count, self.depth + 1), -1)
        nodes[:, 0], depth, going = 0, np.full(count, self.depth), np.arange(count)
        for level in range(self.depth):
            at = nodes[going, level]
            adds = self._adds(at)
            depth[going[adds]] = level
            going = going[~adds]
            if level == 0 and self.nodes["kids"][0] == 0 and len(going):
                count, going = int(going[0]), going[:0]  # those after it have nowhere to go
            if not len(going):
                break
            nodes[going, level + 1] = self._choose(at[~adds], searching=self.search)
        return Walks(nodes[:count], depth[:count])

    def _adds(self, at: Int) -> NDArray[np.bool_]:
        """Which arrivals at these nodes add a child, each counting those before it.

        The number of children after j + 1 arrivals is c_{j+1} = min(c_j + 1, ⌈C (N + j)^α⌉).
        """
        nodes, which, rank, most = arrivals(at)
        j = np.arange(most)
        N = self.nodes["visits"][nodes][:, None] + j
        limit = np.ceil(widening_limit(N, self.C, self.alpha)).astype(np.int64)
        kids = self.nodes["kids"][nodes][:, None]
        after = np.minimum(kids + j + 1, np.minimum.accumulate(limit - j, axis=1) + j)
        adds = np.diff(after, axis=1, prepend=kids) > 0
        return np.asarray(adds[which, rank])

    def _choose(self, at: Int, *, searching: bool, bonus: bool = True) -> Int:
        """A child of each of these nodes: the best by UCT, or by softmax(λ v + log p/q)."""
        nodes, which, rank, most = arrivals(at)
        kids, counts = self.nodes.children(nodes)
        start, run = runs(counts)
        v = self.nodes["value"][kids]
        if not searching:
            p = softmax(v, self.nodes["log_ratio"][kids], counts, self.lam)
            return kids[inverted(p, start, counts, which, self._uniforms(len(at)))]
        dead = np.maximum.reduceat(v, start) == -np.inf
        v = np.where(dead[run], 0.0, v)
        n, N = self.nodes["visits"][kids].astype(np.float64), self.nodes["visits"][nodes]
        chosen = np.empty(len(at), np.int64)
        for k in range(most if bonus else 1):
            c = self.c_uct if bonus else 0.0
            score = uct_scores(v, n, (N + k)[run], c)
            equal = np.flatnonzero(score == np.maximum.reduceat(score, start)[run])
            best = equal[np.searchsorted(run[equal], np.arange(len(nodes)))]
            now = rank == k if bonus else rank >= 0
            chosen[now] = kids[best[which[now]]]
            n[best[which[now]]] += 1
        return chosen

    def _uniforms(self, count: int) -> Float:
        if not self.chain.tensors:
            return np.asarray(self.generator.random(count))
        torch, source = sys.modules["torch"], self.generator
        u = torch.rand(count, generator=source, device=source.device, dtype=torch.float64)
        return np.asarray(u.cpu().numpy())

    def _extend(self, walks: Walks) -> None:
        """Run the chain from where walks end, and only when all went well add the nodes."""
        made: list[tuple[Int, Any, Any]] = []
        rows, x = np.empty(0, np.int64), None
        for edge in range(int(walks.depth.min()), self.depth):
            begin = np.flatnonzero(walks.depth == edge)
            if edge and len(begin):
                parts = [self.states.at(walks.nodes[begin, edge])]
                x = joined(parts if x is None else [x, *parts])
            rows = np.concatenate([rows, begin])
            x, ratio = self.chain.run(x, edge, self.generator, n=len(begin))
            made.append((rows, x, on_cpu(ratio, len(rows))))
        ended = walks.nodes[:, -1].copy()
        if made:
            value = np.zeros(len(walks.depth))
            value[rows] = checked_reward(self.reward, x, self.iterations)
            ended[rows] = self._add_nodes(walks, made, value)
        self.last_leaves = ended
        self._back_up(walks)
        self.iterations += len(walks.depth)
        self.nfe += int(self._costs(walks.depth).sum())

    def _add_nodes(self, walks: Walks, made: list[Any], value: Float) -> Int:
        """A row for every state; a rollout's own value is that of all its nodes -> its leaves."""
        values = []
        for rows, _, ratio in made[::-1]:
            values.append(value[rows])
            value[rows] += ratio / self.lam
        above = walks.nodes[np.arange(len(walks.depth)), walks.depth]
        level, ids = self.depth - len(made), above
        for (rows, x, ratio), own in zip(made, values[::-1], strict=True):
            level += 1
            parents = above[rows]
            ids = self.nodes.extend(
                len(rows), parent=parents, level=level, value=own, fresh=own, log_ratio=ratio,
                visits=1 + (level < self.depth),
            )  # fmt: skip
            self.states.append(x)
            if not self.varied and level > 1:
                self._look_for_noise(parents, ids)
            self.nodes.adopt(parents, ids)
            above[rows] = ids
        return ids

    def _look_for_noise(self, parents: Int, ids: Int) -> None:
        """Warn once where a second child equals the first."""
        second = np.flatnonzero(self.nodes["kids"][parents] > 0)[:1]
        if len(second):
            eldest = self.nodes.children(parents[second])[0][:1]
            pair = on_host(self.states.at(np.append(eldest, ids[second])))
            self.varied = True
            if np.array_equal(pair[0], pair[1]):
                warnings.warn("chain: children are equal, so it has no noise", stacklevel=5)

    def _back_up(self, walks: Walks) -> None:
        for level in range(self.depth - 1, -1, -1):
            passed = walks.nodes[walks.depth >= level, level]
            nodes, counts = np.unique(passed, return_counts=True)
            if not len(nodes):
                continue
            kids, lengths = self.nodes.children(nodes)
            own = self.nodes["value" if self.backup == "soft" else "fresh"][kids]
            ratio = self.nodes["log_ratio"][kids]
            self.nodes["value"][nodes] = backup(own, ratio, lengths, self.lam)
            self.nodes["visits"][nodes] += counts

    # ---------------------------------------------------------------- using

    def sample(self, n: int = 1) -> Any:
        """n states x_0 (n, *dims), by walks without new children; no calls. DTS*: the greedy one.

        Raises InputError before the tree has grown. Equal leaves may come repeatedly.
        """
        return self.states.at(self.draw(n))

    def draw(self, n: int) -> Int:
        """The leaves of `sample`, node ids (n,)."""
        self._grown()
        at = np.zeros(whole(n, "n", 1), np.int64)
        for _ in range(self.depth):
            at = self._choose(at, searching=self.search, bonus=False)
        return at

    @property
    def leaves(self) -> Int:
        """Node ids of all x_0."""
        return np.flatnonzero(self.nodes["level"] == self.depth)

    @property
    def root_value(self) -> float:
        """v of the root, an estimate of (1/λ) log E exp(λ r)."""
        self._grown()
        return float(self.nodes["value"][0])

    def best(self, n: int | None = None) -> tuple[Any, Any]:
        """The leaf of the highest reward, (x, r), or the n best distinct leaves, best first."""
        self._grown()
        leaves = self.leaves
        count = whole(1 if n is None else n, "n", 1)
        require(count <= len(leaves), "n", count, f"at most the {len(leaves)} leaves")
        order = leaves[np.argsort(-self.nodes["value"][leaves], kind="stable")[:count]]
        x, r = self.states.at(order), self.nodes["value"][order]
        return (x[0], float(r[0])) if n is None else (x, r)

    def implied_law(self) -> tuple[Int, Float]:
        """Leaves and the probability of each under softmax walks: ids and float64, both (leaves,).

        For a tree of DTS the law of `sample`. O(nodes).
        """
        self._grown()
        p = np.zeros(self.nodes.size)
        p[0] = 1.0
        for level in range(self.depth):
            nodes = np.flatnonzero(self.nodes["level"] == level)
            kids, counts = self.nodes.children(nodes)
            v, ratio = self.nodes["value"][kids], self.nodes["log_ratio"][kids]
            p[kids] = np.repeat(p[nodes], counts) * softmax(v, ratio, counts, self.lam)
        return self.leaves, p[self.leaves]

    def _grown(self) -> None:
        require(self.iterations > 0, "tree", "an empty one", "one that has grown")

    def to_arrays(self) -> dict[str, Any]:
        """Node arrays as in `Nodes`, steps_left (nodes,), and states (nodes - 1, *dims)."""
        shown = ("parent", "level", "visits", "kids", "value", "fresh", "log_ratio")
        found: dict[str, Any] = {name: self.nodes[name].copy() for name in shown}
        left = [-1, *(self.chain.steps - last for _, last in self.chain.edges)]
        found["steps_left"] = np.array(left)[found["level"]]
        found["states"] = None if self.states.rows is None else self.states.rows[: self.states.size]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree and the state of its generator to a .npz file, whole or not at all."""
        arrays: dict[str, Any] = {name: self.nodes[name] for name in COLUMNS}
        options = {name: getattr(self, name) for name in OPTIONS}
        counts = {name: getattr(self, name) for name in COUNTS}
        source: Any = self.generator
        state: Any = (
            source.get_state().tolist() if self.chain.tensors else source.bit_generator.state
        )
        x = None if self.states.rows is None else self.states.rows[: self.states.size]
        meta = {
            "options": options, "counts": counts, "used": self.nodes.used, "generator": state,
            "edges": self.chain.edges, "dtype": str(getattr(x, "dtype", "")),
        }  # fmt: skip
        arrays["pool"] = self.nodes.pool[: self.nodes.used]
        if x is not None:
            arrays["states"] = on_host(x)
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, meta=json.dumps(meta, default=_plain), **arrays)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], chain: MarkovChain, reward: Reward, device: Any = None
    ) -> DiffusionTree:
        """The tree of a file, to be grown with the same chain and reward as if never put down.

        device: where a chain of tensors works. Raises InputError where the chain has other edges.
        """
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        meta = json.loads(str(found.pop("meta")))
        edges = tuple(tuple(edge) for edge in meta["edges"])
        require(edges == chain.edges, "chain", f"edges {chain.edges}", f"{edges}, as saved")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = cls(chain, reward, offload=False, **meta["options"])
        tree.__dict__.update(meta["counts"])
        nodes = tree.nodes
        nodes.pool, nodes.used = found.pop("pool"), meta["used"]
        x = found.pop("states", None)
        nodes.columns, nodes.size = found, len(found["parent"])
        if not chain.tensors:
            tree.generator.bit_generator.state = meta["generator"]
        else:
            torch = sys.modules["torch"]
            tree.generator.set_state(torch.tensor(meta["generator"], dtype=torch.uint8))
            kind = getattr(torch, meta["dtype"].removeprefix("torch."), None)
            x = None if x is None else torch.as_tensor(x, dtype=kind, device=device)
        if x is not None:
            tree.states.append(x)
        return tree


OPTIONS = ("lam", "C", "alpha", "c_uct", "search", "batch_size", "backup")
COUNTS = ("iterations", "nfe", "varied")


def _plain(value: Any) -> Any:
    return value.tolist()


# ── in one call ─────────────────────────────────────────────────────────────────────────────────


def tree_sample(
    eps_fn: Callable[[Any, float], Any],
    prior: Sequence[int] | Callable[[int, Any], Any],
    schedule: NoiseSchedule,
    reward: Reward,
    n: int,
    *,
    steps: int = 50,
    budget: int,
    search: bool = False,
    lam: float = 1.0,
    generator: Any = None,
    branch_at: Iterable[int] | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Any:
    """n samples of p(x) exp(λ r(x)), or with `search` the n best found: tensors (n, *dims).

    eps_fn(x, t), a schedule and DDIM steps with η = 1 make the chain. prior: the dims of a sample,
    or a function (n, generator) -> x_T. budget: network calls, each of one sample. branch_at: steps
    left where the tree branches; by default all, 80, 60, 40 and 20 %. options: C, alpha, c_uct,
    backup, offload of `DiffusionTree`. generator: a seed or a `torch.Generator`.

    Raises InputError as `DiffusionTree`, and for a search whose tree has fewer than n leaves.

    >>> import torch
    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> found = tree_sample(lambda x, t: x, (2,), LinearBeta(), lambda x: x[:, 0], 3,
    ...                     steps=5, budget=100, generator=0)
    >>> found.shape
    torch.Size([3, 2])
    """
    import torch

    branches = paper_branches(steps) if branch_at is None else branch_at
    chain = diffusion_chain(schedule, eps_fn, prior, steps, branch_at=branches, tensors=True)
    tree = DiffusionTree(
        chain, reward, lam=lam, search=search, batch_size=batch_size, generator=generator, **options
    )
    with torch.no_grad():
        tree.grow(nfe=budget)
    return tree.best(n)[0] if search else tree.sample(n)
