"""Alignment resampling: the laws of the best of n, what it does to p-values, and its edges."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from scoredraw.errors import InputError
from scoredraw.language.alignment_resampling import (
    alignment_resample,
    ar_required_n,
    expected_gain,
    gain_bound,
    guard_shift,
    key_aware_p_value,
    outcome_shares,
    reward_score_correlation,
    select_candidates,
    watermarked_texts,
)
from scoredraw.language.watermark_detection import detect_texts
from scoredraw.language.watermarks import Watermark
from scoredraw.models import Completion, TransformersModel

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


def test_known_maxima_and_the_bound() -> None:
    assert expected_gain([1, 2, 3]) == pytest.approx(
        [0, 1 / math.sqrt(math.pi), 1.5 / math.sqrt(math.pi)], abs=1e-12
    )
    n = np.unique(np.geomspace(1, 10**9, 200).astype(np.int64))
    slack = expected_gain(n, 2.0) - gain_bound(n, 2.0)
    assert (slack >= -1e-12).all()
    assert slack[1] == pytest.approx(0, abs=1e-12)  # equal at 2: that is where C comes from
    assert (np.diff(expected_gain(n)) > 0).all()


def test_gain_of_gaussian_rewards() -> None:
    """20,000 prompts; within 4 standard errors: false alarms 6 in 100,000 a size."""
    rewards = 3 + 2 * np.random.default_rng(0).standard_normal((20_000, 8))
    for n in (1, 2, 4, 8):
        best = np.take_along_axis(rewards, select_candidates(rewards[:, :n])[:, None], 1)[:, 0]
        error = best.std() / math.sqrt(len(best))
        assert abs(best.mean() - 3 - expected_gain(n, 2.0)) < 4 * error


@pytest.mark.property
@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_more_candidates_are_never_worse(rewards: list[float]) -> None:
    row = np.array([rewards])
    best = [row[0, select_candidates(row[:, : n + 1])[0]] for n in range(len(rewards))]
    assert (np.diff(best) >= 0).all()
    assert best[0] == rewards[0]


@pytest.mark.parametrize("gap", [-1.0, 0.0, 0.3, 0.5642, 1.0, 2.0, 4.0])
def test_the_fewest_candidates_that_close_a_gap(gap: float) -> None:
    n = ar_required_n(gap, 1.0)
    assert expected_gain(n) >= gap
    assert n == 1 or expected_gain(n - 1) < gap


# ── p-values of what was selected ───────────────────────────────────────────────────────────────


def test_a_choice_blind_to_the_key_leaves_p_values_uniform() -> None:
    """1,500 prompts, the best of four texts that know no key. False alarms: 1 in 1,000 a line."""
    rng = np.random.default_rng(2)
    ids = rng.integers(256, size=(1500, 4, 30))
    p = detect_texts(ids.reshape(6000, 30), Watermark(256, "gumbel", context=2)).p_value
    p = p.reshape(1500, 4)
    rewards = (ids == 7).sum(axis=2) + rng.random((1500, 4))  # a reward of the text
    blind = p[np.arange(1500), select_candidates(rewards)]
    assert kstest(blind, "uniform").pvalue > 0.001
    seeing = p[np.arange(1500), select_candidates(-p)]
    assert kstest(seeing, "uniform").pvalue < 1e-9
    assert kstest(key_aware_p_value(seeing, 4), "uniform").pvalue > 0.001


def test_a_reward_that_goes_with_the_score_is_seen() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((400, 4))
    shift = 10 * rng.standard_normal((400, 1))  # between prompts: must not count
    rewards = -scores + rng.standard_normal((400, 4)) + shift
    found = reward_score_correlation(rewards, scores + shift)
    assert found.low < -1 / math.sqrt(2) < found.high
    assert found.below(-0.6)
    unrelated = reward_score_correlation(rng.standard_normal((400, 4)) + shift, scores + shift)
    assert abs(unrelated.value) < 4 / math.sqrt(1200)


# ── the choice ──────────────────────────────────────────────────────────────────────────────────


def texts_of(prompts: Any, n: int) -> list[list[str]]:
    return [[f"{prompt} {'!' * ((7 * i) % n)}" for i in range(n)] for prompt in prompts]


def test_one_candidate_is_what_there_is() -> None:
    out = alignment_resample(texts_of, lambda texts: [len(t) for t in texts], ["a", "bb"], n=1)
    assert [each.text for each in out] == ["a ", "bb "]
    assert [each.chosen for each in out] == [0, 0]


def test_the_best_and_the_baselines() -> None:
    asked = []

    def reward(texts: list[str]) -> list[float]:
        asked.append(texts)
        return [text.count("!") for text in texts]

    best = alignment_resample(texts_of, reward, ["a", "b"], n=4)
    assert [each.reward for each in best] == [3, 3]
    assert len(asked) == 1
    assert best[0].rewards.tolist() == [0, 3, 2, 1]
    first = alignment_resample(texts_of, reward, ["a"], n=4, select="first")
    assert first[0].reward == 0
    some = [alignment_resample(texts_of, reward, ["a"] * 50, n=4, select="random", rng=1)
            for _ in range(2)]  # fmt: skip
    assert {each.chosen for each in some[0]} == {0, 1, 2, 3}
    assert [each.chosen for each in some[0]] == [each.chosen for each in some[1]]

    def known(prompts: Any, n: int) -> list[list[Completion]]:
        logprobs = [np.array([-1.0] * 9), np.array([-0.5]), np.zeros(0)]
        return [[Completion(str(i), lp) for i, lp in enumerate(logprobs)] for _ in prompts]

    def equal(texts: list[str]) -> list[float]:
        return [0.0] * len(texts)

    (likeliest,) = alignment_resample(known, equal, ["a"], n=3, select="perplexity")
    assert likeliest.chosen == 1
    (tied,) = alignment_resample(known, equal, ["a"], n=3)
    assert tied.chosen == 0


def test_rewards_that_want_the_prompt_are_asked_as_trl_does() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(p == c[0]) - len(c) for p, c in zip(prompts, completions, strict=True)]

    out = alignment_resample(texts_of, reward, ["a", "b"], n=2)
    assert [each.reward for each in out] == [-1, -1]


def test_candidates_that_are_all_the_same_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="all candidates of every prompt are the same"):
        alignment_resample(lambda ps, n: [["x"] * n for _ in ps], lambda t: [0.0] * len(t), "ab")


# ── with a model ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.contract
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_without_a_watermark_the_samples_are_the_models(tiny: Any, how: dict[str, float]) -> None:
    prompts = ["Once", [{"role": "user", "content": "Why?"}]]
    ours = watermarked_texts(*tiny, prompts, 3, scheme="none", max_tokens=9, seed=4, **how)
    plain = TransformersModel(*tiny).sample_all(prompts, 3, max_tokens=9, seed=4, **how)
    for mine, theirs in zip(chain(*ours), chain(*plain), strict=True):
        assert (mine.text, mine.tokens) == (theirs.text, theirs.tokens)
        assert mine.finished == theirs.finished
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.contract
@pytest.mark.parametrize("scheme", ["kgw", "gumbel", "randomised", "permute_and_flip"])
def test_what_is_written_is_read(tiny: Any, scheme: str) -> None:
    """Eight texts of 60 tokens each: all found at 1e-4, none with another key at 1e-3."""
    steps: list[tuple[int, int]] = []
    made = watermarked_texts(
        *tiny, [f"Story {i}" for i in range(8)], scheme=scheme, key=3, context=2, delta=5.0,
        max_tokens=60, seed=0, progress=lambda *step: steps.append(step),
    )  # fmt: skip
    ids = [sample[0].tokens for sample in made]
    read = {k: detect_texts(ids, Watermark(258, scheme, key=k, context=2)) for k in (3, 4)}
    long = read[3].n_scored > 30
    assert long.sum() > 4
    assert (read[3].p_value[long] < 1e-4).all()
    assert (read[4].p_value > 1e-3).all()
    assert steps[-1] == (8, 8)


@pytest.mark.contract
def test_fixed_schemes_give_the_same_text_and_say_so(tiny: Any) -> None:
    with pytest.warns(UserWarning, match="all 3 samples by gumbel are the same"):
        (same,) = watermarked_texts(*tiny, ["a"], 3, scheme="gumbel", max_tokens=12, seed=0)
    assert len({each.tokens for each in same}) == 1
    (differ,) = watermarked_texts(*tiny, ["a"], 3, scheme="randomised", max_tokens=12, seed=0)
    assert len({each.tokens for each in differ}) == 3


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────


def test_the_simplex_of_outcomes() -> None:
    before = ["safe"] * 8 + ["unsafe", "over-refusal"]
    after = ["unsafe"] * 2 + ["over-refusal"] * 3 + ["safe"] * 4 + ["over-refusal"]
    shift = guard_shift(before, after)
    assert sum(share.value for share in shift.after.values()) == pytest.approx(1)
    assert (shift.attenuated.value, shift.amplified.value) == (0.2, 0.3)
    assert shift.before["safe"].value == 0.8
    assert outcome_shares(["safe"])["unsafe"].low == 0


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def scored(values: Any) -> Any:
    return alignment_resample(texts_of, lambda texts: values, ["a", "b"], n=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment_resample(texts_of, len, ["a"], n=0), "n: got 0, want at least one"),
        (lambda: alignment_resample(texts_of, len, ["a"], select="best"), "select: got 'best'"),
        (lambda: alignment_resample(lambda p, n: [["x"]], len, ["a"], n=2),
         "generate: got another number of candidates"),
        (lambda: scored([1, 2, math.nan, 4]), "reward: got NaN for candidate 0 of prompt 1"),
        (lambda: scored([1, 2, 3]), r"reward: got shape \(3,\), want 4 numbers"),
        (lambda: alignment_resample(texts_of, lambda t: [0.0] * 2, ["a"], 2, select="perplexity"),
         "generate: got a candidate without logprobs"),
        (lambda: select_candidates([1.0]), "rewards: got 1 dimensions"),
        (lambda: expected_gain(0), "n: got 0"),
        (lambda: gain_bound(0), "n: got 0"),
        (lambda: expected_gain(2, -1.0), "sigma: got -1.0"),
        (lambda: ar_required_n(1.0, 0.0), "sigma: got 0.0"),
        (lambda: ar_required_n(math.nan, 1.0), "gap: got nan"),
        (lambda: ar_required_n(20.0, 1.0), "gap: got 20 sigma"),
        (lambda: key_aware_p_value(1.2, 2), "p: got other numbers"),
        (lambda: key_aware_p_value(0.5, 0), "n: got 0"),
        (lambda: outcome_shares([]), "outcomes: got none"),
        (lambda: outcome_shares(["safe", "odd"]), "outcomes: got 'odd' at index 1"),
        (lambda: guard_shift(["safe"], ["safe", "safe"]), "after: got 2 outcomes, want 1"),
        (lambda: reward_score_correlation([[1.0, 2.0]], [[1.0]]), r"scores: got shape \(1, 1\)"),
        (lambda: reward_score_correlation([[1.0]], [[1.0]]), "rewards: got shape"),
        (lambda: reward_score_correlation([[1.0, 1.0]], [[1.0, 2.0]]), "rewards: got no variation"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "best"}, "scheme: got 'best'"),
        ({"gamma": 2.0, "scheme": "kgw"}, "gamma: got 2.0"),
        ({"context": 0}, "context: got 0"),
        ({"n": 0}, "n: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 5000}, "prompt: got 5001 tokens with the reply"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
    ],
)
def test_generation_that_is_refused(tiny: Any, change: dict[str, Any], message: str) -> None:
    given_ = {"n": 1, "max_tokens": 4} | change
    with pytest.raises(InputError, match=message):
        watermarked_texts(*tiny, ["a"], given_.pop("n"), **given_)


def test_cold_texts_are_warned_of(tiny: Any) -> None:
    with pytest.warns(UserWarning, match="temperature: at 0"):
        watermarked_texts(*tiny, ["a"], temperature=0.0, max_tokens=2)
