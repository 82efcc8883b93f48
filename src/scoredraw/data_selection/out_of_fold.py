"""What a classifier that has not seen an example says of it: out-of-fold class probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.influence import name_rows, to_numpy
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Progress = Callable[[int, int], None]


def out_of_fold_probabilities(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    folds: int = 5,
    standardise: bool = True,
    rng: Rng = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, Index]:
    r"""Class probabilities of each row by logistic regressions fitted without its fold.

    The rows are dealt into folds class by class; the rows of a fold are judged by a multinomial
    logistic regression (C = 1) fitted on the others, to a part in a thousand.

    Parameters
    ----------
    features : (n, d) finite. labels : (n,) classes of any kind; one that a single fold holds has
        probability 0 there.
    folds : 2 .. n. rng : deals the rows. workers : folds fitted at a time.
    standardise : columns of mean 0 and deviation 1 first, so that their units don't matter. The
        regression is penalised; on columns that vary little it is less sure of all.
    progress : called with (folds done, folds).

    Returns
    -------
    (n, C) float64 whose rows sum to 1, and the labels as 0 .. C - 1, (n,).

    Raises
    ------
    InputError
        NaN or infinite features, one class only, as many classes as rows.

    Time: `folds` logistic regressions; memory O(n (d + C)). The same for any number of workers.

    >>> x = np.arange(20.0)[:, None]; y = np.arange(20) >= 10; y[3] = True
    >>> p, codes = out_of_fold_probabilities(x, y)
    >>> int(p[np.arange(20), codes].argmin())
    3
    """
    x, y = labelled_rows(features, labels)
    n, classes = len(y), int(y.max()) + 1
    require(2 <= folds <= n, "folds", folds, f"from 2 to the {n} rows")
    order = np.lexsort((generator(rng).random(n), y))
    fold = np.empty(n, np.int64)
    fold[order] = np.arange(n) % folds
    if standardise:
        spread = x.std(axis=0)
        x = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    x32, p = x.astype(np.float32), np.zeros((n, classes))

    def judge(f: int) -> None:
        held = fold == f
        p[held] = _probabilities(x32[~held], y[~held], x32[held], classes)

    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(min(workers or 1, folds)) as pool:
        for done, _ in enumerate(pool.map(judge, range(folds)), 1):
            if progress is not None:
                progress(done, folds)
    return p, y


def _probabilities(
    x: NDArray[np.float32], y: Index, held: NDArray[np.float32], classes: int
) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    p, seen = np.zeros((len(held), classes)), np.unique(y)
    if len(seen) == 1:
        p[:, seen[0]] = 1.0
        return p
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=100, tol=1e-3).fit(x, y)
    p[:, seen] = model.predict_proba(held)
    return p / p.sum(axis=1, keepdims=True)


def labelled_rows(features: ArrayLike, labels: ArrayLike) -> tuple[Array, Index]:
    """Features float64 (n, d) and labels as 0 .. C - 1, or an `InputError` that says what is wrong.

    >>> labelled_rows([[1, 2], [3, 4], [5, 6]], ["b", "a", "b"])[1].tolist()
    [1, 0, 1]
    """
    x, y = to_numpy(features), to_numpy(labels)
    shape_ok = x.ndim == 2 and x.size > 0 and x.dtype.kind in "fiub"
    require(shape_ok, "features", f"{x.dtype} {x.shape}", "numbers (n, d)")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise InputError(f"features: got NaN or infinity in {name_rows(bad)}, want finite numbers")
    require(y.shape == (len(x),), "labels", f"shape {y.shape}", f"({len(x)},), one a row")
    missing = y.dtype.kind == "f" and bool(np.isnan(y).any())
    require(not missing, "labels", "NaN", "a class for each row")
    classes, index = np.unique(y, return_inverse=True)
    require(len(classes) >= 2, "labels", "one class", "two or more")
    few = f"{len(classes)} classes in {len(y)} rows"
    require(len(classes) < len(y), "labels", few, "class labels, fewer classes than rows")
    return x.astype(np.float64), index.astype(np.int64)
