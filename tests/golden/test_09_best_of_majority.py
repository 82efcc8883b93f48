"""Best-of-majority: brute-force selections, and exact chances of success by enumeration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from scoredraw.answers import AnswerPool, group_answers
from scoredraw.language.best_of_majority import best_of_majority, submit_bom_in_rows
from scoredraw.language.passk_regret import CLOSED, LISTED, passk_regret
from scoredraw.language.submission import submit_answers

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("09-bom.json")


@pytest.fixture(scope="module")
def exact(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("09-bom-exact.json")


def test_selections(case: dict[str, Any]) -> None:
    given, k = case["inputs"], case["inputs"]["k"]
    empty = 0
    for problem, want in zip(given["problems"], case["outputs"]["per_problem"], strict=True):
        answers, rewards = problem["answer"], problem["reward"]
        assert set(want) == {"bom_mean", "bom_max", "majority_topk"}
        for a, alpha in enumerate(given["alphas"]):
            for aggregate in ("mean", "max"):
                found = best_of_majority(answers, rewards, k, alpha, aggregate=aggregate)
                assert list(found.answers) == want[f"bom_{aggregate}"][a]
                empty += found.fallback
        majority = submit_answers(AnswerPool.of(answers), "majority", k)
        assert list(majority.answers) == want["majority_topk"]
    assert empty == 4  # of the 64 filters: those leave nothing


def test_best_of_n_is_no_filter(case: dict[str, Any]) -> None:
    given, k = case["inputs"], case["inputs"]["k"]
    for problem, want in zip(given["problems"], case["outputs"]["per_problem"], strict=True):
        pool = AnswerPool.of(problem["answer"], rewards=problem["reward"])
        assert list(submit_answers(pool, "bon", k).answers) == want["bom_max"][0]


def test_chances_of_success(exact: dict[str, Any]) -> None:
    given, prob = exact["inputs"], exact["outputs"]["prob"]
    right = np.arange(len(given["pi"])) == given["target"]
    for how in (CLOSED, LISTED):
        chance = partial(passk_regret, given["pi"], right, given["reward"], given["N"], how=how)
        got = [[chance(k, a).reached for k in given["k"]] for a in given["alphas"]]
        np.testing.assert_allclose(got, prob, rtol=0, atol=exact["tolerance"]["prob"])


def all_sequences(given: dict[str, Any]) -> tuple[Any, Any]:
    """Every sequence of samples, and its chance."""
    every = np.array(list(product(range(len(given["pi"])), repeat=given["N"])))
    return every, np.prod(np.array(given["pi"])[every], axis=1)


def test_the_implementation_on_every_sequence(exact: dict[str, Any]) -> None:
    given, prob = exact["inputs"], exact["outputs"]["prob"]
    every, chance = all_sequences(given)
    codes, rewards = group_answers(every), np.array(given["reward"])[every]
    for a, alpha in enumerate(given["alphas"]):
        for j, k in enumerate(given["k"]):
            chosen = submit_bom_in_rows(codes, rewards, k, alpha)
            answers = np.where(chosen < 0, -1, np.take_along_axis(every, np.maximum(chosen, 0), 1))
            got = chance @ (answers == given["target"]).any(axis=1)
            assert got == pytest.approx(prob[a][j], abs=exact["tolerance"]["prob"])


def test_the_implementation_by_simulation(exact: dict[str, Any]) -> None:
    """20,000 runs within 3 standard errors of 8 chances: 2 % false alarms at worst, seed fixed."""
    given, prob = exact["inputs"], exact["outputs"]["prob"]
    rng = np.random.default_rng(0)
    runs = 20_000
    drawn = np.searchsorted(np.cumsum(given["pi"])[:-1], rng.random((runs, given["N"])), "right")
    codes, rewards = group_answers(drawn), np.array(given["reward"])[drawn]
    for a, alpha in enumerate(given["alphas"]):
        for j, k in enumerate(given["k"]):
            chosen = submit_bom_in_rows(codes, rewards, k, alpha)
            answers = np.where(chosen < 0, -1, np.take_along_axis(drawn, np.maximum(chosen, 0), 1))
            share = (answers == given["target"]).any(axis=1).mean()
            error = np.sqrt(prob[a][j] * (1 - prob[a][j]) / runs)
            assert abs(share - prob[a][j]) < 3 * error


def test_one_by_one_as_in_rows(exact: dict[str, Any]) -> None:
    given = exact["inputs"]
    every, _ = all_sequences(given)
    some = every[::41]
    rewards = np.array(given["reward"])[some]
    for alpha in given["alphas"]:
        in_rows = submit_bom_in_rows(group_answers(some), rewards, 2, alpha)
        for row, reward, want in zip(some, rewards, in_rows, strict=True):
            got = best_of_majority(row, reward, 2, alpha)
            assert got.indices.tolist() == want[want >= 0].tolist()
