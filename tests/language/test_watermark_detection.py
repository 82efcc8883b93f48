"""Detectors: exact under H0, as strong as the formula says, and agreeing with transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom, kstest

from scoredraw.errors import InputError
from scoredraw.language.watermark_detection import (
    GUMBEL_DEVIATION,
    audit_watermark,
    detect,
    detect_synthid,
    detect_texts,
    expected_green_z,
    green_count_test,
    green_mass,
    holm,
    score_sum_test,
    score_z,
    tokens_needed,
    windows,
)
from scoredraw.language.watermarks import (
    Watermark,
    draw_tokens,
    expected_gumbel_score,
    expected_randomised_score,
)

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

V, TOKENS = 256, 40


def random_texts(n: int, tokens: int = TOKENS, rng: int = 0) -> np.ndarray:
    return np.random.default_rng(rng).integers(V, size=(n, tokens))


def written(mark: Watermark, logits: np.ndarray, n: int, tokens: int, rng: int = 0) -> np.ndarray:
    """Texts whose tokens are independent draws from one law, but for the watermark: (n, tokens)."""
    source = np.random.default_rng(rng)
    ids = source.integers(mark.vocab_size, size=(n, mark.context))
    rows = torch.tensor(logits).expand(n, -1)
    for _ in range(tokens):
        last = mark.contexts(ids)
        new = draw_tokens(rows, last, mark, source.random(n)).numpy()
        ids = np.column_stack([ids, new])
    return ids


# ── under H0 ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["gumbel", "permute_and_flip"])
def test_p_values_of_scores_are_uniform(scheme: str) -> None:
    """2,000 texts. False alarms of each uniform law: 1 in 1,000."""
    found = detect_texts(random_texts(2000), Watermark(V, scheme, key=5, context=2))
    assert (found.n_scored == TOKENS - 2).mean() > 0.99
    assert kstest(found.p_value, "uniform").pvalue > 0.001


def test_the_released_z_is_not_uniform() -> None:
    """Its σ is the Gumbel deviation: p-values crowd in the middle, and z is 22 % too small."""
    found = detect_texts(random_texts(2000), Watermark(V, "gumbel", key=5, context=2))
    released = score_z(found.statistic, found.n_scored, GUMBEL_DEVIATION)
    np.testing.assert_allclose(released / found.z, math.sqrt(6) / math.pi)
    assert 1 - math.sqrt(6) / math.pi == pytest.approx(0.22, abs=0.001)
    assert kstest(ndtr(-released), "uniform").pvalue < 1e-6


def test_p_values_of_counts_are_conservative() -> None:
    """2,000 texts: the counts are binomial, and P(p ≤ a) ≤ a within 4 standard errors."""
    mark = Watermark(V, "kgw", key=5, context=2, gamma=0.3)
    assert mark.green_share == 76 / 256  # not γ: ⌊γV⌋ tokens are green
    found = detect_texts(random_texts(2000), mark, dedup="none")
    for level in (0.5, 0.2, 0.05, 0.01):
        error = math.sqrt(level * (1 - level) / 2000)
        assert (found.p_value <= level).mean() < level + 4 * error
    shares = np.bincount(found.statistic.astype(int), minlength=TOKENS)[:TOKENS] / 2000
    law = binom.pmf(np.arange(TOKENS), TOKENS - 2, mark.green_share)
    assert np.abs(np.cumsum(shares) - np.cumsum(law)).max() < 1.95 / math.sqrt(2000)


def test_repetition_makes_p_values_wrong_unless_counted_once() -> None:
    """Texts of four tokens over and over: 500 of them, and one in six is flagged at 1 %."""
    texts = np.tile(random_texts(500, tokens=4), 25)
    mark = Watermark(V, "gumbel", key=5, context=2)
    wrong = detect_texts(texts, mark, dedup="none")
    assert (wrong.p_value <= 0.01).mean() > 0.1
    for dedup in ("v1", "v2"):
        right = detect_texts(texts, mark, dedup=dedup)
        assert set(right.n_scored.tolist()) <= {2, 3, 4}
        assert (right.p_value <= 0.01).mean() < 0.01 + 4 * math.sqrt(0.01 * 0.99 / 500)


# ── power ───────────────────────────────────────────────────────────────────────────────────────


def test_the_power_of_green_lists() -> None:
    """Mean z of 300 texts against √T (g - γ)/√(γ(1-γ)): 4 standard errors."""
    mark = Watermark(64, "kgw", key=3, context=2, delta=1.5)
    logits = np.random.default_rng(1).standard_normal(64)
    texts = written(mark, logits, 300, 60)
    found = detect_texts(texts, mark, dedup="none")
    p = np.exp(logits) / np.exp(logits).sum()
    green = np.zeros((2000, 64), bool)
    for seed in range(2000):
        green[seed, mark.green_tokens(seed).numpy()] = True
    g = float(np.mean(green_mass(np.broadcast_to(p, green.shape), green, mark.delta)))
    want = expected_green_z(g, 60, 0.25)
    assert (found.n_scored == 60).all()
    assert abs(found.z.mean() - want) < 4 * found.z.std() / math.sqrt(300)
    assert want > 3


@pytest.mark.parametrize("scheme", ["gumbel", "randomised"])
def test_the_power_of_scores(scheme: str) -> None:
    """A token's mean score is the law's: 4 standard errors; with the wrong key it is 1."""
    p = np.array([0.4, 0.3, 0.2, 0.1] + [0.0] * 60)
    mark = Watermark(64, scheme, key=3, context=9)  # wide contexts, so that none is met twice
    with np.errstate(divide="ignore"):
        texts = written(mark, np.log(p), 300, 40)
    found = detect_texts(texts, mark)
    want = expected_gumbel_score(p) if scheme == "gumbel" else expected_randomised_score(p)
    rates = found.statistic / found.n_scored
    assert abs(rates.mean() - want) < 4 * rates.std() / math.sqrt(300)
    other = detect_texts(texts, Watermark(64, scheme, key=4, context=9))
    rates = other.statistic / other.n_scored
    assert abs(rates.mean() - 1) < 4 * rates.std() / math.sqrt(300)


def test_how_many_tokens_are_needed() -> None:
    for strength, gamma in ((1.5, None), (1.2, None), (0.5, 0.25), (1.0, 0.5)):
        t = tokens_needed(strength, 0.001, gamma=gamma)
        for at, enough in ((t, True), (t - 1, False)):
            if gamma is None:
                p = score_sum_test(strength * at, at).p_value[0]
            else:
                p = green_count_test(math.floor(strength * at), at, gamma).p_value[0]
            assert (p <= 0.001) == enough


# ── which tokens count ──────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from(["none", "v1", "v2"]),
)
def test_windows_are_those_of_a_loop(texts: list[list[int]], h: int, dedup: str) -> None:
    wanted = []
    for i, ids in enumerate(texts):
        seen = set()
        for at in range(h, len(ids)):
            context, token = tuple(ids[at - h : at]), ids[at]
            mark = {"none": at, "v1": context, "v2": (context, token)}[dedup]
            if mark not in seen:
                seen.add(mark)
                wanted.append((i, context, token))
    home, contexts, tokens = windows(texts, Watermark(4, context=h), dedup)
    found = list(zip(home.tolist(), map(tuple, contexts.tolist()), tokens.tolist(), strict=True))
    assert found == wanted


def test_many_texts_are_as_one_by_one() -> None:
    texts = [
        row[:length] for row, length in zip(random_texts(6), (40, 3, 2, 0, 17, 40), strict=True)
    ]
    for scheme in ("kgw", "randomised"):
        mark = Watermark(V, scheme, context=2)
        steps: list[tuple[int, int]] = []
        found = detect_texts(texts, mark, progress=lambda *s, to=steps: to.append(s))
        assert [found[i] for i in range(6)] == [detect(text, mark) for text in texts]
        assert found.n_scored.tolist() == [38, 1, 0, 0, 15, 38]
        assert found.p_value[2:4].tolist() == [1, 1]
        assert steps[-1][0] == steps[-1][1] == len(steps)


@pytest.mark.contract
def test_transformers_counts_the_same_green_tokens() -> None:
    """Our detector reads texts of transformers' watermark, and its own agrees."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=V, bos_token_id=0)
    settings_ = transformers.WatermarkingConfig(greenlist_ratio=0.25, bias=2.0)
    texts = random_texts(5, 60) % 12  # few tokens, so that pairs repeat
    texts[:, 0] = 1  # a start token would not be scored there
    for dedup, ignore in (("none", False), ("v2", True)):
        theirs = transformers.WatermarkDetector(config, "cpu", settings_, ignore)(
            torch.tensor(texts), return_dict=True
        )
        ours = detect_texts(texts, Watermark(V, seeding="lefthash"), dedup=dedup)
        assert ours.statistic.tolist() == theirs.num_green_tokens.tolist()
        assert ours.n_scored.tolist() == theirs.num_tokens_scored.tolist()
        np.testing.assert_allclose(ours.z, theirs.z_score, rtol=1e-12)
        np.testing.assert_allclose(ours.p_normal, theirs.p_value, atol=1e-7)


@pytest.mark.contract
def test_synthid_coins_are_those_of_transformers() -> None:
    """S is the sum of its own g values; without the keys 200 texts are flagged as by chance."""
    transformers = pytest.importorskip("transformers")

    def make(*keys: int) -> Any:
        return transformers.SynthIDTextWatermarkLogitsProcessor(3, list(keys), 1000, 0, 64, "cpu")

    texts = random_texts(200)
    found = detect_synthid([*texts, texts[0][:2], []], make(5, 9, 13))
    own = make(5, 9, 13).compute_g_values(torch.tensor(texts)).sum(dim=(1, 2))
    once = found.n_scored[:200] == 3 * (TOKENS - 2)
    assert once.mean() > 0.95
    assert (found.statistic[:200][once] == own.numpy()[once]).all()
    assert (found.p_value[:200] <= 0.05).mean() < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)
    assert found.n_scored[200:].tolist() == [0, 0]
    assert found.p_value[200:].tolist() == [1, 1]
    processor, source = make(*range(1, 11)), np.random.default_rng(0)
    ids = torch.zeros(8, 1, dtype=torch.long)
    for _ in range(40):
        law = torch.log_softmax(processor(ids, torch.zeros(8, V)), -1).numpy().astype(np.float64)
        new = (law + source.gumbel(size=law.shape)).argmax(axis=1)
        ids = torch.cat([ids, torch.tensor(new)[:, None]], dim=1)
    assert (detect_synthid(ids[:, 1:].numpy(), make(*range(1, 11))).p_value < 1e-4).all()


# ── edges ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_green_nothing_scored() -> None:
    assert green_count_test([0, 0], [20, 0]).p_value.tolist() == [1, 1]
    assert green_count_test(5, 5, 1.0).p_value.tolist() == [1]
    assert score_sum_test([0.0, 0.0], [0, 3]).p_value.tolist() == [1, 1]
    assert score_sum_test(1e4, 10).p_value[0] >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: green_count_test(3, 2), "green: got another count"),
        (lambda: green_count_test(1, 2, 0.0), "gamma: got 0.0"),
        (lambda: green_count_test(1.5, 2), "green: got 1.5, want whole numbers"),
        (lambda: score_sum_test(-1.0, 2), "score: got negative"),
        (lambda: score_sum_test(math.nan, 2), "score: got negative or NaN"),
        (lambda: detect([1, V], Watermark(V)), f"texts: got token id {V}, want ids below {V}"),
        (lambda: detect([1, -1], Watermark(V)), "texts: got token id -1"),
        (lambda: detect([1, 2], Watermark(V), dedup="v3"), "dedup: got 'v3'"),
        (lambda: tokens_needed(1.0), "strength: got 1.0"),
        (lambda: tokens_needed(0.2, gamma=0.25), "strength: got 0.2"),
        (lambda: tokens_needed(1.5, 0.0), "alpha: got 0.0"),
        (lambda: tokens_needed(1.0000001), "a million tokens"),
        (lambda: audit_watermark([], vocab_size=V), "texts: got none"),
        (lambda: audit_watermark(["a"], vocab_size=V), "tokenizer: got None"),
        (lambda: audit_watermark([[1]]), "vocab_size: got None"),
        (lambda: audit_watermark([[1]], vocab_size=V, alpha=1.0), "alpha: got 1.0"),
        (lambda: audit_watermark([[1]], vocab_size=V, other_keys=-1), "other_keys: got -1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ── the audit ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["kgw", "randomised"])
def test_an_audit_finds_the_watermarked_half(scheme: str) -> None:
    mark = Watermark(V, scheme, key=8, context=2, delta=4.0)
    logits = np.random.default_rng(1).standard_normal(V)
    texts = [*written(mark, logits, 20, 60), *random_texts(20, 60), *random_texts(4, 9)]
    audit = audit_watermark(
        texts, scheme=scheme, key=8, context=2, vocab_size=V, alpha=0.01, other_keys=4
    )
    assert audit.holm[:20].all()
    assert (audit.bh >= audit.holm).all()
    assert audit.flagged[20:].sum() <= 3
    assert audit.holm[20:].sum() <= 1
    assert audit.n_detected["alone"] == audit.flagged.sum()
    assert audit.undecidable[40:].all()
    assert not audit.undecidable[:20].any()
    assert 0 < audit.by_chance < 0.01 + 1e-12
    assert audit.with_other_keys is not None
    assert audit.with_other_keys.low <= 0.01
    assert audit.with_other_keys.n == 4 * 44


def test_chance_of_a_count_is_exact() -> None:
    audit = audit_watermark([list(range(11))], vocab_size=V, alpha=0.05, other_keys=0)
    p = green_count_test(np.arange(11), 10).p_value
    law = binom.pmf(np.arange(11), 10, 0.25)
    assert audit.by_chance == pytest.approx(law[p <= 0.05].sum(), abs=1e-12)
    assert audit.with_other_keys is None


def test_an_audit_of_strings(tiny_model: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    strings = ["Once upon a time.", "There was a girl."]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings]
    found = audit_watermark(strings, tokenizer=tokenizer, other_keys=0).detections
    assert found.p_value.tolist() == detect_texts(ids, Watermark(len(tokenizer))).p_value.tolist()


@pytest.mark.property
@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_is_its_definition(p: list[float], alpha: float) -> None:
    order = np.argsort(p, kind="stable")
    going, wanted = True, [False] * len(p)
    for rank, i in enumerate(order):
        going = going and p[i] * (len(p) - rank) <= alpha
        wanted[i] = going
    assert holm(p, alpha).tolist() == wanted
