"""Diverse documents from correlated ratings: the best of each principal component (ODiS).

The top by an average rating is good all round and alike. ODiS rates a seed set on K metrics, takes
the correlation out (`principal_scores`), trains one scorer a component where the pool itself is
not rated, and fills the budget with the top documents of every component (`score_lists`).

"Learning from the Best, Differently: A Diversity-Driven Rethinking on Data Selection", 2025, arXiv
2510.18909: 11 metrics, 4 components. No code was published; standardisation, signs, the split of
the budget and duplicates are decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from scoredraw.data_selection.principal_scores import PrincipalScores, as_ratings, principal_scores
from scoredraw.data_selection.probe import HIGH_IS_EASY, METHODS, score_all
from scoredraw.data_selection.score_lists import Selection, select
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.uniforms import Rng, RowUniforms, generator

Float = NDArray[np.float64]

SHARES = ("equal", "variance")


class ODiSSelector(BaseEstimator):
    """Keep the top documents of each principal component of their ratings.

    Parameters
    ----------
    n_components : how many components, or None for the fewest that explain `explained` of the
        variance. One metric is ranked as it is.
    standardize, sign, rotation, whiten, directions, impute : as in `principal_scores`; with
        sign="anchor" the overall score is `fit`'s y, with "two_sided" a contrast's list is two, of
        its high and of its low end, with half the share each.
    size : documents to keep, or tokens where `tokens` are given; below 1 a share of them.
    share : of the budget, "equal" for all components or in proportion to their "variance".
    refill, joint_threshold, joint : as in `select`; the threshold is about components.
    scorer : a scikit-learn regressor or pipeline, cloned for each component and fitted from
        `features` (texts, or a matrix) to the component's score; None where the pool is rated.
    random_state : int, RandomState or None: ties, and the start of ICA.

    Attributes
    ----------
    components_ : the `PrincipalScores`. loadings_ : (k, m). explained_variance_ratio_ : (m,) of
    all axes. contrasts_ : bool (k,), components whose high end isn't simply the better one.
    scores_ : (n, k) of the fitted rows. scorers_ : the fitted clones, or None.
    selection_ : the `Selection` from the fitted rows. draw_ : its `Draw`.

    Raises InputError for what `principal_scores` and `select` refuse. Time O(n K² + k n log n).

    "Learning from the Best, Differently", 2025, arXiv 2510.18909.

    >>> ratings = np.random.default_rng(0).normal(size=(200, 5)) @ np.tri(5)
    >>> selector = ODiSSelector(n_components=2, size=20).fit(ratings)
    >>> int(selector.get_support().sum()), np.bincount(selector.selection_.component).tolist()
    (20, [10, 10])
    """

    def __init__(
        self,
        n_components: int | None = 4,
        *,
        explained: float = 0.85,
        standardize: bool = True,
        sign: str = "loadings_sum",
        rotation: str | None = None,
        whiten: bool = False,
        directions: Any = None,
        impute: str | None = None,
        size: float = 0.1,
        share: str = "equal",
        refill: bool = True,
        joint_threshold: float | None = None,
        joint: str = "mean",
        scorer: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.explained = explained
        self.standardize = standardize
        self.sign = sign
        self.rotation = rotation
        self.whiten = whiten
        self.directions = directions
        self.impute = impute
        self.size = size
        self.share = share
        self.refill = refill
        self.joint_threshold = joint_threshold
        self.joint = joint
        self.scorer = scorer
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any = None, *, features: Any = None, tokens: ArrayLike | None = None
    ) -> ODiSSelector:
        """Find the components of ratings X (n, K), and keep the best of the n documents.

        y: overall scores (n,), read with sign="anchor" alone. features: what the scorer reads of
        the same n documents, a list of texts or a matrix. tokens: (n,) their lengths.
        """
        require(self.share in SHARES, "share", repr(self.share), "'equal' or 'variance'")
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite=False)
        reads = features is not None
        needed = "what the scorer reads of each document, and only with a scorer"
        require(reads == (self.scorer is not None), "features", "some" if reads else "none", needed)
        if reads:
            rows = features.shape[0] if hasattr(features, "shape") else len(features)
            require(rows == len(X), "features", f"{rows} rows", f"{len(X)}, one a document")
        self.seed_ = self._seed()
        self.components_: PrincipalScores = principal_scores(
            X, self.n_components, explained=self.explained, standardize=self.standardize,
            sign=self.sign, anchor=y if self.sign == "anchor" else None, rotation=self.rotation,
            whiten=self.whiten, directions=self.directions, impute=self.impute, rng=self.seed_,
        )  # fmt: skip
        self.loadings_ = self.components_.loadings
        self.explained_variance_ratio_ = self.components_.explained
        self.contrasts_ = self.components_.contrast
        self.scores_ = self.components_.transform(X)
        self.scorers_ = None
        if reads:
            self.scorers_ = [clone(self.scorer).fit(features, one) for one in self.scores_.T]
        self.selection_ = self.select(self.scores_, tokens=tokens)
        self.draw_: Draw = self.selection_.draw
        return self

    def component_scores(self, X: Any) -> Float:
        """Scores (N, k) of other documents: from features by the scorers, else from ratings."""
        check_is_fitted(self, "components_")
        if self.scorers_ is not None:
            return np.column_stack([scorer.predict(X) for scorer in self.scorers_])
        return self.components_.transform(
            validate_data(self, X, dtype=np.float64, reset=False, ensure_all_finite=False)
        )

    def select(
        self, scores: ArrayLike, *, size: float | None = None, tokens: ArrayLike | None = None
    ) -> Selection:
        """The top documents of each component of `component_scores` (N, k), as a `Selection`."""
        check_is_fitted(self, "components_")
        s = np.asarray(scores, np.float64)
        fit, k = self.components_, len(self.components_.loadings)
        require(s.ndim == 2 and s.shape[1] == k, "scores", f"shape {s.shape}", f"(N, {k})")
        part = fit.component_share if self.share == "variance" else np.ones(k)
        names = [f"component {j + 1}" for j in range(k)]
        lists, shares = s, part
        if self.sign == "two_sided" and fit.contrast.any():
            low = np.flatnonzero(fit.contrast)
            lists = np.column_stack([s, -s[:, low]])
            shares = np.append(np.where(fit.contrast, part / 2, part), part[low] / 2)
            names += [f"component {j + 1}, low end" for j in low]
        return select(
            lists, self._budget(size, tokens, len(s)), tokens=tokens, shares=shares.tolist(),
            refill=self.refill, joint_threshold=self.joint_threshold, joint=self.joint,
            joint_scores=s, names=names, rng=self.seed_,
        )  # fmt: skip

    def get_support(self, indices: bool = False) -> NDArray[Any]:
        """Which of the fitted documents are kept: a mask bool (n,), or their positions in order."""
        check_is_fitted(self, "draw_")
        mask = np.zeros(self.draw_.n, bool)
        mask[self.draw_.indices] = True
        return self.draw_.indices.copy() if indices else mask

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.impute is not None
        return tags

    def _budget(self, size: float | None, tokens: ArrayLike | None, n: int) -> float:
        wanted = self.size if size is None else size
        whole = not isinstance(wanted, int | float | np.number) or not 0 < wanted < 1
        if whole:
            return wanted
        return max(1, round(wanted * n)) if tokens is None else wanted * float(np.sum(tokens))

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))


def odis_scores_draw(
    scores: ArrayLike,
    *,
    size: float,
    n_components: int | None = 4,
    tokens: ArrayLike | None = None,
    directions: Any = None,
    rotation: str | None = None,
    share: str = "equal",
    joint_threshold: float | None = None,
    impute: str | None = None,
    rng: Rng = 0,
) -> Draw:
    """The top of each principal component of ratings (n, K), `size` documents in all, as a `Draw`.

    Equal shares of the budget (or by variance), no document twice; with tokens (n,) `size` counts
    tokens. Options and errors as `ODiSSelector`; `info["component"]` says where each came from,
    `info["lift"]` how far beyond chance the lists overlap. Time O(n K² + k n log n): 10^6 by 11 in
    a few seconds.

    >>> ratings = np.random.default_rng(0).normal(size=(200, 5)) @ np.tri(5)
    >>> len(odis_scores_draw(ratings, size=20))
    20
    """
    selector = ODiSSelector(
        n_components, directions=directions, rotation=rotation, share=share, size=size,
        joint_threshold=joint_threshold, impute=impute, random_state=_whole_seed(rng),
    )  # fmt: skip
    selection = selector.fit(as_ratings(scores, impute=impute), tokens=tokens).selection_
    k = len(selection.lists)
    off = ~np.eye(k, dtype=bool)
    return replace(
        selection.draw,
        method="odis",
        info={
            **selection.draw.info,
            "explained": selector.components_.component_share.tolist(),
            "contrast": selector.contrasts_.tolist(),
            "lift": float(selection.lift[off].mean()) if k > 1 else None,
        },
    )


def odis_examples(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    size: int,
    n_components: int | None = 4,
    probe_scores: Mapping[str, ArrayLike] | None = None,
    rng: Rng = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Draw:
    """Labelled examples by the principal components of six influence scores, `size` in all.

    The ratings are EL2N, forgetting, GraNd, PVI, TracIn and VoG of a probe (`probe.score_all`),
    turned so that high is clean and easy; each component fills an equal share. probe_scores: those
    six by name, where they are known already. Errors and cost are `score_all`'s. Sequential.

    >>> x = np.random.default_rng(0).normal(size=(80, 3))
    >>> len(odis_examples(x, x[:, 0] > 0, size=12, n_components=2))
    12
    """
    uniforms = RowUniforms(rng)
    if probe_scores is None:
        found = score_all(features, labels, METHODS, rng=generator(uniforms), progress=progress)
        probe_scores = {name: values for name, (values, _) in found.items()}
    directions = [1 if name in HIGH_IS_EASY else -1 for name in METHODS]
    ratings = np.column_stack([probe_scores[name] for name in METHODS])
    return odis_scores_draw(
        ratings, size=size, n_components=n_components, directions=directions, rng=uniforms
    )


def _whole_seed(rng: Rng) -> int | None:
    """A seed for `random_state`; a stateful generator advances."""
    plain = rng is None or isinstance(rng, int | np.integer)
    return rng if plain else int(generator(rng).integers(2**31 - 1))  # type: ignore[return-value]
