"""Hedged pools from functions, models and servers; hope and risk by listing every subset."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.language import hedged_sampling
from scoredraw.language.hedged_sampling import (
    MIN_P,
    cross_language_evidence,
    cross_language_prompt,
    evidence_language,
    hedged_pool,
    hedged_texts,
    hope_and_risk,
    sample_pool,
)
from scoredraw.language.selection import likeliest, majority_vote
from scoredraw.models import Completion, TransformersModel


class Recorder:
    """A source that remembers how it was asked; a text says what it comes from."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def sample(self, prompt: Any, n: int, **how: Any) -> list[str]:
        self.asked.append({"prompt": prompt, "n": n, **how})
        return [f"{prompt} {how['temperature']} {how['seed']} {i}" for i in range(n)]


class Batches(Recorder):
    """A source that takes many prompts at once."""

    def sample_all(self, prompts: Any, n: int, *, progress: Any, **how: Any) -> Any:
        self.asked.append({"prompts": list(prompts), "n": n, **how})
        progress(0, n * len(prompts))
        return [[Completion(f"{p} {how['temperature']}") for _ in range(n)] for p in prompts]


# ── one prompt ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("n", [1, 2, 5])
def test_exactly_one_greedy_sample_and_it_comes_first(n: int) -> None:
    source = Recorder()
    pool = hedged_pool(source, "?", n, temperature=0.9, min_p=MIN_P, max_tokens=7, seed=3)
    assert pool.temperatures.tolist() == [0.0] + [0.9] * (n - 1)
    assert pool.texts[0] == "? 0.0 3 0"
    assert len({*pool.texts}) == n
    assert source.asked[0] == {
        "prompt": "?", "n": 1, "temperature": 0.0, "seed": 3, "max_tokens": 7
    }  # fmt: skip
    assert [asked["n"] for asked in source.asked[1:]] == [n - 1] * (n > 1)
    assert all(asked["min_p"] == MIN_P for asked in source.asked[1:])
    again = hedged_pool(Recorder(), "?", n, temperature=0.9, seed=3)
    assert again.texts == pool.texts


@pytest.mark.oracle
def test_several_temperatures_keep_their_places_and_have_seeds_of_their_own() -> None:
    source = Recorder()
    pool = sample_pool(source, "?", [1.2, 0.0, 0.7, 1.2])
    assert [text.split()[1] for text in pool.texts] == ["1.2", "0.0", "0.7", "1.2"]
    assert [text.split()[3] for text in pool.texts] == ["0", "0", "0", "1"]
    assert [asked["n"] for asked in source.asked] == [2, 1, 1]
    assert len({asked["seed"] for asked in source.asked}) == 3
    assert {asked["seed"] for asked in sources_of(seed=None)} == {None}


def sources_of(**how: Any) -> list[dict[str, Any]]:
    source = Recorder()
    sample_pool(source, "?", [0.5, 1.0], **how)
    return source.asked


@pytest.mark.oracle
def test_greedy_samples_are_all_the_same() -> None:
    source = Recorder()
    with pytest.warns(UserWarning, match="3 greedy samples are all the same"):
        pool = sample_pool(source, "?", [0.0, 0.0, 0.0])
    assert pool.texts == ("? 0.0 0 0",) * 3
    assert source.asked[0]["n"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hedged_pool(source, "?", 1, temperature=0.0)


@pytest.mark.oracle
def test_copies_stay_unless_told_otherwise() -> None:
    def generate(prompt: str, n: int, temperature: float, seed: int) -> list[str]:
        return ["same"] * n if temperature == 0 else ["other", "same", "other", "new"][:n]

    assert hedged_pool(generate, "?").texts == ("same", "other", "same", "other", "new")
    pool = hedged_pool(generate, "?", dedup=True)
    assert pool.texts == ("same", "other", "new")
    assert pool.temperatures.tolist() == [0.0, 0.7, 0.7]


@pytest.mark.oracle
def test_a_pool_goes_on_to_the_selectors() -> None:
    def generate(prompt: str, n: int, temperature: float, seed: int) -> list[Completion]:
        logprobs = np.array([-1.0, -0.5 - temperature])
        return [Completion(f"it is {7 + (temperature > 0)}", logprobs)] * n

    pool = hedged_pool(generate, "?", 3).answers(lambda text: text.split()[-1])
    assert pool.answers == ("it is 7", "it is 8")
    assert majority_vote(pool).tolist() == [0.0, 0.5, 0.5]
    assert likeliest(pool).tolist() == [1.0, 0.0, 0.0]
    assert pool.lengths is not None
    assert pool.lengths.tolist() == [2, 2, 2]
    plain = hedged_pool(Recorder(), "?", 2).answers()
    assert plain.logprobs is None
    assert plain.texts is not None


# ── many prompts ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_portions_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedged_sampling, "ROWS", 8)
    source, told = Batches(), []
    pools = hedged_texts(
        source, ["a", "b", "c"], 4, max_tokens=9, progress=lambda d, t: told.append((d, t))
    )
    texts = [[c.text for c in pool] for pool in pools]
    assert texts == [[f"{p} 0.0"] + [f"{p} 0.7"] * 3 for p in "abc"]
    assert [(a["prompts"], a["n"], a["first"]) for a in source.asked] == [
        (["a", "b"], 1, 0), (["a", "b"], 3, 0), (["c"], 1, 2), (["c"], 3, 2)
    ]  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == (12, 12)
    assert [len(pool) for pool in hedged_texts(source, ["a"], 1)] == [1]
    assert hedged_texts(source, [], 3) == []
    many = hedged_texts(Batches(), ["a"] * 3, 2, seed=None)  # one fresh seed for all portions
    assert len(many) == 3


@pytest.mark.oracle
def test_prompt_by_prompt_where_a_model_takes_one() -> None:
    source, told = Recorder(), []
    pools = hedged_texts(source, ["a", "b"], 3, progress=lambda d, t: told.append((d, t)))
    assert [[c.text.split()[:2] for c in pool] for pool in pools] == [
        [[p, "0.0"], [p, "0.7"], [p, "0.7"]] for p in "ab"
    ]
    assert told == [(3, 6), (6, 6)]
    seeds_of_samples = [a["seed"] for a in source.asked if a["temperature"] > 0]
    assert len(set(seeds_of_samples)) == 2


@pytest.mark.contract
def test_a_model_of_transformers(tiny_model: str) -> None:
    pytest.importorskip("transformers", reason="the extra language is not installed")
    from scoredraw.small_models import load_model

    model = TransformersModel(*load_model(tiny_model), max_new_tokens=6)
    vocabulary = list(model.tokenizer.get_vocab())
    prompts = [" ".join(vocabulary[5:9]), " ".join(vocabulary[7:10])]
    pools = hedged_texts(model, prompts, 4, temperature=1.5)
    for prompt, pool in zip(prompts, pools, strict=True):
        greedy = model.sample(prompt, temperature=0.0)[0]
        assert pool[0].tokens == greedy.tokens
        assert len({c.tokens for c in pool[1:]} - {greedy.tokens}) > 1
        assert all(c.logprobs is not None and len(c.logprobs) <= 6 for c in pool)
    again = hedged_texts(model, prompts, 4, temperature=1.5)
    assert [[c.tokens for c in pool] for pool in again] == [
        [c.tokens for c in pool] for pool in pools
    ]
    alone = hedged_pool(model, prompts[0], 4, temperature=1.5)  # the same pool, asked for alone
    assert [c.tokens for c in alone.completions] == [c.tokens for c in pools[0]]
    cut = hedged_texts(model, prompts[:1], 4, temperature=1.5, min_p=1 - 1e-9)
    assert {c.tokens for c in cut[0]} == {pools[0][0].tokens}  # the likeliest token is left


# ── other languages ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_evidence_in_another_language() -> None:
    assert [evidence_language(x) for x in ("en", "EN-us", "de", "zh-Hant-TW")] == [
        "zh", "zh", "en", "en"
    ]  # fmt: skip
    messages = [{"role": "user", "content": "Was?"}]
    assert cross_language_prompt(messages, "en")[-1] == {
        "role": "user", "content": "Was?\n\nAnswer in English."
    }  # fmt: skip
    assert messages[0]["content"] == "Was?"
    assert "code sw" in str(cross_language_prompt("Nini?", "sw"))
    source = Recorder()
    texts = cross_language_evidence(source, "What?", "en", temperature=0.9)
    assert len(texts) == 3
    assert {asked["prompt"] for asked in source.asked} == {"What?\n\nAnswer in Chinese."}


# ── hope and risk ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_hope_and_risk_are_means_over_every_subset(
    seed: int, prompts: int, n: int, hedged: bool
) -> None:
    rng = np.random.default_rng(seed)
    s, g = rng.integers(0, 5, (prompts, n)) - 1.0, rng.integers(1, 5, prompts) * 1.0
    for size in range(1, n + hedged + 1):
        found = hope_and_risk(s, g, size, hedged=hedged)
        pools = [
            [[*row[list(some)], *([own] if hedged else [])]
             for some in combinations(range(n), size - hedged)]
            for row, own in zip(s, g, strict=True)
        ]  # fmt: skip
        best = np.array([np.mean([max(pool) for pool in each]) for each in pools]) - g
        worst = np.array([np.mean([min(pool) for pool in each]) for each in pools]) - g
        np.testing.assert_allclose(found.best, best, atol=1e-12)
        np.testing.assert_allclose(found.worst, worst, atol=1e-12)
        assert found.hope == pytest.approx(100 * best.mean() / g.mean())
        assert found.risk == pytest.approx(100 * worst.mean() / g.mean())
        if hedged:  # the guarantee, prompt by prompt
            assert (found.best >= 0).all()
            assert (found.worst <= 0).all()


@pytest.mark.oracle
def test_without_the_hedge_hope_and_risk_can_change_sides() -> None:
    found = hope_and_risk([[1.0, 2.0], [9.0, 8.0]], [4.0, 4.0])
    assert found.best.tolist() == [-2.0, 5.0]
    assert found.worst.tolist() == [-3.0, 4.0]


@pytest.mark.oracle
def test_against_the_mean_single_sample() -> None:
    found = hope_and_risk([[-1.0, -3.0], [-4.0, -4.0]])
    assert (found.hope, found.risk) == (pytest.approx(100 / 6), pytest.approx(-100 / 6))
    assert hope_and_risk([[1.0, 3.0]], size=1).hope == pytest.approx(0)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: hedged_pool(s, "?", 0), "n: got 0"),
        (lambda s: hedged_pool(s, "?", temperature=-0.1), "temperature: got -0.1"),
        (lambda s: hedged_pool(s, "?", temperature=0.0), "temperature: got 0.0"),
        (lambda s: hedged_pool(s, "?", min_p=1.0), "min_p: got 1.0"),
        (lambda s: hedged_pool(s, "?", min_p=-0.1), "min_p: got -0.1"),
        (lambda s: sample_pool(s, "?", [0.5, -1.0]), "temperatures: got"),
        (lambda s: sample_pool(s, "?", [np.nan]), "temperatures: got"),
        (lambda s: sample_pool(s, "?", []), "temperatures: got shape"),
        (lambda s: sample_pool(3, "?", [1.0]), "source: got int"),
        (lambda s: hedged_texts(s, ["?"], 0), "n: got 0"),
        (lambda s: hedged_texts(s, ["?"], min_p=2.0), "min_p: got 2.0"),
        (lambda s: hedged_texts(s, ["?"], temperature=-1.0), "temperature: got -1.0"),
        (lambda s: evidence_language("no language"), "language: got 'no language'"),
        (lambda s: evidence_language(""), "language: got ''"),
        (lambda s: hope_and_risk([1.0, 2.0]), "scores: got shape"),
        (lambda s: hope_and_risk(np.zeros((2, 0))), "scores: got shape"),
        (lambda s: hope_and_risk([[1.0, np.nan]]), "scores: got NaN"),
        (lambda s: hope_and_risk([[1.0, 2.0]], [np.inf]), "greedy: got NaN or infinity"),
        (lambda s: hope_and_risk([[1.0, 2.0]], [1.0, 2.0]), "greedy: got shape"),
        (lambda s: hope_and_risk([[1.0, 2.0]], [0.0]), "greedy: got mean 0"),
        (lambda s: hope_and_risk([[1.0, -1.0]]), "scores: got mean 0"),
        (lambda s: hope_and_risk([[1.0, 2.0]], size=3), "size: got 3"),
        (lambda s: hope_and_risk([[1.0, 2.0]], size=0), "size: got 0"),
        (lambda s: hope_and_risk([[1.0, 2.0]], hedged=True), "greedy: got None"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    source = Recorder()
    with pytest.raises(InputError, match=message) as caught:
        call(source)
    assert "\n" not in str(caught.value)
    assert not source.asked  # before any work


@pytest.mark.oracle
def test_a_source_that_does_not_know_min_p() -> None:
    def plain(prompt: str, n: int, temperature: float, seed: int) -> list[str]:
        return ["text"] * n

    assert hedged_pool(plain, "?").texts == ("text",) * 5
    for call in (hedged_pool, hedged_texts):
        with pytest.raises(InputError, match=r"min_p: got 0.1, want 0 for function"):
            call(plain, "?", min_p=MIN_P)


@pytest.mark.oracle
def test_a_source_that_gives_too_few() -> None:
    def lazy(prompt: str, n: int, **how: Any) -> list[str]:
        return ["one"]

    with pytest.raises(InputError, match="source: got 1 samples, want the 4"):
        hedged_pool(lazy, "?")
