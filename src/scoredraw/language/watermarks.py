r"""Watermarks in sampled text: a key and the last tokens decide how the next one is drawn.

The last h token ids (the context) and a secret key make a seed, and the seed a stream of random
numbers over the vocabulary. Whoever has the key can make the same numbers again and ask whether a
text agrees with them more often than chance would have it (`watermark_detection`).

    kgw                logits + δ on a green list of the share γ of the vocabulary, then sampling
    gumbel             argmax_v u_v^(1/p_v): p itself on average over keys, but fixed for one key
    randomised         a token drawn with probabilities ∝ u_v^(1/p_v): many texts, flatter than p
    permute_and_flip   argmax_v log p_v - log u_v

u are torch's float32 uniforms on the CPU, as in released code: on a grid of 2^-24, so a token much
rarer than 1e-7 is not drawn quite as often as it should. That generator reads the low 32 bits of a
seed alone: keys that are equal modulo 2^32 are one key. With a context of one token a text meets
the same contexts again and again. Another device's generator gives other numbers, so both sides
make them on the CPU.

Verma, Phan and Trivedi, "Watermarking degrades alignment in language models: analysis and
mitigation", 2025, arXiv 2506.04462 (randomised). Kirchenbauer et al., "A watermark for large
language models", 2023, arXiv 2301.10226 (kgw). Aaronson, 2022 (gumbel). Zhao, Li and Wang,
"Permute-and-flip", 2024, arXiv 2402.05864. Released code differs: its table for additive, skip and
min comes from an unseeded generator, so that texts could be read in the same process only, and
those three ignore the key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma, gammainc, gammaln

from scoredraw import categorical
from scoredraw.answers import whole_numbers
from scoredraw.arrays import on_host
from scoredraw.errors import require
from scoredraw.uniforms import Rng, RowUniforms

Float = NDArray[np.float64]
Int = NDArray[np.int64]
UInt = NDArray[np.uint64]

SCHEMES = ("kgw", "gumbel", "randomised", "permute_and_flip")
FIXED = ("gumbel", "permute_and_flip")  # with one key every sample of a prompt is the same
SEEDINGS = ("hash", "additive", "skip", "min", "lefthash")
KEY = 15485863
SALT = 35317
TABLE = 1_000_003
LOW = np.uint64(0xFFFFFFFF)
TINY = float(np.finfo(np.float32).tiny)
BELOW_ONE = 1 - 2.0**-24
CACHE_BYTES = 64 * 2**20  # of the streams that are remembered
FAINT = 50.0  # a weight of e^-50 of the largest is below its last digit, were there 10^5 such
ROWS = 16  # of a batch at a time in float64: they stay in the processor's cache


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────


def context_seeds(contexts: Any, key: int = KEY, seeding: str = "hash") -> UInt:
    """The seed of each context: uint64 (N,).

    hash       s ← (s · salt + id) mod (2^64 - 1) over the ids, from s = key; salt 35317
    additive   table[key + salt · Σ ids]
    skip       table[key + salt · the first id]
    min        the least of table[key + salt · id]
    lefthash   key · the last id mod (2^64 - 1), as transformers' `WatermarkLogitsProcessor` has it

    contexts: (N, h) token ids, oldest first. The table is a fixed permutation of 1,000,003 numbers,
    its index taken modulo that; keys count modulo it too. Raises `InputError` for another shape,
    negative ids and an unknown seeding. Whole columns at once, O(N h).

    >>> context_seeds([[45, 35]], key=42).tolist()
    [52387789838]
    """
    ids = whole_numbers(on_host(contexts), "contexts")
    require(ids.ndim == 2 and ids.shape[1] > 0, "contexts", f"shape {ids.shape}", "(N, h), h ≥ 1")
    require(not (ids < 0).any(), "contexts", ids.min(initial=0), "token ids of at least 0")
    require(seeding in SEEDINGS, "seeding", repr(seeding), f"one of {', '.join(SEEDINGS)}")
    columns = ids.astype(np.uint64).T
    start = np.uint64(key % (2**64 - 1))
    if seeding == "hash":
        seeds = np.full(len(ids), start)
        for column in columns:
            seeds = _add(_multiply(seeds, np.uint64(SALT)), column)
        return _reduced(seeds)
    if seeding == "lefthash":
        return _reduced(_multiply(np.broadcast_to(start, len(ids)), columns[-1]))
    if seeding == "skip":
        ids = ids[:, :1]
    elif seeding == "additive":
        ids = ids.sum(axis=1, keepdims=True)
    return _table()[(key % TABLE + SALT * ids) % TABLE].min(axis=1)


def _multiply(a: UInt, b: Any) -> UInt:
    """a · b mod (2^64 - 1) for b < 2^32: 2^64 is 1, so what runs over comes in at the bottom."""
    high = (a >> np.uint64(32)) * b
    return _add((high << np.uint64(32)) | (high >> np.uint64(32)), (a & LOW) * b)


def _add(a: UInt, b: UInt) -> UInt:
    total = a + b
    return total + (total < a)


def _reduced(seeds: UInt) -> UInt:
    return np.where(seeds == np.uint64(2**64 - 1), np.uint64(0), seeds)


@lru_cache(maxsize=1)
def _table() -> UInt:
    import torch

    source = torch.Generator().manual_seed(SALT)
    return torch.randperm(TABLE, generator=source).numpy().astype(np.uint64)


# ── the watermark ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Watermark:
    """What the writer and the reader of a watermark have to agree on.

    vocab_size: V, the width of the model's logits (which may exceed the tokenizer's). scheme: one
    of `SCHEMES`. context: h, how many tokens make a seed. seeding: as `context_seeds`. gamma: the
    green share (kgw); delta: what green logits gain (kgw; the reader needn't know it).
    Raises `InputError` for an unknown scheme or seeding, V < 1, h < 1, γ outside (0, 1] or without
    a green token; warns of δ < 0, which avoids green tokens.

    >>> mark = Watermark(64, "kgw", key=42, context=2)
    >>> mark.green_tokens(52387789838).tolist()[:4], mark.green_share
    ([52, 46, 51, 10], 0.25)
    """

    vocab_size: int
    scheme: str = "kgw"
    key: int = KEY
    context: int = 1
    seeding: str = "hash"
    gamma: float = 0.25
    delta: float = 2.0

    def __post_init__(self) -> None:
        require(self.scheme in SCHEMES, "scheme", repr(self.scheme), f"one of {', '.join(SCHEMES)}")
        known = f"one of {', '.join(SEEDINGS)}"
        require(self.seeding in SEEDINGS, "seeding", repr(self.seeding), known)
        require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "a positive count")
        require(self.context >= 1, "context", self.context, "at least one token")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "a share in (0, 1]")
        require(np.isfinite(self.delta), "delta", self.delta, "a finite number")
        few = f"{self.gamma} of {self.vocab_size} tokens, which is none"
        require(self.scheme != "kgw" or self.green_size >= 1, "gamma", few, "one green token")
        if self.scheme == "kgw" and self.delta < 0:
            warnings.warn(f"delta: {self.delta} avoids the green tokens", stacklevel=3)

    @property
    def green_size(self) -> int:
        """How many tokens are green: ⌊γV⌋."""
        return int(self.gamma * self.vocab_size)

    @property
    def green_share(self) -> float:
        """⌊γV⌋ / V: the chance that a token of a text which doesn't know the key is green."""
        return self.green_size / self.vocab_size

    def green_tokens(self, seed: int) -> Any:
        """int32 (⌊γV⌋,), the first of torch's `randperm`; not to be written to."""
        return _green_lists(self.vocab_size, self.green_size)(seed)

    def uniforms(self, seed: int) -> Any:
        """u: float32 (V,), torch's `rand` within [tiny, 1 - 2^-24]; not to be written to."""
        return _uniform_rows(self.vocab_size)(seed)

    def contexts(self, ids: Any) -> Any:
        """The last h of the ids so far, (B, h); what is missing at the start is 0.

        >>> Watermark(9, context=3).contexts(np.array([[4, 5]])).tolist()
        [[0, 4, 5]]
        """
        last = np.asarray(on_host(ids))[:, -self.context :]
        return np.pad(last, ((0, 0), (self.context - last.shape[1], 0)))

    def seeds(self, contexts: Any) -> list[int]:
        """The seed of each context (B, h)."""
        seeds: list[int] = context_seeds(contexts, self.key, self.seeding).tolist()
        return seeds

    def check_width(self, logits: Any) -> None:
        """Raise `InputError` unless the logits are as wide as the vocabulary."""
        wanted = f"{self.vocab_size}, the watermark's vocabulary"
        require(logits.shape[-1] == self.vocab_size, "logits", f"width {logits.shape[-1]}", wanted)


@lru_cache(maxsize=4)
def _green_lists(v: int, size: int) -> Callable[[int], Any]:
    import torch

    @lru_cache(maxsize=max(1, CACHE_BYTES // (4 * size)))
    def green(seed: int) -> Any:
        source = torch.Generator().manual_seed(seed)
        return torch.randperm(v, generator=source, dtype=torch.int32)[:size].clone()

    return green


@lru_cache(maxsize=4)
def _uniform_rows(v: int) -> Callable[[int], Any]:
    import torch

    @lru_cache(maxsize=max(1, CACHE_BYTES // (4 * v)))
    def row(seed: int) -> Any:
        u = torch.rand(v, generator=torch.Generator().manual_seed(seed))
        return u.clamp_(TINY, BELOW_ONE)

    return row


# ── drawing a token ─────────────────────────────────────────────────────────────────────────────


def add_green_bias(logits: Any, contexts: Any, watermark: Watermark) -> Any:
    """logits + δ on each row's green list: a new tensor (B, V) of the same type and device.

    logits: tensor (B, V); contexts: (B, h). δ = 0 or γ = 1 leaves the distribution as it is.
    One permutation of V a new context, O(γV) a row for one that was met before.

    >>> import torch
    >>> add_green_bias(torch.zeros(1, 4), [[7]], Watermark(4, gamma=0.5)).sum().item()
    4.0
    """
    watermark.check_width(logits)
    out = logits.clone()
    bias = logits.new_full((watermark.green_size,), watermark.delta)
    for row, seed in zip(out, watermark.seeds(contexts), strict=True):
        row.index_add_(0, watermark.green_tokens(seed).to(row.device), bias)
    return out


def keyed_uniforms(contexts: Any, watermark: Watermark) -> Any:
    """u of each context: float32 tensor (B, V) on the CPU."""
    import torch

    return torch.stack([watermark.uniforms(seed) for seed in watermark.seeds(contexts)])


def token_law(
    logits: Any, contexts: Any, watermark: Watermark, *, temperature: float = 1.0,
    top_p: float = 1.0,
) -> Any:  # fmt: skip
    """What the next token is drawn from, given the key: log-probabilities, float64 (B, V).

    kgw: softmax of (logits + δ on green) / temperature, within the nucleus. The others start from
    p, the softmax of logits / temperature within the nucleus, renormalised: randomised has
    log u_v / p_v, normalised; gumbel and permute_and_flip are certain of their token.

    logits: tensor (B, V); contexts: (B, h); temperature, top_p: as `categorical.truncate`, which
    says what it raises. A token of probability 0 stays so. Row-local. O(B V), or O(B V log V).
    """
    import torch

    watermark.check_width(logits)
    if watermark.scheme == "kgw":
        logits = add_green_bias(logits, contexts, watermark)
    law = model_law(logits, temperature, top_p)
    if watermark.scheme == "kgw":
        return law
    log_u = keyed_uniforms(contexts, watermark).to(law.device).double().log()
    if watermark.scheme == "randomised":
        return categorical.normalize(log_u / law.exp())
    noise = -(-log_u).log() if watermark.scheme == "gumbel" else -log_u
    chosen = (law + noise).argmax(dim=-1, keepdim=True)
    return torch.full_like(law, -np.inf).scatter_(-1, chosen, 0.0)


def draw_tokens(
    logits: Any, contexts: Any, watermark: Watermark, u: Any = None, *, temperature: float = 1.0,
    top_p: float = 1.0,
) -> Any:  # fmt: skip
    """The next token of each row by a watermark: int64 tensor (B,) on the logits' device.

    u: (B,) independent uniforms in [0, 1), from which kgw and randomised draw by inversion of
    `token_law`; gumbel and permute_and_flip need none. The rest, and what is raised, is that of
    `token_law`; also for a scheme that lacks its u.

    Where nothing is cut off, the argmax needs no normalised p: one float32 sum a token. Float64
    laws are made for a few rows at a time, and `randomised` weighs only the tokens that stand a
    chance. O(B V) time.

    >>> import torch
    >>> draw_tokens(torch.tensor([[0.0, 9.0, 0.0]]), [[7]], Watermark(3, "gumbel")).tolist()
    [1]
    """
    import torch

    watermark.check_width(logits)
    fixed = watermark.scheme in FIXED
    require(fixed or u is not None, "u", None, f"a uniform a row, for {watermark.scheme}")
    if fixed and temperature > 0 and top_p == 1:
        noise = keyed_uniforms(contexts, watermark).log_().neg_()
        if watermark.scheme == "gumbel":
            noise = noise.log_().neg_()
        scaled = logits if temperature == 1 else logits / temperature
        race = noise.add_(scaled.cpu()).numpy()
        best = race.argmax(axis=-1)  # NumPy's is several times faster than torch's
        fine = bool(np.isfinite(race[np.arange(len(race)), best]).all())
        require(fine, "logits", "NaN, +inf, or a row of -inf", "in every row some finite number")
        return torch.from_numpy(best).to(logits.device)
    chosen = []
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        if watermark.scheme == "randomised":
            law = model_law(logits[rows], temperature, top_p)
            chosen.append(_draw_randomised(law, contexts[rows], watermark, u[rows]))
            continue
        law = token_law(
            logits[rows], contexts[rows], watermark, temperature=temperature, top_p=top_p
        )
        chosen.append(law.argmax(dim=-1) if fixed else categorical.invert(law, u[rows]))
    return torch.cat(chosen)


def model_law(logits: Any, temperature: float = 1.0, top_p: float = 1.0) -> Any:
    """p: the log-probabilities without a watermark, float64 (B, V)."""
    if temperature == 1 and top_p == 1:
        return categorical.normalize(logits)
    return categorical.truncate(logits, temperature=temperature, top_p=top_p)


def _draw_randomised(law: Any, contexts: Any, watermark: Watermark, u: Any) -> Any:
    """A draw from u_v^(1/p_v), of the tokens whose weight is above e^-50 of the largest."""
    import torch

    uniforms = keyed_uniforms(contexts, watermark).to(law.device)
    race = law - uniforms.log().neg_().log_()  # a token's weight is exp(-exp(-race))
    best = race.amax(dim=-1, keepdim=True)
    rows, tokens = (race >= -(best.neg().exp() + FAINT).log()).nonzero().T
    counts = rows.bincount(minlength=len(law))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    weights = law.new_full((len(law), int(counts.max())), -np.inf)
    weights[rows, places] = uniforms[rows, tokens].double().log() / law[rows, tokens].exp()
    few = rows.new_zeros(weights.shape)
    few[rows, places] = tokens
    picked = categorical.invert(categorical.normalize(weights), u)
    return few.gather(-1, picked[:, None])[:, 0]


class GreenListProcessor:
    """KGW for `generate(logits_processor=[...])`: the bias on green tokens, and nothing else.

    `generate` goes on with temperature, nucleus and draw. Rows padded on the left with another id
    than 0 have it in the contexts of their first h tokens. Kirchenbauer et al., 2023, arXiv
    2301.10226. See `add_green_bias` for what it costs.
    """

    def __init__(self, watermark: Watermark) -> None:
        require(watermark.scheme == "kgw", "scheme", repr(watermark.scheme), "'kgw'")
        self.watermark = watermark

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        contexts = self.watermark.contexts(input_ids[:, -self.watermark.context :])
        return add_green_bias(scores, contexts, self.watermark)


class KeyedDrawProcessor:
    """Any scheme for `generate(logits_processor=[...])`: it draws, and lets that token alone stand.

    transformers calls it before temperature and nucleus, so it owns both: leave `generate`'s
    neutral. rng: as `RowUniforms`; row b at step t has the uniform of (rng, b, t), so the same
    seed gives the same tokens; steps count its calls: a new processor for each `generate`.
    Warns of temperature 0 for all but kgw: an argmax has no room for a watermark.
    """

    def __init__(
        self,
        watermark: Watermark,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rng: Rng = None,
    ) -> None:
        check_temperature(watermark.scheme, temperature)
        self.watermark, self.uniforms, self.step = watermark, RowUniforms(rng), 0
        self.how = {"temperature": temperature, "top_p": top_p}
        model_law(np.zeros(1), **self.how)  # what it refuses, it refuses now

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        contexts = self.watermark.contexts(input_ids[:, -self.watermark.context :])
        u = self.uniforms.at(np.arange(len(scores)), stream="tokens", round=self.step)
        self.step += 1
        chosen = draw_tokens(scores, contexts, self.watermark, u, **self.how)
        return torch.full_like(scores, -np.inf).scatter_(-1, chosen[:, None], 0.0)


def check_temperature(scheme: str, temperature: float) -> None:
    """Warn of an argmax, in which there is no room for a watermark."""
    if temperature == 0 and scheme in SCHEMES and scheme != "kgw":
        warnings.warn("temperature: at 0 the text holds no watermark", stacklevel=3)


# ── laws ────────────────────────────────────────────────────────────────────────────────────────

LOG_TIMES = np.arange(-40, 40, 1 / 16)  # the trapezoid rule for ∫ dt, t = e^y


def expected_gumbel_score(p: ArrayLike) -> Any:
    r"""The mean of -log(1 - u) of a token that `gumbel` chose: Σ_v p_v H(1/p_v), float64 (...).

    H(a) = ψ(1 + a) + 0.5772... is the harmonic number, as u_v given that v was chosen has the law
    Beta(1/p_v, 1). It is 1 for a certain token, as for a text that doesn't know the key, and grows
    with the entropy. p: (..., V) probabilities. Raises `InputError` unless they sum to 1. O(V).

    >>> expected_gumbel_score([[0.5, 0.5], [1.0, 0.0]]).round(12).tolist()
    [1.5, 1.0]
    """
    q = _probabilities(p)
    a = np.divide(1, q, out=np.ones_like(q), where=q > 0)
    return (q * (digamma(1 + a) + np.euler_gamma)).sum(axis=-1)


def randomised_gumbel_marginal(p: ArrayLike) -> Float:
    r"""How often `randomised` draws each token, on average over keys: float64 (V,).

    m_v = E[w_v / Σ_j w_j] = ∫_0^∞ A_v(t) Π_{j≠v} B_j(t) dt,  w_j = u_j^(1/p_j),
    B(t) = E e^{-tw} = p t^{-p} γ(p, t),  A(t) = E w e^{-tw} = p t^{-p-1} γ(1 + p, t).

    Flatter than p. p: (V,) probabilities. Raises `InputError` unless they sum to 1.
    The trapezoid rule in log t, to about 1e-12; O(1280 V) time and memory.

    >>> randomised_gumbel_marginal([0.9, 0.1]).round(6).tolist()
    [0.873593, 0.126407]
    """
    q = _probabilities(p)
    require(q.ndim == 1, "p", f"{q.ndim} dimensions", "one")
    out = np.zeros_like(q)
    some = q > 0
    mass = q[some, None]
    log_a = np.log(mass) + gammaln(1 + mass) - (mass + 1) * LOG_TIMES
    log_a += np.log(gammainc(1 + mass, np.exp(LOG_TIMES)))
    out[some] = np.exp(log_a + _others(mass) + LOG_TIMES).sum(axis=1) * np.diff(LOG_TIMES)[0]
    return out


def expected_randomised_score(p: ArrayLike) -> float:
    r"""The mean of -log(1 - u) of a token that `randomised` drew.

    Σ_v ∫_0^∞ C_v(t) Π_{j≠v} B_j(t) dt,  C_v(t) = ∫_0^1 -log(1 - u) w e^{-tw} du,  w = u^(1/p_v).

    Below that of `gumbel`: the second draw blurs the mark. p and what is raised: as
    `randomised_gumbel_marginal`. Double-exponential quadrature in u; O(1280 · 200 V) time.

    >>> round(expected_randomised_score([0.6, 0.3, 0.1]), 6)
    1.52539
    """
    q = _probabilities(p)
    require(q.ndim == 1, "p", f"{q.ndim} dimensions", "one")
    mass = q[q > 0]
    step = 1 / 32
    s = np.arange(-3.5, 3.5, step)
    bend = np.pi * np.sinh(s)
    log_u, log_rest = -np.logaddexp(0, -bend), -np.logaddexp(0, bend)  # log u, log(1 - u)
    density = -log_rest * np.exp(log_u + log_rest) * np.pi * np.cosh(s) * step
    others, times = _others(mass[:, None]), np.exp(LOG_TIMES)[:, None]
    total = 0.0
    for one, rest in zip(mass, others, strict=True):
        log_w = log_u / one
        inner = np.exp(log_w - times * np.exp(log_w)) @ density
        total += float((inner * np.exp(rest + LOG_TIMES)).sum())
    return total * float(np.diff(LOG_TIMES)[0])


def _others(mass: Float) -> Float:
    """log Π_{j≠v} B_j(t) at `LOG_TIMES`, (V, T), for probabilities (V, 1)."""
    log_b = np.log(mass) + gammaln(mass) - mass * LOG_TIMES
    log_b += np.log(gammainc(mass, np.exp(LOG_TIMES)))
    return np.asarray(log_b.sum(axis=0) - log_b)


def _probabilities(p: ArrayLike) -> Float:
    q = np.asarray(on_host(p), np.float64)
    fine = q.ndim >= 1 and bool((q >= 0).all())
    fine = fine and bool((np.abs(q.sum(axis=-1) - 1) < 1e-6).all())
    require(fine, "p", "other numbers", "probabilities that sum to 1 along the last axis")
    return np.where(q < np.finfo(np.float64).tiny, 0.0, q)  # gamma functions fail on the rest
