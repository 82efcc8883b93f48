"""Occupancies against rollouts of laws, and optima that no other policy beats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import softmax

from scoredraw.errors import InputError, MissingExtraError, StoppedError
from scoredraw.rl import tabular_control
from scoredraw.rl.proxy_rewards import hacking_bound, penalty_coefficient, proxy_correlation
from scoredraw.rl.tabular_control import (
    KINDS,
    kink_coefficient,
    occupancy_measure,
    soft_policy,
    solve_regularized,
)

pytestmark = pytest.mark.oracle


class World(NamedTuple):
    P: Any
    R: Any
    gamma: float
    start: Any
    policy: Any
    mu: Any


def world(seed: int = 0, S: int = 6, A: int = 3, gamma: float = 0.8) -> World:
    rng = np.random.default_rng(seed)
    P, R, start = (
        rng.dirichlet(np.ones(S) / 2, S * A),
        rng.normal(size=(S, A)),
        rng.dirichlet([1] * S),
    )
    policy = rng.dirichlet(np.ones(A), S)
    return World(P, R, gamma, start, policy, occupancy_measure(P, policy, gamma, start))


def distance(mu: Any, ref: Any, kind: str) -> float:
    """D, written out as in the definition."""
    pi, pi_ref = (x / x.sum(axis=1, keepdims=True) for x in (mu, ref))
    with np.errstate(divide="ignore", invalid="ignore"):
        by_kind = {
            "chi2": ((mu - ref) ** 2 / ref).sum(),
            "kl": np.nansum(mu * np.log(mu / ref)),
            "tv": np.abs(mu - ref).sum() / 2,
            "action_kl": np.nansum(mu * np.log(pi / pi_ref)),
            "action_chi2": (mu.sum(axis=1) * ((pi - pi_ref) ** 2 / pi_ref).sum(axis=1)).sum(),
        }
    return float(math.sqrt(by_kind["chi2"]) if kind == "sqrt_chi2" else by_kind[kind])


def test_an_occupancy_is_the_discounted_sum_over_time() -> None:
    w = world()
    law, total = w.start.copy(), np.zeros_like(w.mu)
    for t in range(200):
        total += (1 - w.gamma) * w.gamma**t * law[:, None] * w.policy
        law = (law[:, None] * w.policy).reshape(-1) @ w.P
    np.testing.assert_allclose(w.mu, total, atol=1e-12)
    assert w.mu.sum() == pytest.approx(1)
    inflow = (1 - w.gamma) * w.start + w.gamma * w.mu.reshape(-1) @ w.P
    np.testing.assert_allclose(w.mu.sum(axis=1), inflow, atol=1e-12)
    sparse = occupancy_measure(csr_matrix(w.P), w.policy, w.gamma, w.start)
    np.testing.assert_allclose(sparse, w.mu, atol=1e-14)


def test_soft_value_iteration() -> None:
    w = world(1)
    pi = soft_policy(w.P, w.R, w.gamma, temperature=0.3)
    Q = np.zeros_like(w.R)
    for _ in range(300):
        V = 0.3 * np.log(np.exp(Q / 0.3).sum(axis=1))
        Q = w.R + w.gamma * (w.P @ V).reshape(Q.shape)
    np.testing.assert_allclose(pi, softmax(Q / 0.3, axis=1), atol=1e-9)
    best = soft_policy(w.P, w.R, w.gamma)
    value = (occupancy_measure(w.P, best, w.gamma, w.start) * w.R).sum()
    every = [
        (occupancy_measure(w.P, np.eye(3)[list(choice)], w.gamma, w.start) * w.R).sum()
        for choice in np.ndindex(*[3] * 6)
    ]
    assert value == pytest.approx(max(every))


@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_near_or_far_is_better(kind: str) -> None:
    w, coef = world(2), 0.3
    found = solve_regularized(w.P, w.R, w.mu, w.gamma, w.start, kind, coef)
    np.testing.assert_allclose(found.policy.sum(axis=1), 1)
    again = occupancy_measure(w.P, found.policy, w.gamma, w.start)
    np.testing.assert_allclose(found.mu, again, atol=1e-12)

    def worth(mu: Any) -> float:
        return float((mu * w.R).sum()) - coef * distance(mu, w.mu, kind)

    best, rng = worth(found.mu), np.random.default_rng(0)
    assert best >= worth(w.mu) - 1e-6
    assert distance(found.mu, w.mu, kind) > 1e-3  # it moved
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(40):
            pi = softmax(np.log(found.policy + 1e-12) + size * rng.normal(size=w.R.shape), axis=1)
            assert best >= worth(occupancy_measure(w.P, pi, w.gamma, w.start)) - 1e-6
        mixed = (1 - size / 2) * found.mu + size / 2 * w.mu
        assert best >= worth(mixed) - 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_limits(kind: str) -> None:
    w = world(3)
    free = solve_regularized(w.P, w.R, w.mu, w.gamma, w.start, kind, 0.0)
    best = occupancy_measure(w.P, soft_policy(w.P, w.R, w.gamma), w.gamma, w.start)
    assert (free.mu * w.R).sum() == pytest.approx((best * w.R).sum(), abs=1e-6)
    still = solve_regularized(w.P, w.R, w.mu, w.gamma, w.start, kind, 1e4)
    np.testing.assert_allclose(still.mu, w.mu, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_kink_of_the_root(seed: int) -> None:
    w = world(seed)
    kink = kink_coefficient(w.P, w.R, w.mu, w.gamma)
    options = (w.P, w.R, w.mu, w.gamma, w.start, "sqrt_chi2")
    np.testing.assert_allclose(solve_regularized(*options, kink * 1.01).mu, w.mu, atol=1e-6)
    moved = solve_regularized(*options, kink * 0.97).mu
    assert distance(moved, w.mu, "sqrt_chi2") > 1e-2
    ratio = ((moved - w.mu) * w.R).sum() / distance(moved, w.mu, "sqrt_chi2")
    assert 0.9 * kink < ratio <= kink * (1 + 1e-6)
    constant = kink_coefficient(w.P, np.full(w.R.shape, 3.0), w.mu, w.gamma)
    assert constant == pytest.approx(0, abs=1e-9)


def test_the_promise_of_the_theory_is_kept() -> None:
    """At the theory's λ the true reward gains at least what the bound says, and that is >= 0."""
    moved = 0
    for seed in range(12):
        w = world(seed)
        true = w.R + 0.4 * np.random.default_rng(seed + 100).normal(size=w.R.shape)
        r, sigma = proxy_correlation(w.R, true, w.mu)
        if r <= 0:
            continue
        coef = penalty_coefficient(r, sigma)
        mu = solve_regularized(w.P, w.R, w.mu, w.gamma, w.start, "sqrt_chi2", coef).mu
        chi2 = distance(mu, w.mu, "chi2")
        bound = hacking_bound(r, ((mu - w.mu) * w.R).sum() / sigma, chi2, sharp=False)
        gain = ((mu - w.mu) * true).sum() / proxy_correlation(true, w.R, w.mu).sigma
        assert gain >= bound - 1e-6
        assert bound >= -1e-6
        moved += chi2 > 1e-3
        if coef > 1.01 * kink_coefficient(w.P, w.R, w.mu, w.gamma):
            np.testing.assert_allclose(mu, w.mu, atol=1e-5)
    assert moved >= 3


def test_where_the_reference_never_goes_nobody_goes() -> None:
    w = world(5)
    policy = w.policy.copy()
    policy[:, 0] = 0
    policy /= policy.sum(axis=1, keepdims=True)
    ref = occupancy_measure(w.P, policy, w.gamma, w.start)
    tempting = w.R + np.array([5.0, 0.0, 0.0])
    for kind in KINDS:
        found = solve_regularized(w.P, tempting, ref, w.gamma, w.start, kind, 0.05)
        if kind == "tv":
            assert found.mu[:, 0].sum() > 0.5  # total variation is finite there
        else:
            np.testing.assert_allclose(found.mu[:, 0], 0, atol=1e-7)
    kink = kink_coefficient(w.P, tempting, ref, w.gamma)
    assert kink == pytest.approx(kink_coefficient(w.P, w.R, ref, w.gamma))


def test_states_that_are_never_reached() -> None:
    P = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    ref = occupancy_measure(P, np.full((2, 2), 0.5), 0.5, [1.0, 0.0])
    for kind in KINDS:
        found = solve_regularized(P, [[0.0, 1.0], [9.0, 9.0]], ref, 0.5, [1, 0], kind, 0.01)
        assert found.mu[0, 1] > 0.9
        assert found.policy[1] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert kink_coefficient(P, [[0.0, 1.0], [9.0, 9.0]], ref, 0.5) == pytest.approx(0.5)


def test_the_next_attempt_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(4)
    options = (w.P, w.R, w.mu, w.gamma, w.start, "kl", 0.3)
    usual = solve_regularized(*options)
    stopped = [("CLARABEL", True, {"max_iter": 1}), ("SCS", True, {"eps": 1e-6})]
    monkeypatch.setattr(tabular_control, "ATTEMPTS", stopped)
    np.testing.assert_allclose(solve_regularized(*options).mu, usual.mu, atol=1e-4)
    monkeypatch.setattr(tabular_control, "ATTEMPTS", stopped[:1])
    with pytest.raises(StoppedError, match=r"no solver finished with kind 'kl' and coef 0\.3"):
        solve_regularized(*options)


def test_without_cvxpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cvxpy", None)
    w = world()
    with pytest.raises(
        MissingExtraError, match=r"cvxpy is not installed: pip install 'scoredraw\["
    ):
        solve_regularized(w.P, w.R, w.mu, w.gamma, w.start)


def test_bad_input() -> None:
    w = world()
    good: dict[str, Any] = {
        "transitions": w.P, "rewards": w.R, "mu_ref": w.mu, "gamma": w.gamma, "start": w.start,
    }  # fmt: skip
    changes: list[tuple[dict[str, Any], str]] = [
        ({"transitions": w.P[:-1]}, r"transitions: got shape \(17, 6\)"),
        ({"transitions": w.P * 0.9}, "transitions: got a row that is no law"),
        ({"rewards": w.R * math.nan}, "rewards: got shape"),
        ({"rewards": w.R[0]}, "rewards: got shape"),
        ({"mu_ref": w.mu[:-1]}, "mu_ref: got shape"),
        ({"mu_ref": w.mu * 2}, "mu_ref: got a sum of 2"),
        ({"mu_ref": np.full((6, 3), 1 / 18)}, "mu_ref: got a flow that is off by"),
        ({"gamma": 1.0}, "gamma: got 1.0"),
        ({"start": w.start[:-1]}, "start: got shape"),
        ({"kind": "js"}, "kind: got 'js'"),
        ({"coef": -1.0}, "coef: got -1"),
        ({"coef": math.inf}, "coef: got inf"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            solve_regularized(**{**good, **change})
    others: list[tuple[Callable[[], Any], str]] = [
        (lambda: occupancy_measure(w.P, w.policy * 2, w.gamma, w.start), "policy: got a row"),
        (lambda: soft_policy(w.P, w.R, w.gamma, -1.0), "temperature: got -1"),
        (lambda: soft_policy(w.P, w.R, w.gamma, tolerance=math.nan), "tolerance: got nan"),
        (lambda: soft_policy(w.P, 3.0, w.gamma), r"rewards: got shape \(\)"),
        (lambda: kink_coefficient(w.P, w.R, w.mu[0], w.gamma), "mu_ref: got shape"),
    ]
    for call, message in others:
        with pytest.raises(InputError, match=message):
            call()
