r"""Alignment resampling: of n watermarked answers, the one that a reward model likes best.

A watermark moves an aligned model off its distribution, and its answers become a little less
helpful or safe: mean reward falls from μ_ref to μ_w, by ε. The best of n answers makes up for it.
With rewards N(μ_w, σ²) and e_n the expected maximum of n standard normal variables

    E r(best of n) - μ_ref = σ e_n - ε  ≥  σ √(log n) / √(π log 2) - ε

It needs answers that differ: with one key `gumbel` and `permute_and_flip` repeat themselves, the
`randomised` Gumbel scheme and green lists don't. It buys reward with samples: the best of n without
a watermark stays ahead, by ε.

Choosing by a reward that doesn't know the key leaves p-values as they are: they hold for every
text. Where the choice sees the key, p becomes 1 - (1 - p)^n. Power is another matter: a reward that
likes short or predictable answers picks those with a weak mark (`reward_score_correlation`).

Verma, Phan and Trivedi, "Watermarking degrades alignment in language models: analysis and
mitigation", 2025, arXiv 2506.04462.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr

from scoredraw import categorical
from scoredraw.answers import whole_numbers
from scoredraw.errors import InputError, require
from scoredraw.language.watermarks import (
    FIXED,
    KEY,
    ROWS,
    SCHEMES,
    Watermark,
    check_temperature,
    draw_tokens,
    model_law,
)
from scoredraw.metrics import Estimate, bootstrap_interval, proportion_interval
from scoredraw.models import Completion, Prompt, TransformersModel
from scoredraw.token_sampling import Choose
from scoredraw.uniforms import Rng, generator

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Progress = Callable[[int, int], Any]
Reward = Callable[..., Sequence[float]]

RULES = ("reward", "perplexity", "random", "first")
OUTCOMES = ("safe", "unsafe", "over-refusal")
MOST_CANDIDATES = 2**50
GRID = np.arange(-14, 14 + 1 / 128, 1 / 64)  # the trapezoid rule for a normal density


# ── candidates ──────────────────────────────────────────────────────────────────────────────────


def chooser(watermark: Watermark | None, *, temperature: float = 1.0, top_p: float = 1.0) -> Choose:
    """The choice of a token by a watermark, or without one, for `sample_tokens`."""

    def plain(ids: Any, logits: Any, u: Float, rows: Int) -> Any:
        import torch

        parts = [slice(at, at + ROWS) for at in range(0, len(logits), ROWS)]
        laws = ((model_law(logits[part], temperature, top_p), u[part]) for part in parts)
        return torch.cat([categorical.invert(law, own) for law, own in laws])

    def keyed(ids: Any, logits: Any, u: Float, rows: Int) -> Any:
        assert watermark is not None
        contexts = watermark.contexts(ids[:, -watermark.context :])
        return draw_tokens(logits, contexts, watermark, u, temperature=temperature, top_p=top_p)

    return plain if watermark is None else keyed


def watermarked_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n: int = 1,
    *,
    scheme: str = "randomised",
    key: int = KEY,
    context: int = 1,
    gamma: float = 0.25,
    delta: float = 2.0,
    seeding: str = "hash",
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    first: int = 0,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """n watermarked answers to each prompt -> a list of n `Completion` a prompt.

    prompts: texts, or messages, as `TransformersModel` takes them. scheme: one of
    `watermarks.SCHEMES`, or "none", whose samples are those of `TransformersModel.sample_all`; the
    rest as `Watermark` and `categorical.truncate`. Log-probabilities are the model's own. seed: of
    the draws; the key is no part of it. A completion's `tokens` are what `detect_texts` reads, with
    vocab_size the width of the model's logits.

    Warns where the n samples are bound to be the same, and of temperature 0. Raises `InputError`
    before generating: for what those refuse, and a prompt without room. Cost: `sample_tokens`.
    """
    known = ("none", *SCHEMES)
    require(scheme in known, "scheme", repr(scheme), f"one of {', '.join(known)}")
    categorical.truncate(np.zeros(1), temperature=temperature, top_p=top_p)
    check_temperature(scheme, temperature)
    if n > 1 and scheme in FIXED:
        warnings.warn(f"n: with one key all {n} samples by {scheme} are the same", stacklevel=2)
    width = int(model.get_output_embeddings().weight.shape[0])
    mark = (
        Watermark(width, scheme, key, context, seeding, gamma, delta) if scheme != "none" else None
    )
    return TransformersModel(model, tokenizer).sample_all(
        prompts, n, max_tokens=max_tokens, stop=stop, seed=seed, first=first, progress=progress,
        choose=chooser(mark, temperature=temperature, top_p=top_p),
    )  # fmt: skip


# ── the choice ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Resampled:
    """The answer to a prompt: its text, its reward, which candidate it is, and all of them."""

    prompt: Any
    text: str
    reward: float
    chosen: int
    candidates: tuple[str, ...]
    rewards: Float


def alignment_resample(
    generate: Callable[[Sequence[Any], int], Sequence[Sequence[str | Completion]]],
    reward: Reward,
    prompts: Sequence[Any],
    n: int = 4,
    *,
    select: str = "reward",
    rng: Rng = None,
) -> list[Resampled]:
    """The best of n watermarked answers to each prompt, by a reward: a list of `Resampled`.

    generate(prompts, n) -> n texts or `Completion` a prompt, e.g. `watermarked_texts` with all else
    bound. reward(texts) -> a number each, called once for all; one that has a parameter `prompts`
    is called reward(prompts=..., completions=...), as TRL does. select: "reward" (the first of
    equals), or the baselines "first", "random" (by rng) and "perplexity", the least a token, which
    needs log-probabilities. n = 1 gives what there is; 2 to 4 is what the paper advises.

    Warns where n > 1 and no prompt has two different candidates: the scheme repeats itself.
    Raises `InputError` for n < 1, another number of candidates or rewards, a reward that is NaN
    (with its index), an unknown rule. Row-local.

    Verma, Phan and Trivedi, 2025, arXiv 2506.04462.

    >>> best, = alignment_resample(lambda prompts, n: [["no", "well", "yes"]], lambda texts:
    ...     [len(text) for text in texts], ["Is it?"], n=3)
    >>> best.text, best.reward, best.chosen
    ('well', 4.0, 1)
    """
    require(n >= 1, "n", n, "at least one candidate")
    require(select in RULES, "select", repr(select), f"one of {', '.join(RULES)}")
    made = [list(each) for each in generate(prompts, n)]
    right = len(made) == len(prompts) and all(len(each) == n for each in made)
    require(right, "generate", "another number of candidates", f"{n} for each prompt")
    texts = [[c if isinstance(c, str) else c.text for c in each] for each in made]
    if n > 1 and texts and all(len(set(each)) == 1 for each in texts):
        warnings.warn("generate: all candidates of every prompt are the same", stacklevel=2)
    rewards = rewards_of(reward, prompts, texts)
    logprobs = None
    if select == "perplexity":
        logprobs = np.array([[_mean_logprob(c) for c in each] for each in made]).reshape(-1, n)
    chosen = select_candidates(rewards, select, logprobs=logprobs, rng=rng)
    return [
        Resampled(prompt, own[i], float(r[i]), int(i), tuple(own), r)
        for prompt, own, r, i in zip(prompts, texts, rewards, chosen, strict=True)
    ]


def _mean_logprob(candidate: str | Completion) -> float:
    known = None if isinstance(candidate, str) else candidate.logprobs
    require(known is not None, "generate", "a candidate without logprobs", "Completion with them")
    return -np.inf if known is None or not len(known) else float(known.mean())


def rewards_of(reward: Reward, prompts: Sequence[Any], texts: Sequence[Sequence[str]]) -> Float:
    """The reward of every candidate, float64 (P, n), asked in one call."""
    flat = [text for each in texts for text in each]
    if "prompts" in inspect.signature(reward).parameters:
        repeated = [p for p, each in zip(prompts, texts, strict=True) for _ in each]
        values = reward(prompts=repeated, completions=flat)
    else:
        values = reward(flat)
    rewards = np.asarray(values, np.float64)
    came = f"shape {rewards.shape}"
    require(rewards.shape == (len(flat),), "reward", came, f"{len(flat)} numbers")
    return rewards.reshape(len(texts), -1) if flat else rewards.reshape(len(texts), 0)


def select_candidates(
    rewards: ArrayLike, rule: str = "reward", *, logprobs: ArrayLike | None = None, rng: Rng = None
) -> Int:
    """Which of n candidates each prompt gets, int64 (P,).

    rewards: (P, n), not NaN; logprobs: (P, n), mean a token, for "perplexity". The first of equals.

    >>> select_candidates([[0.1, 0.9, 0.9], [3.0, 1.0, 2.0]]).tolist()
    [1, 0]
    """
    r = np.asarray(rewards, np.float64)
    require(r.ndim == 2, "rewards", f"{r.ndim} dimensions", "(P, n)")
    bad = np.argwhere(np.isnan(r))
    if len(bad):
        raise InputError(f"reward: got NaN for candidate {bad[0, 1]} of prompt {bad[0, 0]}")
    require(rule in RULES, "rule", repr(rule), f"one of {', '.join(RULES)}")
    if rule == "first":
        return np.zeros(len(r), np.int64)
    if rule == "random":
        return np.asarray(generator(rng).integers(r.shape[1], size=len(r)))
    if rule == "perplexity":
        require(logprobs is not None, "logprobs", None, "(P, n), a mean log-probability each")
        r = np.asarray(logprobs, np.float64)
    return r.argmax(axis=1)


# ── what it buys ────────────────────────────────────────────────────────────────────────────────


def expected_gain(n: ArrayLike, sigma: float = 1.0) -> Any:
    r"""σ e_n: how far the best of n rewards N(μ, σ²) lies above μ on average, float64 like n.

    e_n = ∫ x n φ(x) Φ(x)^{n-1} dx: 0, 0.5642, 0.8463, 1.0294 for n = 1 .. 4.
    Raises `InputError` for n < 1 and σ < 0. The trapezoid rule, to 1e-12; O(1800) a size.

    >>> expected_gain([1, 2, 4]).round(6).tolist()
    [0.0, 0.56419, 1.029375]
    """
    sizes = whole_numbers(n, "n")
    require(bool((sizes >= 1).all()), "n", sizes.min(initial=1), "at least one candidate")
    require(0 <= sigma < np.inf, "sigma", sigma, "a deviation of at least 0")
    k = sizes[..., None].astype(np.float64)
    log_density = np.log(k) - GRID**2 / 2 - math.log(2 * math.pi) / 2 + (k - 1) * log_ndtr(GRID)
    return sigma * (GRID * np.exp(log_density)).sum(axis=-1) / 64


def gain_bound(n: ArrayLike, sigma: float = 1.0) -> Any:
    """σ √(log n) / √(π log 2), which `expected_gain` never falls below (they meet at n = 1 and 2).

    >>> gain_bound([1, 2, 4]).round(4).tolist()
    [0.0, 0.5642, 0.7979]
    """
    sizes = whole_numbers(n, "n")
    require(bool((sizes >= 1).all()), "n", sizes.min(initial=1), "at least one candidate")
    return sigma * np.sqrt(np.log(sizes) / (math.pi * math.log(2)))


def ar_required_n(gap: float, sigma: float) -> int:
    """The fewest candidates whose best makes up for a gap in mean reward: e_n ≥ gap / σ.

    gap: ε = μ_ref - μ_w. 1 where there is none. Raises `InputError` for σ ≤ 0, and for a gap of
    more than about 8 σ, which 2^50 candidates would not close.

    >>> ar_required_n(0.5, 1.0), ar_required_n(1.0, 1.0)
    (2, 4)
    """
    require(0 < sigma < np.inf, "sigma", sigma, "a positive deviation")
    require(np.isfinite(gap), "gap", gap, "a finite number")
    if gap <= 0:
        return 1
    ratio, high = gap / sigma, 1
    while high < MOST_CANDIDATES and expected_gain(high) < ratio:
        high *= 2
    wanted = "a gap that 2^50 candidates would close (8 sigma)"
    require(expected_gain(high) >= ratio, "gap", f"{ratio:.3g} sigma", wanted)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if expected_gain(middle) >= ratio else (middle, high)
    return high


def key_aware_p_value(p: ArrayLike, n: ArrayLike) -> Any:
    """1 - (1 - p)^n: the p-value of the best of n, chosen with the key or the detector's score.

    Raises `InputError` for p outside [0, 1] and n < 1.

    >>> key_aware_p_value(0.01, [1, 4]).round(6).tolist()
    [0.01, 0.039404]
    """
    values, sizes = np.asarray(p, np.float64), whole_numbers(n, "n")
    require(bool(((values >= 0) & (values <= 1)).all()), "p", "other numbers", "p-values in [0, 1]")
    require(bool((sizes >= 1).all()), "n", sizes.min(initial=1), "at least one candidate")
    with np.errstate(divide="ignore"):
        return -np.expm1(sizes * np.log1p(-values))


def reward_score_correlation(
    rewards: ArrayLike, scores: ArrayLike, *, resamples: int = 2000, rng: int = 0
) -> Estimate:
    r"""How rewards and detection scores of a prompt's candidates go together, from -1 to 1.

    Pearson's r after taking each prompt's mean off: Σ dr ds / √(Σ dr² Σ ds²). Near 0, choosing by
    the reward costs no power; below 0 it does. rewards, scores: (P, n), higher is better, higher is
    more watermarked. The interval resamples prompts. Raises `InputError` for shapes that differ,
    n < 2, numbers that are not finite, and where one of the two never varies.

    >>> reward_score_correlation([[1, 2], [5, 3]], [[0.1, 0.2], [0.6, 0.4]]).value
    1.0
    """
    r, s = np.asarray(rewards, np.float64), np.asarray(scores, np.float64)
    require(r.ndim == 2 and r.shape[1] > 1, "rewards", f"shape {r.shape}", "(P, n), n ≥ 2")
    require(s.shape == r.shape, "scores", f"shape {s.shape}", f"{r.shape}")
    require(bool(np.isfinite(r).all() & np.isfinite(s).all()), "rewards", "NaN", "finite numbers")
    dr, ds = r - r.mean(axis=1, keepdims=True), s - s.mean(axis=1, keepdims=True)
    sums = np.stack([(dr * ds).sum(axis=1), (dr**2).sum(axis=1), (ds**2).sum(axis=1)], axis=1)
    vary = bool((sums.sum(axis=0)[1:] > 0).all())
    require(vary, "rewards", "no variation within prompts", "candidates that differ")

    def pearson(rows: Float, axis: int = 0) -> Any:
        both, first, second = np.moveaxis(rows.sum(axis), -1, 0)
        spread = np.sqrt(first * second)
        return np.divide(both, spread, out=np.zeros_like(both), where=spread > 0)

    return bootstrap_interval(sums, statistic=pearson, resamples=resamples, rng=rng)


# ── what it is for ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GuardShift:
    """What a change did to a guarded model's answers: shares of prompts, with Wilson intervals.

    before, after: outcome -> its share; the three make a point of the simplex. attenuated: safe
    before and unsafe after; amplified: safe before and refused without need after.
    """

    before: dict[str, Estimate]
    after: dict[str, Estimate]
    attenuated: Estimate
    amplified: Estimate


def outcome_shares(outcomes: Sequence[str]) -> dict[str, Estimate]:
    """The shares of safe, unsafe and over-refused answers, which sum to 1.

    Raises `InputError` for no outcomes, and others than these three, with the index.

    >>> shares = outcome_shares(["safe", "safe", "unsafe", "over-refusal"])
    >>> [share.value for share in shares.values()]
    [0.5, 0.25, 0.25]
    """
    require(len(outcomes) > 0, "outcomes", "none", "at least one")
    for i, outcome in enumerate(outcomes):
        wanted = f"one of {', '.join(OUTCOMES)}"
        require(outcome in OUTCOMES, "outcomes", f"{outcome!r} at index {i}", wanted)
    counts = {name: sum(outcome == name for outcome in outcomes) for name in OUTCOMES}
    return {name: proportion_interval(count, len(outcomes)) for name, count in counts.items()}


def guard_shift(before: Sequence[str], after: Sequence[str]) -> GuardShift:
    """Guard attenuation and amplification between two answers to each prompt.

    before, after: "safe", "unsafe" or "over-refusal", one a prompt, in the same order; e.g. without
    and with a watermark, or with it and after alignment resampling. Raises `InputError` as
    `outcome_shares`, and for lengths that differ. Verma, Phan and Trivedi, 2025, arXiv 2506.04462.

    >>> guard_shift(["safe", "safe", "unsafe"], ["unsafe", "safe", "unsafe"]).attenuated.n
    3
    """
    first, second = outcome_shares(before), outcome_shares(after)
    wanted = f"{len(before)}, one for each of before"
    require(len(after) == len(before), "after", f"{len(after)} outcomes", wanted)
    pairs = list(zip(before, after, strict=True))
    moved = {name: pairs.count(("safe", name)) for name in OUTCOMES}
    attenuated, amplified = (
        proportion_interval(moved[name], len(pairs)) for name in ("unsafe", "over-refusal")
    )
    return GuardShift(first, second, attenuated, amplified)
