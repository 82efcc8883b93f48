"""Best-of-majority and its rivals: limits, invariances, exact instances, laws, refusals."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.answers import NULL, AnswerPool, count_votes
from scoredraw.errors import InputError
from scoredraw.language.best_of_majority import (
    best_of_majority,
    best_of_majority_choice,
    best_of_majority_standing,
    bom_in_rows,
    bom_threshold,
    majority_of_the_bests,
    majority_of_the_bests_standing,
    soft_best_of_answers,
    soft_best_of_n,
    submit_bom_in_rows,
    submit_one_in_rows,
    survival_threshold,
)
from scoredraw.language.selection import best_of_n, majority_vote, uniform_answered
from scoredraw.language.selection_curves import accuracy_at_k
from scoredraw.language.submission import (
    draw_softly,
    mob_weights,
    of_answer,
    submit_answers,
    submit_in_rows,
)

pytestmark = pytest.mark.oracle

SELECTORS = [
    best_of_majority_choice, majority_of_the_bests, soft_best_of_n, soft_best_of_answers
]  # fmt: skip


@st.composite
def problems(draw: st.DrawFn, most: int = 12) -> tuple[list[Any], list[float]]:
    """Answers with nulls, and rewards that are all different."""
    n = draw(st.integers(1, most))
    answers = st.sampled_from(["a", "b", "c", "d", "e", None])
    rewards = draw(st.permutations(range(n)))
    return draw(st.lists(answers, min_size=n, max_size=n)), [r / 8 - 0.5 for r in rewards]


def by_hand(
    answers: list[Any], rewards: list[float], k: int, alpha: float, aggregate: str
) -> list[Any]:
    """Algorithm 3 with the fallback, spelled out."""
    counts = Counter(y for y in answers if y is not None)
    mine = {y: [r for z, r in zip(answers, rewards, strict=True) if z == y] for y in counts}
    total = {"mean": lambda r: sum(r) / len(r), "max": max, "first": lambda r: r[0]}[aggregate]
    live = [y for y in counts if counts[y] / len(answers) >= alpha - 1e-12]
    if not live:
        return sorted(counts, key=lambda y: (-counts[y], answers.index(y)))[:1]
    # sums of eighths are exact, their quotients are rounded to the same number or differ
    rank = {y: (-round(total(mine[y]), 9), -counts[y], answers.index(y)) for y in live}
    return sorted(live, key=rank.__getitem__)[:k]


@given(
    problems(), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0]),
    st.sampled_from(["mean", "max", "first"]),
)  # fmt: skip
def test_the_algorithm(
    problem: tuple[list[Any], list[float]], k: int, alpha: float, aggregate: str
) -> None:
    answers, rewards = problem
    found = best_of_majority(answers, rewards, k, alpha, aggregate=aggregate)
    assert list(found.answers) == by_hand(answers, rewards, k, alpha, aggregate)
    assert alpha == 0 or found.survivors <= 1 / alpha + 1e-9
    assert [answers[i] for i in found.indices] == list(found.answers)
    longer = best_of_majority(answers, rewards, k + 1, alpha, aggregate=aggregate)
    assert longer.answers[:k] == found.answers
    affine = best_of_majority(answers, [7 * r - 3 for r in rewards], k, alpha, aggregate=aggregate)
    assert affine.answers == found.answers
    pool = AnswerPool.of(answers, rewards=rewards)
    standing = best_of_majority_standing(pool, alpha=alpha, aggregate=aggregate)
    by_standing = submit_answers(pool, standing, k)
    assert by_standing.answers == found.answers
    choice = best_of_majority_choice(pool, alpha=alpha, aggregate=aggregate)
    if found.answers:
        assert choice[found.indices[0]] > 0
        assert found.fallback or choice[pool.codes == pool.codes[found.indices[0]]].sum() > 0.49


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(
    problem: tuple[list[Any], list[float]], random: Any
) -> None:
    answers, rewards = problem
    order = list(range(len(answers)))
    random.shuffle(order)
    pool = AnswerPool.of(answers, rewards=rewards)
    moved = AnswerPool.of([answers[i] for i in order], rewards=np.array(rewards)[order])
    for selector in SELECTORS:
        choice = selector(pool)
        np.testing.assert_allclose(selector(moved), choice[order], atol=1e-12)
        assert choice.sum() == pytest.approx(float(not pool.null.all()))
        assert not choice[pool.null].any()
        subsets = np.array([order, order[::-1]])
        in_batches = selector.of_subsets(pool, subsets)  # type: ignore[attr-defined]
        np.testing.assert_allclose(in_batches, choice[subsets], atol=1e-12)


@given(problems())
def test_the_limits_of_alpha(problem: tuple[list[Any], list[float]]) -> None:
    answers, rewards = problem
    pool = AnswerPool.of(answers, rewards=rewards)
    lowest = best_of_majority_choice(pool, alpha=0, aggregate="max")
    best = best_of_n(pool)
    for code in range(pool.groups):
        mine = pool.codes == code
        assert lowest[mine].sum() == pytest.approx(best[mine].sum())
    counts = np.bincount(pool.codes + 1)[1:]
    if pool.groups and counts.max() < pool.n:
        above = (counts.max() + 0.5) / pool.n
        np.testing.assert_allclose(
            best_of_majority_choice(pool, alpha=above), majority_vote(pool), atol=1e-12
        )
        found = best_of_majority(pool, k=3, alpha=above)
        assert found.answers == submit_answers(pool, "majority", 1).answers
        assert found.fallback
        assert np.isnan(found.rewards).all()
        padded = best_of_majority(pool, k=3, alpha=above, pad="frequency")
        assert padded.answers == submit_answers(pool, "majority", 3).answers


def test_the_threshold() -> None:
    assert bom_threshold(1) == 0.75
    assert survival_threshold(1) == 1.0
    assert survival_threshold(10) == 0.2
    assert survival_threshold(1000) == 0.01
    assert survival_threshold(3, min_count=4) == 4 / 3  # nothing survives
    # α = m/N keeps a count of m, whatever m/N rounds to
    for m in range(1, 49):
        answers = ["a"] * m + [None] * (49 - m)
        assert not best_of_majority(answers, np.zeros(49), alpha=m / 49).fallback
        assert not best_of_majority(answers, np.zeros(49), min_count=m).fallback
        assert best_of_majority(answers, np.zeros(49), alpha=(m + 1e-6) / 49).fallback


def test_nulls_count_for_n_but_never_survive() -> None:
    answers, rewards = ["a", "b", "b", None, None], [5.0, 1.0, 1.0, math.nan, math.inf]
    assert best_of_majority(answers, rewards, 2, 0.4).answers == ("b",)
    assert best_of_majority(answers, rewards, 2, 0.2).answers == ("a", "b")
    assert best_of_majority(answers[:3], rewards[:3], 2, 0.4).answers == ("b",)
    assert best_of_majority(answers[:3], rewards[:3], 2, 0.3).answers == ("a", "b")
    nothing = best_of_majority([None, float("nan")], lambda answer: 1.0, 2, pad="frequency")
    assert (nothing.answers, nothing.fallback, nothing.survivors) == ((), True, 0)


def test_fewer_than_k_says_so() -> None:
    answers = ["a"] * 6 + ["b"] * 3 + ["c"]
    found = best_of_majority(answers, np.arange(10.0), 3, 0.5)
    assert (found.answers, found.note, found.padded) == (("a",), "1 of 3 answers", 0)
    padded = best_of_majority(answers, np.arange(10.0), 3, 0.5, pad="frequency")
    assert (padded.answers, padded.padded) == (("a", "b", "c"), 2)
    assert padded.note == "2 of 3 answers fill up"
    assert np.isnan(padded.rewards).tolist() == [False, True, True]


# ── rewards that are asked for ──────────────────────────────────────────────────────────────────


def test_a_reward_function_is_asked_once_a_survivor() -> None:
    rng = np.random.default_rng(0)
    answers = rng.zipf(1.5, 500).tolist()
    asked: list[int] = []

    def reward(answer: int) -> float:
        asked.append(answer)
        return -float(answer)

    found = best_of_majority(answers, reward, 3, 0.01)
    assert sorted(asked) == sorted(y for y, c in Counter(answers).items() if c >= 5)
    assert found.survivors == len(asked) == len(set(asked)) <= 100
    assert list(found.answers) == sorted(asked)[:3]
    assert found.rewards.tolist() == [-float(y) for y in found.answers]
    asked.clear()
    assert best_of_majority(answers, reward, 3, 1.0).fallback
    assert not asked


def test_reward_functions_in_the_shape_of_trl() -> None:
    answers = ["12", "7", "7", "12", "9"]
    calls: list[list[str]] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        assert not kwargs
        calls.append(completions)
        return [float(len(text)) for text in completions]

    found = best_of_majority(answers, reward, 2, batched=True)
    assert (found.answers, calls) == (("12", "7"), [["12", "7"]])
    texts = ["it is 12", "seven: 7", "7", "12!", "9"]
    pool = AnswerPool.of(answers, texts=texts)
    for given_answers, given_texts in ((answers, texts), (pool, None)):
        found = best_of_majority(given_answers, reward, 2, batched=True, texts=given_texts)
        assert calls[-1] == ["it is 12", "seven: 7"]  # the first sample of each
        assert found.indices.tolist() == [0, 1]
    plain = best_of_majority(answers, lambda these: [1.0] * len(these), 2, batched=True)
    assert plain.answers == ("12", "7")
    best_of_majority(answers, reward, 2, alpha=1.0, batched=True)
    assert len(calls) == 3  # nothing survived: not asked


def test_a_part_of_a_pool_asks_about_its_own_answers() -> None:
    pool = AnswerPool.of(list("abccb"), texts=["A", "B", "C", "C2", "B2"]).take([4, 3, 2, 1])
    seen: list[str] = []
    found = best_of_majority(pool, lambda text: seen.append(text) or len(seen), 2)
    assert sorted(seen) == ["B2", "C2"]
    assert set(found.answers) == {"b", "c"}


def test_unhashable_answers_need_an_equality() -> None:
    answers = [[1], [2], [1], [2.001], [2.001]]
    with pytest.raises(InputError, match="unhashable list"):
        best_of_majority(answers, np.zeros(5))
    found = best_of_majority(answers, np.arange(5.0), 2, equal=lambda a, b: abs(a[0] - b[0]) < 0.01)
    assert found.answers == ([2], [1])
    assert best_of_majority(answers, np.arange(5.0), key=lambda a: round(a[0])).answers == ([2],)


# ── the two instances ───────────────────────────────────────────────────────────────────────────


def draw_codes(pi: list[float], n: int, runs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.searchsorted(np.cumsum(pi)[:-1], rng.random((runs, n)), side="right")


def test_the_majority_fails_with_perfect_rewards() -> None:
    """3 of the 4 answers are more frequent; 400 runs of 600 samples, exact chances below 1e-6."""
    codes = draw_codes([0.3, 0.3, 0.3, 0.1], 600, 400)
    rewards = (codes == 3) * 1.0
    ours = submit_bom_in_rows(codes, rewards, 3, 0.075)
    assert (np.take_along_axis(codes, ours[:, :1], 1) == 3).mean() > 0.97
    votes = of_answer(count_votes(codes), codes)
    theirs = np.take_along_axis(codes, submit_in_rows(codes, votes, 3), 1)
    assert (np.sort(theirs, axis=1) == [0, 1, 2]).all()


@pytest.mark.parametrize(("n", "success"), [(10, 0.771), (100, 0.221), (1000, 3e-7)])
def test_best_of_n_degrades(n: int, success: float) -> None:
    """800 runs against 0.985^N - 0.785^N, within 3.5 s.e.: 0.05 % false alarms, seed fixed."""
    exact = 0.985**n - 0.785**n
    assert exact == pytest.approx(success, rel=0.1)
    pi = [0.2, 0.5, *[0.3 / 1000] * 1000]
    codes = draw_codes(pi, n, 800)
    reward = np.array([0.9, 0.5, *[1.0] * 50, *[0.1] * 950])
    frequent = submit_bom_in_rows(codes, reward[codes], alpha=0.05)[:, 0]
    best = submit_bom_in_rows(codes, reward[codes], alpha=0)[:, 0]
    rows = np.arange(len(codes))
    error = 3.5 * math.sqrt(exact * (1 - exact) / len(codes))
    assert (codes[rows, best] == 0).mean() == pytest.approx(exact, abs=error + 1e-9)
    if n == 10:
        np.testing.assert_array_equal(best, frequent)  # one sighting passes
    else:
        assert (codes[rows, frequent] == 0).mean() > 0.999


# ── rivals ──────────────────────────────────────────────────────────────────────────────────────


@given(problems(5), st.integers(1, 3))
@settings(max_examples=40)
def test_mob_is_the_mode_of_bootstrapped_best_of_m(
    problem: tuple[list[Any], list[float]], m: int
) -> None:
    answers, rewards = problem
    rewards = [max(r, -0.25) for r in rewards]  # some tie
    pool = AnswerPool.of(answers, rewards=rewards)
    live = np.flatnonzero(~pool.null)
    votes = np.zeros(pool.n)
    m = min(m, max(len(live), 1))
    for draw in product(live, repeat=m):
        best = max(rewards[i] for i in draw)
        # a sample of equal reward is as good: of all such, drawn or not, each equally often
        tied = [i for i in live if rewards[i] == best]
        votes[tied] += len(live) ** -m / len(tied)
    got = mob_weights(pool.codes[None], np.where(pool.null, 0, rewards)[None], m)[0]
    np.testing.assert_allclose(got, votes, atol=1e-12)
    groups = np.array([votes[pool.codes == c].sum() for c in range(pool.groups)])
    standing = majority_of_the_bests_standing(pool, m=m)
    np.testing.assert_allclose(standing[live], groups[pool.codes[live]], atol=1e-12)
    if len(live):
        winners = majority_of_the_bests(pool, m=m) > 0
        assert set(pool.codes[winners]) == set(np.flatnonzero(groups > groups.max() - 1e-9))


def test_the_limits_of_mob_and_of_soft_choices() -> None:
    rng = np.random.default_rng(0)
    pool = AnswerPool.of(rng.integers(0, 4, 30), rewards=rng.random(30))
    np.testing.assert_allclose(majority_of_the_bests(pool, m=1), majority_vote(pool))
    np.testing.assert_allclose(soft_best_of_n(pool, beta=0), uniform_answered(pool))
    np.testing.assert_allclose(soft_best_of_n(pool, beta=1e7), best_of_n(pool))
    by_answer = soft_best_of_answers(pool, beta=0)
    assert [by_answer[pool.codes == c].sum() for c in range(4)] == pytest.approx([0.25] * 4)
    hard = soft_best_of_answers(pool, beta=1e7)
    np.testing.assert_allclose(hard, best_of_majority_choice(pool, alpha=0), atol=1e-12)


def test_the_soft_choice_is_the_first_of_the_draws() -> None:
    """Chances against 1,000 draws, within 4 s.e.: 0.05 % false alarms, seed fixed."""
    pool = AnswerPool.of(["a", "b", "a", None], rewards=[0.0, 1.0, 0.5, 3.0])
    random = np.random.default_rng(0)
    for over, selector in (("samples", soft_best_of_n), ("answers", soft_best_of_answers)):
        drawn = [draw_softly(pool, beta=2.0, over=over, rng=random).answers for _ in range(1000)]
        share = sum(answers == ("b",) for answers in drawn) / 1000
        assert share == pytest.approx(selector(pool, beta=2.0)[1], abs=4 * 0.5 / 1000**0.5)


def test_curves_take_the_selectors_in_batches() -> None:
    """Two of three: {a, a} and {b, a} twice; the reward decides where nothing comes twice."""
    pool = AnswerPool.of(list("aab"), rewards=[0.0, 0.0, 1.0])
    credit = [np.array([1.0, 1.0, 0.0])]
    curve = accuracy_at_k([pool], credit, [1, 2, 3], best_of_majority_choice)
    # with two samples "auto" asks for both: {a, b} falls back, and ties share
    assert curve.accuracy == pytest.approx([2 / 3, (1 + 0.5 + 0.5) / 3, 1.0])


@given(problems(), st.integers(0, 2))
def test_five_methods_at_once(problem: tuple[list[Any], list[float]], coarse: int) -> None:
    answers, rewards = problem
    rewards = [round(r * 2**coarse) / 2**coarse for r in rewards]  # some tie
    pool = AnswerPool.of(answers, rewards=rewards)
    for alpha in (0.0, 0.2, "auto"):
        found = submit_one_in_rows([pool.codes], [pool.rewards], alpha=alpha)
        want = {name: submit_answers(pool, name) for name in ("majority", "bon", "weighted")}
        want["bom"] = best_of_majority(pool, alpha=alpha)
        want["mob"] = submit_answers(pool, majority_of_the_bests_standing)
        for name, top in want.items():
            assert found[name].tolist() == (top.indices.tolist() or [-1]), name
    with pytest.raises(InputError, match="methods: got \\['best'\\], want some of majority"):
        submit_one_in_rows([[0]], [[0.0]], ["best"])


def test_short_rows_know_their_size() -> None:
    codes = np.array([[0, 1, 1, 2], [0, 1, NULL, NULL]])
    rewards = np.array([[4.0, 1, 1, 9], [1.0, 2, 0, 0]])
    choice = bom_in_rows(codes, rewards, alpha=0.5, sizes=[4, 2])
    assert choice.tolist() == [[0, 0.5, 0.5, 0], [0, 1, 0, 0]]
    assert bom_in_rows(codes, rewards, alpha=0.5).tolist()[1] == [0.5, 0.5, 0, 0]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, "alpha: got -0.1, want auto or a share in [0, 1]"),
    ({"alpha": 1.1}, "alpha: got 1.1, want auto or a share in [0, 1]"),
    ({"alpha": math.nan}, "alpha: got nan, want auto or a share in [0, 1]"),
    ({"alpha": "most"}, "alpha: got 'most', want auto or a share in [0, 1]"),
    ({"alpha": 0.1, "min_count": 2}, "min_count: got 2 and alpha 0.1, want one of the two"),
    ({"min_count": 0}, "min_count: got 0, want at least 1"),
    ({"min_count": 1.5}, "min_count: got 1.5, want whole numbers"),
    ({"k": 0}, "k: got 0, want a whole number of at least 1"),
    ({"answers": []}, "answers: got shape (0,), want samples"),
    ({"aggregate": "sum"}, "aggregate: got 'sum', want one of"),
    ({"pad": True}, "pad: got True, want frequency or None"),
    ({"rewards": [1.0, math.nan, 0.0]}, "rewards: got nan at index 1, want finite numbers for"),
    ({"rewards": [1.0, math.inf, 0.0]}, "rewards: got inf at index 1, want finite numbers for"),
    ({"rewards": [1.0, 2.0]}, "rewards: got shape (2,), want (3,), one for each answer"),
    ({"rewards": lambda y: math.nan}, "rewards: got NaN or infinity from it, want finite"),
    ({"rewards": lambda y: "good"}, "rewards: got what is not a number, want numbers"),
    ({"rewards": lambda y: [1.0, 2.0], "batched": True}, "rewards: got 2 values, want 1 from"),
    ({"batched": True}, "batched: got an array of rewards, want a function"),
    ({"rewards": None}, "rewards: got None, want one for each answer, which this method needs"),
    ({"texts": ["a"]}, "texts: got 1 values, want 3, one for each answer"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"answers": ["a", "a", "b"], "rewards": [1.0, 2.0, 3.0]}
    with pytest.raises(InputError) as caught:
        best_of_majority(**{**good, **change})
    assert str(caught.value).startswith(message)


def test_only_the_rewards_of_survivors_are_looked_at() -> None:
    found = best_of_majority(["a", "a", "b"], [1.0, 2.0, math.nan])
    assert (found.answers, found.rewards.tolist()) == (("a",), [1.5])
    with pytest.raises(InputError, match="rewards: got nan at index 2"):
        best_of_majority(["a", "a", "b"], [1.0, 2.0, math.nan], alpha=0)


def test_other_refusals() -> None:
    pool = AnswerPool.of(["a", "b"], rewards=[1.0, 2.0])
    with pytest.raises(InputError, match=r"coverage: got 0\.5"):
        bom_threshold(0.5)
    with pytest.raises(InputError, match="m: got 0"):
        majority_of_the_bests(pool, m=0)
    for soft in (soft_best_of_n, soft_best_of_answers):
        with pytest.raises(InputError, match="beta: got -1"):
            soft(pool, beta=-1)
    with pytest.raises(InputError, match="sizes: got"):
        bom_in_rows([[0, 1]], [[1.0, 2.0]], sizes=[1])
    with pytest.raises(InputError, match="rewards: got None"):
        best_of_majority_choice(AnswerPool.of(["a"]))
    with pytest.raises(InputError, match="rewards: got a function and a pool of codes"):
        best_of_majority(AnswerPool(np.array([0, 0])), lambda answer: 1.0)
