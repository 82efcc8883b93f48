"""Selectors, and their accuracy at k: closed forms against every subset, limits, and refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scoredraw.answers import AnswerPool
from scoredraw.errors import InputError
from scoredraw.language.coverage import pass_at_k
from scoredraw.language.majority_at_k import binomial_pmf, majority_credit
from scoredraw.language.selection import (
    METHODS,
    best_of_n,
    likeliest,
    likeliest_in_all,
    majority_vote,
    probability_vote,
    total_probability_vote,
    uniform,
    weighted_vote,
)
from scoredraw.language.selection_curves import CLOSED, DRAWN, LISTED, select_at_k

BY_PROBABILITY = [likeliest, likeliest_in_all, probability_vote, total_probability_vote]
SELECTORS = [uniform, majority_vote, weighted_vote, best_of_n, *BY_PROBABILITY]


@st.composite
def pools(draw: st.DrawFn, most: int = 8) -> tuple[AnswerPool, np.ndarray]:
    """A pool with nulls and many ties, and a credit for each sample."""
    n = draw(st.integers(1, most))
    small = st.integers(0, 3)

    def row(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n, max_size=n))

    answers = row(st.sampled_from(["a", "b", "c", "d", None]))
    logprobs, lengths = row(small.map(lambda x: -x)), row(st.integers(1, 3))
    rewards = row(small.map(lambda x: x - 1.5))
    pool = AnswerPool.of(answers, rewards=rewards, logprobs=logprobs, lengths=lengths)
    credit = np.where(pool.null, 0.0, np.array(row(small)) / 3)
    return pool, credit


def scalar_rule(pool: AnswerPool, credit: np.ndarray, method: str, subset: list[int]) -> Fraction:
    """What a subset earns, spelled out sample by sample in exact arithmetic."""
    if method in ("uniform", "oracle"):
        earned = [Fraction(credit[i]) for i in subset]
        return max(earned) if method == "oracle" else sum(earned) / len(earned)
    alive = [i for i in subset if pool.codes[i] >= 0]
    if not alive:
        return Fraction(0)
    assert pool.rewards is not None
    reward = {i: Fraction(float(pool.rewards[i])) for i in alive}
    if method == "bon":
        winners = [i for i in alive if reward[i] == max(reward.values())]
        return sum(Fraction(credit[i]) for i in winners) / len(winners)
    votes: dict[int, Fraction] = {}
    for i in alive:
        code = int(pool.codes[i])
        votes[code] = votes.get(code, Fraction(0)) + (1 if method == "majority" else reward[i])
    winners = [code for code, vote in votes.items() if vote == max(votes.values())]
    total = Fraction(0)
    for code in winners:
        members = [i for i in alive if pool.codes[i] == code]
        total += sum(Fraction(credit[i]) for i in members) / len(members) / len(winners)
    return total


# ── selectors ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(pools(), st.randoms(use_true_random=False))
def test_a_choice_is_a_distribution_over_answers_and_follows_the_samples(
    problem: tuple[AnswerPool, np.ndarray], random: Any
) -> None:
    pool, _ = problem
    order = list(range(pool.n))
    random.shuffle(order)
    for selector in SELECTORS:
        choice = selector(pool)
        assert choice.dtype == np.float64
        assert (choice >= 0).all()
        if selector is not uniform:
            assert not choice[pool.null].any()
        abstains = pool.null.all() and selector is not uniform
        np.testing.assert_allclose(choice.sum(), 0 if abstains else 1, atol=1e-12)
        np.testing.assert_allclose(selector(pool.take(order)), choice[order], atol=1e-12)


@pytest.mark.property
@given(pools())
def test_selectors_agree_with_their_rules(problem: tuple[AnswerPool, np.ndarray]) -> None:
    pool, credit = problem
    named = {"uniform": uniform, "majority": majority_vote, "weighted": weighted_vote}
    for method, selector in {**named, "bon": best_of_n}.items():
        want = float(scalar_rule(pool, credit, method, list(range(pool.n))))
        np.testing.assert_allclose(selector(pool) @ credit, want, atol=1e-12, err_msg=method)


@pytest.mark.oracle
def test_equal_sums_tie_however_they_were_added_up() -> None:
    rewards = [0.1, 0.2, 0.3, 0.6]
    pool = AnswerPool.of(["a", "a", "a", "b"], rewards=rewards)
    assert rewards[0] + rewards[1] + rewards[2] != rewards[3]
    np.testing.assert_allclose(weighted_vote(pool), [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    around_zero = AnswerPool.of(["a", "a", "a", "b"], rewards=[0.1, 0.2, -0.3, 0.0])
    assert weighted_vote(around_zero)[3] == 0.5


@pytest.mark.oracle
def test_small_probabilities_keep_their_order() -> None:
    pool = AnswerPool.of(["a", "b", "b"], logprobs=[-2000.0, -2000.5, -2001.5], lengths=[1, 1, 1])
    assert probability_vote(pool).tolist() == [1, 0, 0]  # 1 against e^-.5 + e^-1.5 = .83
    assert likeliest(pool, "sum").tolist() == [1, 0, 0]
    hopeless = AnswerPool.of(["a", "b"], logprobs=[-np.inf, -np.inf], lengths=[1, 1])
    assert likeliest(hopeless).tolist() == [0, 0]
    never = [[-np.inf, -np.inf]]
    curve = select_at_k([["a", "b"]], None, [[1, 1]], [1, 2], "sum_logprob", logprobs=never)
    assert curve.accuracy.tolist() == [0, 0]


@pytest.mark.oracle
def test_selectors_say_what_they_lack() -> None:
    pool = AnswerPool.of(["a", "b"])
    for selector, what in ((best_of_n, "rewards"), (weighted_vote, "rewards"), (likeliest, "logp")):
        with pytest.raises(InputError, match=f"{what}.*got None"):
            selector(pool)
    for selector in (likeliest, probability_vote):
        with pytest.raises(InputError, match="normalize: got max"):
            selector(pool, "max")


# ── the majority in closed form ─────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(pools(most=10))
def test_closed_forms_are_the_mean_over_all_subsets(
    problem: tuple[AnswerPool, np.ndarray],
) -> None:
    pool, credit = problem
    answers = [None if code < 0 else int(code) for code in pool.codes]
    ks = range(1, pool.n + 1)
    for method in ("uniform", "oracle", "majority", "bon", "weighted"):
        assert pool.rewards is not None
        curve = select_at_k([answers], [pool.rewards], [credit], list(ks), method)
        assert set(curve.how) == {LISTED if method == "weighted" else CLOSED}
        for k, got in zip(ks, curve.accuracy, strict=True):
            subsets = combinations(range(pool.n), k)
            earned = [scalar_rule(pool, credit, method, list(subset)) for subset in subsets]
            want = float(sum(earned) / len(earned))
            assert abs(got - want) < 1e-12, (method, k)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "sizes", [[1] * 14, [7, 7], [5, 4, 3, 2], [2, 2, 2, 2, 2, 2, 2], [13, 1], [3, 3, 3, 3, 2]]
)
def test_majority_of_fourteen(sizes: list[int]) -> None:
    """Every k against all subsets: singletons (many can tie), equal groups, several right ones,
    and (where the last group has two) the second group null."""
    codes = np.repeat(np.arange(len(sizes)), sizes)
    pool = AnswerPool(np.where(codes == 1, -1, codes) if sizes[-1] == 2 else codes)
    right = np.where(pool.null, 0.0, np.isin(codes, [0, len(sizes) - 1]))
    ks = np.arange(1, 15)
    got = majority_credit(pool, right, ks)
    for k in ks:
        subsets = np.array(list(combinations(range(14), int(k))))
        votes = np.stack([(pool.codes[subsets] == g).sum(1) for g in range(len(sizes))], 1)
        best = (votes == votes.max(1, keepdims=True)) & (votes > 0)
        wins = best / np.maximum(best.sum(1, keepdims=True), 1)
        want = wins[:, np.unique(codes[right > 0])].sum(1).mean()
        assert abs(got[k - 1] - want) < 1e-13


@pytest.mark.oracle
def test_majority_of_many_is_the_law_of_two_groups() -> None:
    """With two answers the vote is a hypergeometric tail, which SciPy has."""
    n, right = 2000, 900
    pool = AnswerPool(np.arange(n) >= right)
    credit = (np.arange(n) < right).astype(float)
    for k in (1, 10, 101, 500, 1999, 2000):
        votes = stats.hypergeom(n, right, k)
        tie = votes.pmf(k // 2) / 2 if k % 2 == 0 else 0.0
        assert abs(majority_credit(pool, credit, k)[0] - (votes.sf(k // 2) + tie)) < 1e-12


@pytest.mark.oracle
def test_majority_of_answers_that_never_meet_is_a_uniform_choice() -> None:
    """All k tie: the integrand is of degree k - 1, and the weights lose digits near y = 1."""
    for n in (50, 300, 1500):
        pool, credit = AnswerPool(np.arange(n)), (np.arange(n) < 0.4 * n).astype(float)
        got = majority_credit(pool, credit, [1, 2, n // 4, n // 2, n - 1, n])
        np.testing.assert_allclose(got, 0.4, rtol=0, atol=3e-15 * n)


@pytest.mark.oracle
def test_majority_where_thousands_tie_behind_a_pair() -> None:
    """A pair wins alone if both of it are drawn, shares with all if one is."""
    n, ks = 5000, np.array([1, 2, 700, 4999, 5000])
    pool = AnswerPool(np.maximum(np.arange(n) - 1, 0))
    both = ks * (ks - 1) / (n * (n - 1))
    one = 2 * ks * (n - ks) / (n * (n - 1))
    got = majority_credit(pool, pool.codes == 0, ks)
    np.testing.assert_allclose(got, both + one / ks, rtol=0, atol=1e-13)


@pytest.mark.oracle
def test_majority_of_a_million() -> None:
    """Two answers, exact rationals (SciPy's hypergeometric tail is off by 4e-11 here)."""
    n, right, k = 1_000_000, 499_000, 1001
    pool, credit = AnswerPool(np.arange(n) >= right), np.arange(n) < right
    ways = math.comb(right, 501) * math.comb(n - right, 500)
    total = ways
    for j in range(501, k):
        ways = ways * (right - j) * (k - j) // ((j + 1) * (n - right - k + j + 1))
        total += ways
    want = float(Fraction(total, math.comb(n, k)))
    assert abs(majority_credit(pool, credit, k)[0] - want) < 1e-13


@pytest.mark.oracle
def test_majority_agrees_with_many_random_subsets() -> None:
    """Four standard errors at 6 points: false alarm below 4e-4 (fixed seed)."""
    rng = np.random.default_rng(5)
    answers = rng.zipf(1.5, (3, 60)) % 40
    correct = answers == 1
    ks = [2, 7, 15, 30, 45, 59]
    exact = select_at_k(answers, None, correct, ks)
    random = select_at_k(answers, None, correct, ks, exact=False, repeats=3000, rng=1)
    assert set(random.how) == {DRAWN}
    assert (np.abs(exact.accuracy - random.accuracy) < 4 * random.standard_error + 1e-12).all()


@pytest.mark.oracle
def test_the_most_frequent_answer_decides_the_limit() -> None:
    """Right answer at 40 %: the vote tends to 1 where the others scatter, to 0 where one has 45 %;
    coverage tends to 1 in both."""
    n, ks = 1000, [1, 10, 100, 800]
    right = np.zeros(400, int)
    scattered = np.concatenate([right, 1 + np.arange(600) % 60])
    beaten = np.concatenate([right, np.ones(450, int), 2 + np.arange(150) % 50])
    correct = np.arange(n)[None] < 400
    wins = select_at_k(scattered[None], None, correct, ks).accuracy
    loses = select_at_k(beaten[None], None, correct, ks).accuracy
    assert wins[0] == pytest.approx(0.4)
    assert wins[1] > 0.9
    assert wins[-1] > 1 - 1e-12
    assert loses[0] == pytest.approx(0.4)
    assert loses[-1] < 0.02
    assert select_at_k(beaten[None], None, correct, ks, "oracle").accuracy[-1] > 1 - 1e-12


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("n", "theta"), [(0, 0.3), (1, 1.0), (40, 0.9), (5000, 0.001), (10_000, 0.5)]
)
def test_binomial_pmf(n: int, theta: float) -> None:
    want = stats.binom(n, theta).pmf(np.arange(n + 1))
    np.testing.assert_allclose(binomial_pmf(n, theta), want, rtol=0, atol=1e-14)


# ── accuracy at k ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_best_of_n_by_correctness_is_coverage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct = rng.random((4, 9)) < rng.random((4, 1))
    ks = np.arange(1, 10)
    answers = np.arange(36).reshape(4, 9)
    want = pass_at_k(9, correct.sum(axis=1), ks)
    for method in ("oracle", "bon"):
        curve = select_at_k(answers, correct.astype(float), correct, ks, method)
        np.testing.assert_allclose(curve.per_problem, want, atol=1e-13)
        np.testing.assert_allclose(curve.accuracy, want.mean(axis=0), atol=1e-13)


@pytest.mark.oracle
def test_no_selector_beats_the_oracle_and_one_sample_leaves_no_choice() -> None:
    rng = np.random.default_rng(2)
    answers = rng.integers(0, 4, (5, 10)).astype(object)
    answers[rng.random((5, 10)) < 0.3] = None
    correct = answers == 0
    given_ = {"logprobs": -rng.random((5, 10)), "lengths": rng.integers(1, 9, (5, 10))}
    ks = np.arange(1, 11)
    curves = {
        method: select_at_k(answers, rng.random((5, 10)), correct, ks, method, **given_)
        for method in METHODS
    }
    for curve in curves.values():
        assert (curve.per_problem <= curves["oracle"].per_problem + 1e-12).all()
        assert curve.accuracy[0] == pytest.approx(correct.mean())
    np.testing.assert_allclose(curves["uniform"].accuracy, correct.mean())


@pytest.mark.oracle
def test_the_ways_agree_and_say_which_they_are() -> None:
    """Closed form, a selector over listed subsets, and random ones within four standard errors
    (4 points, false alarm below 3e-4, fixed seed)."""
    rng = np.random.default_rng(3)
    answers, rewards = rng.integers(0, 4, (3, 8)), rng.integers(0, 3, (3, 8)).astype(float)
    correct, ks = answers == 1, [1, 3, 6, 8]
    for method, selector in (("majority", majority_vote), ("bon", best_of_n)):
        closed = select_at_k(answers, rewards, correct, ks, method)
        listed = select_at_k(answers, rewards, correct, ks, selector)
        assert (set(closed.how), set(listed.how)) == ({CLOSED}, {LISTED})
        assert (closed.method, listed.method) == (method, selector.__name__)
        np.testing.assert_allclose(closed.per_problem, listed.per_problem, atol=1e-12)
    sums = select_at_k(answers, rewards, correct, ks, "weighted")
    drawn = select_at_k(answers, rewards, correct, ks, "weighted", exact=False, repeats=2000)
    assert (set(sums.how), set(drawn.how)) == ({LISTED}, {DRAWN})
    assert (drawn.standard_error[:-1] > 0).all()
    assert (np.abs(sums.accuracy - drawn.accuracy) < 4 * drawn.standard_error + 1e-12).all()
    same = select_at_k(answers, rewards, correct, ks, "weighted", exact=False, repeats=2000)
    assert (same.accuracy == drawn.accuracy).all()


@pytest.mark.oracle
def test_too_many_subsets_are_drawn() -> None:
    answers = np.arange(40)[None] % 7
    curve = select_at_k(answers, np.ones((1, 40)), answers == 0, [1, 3, 4, 36, 37, 40], "weighted")
    assert curve.how == (LISTED, LISTED, LISTED, LISTED, LISTED, LISTED)  # C(40, 4) = 91 390
    curve = select_at_k(answers, np.ones((1, 40)), answers == 0, [5, 20, 35], "weighted", repeats=9)
    assert curve.how == (DRAWN, DRAWN, DRAWN)
    once = select_at_k(answers, np.ones((1, 40)), answers == 0, [5], "weighted", repeats=1)
    assert math.isnan(once.standard_error[0])  # one subset does not know its own error


@pytest.mark.oracle
def test_ragged_problems_and_an_equality() -> None:
    answers = [["x", "X", "y"], ["z", None, "q", "Q", "Q"]]
    correct = [[1, 1, 0], [0, 0, 1, 1, 1]]
    plain = select_at_k(answers, None, correct, [3])
    joined = select_at_k(answers, None, correct, [3], equal=lambda a, b: a.lower() == b.lower())
    assert plain.per_problem[0, 0] == pytest.approx(2 / 3)
    assert joined.per_problem[0, 0] == pytest.approx(1)
    with pytest.raises(InputError, match="k: got 4, want whole numbers from 1 to 3"):
        select_at_k(answers, None, correct, [4])


@pytest.mark.oracle
def test_nulls_are_never_right() -> None:
    known: dict[str, Any] = {"logprobs": [[-1, -1]], "lengths": [[1, 1]]}
    for method in METHODS:
        curve = select_at_k([[None, None]], [[0, 0]], [[1, 1]], [1, 2], method, **known)
        assert curve.accuracy.tolist() == [0, 0]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [0]}, "k: got 0"),
        ({"ks": [1.5]}, "k: got 1.5"),
        ({"ks": [4]}, "k: got 4"),
        ({"method": "best"}, "method: got best"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"ks": []}, "k: got shape"),
        ({"answers": []}, "answers: got no problems"),
        ({"rewards": [[1, 2, 3]]}, "rewards: got 1 rows, want 2"),
        ({"rewards": [[1, 2, 3], [1, math.nan, 3]]}, "problem 1: rewards: got nan at index 1"),
        ({"rewards": [[1, 2, 3], [1, 2]]}, "problem 1: rewards: got 2 values"),
        ({"rewards": None, "method": "bon"}, "rewards: got None"),
        ({"correct": [[1, 0, 1], [1, 0]]}, "problem 1: correct"),
        ({"correct": [[1, 0, 1], [1, 0, 2]]}, "problem 1: correct"),
        ({"correct": [[1, 0, 1], [1, 0, math.nan]]}, "problem 1: correct"),
        ({"logprobs": [[-1, 0, 0.5], [0, 0, 0]]}, "problem 0: logprobs: got 0.5 at index 2"),
        ({"method": "mean_logprob"}, "logprobs: got None"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {
        "answers": [["a", "b", None], ["a", "a", "c"]],
        "rewards": [[1, 2, 3], [1, 2, 3]],
        "correct": [[1, 0, 0], [1, 1, 0]],
        "ks": [1, 2],
    }
    with pytest.raises(InputError, match=message) as caught:
        select_at_k(**(given_ | change))
    assert "\n" not in str(caught.value)
