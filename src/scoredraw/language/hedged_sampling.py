r"""A small pool of samples that holds the greedy one, and what one may hope and must fear from it.

A high temperature finds better answers and worse ones. Hedging keeps the model's own best guess in
the pool: of N samples the first is greedy (temperature 0), the other N - 1 are drawn at τ, at best
without the unlikely tokens (min-p: below p_base of the likeliest one's, after the temperature).
With scores s of the pool's members and g of the greedy one, over the prompts x,

    hope = 100 mean_x (max_i s_xi - g_x) / |mean_x g_x|,  risk the same with min_i  (per cent)

In a pool that holds the greedy sample hope ≥ 0 ≥ risk, prompt by prompt: that is the hedge. What a
pool of another size would show is exact, by order statistics.

Khairi, D'souza, Shen, Kreutzer and Hooker, "When life gives you samples: the benefits of scaling
up inference compute for multilingual LLMs", EMNLP 2025, arXiv 2506.20544. The paper describes hope
and risk in words; the formula is ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import AnswerPool, Key, expected_maximum
from scoredraw.errors import require
from scoredraw.models import Completion, Prompt

Float = NDArray[np.float64]
Progress = Callable[[int, int], Any]

MIN_P = 0.1  # the paper recommends min-p without a value; this is the usual one
ROWS = 64  # samples that go through a model together, where it takes many prompts at once
SUBTAGS = re.compile(r"[a-z]{2,8}(-[a-z0-9]{1,8})*", re.IGNORECASE)
NAMES = {"en": "English", "zh": "Chinese"}


# ── pools ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class SampledPool:
    """The n samples of a prompt; temperatures: float64 (n,), of each, 0 for a greedy one."""

    completions: tuple[Completion, ...]
    temperatures: Float

    @property
    def texts(self) -> tuple[str, ...]:
        """The n texts."""
        return tuple(completion.text for completion in self.completions)

    def answers(self, key: Key | None = None) -> AnswerPool:
        """The pool as a selector takes it. key: the answer that a text gives (None: none)."""
        known: dict[str, Any] = {}
        said = [c.logprobs for c in self.completions if c.logprobs is not None]
        if len(said) == len(self.completions):
            known["logprobs"] = [float(each.sum()) for each in said]
            known["lengths"] = [len(each) for each in said]
        return AnswerPool.of(self.texts, texts=self.texts, key=key, **known)


def hedged_pool(
    source: Any,
    prompt: Prompt,
    n: int = 5,
    *,
    temperature: float = 0.7,
    min_p: float = 0.0,
    max_tokens: int | None = None,
    seed: int | None = 0,
    dedup: bool = False,
) -> SampledPool:
    """One greedy sample, which comes first, and n - 1 at a temperature (the paper: 0.7 to 0.9).

    Arguments and errors as `sample_pool`; with n > 1 the temperature must not be 0 as well.

    >>> pool = hedged_pool(lambda prompt, n, temperature, seed: [f"at {temperature}"] * n, "?", 3)
    >>> pool.texts, pool.temperatures.tolist()
    (('at 0.0', 'at 0.7', 'at 0.7'), [0.0, 0.7, 0.7])
    """
    _check_hedge(n, temperature)
    temperatures = [0.0] + [temperature] * (n - 1)
    return sample_pool(
        source, prompt, temperatures, min_p=min_p, max_tokens=max_tokens, seed=seed, dedup=dedup
    )


def sample_pool(
    source: Any,
    prompt: Prompt,
    temperatures: Sequence[float],
    *,
    min_p: float = 0.0,
    max_tokens: int | None = None,
    seed: int | None = 0,
    dedup: bool = False,
) -> SampledPool:
    """A sample at each of the temperatures, in their order: one, several, and 0 for greedy.

    source: a model with `sample(prompt, n, temperature=, seed=, min_p=, max_tokens=)`, such as
    `models.TransformersModel`, or a function with these arguments that gives n texts or
    `Completion`s; the last two only where they are set. It is called once for each temperature
    that is new. min_p: in [0, 1), after the temperature; `MIN_P` is usual. seed: the same seed,
    the same pool, if the source keeps its word; None takes fresh entropy. dedup: leave out texts
    that came before (by default they stay: agreement is evidence).
    Warns where temperature 0 is asked for more than once: the samples are then all the same.
    Raises InputError for no temperatures, negative ones, min_p outside [0, 1) or with a source that
    does not know it (many servers), and a source that gives another number of samples.

    >>> def generate(prompt, n, temperature, seed):
    ...     return [f"{temperature}: {i}" for i in range(n)]
    >>> sample_pool(generate, "?", [1.0, 0.5, 1.0]).texts
    ('1.0: 0', '0.5: 0', '1.0: 1')
    """
    each = np.asarray(temperatures, np.float64)
    require(each.ndim == 1 and each.size > 0, "temperatures", f"shape {each.shape}", "one or more")
    fine = bool(((each >= 0) & (each < np.inf)).all())
    require(fine, "temperatures", each.tolist(), "numbers of at least 0")
    require(0 <= min_p < 1, "min_p", min_p, "a share in [0, 1)")
    _check_source(source, min_p)
    if (each == 0).sum() > 1:
        warnings.warn(f"{(each == 0).sum()} greedy samples are all the same", stacklevel=2)
    pool: list[Completion | None] = [None] * len(each)
    for number, temperature in enumerate(dict.fromkeys(each.tolist())):
        places = np.flatnonzero(each == temperature)
        how = _options(temperature, min_p, max_tokens)
        count = 1 if temperature == 0 else len(places)
        made = _ask(source, prompt, count, seed=_seed(seed, number), **how)
        for place, completion in zip(places, made * (len(places) // count), strict=True):
            pool[place] = completion
    kept = [(c, t) for c, t in zip(pool, each, strict=True) if c is not None]
    if dedup:
        kept = list({c.text: (c, t) for c, t in reversed(kept)}.values())[::-1]
    return SampledPool(tuple(c for c, _ in kept), np.array([t for _, t in kept]))


def hedged_texts(
    model: Any,
    prompts: Sequence[Prompt],
    n: int = 5,
    *,
    temperature: float = 0.7,
    min_p: float = 0.0,
    max_tokens: int | None = None,
    seed: int | None = 0,
    first: int = 0,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Hedged pools of many prompts: for each a greedy sample and n - 1 at the temperature.

    model: with `sample_all` (`models.TransformersModel`: the samples of several prompts go through
    it together), or with `sample` (a server: prompt by prompt). first: the number of the first
    prompt, where they come in portions. progress: called with (samples done, samples). Other
    arguments and errors as `hedged_pool`, before any work. The same seed gives the same texts.

    >>> class Echo:
    ...     def sample(self, prompt, n, temperature, seed):
    ...         return [prompt + "!" * round(10 * temperature)] * n
    >>> [[c.text for c in pool] for pool in hedged_texts(Echo(), ["a", "b"], 2, temperature=0.2)]
    [['a', 'a!!'], ['b', 'b!!']]
    """
    _check_hedge(n, temperature)
    require(0 <= min_p < 1, "min_p", min_p, "a share in [0, 1)")
    _check_source(model, min_p)
    total = len(prompts) * n
    if not hasattr(model, "sample_all"):
        how: dict[str, Any] = {"temperature": temperature, "min_p": min_p, "max_tokens": max_tokens}
        pools = []
        for number, prompt in enumerate(prompts):
            pool = hedged_pool(model, prompt, n, seed=_seed(seed, first + number), **how)
            pools.append(list(pool.completions))
            if progress is not None:
                progress(n * len(pools), total)
        return pools
    return _in_portions(model, prompts, n, temperature, min_p, max_tokens, seed, first, progress)


def _in_portions(
    model: Any,
    prompts: Sequence[Prompt],
    n: int,
    temperature: float,
    min_p: float,
    max_tokens: int | None,
    seed: int | None,
    begin: int,
    progress: Progress | None,
) -> list[list[Completion]]:
    pools: list[list[Completion]] = []
    total, portion = len(prompts) * n, max(1, ROWS // n)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    done = 0

    def ended(rows: int, _: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    for first in range(0, len(prompts), portion):
        some = prompts[first : first + portion]
        made: list[list[Completion]] = [[] for _ in some]
        for number, (count, at) in enumerate(((1, 0.0), (n - 1, temperature))):
            if not count:
                continue
            how = _options(at, min_p, max_tokens) | {"first": begin + first, "progress": ended}
            more = model.sample_all(some, count, seed=_seed(seed, number), **how)
            made = [old + new for old, new in zip(made, more, strict=True)]
            done += len(some) * count
            ended(0, 0)
        pools.extend(made)
    return pools


def _check_hedge(n: int, temperature: float) -> None:
    require(n >= 1, "n", n, "at least one sample")
    fine = 0 <= temperature < np.inf and (temperature > 0 or n == 1)
    wanted = "a positive number: the greedy sample is in the pool already"
    require(fine, "temperature", temperature, wanted)


def _check_source(source: Any, min_p: float) -> None:
    """InputError for what cannot sample, or cannot cut off unlikely tokens where that is asked."""
    sample, came = getattr(source, "sample", source), type(source).__name__
    require(callable(sample), "source", came, "a model with `sample`, or a function")
    if min_p > 0:
        known = signature(sample).parameters
        takes = "min_p" in known or any(p.kind is p.VAR_KEYWORD for p in known.values())
        require(takes, "min_p", min_p, f"0 for {came}, whose samples cannot be cut off so")


def _options(temperature: float, min_p: float, max_tokens: int | None) -> dict[str, Any]:
    how: dict[str, Any] = {"temperature": temperature}
    if min_p > 0 and temperature > 0:
        how["min_p"] = min_p
    return how if max_tokens is None else how | {"max_tokens": max_tokens}


def _seed(seed: int | None, number: int) -> int | None:
    """A seed for each of several calls; the first has the seed itself."""
    if seed is None or number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _ask(source: Any, prompt: Prompt, n: int, **how: Any) -> list[Completion]:
    sample = getattr(source, "sample", source)
    made = list(sample(prompt, n, **how))
    require(len(made) == n, "source", f"{len(made)} samples", f"the {n} that it was asked for")
    return [each if isinstance(each, Completion) else Completion(str(each)) for each in made]


# ── evidence in another language ────────────────────────────────────────────────────────────────


def evidence_language(language: str) -> str:
    """The language to take evidence in: Chinese for English, English for any other (BCP 47).

    Raises InputError for what is no language tag.

    >>> evidence_language("en-GB"), evidence_language("de")
    ('zh', 'en')
    """
    fits = SUBTAGS.fullmatch(language) is not None
    require(fits, "language", repr(language), "a BCP 47 tag such as en or pt-BR")
    return "zh" if language.lower().split("-")[0] == "en" else "en"


def cross_language_prompt(prompt: Prompt, language: str) -> Prompt:
    """The prompt with the request to answer in a language (a BCP 47 tag).

    >>> cross_language_prompt("Was ist ein Elch?", "en")
    'Was ist ein Elch?\\n\\nAnswer in English.'
    """
    evidence_language(language)
    name = NAMES.get(language.lower(), f"the language with the code {language}")
    request = f"\n\nAnswer in {name}."
    if isinstance(prompt, str):
        return prompt + request
    *before, last = prompt
    return [*before, {**last, "content": last["content"] + request}]


def cross_language_evidence(
    source: Any, prompt: Prompt, language: str, m: int = 3, **how: Any
) -> tuple[str, ...]:
    """m answers in another language, a hedged pool of them: evidence for X-MBR, not candidates.

    language: of the prompt (BCP 47). how: as `hedged_pool`, to whose arguments and errors it adds
    nothing. In the paper m = 3.
    """
    asked = cross_language_prompt(prompt, evidence_language(language))
    return hedged_pool(source, asked, m, **how).texts


# ── hope and risk ───────────────────────────────────────────────────────────────────────────────


class HopeRisk(NamedTuple):
    """hope, risk: in per cent of the mean baseline. best, worst: float64 (P,), what the best and
    the worst of each prompt's pool are expected to gain over it, in units of the score."""

    hope: float
    risk: float
    best: Float
    worst: Float


def hope_and_risk(
    scores: ArrayLike,
    greedy: ArrayLike | None = None,
    size: int | None = None,
    *,
    hedged: bool = False,
) -> HopeRisk:
    r"""What the best and the worst of a pool gain over the greedy sample; the formula stands above.

    scores: (P, N), of pool member i of prompt x. greedy: (P,), of the greedy output; None compares
    with the mean single sample, mean_i s_xi. size: of the pool; a smaller one than N is a random
    subset, and the expectation over all of them is exact:

    .. math:: E\max = \sum_{j=1}^{N-n+1} \binom{N-j}{n-1}\Big/\binom Nn\; s_{(j)}

    hedged: the pool is the greedy sample and size - 1 of the N, so that
    E max(g, max S) = E max_{i∈S} max(g, s_i).
    Raises InputError for NaN or infinite scores, shapes that do not match, sizes beyond the pool,
    and a mean baseline of 0. O(P N log N).

    >>> found = hope_and_risk([[4.0, 1.0], [2.0, 3.0]], greedy=[2.0, 2.0])
    >>> found.hope, found.risk
    (75.0, -25.0)
    >>> hope_and_risk([[4.0, 1.0], [2.0, 3.0]], [2.0, 2.0], hedged=True, size=2).hope
    37.5
    """
    s = _finite(scores, "scores", 2)
    pool = s.shape[1] + hedged
    n = pool if size is None else size
    require(n == int(n) and 1 <= n <= pool, "size", n, f"a count from 1 to {pool}")
    require(greedy is not None or not hedged, "greedy", None, "its scores, for a hedged pool")
    base = s.mean(axis=1) if greedy is None else _finite(greedy, "greedy", 1)
    require(base.shape == s.shape[:1], "greedy", f"shape {base.shape}", f"({len(s)},)")
    level = abs(float(base.mean()))
    require(level > 0, "greedy" if greedy is not None else "scores", "mean 0", "another mean")
    gains, drawn = s - base[:, None], int(n) - hedged
    best = worst = np.zeros(len(s))
    if drawn:
        above, below = gains, gains
        if hedged:
            above, below = np.maximum(gains, 0.0), np.minimum(gains, 0.0)
        best = expected_maximum(above, drawn)[:, 0]
        worst = -expected_maximum(-below, drawn)[:, 0]
    hope, risk = (100 * float(each.mean()) / level for each in (best, worst))
    return HopeRisk(hope, risk, best, worst)


def _finite(values: ArrayLike, name: str, dimensions: int) -> Float:
    array = np.asarray(values, np.float64)
    fits = array.ndim == dimensions and array.size > 0
    wanted = "(prompts, samples)" if dimensions == 2 else "one for each prompt"
    require(fits, name, f"shape {array.shape}", wanted)
    require(bool(np.isfinite(array).all()), name, "NaN or infinity", "finite numbers")
    return array
