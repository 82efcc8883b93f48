r"""Is a text watermarked? Exact p-values for one text or many, from token ids and the key alone.

A text that doesn't know the key meets uniforms that are independent of it, so that each scored
token adds, under H0,

    kgw                  1 if it is green      S ~ Binomial(T, γ)      p = I_γ(S, T - S + 1)
    gumbel, randomised   -log(1 - u)           Σ ~ Gamma(T, 1)         p = Q(T, Σ)
    permute_and_flip     -log u                Σ ~ Gamma(T, 1)         p = Q(T, Σ)

and a small p-value tells. That needs independent tokens. Where a text repeats itself, so do its
numbers: each distinct (context, token) counts once ("v2"), or each distinct context ("v1").

Scored are the tokens from 0-based position h on; released code starts at h + 1, and its z of the
Gumbel score divides by π/√6 = 1.28, the deviation of a Gumbel variable, where a token's -log(1 - u)
is exponential with deviation 1: that z is 22 % too small.

Aaronson, 2022 (Gumbel). Kirchenbauer et al., 2023, arXiv 2301.10226 (green lists). Fernandez et
al., "Three bricks to consolidate watermarks for large language models", 2023, arXiv 2308.00113
(exact p-values, counting once). Verma, Phan and Trivedi, 2025, arXiv 2506.04462.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, gammaincc, ndtr
from scipy.stats import binom, false_discovery_control

from scoredraw.answers import whole_numbers
from scoredraw.arrays import on_host
from scoredraw.errors import require
from scoredraw.language.watermarks import KEY, Watermark, context_seeds
from scoredraw.metrics import Estimate, proportion_interval

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
Progress = Callable[[int, int], Any]

DEDUPS = ("none", "v1", "v2")
GUMBEL_DEVIATION = math.pi / math.sqrt(6)  # what released code takes for the score's deviation
MOST_TOKENS = 1 << 20  # that `tokens_needed` looks at
TYPICAL_SCORE = 1.5  # of a watermarked token: p = (1/2, 1/2) has it
TYPICAL_GREEN = 2.0  # times the green share


@dataclass(frozen=True)
class Detection:
    """One text: the statistic (green tokens, or the sum of scores), z, p-value, tokens scored."""

    statistic: float
    z: float
    p_value: float
    n_scored: int


@dataclass(frozen=True, eq=False)
class Detections:
    """Many texts: what `Detection` has, an array (P,) each. `p_normal` is what z alone would say.

    For kgw z = (S - γT) / √(γ(1-γ)T), for the others (Σ/T - 1) √T; a text without a scored token
    has z = 0 and p = 1.
    """

    statistic: Float
    z: Float
    p_value: Float
    n_scored: Int

    @property
    def p_normal(self) -> Float:
        """½ erfc(z/√2): the normal approximation."""
        return np.asarray(ndtr(-self.z))

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, i: int) -> Detection:
        statistic, z, p = (float(each[i]) for each in (self.statistic, self.z, self.p_value))
        return Detection(statistic, z, p, int(self.n_scored[i]))


# ── tests ───────────────────────────────────────────────────────────────────────────────────────


def green_count_test(green: ArrayLike, n_scored: ArrayLike, gamma: float = 0.25) -> Detections:
    """The test of S green among T tokens: z, and the exact tail of the binomial distribution.

    p = P(Binomial(T, γ) ≥ S), which is 1 for S = 0. green, n_scored: broadcastable counts.
    Raises `InputError` for γ outside (0, 1] and counts that are not 0 ≤ S ≤ T. O(P).

    >>> green_count_test(9, 20).p_value.round(6).tolist()
    [0.040925]
    """
    require(0 < gamma <= 1, "gamma", gamma, "a share in (0, 1]")
    s, t = np.broadcast_arrays(
        np.atleast_1d(whole_numbers(green, "green")),
        np.atleast_1d(whole_numbers(n_scored, "n_scored")),
    )
    require(bool(((s >= 0) & (s <= t)).all()), "green", "another count", "0 ≤ S ≤ T")
    spread = np.sqrt(gamma * (1 - gamma) * t)
    z = np.divide(s - gamma * t, spread, out=np.zeros(s.shape), where=spread > 0)
    p = np.where(s == 0, 1.0, bdtrc(np.maximum(s - 1.0, 0.0), t, gamma))
    return Detections(s.astype(np.float64), z, p, t.astype(np.int64))


def score_sum_test(score: ArrayLike, n_scored: ArrayLike) -> Detections:
    """The test of a sum of T scores that are exponential where the key is not known.

    p = P(Gamma(T, 1) ≥ score), 1 for T = 0. score, n_scored: broadcastable; score ≥ 0.
    Raises `InputError` for negative or missing scores and counts. O(P).

    >>> score_sum_test(25.5, 20).p_value.round(6).tolist()
    [0.114029]
    """
    total, t = np.broadcast_arrays(
        np.atleast_1d(np.asarray(score, np.float64)),
        np.atleast_1d(whole_numbers(n_scored, "n_scored")),
    )
    require(bool((total >= 0).all()), "score", "negative or NaN", "sums of at least 0")
    require(bool((t >= 0).all()), "n_scored", t.min(initial=0), "counts")
    p = np.where(t == 0, 1.0, gammaincc(np.maximum(t, 1), total))
    return Detections(total.copy(), score_z(total, t), p, t.astype(np.int64))


def score_z(score: ArrayLike, n_scored: ArrayLike, sigma: float = 1.0) -> Float:
    """(score/T - 1) √T / σ, 0 for T = 0. σ = 1 is right; released code takes π/√6.

    >>> score_z([130.25], [100]).round(4).tolist()
    [3.025]
    """
    total, t = np.asarray(score, np.float64), np.asarray(n_scored, np.float64)
    spread = sigma * np.sqrt(t)
    return np.divide(total - t, spread, out=np.zeros(np.shape(total - t)), where=spread > 0)


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


def detect_texts(
    texts: Sequence[ArrayLike],
    watermark: Watermark,
    *,
    dedup: str = "v2",
    progress: Progress | None = None,
) -> Detections:
    """Test each text for a watermark: `Detections`, P entries.

    texts: P sequences of token ids, of any lengths; a text of at most h tokens has nothing to
    score. dedup: "v2", "v1", or "none", whose p-values are too small for a text that repeats
    itself. progress: called with contexts done and in all.
    Raises `InputError` for ids outside the vocabulary (the detector's V is not the generator's, or
    the tokenizer is another), and an unknown dedup.

    Row-local. The numbers of a context are made once for all texts: O(V) each; the rest
    O(N log N) for N tokens, memory O(N h).

    >>> mark = Watermark(64, "gumbel", key=42, context=2)
    >>> found = detect_texts([[30, 32, 48, 60, 2, 9, 52, 60, 15], [30, 32]], mark)
    >>> found.n_scored.tolist(), found.p_value.round(3).tolist()
    ([7, 0], [0.555, 1.0])
    """
    home, contexts, tokens = windows(texts, watermark, dedup)
    values = keyed_values(contexts, tokens, watermark, progress=progress)
    counts = np.bincount(home, minlength=len(texts))
    sums = np.bincount(home, values, minlength=len(texts))
    if watermark.scheme == "kgw":
        return green_count_test(sums.round(), counts, watermark.green_share)
    return score_sum_test(sums, counts)


def detect(ids: ArrayLike, watermark: Watermark, *, dedup: str = "v2") -> Detection:
    """Test one text; see `detect_texts`.

    >>> detect([1, 2, 3], Watermark(64, context=5))
    Detection(statistic=0.0, z=0.0, p_value=1.0, n_scored=0)
    """
    return detect_texts([ids], watermark, dedup=dedup)[0]


def windows(
    texts: Sequence[ArrayLike], watermark: Watermark, dedup: str = "v2"
) -> tuple[Int, Int, Int]:
    """What is scored: the text (N,), context (N, h) and id (N,) of each token, in order."""
    require(dedup in DEDUPS, "dedup", repr(dedup), f"one of {', '.join(DEDUPS)}")
    h = watermark.context
    each = [whole_numbers(on_host(text), "texts").reshape(-1) for text in texts]
    lengths = np.array([len(ids) for ids in each], np.int64)
    ids = np.concatenate([*each, np.zeros(0, np.int64)])
    bad = ids[(ids < 0) | (ids >= watermark.vocab_size)]
    wanted = f"ids below {watermark.vocab_size}, the watermark's vocabulary"
    require(not bad.size, "texts", f"token id {bad[:1].sum()}", wanted)
    home = np.repeat(np.arange(len(each)), lengths)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.flatnonzero(place >= h)
    if not at.size:
        return np.zeros(0, np.int64), np.zeros((0, h), np.int64), np.zeros(0, np.int64)
    whole = np.lib.stride_tricks.sliding_window_view(ids, h + 1)[at - h]
    if dedup != "none":
        rows = np.column_stack([home[at], whole[:, : h + (dedup == "v2")]])
        first = np.sort(np.unique(rows, axis=0, return_index=True)[1])
        at, whole = at[first], whole[first]
    return home[at], whole[:, :h], whole[:, h]


def keyed_values(
    contexts: Int, tokens: Int, watermark: Watermark, *, progress: Progress | None = None
) -> Float:
    """What each token adds to its text's statistic, float64 (N,); see the head of this module.

    contexts: (N, h), tokens: (N,). The numbers of each distinct context are made once.
    """
    values = np.zeros(len(tokens))
    if not len(tokens):
        return values
    seeds, which = np.unique(
        context_seeds(contexts, watermark.key, watermark.seeding), return_inverse=True
    )
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(seeds) + 1))
    green = np.zeros(watermark.vocab_size, bool)
    for i, seed in enumerate(seeds.tolist()):
        at = order[starts[i] : starts[i + 1]]
        if watermark.scheme == "kgw":
            listed = watermark.green_tokens(seed).numpy()
            green[listed] = True
            values[at] = green[tokens[at]]
            green[listed] = False
        else:
            values[at] = watermark.uniforms(seed).numpy()[tokens[at]]
        if progress is not None:
            progress(i + 1, len(seeds))
    if watermark.scheme == "kgw":
        return values
    return -np.log(values) if watermark.scheme == "permute_and_flip" else -np.log1p(-values)


def detect_synthid(texts: Sequence[ArrayLike], processor: Any) -> Detections:
    """Test texts for transformers' SynthID watermark: `Detections`, P entries.

    processor: a `SynthIDTextWatermarkLogitsProcessor` with the writer's keys. Each distinct n-gram
    has a fair coin g a key for who doesn't know them: S of the T coins are heads. transformers'
    own detector is a network to be trained instead. Dathathri et al., "Scalable watermarking for
    identifying large language model outputs", Nature, 2024.
    """
    import torch

    mark = Watermark(2**31, "gumbel", context=processor.ngram_len - 1)
    home, contexts, tokens = windows(texts, mark)
    grams = torch.as_tensor(np.column_stack([contexts, tokens]))[:, None]
    coins = processor.sample_g_values(processor.compute_ngram_keys(grams)) if len(home) else grams
    each = coins.reshape(len(home), -1).numpy().sum(axis=1) if len(home) else np.zeros(0)
    heads, counts = (np.bincount(home, w, minlength=len(texts)) for w in (each, None))
    return green_count_test(heads, counts * len(processor.keys), 0.5)


# ── power ───────────────────────────────────────────────────────────────────────────────────────


def green_mass(p: ArrayLike, green: ArrayLike, delta: float) -> Any:
    """The chance of a green token under kgw: Σ_G p e^δ / (Σ_G p e^δ + Σ_{not G} p), float64 (...).

    p: (..., V) probabilities; green: bool (..., V).

    >>> green_mass([0.5, 0.5], [True, False], np.log(3.0)).round(12).item()
    0.75
    """
    q, g = np.asarray(p, np.float64), np.asarray(green, bool)
    gained = np.where(g, q, 0.0).sum(axis=-1) * math.exp(delta)
    return gained / (gained + np.where(g, 0.0, q).sum(axis=-1))


def expected_green_z(share: float, n_scored: int, gamma: float) -> float:
    """E z = √T (g - γ) / √(γ(1-γ)) of T tokens that are green with chance g.

    >>> expected_green_z(0.5, 48, 0.25)
    4.0
    """
    return math.sqrt(n_scored) * (share - gamma) / math.sqrt(gamma * (1 - gamma))


def tokens_needed(strength: float, alpha: float = 0.01, *, gamma: float | None = None) -> int:
    """The fewest tokens of which the expected statistic has p ≤ alpha.

    strength: the mean score of a watermarked token (1: none; see `expected_gumbel_score`), or
    with gamma the share of green tokens (γ: none). Raises `InputError` for a strength that shows
    nothing, alpha outside (0, 1), and where a million tokens would not do.

    >>> tokens_needed(1.5), tokens_needed(0.5, gamma=0.25)
    (28, 22)
    """
    require(0 < alpha < 1, "alpha", alpha, "a level between 0 and 1")
    t = np.arange(1, MOST_TOKENS + 1)
    if gamma is None:
        require(strength > 1, "strength", strength, "a mean score above 1, that of any text")
        p = score_sum_test(strength * t, t).p_value
    else:
        wanted = f"a share of green tokens above gamma = {gamma}, and at most 1"
        require(gamma < strength <= 1, "strength", strength, wanted)
        p = green_count_test(np.floor(strength * t), t, gamma).p_value
    enough = p <= alpha
    require(bool(enough.any()), "strength", strength, "one that a million tokens would show")
    return int(t[enough.argmax()])


# ── an audit ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class WatermarkAudit:
    """What `audit_watermark` found; arrays have an entry a text.

    flagged: p ≤ alpha, each text on its own. holm: rejected with the chance of even one false
    alarm among all texts held at alpha; bh: with the expected share of false ones among those
    found held at alpha (Benjamini and Hochberg). undecidable: not flagged, and shorter than
    `needed`, so that a watermark of usual strength would have gone unseen. by_chance: the exact
    share of these texts that would be flagged if none knew the key (below alpha for counts, which
    are discrete). with_other_keys: the share flagged when read with keys nobody used, and its
    interval: it should not exceed by_chance.
    """

    watermark: Watermark
    alpha: float
    detections: Detections
    flagged: Bool
    holm: Bool
    bh: Bool
    undecidable: Bool
    needed: int
    by_chance: float
    with_other_keys: Estimate | None

    @property
    def n_detected(self) -> dict[str, int]:
        """How many texts are detected at level alpha: each alone, after Holm, after BH."""
        rules = {"alone": self.flagged, "holm": self.holm, "bh": self.bh}
        return {name: int(found.sum()) for name, found in rules.items()}


def holm(p_values: ArrayLike, alpha: float) -> Bool:
    """Which hypotheses Holm's method rejects: bool (m,). p_(i) ≤ alpha / (m - i + 1) down the line.

    >>> holm([0.01, 0.04, 0.03], 0.05).tolist()
    [True, False, False]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    passed = p[order] * np.arange(len(p), 0, -1) <= alpha
    rejected = np.zeros(len(p), bool)
    rejected[order[: len(p) if passed.all() else int(passed.argmin())]] = True
    return rejected


def audit_watermark(
    texts: Sequence[Any],
    *,
    scheme: str = "kgw",
    key: int = KEY,
    context: int = 1,
    gamma: float = 0.25,
    dedup: str = "v2",
    alpha: float = 0.01,
    seeding: str = "hash",
    vocab_size: int | None = None,
    tokenizer: Any = None,
    strength: float | None = None,
    other_keys: int = 2,
    progress: Progress | None = None,
) -> WatermarkAudit:
    """Which of many texts bear a watermark, and how far to trust that.

    texts: token ids each, or strings with a `tokenizer` (whose tokens may not be those that were
    sampled; ids are surer). vocab_size: the width of the generating model's logits, by default
    the tokenizer's length; with another width green lists are others, and nothing is found.
    strength: what a watermarked token is taken to show, for `undecidable`: a mean score of 1.5, or
    twice the green share (at most 1). other_keys: how many to calibrate with; 0 for none.

    Raises `InputError` for no texts, strings without a tokenizer, no vocab_size, alpha outside
    (0, 1), other_keys < 0, and as `Watermark` and `detect_texts`, whose time it takes
    1 + other_keys times.

    >>> audit = audit_watermark([[5, 9, 2], list(range(90))], scheme="gumbel", vocab_size=100)
    >>> audit.n_detected, audit.undecidable.tolist(), audit.detections.n_scored.tolist()
    ({'alone': 0, 'holm': 0, 'bh': 0}, [True, False], [2, 89])
    """
    require(len(texts) > 0, "texts", "none", "at least one text")
    require(0 < alpha < 1, "alpha", alpha, "a level between 0 and 1")
    require(other_keys >= 0, "other_keys", other_keys, "a count")
    if any(isinstance(text, str) for text in texts):
        require(tokenizer is not None, "tokenizer", None, "one, as there are texts without ids")
        texts = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            if isinstance(text, str)
            else text
            for text in texts
        ]
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    require(vocab_size is not None, "vocab_size", None, "the width of the model's logits")
    assert vocab_size is not None
    mark = Watermark(vocab_size, scheme, key, context, seeding, gamma)
    counts = scheme == "kgw"
    if strength is None:
        strength = min(1.0, TYPICAL_GREEN * mark.green_share) if counts else TYPICAL_SCORE
    needed = tokens_needed(strength, alpha, gamma=mark.green_share if counts else None)
    found = detect_texts(texts, mark, dedup=dedup, progress=progress)
    flagged = found.p_value <= alpha
    chance = np.where(found.n_scored > 0, alpha, 0.0)
    if counts:  # of more than the largest count that would pass
        most = binom.isf(alpha, found.n_scored, mark.green_share)
        chance = binom.sf(most, found.n_scored, mark.green_share)
    return WatermarkAudit(
        mark, alpha, found, flagged, holm(found.p_value, alpha),
        false_discovery_control(found.p_value) <= alpha,
        ~flagged & (found.n_scored < needed), needed, float(chance.mean()),
        _read_with_other_keys(texts, mark, dedup, alpha, other_keys),
    )  # fmt: skip


def _read_with_other_keys(
    texts: Sequence[Any], mark: Watermark, dedup: str, alpha: float, keys: int
) -> Estimate | None:
    """The share of texts that are flagged when read with other keys."""
    if not keys:
        return None
    source = np.random.default_rng(mark.key % 2**64)
    found = 0
    for key in source.integers(2**31, size=keys).tolist():
        other = Watermark(mark.vocab_size, mark.scheme, key, mark.context, mark.seeding, mark.gamma)
        found += int((detect_texts(texts, other, dedup=dedup).p_value <= alpha).sum())
    return proportion_interval(found, len(texts) * keys)
