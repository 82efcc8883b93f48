"""Digits half hidden: a policy that reads them and says how sure it is, many of them at once.

A band of 0 to 7 rows of each 8x8 digit is blank, anew at each visit, so that some cannot be read.
A network 64-128-10 draws the answer, and a head (64 + 10)-128-11 one of the confidences 0, .1, ...,
1 for it: a completion of two tokens. It is first taught (60 steps) by demonstrations that are right
and sure of themselves, from .6 to 1 whatever is hidden, and then trained by GRPO without the
deviation on 64 images x 16 samples a step, with a table of rewards for each answer (wrong, right)
and confidence. Arms are trained side by side on the same images and the same uniforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from scoredraw.categorical import invert, normalize
from scoredraw.papers.training import MLPEnsemble
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.reward_groups import centre, chain, group_rewards

Float = NDArray[np.float64]
Int = NDArray[np.int64]

PIXELS, CLASSES, HIDDEN = 64, 10, 128
LEVELS = np.arange(11) / 10  # the confidences that can be stated
SUREST = len(LEVELS) - 1
BATCH, SAMPLES, RATE = 64, 16, 2e-3
TAUGHT = 60  # steps of supervision
CHUNK = 256  # images a forward pass of an evaluation


@dataclass(frozen=True)
class Visits:
    """Images as they were seen: pixels (S, B, 64) and labels (S, B)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Half:
    """One half of the digits, another a seed: pixels (S, N, 64), labels (S, N)."""

    x: NDArray[np.float32]
    y: Int

    def visit(self, rng: np.random.Generator, rows: Int) -> Visits:
        """The images of rows (S, B), each with a band of 0 to 7 rows blank."""
        seed = np.arange(len(self.x))[:, None]
        height = rng.integers(0, 8, rows.shape)
        top = rng.integers(0, 9 - height)
        line = np.arange(8)
        blank = (line >= top[..., None]) & (line < (top + height)[..., None])
        x = self.x[seed, rows] * ~blank.repeat(8, axis=-1)
        return Visits(*map(torch.from_numpy, (x.astype(np.float32), self.y[seed, rows])))

    def some(self, rng: np.random.Generator) -> Visits:
        """A batch, with replacement."""
        return self.visit(rng, rng.integers(0, self.x.shape[1], (len(self.x), BATCH)))


def halves(seeds: Sequence[int]) -> tuple[Half, Half]:
    """The digits cut in two by each seed, class shares kept: to train on, and to measure by."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int64)
    parts = [train_test_split(x, y, test_size=0.5, stratify=y, random_state=s) for s in seeds]
    train_x, test_x, train_y, test_y = (np.stack(side) for side in zip(*parts, strict=True))
    return Half(train_x, train_y), Half(test_x, test_y)


# ── policies ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Policies:
    """M policies: who answers, and the head that states a confidence for an answer."""

    answer: MLPEnsemble
    head: MLPEnsemble

    @classmethod
    def new(cls, seeds: Sequence[int]) -> Policies:
        answer = MLPEnsemble.initialise([PIXELS, HIDDEN, CLASSES], seeds)
        sizes = [PIXELS + CLASSES, HIDDEN, len(LEVELS)]
        return cls(answer, MLPEnsemble.initialise(sizes, [s + 1 for s in seeds]))

    def copies(self, times: int) -> Policies:
        """All of them, times over, one whole set after the other."""
        return Policies(*(_repeated(net, times) for net in (self.answer, self.head)))

    def part(self, first: int, count: int) -> Policies:
        """The members from `first` on."""
        rows = slice(first, first + count)
        return Policies(*(_repeated(net, 1, rows) for net in (self.answer, self.head)))

    @property
    def parameters(self) -> list[Tensor]:
        return [t for net in (self.answer, self.head) for t in (*net.weights, *net.biases)]


def _repeated(net: MLPEnsemble, times: int, rows: slice = slice(None)) -> MLPEnsemble:
    def again(tensors: list[Tensor]) -> list[Tensor]:
        return [t.detach()[rows].repeat(times, 1, 1).requires_grad_() for t in tensors]

    return MLPEnsemble(again(net.weights), again(net.biases))


def over_answers(head: MLPEnsemble, x: Tensor) -> Tensor:
    """What a head puts out for each of the ten answers to each image, (M, B, 10, out).

    The same as with the answer as ten more inputs, but the image is multiplied once.

    >>> head, x = Policies.new([0]).head, torch.rand(1, 1, PIXELS)
    >>> each = torch.cat([x.expand(1, CLASSES, PIXELS), torch.eye(CLASSES)[None]], dim=-1)
    >>> torch.allclose(over_answers(head, x)[:, 0], head.layers(each)[-1], atol=1e-6)
    True
    """
    of_image, of_answer = head.weights[0].split((PIXELS, CLASSES), dim=1)
    h = torch.baddbmm(head.biases[0], x, of_image)[:, :, None] + of_answer[:, None]
    out = torch.baddbmm(head.biases[1], h.relu().flatten(1, 2), head.weights[1])
    return out.unflatten(1, (x.shape[1], CLASSES))


def teach(
    policies: Policies, half: Half, rng: np.random.Generator, learning_rate: float = RATE
) -> None:
    """Demonstrations: the right digit, with a confidence from .6 to 1 at random."""
    optimiser = torch.optim.Adam(policies.parameters, lr=learning_rate, fused=True)
    for _ in range(TAUGHT):
        seen = half.some(rng)
        logits = policies.answer.layers(seen.x)[-1]
        place = seen.y[..., None, None].expand(-1, -1, 1, len(LEVELS))
        stated = over_answers(policies.head, seen.x).gather(2, place)[:, :, 0]
        level = torch.from_numpy(rng.integers(SUREST - 4, SUREST + 1, seen.y.shape))
        loss = _members(cross_entropy(logits.flatten(0, 1), seen.y.flatten(), reduction="none"))
        loss = loss + _members(
            cross_entropy(stated.flatten(0, 1), level.flatten(), reduction="none")
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _members(losses: Tensor) -> Tensor:
    """Means a member, summed over members: no gradient of one touches another."""
    return losses.sum() / BATCH


def reinforce(
    policies: Policies, half: Half, tables: Float, steps: int, rng: np.random.Generator
) -> None:
    """GRPO without the deviation, in place; tables (arms, 2, 11): rewards of wrong and right
    answers by the confidence stated. Members are those of each arm after one another."""
    arms, seeds = len(tables), len(half.x)
    table = torch.from_numpy(tables)
    arm = torch.arange(arms).repeat_interleave(seeds)[:, None, None]
    advantages = chain(centre())
    optimiser = torch.optim.Adam(policies.parameters, lr=RATE, fused=True)
    for _ in range(steps):
        seen = half.some(rng)
        u = rng.random((2, seeds, BATCH, SAMPLES))
        x, y = seen.x.repeat(arms, 1, 1), seen.y.repeat(arms, 1)
        logp = policies.answer.layers(x)[-1].log_softmax(dim=-1)
        a = sampled(logp.detach()[:, :, None], np.tile(u[0], (arms, 1, 1)))
        place = a[..., None].expand(-1, -1, -1, len(LEVELS))
        stated = over_answers(policies.head, x).log_softmax(dim=-1).gather(2, place)
        q = sampled(stated.detach(), np.tile(u[1], (arms, 1, 1)))
        reward = table[arm, (a == y[..., None]).long(), q]
        A = advantages(group_rewards(reward.flatten(), num_generations=SAMPLES)).float()
        both = torch.stack([logp.gather(2, a), stated.gather(3, q[..., None])[..., 0]], dim=-1)
        tokens = both.reshape(-1, 2)
        loss = clipped_policy_loss(
            tokens, tokens.detach(), A, torch.ones_like(tokens), aggregation="seq_sum"
        ).loss
        optimiser.zero_grad()
        (loss * arms * seeds).backward()
        optimiser.step()


def sampled(logits: Tensor, u: Float) -> Tensor:
    """Draws by inversion: logits that broadcast to (*u.shape, V) -> int64 of the shape of u."""
    logp = normalize(logits)
    return torch.as_tensor(invert(logp.expand(*u.shape, logp.shape[-1]).contiguous(), u))


# ── what they answer ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Said:
    """Answers to images, (M, B, n) of n samples each: what was answered, whether that is right,
    the confidence stated, and how likely the answer was."""

    answer: Int
    right: Float
    stated: Float
    chance: Float


def say(policies: Policies, seen: Visits, u: Float, *, likeliest: bool = True) -> Said:
    """n confidences of M members for their likeliest answer to the images of S seeds, or for n
    sampled answers; u: uniforms (2, S, B, n), the same for all members of a seed."""
    times = policies.answer.members // len(seen.x)
    parts = []
    with torch.no_grad():
        for start in range(0, seen.x.shape[1], CHUNK):
            rows = slice(start, start + CHUNK)
            x, y = seen.x[:, rows].repeat(times, 1, 1), seen.y[:, rows].repeat(times, 1)
            v = np.tile(u[:, :, rows], (1, times, 1, 1))
            logp = policies.answer.layers(x)[-1].log_softmax(dim=-1)
            if likeliest:
                a = logp.argmax(dim=-1, keepdim=True).expand(v.shape[1:])
            else:
                a = sampled(logp[:, :, None], v[0])
            place = a[..., None].expand(-1, -1, -1, len(LEVELS))
            q = sampled(over_answers(policies.head, x).gather(2, place), v[1])
            chance = logp.gather(2, a).exp().clamp(max=1)
            parts.append([part.numpy() for part in (a, a == y[..., None], q, chance)])
    a, right, q, p = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    return Said(a, right.astype(np.float64), LEVELS[q], p.astype(np.float64))


# ── confidence after the fact ───────────────────────────────────────────────────────────────────

Judge = Callable[[Tensor], Tensor]


def fit_judge(
    policies: Policies, half: Half, steps: int, rng: np.random.Generator, *, probe: bool = False
) -> Judge:
    """The chance that an answer is right, learned by BCE on answers of a policy to its own half.

    A head of the policy's own kind with one output, or a linear probe of the last hidden layer of
    the answering network. -> a function of pixels (M, B, 64), probabilities (M, B, 10).
    """
    seeds = list(range(policies.answer.members))
    sizes = [HIDDEN, CLASSES] if probe else [PIXELS + CLASSES, HIDDEN, 1]
    judge = MLPEnsemble.initialise(sizes, seeds)

    def logits(x: Tensor, hidden: Tensor) -> Tensor:
        return judge.layers(hidden)[-1] if probe else over_answers(judge, x)[..., 0]

    optimiser = torch.optim.Adam([*judge.weights, *judge.biases], lr=RATE, fused=True)
    for _ in range(steps):
        seen = half.some(rng)
        with torch.no_grad():
            hidden, answers = policies.answer.layers(seen.x)[-2:]
        a = sampled(answers[:, :, None], rng.random((len(seeds), BATCH, SAMPLES)))
        right = (a == seen.y[..., None]).float()
        found = logits(seen.x, hidden).gather(2, a)
        loss = binary_cross_entropy_with_logits(found, right, reduction="none")
        optimiser.zero_grad()
        _members(loss.mean(dim=2)).backward()
        optimiser.step()

    def probabilities(x: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(x, policies.answer.layers(x)[-2]).sigmoid()

    return probabilities


def judged(judge: Judge, seen: Visits, said: Said) -> Float:
    """What a judge gives the answers, (M, B, n)."""
    found = [judge(seen.x[:, i : i + CHUNK]) for i in range(0, seen.x.shape[1], CHUNK)]
    return np.take_along_axis(torch.cat(found, dim=1).numpy(), said.answer, 2).astype(np.float64)
