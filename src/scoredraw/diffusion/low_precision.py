r"""What a categorical sampler draws whose noise has few bits.

The Gumbel race takes the largest of log π_k + g_k, g = -log(-log u): the first arrival among
E_k / π_k, where E = -log u is Exp(1). Uniforms of b bits are at most 1 - 2^-b, so that E is never
below

    δ = -log(1 - 2^-b),        g never above -log δ:  16.6 for float32 (24 bits), 36.7 for float64.

Class k cannot arrive before δ/π_k: the rare ones come late and lose, as if the temperature were
lower. It bites where classes are many and rare, above all in the ancestral sampling of masked
models, whose tokens have probabilities π/N beside a mask of 1 - 1/N; the gain in "quality" with
more steps is lost diversity. A direct draw from π is nearly immune, float64 noise wholly.

`truncated_categorical_probs`  the law where E = δ + Exp(1): exact, continuous above δ.
`grid_categorical_probs`       the law where E has the 2^b - 1 values that b bits can give: what a
                               program draws. Milder: a rare class that the truncation lets win
                               with e^{-a}, a = δ/π, keeps a/(e^a - 1) of its share.

Zheng, Chen, Mao, Liu, Zhu and Zhang, "Masked diffusion models are secretly time-agnostic masked
models and exploit inaccurate categorical sampling", ICLR 2025, arXiv 2409.02908. The grid law is
not in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import categorical
from scoredraw.arrays import is_tensor
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]

NOISE_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
MOST_ARRIVALS = 2**25  # that `grid_categorical_probs` puts in order: some 2 GB
SUM_SLACK = 1e-6


def noise_bits(noise: Any) -> int:
    """The bits of uniforms of a dtype (its name or itself), or a number of bits from 2 to 53.

    >>> noise_bits("float32"), noise_bits(8)
    (24, 8)
    """
    name = str(noise).removeprefix("torch.")
    if name in NOISE_BITS:
        return NOISE_BITS[name]
    wanted = f"bits from 2 to 53, or one of {', '.join(NOISE_BITS)}"
    require(isinstance(noise, int | np.integer), "noise", repr(noise), wanted)
    bits = whole(noise, "noise", 2)
    require(bits <= 53, "noise", bits, wanted)
    return bits


def least_noise(noise: Any) -> float:
    """δ = -log(1 - 2^-b), the least -log u that noise of this precision has.

    >>> f"{least_noise('float32'):.3e}"
    '5.960e-08'
    """
    return float(-np.log1p(-(2.0 ** -noise_bits(noise))))


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────


def sample_categorical(logits: Any, noise: Any = "float64", rng: Any = None) -> Any:
    """A token of each row of logits (..., V) by the Gumbel race with noise of a declared precision.

    "float64" is `categorical.draw`, which draws softmax(logits) exactly. With fewer bits the
    uniforms are k 2^-b, k = 1 .. 2^b - 1 (0, whose token could never win, is left out), all other
    arithmetic is float64: what is drawn has the law `grid_categorical_probs`, and is there to show
    what such a sampler does. -> int64 (...). rng as in `categorical.draw`, whose errors are raised.

    >>> int(sample_categorical(np.log([0.2, 0.5, 0.3]), rng=0))
    2
    """
    bits = noise_bits(noise)
    if bits == 53:
        return categorical.draw(logits, rng)
    logprobs = categorical.normalize(logits)
    if is_tensor(logprobs):
        import torch

        fine = rng is None or isinstance(rng, torch.Generator)
        require(fine, "rng", type(rng).__name__, "a torch.Generator or None for tensors")
        source = torch.default_generator if rng is None else rng
        k = torch.randint(1, 2**bits, logprobs.shape, generator=source, device=source.device)
        return race(logprobs, k.to(logprobs.device).double() / 2**bits)
    return race(logprobs, generator(rng).integers(1, 2**bits, logprobs.shape) / 2**bits)


def on_grid(u: Float, bits: int) -> Float:
    """Uniforms in [0, 1) as k 2^-b, k = 1 .. 2^b - 1.

    >>> on_grid(np.array([0.0, 0.999]), 2).tolist()
    [0.25, 0.75]
    """
    last = 2.0**bits - 1
    return np.asarray(np.minimum(1 + np.floor(u * last), last) / 2.0**bits)


def race(logprobs: Any, u: Any) -> Any:
    """argmax log p - log(-log u) over the last axis, the first of equals; u in (0, 1)."""
    if is_tensor(logprobs):
        return (logprobs - (-u.log()).log()).argmax(dim=-1)
    return (logprobs - np.log(-np.log(u))).argmax(axis=-1)


# ── the laws ────────────────────────────────────────────────────────────────────────────────────


def truncated_categorical_probs(
    probs: ArrayLike, noise: Any = "float32", *, delta: float | None = None
) -> Float:
    r"""What the Gumbel race draws where -log u has no value below δ: float64 (..., K).

    Sorted by falling π, with S_j = π_1 + ... + π_j and a_j = δ/π_j, a_{K+1} = ∞,

        P(n) = π_n Σ_{j≥n} e^{jδ} (e^{-S_j a_j} - e^{-S_j a_{j+1}}) / S_j :

    E = δ + Exp(1) by memorylessness, so class k starts to arrive at a_k, and between a_j and
    a_{j+1} the first j classes race on. δ: `least_noise(noise)`, or `delta`. δ = 0 gives π.
    Raises InputError for probabilities that are negative, NaN or do not sum to one, and δ < 0.
    O(K log K). Zheng et al. 2025, arXiv 2409.02908; the closed form is ours.

    >>> truncated_categorical_probs([0.5, 0.3, 0.2], delta=0.1).round(4).tolist()
    [0.5468, 0.2894, 0.1637]
    """
    p = checked(probs)
    least = least_noise(noise) if delta is None else float(delta)
    require(0 <= least < np.inf, "delta", least, "a number of at least 0")
    order = np.argsort(-p, axis=-1, kind="stable")
    pi = np.take_along_axis(p, order, -1)
    total = np.cumsum(pi, axis=-1)
    count = np.arange(1, pi.shape[-1] + 1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        start = np.where(pi > 0, least / pi, np.inf)
        possible = np.isfinite(start)  # not 0, nor so rare that δ/π overflows
        after = np.append(start[..., 1:], np.full((*pi.shape[:-1], 1), np.inf), axis=-1)
        alone = np.exp(count * least - total * start)  # at most 1, as S_j >= j π_j
        term = np.where(possible, alone * -np.expm1(-total * (after - start)) / total, 0.0)
    law = pi * np.cumsum(term[..., ::-1], axis=-1)[..., ::-1]
    found = np.empty_like(law)
    np.put_along_axis(found, order, law, -1)
    return found


def grid_categorical_probs(
    probs: ArrayLike, noise: Any = "float32", *, dominated: bool = False
) -> Float:
    r"""What the Gumbel race draws from uniforms k 2^-b, k = 1 .. 2^b - 1: float64 (K,).

    Class n arrives at e_j/π_n, e_j = -log(1 - j 2^-b), for j = 1 .. M = 2^b - 1, each with
    probability 1/M. All arrivals of all classes put in order (the first class of equals), one
    wins if no other class has arrived before,

        P(n) = Σ_j 1/M Π_{i≠n} (1 - c_i/M),    c_i: how many of i's arrivals lie before,

    which is exact and takes O(A log A), A arrivals up to the last that the likeliest class can
    have: up to some 16 bits. dominated=True is for one class that nearly always wins and any
    number of bits: the others see it as continuous, so that

        P(n) ∝ π_n a/(e^a - 1),    a = δ (1 - π_n)/π_n.

    Raises InputError as `truncated_categorical_probs`, and for more than 2^25 arrivals.

    >>> grid_categorical_probs([0.5, 0.3, 0.2], 2).round(4).tolist()
    [0.6296, 0.2963, 0.0741]
    """
    p, bits = checked(probs), noise_bits(noise)
    require(p.ndim == 1, "probs", p.shape, "one row of probabilities")
    if dominated:
        with np.errstate(divide="ignore", over="ignore"):
            share = p * rare_share(least_noise(bits) * (1 - p) / p)
        return np.asarray(share / share.sum())
    M = 2**bits - 1
    last = bits * np.log(2) / p.max()  # by then the likeliest class has arrived
    expected = M * -np.expm1(-last * p).sum()
    wanted = f"at most {MOST_ARRIVALS:,}: fewer bits or classes, or dominated=True"
    require(expected <= MOST_ARRIVALS, "noise", f"{expected:,.0f} arrivals of {bits} bits", wanted)
    count = np.minimum(np.floor(-np.expm1(-last * p) * 2.0**bits + 1e-6), M).astype(np.int64)
    who = np.repeat(np.arange(len(p)), count)
    before = np.arange(len(who)) - np.repeat(np.cumsum(count) - count, count)  # own arrivals
    order = np.argsort(-np.log1p(-(before + 1) / 2.0**bits) / p[who], kind="stable")
    who, before = who[order], before[order]
    own = np.log((M - before) / M)
    with np.errstate(divide="ignore"):
        change = np.log((M - before - 1) / (M - before))
    ahead = np.append(0.0, np.cumsum(change)[:-1])  # log of all not having arrived
    return np.asarray(np.bincount(who, np.exp(ahead - own) / M, minlength=len(p)), np.float64)


def rare_share(a: ArrayLike) -> Float:
    """a/(e^a - 1), what a rare class keeps on the grid beside one that dominates, a = δ/π.

    >>> rare_share([0.0, 1.0, np.inf]).round(4).tolist()
    [1.0, 0.582, 0.0]
    """
    x = np.asarray(a, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = x * np.exp(-x) / -np.expm1(-x)
    return np.where(x == 0, 1.0, np.where(np.isinf(x), 0.0, share))


# ── what it means for a sampler ─────────────────────────────────────────────────────────────────


def unmasking_probs(probs: ArrayLike, unmask: float) -> Float:
    """The race of an ancestral step: tokens of unmask · π, and the mask, last, of 1 - unmask.

    >>> unmasking_probs([0.5, 0.5], 0.25).tolist()
    [0.125, 0.125, 0.75]
    """
    require(0 < unmask <= 1, "unmask", unmask, "a probability in (0, 1]")
    return np.append(unmask * checked(probs), 1 - unmask)


def entropy(probs: ArrayLike) -> float:
    """-Σ p log p of one row, in nats.

    >>> round(entropy([0.5, 0.5]), 4)
    0.6931
    """
    from scipy.special import entr

    return float(entr(checked(probs)).sum())


def effective_temperature(probs: ArrayLike, drawn: ArrayLike) -> float:
    """The temperature T at which p^{1/T} has the entropy of what was drawn.

    probs, drawn: (K,). Below 1 where diversity is lost. Raises InputError for rows that are no
    probabilities, and where drawn has an entropy that no temperature gives: that of the likeliest
    classes alone at T → 0, or of the uniform law on those that can be drawn at T → ∞.

    >>> p = np.array([0.5, 0.3, 0.2])
    >>> round(effective_temperature(p, p**2 / (p**2).sum()), 6)
    0.5
    """
    from scipy.optimize import brentq

    p, goal = checked(probs), entropy(drawn)
    x = np.log(p[p > 0])
    low, high = np.log(np.count_nonzero(x == x.max())), np.log(len(x))
    wanted = f"between {low:.6g} and {high:.6g}, what temperatures give"
    require(low < goal < high, "drawn", f"an entropy of {goal:.6g}", wanted)

    def excess(log_temperature: float) -> float:
        return (
            entropy(np.exp(categorical.normalize((x - x.max()) / np.exp(log_temperature)))) - goal
        )

    return float(np.exp(brentq(excess, -12.0, 12.0, xtol=1e-12)))


def checked(probs: ArrayLike) -> Float:
    """Probabilities (..., K) as float64, or an InputError."""
    p = np.asarray(probs, np.float64)
    fine = p.ndim >= 1 and p.shape[-1] >= 1 and bool((p >= 0).all())
    require(fine, "probs", "negative, NaN or no numbers", "probabilities")
    off = float(np.abs(p.sum(axis=-1) - 1).max(initial=0))
    require(off <= SUM_SLACK, "probs", f"a sum off by {off:.3g}", "a sum of 1")
    return p
