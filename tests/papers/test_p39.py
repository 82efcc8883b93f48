"""The experiment of paper 39: walks visit the occupancy, its parts by hand, its claims can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scoredraw.papers import p39_orpo_chi2 as p39
from scoredraw.papers.p39_orpo_chi2 import ACTIONS, GAMMA, KINDS, KL, NONE, ROOT, Setting, Sweep
from scoredraw.reports import Report

pytestmark = pytest.mark.oracle

FEW = (0.1, 0.01)


@pytest.fixture(scope="module")
def report() -> Report:
    pytest.importorskip("cvxpy")
    return p39.run("smoke", 0)


@pytest.fixture(scope="module")
def garden() -> Setting:
    return p39.make_setting("medium", *p39.MIXES[0])


def test_the_smallest_scale_says_everything(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    assert len(report.claims) == 20
    assert all(claim.verdict is not None for claim in report.claims)
    exact, elsewhere, sampled = report.tables
    names = [row[0] for row in exact.rows]
    assert {*KINDS, p39.REFERENCE, p39.UNIFORM} <= set(names)
    assert len(elsewhere.rows) == 1
    assert {row[0] for row in sampled.rows} == {NONE, ROOT, KL, ACTIONS, p39.REFERENCE}


def test_every_scale_has_a_garden_for_every_claim() -> None:
    """One with r < .9, one where the theory's λ is above the kink: both are the smallest."""
    for plan in p39.PLANS.values():
        poor = [p39.make_setting(b, *m) for b in plan.gardens[:1] for m in plan.mixes[:1]]
        assert poor[0].r < 0.9
        assert poor[0].coef > p39.kink(poor[0])
        assert {0.003} <= set(plan.arms[ROOT])
        assert all({0.01} <= set(plan.arms[name]) for name in (ROOT, KL))
        assert all({0.05} <= set(plan.arms[name]) for name in (KL, ACTIONS))


# ── from samples ────────────────────────────────────────────────────────────────────────────────


def test_a_walk_visits_the_occupancy(garden: Setting) -> None:
    """Chains that restart with chance 1 - γ, 256 steps after the start: their law is mu but for
    γ^256. Mean rewards within 4.5 errors over chains: 3 false alarms in 100,000, seed fixed."""
    random = np.random.default_rng(0)
    cell = np.zeros(4000, np.int64)
    for _ in range(8):
        *_, after, restart = p39.walk(garden, garden.policy, cell, random)
        cell = np.where(restart[-1], 0, after[-1])
    state, action, after, restart = p39.walk(garden, garden.policy, cell, random)
    assert (state[0] == cell).all()
    assert (state[1:] == np.where(restart, 0, after)[:-1]).all()
    for rewards in (garden.model.true, garden.model.proxy, np.eye(1, 4, 2).repeat(218, 0)):
        each = rewards[state, action].mean(axis=0)
        error = 4.5 * each.std() / len(each) ** 0.5
        assert each.mean() == pytest.approx(float((garden.mu * rewards).sum()), abs=error)
    pairs = state * 4 + action
    row = int(np.bincount(pairs.reshape(-1)).argmax())
    went = np.bincount(after[pairs == row], minlength=218) / (pairs == row).sum()
    law = garden.model.transitions[[row]].toarray()[0]
    error = 4.5 * np.sqrt(law * (1 - law) / (pairs == row).sum())
    assert (np.abs(went - law) <= error).all()


def test_advantages_by_their_sum() -> None:
    """A_t = Σ_k (γ λ)^k δ_{t+k} as far as the restart, whose step has the value of where it led."""
    rng = np.random.default_rng(1)
    T, chains, S = 9, 3, 5
    reward, value = rng.normal(size=(T, chains)), rng.normal(size=S)
    state, after = rng.integers(0, S, (2, T, chains))
    restart = rng.random((T, chains)) < 0.3
    found = p39.advantages(reward, value, state, after, restart)
    for i in range(chains):
        for t in range(T):
            total, weight = 0.0, 1.0
            for s in range(t, T):
                delta = reward[s, i] + GAMMA * value[after[s, i]] - value[state[s, i]]
                total += weight * delta
                weight *= GAMMA * p39.TRACE
                if restart[s, i]:
                    break
            assert found[t, i] == pytest.approx(total)


def test_the_discriminator_charges_what_the_reference_does_less(garden: Setting) -> None:
    """Pairs drawn from two occupancies: the penalty follows their log-ratio."""
    rng = np.random.default_rng(0)
    policy = 0.5 * garden.policy + 0.5 * np.roll(garden.policy, 1, axis=1)
    mu = garden.occupancy(policy).reshape(-1)
    ref = garden.mu.reshape(-1)
    judge = p39.Discriminator(garden, "kl", 0)
    for _ in range(60):
        pairs, there = (rng.choice(len(ref), (20, 500), p=law) for law in (mu, ref))
        charged = judge.penalty(pairs, there, 0.5)
    assert charged.shape == pairs.shape
    want = -0.5 * np.log(mu / ref)[pairs]
    assert np.corrcoef(charged.reshape(-1), want.reshape(-1))[0, 1] > 0.95
    assert (judge.penalty(pairs, there, 0.0) == 0).all()


def test_one_update_goes_where_it_should() -> None:
    ref = torch.log(torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64))
    state, action = np.array([[0, 0, 0]]), np.array([[0, 1, 1]])

    def after(start: torch.Tensor, gain: float, coef: float) -> torch.Tensor:
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], p39.RATE, eps=1e-12)
        each = gain * np.array([[1.0, 0.0, 0.0]])
        p39.improve(logits, optimizer, ref, state, action, each, coef)
        return logits.detach().softmax(dim=1)

    start = ref.softmax(dim=1)
    torch.testing.assert_close(after(ref, 0.0, 0.0), start)
    assert after(ref, 1.0, 0.0)[0, 0] > start[0, 0] > after(ref, -1.0, 0.0)[0, 0]
    torch.testing.assert_close(after(ref, 1.0, 0.0)[1], start[1])  # it was never there
    away = ref + torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    back = after(away, 0.0, 1.0)
    assert start[0, 0] < back[0, 0] < away.softmax(dim=1)[0, 0]
    torch.testing.assert_close(back[1], away.softmax(dim=1)[1])


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def made(true: tuple[float, float], slack: float = 0.0) -> Sweep:
    return Sweep(np.array(FEW), np.array(true), np.zeros(2), np.zeros(2), np.full(2, slack))


def test_exact_claims_can_fail() -> None:
    """Reference 0.5, the best by the proxy and by the truth either way around."""
    right = {ROOT: made((0.9, 0.6)), KL: made((0.7, 0.1)), ACTIONS: made((0.6, 0.2))}
    wrong = {ROOT: made((0.4, 0.3)), KL: made((0.7, 0.6)), ACTIONS: made((0.49, 0.45))}
    holds = p39.exact_claims(right, made((0.8, 0.8)), 0.5, 0.1, 1.0)
    assert [claim.verdict for claim in holds] == ["holds"] * 8
    fails = p39.exact_claims(wrong, made((0.4, 0.4)), 0.5, 0.6, 1.0)
    verdicts = {claim.name: claim.verdict for claim in fails}
    assert verdicts.pop(f"exact: {ACTIONS}, lowest over λ from 0.01 to 0.1 - reference") == "holds"
    assert set(verdicts.values()) == {"fails"}


def test_the_bound_claim_can_fail() -> None:
    assert p39.bound_claim([made((0.0, 0.0))], 300, 0).verdict == "holds"
    assert p39.bound_claim([made((0.0, 0.0), slack=-0.01)], 300, 0).verdict == "fails"


def test_slack_is_what_the_bound_leaves(garden: Setting) -> None:
    """By hand; and a true reward that isn't the one of the setting breaks the bound."""
    mu = garden.best(garden.model.proxy)
    z = [(x - (garden.mu * x).sum()) for x in (garden.model.true, garden.model.proxy)]
    z = [x / np.sqrt((garden.mu * x**2).sum()) for x in z]
    r = (garden.mu * z[0] * z[1]).sum()
    own, gain = ((mu * x).sum() for x in z)
    root = np.sqrt((mu**2 / garden.mu).sum() - 1)
    want = own - (r * gain - np.sqrt(1 - r**2) * root)
    assert garden.slack(mu) == pytest.approx(want, rel=1e-6)
    assert want > 0
    other = replace(garden, r=1.0)
    assert other.slack(mu) < -1  # with r = 1 it would promise the proxy's own gain


def test_sampled_claims_can_fail() -> None:
    plan = p39.PLANS["smoke"]
    noise = np.array([-0.001, 0.0, 0.001, 0.0])

    def claims(values: dict[str, float], hacks: dict[tuple[str, float], float]) -> list[str]:
        ends = {
            (name, c): np.stack([values[name] + noise, noise, noise], axis=1)
            for name, coefs in plan.arms.items()
            for c in coefs
        }
        hacked = {arm: np.full(4, hacks.get(arm, 0.0) > 0) for arm in ends}
        return [str(c.verdict) for c in p39.sampled_claims(ends, hacked, 0.5, plan)]

    good = {NONE: 0.1, ROOT: 0.9, KL: 0.7, ACTIONS: 0.6}
    first = {(KL, 0.01): 1.0, (ACTIONS, 0.05): 1.0}
    assert claims(good, first) == ["holds"] * 6
    bad = {NONE: 0.6, ROOT: 0.4, KL: 0.7, ACTIONS: 0.6}
    assert claims(bad, {(ROOT, 0.01): 1.0, (KL, 0.05): 1.0}) == ["fails"] * 6
    assert claims(good, {})[-2:] == ["fails"] * 2  # neither hacks: no order
