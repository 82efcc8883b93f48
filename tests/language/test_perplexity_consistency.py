"""Confidences and choices: a plain re-telling, limits, invariances, null answers, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.answers import AnswerPool
from scoredraw.errors import InputError
from scoredraw.language import perplexity_consistency as module
from scoredraw.language.perplexity_consistency import (
    METHODS,
    NULLS,
    AnswerConfidence,
    answer_confidence,
    choose,
    choose_in_rows,
    consistency_standing,
    perplexity_consistency,
    perplexity_consistency_standing,
    prune_reasoning,
    pruned_consistency,
    rpc_confidence,
)
from scoredraw.language.selection import best_of_n, likeliest, majority_vote
from scoredraw.language.selection_curves import accuracy_at_k
from scoredraw.language.weibull_mixture import fit_weibull_mixture

pytestmark = pytest.mark.oracle


@st.composite
def problems(draw: st.DrawFn, most: int = 9) -> dict[str, Any]:
    """Answers with nulls, and paths that fix answer, log-probability and length."""
    n = draw(st.integers(1, most))
    path = st.tuples(
        st.sampled_from(["a", "b", "c", None]), st.integers(0, 8), st.integers(1, 4)
    ).map(lambda t: (t[0], -t[1] / 2, t[2]))
    drawn = draw(st.lists(path, min_size=n, max_size=n))
    said = draw(st.lists(st.sampled_from([0.0, 0.2, 0.9]), min_size=n, max_size=n))
    answers, logprobs, lengths = zip(*drawn, strict=True)
    return {
        "answers": list(answers), "logprobs": list(logprobs), "lengths": list(lengths),
        "paths": drawn, "scores": said,
    }  # fmt: skip


def found(problem: dict[str, Any], method: str, **options: Any) -> AnswerConfidence:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spikes may not converge
        return answer_confidence(**problem, method=method, **options)


def told(problem: dict[str, Any], method: str, normalize: str) -> dict[Any, float]:
    """The table of formulas, sample by sample, for all that needs no fit."""
    rows = list(
        zip(*(problem[k] for k in ("answers", "logprobs", "lengths", "paths")), strict=True)
    )
    score = {
        i: np.exp(lp / (length if normalize == "mean" else 1))
        for i, (_, lp, length, _) in enumerate(rows)
    }
    alive = [i for i, row in enumerate(rows) if row[0] is not None]
    out = {rows[i][0]: 0.0 for i in alive}
    if method in ("ppl", "verb"):
        score = score if method == "ppl" else dict(enumerate(problem["scores"]))
        for i in alive:
            out[rows[i][0]] = max(out[rows[i][0]], score[i])
        return out
    seen = set()
    for i in alive:
        if method == "sc":
            out[rows[i][0]] += 1
        elif rows[i][3] not in seen:
            seen.add(rows[i][3])
            out[rows[i][0]] += score[i]
    total = sum(out.values())
    return {answer: value / total for answer, value in out.items()}


# ── confidences ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(problems(), st.sampled_from(["sc", "ppl", "verb", "pc"]), st.sampled_from(["mean", "sum"]))
def test_confidences_are_the_formulas(problem: dict[str, Any], method: str, scale: str) -> None:
    got, want = found(problem, method, normalize=scale), told(problem, method, scale)
    assert got.answers == tuple(want)
    np.testing.assert_allclose(got.confidence, list(want.values()), rtol=1e-12)
    assert got.top == pytest.approx(max(want.values(), default=0.0), rel=1e-9)


@pytest.mark.property
@given(problems(), st.sampled_from(METHODS), st.sampled_from(NULLS), st.randoms())
def test_choices_and_the_order_of_samples(
    problem: dict[str, Any], method: str, invalid: str, random: Any
) -> None:
    order = list(range(len(problem["answers"])))
    random.shuffle(order)
    mixed = {name: [column[i] for i in order] for name, column in problem.items()}
    one, other = (found(p, method, invalid=invalid) for p in (problem, mixed))
    assert dict(zip(other.answers, other.confidence, strict=True)) == pytest.approx(
        dict(zip(one.answers, one.confidence, strict=True)), rel=1e-9
    )
    np.testing.assert_allclose(other.choice, one.choice[order], atol=1e-12)
    np.testing.assert_array_equal(other.keep, one.keep[order])
    null = np.array([answer is None for answer in problem["answers"]])
    assert not one.choice[null].any()
    if invalid == "drop":
        assert one.choice.sum() == pytest.approx(float(one.top > 0))
        assert not one.keep[null].any()


@pytest.mark.property
@settings(max_examples=50)
@given(problems(most=6), st.sampled_from(["sc", "ppl", "pc"]))
def test_every_sample_twice_changes_nothing(problem: dict[str, Any], method: str) -> None:
    twice = {name: column * 2 for name, column in problem.items()}
    one, two = found(problem, method), found(twice, method)
    assert one.answers == two.answers
    np.testing.assert_allclose(two.confidence, one.confidence, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 30])
def test_equal_probabilities_are_votes(n: int) -> None:
    """Also where the mean of equal numbers rounds to more than they are."""
    rng = np.random.default_rng(n)
    for p in (0.1, 0.3, 0.7, *rng.random(20)):
        answers, logprobs = rng.integers(0, 3, n).tolist(), np.full(n, np.log(p))
        votes = answer_confidence(answers, method="sc")
        for method in ("pc", "rpc"):
            got = answer_confidence(answers, logprobs, lengths=np.ones(n), method=method)
            np.testing.assert_array_equal(got.confidence, votes.confidence)
            assert got.keep.all()
            assert got.mixture is None
    assert np.bincount(answers).max() / n == votes.top


def test_one_sample() -> None:
    for method in ("sc", "pc", "rpc"):
        got = answer_confidence(["x"], [-3.0], lengths=[2], method=method)
        assert (got.answer, got.top, got.mixture) == ("x", 1.0, None)


def test_a_constant_factor_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    answers, logprobs = rng.integers(0, 3, 20), -rng.gamma(3, 1, 20) - 1
    one = rpc_confidence(answers, logprobs, normalize="sum", prune=False)
    for shift in (-5000.0, 1.0):
        two = rpc_confidence(answers, logprobs + shift, normalize="sum", prune=False)
        np.testing.assert_allclose(two.confidence, one.confidence, rtol=1e-9)
        pruned = rpc_confidence(answers, logprobs + shift, normalize="sum")
        again = rpc_confidence(answers, logprobs, normalize="sum")
        np.testing.assert_array_equal(pruned.keep, again.keep)


def test_a_text_counts_once_and_equal_probabilities_of_two_texts_twice() -> None:
    logprobs, ones = np.log([0.5, 0.5, 0.6]), np.ones(3)
    same = answer_confidence("aab", logprobs, lengths=ones, paths=["x", "x", "y"], method="pc")
    assert same.answer == "b"
    other = answer_confidence("aab", logprobs, lengths=ones, paths=["x", "z", "y"], method="pc")
    assert other.answer == "a"
    assert other.top == pytest.approx(1.0 / 1.6)
    # read twice, a path's log-probability rounds: the larger counts
    rounded = answer_confidence(
        "aab", np.log([0.5, 0.51, 0.49]), lengths=ones, paths=[1, 1, 2],
        method="pc",
    )  # fmt: skip
    assert rounded.top == pytest.approx(0.51)


# ── pruning ─────────────────────────────────────────────────────────────────────────────────────


def test_the_rule() -> None:
    """Pruned: the improbable component is likelier and p lies below the mean. Never the largest."""
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.beta(8, 2, (40, 12)), rng.beta(2, 6, (40, 8))], axis=1)
    with warnings.catch_warnings(record=True):
        keep, mixture = prune_reasoning(p)
    pruned = 0
    for s, row in enumerate(p):
        fit = fit_weibull_mixture(row)
        assert fit.nll == mixture.nll[s]
        want = (fit.posterior_high(row) >= 0.5) | (row >= row.mean())
        np.testing.assert_array_equal(keep[s], want if fit.converged else True)
        assert keep[s][row.argmax()]
        pruned += int((~keep[s]).sum())
    assert pruned > 40


def test_an_answer_whose_paths_are_pruned_stays_with_confidence_zero() -> None:
    logprobs = np.log([0.9, 0.85, 0.8, 0.2, 0.15, 0.1, 0.2])
    got = rpc_confidence(list("aabbccc"), logprobs, lengths=np.ones(7))
    assert got.answers == ("a", "b", "c")
    assert got.confidence[2] == 0
    assert got.confidence[:2].sum() == pytest.approx(1)
    assert got.mixture is not None
    assert got.mixture.means[0] > got.mixture.means[1]


def test_probability_zero_is_always_pruned() -> None:
    logprobs = np.log([0.9, 0.8, 0.85, 0.7, 0.75, 0.6]).tolist() + [-np.inf] * 3
    for count in (9, 4):
        answers, given_ = list("abcabcddd")[-count:], logprobs[-count:]
        got = rpc_confidence(answers, given_, lengths=np.ones(count))
        assert got.keep[-3:].tolist() == [False] * 3
        assert got.confidence[got.answers.index("d")] == 0
    nothing = rpc_confidence(["a", "b"], [-np.inf, -np.inf], lengths=[1, 1])
    assert (nothing.best, nothing.answer, nothing.top) == (None, None, 0.0)
    assert not nothing.choice.any()


def test_zeros_are_worked_on_without_warnings() -> None:
    logprobs = [*np.log([0.9, 0.8, 0.3, 0.2, 0.1]), -np.inf, -np.inf]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("ppl", "pc", "rpc"):
            for scale in ("mean", "sum"):
                got = answer_confidence(
                    list("abcabca"), logprobs, lengths=np.ones(7), method=method, normalize=scale
                )
                assert np.isfinite(got.confidence).all()


def test_sums_that_only_rounding_tells_apart_tie() -> None:
    """0.1 + 0.2 is not 0.3 in floating point; the vote and its credit both say that they tie."""
    got = answer_confidence("aab", np.log([0.1, 0.2, 0.3]), lengths=np.ones(3), method="pc")
    assert got.confidence[0] != got.confidence[1]
    np.testing.assert_allclose(got.choice, [0.25, 0.25, 0.5])
    assert got.answer == "a"


def test_too_few_to_fit_unless_asked() -> None:
    p = np.array([[0.9, 0.5, 0.1, 0.1]])
    keep, mixture = prune_reasoning(p)
    assert keep.all()
    assert np.isnan(mixture.nll).all()
    keep, mixture = prune_reasoning(p, fewest=2)
    assert np.isfinite(mixture.nll).all()


def test_a_fit_that_fails_prunes_nothing_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.array([[0.9, 0.88, 0.9, 0.1, 0.12, 0.15]])
    assert not prune_reasoning(p)[0].all()
    real = module.fit_weibull_mixtures

    def failing(x: np.ndarray) -> Any:
        return replace(real(x), converged=np.zeros(len(x), bool))

    monkeypatch.setattr(module, "fit_weibull_mixtures", failing)
    with pytest.warns(UserWarning, match="the mixture of a set of paths did not converge"):
        keep, _ = prune_reasoning(p)
    assert keep.all()


# ── answers that could not be read ──────────────────────────────────────────────────────────────


def test_what_becomes_of_null_answers() -> None:
    rng = np.random.default_rng(0)
    answers = [*"aabbc", None, None, None, None]
    logprobs, ones = np.log(np.append(rng.beta(4, 2, 5), [0.05, 0.06, 0.04, 0.05])), np.ones(9)
    seen = {i: answer_confidence(answers, logprobs, lengths=ones, invalid=i) for i in NULLS}
    assert seen["drop"].answers == seen["fit-only"].answers == ("a", "b", "c")
    assert seen["own-group"].answers == ("a", "b", "c", None)
    alone = answer_confidence(answers[:5], logprobs[:5], lengths=ones[:5])
    np.testing.assert_array_equal(seen["drop"].confidence, alone.confidence)
    for kind in ("fit-only", "own-group"):
        assert seen[kind].mixture.nll == fit_weibull_mixture(np.exp(logprobs)).nll
    votes = answer_confidence(answers, method="sc", invalid="own-group")
    assert votes.confidence.tolist() == [2 / 9, 2 / 9, 1 / 9, 4 / 9]
    assert votes.answer is None
    assert not votes.choice.any()  # it would be submitted, were it an answer


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_null_answers(method: str) -> None:
    got = answer_confidence(
        [None] * 6, [-1.0] * 6, lengths=[1] * 6, scores=[0.5] * 6, method=method
    )
    assert (got.answers, got.answer, got.best, got.top) == ((), None, None, 0.0)
    assert got.confidence.shape == (0,)
    assert not got.choice.any()


# ── selectors ───────────────────────────────────────────────────────────────────────────────────


def pool_of(problem: dict[str, Any]) -> AnswerPool:
    named = {name: problem[name] for name in ("logprobs", "lengths", "paths")}
    return AnswerPool.of(problem["answers"], rewards=problem["scores"], **named)


@pytest.mark.property
@given(problems())
def test_votes_and_best_samples_are_the_selectors_there_are(problem: dict[str, Any]) -> None:
    pool = pool_of(problem)
    for method, selector in (("sc", majority_vote), ("ppl", likeliest)):
        np.testing.assert_allclose(found(problem, method).choice, selector(pool), atol=1e-12)
    if any(s > 0 for s, a in zip(problem["scores"], problem["answers"], strict=True) if a):
        np.testing.assert_allclose(found(problem, "verb").choice, best_of_n(pool), atol=1e-12)


@pytest.mark.parametrize("selector", [perplexity_consistency, pruned_consistency])
def test_many_subsets_at_once_are_one_after_the_other(selector: Any) -> None:
    rng = np.random.default_rng(0)
    answers = np.array(["a", "b", "c", None], object)[rng.integers(0, 4, 10)]
    pool = AnswerPool.of(
        answers, logprobs=-rng.gamma(5, 1, 10), lengths=rng.integers(5, 20, 10),
        paths=rng.integers(0, 8, 10),
    )  # fmt: skip
    subsets = np.array(list(combinations(range(10), 7)))
    together = selector.of_subsets(pool, subsets)
    alone = [selector(pool.take(subset)) for subset in subsets]
    np.testing.assert_allclose(together, alone, atol=1e-12)
    assert len(np.unique(together, axis=0)) > 3
    credit = (answers == "a").astype(float)
    curve = accuracy_at_k([pool], [credit], [7, 10], selector)
    assert curve.accuracy[0] == pytest.approx((together * credit[subsets]).sum(axis=1).mean())
    assert curve.accuracy[1] == pytest.approx(selector(pool) @ credit)


def test_standings() -> None:
    """The confidence in a sample's answer; whoever stands highest is submitted."""
    rng = np.random.default_rng(1)
    answers = np.array(["a", "b", "c", None], object)[rng.integers(0, 4, 12)]
    pool = AnswerPool.of(
        answers, logprobs=-rng.gamma(5, 1, 12), lengths=np.full(12, 9), rewards=rng.random(12)
    )
    for method in METHODS:
        stands = consistency_standing(pool, method)
        chosen = choose(pool, np.arange(12)[None], method)
        assert (stands[pool.null] == -np.inf).all()
        np.testing.assert_array_equal(chosen.choice[0] > 0, stands > stands.max() - 1e-10)
        top = np.exp(stands.max()) if method in ("ppl", "verb") else stands.max()
        assert top == chosen.top[0]
    pc = perplexity_consistency_standing(pool)
    np.testing.assert_array_equal(pc, consistency_standing(pool, "pc"))
    assert len(set(pc[answers == "a"])) == 1


def test_whole_probabilities_that_are_too_small_to_write_down() -> None:
    """exp(-900) is 0 in floating point; which is the largest is known all the same."""
    for method in ("ppl", "pc", "rpc"):
        got = answer_confidence("ab", [-901.0, -900.0], method=method, normalize="sum")
        assert got.answer == "b"
        assert got.choice.tolist() == [0.0, 1.0]
    assert got.confidence[1] == pytest.approx(1 / (1 + np.exp(-1)))


def test_rows_of_different_problems() -> None:
    codes = np.array([[0, 1, 1, -1], [0, 0, 1, 2]])
    log_p = np.log([[0.5, 0.2, 0.2, 0.9], [0.1, 0.1, 0.3, 0.2]])
    paths = np.array([[0, 1, 1, 2], [0, 1, 2, 3]])
    got = choose_in_rows(codes, log_p, paths, "pc")
    want = [[0.5 / 0.7, 0.2 / 0.7, 0], [0.2 / 0.7, 0.3 / 0.7, 0.2 / 0.7]]
    np.testing.assert_allclose(got.confidence, want, rtol=1e-12)
    assert got.choice.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_refusals() -> None:
    ones = [1, 1]
    with pytest.raises(InputError, match=r"logprobs: got 0\.5 at index 1, want"):
        rpc_confidence(["a", "b"], [-1.0, 0.5], lengths=ones)
    with pytest.raises(InputError, match="logprobs: got nan at index 0"):
        rpc_confidence(["a", "b"], [np.nan, -1.0], lengths=ones)
    with pytest.raises(InputError, match="logprobs: got 1 values, want 2"):
        rpc_confidence(["a", "b"], [-1.0], lengths=ones)
    with pytest.raises(InputError, match="paths: got 1 values, want 2"):
        rpc_confidence(["a", "b"], [-1.0, -1.0], lengths=ones, paths=["x"])
    with pytest.raises(InputError, match="answers: got"):
        rpc_confidence([], [])
    with pytest.raises(InputError, match="lengths: got None"):
        rpc_confidence(["a"], [-1.0])
    with pytest.raises(InputError, match="logprobs: got None"):
        answer_confidence(["a"], lengths=[1])
    with pytest.raises(InputError, match="rewards: got None"):
        answer_confidence(["a"], method="verb")
    with pytest.raises(InputError, match=r"rewards: got 1\.5 at index 0"):
        answer_confidence(["a"], scores=[1.5], method="verb")
    with pytest.raises(InputError, match="method: got 'vote'"):
        answer_confidence(["a"], method="vote")
    with pytest.raises(InputError, match="normalize: got 'max'"):
        answer_confidence(["a"], [-1.0], normalize="max")
    with pytest.raises(InputError, match="invalid: got 'keep'"):
        answer_confidence(["a"], [-1.0], lengths=[1], invalid="keep")
    with pytest.raises(InputError, match="p: got others"):
        prune_reasoning([[0.5, 1.5]])
    with pytest.raises(InputError, match="fewest: got 1"):
        prune_reasoning([[0.5, 0.5]], fewest=1)


def test_an_equality_that_is_not_transitive_joins_the_first_that_fits() -> None:
    near = answer_confidence([1.0, 1.4, 1.8], method="sc", equal=lambda a, b: abs(a - b) < 0.5)
    assert near.answers == (1.0, 1.8)
    assert near.confidence.tolist() == [2 / 3, 1 / 3]
