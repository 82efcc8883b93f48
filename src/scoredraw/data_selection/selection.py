"""From scores to a subset: prune an end, draw by score, and say what that did.

Scores are oriented so that high means hard. Pruning *easy* drops the low end and keeps the
hardest examples; pruning *hard* drops the high end. A cut keeps exactly those; a softmax or linear
draw without replacement only prefers them, and is what a noisy score deserves. For scores that run
the other way (PVI, margins, confidences) pass ``easy="high"``.

Anand, Tan and Minakova, 2023, "Influence Scores at Scale for Efficient Language Data Sampling",
arXiv:2311.16298.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import sampling
from scoredraw.data_selection.influence import Array, require_finite, to_numpy
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.uniforms import Rng

Mode = Literal["cutoff", "softmax", "linear"]


def prune(
    scores: ArrayLike,
    fraction: float,
    *,
    side: Literal["easy", "hard"] = "easy",
    mode: Mode = "cutoff",
    easy: Literal["low", "high"] = "low",
    eps: float = 0.01,
    temperature: float = 1.0,
    rng: Rng = None,
    by: ArrayLike | None = None,
) -> Draw:
    r"""Drop a fraction of the examples, from the easy or the hard end.

    Keeps :math:`k=\mathrm{round}((1-\text{fraction})\,n)`. With h the score, negated where
    `side` and `easy` say so, that makes what is to be kept high:

    - ``"cutoff"``: the k largest h; ties are broken at random, never by position;
    - ``"softmax"``: k drawn without replacement, :math:`p_i\propto e^{h_i/\text{temperature}}`;
    - ``"linear"``: the same with :math:`p_i\propto\varepsilon+(1-\varepsilon)
      \frac{h_i-\min h}{\max h-\min h}`, so that nothing is quite excluded.

    Scores that are all equal make every mode a uniform draw.

    Parameters
    ----------
    scores : (n,) finite. fraction : in [0, 1). eps, temperature : of the two drawing modes.
    by : (n,) strata, pruned in proportion to their size.
    rng : a seed; the same seed, the same subset.

    Returns
    -------
    Draw of k rows; `draw.indices` suits ``torch.utils.data.Subset`` and ``Dataset.select``.
    Not for totals: a learner sees the kept examples with weight one, as in the paper.

    Raises
    ------
    InputError
        a fraction outside [0, 1) or one that keeps nothing, NaN or infinite scores.

    Time O(n log n). Row-local: a row's fate depends on its score and its own uniform.

    Anand et al., 2023, arXiv:2311.16298; weighted draws: Efraimidis and Spirakis, 2006.

    >>> prune([0.1, 0.9, 0.5, 0.3], 0.5, rng=0).indices.tolist()
    [1, 2]
    >>> prune([0.1, 0.9, 0.5, 0.3], 0.5, side="hard", rng=0).indices.tolist()
    [0, 3]
    """
    values = _scores(scores)
    require(side in ("easy", "hard"), "side", repr(side), "'easy' or 'hard'")
    require(mode in ("cutoff", "softmax", "linear"), "mode", repr(mode), "cutoff, softmax, linear")
    require(easy in ("low", "high"), "easy", repr(easy), "'low' or 'high'")
    size = _kept(len(values), fraction)
    keep_high = (side == "easy") == (easy == "low")
    preferred = values if keep_high else -values
    strata = None if by is None else to_numpy(by)
    if mode == "cutoff":
        draw = sampling.top_k(preferred, size, rng=rng, by=strata)
    elif mode == "softmax":  # in log-space, so that no probability underflows to "never"
        require(temperature > 0, "temperature", temperature, "a positive number")
        keys = preferred / temperature
        draw = sampling.exponential_keys(keys, size, rng=rng, by=strata, log=True)
    else:
        measure = sampling.linear(preferred, eps=eps)
        draw = sampling.exponential_keys(measure, size, rng=rng, by=strata)
    order = np.argsort(draw.indices, kind="stable")
    kept = draw.indices[order]
    return Draw(
        kept,
        np.ones(len(kept)),
        len(values),
        scores=values[kept],
        method=f"prune {side} {fraction:g} by {mode}",
    )


def draw_probabilities(
    scores: ArrayLike, *, mode: Mode = "linear", eps: float = 0.01, temperature: float = 1.0
) -> Array:
    r"""First-draw probabilities of the softmax and linear modes of `prune`; they sum to one.

    >>> draw_probabilities([0.0, 1.0], eps=0.25).tolist()
    [0.2, 0.8]
    >>> draw_probabilities([0.0, 0.0], mode="softmax").tolist()
    [0.5, 0.5]
    """
    values = _scores(scores)
    require(mode in ("softmax", "linear"), "mode", repr(mode), "'softmax' or 'linear'")
    if mode == "softmax":
        measure = np.asarray(sampling.softmax(values, temperature=temperature), np.float64)
    else:
        measure = np.asarray(sampling.linear(values, eps=eps), np.float64)
    return np.asarray(measure / measure.sum())


def stratified(groups: ArrayLike, fraction: float, *, rng: Rng = None) -> Draw:
    """Drop a fraction at random within each group: the baseline a score has to beat.

    Groups (domains, classes) keep their shares up to rounding. Raises InputError as `prune`.
    Time O(n log n).

    >>> draw = stratified([0, 0, 0, 0, 1, 1], 0.5, rng=0)
    >>> np.bincount(np.array([0, 0, 0, 0, 1, 1])[draw.indices]).tolist()
    [2, 1]
    """
    strata = to_numpy(groups)
    require(strata.ndim == 1 and len(strata) > 0, "groups", f"shape {strata.shape}", "(n,)")
    draw: Draw = sampling.uniform(len(strata), _kept(len(strata), fraction), rng=rng, by=strata)
    return replace(draw, method=f"stratified {fraction:g}")


def similarity_index(first: ArrayLike, second: ArrayLike) -> float:
    r"""Share of one subset that lies in another: :math:`|A\cap B|/|A|`.

    Meant for subsets of equal size, where it is symmetric; two random subsets of shares a and b
    score b on average. Raises InputError on an empty first subset or repeated indices.
    Time O(k log k).

    >>> similarity_index([1, 2, 3, 4], [3, 4, 5, 6])
    0.5
    """
    a, b = to_numpy(first), to_numpy(second)
    require(a.ndim == 1 and len(a) > 0, "first", f"shape {a.shape}", "(k,) with one row or more")
    require(b.ndim == 1, "second", f"shape {b.shape}", "(k,)")
    for name, rows in (("first", a), ("second", b)):
        require(len(np.unique(rows)) == len(rows), name, "repeated rows", "a set")
    return float(np.isin(a, b).mean())


def relative_efficiency(
    error: float, full_error: float, size: int | float, full_size: int | float
) -> float:
    r"""Relative rise of the error per relative loss of data.

    :math:`\sigma_{ER}=\frac{\Delta ER/ER_0}{\Delta d/d_0}`, with :math:`\Delta d<0` after
    pruning: a negative value means the error rose, -0.1 that each 10 % of data cost a 1 % higher
    error; closer to zero is better, positive is a gain.

    Raises InputError if nothing was pruned or the full error is not positive.

    >>> round(relative_efficiency(0.12, 0.10, 50, 100), 3)
    -0.4
    """
    require(full_error > 0, "full_error", full_error, "a positive error rate")
    require(full_size > 0, "full_size", full_size, "a positive size")
    require(size != full_size and size > 0, "size", size, f"a positive size, not {full_size}")
    return ((error - full_error) / full_error) / ((size - full_size) / full_size)


def trail_entropy(trails: Sequence[Any], intents: ArrayLike) -> Array:
    r"""Entropy of an intent's slot-label sequences, given to each of its examples.

    A trail is the sequence of slot labels of an utterance, any hashable value.
    :math:`H(y)=-\sum_t p(t\mid y)\ln p(t\mid y)`, nats: intents whose utterances take many forms
    score high. Average it with `entropy_average`.

    Returns (n,) float64. Raises InputError on lengths that differ. Time O(n log n).

    Anand et al., 2023, arXiv:2311.16298 (appendix C.3).

    >>> trail_entropy([("city",), ("city", "date"), ("song",)], [0, 0, 1]).round(4).tolist()
    [0.6931, 0.6931, 0.0]
    """
    given = to_numpy(intents)
    require(given.shape == (len(trails),), "intents", f"shape {given.shape}", f"({len(trails)},)")
    intent = np.unique(given, return_inverse=True)[1].reshape(-1).astype(np.int64)
    number: dict[Any, int] = {}
    trail = np.array([number.setdefault(t, len(number)) for t in trails], dtype=np.int64)
    pair, count = np.unique(intent * max(1, len(number)) + trail, return_counts=True)
    of_intent = pair // max(1, len(number))
    share = count / np.bincount(intent)[of_intent]
    entropy = np.bincount(of_intent, -share * np.log(share), minlength=int(intent.max(initial=0)))
    return np.asarray(entropy[intent] + 0.0)  # -0.0 becomes 0.0


def entropy_average(scores: ArrayLike, entropies: ArrayLike) -> Array:
    """The mean of a score and its intent's entropy, with which arXiv:2311.16298 draws.

    Both (n,); put them on one scale first (`influence.normalize_scores`). Raises InputError on
    shapes that differ.

    >>> entropy_average([1.0, -1.0], [0.0, 2.0]).tolist()
    [0.5, 0.5]
    """
    first, second = _scores(scores), to_numpy(entropies).astype(np.float64)
    require(
        second.shape == first.shape, "entropies", f"shape {second.shape}", f"shape {first.shape}"
    )
    require_finite("entropies", second)
    return np.asarray((first + second) / 2)


def _scores(scores: ArrayLike) -> NDArray[np.float64]:
    values = to_numpy(scores).astype(np.float64)
    require(values.ndim == 1 and len(values) > 0, "scores", f"shape {values.shape}", "(n,), n > 0")
    require_finite("scores", values)
    return values


def _kept(n: int, fraction: float) -> int:
    require(0 <= fraction < 1, "fraction", fraction, "a share in [0, 1)")
    size = round((1 - fraction) * n)
    require(size > 0, "fraction", f"{fraction} of {n} examples", "one that keeps an example")
    return size
