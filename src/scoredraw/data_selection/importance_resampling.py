"""Importance resampling of texts towards a target, by hashed n-grams (DSIR).

Texts are counts c over m buckets, into which their words and word pairs are hashed. With p̂ the
bucket shares in target texts and q̂ those in the pool,

    log w = Σ_b c_b (log p̂_b - log q̂_b)

is the log-likelihood ratio of a text under the two bags of n-grams; documents are drawn without
replacement with chances ∝ w by Gumbel keys, log w - log(-log u).

Xie, Santurkar, Ma and Liang, "Data selection for language models via importance resampling",
NeurIPS 2023, arXiv 2302.03169.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import sampling
from scoredraw.data_selection.score_lists import gumbel_keys, select
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.uniforms import Rng

Float = NDArray[np.float64]


def importance_log_weights(
    texts: Sequence[str], target: Sequence[str], *, buckets: int = 10_000, smoothing: float = 1.0
) -> Float:
    """log w of each text (n,): how much likelier its n-grams are in the target than in the pool.

    smoothing: added to the count of every bucket, in the target and in the pool. Raises InputError
    for no texts on either side. Time O(words), memory O(distinct buckets a text).

    >>> w = importance_log_weights(["red wine", "blue sky"], ["dark red wine", "white wine"])
    >>> bool(w[0] > w[1])
    True
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    for name, given in (("texts", texts), ("target", target)):
        listed = not isinstance(given, str) and len(given) > 0
        require(listed, name, "none" if listed or not given else "one string", "a list of texts")
    require(buckets >= 2, "buckets", buckets, "2 or more")
    require(smoothing > 0, "smoothing", smoothing, "a positive count")
    hashed = HashingVectorizer(
        n_features=buckets, ngram_range=(1, 2), norm=None, alternate_sign=False,
        token_pattern=r"\w+|[^\w\s]+",
    )  # fmt: skip
    counts = hashed.transform(texts)

    def log_shares(c: Any) -> Float:
        total = np.asarray(c.sum(axis=0), np.float64).ravel() + smoothing
        return np.asarray(np.log(total / total.sum()))

    return np.asarray(counts @ (log_shares(hashed.transform(target)) - log_shares(counts)))


def importance_resample(
    texts: Sequence[str],
    target: Sequence[str],
    size: float,
    *,
    tokens: ArrayLike | None = None,
    buckets: int = 10_000,
    smoothing: float = 1.0,
    rng: Rng = 0,
) -> Draw:
    """`size` texts drawn without replacement with chances ∝ w: DSIR.

    With tokens (n,), `size` is a budget of them, and drawing ends once it is spent. Weights one, as
    a learner sees them. Errors and cost as `importance_log_weights`, and a size
    outside the pool. Row-local, given the shares of the two sides.

    >>> pool = ["red wine"] * 5 + ["blue sky"] * 5
    >>> chosen = importance_resample(pool, ["red wine, white wine"] * 40, 3)
    >>> bool((chosen.indices < 5).all())
    True
    """
    log_w = importance_log_weights(texts, target, buckets=buckets, smoothing=smoothing)
    if tokens is None:
        draw = sampling.exponential_keys(log_w, int(size), log=True, rng=rng)
    else:
        draw = select(gumbel_keys(log_w, rng)[:, None], size, tokens=tokens).draw
    return replace(
        draw, weights=np.ones(len(draw)), inclusion=None, unbiased=False, method="dsir",
        info={"design": None},
    )  # fmt: skip
