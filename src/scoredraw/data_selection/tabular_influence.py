"""Quad for a table: k-means clusters, and influence at a softmax regression's weights and bias.

The gradients of a softmax regression are closed form, delta aᵀ with delta = p - onehot(y) and
a = [x, 1], one position a row: EK-FAC and influence are a few matrix products, without torch.

Zhang et al., 2025, arXiv:2409.16986; `cluster_bandit` has the method, `kronecker` the curvature.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from scoredraw import sampling
from scoredraw.data_selection.cluster_bandit import Float, Int, Progress, quad_select
from scoredraw.data_selection.influence import to_numpy
from scoredraw.data_selection.kronecker import Form, LayerFactors
from scoredraw.data_selection.probe import standardised_rows
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.uniforms import Rng, generator

FACTOR_ROWS = 4096


class SoftmaxInfluence:
    """Influence of table rows on a reference set, at the weights and bias of a softmax regression.

    One position a row and closed-form gradients: delta = p - onehot(y), a = [x, 1], so that
    I = deltaᵀ P a with P the EK-FAC inverse (`kronecker`) times the reference's mean gradient.

    x (n, d) and y (n,) classes 0 .. C - 1; fit_rows: where the regression is fitted, with every
    class among them; reference: (x, y); factor_rows: where the factors are fitted (fit_rows, of
    which a regression knows the labels by heart: other rows tell more). form: "ekfac", "kfac" or
    "factored".

    >>> x = np.random.default_rng(0).normal(size=(60, 2))
    >>> y = (x[:, 0] > 0).astype(int)
    >>> flipped = np.where(np.arange(60) < 5, 1 - y, y)
    >>> values = SoftmaxInfluence(x, flipped, np.arange(20, 60), (x[:20], y[:20]))(np.arange(20))
    >>> bool(values[:5].mean() < values[5:].mean())
    True
    """

    def __init__(
        self,
        x: Float,
        y: Int,
        fit_rows: Int,
        reference: tuple[Float, Int],
        *,
        damping: float = 1e-3,
        form: Form = "ekfac",
        factor_rows: Int | None = None,
    ) -> None:
        from sklearn.linear_model import LogisticRegression

        self.x, self.y = x, y
        model = LogisticRegression(max_iter=200).fit(x[fit_rows], y[fit_rows])
        self.model = model
        a, delta = self.traces(x, y, fit_rows if factor_rows is None else factor_rows)
        factors = LayerFactors.of(a[:, None], delta[:, None])
        a, delta = self.traces(*reference, np.arange(len(reference[1])))
        self.P = factors.ihvp(delta.T @ a / len(a), damping, form)

    def traces(self, x: Float, y: Int, rows: Int) -> tuple[Float, Float]:
        """[x, 1] and p - onehot(y) of these rows."""
        delta = self.model.predict_proba(x[rows])
        delta[np.arange(len(rows)), y[rows]] -= 1.0
        return np.column_stack([x[rows], np.ones(len(rows))]), delta

    def __call__(self, rows: Int) -> Float:
        a, delta = self.traces(self.x, self.y, rows)
        return np.asarray(((delta @ self.P) * a).sum(axis=1))


def quad_examples(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    size: int,
    clusters: int | None = None,
    alpha: float = 1.0,
    samples_per_pull: int = 5,
    damping: float = 1e-3,
    rng: Rng = 0,
    progress: Progress | None = None,
    reference: tuple[ArrayLike, ArrayLike] | None = None,
) -> Draw:
    """Quad for the rows of a table: `size` rows, in the order of selection.

    Features are standardised and cut into `clusters` (the root of n) by k-means. The checkpoint is
    a softmax regression on a uniform tenth of the rows (20 a class at least, every class among
    them), the influence that of its weights and bias, with EK-FAC fitted on up to 4,096 rows.
    Without `reference` = (features, labels), a tenth of the rows by class (1,000 at most) is set
    aside as one: it is drawn only where the size cannot be reached without. Those labels are taken
    at their word: a reference with wrong labels asks for wrong labels. Where no cluster promises to
    help (tau = 0) the rest of the draw is uniform; `info["filled"]` says how much.

    features (n, d), labels (n,) classes; alpha and samples_per_pull as in `quad_select`, alpha in
    deviations of the rewards. Raises InputError on what cannot be features or classes, a size
    outside 1 .. n, a reference of other columns or classes. Sequential; a few seconds at 19,000
    rows of 64 features and 150 classes.

    Zhang et al., 2025, arXiv:2409.16986.

    >>> x = np.random.default_rng(0).normal(size=(200, 3))
    >>> len(quad_examples(x, x[:, 0] > 0, size=20))
    20
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    given = to_numpy(features)
    n = len(given) if given.ndim else 0
    x, y = _with_reference(features, labels, reference)
    require(isinstance(size, int | np.integer) and 1 <= size <= n, "size", size, f"1 to {n}")
    C = round(n**0.5) if clusters is None else clusters
    require(1 <= C <= n, "clusters", clusters, f"1 to {n}")
    random = generator(rng)
    if reference is None:
        count = max(int(y.max()) + 1, min(n // 10, 1000))  # each class has one at least
        aside = sampling.uniform(n, count, rng=random, by=y).indices
        left = np.delete(y, aside)
        aside = np.sort(aside[np.isin(y[aside], left)])  # a class's only rows stay in the pool
    else:
        aside = np.arange(n, len(y))
    pool = np.setdiff1d(np.arange(n), aside)
    C = min(C, len(pool))
    with threadpool_limits(1):
        tenth = max(len(pool) // 10, 20 * (int(y.max()) + 1))
        fit = rows_of_every_class(y, pool, tenth, random)
        factor = random.permutation(pool)[:FACTOR_ROWS]
        influence = SoftmaxInfluence(
            x, y, fit, (x[aside], y[aside]), damping=damping, factor_rows=factor
        )
        seed = int(random.integers(2**31))
        groups = MiniBatchKMeans(C, n_init=3, random_state=seed).fit_predict(x[pool])
        found = quad_select(
            groups, lambda rows: influence(pool[rows]), min(size, len(pool)), alpha=alpha,
            samples_per_pull=samples_per_pull, B=max(1, C // 10), rng=random, progress=progress,
        )  # fmt: skip
    picks = pool[found.indices]
    for rest in (np.setdiff1d(pool, picks), aside[aside < n]):
        wanted = min(size - len(picks), len(rest))
        if wanted > 0:
            more = sampling.uniform(len(rest), wanted, rng=random).indices
            picks = np.concatenate([picks, rest[more]])
    info = {"n_evaluated": found.n_evaluated, "reason": found.reason, "clusters": int(C)}
    info |= {"filled": size - len(found.indices), "reference": len(aside)}
    return Draw(picks, np.ones(len(picks)), n, method="quad", info=info)


def _with_reference(
    features: ArrayLike, labels: ArrayLike, reference: tuple[ArrayLike, ArrayLike] | None
) -> tuple[Float, Int]:
    """Standardised features and classes, those of a given reference below the rows."""
    if reference is None:
        return standardised_rows(features, labels)
    x, _ = standardised_rows(features, labels)
    given, more = (to_numpy(part) for part in reference)
    width = x.shape[1]
    fits = given.ndim == 2 and given.shape[1] == width and len(given) == len(more) > 0
    require(fits, "reference", f"shapes {given.shape}, {more.shape}", f"(r, {width}) and (r,)")
    known = bool(np.isin(more, to_numpy(labels)).all())
    require(known, "reference", "other classes", "the classes of the labels")
    both = np.concatenate([to_numpy(features), given])
    return standardised_rows(both, np.concatenate([to_numpy(labels), more]))


def rows_of_every_class(y: Int, pool: Int, count: int, random: np.random.Generator) -> Int:
    """A uniform part of the pool, and one row of each class that it happens to miss.

    >>> y = np.array([0] * 50 + [1])
    >>> 50 in rows_of_every_class(y, np.arange(51), 5, np.random.default_rng(0))
    True
    """
    rows = pool[sampling.uniform(len(pool), min(count, len(pool)), rng=random).indices]
    shuffled = random.permutation(pool)
    classes, first = np.unique(y[shuffled], return_index=True)
    return np.concatenate([rows, shuffled[first[~np.isin(classes, y[rows])]]])
