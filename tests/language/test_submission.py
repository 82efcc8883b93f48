"""Submitting k answers: ranks and ties spelled out, prefixes, padding, draws by lot, refusals."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, gumbel_r, kstest

from scoredraw.answers import AnswerPool, group_answers
from scoredraw.errors import InputError
from scoredraw.language.coverage import pass_at_k
from scoredraw.language.selection import METHODS
from scoredraw.language.submission import (
    TopK,
    answer_rewards,
    draw_softly,
    gumbel_noise,
    rank_answers,
    submit_answers,
    submit_in_rows,
)

pytestmark = pytest.mark.property

NAMES = [name for name in METHODS if name != "oracle"]


@st.composite
def samples(draw: st.DrawFn, most: int = 9) -> tuple[list[Any], list[float]]:
    """Answers with nulls, and standings that tie often, some of them -inf."""
    n = draw(st.integers(1, most))
    answers = st.sampled_from(["a", "b", "c", "d", None])
    standings = st.sampled_from([0.0, 0.5, 1.0, -math.inf])
    size = {"min_size": n, "max_size": n}
    return draw(st.lists(answers, **size)), draw(st.lists(standings, **size))


def by_hand(answers: list[Any], standings: list[float], pad: bool) -> list[Any]:
    """All answers in the order in which they are submitted."""
    counts = Counter(answers)
    best: dict[Any, float] = {}
    for answer, value in zip(answers, standings, strict=True):
        if answer is not None:
            best[answer] = max(best.get(answer, -math.inf), value)
    ranked = sorted(best, key=lambda y: (-best[y], -counts[y], answers.index(y)))
    return [y for y in ranked if pad or best[y] > -math.inf]


@given(samples(), st.integers(1, 6), st.booleans())
def test_standing_then_frequency_then_first(
    problem: tuple[list[Any], list[float]], k: int, pad: bool
) -> None:
    answers, standings = problem
    pool = AnswerPool.of(answers)
    found = submit_answers(pool, np.array(standings), k, pad="frequency" if pad else None)
    assert list(found.answers) == by_hand(answers, standings, pad)[:k]
    survivors = by_hand(answers, standings, False)
    assert found.survivors == len(survivors)
    assert found.fallback == (not survivors)
    assert found.padded == max(len(found) - len(survivors), 0)
    for answer, index, value, share in zip(
        found.answers, found.indices, found.rewards, found.frequencies, strict=True
    ):
        mine = [i for i, y in enumerate(answers) if y == answer]
        best = max(standings[i] for i in mine)
        assert index == next(i for i in mine if standings[i] == best)
        assert share == len(mine) / len(answers)
        assert value == best or (best == -math.inf and math.isnan(value))
    draw = found.draw
    assert draw.indices.tolist() == found.indices.tolist()
    assert (draw.n, draw.unbiased) == (len(answers), False)


@given(samples(), st.sampled_from([None, "frequency"]), st.sampled_from(NAMES))
def test_k_is_a_prefix_of_k_plus_one(
    problem: tuple[list[Any], list[float]], pad: str | None, method: str
) -> None:
    answers, standings = problem
    scores = np.where(np.isinf(standings), 0.0, standings)
    pool = AnswerPool.of(
        answers, rewards=scores, logprobs=-scores, lengths=np.ones(len(scores), int)
    )
    for by in (method, np.array(standings), method.replace("_", "-")):
        longest = submit_answers(pool, by, 6, pad=pad)
        for k in range(1, 6):
            assert submit_answers(pool, by, k, pad=pad).answers == longest.answers[:k]


@given(samples(), st.randoms(use_true_random=False))
def test_rows_of_many_problems_are_the_problems(
    problem: tuple[list[Any], list[float]], random: Any
) -> None:
    answers, standings = problem
    orders = [list(range(len(answers))) for _ in range(4)]
    for order in orders:
        random.shuffle(order)
    rows = np.array([[answers[i] for i in order] for order in orders], object)
    codes = np.array([group_answers(list(row)) for row in rows])
    values = np.array(standings)[np.array(orders)]
    for pad in (None, "frequency"):
        in_rows = submit_in_rows(codes, values, 3, pad=pad)
        for row, code, value, got in zip(rows, codes, values, in_rows, strict=True):
            one = submit_answers(AnswerPool(code), value, 3, pad=pad)
            assert got[got >= 0].tolist() == one.indices.tolist()
            assert [row[i] for i in one.indices] == by_hand(list(row), value.tolist(), bool(pad))[
                :3
            ]


def test_all_answers_in_hand_are_coverage() -> None:
    """With k no smaller than the number of answers one is right iff some sample is."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 6, (50, 12))
    right = answers == 3
    got = submit_in_rows(group_answers(answers), rng.random((50, 12)), 6)
    hit = (np.take_along_axis(right, np.maximum(got, 0), 1) & (got >= 0)).any(axis=1)
    assert hit.mean() == pytest.approx(pass_at_k(12, right.sum(axis=1), [12]).mean(), abs=1e-12)


def test_standings_a_rounding_apart_tie() -> None:
    pool = AnswerPool.of(["a", "b", "b"])
    assert submit_answers(pool, [0.1 + 0.2, 0.3, 0.3], 1).answers == ("b",)
    assert submit_answers(pool, [0.3 + 1e-9, 0.3, 0.3], 1).answers == ("a",)


def test_answer_rewards() -> None:
    codes, rewards = [[0, 1, 0, -1, 2], [2, 2, -1, 2, 0]], [[1, 5, 4, 9, 2], [3, 1, 9, 8, 0]]
    want = {
        "mean": [[2.5, 5, 2], [0, 0, 4]],
        "max": [[4, 5, 2], [0, 0, 8]],
        "first": [[1, 5, 2], [0, 0, 3]],
    }
    for aggregate, values in want.items():
        assert answer_rewards(codes, rewards, aggregate).tolist() == values


# ── by lot ──────────────────────────────────────────────────────────────────────────────────────


def successive(weights: list[float], k: int) -> dict[tuple[int, ...], float]:
    """The chance of every order of k, drawn one after the other without replacement."""
    chances = {}
    for order in permutations(range(len(weights)), k):
        left, chance = sum(weights), 1.0
        for i in order:
            chance *= weights[i] / left
            left -= weights[i]
        chances[order] = chance
    return chances


@pytest.mark.parametrize("over", ["samples", "answers"])
def test_soft_draws_follow_their_law(over: str) -> None:
    """G-test of 1,500 draws of 2; the seed is fixed, 0.1 % false alarms."""
    answers, rewards, beta = ["a", "b", "a", None, "c"], [0.0, 1.0, 0.5, 9.0, -1.0], 1.5
    pool = AnswerPool.of(answers, rewards=rewards)
    if over == "samples":
        live = [0, 1, 2, 4]
        law: Counter[tuple[str, ...]] = Counter()
        for order, p in successive([math.exp(beta * rewards[i]) for i in live], 2).items():
            law[tuple(dict.fromkeys(answers[live[i]] for i in order))] += p
    else:
        weights = [math.exp(beta * r) for r in (0.25, 1.0, -1.0)]
        law = Counter(
            {tuple("abc"[i] for i in order): p for order, p in successive(weights, 2).items()}
        )
    assert sum(law.values()) == pytest.approx(1)
    random, runs = np.random.default_rng(1), 1500
    seen = Counter(
        draw_softly(pool, k=2, beta=beta, over=over, rng=random).answers for _ in range(runs)
    )
    assert set(seen) <= set(law)
    g = 2 * sum(c * math.log(c / (runs * law[order])) for order, c in seen.items())

    assert g < chi2.ppf(0.999, len(law) - 1)


def test_uniform_is_soft_without_rewards_and_seeds_repeat() -> None:
    pool = AnswerPool.of(list("abcabb"), rewards=[3.0, 2.0, 1.0, 0.0, 5.0, 9.0])
    for seed in range(20):
        longest = draw_softly(pool, k=6, beta=0, rng=seed)
        for method in ("uniform", "uniform-answered"):
            assert submit_answers(pool, method, 3, rng=seed).answers == longest.answers
        for k in range(1, 6):
            short = draw_softly(pool, k=k, beta=0, rng=seed).answers
            assert short == longest.answers[: len(short)]
    firsts = {submit_answers(pool, "uniform", 1, rng=seed).answers for seed in range(50)}
    assert firsts == {("a",), ("b",), ("c",)}
    assert submit_answers(pool, "uniform", 3).answers == submit_answers(pool, "uniform", 3).answers


def test_the_limit_of_beta_is_best_of_n() -> None:
    pool = AnswerPool.of(list("abca"), rewards=[0.1, 0.9, 0.5, 0.3])
    found = draw_softly(pool, k=4, beta=1e6, rng=0)
    assert found.answers == submit_answers(pool, "bon", 4).answers == ("b", "c", "a")
    assert found.rewards.tolist() == [0.9, 0.5, 0.3]  # the rewards, not the keys


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov of 10,000; the seed is fixed, 0.1 % false alarms."""
    assert kstest(gumbel_noise(10_000, 0), gumbel_r.cdf).pvalue > 1e-3


# ── edges and refusals ──────────────────────────────────────────────────────────────────────────


def test_notes() -> None:
    pool = AnswerPool.of(["a", None, "b"])
    assert submit_answers(pool, "majority", 2).note == ""
    assert submit_answers(pool, [1.0, 1.0, -math.inf], 2).note == "1 of 2 answers"
    padded = submit_answers(pool, [1.0, 1.0, -math.inf], 2, pad="frequency")
    assert padded.note == "1 of 2 answers fill up"
    nothing = submit_answers(AnswerPool.of([None, None]), "majority", 2, pad="frequency")
    assert (nothing.answers, nothing.fallback, nothing.survivors) == ((), True, 0)
    assert nothing.note == "no answer to submit; 0 of 2 answers"
    assert len(nothing.draw) == 0
    assert submit_answers(AnswerPool(np.array([4, 7, 7])), "majority", 9).answers == (7, 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k: got 0, want a whole number of at least 1"),
    ({"k": 1.5}, "k: got 1.5, want a whole number of at least 1"),
    ({"k": True}, "k: got True, want a whole number of at least 1"),
    ({"pad": "more"}, "pad: got 'more', want frequency or None"),
    ({"by": "oracle"}, "by: got 'oracle', want a standing or one of uniform"),
    ({"by": "bon"}, "rewards: got None, want one for each answer, which this method needs"),
    ({"by": [1.0]}, "by: got standings of shape (1,), want (3,), one for each sample"),
    ({"by": [1.0, math.nan, 0.0]}, "standings: got NaN or infinity, want numbers"),
    ({"by": lambda pool: [1.0, math.inf, 0.0]}, "standings: got NaN or infinity, want numbers"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        submit_answers(AnswerPool.of(["a", None, "b"]), **{"by": "majority", **change})
    assert str(caught.value).startswith(message)


SOFT: list[tuple[dict[str, Any], str]] = [
    ({"beta": -1.0}, "beta: got -1.0, want a finite number of at least 0"),
    ({"beta": math.inf}, "beta: got inf, want a finite number of at least 0"),
    ({"over": "texts"}, "over: got 'texts', want samples or answers"),
    ({"scores": [1.0]}, "scores: got shape (1,), want (3,)"),
    ({"scores": [1.0, 0.0, math.nan]}, "scores: got NaN or infinity, want finite numbers"),
    ({"scores": None}, "rewards: got None, want one for each answer, which this method needs"),
    ({"k": 0}, "k: got 0, want a whole number of at least 1"),
]


@pytest.mark.parametrize(("change", "message"), SOFT)
def test_bad_soft_draws(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        draw_softly(AnswerPool.of(["a", None, "b"]), **{"scores": [1.0, 2.0, 3.0], **change})
    assert str(caught.value).startswith(message)


def test_ranking_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="standings: got shape"):
        rank_answers([[0, 1]], [[1.0]])
    assert isinstance(submit_answers(AnswerPool.of(["a"])), TopK)
