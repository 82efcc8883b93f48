"""The usual outsiders: rows chosen for where they lie, whatever a training run says of them.

Farthest-first centres (`k_center`) cover the pool, greedy facility location represents it, herding
keeps its mean, k-means its clusters; `uncertainty` asks a classifier. They look at features alone
(herding and facility location by class, where labels are given), cost seconds, and are what a
method that trains, or asks a large model, has to beat. Draws have weights one, and say in `info`
how many rows each pick stands for; none is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection import facility
from scoredraw.data_selection.farthest import farthest_first
from scoredraw.data_selection.influence import Array, require_finite, to_numpy
from scoredraw.data_selection.out_of_fold import out_of_fold_probabilities
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.inclusion import allocate
from scoredraw.uniforms import Rng, generator

Index = NDArray[np.int64]
Progress = Callable[[int, int], None]
Similarity = Literal["cosine", "euclidean", "sqeuclidean", "rbf"]
Uncertainty = Literal["entropy", "margin", "least_confident"]

LAZY_UP_TO = 100_000  # rows; beyond, facility location looks at samples of candidates


# ── Cover ────────────────────────────────────────────────────────────────────────────────────────


def k_center(
    X: ArrayLike,
    size: int,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    rng: Rng = 0,
    start: int | None = None,
    progress: Progress | None = None,
) -> Draw:
    r"""Farthest-first centres: each pick is the row farthest from all picks before it.

    :math:`j_{t+1}=\arg\max_i D_i,\ D_i=\min_{s\le t}\lVert x_i-x_{j_s}\rVert`. The radius
    :math:`\max_i D_i` is at most twice the smallest possible one for `size` centres.

    Parameters
    ----------
    X : (n, d) finite numbers.
    size : picks, 1 to n.
    metric : "euclidean", or "cosine": the same between the rows scaled to length one.
    start : the first pick; drawn with `rng` if not given.

    Returns
    -------
    Draw in the order of picking, weights one, scores D at the time of the pick (infinite first).
    info: `radius`; `cluster_size` (size,), the rows nearest each pick (the earlier on a tie).

    Raises
    ------
    InputError
        an empty X, NaN or infinity, a size or start outside the pool, an unknown metric, a row
        of zeros with "cosine".

    Equal distances: the first row. Only the rows now farthest are compared with each pick; the
    others wait until the farthest among them could be next, and then catch up in one matrix
    product. Time O(n size d), memory O(n d). Sequential: one ordered process.

    Gonzalez, 1985; for deep learning Sener and Savarese, 2018, arXiv:1708.00489.

    >>> k_center([[0.0], [1.0], [5.0], [9.0]], 3, start=0).indices.tolist()
    [0, 3, 2]
    """
    require(metric in ("euclidean", "cosine"), "metric", repr(metric), "'euclidean' or 'cosine'")
    x = _matrix(X, size, unit=metric == "cosine")
    n = len(x)
    require(start is None or 0 <= start < n, "start", start, f"a row from 0 to {n - 1}")
    first = int(generator(rng).integers(n)) if start is None else start
    picks, radii, near, owner = farthest_first(x, size, first, progress)
    return Draw(
        picks,
        np.ones(size),
        n,
        scores=radii,
        method=f"k_center {metric}",
        info={
            "radius": float(near.max()),
            "cluster_size": np.bincount(owner, minlength=size),
        },
    )


# ── Represent ────────────────────────────────────────────────────────────────────────────────────


def facility_location(
    X: ArrayLike,
    size: int,
    *,
    similarity: Similarity = "cosine",
    method: Literal["auto", "lazy", "stochastic"] = "auto",
    labels: ArrayLike | None = None,
    gamma: float | None = None,
    weights: Literal["ones", "cluster_size"] = "ones",
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Draw:
    r"""Greedy facility location: the rows that stand best for all the others.

    Maximises :math:`f(S)=\sum_i\max_{j\in S}s(i,j)`, greedily; at least :math:`1-1/e` of the best.

    Parameters
    ----------
    X : (n, d) finite numbers.
    size : picks, 1 to n.
    similarity : "cosine", (1 + cos)/2; "euclidean" and "sqeuclidean", c minus the (squared)
        distance; "rbf", :math:`e^{-\gamma\lVert x-y\rVert^2}`, gamma 1/(2 variance) by default.
        c is the (squared) diameter of the ball around the mean; no pick depends on it.
    method : "lazy" gives plain greedy's picks; "stochastic" looks at (n/size) ln 10 rows a pick
        (in expectation 1 - 1/e - 0.1 of the best); "auto" is lazy up to 100,000 rows.
    labels : (n,) classes; if given each class has its share of the size and is represented alone,
        as in CRAIG.
    weights : "ones", or "cluster_size": the rows each pick stands for (they sum to n).

    Returns
    -------
    Draw in the order of picking (class by class with labels), scores the gains.
    info: `cluster_size` (size,); `objective`, f(S); `distance`, the sum of distances to the
    nearest pick (in the similarity's own measure).

    Raises
    ------
    InputError
        an empty X, NaN or infinity, a size outside 1..n or below the number of classes, an unknown
        similarity or method, a row of zeros with "cosine".

    Gains that agree to 1e-10 of c are ties: the first row. Time: two to four times that of the
    n x n x d matrix product; memory O(n d). Sequential: one ordered process.

    Nemhauser, Wolsey and Fisher, 1978; Minoux, 1978; Mirzasoleiman et al., 2015, arXiv:1409.7938;
    Mirzasoleiman, Bilmes and Leskovec (CRAIG), 2020, arXiv:1906.01827.

    >>> facility_location([[0.0], [1.0], [2.0], [9.0]], 2, similarity="euclidean").indices.tolist()
    [1, 3]
    """
    kinds = ("cosine", "euclidean", "sqeuclidean", "rbf")
    require(similarity in kinds, "similarity", repr(similarity), f"one of {', '.join(kinds)}")
    known = ("auto", "lazy", "stochastic")
    require(method in known, "method", repr(method), f"one of {', '.join(known)}")
    require(weights in ("ones", "cluster_size"), "weights", repr(weights), "ones or cluster_size")
    require(gamma is None or gamma > 0, "gamma", gamma, "a positive number")
    x = _matrix(X, size, unit=similarity == "cosine")
    random, states = generator(rng), []
    groups, shares = _classes(labels, len(x), size)
    done = 0
    for group, share in zip(groups, shares, strict=True):
        distances = facility.Distances(x[group], similarity, gamma)
        tell = None if progress is None else _from(progress, done, size)
        if method == "stochastic" or (method == "auto" and len(group) > LAZY_UP_TO):
            states.append(facility.stochastic(distances, share, random, progress=tell))
        else:
            states.append(facility.lazy(distances, share, tell))
        done += share
    picks = np.concatenate([g[s.picks] for g, s in zip(groups, states, strict=True)])
    counts = np.concatenate([np.bincount(s.owner, minlength=len(s.picks)) for s in states])
    return Draw(
        picks,
        counts if weights == "cluster_size" else np.ones(size),
        len(x),
        scores=np.concatenate([s.of.unit * np.array(s.gains) for s in states]),
        method=f"facility_location {similarity}",
        info={
            "cluster_size": counts,
            "objective": float(sum(s.of.unit * (s.of.c * s.of.n - s.near.sum()) for s in states)),
            "distance": float(sum(s.of.unit * s.near.sum() for s in states)),
        },
    )


def k_means_centers(X: ArrayLike, size: int, *, rng: Rng = 0) -> Draw:
    """The row nearest each of `size` k-means centres, of those in its cluster.

    Lloyd's iterations (at most 20) from `size` rows drawn uniformly. X (n, d) finite.

    Returns a Draw in order of row; info: `cluster_size` (size,), which sum to n. Raises InputError
    as `k_center`. Equal distances: the first row; where there are fewer different rows than
    `size`, the first rows not yet taken make up the number. Time O(20 n size d), memory O(n d).

    Lloyd, 1982. Sequential.

    >>> k_means_centers([[0.0], [1.0], [2.0], [9.0], [10.0], [11.0]], 2).indices.tolist()
    [1, 4]
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    x = _matrix(X, size)
    seed = int(generator(rng).integers(2**31))
    with warnings.catch_warnings():  # fewer different rows than centres: dealt with below
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(size, init="random", n_init=1, max_iter=20, random_state=seed).fit(x)
    off = np.square(x - model.cluster_centers_[model.labels_]).sum(axis=1)
    order = np.lexsort((np.arange(len(x)), off, model.labels_))
    _, first, counts = np.unique(model.labels_[order], return_index=True, return_counts=True)
    kept = order[first]
    spare = np.setdiff1d(np.arange(len(x)), kept)[: size - len(kept)]
    rows = np.concatenate([kept, spare])
    sizes = np.concatenate([counts, np.zeros(len(spare), np.int64)])
    back = np.argsort(rows)
    info = {"cluster_size": sizes[back]}
    return Draw(rows[back], np.ones(size), len(x), method="k_means_centers", info=info)


# ── Keep the mean ────────────────────────────────────────────────────────────────────────────────


def herding(
    X: ArrayLike,
    size: int,
    *,
    labels: ArrayLike | None = None,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Draw:
    r"""Rows whose running mean stays as close as possible to the mean of all.

    :math:`w_t=w_{t-1}+\bar x-x_{j_t}`, with :math:`j_t` the row not yet taken that makes
    :math:`\lVert w_t\rVert` least. For rows of one length this is Welling's
    :math:`\arg\max_j\langle w_{t-1}+\bar x,x_j\rangle`. As :math:`w_t` is t times the error of the
    mean and stays bounded, the error falls as 1/t where a uniform draw's falls as
    :math:`1/\sqrt t`.

    Parameters
    ----------
    X : (n, d) finite numbers. size : picks, 1 to n.
    labels : (n,) classes; if given each has its share of the size and keeps its own mean.
    rng : not used: there is nothing random (so that all methods can be called alike).

    Returns
    -------
    Draw in the order of picking (class by class with labels). info: `cluster_size` (size,), the
    rows of its class over its picks; `mean_error`, the distance of the picks' mean from the pool's
    (the largest over classes).

    Raises InputError as `k_center`, and on a size below the number of classes. Equal distances:
    the first row. Time O(n size d) (divided by the number of classes), memory O(n d). Sequential.

    Welling, 2009 (ICML); by class Rebuffi et al. (iCaRL), 2017, arXiv:1611.07725.

    >>> herding([[0.0], [1.0], [2.0], [3.0], [10.0]], 2).indices.tolist()
    [3, 2]
    """
    del rng
    x = _matrix(X, size)
    groups, shares = _classes(labels, len(x), size)
    picks, errors, done = [], [], 0
    for group, share in zip(groups, shares, strict=True):
        rows, error = _herd(x[group], share)
        picks.append(group[rows])
        errors.append(error)
        done += share
        if progress is not None:
            progress(done, size)
    per_pick = [np.full(k, len(g) / k) for g, k in zip(groups, shares, strict=True)]
    return Draw(
        np.concatenate(picks),
        np.ones(size),
        len(x),
        method="herding",
        info={"cluster_size": np.concatenate(per_pick), "mean_error": max(errors)},
    )


def _herd(x: Array, size: int) -> tuple[Index, float]:
    x, length = facility.centred(x)
    half = np.square(x).sum(axis=1) / 2
    tolerance = facility.SAME
    w, picks = np.zeros(x.shape[1]), np.empty(size, np.int64)
    for t in range(size):
        value = x @ w - half  # minus half of |w - x|^2, but for |w|^2
        picks[t] = facility.first_best(value, tolerance)
        w -= x[picks[t]]
        half[picks[t]] = np.inf
    return picks, length * float(np.sqrt(np.square(w).sum()) / size)


# ── Ask a classifier ─────────────────────────────────────────────────────────────────────────────


def uncertainty(probabilities: ArrayLike, kind: Uncertainty = "entropy") -> Array:
    r"""How unsure a classifier is of each row; high means unsure.

    "entropy": :math:`-\sum_c p_c\ln p_c`, nats; "margin": :math:`1-(p_{(1)}-p_{(2)})` of the two
    largest; "least_confident": :math:`1-p_{(1)}`.

    probabilities: (n, C), C >= 2, rows that sum to one; -> (n,) float64. Raises InputError on NaN,
    negative numbers, other sums, an unknown kind. Time O(n C). Row-local.

    Lewis and Gale, 1994; Scheffer, Decomain and Wrobel, 2001; Settles, 2009.

    >>> uncertainty([[0.5, 0.5], [1.0, 0.0]], "margin").tolist()
    [1.0, 0.0]
    >>> uncertainty([[0.5, 0.5], [1.0, 0.0]]).round(3).tolist()
    [0.693, 0.0]
    """
    from scipy.special import entr

    kinds = ("entropy", "margin", "least_confident")
    require(kind in kinds, "kind", repr(kind), f"one of {', '.join(kinds)}")
    p = to_numpy(probabilities).astype(np.float64)
    fits = p.ndim == 2 and p.shape[1] >= 2 and len(p) > 0
    require(fits, "probabilities", f"shape {p.shape}", "(n, C), C >= 2")
    require_finite("probabilities", p)
    good = bool((p >= 0).all() and (np.abs(p.sum(axis=1) - 1) < 1e-5).all())
    require(good, "probabilities", "negative numbers or other sums", "rows that sum to one")
    if kind == "entropy":
        return np.asarray(entr(p).sum(axis=1))
    second, first = np.partition(p, -2, axis=1)[:, -2:].T
    return np.asarray(1 - (first - second) if kind == "margin" else 1 - first)


# ── Tables with labels ───────────────────────────────────────────────────────────────────────────


def k_center_examples(
    features: ArrayLike, labels: Any, *, size: int, rng: Rng = 0, progress: Progress | None = None
) -> Draw:
    """`k_center` of standardised features; the labels are not looked at.

    >>> k_center_examples([[0.0], [1.0], [9.0]], [0, 0, 1], size=3).indices.size
    3
    """
    del labels
    return k_center(_standardised(features), size, rng=rng, progress=progress)


def facility_location_examples(
    features: ArrayLike, labels: Any, *, size: int, rng: Rng = 0, progress: Progress | None = None
) -> Draw:
    """`facility_location` by class, Euclidean on standardised features, as CRAIG's.

    >>> x = [[0.0], [1.0], [2.0], [9.0], [9.1]]
    >>> facility_location_examples(x, [0, 0, 0, 1, 1], size=2).indices.tolist()
    [1, 3]
    """
    return facility_location(
        _standardised(features),
        size,
        similarity="euclidean",
        labels=labels,
        rng=rng,
        progress=progress,
    )


def herding_examples(
    features: ArrayLike, labels: Any, *, size: int, rng: Rng = 0, progress: Progress | None = None
) -> Draw:
    """`herding` by class on standardised features.

    >>> herding_examples([[0.0], [1.0], [2.0], [9.0]], [0, 0, 0, 1], size=2).indices.tolist()
    [1, 3]
    """
    return herding(_standardised(features), size, labels=labels, rng=rng, progress=progress)


def uncertainty_scores(
    features: ArrayLike,
    labels: Any,
    *,
    kind: Uncertainty = "entropy",
    rng: Rng = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Array:
    """How unsure a logistic regression that has not seen a row is of it, (n,): `uncertainty`.

    Arguments, errors and cost as `out_of_fold.out_of_fold_probabilities`.

    >>> x = [[float(i)] for i in range(20)]
    >>> np.sort(np.argsort(-uncertainty_scores(x, [0] * 10 + [1] * 10))[:2]).tolist()
    [9, 10]
    """
    p, _ = out_of_fold_probabilities(features, labels, rng=rng, workers=workers, progress=progress)
    return uncertainty(p, kind)


# ── What comes in ────────────────────────────────────────────────────────────────────────────────


def _matrix(X: ArrayLike, size: int, *, unit: bool = False) -> Array:
    """X as float64, checked; with `unit` its rows scaled to length one."""
    given = to_numpy(X)
    require(given.ndim == 2 and given.size > 0, "X", f"shape {given.shape}", "(n, d), not empty")
    require(given.dtype.kind in "fiub", "X", f"{given.dtype} values", "numbers")
    x = given.astype(np.float64)
    require_finite("X", x)
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    require(whole and 1 <= size <= len(x), "size", size, f"a count from 1 to {len(x)}")
    if unit:
        x /= np.maximum(np.abs(x).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
        zero = np.flatnonzero(length[:, 0] == 0)
        came = f"zeros in row {zero[0]}" if len(zero) else ""
        require(not len(zero), "X", came, "rows with a direction, for cosine")
        x /= length
    return x


def _standardised(features: ArrayLike) -> Array:
    """Columns of mean 0 and deviation 1; constant ones 0."""
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit_transform(_matrix(features, 1)))


def _labels(labels: Any, n: int) -> NDArray[Any]:
    given = to_numpy(labels)
    require(given.shape == (n,), "labels", f"shape {given.shape}", f"({n},), one a row")
    if given.dtype.kind == "f":
        require_finite("labels", given)
    return given


def _classes(labels: Any, n: int, size: int) -> tuple[list[Index], list[int]]:
    """The rows of each class, and its share of the size; all rows where there are no labels."""
    if labels is None:
        return [np.arange(n)], [size]
    _, y, counts = np.unique(_labels(labels, n), return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(y, kind="stable"), np.cumsum(counts)[:-1])
    return groups, [int(share) for share in allocate(counts, size)]


def _from(progress: Progress, done: int, total: int) -> Progress:
    return lambda part, _: progress(done + part, total)
