"""TEMPO: is credit for the token at which answers part worth more than a longer step?

A policy without shared parameters: a table of logits for each prefix of a tree of tokens, so that
the chance of a reward is known exactly. Two positions of an answer decide it; at the others the
policy has a favourite token, and answers share long prefixes. All methods see the same uniforms.
TEMPO's advantages are larger than GRPO's (2 r' - V against r'), so methods are compared at steps of
one length, for several lengths, and at one learning rate, as the paper does. Real
answers to MATH problems show how much of a tree there is; a transformer's training step shows what
the tree costs.

Tran, Yao and Yu, "Exploiting tree structure for credit assignment in RL training of LLMs", 2025,
arXiv 2509.18314.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.categorical import invert
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers.digit_diffusion import ratio
from scoredraw.papers.math_groups import math_groups
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.policy_loss import clipped_policy_loss
from scoredraw.rl.prefix_tree import prefix_tree
from scoredraw.rl.reward_groups import centre, chain, group_rewards
from scoredraw.rl.tempo import group_standing, tempo_advantages
from scoredraw.rl.token_credit import returns_to_go

Float = NDArray[np.float64]
Credit = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, rows, rewards -> (R, G, D)
Arm = Callable[["TokenTrees"], Credit]

V, G = 3, 8  # tokens; answers a prompt
RIGHT, FAVOURITE, SURE = 0.2, 0.8, 0.97  # probabilities at the start; a favourite without noise
FIRST, GOAL, WINDOW = 50, 0.9, 5  # updates that count; success, as a mean of so many updates
SIZE = 0.5  # of a step
TEMPO, GRPO, TD, RLOO, CRITIC = "TEMPO", "GRPO", "change of V only", "RLOO", "PPO, learned V"
FASTER = "MATH 87.6 -> 91.0 against GRPO, about 1.4 times as fast"
BETTER = "better than PPO and GRPO on MATH, MedQA and out of distribution (Qwen3-1.7B and 4B)"
DERIVED = "not in the paper: derived from its equation"
NOTES = [
    "The paper's models, Qwen3-1.7B and 4B on MATH and MedQA, need machines that are not here.",
    (
        "On policy TEMPO's gradient is that of 2 r' - V(prefix). At one learning rate it takes a "
        "longer step than GRPO: look at steps of one length, and at GRPO with twice the rate."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    tuning: int  # other seeds, on which PPO's critic is chosen
    updates: int
    sizes: tuple[float, ...]
    critics: tuple[tuple[float, float], ...]  # rate of V, lambda
    options: bool = False  # other td_coef
    prompts: int = 40
    depth: int = 8
    shallow: int = 6  # depth of the world with one learning rate
    layers: int = 30  # of the transformer

    @property
    def first(self) -> int:
        """The updates whose mean success is compared."""
        return min(FIRST, self.updates)


CRITICS = tuple((rate, lam) for rate in (0.1, 0.3, 1.0) for lam in (0.8, 0.95, 1.0))
PLANS = {
    "smoke": Plan(2, 1, 6, (SIZE, 4.0), ((0.3, 1.0),), prompts=6, depth=4, shallow=3, layers=1),
    "quick": Plan(8, 2, 60, (SIZE, 4.0), ((0.3, 0.95), (0.3, 1.0))),
    "full": Plan(16, 4, 80, (0.25, SIZE, 1.0, 2.0, 4.0), CRITICS, options=True),
}
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train with every advantage at every step, look at real trees, time, and judge."""
    plan = PLANS[scale]
    report = Report(paper=29, scale=scale, seed=rng)
    with one_thread():
        add_matched(report, plan, rng)
        add_one_rate(report, plan, rng)
        add_law(report, plan, rng)
        add_real_trees(report)
    add_cost(report, plan, rng)
    if scale == "study":
        from scoredraw.papers.policy_study import add_policy_study

        add_policy_study(report, 29, rng)
    report.notes.extend(NOTES)
    return report


# ── a world whose rewards are known ─────────────────────────────────────────────────────────────


class TokenTrees:
    """A table of logits for every prefix of S x P prompts: answers of D tokens, each one of V.

    A prefix of l tokens is a node, numbered as in a heap: its children are V n + 1 + token.
    """

    def __init__(
        self, seeds: Sequence[int], prompts: int, depth: int, favourite: float = FAVOURITE
    ) -> None:
        self.seeds, self.prompts, self.depth = len(seeds), prompts, depth
        self.nodes = (V**depth - 1) // (V - 1)
        made = [self._prompts(seed, favourite) for seed in seeds]
        p, self.right = (torch.cat(part) for part in zip(*made, strict=True))
        self.logits = p.log().reshape(-1, V)
        self.p = p.reshape(-1, V)

    def _prompts(self, seed: int, favourite: float) -> tuple[Tensor, Tensor]:
        """Probabilities (P, N, V) and which tokens are right at each position, (P, D, V) bool."""
        random = np.random.default_rng([29, seed])
        P, N, D = self.prompts, self.nodes, self.depth
        p = np.full((P, N, V), (1 - favourite) / (V - 1))
        np.put_along_axis(p, random.integers(0, V, (P, N, 1)), favourite, 2)
        right = np.ones((P, D, V), bool)
        level = np.repeat(np.arange(D), V ** np.arange(D))
        keys = random.random((P, D)).argsort(axis=1)[:, :2]
        token = random.integers(0, V, (P, 2))
        for k in range(2):
            right[np.arange(P), keys[:, k]] = np.arange(V) == token[:, k, None]
        key = (right.sum(axis=2) < V)[:, level, None]
        chosen = np.where(right, RIGHT, (1 - RIGHT) / (V - 1))[:, level]
        return torch.from_numpy(np.where(key, chosen, p)), torch.from_numpy(right)

    def answers(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (R, G, D), the rows of the table they were drawn from, and rewards (R, G)."""
        R, D = len(self.right), self.depth
        table = torch.arange(R)[:, None] * self.nodes
        node = torch.zeros(u.shape[:2], dtype=torch.int64)
        tokens, rows = [], []
        right = torch.ones_like(node, dtype=torch.bool)
        for level in range(D):
            row = table + node
            token = invert(self.p[row].log(), u[:, :, level])
            right &= self.right[:, level].gather(1, token)
            node = V * node + 1 + token
            tokens.append(token)
            rows.append(row)
        return torch.stack(tokens, 2), torch.stack(rows, 2), right.double()

    def success(self) -> NDArray[np.float64]:
        """(S,) the chance of a reward, exact, mean over the prompts."""
        p = self.p.reshape(-1, self.nodes, V)
        value = torch.ones(len(p), V**self.depth, dtype=p.dtype)
        for level in reversed(range(self.depth)):
            first = (V**level - 1) // (V - 1)
            kept = p[:, first : first + V**level] * self.right[:, level, None]
            value = (kept * value.reshape(len(p), -1, V)).sum(dim=2)
        found: NDArray[np.float64] = value.reshape(self.seeds, -1).mean(dim=1).numpy()
        return found

    def gradient(self, rows: Tensor, tokens: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table, and (1/G) Σ_i Σ_t A ∇ log π with respect to them."""
        touched, where = rows.reshape(-1).unique(return_inverse=True)
        score = torch.nn.functional.one_hot(tokens.reshape(-1), V) - self.p[rows.reshape(-1)]
        total = torch.zeros(len(touched), V, dtype=self.p.dtype)
        each = advantages.reshape(-1, 1) * score / rows.shape[1]
        return touched, total.index_add(0, where, each)

    def ascend(self, touched: Tensor, gradient: Tensor, size: float, matched: bool) -> None:
        """A step of `size` times the gradient, or of length size √P for each seed."""
        if matched:
            seed = touched // (self.nodes * self.prompts)
            square = torch.zeros(self.seeds, dtype=self.p.dtype)
            length = square.index_add(0, seed, (gradient**2).sum(dim=1)).sqrt()
            gradient = gradient * (self.prompts**0.5 / length.clamp(min=1e-300))[seed, None]
        self.logits[touched] += size * gradient
        self.p[touched] = self.logits[touched].softmax(dim=1)


# ── ways to credit a token ──────────────────────────────────────────────────────────────────────


def on_tree(**how: Any) -> Arm:
    """`tempo_advantages` with these options."""

    def credit(tokens: Tensor, rows: Tensor, rewards: Tensor) -> Tensor:
        ids, r = tokens.flatten(0, 1), rewards.reshape(-1)
        return tempo_advantages(ids, None, r, num_generations=G, **how).reshape(tokens.shape)

    return lambda trees: credit


def rloo(trees: TokenTrees) -> Credit:
    """The reward less the mean reward of the others."""

    def credit(tokens: Tensor, rows: Tensor, rewards: Tensor) -> Tensor:
        groups = group_rewards(rewards.reshape(-1), num_generations=G)
        return chain(centre("others"))(groups).reshape(*rewards.shape, 1).expand(tokens.shape)

    return credit


def with_critic(rate: float, lam: float) -> Arm:
    """PPO's credit: generalized advantages of a V for each prefix, which learns as we go."""

    def start(trees: TokenTrees) -> Credit:
        value = torch.zeros(len(trees.p), dtype=torch.float64)

        def credit(tokens: Tensor, rows: Tensor, rewards: Tensor) -> Tensor:
            v = value[rows]
            after = torch.cat([v[:, :, 1:], rewards[:, :, None]], dim=2)
            found = returns_to_go(after - v, gamma=lam)
            seen, where, times = rows.reshape(-1).unique(return_inverse=True, return_counts=True)
            returns = rewards[:, :, None].expand(rows.shape).reshape(-1)
            mean = torch.zeros(len(seen), dtype=v.dtype).index_add(0, where, returns) / times
            value[seen] += rate * (mean - value[seen])
            return found

        return credit

    return start


def trained(
    arm: Arm, seeds: Sequence[int], plan: Plan, size: float, updates: int, *,
    matched: bool = True, depth: int | None = None, favourite: float = FAVOURITE,
) -> Float:  # fmt: skip
    """(updates, S) the chance of a reward before each update."""
    D, P = depth or plan.depth, plan.prompts
    trees = TokenTrees(seeds, P, D, favourite)
    random = [np.random.default_rng([29, 1, seed]) for seed in seeds]
    credit, success = arm(trees), []
    for _ in range(updates):
        success.append(trees.success())
        u = np.concatenate([each.random((P, G, D)) for each in random])
        tokens, rows, rewards = trees.answers(torch.from_numpy(u))
        step = trees.gradient(rows, tokens, credit(tokens, rows, rewards))
        trees.ascend(*step, size, matched)
    return np.array(success)


def updates_to_goal(success: Float) -> Float:
    """(S,) updates until the mean of WINDOW reaches GOAL; as many as there are where it doesn't."""
    window = np.lib.stride_tricks.sliding_window_view(success, WINDOW, axis=0).mean(axis=-1)
    reached = window >= GOAL
    found = np.where(reached.any(axis=0), reached.argmax(axis=0) + WINDOW, len(success))
    return found.astype(np.float64)


# ── steps of one length ─────────────────────────────────────────────────────────────────────────


def add_matched(report: Report, plan: Plan, rng: int) -> None:
    seeds = [1000 * rng + seed for seed in range(plan.seeds)]
    arms: dict[str, Arm] = {
        TEMPO: on_tree(), GRPO: on_tree(variant="grpo"), RLOO: rloo, TD: on_tree(variant="td_only"),
        CRITIC: best_critic(report, plan, rng),
    }  # fmt: skip
    runs = {name: trained(arm, seeds, plan, SIZE, plan.updates) for name, arm in arms.items()}
    first = {name: each[: plan.first].mean(axis=0) for name, each in runs.items()}
    goal = {name: updates_to_goal(each) for name, each in runs.items()}
    rows: list[list[Cell]] = [
        [name, mean_interval(first[name]), mean_interval(goal[name])] for name in arms
    ]
    columns = ["advantage", f"success over {plan.first} updates", f"updates to {GOAL:g}"]
    note = f"Length {SIZE:g} √{plan.prompts}. {plan.updates} updates stand for more."
    report.tables.append(ReportTable("Steps of one length", columns, rows, note))
    for name in (GRPO, CRITIC, RLOO, TD):
        gain = paired_difference(first[TEMPO], first[name])
        says = BETTER if name in (GRPO, CRITIC) else "not in the paper"
        claim = f"success, TEMPO - {name}, steps of length {SIZE:g}"
        report.claims.append(Claim.at_least(claim, says, gain, 0.0))
    speed = ratio(goal[GRPO], goal[TEMPO])
    claim = f"updates to {GOAL:g}, GRPO / TEMPO, steps of length {SIZE:g}"
    report.claims.append(Claim.at_least(claim, FASTER, speed, 1.4))
    report.figures.append(curves(runs, f"Steps of length {SIZE:g}"))
    add_lengths(report, plan, seeds, {name: arms[name] for name in (TEMPO, GRPO, CRITIC)}, first)
    add_worlds(report, plan, seeds, first)
    if plan.options:
        add_options(report, plan, seeds, first)


def best_critic(report: Report, plan: Plan, rng: int) -> Arm:
    """PPO with the critic that does best on seeds of its own."""
    seeds = [1000 * rng + 500 + seed for seed in range(plan.tuning)]
    best = max(
        plan.critics,
        key=lambda how: trained(with_critic(*how), seeds, plan, SIZE, plan.first).mean(),
    )
    report.notes.append(
        "PPO's critic is a table too, rate {:g} and λ = {:g}, the best of {}. It sees the same "
        "prefixes at every update, as no language model's does.".format(*best, len(plan.critics))
    )
    return with_critic(*best)


def add_lengths(
    report: Report, plan: Plan, seeds: list[int], arms: dict[str, Arm], first: dict[str, Float]
) -> None:
    """Longer and shorter steps. Without shared parameters the longest is the best for everyone."""
    found = {
        (name, size): first[name] if size == SIZE
        else trained(arm, seeds, plan, size, plan.first).mean(axis=0)
        for name, arm in arms.items() for size in plan.sizes
    }  # fmt: skip
    gain = {
        size: {b: paired_difference(found[TEMPO, size], found[b, size]) for b in (GRPO, CRITIC)}
        for size in plan.sizes
    }
    rows: list[list[Cell]] = [
        [size, *(mean_interval(found[name, size]) for name in arms), *gain[size].values()]
        for size in plan.sizes
    ]
    columns = ["length", *arms, f"{TEMPO} - {GRPO}", f"{TEMPO} - {CRITIC}"]
    note = "A prompt's logits are its own: nothing is lost by a long step, and no length is best."
    report.tables.append(ReportTable("Success by the length of a step", columns, rows, note))
    claim = f"success, TEMPO - GRPO, steps of length {plan.sizes[-1]:g}"
    report.claims.append(Claim.at_least(claim, BETTER, gain[plan.sizes[-1]][GRPO], 0.0))
    series = [
        Series(name, plan.sizes, [float(found[name, size].mean()) for size in plan.sizes],
               baseline=name == GRPO) for name in arms
    ]  # fmt: skip
    title = "What the length of a step does"
    report.figures.append(Figure("line", title, "length", "success", series, log_x=True))


def curves(runs: Mapping[str, Float], title: str) -> Figure:
    series = []
    for name, success in runs.items():
        each = [mean_interval(row) for row in success]
        mean, low, high = ([getattr(e, k) for e in each] for k in ("value", "low", "high"))
        series.append(Series(name, list(range(len(each))), mean, low, high, baseline=name == GRPO))
    return Figure("line", title, "updates", "chance of a reward", series)


def add_worlds(report: Report, plan: Plan, seeds: list[int], first: dict[str, Float]) -> None:
    """The same comparison with shorter answers, and with hardly any noise."""
    found = {(plan.depth, FAVOURITE): [first[TEMPO], first[GRPO]]}
    for depth, p in ((plan.shallow, FAVOURITE), (plan.depth, SURE)):
        found[depth, p] = [
            trained(arm, seeds, plan, SIZE, plan.first, depth=depth, favourite=p).mean(axis=0)
            for arm in (on_tree(), on_tree(variant="grpo"))
        ]
    rows: list[list[Cell]] = [
        [*world, mean_interval(a), mean_interval(b), paired_difference(a, b)]
        for world, (a, b) in found.items()
    ]
    columns = ["tokens", "favourite's probability", TEMPO, GRPO, "difference"]
    report.tables.append(ReportTable("Other worlds, steps of one length", columns, rows))


def add_options(report: Report, plan: Plan, seeds: list[int], first: dict[str, Float]) -> None:
    """Other weights of the change of V."""
    rows: list[list[Cell]] = [[1.0, mean_interval(first[TEMPO]), None]]
    for coef in (0.25, 0.5, 2.0, 4.0):
        found = trained(on_tree(td_coef=coef), seeds, plan, SIZE, plan.first).mean(axis=0)
        rows.append([coef, mean_interval(found), paired_difference(found, first[TEMPO])])
    title, columns = (
        "Weights of the change of V, steps of one length",
        ["td_coef", "success", "gain"],
    )
    report.tables.append(ReportTable(title, columns, rows))


# ── one learning rate, and why ──────────────────────────────────────────────────────────────────


def add_one_rate(report: Report, plan: Plan, rng: int) -> None:
    """Little noise, plain gradient steps: who needs how many updates at which rate."""
    seeds = [1000 * rng + seed for seed in range(plan.seeds)]
    how: dict[str, Any] = {"matched": False, "depth": plan.shallow, "favourite": SURE}
    arms: dict[str, tuple[Arm, float]] = {
        TEMPO: (on_tree(), SIZE), GRPO: (on_tree(variant="grpo"), SIZE),
        f"{GRPO}, twice the rate": (on_tree(variant="grpo"), 2 * SIZE),
        TD: (on_tree(variant="td_only"), SIZE), RLOO: (rloo, SIZE),
    }  # fmt: skip
    updates = 3 * plan.first
    goal = {
        name: updates_to_goal(trained(arm, seeds, plan, size, updates, **how))
        for name, (arm, size) in arms.items()
    }
    rows: list[list[Cell]] = [[n, arms[n][1], mean_interval(found)] for n, found in goal.items()]
    title, columns = f"One learning rate: updates to {GOAL:g}", ["advantage", "rate", "updates"]
    note = f"{plan.shallow} tokens, favourite {how['favourite']:g}. {updates} stand for more."
    report.tables.append(ReportTable(title, columns, rows, note))
    for name, other in (("GRPO", GRPO), ("GRPO at twice the rate", f"{GRPO}, twice the rate")):
        claim = f"updates to {GOAL:g}, {name} / TEMPO"
        report.claims.append(Claim.at_least(claim, FASTER, ratio(goal[other], goal[TEMPO]), 1.4))


def add_law(report: Report, plan: Plan, rng: int) -> None:
    """The gradient of TEMPO is that of 2 r' - V(prefix), sample for sample."""
    trees = TokenTrees([1000 * rng], plan.prompts, plan.depth)
    u = np.random.default_rng([29, 2, rng]).random((plan.prompts, G, plan.depth))
    tokens, rows, rewards = trees.answers(torch.from_numpy(u))

    def gradient(advantages: Tensor) -> Tensor:
        return trees.gradient(rows, tokens, advantages.reshape(tokens.shape))[1]

    variants = ("tempo", "grpo", "td_only", "mc_baseline")
    of = {v: gradient(on_tree(variant=v)(trees)(tokens, rows, rewards)) for v in variants}
    standing = group_standing(rewards.reshape(-1), num_generations=G)
    value = prefix_tree(tokens.flatten(0, 1), num_generations=G).means(standing)[:, :-1]
    size = of["tempo"].norm()
    summed = gradient(on_tree(lam=0.5)(trees)(tokens, rows, rewards))
    for name, gap in (
        ("TEMPO at lam = 0.5, of lam = 0", of["tempo"] - summed),
        ("TEMPO, of 2 r' - V(prefix)", of["tempo"] - gradient(2 * standing[:, None] - value)),
        ("change of V only, of r' - V(prefix)", of["td_only"] - of["mc_baseline"]),
    ):
        off = float(gap.norm() / size)
        report.claims.append(Claim.at_most(f"gradient of {name}: distance", DERIVED, off, 1e-12))
    cells: list[list[Cell]] = [
        [v, float(g.norm() / of["grpo"].norm()), float((g * of["tempo"]).sum() / g.norm() / size)]
        for v, g in of.items()
    ]
    columns = ["variant", "length, GRPO's = 1", "cosine with TEMPO"]
    report.tables.append(ReportTable("The first update, by variant", columns, cells))


# ── real answers, and the cost ──────────────────────────────────────────────────────────────────


def add_real_trees(report: Report) -> None:
    """How much of a tree sampled answers are, and in how many of them there is credit to give."""
    groups = math_groups()
    answers = [(i, text.split()) for i, g in enumerate(groups) for text in g["responses"]]
    rewards = [float(right) for group in groups for right in group["correct"]]
    ids, number = [i for i, _ in answers], dict[str, int]()
    words = [[number.setdefault(word, len(number)) for word in answer] for _, answer in answers]
    tree = prefix_tree(words, group_ids=ids)
    found = tree.statistics()
    standing = group_standing(rewards, ids)
    at, change = tree.changes(standing)
    branches = int((at < tree.longest).sum())
    rows: list[list[Cell]] = [
        ["answers", len(answers)],
        ["words that end a prefix shared with another answer", found["shared_tokens"]],
        ["branch words an answer", found["branches"]],
        ["distinct prefixes a word", found["nodes"]],
        ["branch words whose credit differs from GRPO's", int((change != 0).sum()) / branches],
        ["answers in groups with different rewards", float((standing != 0).double().mean())],
    ]
    report.tables.append(ReportTable("Answers to MATH problems as trees", ["", "measured"], rows))


def add_cost(report: Report, plan: Plan, rng: int) -> None:
    """Seconds for the tree's advantages, as a share of the training step on the same answers."""
    with torch.random.fork_rng():
        torch.manual_seed(rng)
        millions, shares = step_shares(plan.layers, 49_152 if plan.layers > 1 else 1024)
    name = f"share of a training step, {millions:.0f} million parameters, {G} answers of 64 tokens"
    says = "about the same wall-clock time as GRPO"
    report.claims.append(Claim.at_most(name, says, max(shares), 0.05))


def step_shares(layers: int, words: int) -> tuple[float, list[float]]:
    """Millions of parameters, and the share of two steps that the advantages take."""
    width, T = 576, 64
    block = torch.nn.TransformerEncoderLayer(
        width, 9, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    body = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    table = torch.nn.Embedding(words, width)
    parameters = [*body.parameters(), *table.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-6)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
    ids = torch.randint(words, (G, T))
    ids[1::2, : T // 2] = ids[::2, : T // 2]
    mask, rewards = torch.ones_like(ids), torch.arange(G) % 2
    shares = []
    for _ in range(3):
        began = time.perf_counter()
        advantages = tempo_advantages(ids, mask, rewards, num_generations=G)
        credited = time.perf_counter()
        states = body(table(ids), mask=causal, is_causal=True)[:, :-1]
        logp = (states @ table.weight.T).log_softmax(dim=2).gather(2, ids[:, 1:, None])[:, :, 0]
        loss = clipped_policy_loss(logp, logp.detach(), advantages[:, 1:], mask[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append((credited - began) / (time.perf_counter() - began))
    return sum(p.numel() for p in parameters) / 1e6, shares[1:]  # the first one warms up
