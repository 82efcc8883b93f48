"""A scikit-learn estimator: fit features and labels, get the examples to train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from scoredraw import registry, sampling
from scoredraw.draws import Draw
from scoredraw.errors import require


class ExampleSelector(BaseEstimator):
    """Choose the training examples that a method of the catalogue finds worth training on.

    Any method of kind "examples" that takes features and labels: "el2n", "vog", "add-one-in",
    "dealrec", "quad", "k-center", ... As a sampler of imbalanced-learn it has `fit_resample`; as a
    feature selector `get_support`, over examples.

    Parameters
    ----------
    method : a name from ``registry.methods("examples")``.
    size : examples to keep; below 1 a share of them.
    scheme : how examples are drawn by their scores (`sampling.SCHEMES`); the method's own if None.
    options : the method's own options by name, such as ``{"epochs": 20}``.
    random_state : int, RandomState or None.

    Attributes
    ----------
    draw_ : the `Draw`. sample_indices_ : int64 (k,). sample_weight_ : float64 (k,), of mean one.
    scores_ : float64 (n,) where the method gives scores, otherwise None.

    Raises InputError for an unknown method or scheme, a scheme for a method that makes the whole
    draw itself, and a size outside the pool. Time and memory are the method's.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> selector = ExampleSelector("el2n", size=10, random_state=0).fit(x, x[:, 0] > 0)
    >>> len(selector.sample_indices_), int(selector.get_support().sum())
    (10, 10)
    """

    def __init__(
        self,
        method: str = "el2n",
        *,
        size: float = 0.1,
        scheme: str | None = None,
        options: dict[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.size = size
        self.scheme = scheme
        self.options = options
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> ExampleSelector:
        """Score the examples X (n, d) with labels y (n,) and draw."""
        entry = registry.method("examples", self.method)
        usable = ", ".join(m.name for m in registry.methods("examples") if not m.takes)
        require(not entry.takes, "method", repr(self.method), f"one of {usable}")
        scheme = self._scheme(entry)
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        size = round(self.size * len(y)) if self.size < 1 else int(self.size)
        require(1 <= size <= len(y), "size", self.size, f"1 to {len(y)} examples, or a share")
        state, options = self.random_state, self.options or {}
        whole = isinstance(state, int | np.integer)
        seed = int(state) if whole else int(check_random_state(state).randint(2**31 - 1))
        self.scores_: npt.NDArray[np.float64] | None = None
        if self.method == "uniform":
            self.draw_: Draw = sampling.uniform(len(y), size, rng=seed)
        elif entry.draw:
            draw = registry.resolve(entry.draw, entry.extra)
            self.draw_ = draw(X, labels, size=size, rng=seed, **options)
        else:
            score = registry.resolve(entry.function, entry.extra)
            self.scores_ = np.asarray(score(X, labels, rng=seed, **options), np.float64)
            hard = -self.scores_ if entry.easy == "high" else self.scores_
            measure = hard if scheme == "top_k" else sampling.linear(hard)
            self.draw_ = sampling.SCHEMES[scheme](measure, size, rng=seed)
        self.sample_indices_, self.sample_weight_ = self.draw_.indices, self.draw_.sample_weight
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Fit, and return the chosen examples and their labels, in the types they came in."""
        self.fit(X, y)
        return self.draw_.take(X), self.draw_.take(y)

    def get_support(self, indices: bool = False) -> npt.NDArray[Any]:
        """Which examples were chosen: a mask bool (n,), or their positions in order."""
        check_is_fitted(self, "draw_")
        mask = np.zeros(self.draw_.n, bool)
        mask[self.sample_indices_] = True
        return np.flatnonzero(mask) if indices else mask

    def _scheme(self, entry: registry.Method) -> str:
        if self.scheme is None:
            return entry.scheme
        known = ", ".join(sampling.SCHEMES)
        require(self.scheme in sampling.SCHEMES, "scheme", repr(self.scheme), f"one of {known}")
        wanted = f"none: {entry.name} makes the whole draw itself"
        require(not entry.draw, "scheme", repr(self.scheme), wanted)
        return self.scheme

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
