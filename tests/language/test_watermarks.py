"""Watermark samplers: seeds, laws over keys, limits, and transformers as the other side."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from scoredraw import categorical
from scoredraw.errors import InputError
from scoredraw.language.watermarks import (
    FIXED,
    SALT,
    SCHEMES,
    SEEDINGS,
    TABLE,
    GreenListProcessor,
    KeyedDrawProcessor,
    Watermark,
    add_green_bias,
    context_seeds,
    draw_tokens,
    expected_gumbel_score,
    expected_randomised_score,
    keyed_uniforms,
    randomised_gumbel_marginal,
    token_law,
)

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

P = np.array([0.6, 0.3, 0.1])
KEYS = 20_000


def contexts_of(n: int, h: int = 2, v: int = 1000, rng: int = 0) -> np.ndarray:
    return np.random.default_rng(rng).integers(v, size=(n, h))


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)
def fixed_table() -> Any:
    return torch.randperm(TABLE, generator=torch.Generator().manual_seed(SALT)).tolist()


@pytest.mark.property
@settings(max_examples=60)
@given(
    st.integers(-(2**63), 2**64),
    st.lists(st.lists(st.integers(0, 2**31), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_seeds_are_pythons(key: int, contexts: list[list[int]]) -> None:
    table, modulus = fixed_table(), 2**64 - 1
    for ids, *found in zip(contexts, *(context_seeds(contexts, key, s) for s in SEEDINGS),
                           strict=True):  # fmt: skip
        s = key
        for i in ids:
            s = (s * SALT + i) % modulus
        hashed = [table[(key + SALT * i) % TABLE] for i in ids]
        added = table[(key + SALT * sum(ids)) % TABLE]
        wanted = [s, added, hashed[0], min(hashed), key * ids[-1] % modulus]
        assert [int(f) for f in found] == wanted


@pytest.mark.parametrize("seeding", SEEDINGS)
def test_every_seeding_uses_the_key_and_stays_the_same(seeding: str) -> None:
    """Released code leaves the key out of additive, skip and min, and draws its table anew."""
    contexts = contexts_of(50)
    torch.manual_seed(1)
    first = context_seeds(contexts, 1, seeding)
    torch.manual_seed(2)
    assert (context_seeds(contexts, 1, seeding) == first).all()
    assert (context_seeds(contexts, 2, seeding) != first).mean() > 0.9


def test_the_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    mark = Watermark(64, "gumbel")
    draw_tokens(torch.zeros(2, 64), contexts_of(2, 1), mark)
    add_green_bias(torch.zeros(2, 64), contexts_of(2, 1), Watermark(64))
    assert (torch.get_rng_state() == before).all()


def test_keys_equal_modulo_2_to_the_32() -> None:
    """A limit of torch's CPU generator, as documented."""
    mark = Watermark(64, "gumbel")
    assert (mark.uniforms(5) == mark.uniforms(5 + 2**32)).all()
    assert (mark.uniforms(5) != mark.uniforms(6)).any()


# ── laws over keys ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    """Tokens and scores of 20,000 contexts under one p, with each Gumbel scheme."""
    contexts = contexts_of(KEYS, v=10**6)
    logits = torch.tensor(np.log(P)).expand(KEYS, 3)
    u = np.random.default_rng(1).random(KEYS)
    out = {}
    for scheme in ("gumbel", "randomised"):
        mark = Watermark(3, scheme, key=9, context=2)
        tokens = draw_tokens(logits, contexts, mark, u)
        uniforms = keyed_uniforms(contexts, mark).double()
        out[scheme] = tokens.numpy(), -np.log1p(-uniforms.gather(1, tokens[:, None]).numpy()[:, 0])
    return out


def test_gumbel_leaves_the_distribution_as_it_is(drawn: dict[str, Any]) -> None:
    """False alarms: 1 in 1,000."""
    counts = np.bincount(drawn["gumbel"][0], minlength=3)
    assert chisquare(counts, KEYS * P).pvalue > 0.001


def test_randomised_gumbel_does_not(drawn: dict[str, Any]) -> None:
    """False alarms of the first line: 1 in 1,000; p itself is 9 standard errors off."""
    counts = np.bincount(drawn["randomised"][0], minlength=3)
    assert chisquare(counts, KEYS * randomised_gumbel_marginal(P)).pvalue > 0.001
    assert chisquare(counts, KEYS * P).pvalue < 1e-9


def test_expected_scores(drawn: dict[str, Any]) -> None:
    """Within 4 standard errors: false alarms 6 in 100,000 a line."""
    for scheme, want in (
        ("gumbel", expected_gumbel_score(P)),
        ("randomised", expected_randomised_score(P)),
    ):
        scores = drawn[scheme][1]
        assert abs(scores.mean() - want) < 4 * scores.std() / np.sqrt(KEYS)


def test_laws_of_certain_and_even_tokens() -> None:
    assert expected_gumbel_score([1.0, 0.0]) == pytest.approx(1)
    assert expected_randomised_score([1.0, 0.0]) == pytest.approx(1, abs=1e-9)
    even = randomised_gumbel_marginal(np.full(50, 0.02))
    np.testing.assert_allclose(even, 0.02, atol=1e-10)
    skewed = np.r_[0.5, np.full(100, 0.005)]
    flatter = randomised_gumbel_marginal(skewed)
    assert flatter.sum() == pytest.approx(1, abs=1e-9)
    assert flatter[0] < 0.5
    assert expected_gumbel_score(skewed) > expected_randomised_score(skewed) > 1


@pytest.mark.property
@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda p: sum(p) > 0.1))
def test_the_marginal_is_a_distribution_in_the_same_order(weights: list[float]) -> None:
    p = np.array(weights) / sum(weights)
    m = randomised_gumbel_marginal(p)
    assert m.sum() == pytest.approx(1, abs=1e-8)
    assert (m[p == 0] == 0).all()
    order = np.argsort(p)
    assert (np.diff(m[order]) > -1e-9).all()


def test_permute_and_flip_against_its_definition() -> None:
    """Items in random order, each taken with exp(log p - max log p): 1 in 1,000 false alarms."""
    mark = Watermark(3, "permute_and_flip", context=2)
    logits = torch.tensor(np.log(P)).expand(KEYS, 3)
    counts = np.bincount(draw_tokens(logits, contexts_of(KEYS, v=10**6), mark).numpy(), minlength=3)
    q = P / P.max()
    others = [q[np.arange(3) != v] for v in range(3)]
    # q_v E over the order: q_v Σ_k (-1)^k e_k(others) / (k + 1)
    law = [q[v] * (1 - o.sum() / 2 + o.prod() / 3) for v, o in enumerate(others)]
    assert chisquare(counts, KEYS * np.array(law)).pvalue > 0.001


# ── what is drawn ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_the_draw_is_from_the_law(scheme: str, temperature: float, top_p: float) -> None:
    """The quick ways of drawing give the tokens of the whole law, across the blocks of rows."""
    rows, v = 70, 500
    rng = np.random.default_rng(3)
    logits = torch.tensor(3 * rng.standard_normal((rows, v)), dtype=torch.float32)
    contexts, u = contexts_of(rows), rng.random(rows)
    mark = Watermark(v, scheme, context=2)
    how = {"temperature": temperature, "top_p": top_p}
    law = token_law(logits, contexts, mark, **how)
    assert law.dtype == torch.float64
    np.testing.assert_allclose(law.exp().sum(-1), 1)
    tokens = draw_tokens(logits, contexts, mark, u, **how)
    assert (tokens == categorical.invert(law, u)).all()
    allowed = categorical.truncate(logits, **how).isfinite().gather(-1, tokens[:, None])
    assert scheme == "kgw" or allowed.all()


def test_fixed_schemes_repeat_themselves_and_the_others_do_not() -> None:
    logits, contexts = torch.zeros(200, 50), np.ones((200, 1), int)
    u = np.random.default_rng(0).random(200)
    for scheme in SCHEMES:
        tokens = draw_tokens(logits, contexts, Watermark(50, scheme), u)
        assert (len(tokens.unique()) == 1) == (scheme in FIXED)


def test_green_lists_without_weight_change_nothing() -> None:
    logits, contexts = torch.randn(5, 40), contexts_of(5, 1)
    plain = categorical.normalize(logits)
    for mark in (Watermark(40, delta=0.0), Watermark(40, gamma=1.0, delta=3.0)):
        law = token_law(logits, contexts, mark)
        np.testing.assert_allclose(law.exp(), plain.exp(), atol=1e-7)


def test_endless_weight_leaves_green_tokens_alone() -> None:
    logits, contexts = torch.randn(50, 40), contexts_of(50, 1)
    mark = Watermark(40, delta=1000.0)
    tokens = draw_tokens(logits, contexts, mark, np.random.default_rng(0).random(50)).tolist()
    for token, seed in zip(tokens, mark.seeds(contexts), strict=True):
        assert token in mark.green_tokens(seed).tolist()


def test_rare_and_impossible_tokens() -> None:
    """1/p overflows for p = 1e-320; p = 0 is never drawn; u = 0 is no infinity."""
    mark = Watermark(3, "randomised")
    logits = torch.tensor([[0.0, -736.0, -np.inf]], dtype=torch.float64)
    law = token_law(logits, np.array([[1]]), mark)
    assert law.exp().tolist() == [[1.0, 0.0, 0.0]]
    big = Watermark(1 << 22, "gumbel")
    u = big.uniforms(3)
    assert 0 < u.min() < 1e-6
    assert u.max() < 1


def test_a_cold_text_holds_no_watermark() -> None:
    logits = torch.randn(9, 30)
    with pytest.warns(UserWarning, match="temperature: at 0"):
        processor = KeyedDrawProcessor(Watermark(30, "gumbel"), temperature=0.0)
    scores = processor(torch.ones(9, 4, dtype=torch.long), logits)
    assert (scores.argmax(-1) == logits.argmax(-1)).all()
    with warnings.catch_warnings():  # a green list shows in a greedy text too
        warnings.simplefilter("error")
        KeyedDrawProcessor(Watermark(30, "kgw"), temperature=0.0)


# ── transformers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_green_lists_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    v, ids = 997, torch.randint(997, (8, 6), generator=torch.Generator().manual_seed(0))
    theirs = transformers.WatermarkLogitsProcessor(v, "cpu", greenlist_ratio=0.3, bias=1.5)
    ours = GreenListProcessor(Watermark(v, gamma=0.3, delta=1.5, seeding="lefthash"))
    scores = torch.randn(8, v)
    assert (ours(ids, scores) == theirs(ids, scores)).all()


@pytest.mark.contract
@pytest.mark.parametrize("scheme", SCHEMES)
def test_generate_takes_the_processors(tiny_model: str, scheme: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    mark = Watermark(258, scheme, context=3)
    prompt = torch.tensor([[5, 6]] * 4)

    def texts(seed: int) -> Any:
        processor = KeyedDrawProcessor(mark, rng=seed)
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12,
            logits_processor=[processor], pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    first = texts(1)
    assert (first == texts(1)).all()
    assert (len(first.unique(dim=0)) == 1) == (scheme in FIXED)
    assert (first == texts(2)).all() == (scheme in FIXED)


@pytest.mark.contract
def test_generate_samples_within_green_lists(tiny_model: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    mark = Watermark(258, delta=1000.0)
    out = model.generate(
        torch.tensor([[5]]), do_sample=True, max_new_tokens=15, pad_token_id=0, eos_token_id=None,
        logits_processor=[GreenListProcessor(mark)],
    )[0]  # fmt: skip
    seeds = mark.seeds(out[:-1, None].numpy())
    assert all(t in mark.green_tokens(s) for t, s in zip(out[1:], seeds, strict=True))


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, r"gamma: got 0.0, want a share in \(0, 1\]"),
        ({"gamma": 1.1}, "gamma: got 1.1"),
        ({"gamma": 0.01}, "gamma: got 0.01 of 64 tokens, which is none"),
        ({"context": 0}, "context: got 0, want at least one token"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"scheme": "best"}, "scheme: got 'best', want one of kgw"),
        ({"seeding": "sum"}, "seeding: got 'sum'"),
        ({"delta": np.nan}, "delta: got nan"),
    ],
)
def test_watermarks_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Watermark(**({"vocab_size": 64} | change))


def test_other_bad_input() -> None:
    mark = Watermark(64, "gumbel")
    with pytest.warns(UserWarning, match="delta: -1.0 avoids"):
        Watermark(64, delta=-1.0)
    with pytest.raises(InputError, match="logits: got width 60, want 64"):
        KeyedDrawProcessor(mark)(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 60))
    with pytest.raises(InputError, match="logits: got width 60, want 64"):
        add_green_bias(torch.zeros(1, 60), [[1]], Watermark(64))
    with pytest.raises(InputError, match="logits: got NaN"):
        draw_tokens(torch.full((1, 64), np.nan), [[1]], mark)
    with pytest.raises(InputError, match="u: got None"):
        draw_tokens(torch.zeros(1, 64), [[1]], Watermark(64, "randomised"))
    with pytest.raises(InputError, match="temperature: got -1"):
        KeyedDrawProcessor(mark, temperature=-1)
    with pytest.raises(InputError, match="scheme: got 'gumbel', want 'kgw'"):
        GreenListProcessor(mark)
    with pytest.raises(InputError, match=r"contexts: got shape \(3,\)"):
        context_seeds([1, 2, 3])
    with pytest.raises(InputError, match="contexts: got -1"):
        context_seeds([[-1]])
    with pytest.raises(InputError, match="seeding: got 'x'"):
        context_seeds([[1]], seeding="x")
    for law in (expected_gumbel_score, randomised_gumbel_marginal, expected_randomised_score):
        with pytest.raises(InputError, match="p: got other numbers"):
            law([0.5, 0.6])
