"""A scikit-learn estimator: fit a matrix, get the rows to keep and their sample weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from scoredraw.coresets.approximate import total_sensitivity
from scoredraw.coresets.combined import (
    root_leverage,
    sample_size,
    sensitivity_lower_bounds,
    sensitivity_plus_leverage,
    sensitivity_upper_bounds,
    split_scores,
)
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.coresets.streaming import MergeReduce
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.sampling import SCHEMES

Float = npt.NDArray[np.float64]

METHODS = (
    "lewis",
    "sensitivity",
    "sensitivity_sampled",
    "sensitivity_block",
    "sensitivity_upper",
    "sensitivity_lower",
    "leverage",
    "root_leverage",
    "sensitivity_plus_leverage",
    "split",
    "uniform",
)


class LpRowSampler(BaseEstimator):
    """Choose and weight rows so that Σ weight |⟨a_i, x⟩|^p stands for ‖Ax‖_p^p, for every x.

    For an lp regression of y on X fit [X, 1, y] and hand `sample_weight_` to the solver with the
    rows `sample_indices_`. p=1 serves least absolute deviations and quantile regression, p=2 least
    squares, large p a minimax fit.

    Parameters
    ----------
    p : 1 ≤ p < ∞.
    size : rows to keep (expected number for scheme="poisson"); below 1 a share of the rows. By
        default what `sample_size` gives for `eps`.
    eps : relative error aimed at, up to constants and logarithms, if size is None; 0.5 by default.
    method : the score: "lewis" (the default: cheap, and for p ≤ 2 above the sensitivities),
        "sensitivity", its approximations "sensitivity_sampled" and "sensitivity_block" and bounds
        "sensitivity_upper" and "sensitivity_lower" (as in `lp_sensitivities`), "leverage",
        "root_leverage" (p < 2), "sensitivity_plus_leverage" (p ≤ 2), "split" (p > 2) or "uniform".
    scheme : a scheme of `scoredraw.sampling`: "poisson", "priority", "systematic", "pivotal", ...
    rounds : of recursive root leverage (which is a Poisson draw each).
    random_state : int, RandomState or None.

    Attributes
    ----------
    scores_ : float64 (n,).
    draw_ : the `Draw`.
    sample_indices_ : int64 (k,). sample_weight_ : float64 (k,), 1/q.
    sample_rows_ : after `partial_fit`, the rows themselves (k, n_features).

    Woodruff and Yasuda 2023 (arXiv 2306.00732).

    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((400, 3))
    >>> sampler = LpRowSampler(p=1, size=50, scheme="systematic", random_state=0).fit(X)
    >>> len(sampler.sample_indices_), sampler.take(X).shape
    (50, (50, 3))
    """

    def __init__(
        self,
        p: float = 1.0,
        *,
        size: float | None = None,
        eps: float | None = None,
        method: str = "lewis",
        scheme: str = "poisson",
        rounds: int = 1,
        random_state: Any = None,
    ) -> None:
        self.p = p
        self.size = size
        self.eps = eps
        self.method = method
        self.scheme = scheme
        self.rounds = rounds
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> LpRowSampler:
        """Score the rows of X (n, d), dense or CSR, and draw. y is ignored."""
        self._check_parameters()
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32])
        self.__dict__.pop("stream_", None)
        self._size: int | None = None
        self.seed_ = self._seed()
        if self.method == "root_leverage" and self.rounds > 1:
            self.scores_ = leverage_scores(X) ** (self.p / 2)
        else:
            self.scores_ = self._score(X)
        self._rows = X if self.rounds > 1 else None
        return self._keep(self.sample())

    @available_if(lambda self: self.method == "lewis")
    def partial_fit(self, X: Any, y: Any = None) -> LpRowSampler:
        """Take the next rows of a stream, read once: merge and reduce, for method="lewis".

        `size` is a count (from `eps` if None). The rows kept are in `sample_rows_`, their positions
        in the stream in `sample_indices_`; the error is larger than `fit`'s, see `MergeReduce`.
        """
        self._check_parameters()
        fresh = not hasattr(self, "stream_")
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=fresh)
        if fresh:
            counted = self.size is None or self.size >= 1
            require(counted, "size", self.size, "a count of rows, for a stream of unknown length")
            size = self._from_eps(1.0) if self.size is None else int(self.size)
            self.stream_ = MergeReduce(self.p, size, rng=self._seed())
        self.stream_.push(X)
        draw, self.sample_rows_ = self.stream_.sample()
        return self._keep(draw)

    def sample(self, random_state: Any = None) -> Draw:
        """A draw with the fitted scores and another seed; without one, that of `fit` again."""
        check_is_fitted(self, "scores_")
        seed = self.seed_ if random_state is None else self._seed(random_state)
        size = self._count(len(self.scores_))
        if not self.scores_.any():
            return Draw(np.arange(0), np.zeros(0), len(self.scores_), unbiased=True)
        if self.method == "root_leverage" and self.rounds > 1:
            return root_leverage(self._rows, self.p, size, rounds=self.rounds, rng=seed)
        size = min(size, int(np.count_nonzero(self.scores_)))
        return SCHEMES[self.scheme](self.scores_, size, rng=seed)

    def take(self, X: Any) -> Any:
        """The chosen rows of X, the matrix that was fitted."""
        check_is_fitted(self, "draw_")
        X = validate_data(self, X, accept_sparse="csr", dtype=None, reset=False)
        return self.draw_.take(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _keep(self, draw: Draw) -> LpRowSampler:
        self.draw_ = draw
        self.sample_indices_ = draw.indices
        self.sample_weight_ = draw.weights
        return self

    def _check_parameters(self) -> None:
        require(1 <= self.p < np.inf, "p", self.p, "1 <= p < infinity")
        require(self.size is None or self.size > 0, "size", self.size, "a positive number or None")
        require(self.eps is None or 0 < self.eps < 1, "eps", self.eps, "0 < eps < 1 or None")
        require(self.method in METHODS, "method", repr(self.method), f"one of {', '.join(METHODS)}")
        known = ", ".join(SCHEMES)
        require(self.scheme in SCHEMES, "scheme", repr(self.scheme), f"one of {known}")
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        recursive = self.method == "root_leverage" and self.rounds > 1
        ranges = {
            "root_leverage": (self.p < 2, "p < 2"),
            "sensitivity_plus_leverage": (self.p <= 2, "p <= 2"),
            "split": (self.p > 2, "p > 2"),
        }
        inside, wanted = ranges.get(self.method, (True, ""))
        require(inside, "p", self.p, f"{wanted} for method={self.method!r}")
        poisson = self.scheme == "poisson" or not recursive
        require(poisson, "scheme", repr(self.scheme), "'poisson' for several rounds")

    def _score(self, X: Any) -> Float:
        if self.method == "uniform":
            return np.ones(X.shape[0])
        if self.method in ("sensitivity_upper", "sensitivity_lower"):
            return self._bounds(X)
        if self.method.startswith("sensitivity") and self.method != "sensitivity_plus_leverage":
            how = self.method.removeprefix("sensitivity").strip("_") or "exact"
            return lp_sensitivities(X, self.p, method=how, rng=self.seed_)
        if self.method == "leverage":
            return leverage_scores(X)
        if self.method == "root_leverage":
            return leverage_scores(X) ** (self.p / 2)
        if self.method == "sensitivity_plus_leverage":
            return sensitivity_plus_leverage(X, self.p)
        if self.method == "split":
            sigma = lp_sensitivities(X, self.p)
            self._size = self._from_eps(float(sigma.sum()))
            return split_scores(X, self.p, self._count(len(sigma)), sensitivities=sigma)
        return lewis_weights(X, self.p)

    def _bounds(self, X: Any) -> Float:
        """Upper or lower bounds; the size for eps takes 𝔖 from a few exact sensitivities.

        Sensitivities would be drawn with q = σ/α. Scores s ≥ cσ need α c, and Σs/(α c) rows.
        """
        upper = sensitivity_upper_bounds(X, self.p)
        lower = sensitivity_lower_bounds(X, self.p)
        scores = upper if self.method == "sensitivity_upper" else lower
        if self.size is None and scores.any():
            total, _ = total_sensitivity(X, self.p, rng=self.seed_)
            real = upper > 0
            short = 1.0 if scores is upper else float((upper[real] / lower[real]).max())
            size = self._from_eps(total) * short * float(scores.sum()) / total
            self._size = int(np.ceil(size * (1 - 1e-9)))
        return scores

    def _count(self, n: int) -> int:
        """Rows to keep out of n."""
        if self.size is not None:
            return max(1, min(n, round(self.size * n) if self.size < 1 else int(self.size)))
        return min(n, self._size or self._from_eps(float(self.scores_.sum())))

    def _from_eps(self, total: float) -> int:
        """The size for eps, by the order of the bound for this score; total: the scores' sum."""
        d = int(self.n_features_in_)
        eps = 0.5 if self.eps is None else self.eps
        bound = {"leverage": "lewis", "uniform": "generic"}.get(self.method, self.method)
        if bound.startswith("sensitivity_") and bound != "sensitivity_plus_leverage":
            bound = "sensitivity"
        if self.method == "sensitivity_plus_leverage":
            total -= d
        return sample_size(bound, self.p, eps, max(total, 1e-9), d)

    def _seed(self, random_state: Any = None) -> int:
        state = self.random_state if random_state is None else random_state
        if isinstance(state, int | np.integer):
            return int(state)
        return int(check_random_state(state).randint(2**31 - 1))
