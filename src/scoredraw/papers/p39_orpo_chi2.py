r"""Optimising a proxy without being fooled by it: which penalty, how strong, and what it promises.

A gardener is paid by a proxy that counts all tomatoes as watered while he stands on a bucket. The
reference waters well but not best: a mixture of a soft optimum of the true reward and a uniform
policy. First everything exact, from convex programs over occupancies: each penalty at each
strength, the theory's strength, the bound that no policy may break, then other gardens and other
references. Then from samples: PPO on the same garden, with a discriminator that learns the
log-ratio of the occupancies, which is the method as one would use it. Returns are means of a step
under the discounted occupancy; those of learned policies are exact too.

Laidlaw, Singhal and Dragan 2024, "Correlated proxies: a new definition and improved mitigation for
reward hacking", arXiv 2403.03185.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.rl.occupancy import OccupancyDiscriminator, occupancy_penalty, train_discriminator
from scoredraw.rl.policy_loss import clipped_token_loss
from scoredraw.rl.proxy_rewards import hacking_bound, penalty_coefficient, proxy_correlation
from scoredraw.rl.tabular_control import (
    kink_coefficient,
    occupancy_measure,
    soft_policy,
    solve_regularized,
)
from scoredraw.rl.tomato_world import TomatoModel, tomato_model

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

GAMMA, SLIPS = 0.95, 0.1
ACCURACY = 1e-6  # of a solver: above the kink its answer is the reference, give or take
ROOT, KL, ACTIONS = "√χ² of occupancies", "KL of occupancies", "KL of actions"
NONE, UNIFORM, REFERENCE = "no penalty", "uniform policy", "reference"
KINDS = {
    ROOT: "sqrt_chi2", "χ² of occupancies": "chi2", KL: "kl", "TV of occupancies": "tv",
    ACTIONS: "action_kl", "χ² of actions": "action_chi2",
}  # fmt: skip
GRID = (0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.002, 0.001)
MIXES = ((0.8, 0.02), (0.5, 0.02), (0.3, 0.02), (0.8, 0.05))
BEST = "√χ² on occupancies gives the best true reward in every setting"
HACKS = "unregularised optimisation hacks: far below the reference"
HELPS = "KL of action distributions helps in part"
THEORY = "at λ = σ̃ √(1/r² - 1) the true reward cannot fall below the reference's"
NOTES = (
    "Not run: the paper's traffic, pandemic, glucose and RLHF settings (simulators, large models).",
    "At its best: λ chosen by the true return, for every penalty alike; the theory knows r and σ̃.",
    "Nothing ends an episode; chains restart with chance 1 - γ, and so visit the occupancy itself.",
)


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    updates: int  # of the sampled runs
    chains: int
    arms: dict[str, tuple[float, ...]]
    gardens: tuple[str, ...] = ("very easy", "medium")
    mixes: tuple[tuple[float, float], ...] = MIXES[:2]
    grid: tuple[float, ...] = GRID
    cases: int = 5000  # random worlds for the bound


FEW = {NONE: (0.0,), ROOT: (0.01, 0.003), KL: (0.05, 0.01), ACTIONS: (0.2, 0.05)}
MANY = {NONE: (0.0,), ROOT: (0.01, 0.003, 0.001), KL: (0.05, 0.02, 0.01), ACTIONS: (0.2, 0.1, 0.05)}
ALL = ("very easy", "easy", "medium", "hard")
PLANS = {
    "smoke": Plan(2, 2, 32, FEW, ("very easy",), MIXES[:1], (0.03, 0.003), 500),
    "quick": Plan(2, 120, 1024, FEW, mixes=(MIXES[0], MIXES[3])),
    "full": Plan(5, 120, 1024, MANY, ALL, MIXES),
}  # fmt: skip
PLANS["study"] = PLANS["full"]  # and a language model


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Solve, sweep, learn, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=39, scale=scale, seed=rng)
    setting = make_setting("medium", *MIXES[0])
    add_exact(report, setting, plan, rng)
    add_gardens(report, plan)
    add_sampled(report, setting, plan, rng)
    if scale == "study":
        from scoredraw.papers.penalty_study import add_penalty_study

        add_penalty_study(report, rng)
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── a garden and its reference ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Setting:
    """A garden, the reference's policy (S, A) and occupancy, and what follows from them."""

    name: str
    model: TomatoModel
    policy: Float
    mu: Float
    r: float
    sigma: float
    coef: float  # the theory's

    def returns(self, mu: Float) -> tuple[float, float]:
        """Mean true reward and mean proxy of a step."""
        return float((mu * self.model.true).sum()), float((mu * self.model.proxy).sum())

    def occupancy(self, policy: Float) -> Float:
        return occupancy_measure(self.model.transitions, policy, GAMMA, self.model.start)

    def best(self, rewards: Float) -> Float:
        return self.occupancy(soft_policy(self.model.transitions, rewards, GAMMA))

    def solve(self, kind: str, coef: float) -> Float:
        P, proxy = self.model.transitions, self.model.proxy
        return solve_regularized(P, proxy, self.mu, GAMMA, self.model.start, kind, coef).mu

    def chi2(self, mu: Float) -> float:
        return float(((mu - self.mu) ** 2 / self.mu).sum())

    def slack(self, mu: Float) -> float:
        """True gain less what the plain bound grants, in standard deviations of the true reward."""
        true, proxy = (a - b for a, b in zip(self.returns(mu), self.returns(self.mu), strict=True))
        spread = proxy_correlation(self.model.true, self.model.proxy, self.mu).sigma
        bound = hacking_bound(self.r, proxy / self.sigma, self.chi2(mu), sharp=False)
        return true / spread - float(bound)


@cache
def make_setting(board: str, mix: float, temperature: float) -> Setting:
    model = tomato_model(board, random_actions=SLIPS)
    soft = soft_policy(model.transitions, model.true, GAMMA, temperature)
    policy = mix * soft + (1 - mix) / soft.shape[1]
    mu = occupancy_measure(model.transitions, policy, GAMMA, model.start)
    r, sigma = proxy_correlation(model.proxy, model.true, mu)
    name = f"{board}, {mix:g} soft ({temperature:g})"
    return Setting(name, model, policy, mu, r, sigma, penalty_coefficient(r, sigma))


@dataclass(frozen=True, eq=False)
class Sweep:
    """Of one penalty: each strength with true return, proxy return and χ², (K,) each."""

    coef: Float
    true: Float
    proxy: Float
    chi2: Float
    slack: Float


def sweep(setting: Setting, kind: str, coefs: Sequence[float]) -> Sweep:
    found = [setting.solve(kind, coef) for coef in coefs]
    rows = [(c, *setting.returns(mu), setting.chi2(mu), setting.slack(mu))
            for c, mu in zip(coefs, found, strict=True)]  # fmt: skip
    return Sweep(*np.array(rows).T)


# ── exactly, in one garden ──────────────────────────────────────────────────────────────────────


def add_exact(report: Report, setting: Setting, plan: Plan, rng: int) -> None:
    model = setting.model
    reference, _ = setting.returns(setting.mu)
    hacked, paid = setting.returns(setting.best(model.proxy))
    most, _ = setting.returns(setting.best(model.true))
    uniform, _ = setting.returns(setting.occupancy(np.full(setting.mu.shape, 0.25)))
    sweeps = {name: sweep(setting, kind, plan.grid) for name, kind in KINDS.items()}
    theory = sweep(setting, "sqrt_chi2", [setting.coef])
    rows: list[list[Cell]] = [
        [name, float(each.true.max()), float(each.coef[each.true.argmax()]),
         (float(each.true.max()) - reference) / (most - reference), float(each.true.min())]
        for name, each in sweeps.items()
    ]  # fmt: skip
    rows.append([f"{ROOT}, the theory's λ", float(theory.true[0]), setting.coef,
                 (float(theory.true[0]) - reference) / (most - reference), None])  # fmt: skip
    for name, value in ((REFERENCE, reference), (UNIFORM, uniform), ("best by the proxy", hacked),
                        ("best by the true reward", most)):  # fmt: skip
        rows.append([name, value, None, (value - reference) / (most - reference), None])
    columns = ["policy", "best true return", "at λ", "share of the gain", "lowest, all λ"]
    note = (
        f"{len(model.true)} states, r = {setting.r:.4f}, σ̃ = {setting.sigma:.4f}; {len(plan.grid)} "
        f"λ from {min(plan.grid):g} to {max(plan.grid):g}; above {kink(setting):.4f} √χ² gives the "
        f"reference. The best by the proxy is paid {paid:.4f}."
    )
    report.tables.append(ReportTable("The exact optimum under each penalty", columns, rows, note))
    report.claims.extend(exact_claims(sweeps, theory, reference, hacked, most))
    report.claims.append(bound_claim([*sweeps.values(), theory], plan.cases, rng))
    report.figures.extend(exact_figures(sweeps, reference))


def kink(setting: Setting) -> float:
    model = setting.model
    return kink_coefficient(model.transitions, model.proxy, setting.mu, GAMMA)


def exact_claims(
    sweeps: dict[str, Sweep], theory: Sweep, reference: float, hacked: float, most: float
) -> list[Claim]:
    best = {name: float(each.true.max()) for name, each in sweeps.items()}
    least = {name: float(each.true.min()) - reference for name, each in sweeps.items()}
    share = (float(theory.true[0]) - reference) / (most - reference)
    claims = [
        Claim.at_most("exact: best by the proxy - reference", HACKS, hacked - reference, 0.0),
        Claim.at_least(f"exact: {ROOT} - {KL}, each at its best", BEST, best[ROOT] - best[KL], 0.0),
        Claim.at_least(f"exact: {ROOT} - {ACTIONS}, each at its best", BEST,
                       best[ROOT] - best[ACTIONS], 0.0),
        Claim.at_least(f"exact: {ACTIONS} at its best - reference", HELPS,
                       best[ACTIONS] - reference, 0.0),
        Claim.at_least("exact: share of the attainable gain at the theory's λ", THEORY, share, 0.0),
    ]  # fmt: skip
    says = "a small λ does not hack in this garden (not said in general)"
    span = f"lowest over λ from {span_of(sweeps)}"
    claims.append(
        Claim.at_least(f"exact: {ROOT}, {span} - reference", says, least[ROOT], -ACCURACY)
    )
    claims.extend(
        Claim.at_most(f"exact: {name}, {span} - reference", f"{name}: a small λ hacks",
                      least[name], 0.0)
        for name in (KL, ACTIONS)
    )  # fmt: skip
    return claims


def span_of(sweeps: dict[str, Sweep]) -> str:
    coefs = next(iter(sweeps.values())).coef
    return f"{coefs.min():g} to {coefs.max():g}"


def bound_claim(sweeps: Sequence[Sweep], cases: int, rng: int) -> Claim:
    """The least slack of all solutions, and of random rewards, references and policies."""
    random, places = np.random.default_rng([rng, 39]), 5
    ref, mu = random.dirichlet(np.ones(places), cases), random.dirichlet(np.ones(places) / 2, cases)
    true = random.normal(size=(cases, places))
    proxy = random.uniform(0, 2, (cases, 1)) * true + random.normal(size=(cases, places))
    z = []
    for rewards in (true, proxy):
        away = rewards - (ref * rewards).sum(axis=1, keepdims=True)
        z.append(away / np.sqrt((ref * away**2).sum(axis=1, keepdims=True)))
    r, gain, own = (ref * z[0] * z[1]).sum(axis=1), (mu * z[1]).sum(axis=1), (mu * z[0]).sum(axis=1)
    chi2 = ((mu - ref) ** 2 / ref).sum(axis=1)
    slack = own - hacking_bound(np.clip(r, -1, 1), gain, chi2, sharp=False)
    least = min(float(slack.min()), *(float(each.slack.min()) for each in sweeps))
    name = f"true gain - its bound, least of {cases} random worlds and all solutions"
    return Claim.at_least(name, "the bound holds for every policy", least, -ACCURACY)


def exact_figures(sweeps: dict[str, Sweep], reference: float) -> list[Figure]:
    lines = [Series(n, each.coef.tolist(), each.true.tolist()) for n, each in sweeps.items()]
    trade = [Series(n, each.proxy.tolist(), each.true.tolist()) for n, each in sweeps.items()]
    caption, axis = "The line is the reference.", "true return"
    return [
        Figure("line", "True return by the strength of the penalty", "λ", axis, lines, log_x=True,
               reference=reference, caption=caption),
        Figure("scatter", "What the proxy pays and what that is worth", "proxy return", axis,
               trade, reference=reference, caption=caption),
    ]  # fmt: skip


# ── exactly, elsewhere ──────────────────────────────────────────────────────────────────────────


def add_gardens(report: Report, plan: Plan) -> None:
    """Other gardens and references: who is best in general, and what the theory's λ does there."""
    rows: list[list[Cell]] = []
    names = (ROOT, KL, ACTIONS)
    best: dict[str, list[float]] = {name: [] for name in names}
    gains, lost, stays = [], [], []
    for board in plan.gardens:
        for mix in plan.mixes:
            setting = make_setting(board, *mix)
            reference, _ = setting.returns(setting.mu)
            sweeps = {name: sweep(setting, KINDS[name], plan.grid) for name in names}
            theory = sweep(setting, "sqrt_chi2", [setting.coef])
            for name, each in sweeps.items():
                best[name].append(float(each.true.max()))
            gains.append(float(theory.true[0]) - reference)
            if setting.r < 0.9:
                lost.append(max(float(each.true.min()) - reference for each in sweeps.values()))
            if setting.coef > kink(setting):
                stays.append(float(theory.chi2[0]))
            rows.append([setting.name, setting.r, reference, *(best[n][-1] for n in names),
                         setting.coef, kink(setting), float(theory.true[0])])  # fmt: skip
    columns = ["garden, reference", "r", REFERENCE, *names, "theory's λ", "kink", "true at it"]
    note = "True returns; each penalty at the best λ of the same grid."
    report.tables.append(ReportTable("Other gardens and references", columns, rows, note))
    report.claims.extend(
        Claim.at_least(f"{len(rows)} gardens: {ROOT} - {name}, each at its best", BEST,
                       paired_difference(best[ROOT], best[name], comparisons=2), 0.0)
        for name in (KL, ACTIONS)
    )  # fmt: skip
    report.claims.extend([
        Claim.at_least("gardens: least true gain at the theory's λ", THEORY, min(gains),
                       -ACCURACY),
        Claim.at_most("gardens with r < 0.9: lowest true return - reference, the best penalty",
                      "no penalty is safe at every λ", max(lost), 0.0),
        Claim.at_most("gardens where the theory's λ lies above the kink: χ² of the answer",
                      "then the answer is the reference", max(stays), 1e-5),
    ])  # fmt: skip


# ── from samples ────────────────────────────────────────────────────────────────────────────────

STEPS, EPOCHS, RATE, TRACE = 32, 4, 0.05, 0.95  # a round; of PPO; of Adam; of GAE
WIDTH, CRITICISM = 64, 10  # of the discriminator; its steps a round


def walk(
    setting: Setting, policy: Float, cell: Int, random: np.random.Generator
) -> tuple[Int, Int, Int, Bool]:
    """STEPS steps of each chain: states, actions, next states and restarts, (STEPS, chains)."""
    follows = np.asarray(setting.model.transitions.argmax(axis=1)).reshape(policy.shape)
    limits, actions = policy.cumsum(axis=1)[:, :-1], policy.shape[1]
    u = random.random((4, STEPS, len(cell)))
    state, action, after = np.empty((3, STEPS, len(cell)), np.int64)
    restart = u[3] < 1 - GAMMA
    for t in range(STEPS):  # over time only
        action[t] = (u[0, t][:, None] >= limits[cell]).sum(axis=1)
        slip = (u[2, t] * actions).astype(np.int64)
        state[t], after[t] = cell, follows[cell, np.where(u[1, t] < SLIPS, slip, action[t])]
        cell = np.where(restart[t], 0, after[t])
    return state, action, after, restart


def advantages(reward: Float, value: Float, state: Int, after: Int, restart: Bool) -> Float:
    """Generalised advantages; a restart cuts the trace, not the value of the state before it."""
    delta = reward + GAMMA * value[after] - value[state]
    found, running = np.empty_like(delta), np.zeros(delta.shape[1])
    for t in reversed(range(len(delta))):
        running = delta[t] + GAMMA * TRACE * np.where(restart[t], 0.0, running)
        found[t] = running
    return found


class Discriminator:
    """Of what the policy and the reference do, by counts of states and actions."""

    def __init__(self, setting: Setting, kind: str, seed: int) -> None:
        S, A = setting.mu.shape
        seen = np.hstack([np.repeat(setting.model.features, A, 0), np.tile(np.eye(A), (S, 1))])
        self.x, self.kind = torch.from_numpy(seen).float(), kind
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = OccupancyDiscriminator(self.x.shape[1], WIDTH)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)

    def penalty(self, pairs: Int, reference_pairs: Int, coef: float) -> Float:
        """Trained first, then asked: the penalty of each of the policy's pairs."""
        counts = [torch.from_numpy(np.bincount(p.reshape(-1), minlength=len(self.x)))
                  for p in (pairs, reference_pairs)]  # fmt: skip
        train_discriminator(
            self.net, self.x, self.x, self.kind, steps=CRITICISM, optimizer=self.optimizer,
            policy_weights=counts[0], reference_weights=counts[1],
        )  # fmt: skip
        with torch.no_grad():
            logits = self.net(self.x)[torch.from_numpy(pairs.reshape(-1))]
        return occupancy_penalty(logits, self.kind, coef).double().numpy().reshape(pairs.shape)


def learn(setting: Setting, name: str, coef: float, plan: Plan, seed: Sequence[int]) -> Float:
    """The policy that PPO on the penalised proxy ends with, (S, A), begun at the reference."""
    random = np.random.default_rng(seed)
    S, A = setting.mu.shape
    ref = torch.from_numpy(np.log(setting.policy))
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], RATE, eps=1e-12)
    judge = Discriminator(setting, KINDS[name], seed[-1]) if name in {ROOT, KL} else None
    cell = ref_cell = np.zeros(plan.chains, np.int64)
    value = np.zeros(S)
    for _ in range(plan.updates):
        policy = logits.detach().softmax(dim=1).numpy()
        state, action, after, restart = walk(setting, policy, cell, random)
        cell = np.where(restart[-1], 0, after[-1])
        reward = setting.model.proxy[state, action]
        if judge is not None:
            there, did, then, anew = walk(setting, setting.policy, ref_cell, random)
            ref_cell = np.where(anew[-1], 0, then[-1])
            reward = reward + judge.penalty(state * A + action, there * A + did, coef)
        gain = advantages(reward, value, state, after, restart)
        visits = np.bincount(state.reshape(-1), minlength=S)
        off = np.bincount(state.reshape(-1), gain.reshape(-1), minlength=S)
        value = value + off / np.maximum(visits, 1) * np.minimum(0.5, visits / (visits + 1))
        improve(logits, optimizer, ref, state, action, gain, coef if name == ACTIONS else 0.0)
    return np.asarray(logits.detach().softmax(dim=1).numpy())


def improve(
    logits: torch.Tensor, optimizer: torch.optim.Optimizer, ref: torch.Tensor,
    state: Int, action: Int, gain: Float, coef: float,
) -> None:  # fmt: skip
    """Some steps of PPO's clipped loss, with the KL of actions in the visited states added."""
    s, a, A = (torch.from_numpy(x) for x in (state, action, gain))
    old = logits.detach().log_softmax(dim=1)[s, a]
    for _ in range(EPOCHS):
        logp = logits.log_softmax(dim=1)
        loss = clipped_token_loss(logp[s, a], old, A)[0].mean()
        if coef:
            loss = loss + coef * (logp.exp() * (logp - ref)).sum(dim=1)[s].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def add_sampled(report: Report, setting: Setting, plan: Plan, rng: int) -> None:
    reference, paid = setting.returns(setting.mu)
    ends: dict[tuple[str, float], Float] = {}
    for name, coefs in plan.arms.items():
        for coef in coefs:
            policies = [learn(setting, name, coef, plan, [rng, 39, s]) for s in range(plan.seeds)]
            found = [setting.occupancy(policy) for policy in policies]
            ends[name, coef] = np.array([(*setting.returns(mu), setting.chi2(mu)) for mu in found])
    hacked = {arm: (x[:, 0] < reference) & (x[:, 1] > paid) for arm, x in ends.items()}
    rows: list[list[Cell]] = [
        [name, coef, mean_interval(x[:, 0]), mean_interval(x[:, 1]), float(np.median(x[:, 2])),
         int(hacked[name, coef].sum())]
        for (name, coef), x in ends.items()
    ]  # fmt: skip
    rows.append([REFERENCE, None, reference, paid, 0.0, 0])
    columns = ["penalty", "λ", "true return", "proxy return", "χ² (median)", "hacked"]
    note = (
        f"{plan.seeds} seeds; {plan.updates} rounds of {STEPS * plan.chains} steps. Hacked: seeds "
        "that end above the reference by the proxy and below it in truth."
    )
    report.tables.append(ReportTable("PPO from samples", columns, rows, note))
    report.claims.extend(sampled_claims(ends, hacked, reference, plan))
    arms = [f"{name}, λ = {coef:g}" if coef else name for name, coef in ends]
    values = [mean_interval(x[:, 0]) for x in ends.values()]
    report.figures.append(Figure(
        "interval", "True return of policies learned from samples", series=[Series(
            "seeds", arms, [v.value for v in values], [v.low for v in values],
            [v.high for v in values])], reference=reference,
        caption="The line is the reference."))  # fmt: skip


def sampled_claims(
    ends: dict[tuple[str, float], Float], hacked: dict[tuple[str, float], Bool],
    reference: float, plan: Plan,
) -> list[Claim]:  # fmt: skip
    true = {arm: x[:, 0] for arm, x in ends.items()}
    best = {name: max((true[name, c] for c in plan.arms[name]), key=lambda x: float(x.mean()))
            for name in (ROOT, KL, ACTIONS)}  # fmt: skip
    claims = [
        Claim.at_most("samples: no penalty - reference", HACKS,
                      mean_interval(true[NONE, 0.0] - reference), 0.0),
        Claim.at_least(f"samples: {ROOT} at λ = 0.003 - reference", THEORY,
                       mean_interval(true[ROOT, 0.003] - reference), 0.0),
    ]  # fmt: skip
    claims.extend(
        Claim.at_least(f"samples: {ROOT} - {name}, each at its best", BEST,
                       paired_difference(best[ROOT], best[name], comparisons=2), 0.0)
        for name in (KL, ACTIONS)
    )  # fmt: skip
    claims.extend(
        hacks_first(coef, high, low, hacked[high, coef], hacked[low, coef])
        for coef, high, low in ((0.01, KL, ROOT), (0.05, ACTIONS, KL))
    )
    return claims


def hacks_first(coef: float, high: str, low: str, high_hacked: Bool, low_hacked: Bool) -> Claim:
    """Whether one penalty already hacks at a λ at which another does not yet, over seeds."""
    says = "as λ falls, action distributions hack first, then KL, then √χ² of occupancies"
    more = paired_difference(high_hacked * 1.0, low_hacked * 1.0, comparisons=2)
    holds = True if more.above(0) else False if more.high <= 0 else None
    name = f"samples, λ = {coef:g}: share of seeds that hack, {high} - {low}"
    return Claim.judge(name, says, more, "above 0", holds)
