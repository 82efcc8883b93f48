r"""Selection that covers the whole range of a score, and what it is compared with.

Keeping only the highest scores keeps only the strangest examples. Coverage-enhanced selection
draws from all of the range instead:

1. drop the share `hard_prune` of highest scores (the hardest examples are often noise);
2. cut the range of the rest into K intervals of equal width, the last one ending at the maximum;
3. go through the groups that are not empty, smallest first, and give each
   :math:`b=\min(|g|,\lfloor\text{left}/\text{groups to come}\rfloor)` of the budget;
4. draw b examples of each group uniformly.

Rare scores are thus kept nearly whole and common ones thinned out. With EL2N as the score it is
CCS (Zheng et al. 2023); with influence on the risk of a cheap model plus effort of the expensive
one, DEALRec (Lin et al. 2024).

Zheng, Liu, Lai and Prakash, 2023, "Coverage-centric Coreset Selection for High Pruning Rates",
arXiv:2210.15809; Lin et al., 2024, arXiv:2401.17197 (published without the hard prune, released
with one of .1; the released bin edges are sums of rounded widths and can lose the highest score).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw import sampling
from scoredraw.data_selection.influence import Array, require_finite, to_numpy
from scoredraw.data_selection.influence_on_risk import effort_scores, influence_on_risk
from scoredraw.data_selection.softmax_surrogate import fit_softmax, softmax_influence
from scoredraw.draws import Draw
from scoredraw.errors import InputError, require
from scoredraw.races import row_ids
from scoredraw.uniforms import Rng, RowUniforms, generator

Index = NDArray[np.int64]
Progress = Callable[[int, int], None]

PENALTY = 1e-3  # of the surrogate, as mean loss + c/2 |W|^2
SURROGATE_STEPS = 20  # of L-BFGS: stopped early, or the risk's gradient would vanish
PREFIT_SHARE, PREFIT_EPOCHS = 0.1, 10  # the probe whose effort is measured has seen this much


# ── The score ────────────────────────────────────────────────────────────────────────────────────


def combined_score(
    influence: ArrayLike,
    effort: ArrayLike,
    *,
    effort_weight: float = 0.5,
    scaling: Literal["minmax", "raw"] = "minmax",
) -> Array:
    r"""DEALRec's score: influence on the risk plus a weight times effort.

    :math:`s=\mathrm{minmax}(I)+\lambda\,\mathrm{minmax}(e)`, as released; "raw" adds the raw
    values, as printed. Under "minmax" no positive affine change of I or e changes s.

    influence : (n,) finite. effort : (n,) finite and not negative. effort_weight : lambda, the
    paper's best .3 (Games) and 1 (Book, MicroLens), the program's default .5.
    Returns (n,). A column of equal values counts as zeros, with a warning (0/0 where released).
    Raises InputError on lengths that differ, NaN, negative effort or weight. Row-local given the
    two ranges.

    Lin et al., 2024, arXiv:2401.17197 (equation 13).

    >>> combined_score([0.0, 1.0, 2.0], [5.0, 5.5, 5.0], effort_weight=1.0).tolist()
    [0.0, 1.5, 1.0]
    """
    first, second = _column("influence", influence), _column("effort", effort)
    came = f"{len(second)} values"
    require(len(first) == len(second), "effort", came, f"{len(first)}, one for each influence")
    negative = f"{second.min():g}"
    require(bool(second.min() >= 0), "effort", negative, "lengths of gradients, at least 0")
    usable = 0 <= effort_weight < np.inf
    require(usable, "effort_weight", effort_weight, "a number of at least 0")
    require(scaling in ("minmax", "raw"), "scaling", repr(scaling), "'minmax' or 'raw'")
    if scaling == "raw":
        return first + effort_weight * second
    return _minmax("influence", first) + effort_weight * _minmax("effort", second)


def _minmax(name: str, values: Array) -> Array:
    low, high = values.min(), values.max()
    if low == high:
        warnings.warn(f"{name}: all values are {low:g}, taken as 0", UserWarning, stacklevel=3)
        return np.zeros_like(values)
    return np.asarray((values - low) / (high - low))


def _column(name: str, values: Any) -> Array:
    column = to_numpy(values).astype(np.float64)
    require(column.ndim == 1 and len(column) > 0, name, f"shape {column.shape}", "(n,), n > 0")
    require_finite(name, column)
    low, high = float(column.min()), float(column.max())
    require(bool(np.isfinite(high - low)), name, f"{low:g} to {high:g}", "a range below 1e308")
    return column


# ── The selection ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class CoverageSelection:
    """What was chosen, and how the budget was spread over the range of the score.

    indices: int64 (k,), ascending. groups: int64 (n,), each example's interval, low to high, -1
    where hard-pruned. sizes, budgets: int64 (K,), examples in each interval and chosen of it.
    draw: the `Draw`, with inclusion budgets / sizes and weights one; not for totals.
    """

    indices: Index
    groups: Index
    sizes: Index
    budgets: Index
    draw: Draw = field(repr=False)


def coverage_select(
    score: ArrayLike,
    budget: int,
    *,
    n_groups: int = 50,
    hard_prune: float = 0.0,
    rng: Rng = None,
    ids: Any = None,
) -> CoverageSelection:
    r"""Draw `budget` examples from all of a score's range, rare scores first.

    Drops the :math:`\lfloor\text{hard\_prune}\cdot n\rfloor` highest (ties at random), cuts the
    rest at :math:`s_{\min}+(s_{\max}-s_{\min})k/K` into intervals closed on the right, the minimum
    in the first, and gives each non-empty one, smallest first,
    :math:`\min(|g|,\lfloor\text{left}/\text{groups to come}\rfloor)`, drawn uniformly. Ties in
    size go to the lower interval. Nothing is left over: the last group may take all that is.

    Parameters
    ----------
    score : (n,) finite. budget : examples wanted; all that are not pruned if that is fewer.
    n_groups : K; 25, 50 or 75 in the paper. One group is a uniform draw.
    hard_prune : in [0, 1); .1 as released with DEALRec, 0 in its text, the beta of CCS.
    ids : identities for the draw other than positions, as in `sampling`.

    Returns
    -------
    CoverageSelection. Raises InputError on NaN or infinite scores, a budget or n_groups below 1,
    a hard_prune outside [0, 1).

    Time O(n log n), memory O(n). Row-local given the size of each interval: a permutation of the
    examples (with their ids) permutes the choice.

    Lin et al., 2024, arXiv:2401.17197 (algorithm 2); Zheng et al., 2023, arXiv:2210.15809.

    >>> chosen = coverage_select([0.0, 0.1, 0.1, 0.2, 0.9, 1.0], 4, n_groups=2, rng=0)
    >>> chosen.sizes.tolist(), chosen.budgets.tolist(), chosen.indices[-2:].tolist()
    ([4, 2], [2, 2], [4, 5])
    """
    values = _column("score", score)
    _check_count("budget", budget)
    _check_count("n_groups", n_groups)
    require(0 <= hard_prune < 1, "hard_prune", hard_prune, "a share in [0, 1)")
    n, uniforms = len(values), RowUniforms(rng)
    kept = np.arange(n)
    dropped = int(hard_prune * n + 1e-9)
    if dropped:
        kept = sampling.top_k(values, n - dropped, largest=False, rng=uniforms, ids=ids).indices
    groups = np.full(n, -1, np.int64)
    groups[kept] = _intervals(values[kept], n_groups)
    sizes = np.bincount(groups[kept], minlength=n_groups).astype(np.int64)
    budgets = _spread(sizes, budget)
    names = np.arange(n, dtype=np.uint64) if ids is None else row_ids(ids, n)
    chosen = _smallest_of_each(groups, budgets, uniforms.at(names, stream="coverage"))
    draw = Draw(
        chosen,
        np.ones(len(chosen)),
        n,
        inclusion=(budgets / np.maximum(sizes, 1))[groups[chosen]],
        scores=values[chosen],
        method=f"coverage of {n_groups} groups",
        info={"design": None, "strata": groups[chosen]},
    )
    return CoverageSelection(chosen, groups, sizes, budgets, draw)


def _intervals(values: Array, k: int) -> Index:
    """The interval of each value: right-closed, the minimum in the first, the maximum the last."""
    low, high = values.min(), values.max()
    edges = low + (high - low) * np.arange(1, k) / k  # without the last, which is the maximum
    return np.asarray(np.searchsorted(edges, values, side="left"), np.int64)


def _spread(sizes: Index, budget: int) -> Index:
    budgets, left = np.zeros(len(sizes), np.int64), int(budget)
    order = [g for g in np.argsort(sizes, kind="stable") if sizes[g] > 0]
    for place, group in enumerate(order):
        budgets[group] = min(int(sizes[group]), left // (len(order) - place))
        left -= int(budgets[group])
    return budgets


def _smallest_of_each(groups: Index, budgets: Index, u: Array) -> Index:
    """The `budgets[g]` rows with the smallest u of each group g, ascending."""
    order = np.lexsort((u, groups))
    order = order[np.searchsorted(groups[order], 0) :]  # -1, the pruned, come first
    among = groups[order]
    place = np.arange(len(order)) - np.searchsorted(among, among)
    return np.sort(order[place < budgets[among]])


def _check_count(name: str, value: Any) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(whole and value >= 1, name, value, "a count of at least 1")


def cluster_select(
    embeddings: ArrayLike,
    budget: int,
    *,
    n_clusters: int = 50,
    pick: Literal["random", "centre"] = "random",
    rng: Rng = None,
) -> Draw:
    """Examples from every k-means cluster of their embeddings: a baseline without a score.

    "random" draws from each cluster in proportion to its size, at least one; "centre" makes
    `budget` clusters and takes the example nearest to the centre of each.

    embeddings : (n, d) finite. Returns a Draw of `budget` examples ("centre": fewer where
    examples coincide). Raises InputError on a budget outside 1..n, more clusters than budget.
    Time O(n d clusters) an iteration of k-means. Sequential.

    >>> cluster_select([[0.0], [0.1], [5.0], [5.1]], 2, n_clusters=2, rng=0).indices.shape
    (2,)
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    x = to_numpy(embeddings).astype(np.float64)
    require(x.ndim == 2 and x.size > 0, "embeddings", f"shape {x.shape}", "(n, d), not empty")
    require_finite("embeddings", x)
    _check_count("budget", budget)
    require(budget <= len(x), "budget", budget, f"at most the pool's {len(x)}")
    require(pick in ("random", "centre"), "pick", repr(pick), "'random' or 'centre'")
    if pick == "random":
        _check_count("n_clusters", n_clusters)
        require(n_clusters <= budget, "n_clusters", n_clusters, f"at most the budget, {budget}")
    random = generator(rng)
    clusters = n_clusters if pick == "random" else budget
    seed = int(random.integers(2**31 - 1))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct points than clusters
        fit = KMeans(clusters, n_init=1, random_state=seed).fit(x)
    if pick == "random":
        return sampling.uniform(len(x), budget, rng=random, by=fit.labels_)
    away = np.linalg.norm(x - fit.cluster_centers_[fit.labels_], axis=1)
    one_each = np.ones(clusters, np.int64)
    nearest = _smallest_of_each(fit.labels_.astype(np.int64), one_each, away)
    return Draw(nearest, np.ones(len(nearest)), len(x), method="nearest to k-means centres")


class DEALRecSelector:
    """Fit the two scores once, select under any budget.

    effort_weight, n_groups, hard_prune: as `combined_score` and `coverage_select`; hard_prune=0
    is the text of the paper. After a fit: `influence_`, `effort_` and `score_`, (n,) each.

    >>> influence = np.linspace(0, 1, 40)
    >>> selector = DEALRecSelector(n_groups=10).fit(influence, np.ones(40) + influence)
    >>> len(selector.select(12, rng=0).indices), len(selector.select(4, rng=0).indices)
    (12, 4)
    """

    def __init__(
        self, *, effort_weight: float = 0.5, n_groups: int = 50, hard_prune: float = 0.1
    ) -> None:
        self.effort_weight, self.n_groups, self.hard_prune = effort_weight, n_groups, hard_prune
        self.score_: Array | None = None

    def fit(self, influence: ArrayLike, effort: ArrayLike) -> DEALRecSelector:
        """Take both scores, (n,) each, of any recommender or model."""
        self.score_ = combined_score(influence, effort, effort_weight=self.effort_weight)
        self.influence_, self.effort_ = _column("influence", influence), _column("effort", effort)
        return self

    def fit_models(
        self,
        surrogate: Any,
        data: tuple[Any, Any],
        model: Any,
        batches: Any,
        *,
        influence: Mapping[str, Any] | None = None,
        effort: Mapping[str, Any] | None = None,
    ) -> DEALRecSelector:
        """Score (inputs, labels) on a trained torch `surrogate`, the same examples on `model`.

        influence, effort: options of `influence_on_risk` (``{"damping": 0.1}``) and
        `effort_scores` (``{"params": "lora_last"}``). Raises InputError as these do, and where
        the two saw different numbers of examples.
        """
        gain = influence_on_risk((surrogate, data), **(influence or {}))
        return self.fit(gain, effort_scores(model, batches, **(effort or {})))

    def select(self, budget: int, *, rng: Rng = None) -> CoverageSelection:
        """`coverage_select` of the fitted score."""
        if self.score_ is None:
            raise InputError("select: got an unfitted DEALRecSelector, want fit() first")
        return coverage_select(
            self.score_, budget, n_groups=self.n_groups, hard_prune=self.hard_prune, rng=rng
        )


# ── Straight from a table ────────────────────────────────────────────────────────────────────────


def dealrec_scores(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    effort_weight: float = 0.5,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    r"""DEALRec's score of table rows, with a softmax regression as the cheap model.

    Influence: on the risk of a softmax regression on standardised features and a constant, with
    :math:`\frac c2\lVert W\rVert^2`, c = .001, stopped after 20 steps of L-BFGS; H of
    the penalised loss, by CG. Effort: last-layer gradient of a small probe fitted to a tenth
    of the rows, spread over the classes.

    features : (n, d) finite. labels : (n,) classes of any kind. progress : (steps done, of 3).
    Returns (n,) float64. Raises InputError as `probe.score_all`. Time O(n d classes) a step;
    19,000 rows, 64 features and 150 classes take a few seconds. Memory O(n (d + classes)).
    Sequential.

    Lin et al., 2024, arXiv:2401.17197.

    >>> x = np.random.default_rng(0).normal(size=(80, 3))
    >>> dealrec_scores(x, x[:, 0] > 0).shape
    (80,)
    """
    from threadpoolctl import threadpool_limits

    from scoredraw.data_selection.probe import standardised_rows

    report = progress or (lambda done, total: None)
    usable = 0 <= effort_weight < np.inf
    require(usable, "effort_weight", effort_weight, "a number of at least 0")
    x, y = standardised_rows(features, labels)
    design = np.column_stack([x, np.ones(len(x))])
    with threadpool_limits(1):  # the same rounding on any number of cores
        weights = fit_softmax(design, y, penalty=PENALTY, steps=SURROGATE_STEPS)
        report(1, 3)
        influence, _ = softmax_influence(design, y, weights, penalty=PENALTY)
        report(2, 3)
        effort = _probe_effort(x, y, rng)
        report(3, 3)
    return combined_score(influence, effort, effort_weight=effort_weight)


def dealrec_examples(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    size: int,
    effort_weight: float = 0.5,
    hard_prune: float = 0.1,
    n_groups: int = 50,
    scores: ArrayLike | None = None,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Draw:
    """Draw rows of a table by DEALRec: `dealrec_scores`, then `coverage_select`.

    Exactly `size` rows, weights one: the hard prune never drops so many that fewer are left.
    scores: (n,) where they are known already. Other arguments, errors and cost as these two.
    Lin et al., 2024, arXiv:2401.17197.

    >>> x = np.random.default_rng(0).normal(size=(80, 3))
    >>> len(dealrec_examples(x, x[:, 0] > 0, size=8))
    8
    """
    n = len(to_numpy(features))
    _check_draw(size, n, hard_prune, n_groups)
    if scores is None:
        scores = dealrec_scores(
            features, labels, effort_weight=effort_weight, rng=rng, progress=progress
        )
    return _table_draw(scores, n, size, hard_prune, n_groups, rng, "DEALRec")


def ccs_examples(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    size: int,
    hard_prune: float = 0.1,
    n_groups: int = 50,
    scores: ArrayLike | None = None,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Draw:
    """Draw rows of a table by CCS: EL2N of a probe (`probe.score_el2n`), then `coverage_select`.

    Exactly `size` rows, weights one: the hard prune never drops so many that fewer are left.
    scores: (n,) where they are known already. Errors and cost as these two.
    Zheng et al., 2023, arXiv:2210.15809.

    >>> x = np.random.default_rng(0).normal(size=(80, 3))
    >>> len(ccs_examples(x, x[:, 0] > 0, size=8))
    8
    """
    from scoredraw.data_selection.probe import score_el2n

    n = len(to_numpy(features))
    _check_draw(size, n, hard_prune, n_groups)
    if scores is None:
        scores = score_el2n(features, labels, rng=rng, progress=progress)
    return _table_draw(scores, n, size, hard_prune, n_groups, rng, "CCS")


def _probe_effort(x: Array, y: Index, rng: Rng) -> Array:
    from scoredraw.data_selection.probe_network import train_probe
    from scoredraw.data_selection.tracin import last_layer_gradient_norms

    seed = int(generator(rng).integers(2**31))
    count = max(round(PREFIT_SHARE * len(x)), int(y.max()) + 1)
    seen = sampling.uniform(len(x), count, rng=seed, by=y).indices
    network = train_probe(x[seen], y[seen], epochs=PREFIT_EPOCHS, seed=seed).checkpoints[-1]
    return last_layer_gradient_norms(network.logits(x), y, network.last_hidden(x))


def _check_draw(size: int, n: int, hard_prune: float, n_groups: int) -> None:
    _check_count("size", size)
    require(size <= n, "size", size, f"at most the pool's {n}")
    _check_count("n_groups", n_groups)
    require(0 <= hard_prune < 1, "hard_prune", hard_prune, "a share in [0, 1)")


def _table_draw(
    scores: ArrayLike, n: int, size: int, hard_prune: float, n_groups: int, rng: Rng, method: str
) -> Draw:
    values = _column("scores", scores)
    require(len(values) == n, "scores", f"{len(values)} values", f"{n}, one a row")
    prune = min(hard_prune, (n - size) / n)
    chosen = coverage_select(values, size, n_groups=n_groups, hard_prune=prune, rng=rng)
    return replace(chosen.draw, method=method)
