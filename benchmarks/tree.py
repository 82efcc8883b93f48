"""A tree of 20,000 denoisings on an exact score, against the same tree in lists of children.

The peer is Algorithm 1 as one would write it down: node objects, lists of children, a softmax over
a list in every selection and a log-sum-exp over a list in every backup, one rollout at a time. A
second line gives the peer our batches of rollouts, so that only the tree itself differs; then it is
what the tree costs beyond the score. The check is that both trees have as many leaves, and values
of the root that agree within their noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.contest import Contest
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import LinearBeta
from scoredraw.diffusion.tree_proposals import MarkovChain, diffusion_chain
from scoredraw.diffusion.tree_sampling import DiffusionTree

C, ALPHA, LAM, STEPS, BATCH = 2.0, 0.8, 1.0, 5, 64


def tree(*, tiny: bool = False) -> Iterator[Contest]:
    """Ours in batches of 64, against one by one and against batches."""
    count = 300 if tiny else 20_000
    for batch in (1, BATCH):
        peer = f"lists of children, {'one by one' if batch == 1 else f'batches of {batch}'}"
        yield Contest(
            f"DTS, {count:,} rollouts of {STEPS} steps", peer, lambda: ours(count),
            lambda batch=batch: Listed(batch).grow(count), same, 1 / 10, repeats=2,
        )  # fmt: skip


def chain() -> MarkovChain:
    """Two Gaussians on a line, branching at each of five steps."""
    score = GaussianMixtureScore([0.7, 0.3], [[-2.0], [2.0]], [[[0.3]], [[0.3]]], LinearBeta())
    return diffusion_chain(score.schedule, score.eps, (1,), STEPS)


def reward(x: Any) -> Any:
    return x[:, 0]


def ours(count: int) -> tuple[int, float]:
    grown = DiffusionTree(
        chain(), reward, lam=LAM, C=C, alpha=ALPHA, batch_size=BATCH, generator=0
    ).grow(count)
    return len(grown.leaves), grown.root_value


class Node:
    """A node and the list of its children."""

    def __init__(self, x: Any, level: int) -> None:
        self.x, self.level, self.v, self.n = x, level, 0.0, 1
        self.children: list[Node] = []


class Listed:
    """The tree in lists; `batch` walks are chosen from the same values."""

    def __init__(self, batch: int) -> None:
        self.batch, self.chain = batch, chain()
        self.depth, self.leaves = len(self.chain.edges), 0
        self.random = np.random.default_rng(1)
        self.root = Node(None, 0)

    def grow(self, count: int) -> tuple[int, float]:
        while count > 0:
            size = min(self.batch if self.root.children else 1, count)
            walks = [self.select() for _ in range(size)]
            count -= len(walks)
            self.extend(walks)
            for walk in walks:
                self.back_up(walk)
        return self.leaves, self.root.v

    def select(self) -> list[Node]:
        node, walk = self.root, [self.root]
        while node.level < self.depth and len(node.children) >= C * node.n**ALPHA:
            top = max(child.v for child in node.children)
            weights = [math.exp(LAM * (child.v - top)) for child in node.children]
            at, level, i = self.random.random() * sum(weights), weights[0], 0
            while level <= at and i + 1 < len(weights):
                i += 1
                level += weights[i]
            node = node.children[i]
            walk.append(node)
        return walk

    def extend(self, walks: list[list[Node]]) -> None:
        """Run the chain for all walks that end at a level together."""
        for level in range(self.depth):
            going = [w for w in walks if w[-1].level == level]
            if not going:
                continue
            x = None if level == 0 else np.stack([w[-1].x for w in going])
            x, _ = self.chain.run(x, level, self.random, n=len(going))
            r = reward(x) if level == self.depth - 1 else np.zeros(len(x))
            for walk, state, value in zip(going, x, r, strict=True):
                child = Node(state, level + 1)
                child.v = float(value)
                walk[-1].children.append(child)
                walk.append(child)
                self.leaves += level == self.depth - 1

    def back_up(self, walk: list[Node]) -> None:
        for node in walk[-2::-1]:
            done = [child.v for child in node.children]
            top = max(done)
            total = sum(math.exp(LAM * (v - top)) for v in done)
            node.v = top + math.log(total / len(done)) / LAM
            node.n += 1


def same(ours: tuple[int, float], theirs: tuple[int, float]) -> None:
    """Leaves within a twentieth, root values within 0.2, several times what seeds differ by."""
    assert abs(ours[0] - theirs[0]) < 0.05 * theirs[0]
    assert abs(ours[1] - theirs[1]) < 0.2
