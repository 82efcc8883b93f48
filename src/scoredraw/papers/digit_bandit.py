"""Digits as a contextual bandit: a policy that is sure of wrong answers, trained by its rewards.

A state is an 8x8 image, an action one of ten digits, the reward 1 for the right one. The policy, a
network 64-128-10, was taught wrong labels for the digits 5 to 9 (y - 5): it is sampled right there
about three times in a thousand, so that most groups of eight are all wrong, and what can be learned
about such an image must come from the few that aren't, through the shared weights. All measures are
exact, from the softmax. Many networks are trained side by side: seeds, each with its own split,
start, images and uniforms, which are the same for every method.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from scoredraw.categorical import invert
from scoredraw.papers.training import MLPEnsemble
from scoredraw.rl.group_advantages import GROUP_METHODS, group_advantages, kept_answers
from scoredraw.rl.policy_loss import aggregate, clipped_token_loss

Float = NDArray[np.float64]

SIZES = (64, 128, 10)
TRAIN = 1297
TAUGHT, TAUGHT_RATE, SMOOTHING = 300, 3e-3, 0.02
BATCH, GROUP, EPOCHS = 64, 8, 2


@dataclass(frozen=True)
class Task:
    """Digits cut in two by each seed: pixels (S, n, 64), labels (S, n)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Learner:
    """A method of `group_advantages`.

    clip: eps_low and eps_high, None for the method's own. batches: how many are sampled a step at
    most to fill one with groups that the method's filter leaves.
    """

    estimator: str
    clip: tuple[float, float] | None = None
    batches: int = 1

    def credit(self, right: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and which answers to train on, both (S, B, G), of verdicts right (S, B, G).

        greedy: whether the likeliest answer is right, (S, B).
        """
        G = right.shape[-1]
        rewards, method = right.float().flatten(), GROUP_METHODS[self.estimator]
        baseline = greedy.flatten() if self.estimator == "remax" else None
        A = group_advantages(rewards, None, G, self.estimator, greedy_rewards=baseline)
        keep = kept_answers(rewards, None, G, method.filter)
        return A.reshape(right.shape), keep.reshape(right.shape)

    def loss(self, logp: Tensor, before: Tensor, A: Tensor, keep: Tensor) -> Tensor:
        """The clipped loss, meaned over the answers a member trains on, summed over members.

        All (S, N), a row a member.
        """
        method = GROUP_METHODS[self.estimator]
        low, high = self.clip or (method.eps_low, method.eps_high)
        each = clipped_token_loss(logp, before, A, low, high)[0]
        return len(A) * aggregate(each, keep.to(each.dtype), "seq_mean")


def digit_task(seeds: Sequence[int]) -> Task:
    """1297 digits to train on, 500 to test on, by a permutation a seed.

    >>> [tuple(part.shape) for part in (digit_task([0, 1]).train_x, digit_task([0, 1]).test_y)]
    [(2, 1297, 64), (2, 500)]
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.stack([np.random.default_rng([27, 0, s]).permutation(len(y)) for s in seeds])
    data = (x / 16).astype(np.float32)[order], y.astype(np.int64)[order]
    parts = [
        torch.from_numpy(part[:, rows])
        for rows in (slice(TRAIN), slice(TRAIN, None)) for part in data
    ]  # fmt: skip
    return Task(parts[0], parts[1], parts[2], parts[3], tuple(seeds))


def taught(task: Task, steps: int = TAUGHT) -> MLPEnsemble:
    """Networks that learned y - 5 for the digits 5 to 9 and the others' own labels.

    W ~ N(0, 1/fan-in), biases 0; Adam, rate 3e-3, on all images at once, targets smoothed by .02.
    """
    S = len(task.seeds)
    generators = [torch.Generator().manual_seed(27_000_000 + seed) for seed in task.seeds]
    weights, biases = [], []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        w = [torch.randn(fan_in, fan_out, generator=g) / fan_in**0.5 for g in generators]
        weights.append(torch.stack(w).requires_grad_())
        biases.append(torch.zeros(S, 1, fan_out, requires_grad=True))
    net = MLPEnsemble(weights, biases)
    wrong = torch.where(task.train_y >= 5, task.train_y - 5, task.train_y).flatten()
    optimiser = torch.optim.Adam([*weights, *biases], lr=TAUGHT_RATE, fused=True)
    for _ in range(steps):
        logits = net.layers(task.train_x)[-1].flatten(0, 1)
        optimiser.zero_grad()
        (S * cross_entropy(logits, wrong, label_smoothing=SMOOTHING)).backward()
        optimiser.step()
    return net


def reinforce(
    net: MLPEnsemble, task: Task, learner: Learner, rate: float, steps: int, stream: int
) -> MLPEnsemble:
    """Copies of the networks after `steps` batches of 64 images x 8 answers, two epochs each.

    stream: which images and uniforms; a seed's are the same for every learner and rate.
    """
    S = len(task.seeds)
    parameters = [t.detach().clone().requires_grad_() for t in (*net.weights, *net.biases)]
    net = MLPEnsemble(parameters[: len(net.weights)], parameters[len(net.weights) :])
    optimiser = torch.optim.Adam(parameters, lr=rate, fused=True)
    random = [np.random.default_rng([27, 1, stream, seed]) for seed in task.seeds]
    member = torch.arange(S)[:, None]
    for _ in range(steps):
        images = BATCH * learner.batches
        rows = torch.from_numpy(np.stack([r.integers(TRAIN, size=images) for r in random]))
        u = np.stack([r.random((images, GROUP)) for r in random])
        x, y = task.train_x[member, rows], task.train_y[member, rows]
        logp = net.layers(x)[-1].log_softmax(dim=-1)
        old = logp.detach()
        answers = invert(old[:, :, None].expand(*u.shape, old.shape[-1]), u)
        A, keep = learner.credit(answers == y[..., None], old.argmax(dim=-1) == y)
        if learner.batches > 1:
            first = (~keep[..., 0]).long().argsort(dim=1, stable=True)[:, :BATCH]
            x, logp, old = (each[member, first] for each in (x, logp, old))
            answers, A, keep = (each[member, first] for each in (answers, A, keep))
        A, keep = A.flatten(1), keep.flatten(1)
        before = old.gather(2, answers).flatten(1)
        for epoch in range(EPOCHS):
            if epoch:
                logp = net.layers(x)[-1].log_softmax(dim=-1)
            optimiser.zero_grad()
            learner.loss(logp.gather(2, answers).flatten(1), before, A, keep).backward()
            optimiser.step()
    return net


def measure(net: MLPEnsemble, task: Task, ks: Sequence[int] = (1, 8)) -> tuple[Float, Float]:
    """On test images, exactly: pass@k = mean 1 - (1 - p)^k, (S, len(ks)); entropy (S,) in nats."""
    with torch.no_grad():
        logp = net.layers(task.test_x)[-1].double().log_softmax(dim=-1)
    right = logp.gather(2, task.test_y[..., None]).exp()
    passed = 1 - (1 - right) ** torch.tensor(list(ks))
    return passed.mean(dim=1).numpy(), -(logp.exp() * logp).sum(dim=-1).mean(dim=1).numpy()
