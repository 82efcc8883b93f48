"""Regret of submitting k answers: every way against every other, the guarantees, refusals."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, multinomial

from scoredraw.answers import AnswerPool, count_votes, group_answers
from scoredraw.errors import InputError
from scoredraw.language.best_of_majority import (
    bom_threshold,
    soft_best_of_answers,
    soft_best_of_n,
    submit_bom_in_rows,
)
from scoredraw.language.passk_regret import (
    CLOSED,
    DRAWN,
    LISTED,
    METHODS,
    coverage_coefficient,
    passk_regret,
    regret_bounds,
    reward_errors,
    survival_chance,
)
from scoredraw.language.submission import draw_softly, of_answer, submit_in_rows

pytestmark = pytest.mark.oracle


def instance(seed: int, support: int, concentration: float = 1.0) -> tuple[np.ndarray, ...]:
    """π, true rewards, and rewards with an error."""
    rng = np.random.default_rng(seed)
    pi, r_true = rng.dirichlet(np.full(support, concentration)), rng.random(support)
    return pi, r_true, 0.6 * r_true + 0.4 * rng.random(support)


# ── every way against every other ───────────────────────────────────────────────────────────────


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4),
       st.sampled_from([0.0, 0.15, 0.34, 0.5, 0.9, "auto"]))  # fmt: skip
@settings(max_examples=60)
def test_closed_forms_are_enumerations(
    seed: int, support: int, n: int, k: int, alpha: float | str
) -> None:
    pi, r_true, r_hat = instance(seed, support)
    if seed % 3 == 0:  # some answers are alike
        pi, r_true = np.full(support, 1 / support), np.round(2 * r_true) / 2
        r_hat = (r_true - 0.6) ** 2
    for method, size in (("bom", k), ("bon", k), ("majority", 1)):
        a, b = (
            passk_regret(pi, r_true, r_hat, n, size, alpha, method, how=how)
            for how in (CLOSED, LISTED)
        )
        assert a.value == pytest.approx(b.value, abs=1e-12)
        assert (a.how, b.how, a.standard_error, b.standard_error) == (CLOSED, LISTED, 0, 0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_enumeration_is_what_is_submitted(k: int) -> None:
    """Every sequence of 6 samples through the library; rewards that tie and differ in worth."""
    pi, r_true = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.2, 0.9, 0.6, 0.3])
    r_hat = np.array([0.5, 0.5, 0.7, 0.7])
    every = np.array(list(product(range(4), repeat=6)))
    chance, codes = np.prod(pi[every], axis=1), group_answers(every)

    def reached(chosen: np.ndarray) -> float:
        worth = np.where(chosen < 0, -np.inf, r_true[np.take_along_axis(every, chosen, 1)])
        return float(chance @ worth.max(axis=1))

    for alpha in (0.0, 0.3, 0.5, 0.9):
        got = passk_regret(pi, r_true, r_hat, 6, k, alpha)
        assert got.how == LISTED  # answers tie that are not worth the same
        want = reached(submit_bom_in_rows(codes, r_hat[every], k, alpha))
        assert got.reached == pytest.approx(want, abs=1e-12)
    frequent = submit_in_rows(codes, of_answer(count_votes(codes), codes), k)
    got = passk_regret(pi, r_true, r_hat, 6, k, method="majority")
    assert got.reached == pytest.approx(reached(frequent), abs=1e-12)


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("k", [1, 3])
def test_simulation_agrees(method: str, k: int) -> None:
    """20,000 samples within 4 s.e.: 0.04 % false alarms over all, the seeds are fixed."""
    pi, r_true, r_hat = instance(1, 5, 0.7)
    exact = passk_regret(pi, r_true, r_hat, 14, k, 0.2, method)
    drawn = passk_regret(pi, r_true, r_hat, 14, k, 0.2, method, how=DRAWN)
    assert (exact.standard_error, drawn.how) == (0, DRAWN)
    assert exact.value == pytest.approx(drawn.value, abs=4 * drawn.standard_error)


@pytest.mark.parametrize("method", ["soft", "soft-answers"])
def test_soft_draws(method: str) -> None:
    """Against the choices of every sequence (k = 1) and 800 draws of the library (k = 2)."""
    pi, r_true, r_hat = instance(3, 3)
    every = np.array(list(product(range(3), repeat=5)))
    selector = soft_best_of_n if method == "soft" else soft_best_of_answers
    chance = np.prod(pi[every], axis=1)
    reached = [
        selector(AnswerPool.of(row, rewards=r_hat[row]), beta=3.0) @ r_true[row] for row in every
    ]
    got = passk_regret(pi, r_true, r_hat, 5, 1, method=method, beta=3.0)
    assert got.how == LISTED
    assert got.reached == pytest.approx(chance @ reached, abs=1e-12)
    got = passk_regret(pi, r_true, r_hat, 5, 2, method=method, beta=3.0)
    assert got.how == DRAWN
    rng = np.random.default_rng(0)
    over = "samples" if method == "soft" else "answers"
    best = []
    for row in np.searchsorted(np.cumsum(pi)[:-1], rng.random((800, 5)), "right"):
        pool = AnswerPool.of(row, rewards=r_hat[row])
        best.append(r_true[row[draw_softly(pool, k=2, beta=3, over=over, rng=rng).indices]].max())
    error = math.hypot(np.std(best) / math.sqrt(800), got.standard_error)
    assert got.reached == pytest.approx(np.mean(best), abs=4 * error)


def test_limits() -> None:
    pi, r_true, r_hat = instance(0, 6)
    # k of the samples without a look: the best of k independent answers
    order = np.argsort(r_true)
    want = np.diff(np.cumsum(pi[order]) ** 3, prepend=0) @ r_true[order]
    got = passk_regret(pi, r_true, r_hat, 50, 3, method="uniform")
    assert got.reached == pytest.approx(want)
    # one sample leaves no choice
    for method in METHODS:
        got = passk_regret(pi, r_true, r_hat, 1, 1, 0.5, method)
        assert got.reached == pytest.approx(pi @ r_true, abs=1e-12)
    # the reward that is soft at β = 0 is any sample
    soft = passk_regret(pi, r_true, r_hat, 7, 1, method="soft", beta=0)
    assert soft.reached == pytest.approx(pi @ r_true, abs=1e-12)
    # all answers submitted: the best of all that were sampled
    for method in ("bom", "bon"):
        all_in = passk_regret(pi, r_true, r_hat, 9, 6, 0.0, method)
        below = np.cumsum(pi[order]) ** 9
        assert all_in.reached == pytest.approx(np.diff(below, prepend=0) @ r_true[order])
    # α beyond every frequency: the majority vote
    high = passk_regret(pi, r_true, r_hat, 9, 3, min_count=10)
    assert high.value == pytest.approx(passk_regret(pi, r_true, r_hat, 9, 1, 0, "majority").value)
    # an answer that is never sampled changes nothing
    more = [np.append(each, value) for each, value in ((pi, 0.0), (r_true, 0.0), (r_hat, 1.0))]
    assert passk_regret(*more, 9, 2) == passk_regret(pi, r_true, r_hat, 9, 2)


# ── the instances of the paper's kind ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_best_of_n_degrades_and_the_filter_does_not(n: int) -> None:
    pi = np.array([0.2, *[0.3 / 1000] * 1000, 0.5])
    r_true, r_hat = (np.array([0.9, *[bad] * 50, *[0.1] * 950, 0.5]) for bad in (0.1, 1.0))
    success = (np.arange(1002) == 0) * 1.0
    got = passk_regret(pi, success, r_hat, n, method="bon")
    assert (got.how, got.reached) == (CLOSED, pytest.approx(0.985**n - 0.785**n, abs=1e-13))
    got = passk_regret(pi, success, r_hat, n, 1, 0.05)
    least = math.ceil(0.05 * n) - 1
    bad = 50 * binom.sf(least, n, 0.0003)  # bad answers that survive, on average
    want = 0.985**n - 0.785**n if n == 10 else binom.sf(least, n, 0.2) * (1 - bad)
    assert got.reached == pytest.approx(want, abs=1e-11)
    assert reward_errors(pi, r_true, r_hat) == (pytest.approx(0.01215), 0.0)
    assert coverage_coefficient(pi, r_true) == pytest.approx(5)


def test_majority_fails_where_the_filter_does_not() -> None:
    pi, worth = [0.3, 0.3, 0.3, 0.1], [0.0, 0.0, 0.0, 1.0]
    failures, regrets = [], []
    for n in (20, 100, 500):
        majority = passk_regret(pi, worth, worth, n, 3, method="majority", samples=4000)
        failures.append(majority.value)
        regrets.append(passk_regret(pi, worth, worth, n, 3, 0.075).value)
    assert failures == sorted(failures)
    assert failures[-1] > 1 - 1e-9
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] == pytest.approx(binom.cdf(37, 500, 0.1), abs=1e-12)
    # from 9 C* log(2k + 2) samples on the majority vote may fail
    assert passk_regret(pi, worth, worth, 188, 3, method="majority").value > 0.9
    assert regret_bounds(10, 0, 0, 100, 3).majority_samples == pytest.approx(187.15, abs=0.01)


# ── guarantees ──────────────────────────────────────────────────────────────────────────────────


def test_the_inequality_is_never_violated() -> None:
    """Random instances: whenever y* survives, regret ≤ ε_opt + √(ε_RM²/(a k')), and the same for
    the error of the submitted answers themselves."""
    rng = np.random.default_rng(0)
    checked, ratio = 0, []
    for seed in range(60):
        pi, r_true, r_hat = instance(seed, 20)
        best = int(r_true.argmax())
        squared, at_best = reward_errors(pi, r_true, r_hat)
        counts = rng.multinomial(200, pi, 5)
        codes = np.array([np.repeat(np.arange(20), row) for row in counts])
        for k in range(1, 6):
            alpha = bom_threshold(coverage_coefficient(pi, r_true)) if k % 2 else 0.02
            chosen = submit_bom_in_rows(codes, r_hat[codes], k, alpha)
            for row, code, count in zip(chosen, codes, counts, strict=True):
                if count[best] < alpha * 200 - 1e-9:
                    continue
                answers = code[row[row >= 0]]
                regret = r_true.max() - r_true[answers].max()
                wrong = np.abs(r_true - r_hat)[answers]
                a = pi[answers].min()
                assert regret <= at_best + wrong.min() + 1e-12
                bound = at_best + math.sqrt(squared / (a * len(answers)))
                assert regret <= bound + 1e-12
                checked += 1
                ratio.append(regret / bound)
    assert checked > 500
    assert max(ratio) > 0.1  # not for want of regret


def test_the_bound_holds_and_says_something() -> None:
    said = 0
    for seed in range(25):
        pi, r_true, r_hat = instance(seed, 8, 2.0)
        coverage = coverage_coefficient(pi, r_true)
        errors = reward_errors(pi, r_true, r_hat)
        for n, k in ((50, 1), (400, 2), (3000, 3)):
            bounds = regret_bounds(coverage, *errors, n, k)
            regret = passk_regret(pi, r_true, r_hat, n, k, bom_threshold(coverage))
            assert regret.how == CLOSED
            assert regret.value <= bounds.bom
            assert bounds.lower <= bounds.bom
            missed = 1 - survival_chance(pi, n, coverage)
            assert missed <= bounds.bom_tail + 1e-12
            said += bounds.bom < r_true.max() - pi @ r_true
    assert said > 0


def test_survival_chance_is_a_multinomial_sum() -> None:
    pi, n, coverage = np.array([0.5, 0.35, 0.1, 0.05]), 9, 2.5  # α = 0.3, edges 0.4 and 0.1
    counts = np.array([c for c in product(range(n + 1), repeat=4) if sum(c) == n])
    keep = (counts[:, 0] >= 0.3 * n) & (counts[:, 3] < 0.3 * n)  # the others may do either
    want = multinomial.pmf(counts[keep], n, pi).sum()
    assert survival_chance(pi, n, coverage) == pytest.approx(want, abs=1e-12)


def test_bounds_are_what_they_say() -> None:
    found = regret_bounds(5, 0.04, 0.1, 800, 4)
    assert found.lower == pytest.approx(0.1 + math.sqrt(5 * 0.04 / 4))
    assert found.bom == pytest.approx(0.1 + 2 * math.sqrt(0.05) + found.bom_tail)
    assert found.bon == 1.0
    assert regret_bounds(5, 0.04, 0.1, 16, 4).bon == pytest.approx(0.4)
    assert found.bom_samples == pytest.approx(80 * math.log(500))
    assert found.bom_tail == pytest.approx(
        math.exp(-5) + 20 * math.exp(-(3 * math.log(3) - 2) * 40)
    )
    assert regret_bounds(5, 0.0, 0.0, 10).bom_samples == math.inf
    assert coverage_coefficient([0.1, 0.3, 0.6], [1.0, 1.0, 0.0]) == pytest.approx(1 / 0.3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pi": [0.5, 0.4]}, "pi: got a sum of 0.9, want probabilities that sum to 1"),
    ({"pi": [1.5, -0.5]}, "pi: got a sum of 1, want probabilities that sum to 1"),
    ({"pi": [[1.0]]}, "pi: got shape (1, 1), want (S,) probabilities"),
    ({"pi": [1.0, 0.0]}, "pi: got 0 for the best answer, want more than 0"),
    ({"r_true": [1.0]}, "r_true: got shape (1,), want (2,)"),
    ({"r_hat": [1.0, math.nan]}, "r_hat: got NaN or infinity, want finite numbers"),
    ({"n": 0}, "n: got 0, want a whole number of at least 1"),
    ({"k": 0}, "k: got 0, want a whole number of at least 1"),
    ({"alpha": 2.0}, "alpha: got 2.0, want auto or a share in [0, 1]"),
    ({"method": "best"}, "method: got 'best', want one of bom"),
    ({"method": "uniform", "k": 9}, "k: got 9, want at most 5, the number of samples"),
    ({"how": "guess"}, "how: got 'guess', want None or one of closed form"),
    ({"method": "majority", "k": 2, "how": CLOSED}, "how: got 'closed form', want None or one of"),
    ({"samples": 1}, "samples: got 1, want 2 or more"),
    ({"method": "soft", "beta": -1.0}, "beta: got -1.0, want a finite number of at least 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"pi": [0.5, 0.5], "r_true": [0.0, 1.0], "r_hat": [0.0, 1.0], "n": 5}
    with pytest.raises(InputError) as caught:
        passk_regret(**{**good, **change})
    assert str(caught.value).startswith(message)


def test_bad_bounds() -> None:
    for arguments, message in (
        ((0.9, 0, 0, 1), "coverage: got 0.9"),
        ((2, -1, 0, 1), "squared_error: got -1"),
        ((2, 0, math.inf, 1), "error_at_best: got inf"),
        ((2, 0, 0, 0), "n: got 0"),
        ((2, 0, 0, 1, 0), "k: got 0"),
    ):
        with pytest.raises(InputError) as caught:
            regret_bounds(*arguments)
        assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match="coverage: got 0"):
        survival_chance([1.0], 1, 0)
