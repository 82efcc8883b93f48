"""Credit for tokens and steps, against the loops that one would write without tensors.

TEMPO's advantages against a trie of dictionaries, PURE's against a loop over answers, steps and
tokens, and PORTool's against dictionaries of steps. Both sides have the same tensors or arrays and
leave a (B, T) array; the loops run over lists, and pass rows from and to arrays whole. PORTool's
clock includes making the tree's table. PURE's authors loop over rows and over columns with tensors
inside; that is its second peer. All on one thread, as loops are. A limit says what TEMPO adds to a
training step, which has all threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.contest import Contest, Limit
from scoredraw.papers.training import one_thread
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.process_advantages import process_advantages
from scoredraw.rl.rollout_tree import Proposals, RolloutTree, portool_advantages, tree_rollout
from scoredraw.rl.tempo import tempo_advantages
from scoredraw.rl.token_credit import over_steps

Lists = list[list[float]]
Int = NDArray[np.int64]
Float = NDArray[np.float32]

FASTER = 50
TEMPERATURE, GAMMA = 0.1, 0.95
EPS_TEMPO, EPS_PORTOOL = 1e-8, 1e-6


def credit(*, tiny: bool = False) -> Iterator[Contest | Limit]:
    """Contests of three kinds of credit, and TEMPO's share of a training step."""
    yield from tempo(tiny)
    yield from pure(tiny)
    yield from portool(tiny)


def spread(x: list[float]) -> tuple[float, float]:
    """Mean and unbiased deviation."""
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / max(len(x) - 1, 1))


def padded(rows: Lists, width: int) -> Float:
    """(B, width) float32, 0 after the end of a row."""
    found = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def single(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function on one thread."""

    def run() -> Any:
        with one_thread():
            return function()

    return run


def alike(ours: Any, theirs: Any) -> None:
    """To float32's rounding of sums of some ten terms."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=1e-4)


# ── TEMPO ───────────────────────────────────────────────────────────────────────────────────────


def tempo(tiny: bool) -> Iterator[Contest | Limit]:
    P, G, T = (2, 4, 64) if tiny else (64, 16, 4096)
    ids, mask, rewards = branching(P, G, T)
    yield Contest(
        f"TEMPO advantages, {P} x {G} answers of up to {T:,} tokens", "trie of dictionaries",
        single(lambda: tempo_advantages(ids, mask, rewards, num_generations=G)),
        lambda: by_trie(ids.numpy(), mask.numpy(), rewards.tolist(), G), alike, 1 / FASTER,
        repeats=3,
    )  # fmt: skip
    size = "2 layers" if tiny else "135 million parameters"
    yield Limit(
        f"TEMPO's share of a training step of 8 x 64 tokens, {size}", "share",
        TrainingStep(tiny), 0.05,
    )  # fmt: skip


def branching(P: int, G: int, T: int, words: int = 50_000) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask (P G, T), rewards: each answer goes on from a beginning of an earlier one.

    Seven in ten part within some thirty tokens, the others anywhere; half to all of T tokens.
    """
    random = np.random.default_rng(0)
    ids = random.integers(0, words, (P, G, T))
    length = random.integers(T // 2, T + 1, (P, G))
    for g in range(1, G):
        early = np.minimum(random.geometric(1 / 30, P), T)
        cut = np.where(random.random(P) < 0.7, early, random.integers(0, T + 1, P))
        source = ids[np.arange(P), random.integers(0, g, P)]
        ids[:, g] = np.where(np.arange(T) < cut[:, None], source, ids[:, g])
    mask = torch.from_numpy(np.arange(T) < length.reshape(-1, 1))
    rewards = torch.from_numpy(random.integers(0, 2, P * G)).float()
    return torch.from_numpy(ids.reshape(P * G, T)), mask, rewards


def by_trie(ids: Int, mask: NDArray[np.bool_], rewards: list[float], G: int) -> Float:
    rows = [row[:n].tolist() for row, n in zip(ids, mask.sum(axis=1).tolist(), strict=True)]
    found: Lists = []
    for start in range(0, len(rows), G):
        r = rewards[start : start + G]
        mean, deviation = spread(r)
        own = [(x - mean) / (deviation + EPS_TEMPO) for x in r]
        found += group_by_trie(rows[start : start + G], own)
    return padded(found, ids.shape[1])


def group_by_trie(rows: list[list[int]], own: list[float]) -> Lists:
    """A dictionary a node from a token to the next node; a sum and a count a node."""
    children: list[dict[int, int]] = [{}]
    total, count = [0.0], [0]
    paths = []
    for row, value in zip(rows, own, strict=True):
        node, path = 0, [0]
        total[0] += value
        count[0] += 1
        for token in row:
            below = children[node].get(token)
            if below is None:
                below = children[node][token] = len(count)
                children.append({})
                total.append(value)
                count.append(1)
            else:
                total[below] += value
                count[below] += 1
            node = below
            path.append(node)
        paths.append(path)
    V = [t / n for t, n in zip(total, count, strict=True)]
    return [
        [value + V[after] - V[before] for before, after in pairwise(path)]
        for value, path in zip(own, paths, strict=True)
    ]


class TrainingStep:
    """A step with AdamW of a Llama of random weights, and TEMPO's share of its seconds."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.ids, self.mask, self.rewards = branching(1, 8, 64, 1024)

    def __call__(self) -> float:
        model, optimizer = self.policy
        began = time.perf_counter()
        A = tempo_advantages(self.ids, self.mask, self.rewards, num_generations=8)
        credited = time.perf_counter()
        self.update(model, optimizer, A)
        return (credited - began) / (time.perf_counter() - began)

    @cached_property
    def policy(self) -> tuple[Any, torch.optim.Optimizer]:
        """SmolLM-135M's shape, or next to nothing, after an update that warms it up."""
        from transformers import LlamaConfig, LlamaForCausalLM

        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads")  # fmt: skip
        sizes = (1024, 64, 192, 2, 2, 1) if self.tiny else (49_152, 576, 1536, 30, 9, 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(**dict(zip(names, sizes, strict=True)), tie_word_embeddings=True)
            model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
        self.update(model, optimizer, torch.zeros(self.ids.shape))
        return model, optimizer

    def update(self, model: Any, optimizer: torch.optim.Optimizer, A: Tensor) -> None:
        logits = model(self.ids, attention_mask=self.mask.long()).logits[:, :-1]
        logp = logits.log_softmax(dim=2).gather(2, self.ids[:, 1:, None])[:, :, 0]
        loss = clipped_policy_loss(logp, logp.detach(), A[:, 1:], self.mask[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ── PURE ────────────────────────────────────────────────────────────────────────────────────────


class Scored(NamedTuple):
    """Answers in groups of four: scores r and ends (B, S), length, solved (B,), mask (B, T)."""

    r: Tensor
    ends: Tensor
    length: Tensor
    solved: Tensor
    mask: Tensor

    def ours(self) -> Tensor:
        real = torch.ones_like(self.r, dtype=torch.bool)
        return process_advantages(
            self.r, real, self.ends, self.mask, 4, temperature=TEMPERATURE, outcome=self.solved
        )


def pure(tiny: bool) -> Iterator[Contest]:
    B, T, S = (8, 64, 4) if tiny else (1024, 4096, 64)
    batch = scored(B, T, S)
    what = f"PURE advantages, B = {B:,}, T = {T:,}, S = {S}"
    yield Contest(
        what, "loop over rows, steps, tokens", single(batch.ours), lambda: by_loops(batch), alike,
        1 / FASTER, repeats=5,
    )  # fmt: skip
    yield Contest(
        what, "loops over rows and columns, tensors inside", single(batch.ours),
        single(lambda: by_columns(batch)), alike, repeats=5,
    )  # fmt: skip


def scored(B: int, T: int, S: int) -> Scored:
    random = np.random.default_rng(0)
    length = random.integers(T // 2, T + 1, B)
    inner = [np.sort(random.choice(n - 1, S - 1, replace=False)) for n in length]
    ends = np.concatenate([np.stack(inner), length[:, None] - 1], axis=1)
    return Scored(
        torch.from_numpy(random.uniform(-1, 1, (B, S)).astype(np.float32)),
        torch.from_numpy(ends), torch.from_numpy(length),
        torch.from_numpy(random.integers(0, 2, B)).float(),
        torch.from_numpy(np.arange(T) < length[:, None]),
    )  # fmt: skip


def by_loops(batch: Scored) -> Float:
    """Softmin rewards less the others' reward a token, the outcome at the end, then sums to go."""
    r, ends, length, solved = (x.tolist() for x in batch[:4])
    earned = []
    for row in r:
        low = min(row)
        w = [math.exp((low - x) / TEMPERATURE) for x in row]
        z = sum(w)
        earned.append([a * x / z for a, x in zip(w, row, strict=True)])
    total = [sum(row) for row in earned]
    found: Lists = []
    for i, row in enumerate(earned):
        first = i // 4 * 4
        others = [k for k in range(first, first + 4) if k != i]
        a_token = sum(total[k] for k in others) / sum(length[k] for k in others)
        last = length[i] - 1
        at, before = [0.0] * length[i], -1
        for x, end in zip(row, ends[i], strict=True):
            at[end] = x - a_token * (end - before)
            before = end
        at[last] += solved[i] - sum(solved[k] for k in others) / 3
        to_go = 0.0
        for t in range(last, -1, -1):
            to_go += at[t]
            at[t] = to_go
        found.append(at)
    return padded(found, batch.mask.shape[1])


def by_columns(batch: Scored) -> Tensor:
    """The same with a tensor a row, and a column at a time for the sums to go."""
    r, ends, length, solved, mask = batch
    at = torch.zeros(mask.shape)
    earned = (torch.softmax(-r / TEMPERATURE, dim=1) * r).unbind()
    for i, row in enumerate(earned):
        first = i // 4 * 4
        others = [k for k in range(first, first + 4) if k != i]
        a_token = sum(earned[k].sum() for k in others) / sum(length[k] for k in others)
        at[i, ends[i]] = row - a_token * torch.diff(ends[i], prepend=ends.new_tensor([-1]))
        at[i, length[i] - 1] += solved[i] - solved[others].mean()
    for t in range(mask.shape[1] - 2, -1, -1):
        at[:, t] += at[:, t + 1]
    return at * mask


# ── PORTool ─────────────────────────────────────────────────────────────────────────────────────


def portool(tiny: bool) -> Iterator[Contest]:
    """Both sides begin with the parent and format reward of each step, and ends with outcomes.

    First of steps alone, which are few, then on all tokens of the trajectories.
    """
    Q, T = (4, 64) if tiny else (128, 4096)
    table = tree_rollout(proposals, 8, queries=Q, rng=0, merge=False, truncated=-1.0).table
    roots = np.where(table.depth == 1, -1 - table.query, table.parent)
    form, outcome = table.format_reward, table.outcome
    ends = table.paths[np.arange(len(table.paths)), table.length - 1]
    lists = [x.tolist() for x in (roots, form, ends, outcome)]
    B, D = table.paths.shape
    written = torch.from_numpy(table.paths >= 0)
    last = torch.from_numpy(np.sort(np.random.default_rng(0).permuted(
        np.tile(np.arange(T), (B, 1)), axis=1)[:, :D], axis=1))  # fmt: skip
    stops = [row[:n] for row, n in zip(last.tolist(), table.length.tolist(), strict=True)]

    def ours() -> NDArray[np.float64]:
        tree = RolloutTree()
        tree.add_steps(roots, form)
        tree.finish(ends, outcome)
        return portool_advantages(tree, gamma=GAMMA)

    def on_tokens() -> Tensor:
        return over_steps(torch.from_numpy(ours()).float(), written, last, T)

    def by_slices() -> Float:
        found = np.zeros((B, T), np.float32)
        for row, values, own in zip(found, by_steps(*lists), stops, strict=True):
            start = 0
            for value, stop in zip(values, own, strict=True):
                row[start : stop + 1], start = value, stop + 1
        return found

    what = f"PORTool advantages, {B:,} trajectories of {Q} queries, {len(roots):,} steps"
    yield Contest(what, "dictionaries of steps", ours, lambda: padded(by_steps(*lists), D), alike)
    what += f", T = {T:,}"
    loop = single(lambda: padded([token_by_token(*row) for row in
                                  zip(by_steps(*lists), stops, strict=True)], T))  # fmt: skip
    yield Contest(
        what, "dictionaries of steps, a loop over tokens", single(on_tokens), loop, alike,
        1 / FASTER, repeats=5,
    )  # fmt: skip
    yield Contest(
        what, "dictionaries of steps, slices", single(on_tokens), single(by_slices), alike,
        repeats=5,
    )  # fmt: skip


def token_by_token(values: list[float], stops: list[int]) -> list[float]:
    """The value of its step for every token."""
    found: list[float] = []
    for value, stop in zip(values, stops, strict=True):
        found.extend(value for _ in range(len(found), stop + 1))
    return found


def proposals(parents: Int, random: np.random.Generator) -> Proposals:
    """A step in four ends, right or wrong; small format rewards."""
    C = len(parents)
    outcome, form = random.choice([-1.0, 1.0], C), random.choice([0.0, -0.3], C)
    return Proposals(random.random(C) < 0.25, outcome, form)


def by_steps(parent: list[int], form: list[float], ends: list[int], outcome: list[float]) -> Lists:
    """Paths upwards, a discounted mean a step, then two standardisations."""
    paths = []
    for end in ends:
        path, step = [], end
        while step >= 0:
            path.append(step)
            step = parent[step]
        paths.append((-1 - step, path[::-1]))
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    by_query: dict[int, list[float]] = {}
    for (query, path), R in zip(paths, outcome, strict=True):
        by_query.setdefault(query, []).append(R)
        for step in reversed(path):
            sums[step] = sums.get(step, 0.0) + R
            counts[step] = counts.get(step, 0) + 1
            R *= GAMMA
    reward = {step: total / counts[step] + form[step] for step, total in sums.items()}
    siblings: dict[int, list[float]] = {}
    for step, R in reward.items():
        siblings.setdefault(parent[step], []).append(R)
    of_fork = {above: spread(values) for above, values in siblings.items()}
    of_query = {query: spread(values) for query, values in by_query.items()}
    fork = {}
    for step, R in reward.items():
        mean, deviation = of_fork[parent[step]]
        fork[step] = (R - mean) / (deviation + EPS_PORTOOL)
    found: Lists = []
    for (query, path), R in zip(paths, outcome, strict=True):
        mean, deviation = of_query[query]
        whole = (R - mean) / (deviation + EPS_PORTOOL)
        found.append([whole + fork[step] for step in path])
    return found
