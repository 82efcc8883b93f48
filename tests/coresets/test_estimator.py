"""The scikit-learn estimator: its checks, its attributes, its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from scoredraw.coresets.estimator import LpRowSampler
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.streaming import MergeReduce
from scoredraw.errors import InputError
from scoredraw.sampling import poisson

pytestmark = pytest.mark.contract
Float = NDArray[np.float64]


def gaussian(n: int, d: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        LpRowSampler(),
        LpRowSampler(method="sensitivity", scheme="systematic"),
        LpRowSampler(method="root_leverage", rounds=3),
        LpRowSampler(p=3, method="split", size=5),
    ]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_fit_is_a_score_and_a_draw() -> None:
    A = gaussian(300, 3)
    sampler = LpRowSampler(p=1, size=60, random_state=5).fit(A)
    draw = poisson(lewis_weights(A, 1), 60, rng=5)
    assert (sampler.sample_indices_ == draw.indices).all()
    np.testing.assert_allclose(sampler.sample_weight_, draw.weights)
    np.testing.assert_allclose(sampler.sample_weight_, 1 / sampler.draw_.inclusion)
    assert (sampler.take(A) == A[draw.indices]).all()
    assert (sampler.sample().indices == draw.indices).all()
    assert (sampler.sample(6).indices != sampler.sample(7).indices[: len(draw)]).any()


@pytest.mark.parametrize(
    ("p", "method"),
    [(1, "sensitivity"), (1, "leverage"), (1.5, "root_leverage"), (1, "uniform"), (4, "split"),
     (2, "sensitivity_plus_leverage"), (5, "lewis"), (1, "sensitivity_sampled"),
     (1, "sensitivity_block"), (1, "sensitivity_upper"), (3, "sensitivity_upper"),
     (3, "sensitivity_lower")],
)  # fmt: skip
def test_every_score(p: float, method: str) -> None:
    A = gaussian(200, 3)
    for scheme in ("systematic", "priority", "pivotal"):
        sampler = LpRowSampler(p=p, method=method, size=40, scheme=scheme, random_state=0).fit(A)
        assert len(sampler.sample_indices_) == 40
        assert sampler.scores_.shape == (200,)
    assert len(LpRowSampler(p=p, method=method, size=0.1, scheme="systematic").fit(A).draw_) == 20


def test_eps_asks_for_more_rows_as_it_falls() -> None:
    A = gaussian(5000, 3)
    sizes = [len(LpRowSampler(eps=eps, scheme="priority").fit(A).draw_) for eps in (0.5, 0.2, 0.1)]
    assert sizes == [12, 75, 300]


def test_scores_are_those_of_the_functions() -> None:
    from scoredraw.coresets.sensitivities import lp_sensitivities

    A = gaussian(120, 3)
    for method in ("exact", "sampled", "block", "upper", "lower"):
        name = "sensitivity" if method == "exact" else f"sensitivity_{method}"
        sampler = LpRowSampler(p=3, method=name, size=30, random_state=4).fit(A)
        want = lp_sensitivities(A, 3, method=method, rng=4)
        np.testing.assert_allclose(sampler.scores_, want, rtol=1e-7)


@pytest.mark.parametrize("p", [1, 3])
def test_bounds_ask_for_the_rows_that_sensitivities_would_and_their_slack(p: float) -> None:
    """For eps: q ≥ σ/α at every row, with α = Σσ/size of the exact scores (𝔖 estimated, 5 %)."""
    from scoredraw.coresets.sensitivities import lp_sensitivities

    A = gaussian(1200, 3) * np.random.default_rng(1).exponential(1, (1200, 1))
    sigma = lp_sensitivities(A, p)
    exact = LpRowSampler(p=p, method="sensitivity", eps=0.5, scheme="priority").fit(A)
    alpha = sigma.sum() / len(exact.draw_)
    for method in ("sensitivity_upper", "sensitivity_lower"):
        sampler = LpRowSampler(p=p, method=method, eps=0.5, scheme="priority", random_state=0)
        size = len(sampler.fit(A).draw_)
        q = np.minimum(1, sampler.scores_ * size / sampler.scores_.sum())
        assert (q >= np.minimum(1, sigma / alpha) * 0.8).all()
        assert size < 12 * len(exact.draw_)


def test_a_median_regression_on_the_sample() -> None:
    from sklearn.linear_model import QuantileRegressor

    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 3))
    y = X @ [1.0, -2.0, 0.5] + rng.standard_cauchy(3000) * 0.1
    sampler = LpRowSampler(p=1, size=400, scheme="systematic", random_state=0)
    sampler.fit(np.column_stack([X, np.ones(3000), y]))
    model = QuantileRegressor(alpha=0, solver="highs")
    kept = sampler.sample_indices_
    model.fit(X[kept], y[kept], sample_weight=sampler.sample_weight_)
    np.testing.assert_allclose(model.coef_, [1.0, -2.0, 0.5], atol=0.05)


def test_a_stream() -> None:
    A = gaussian(2000, 3)
    sampler = LpRowSampler(p=1, size=100, random_state=3)
    for chunk in np.array_split(A, 8):
        sampler.partial_fit(chunk)
    state = MergeReduce(p=1, size=100, rng=3)
    state.push(A)
    draw, rows = state.sample()
    assert (sampler.sample_indices_ == draw.indices).all()
    assert (sampler.sample_rows_ == rows).all()
    assert not hasattr(LpRowSampler(method="sensitivity"), "partial_fit")
    assert not hasattr(sampler.fit(A), "stream_")


def test_sparse_zero_and_clone() -> None:
    A = gaussian(100, 4)
    A[np.abs(A) < 0.8] = 0
    dense = clone(LpRowSampler(size=20, random_state=0)).fit(A)
    sparse = LpRowSampler(size=20, random_state=0).fit(csr_array(A))
    assert (dense.sample_indices_ == sparse.sample_indices_).all()
    with pytest.warns(np.exceptions.RankWarning):
        assert len(LpRowSampler().fit(np.zeros((5, 2))).sample_indices_) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 0.5}, "p: got 0.5"),
        ({"size": 0}, "size: got 0"),
        ({"eps": 2}, "eps: got 2"),
        ({"method": "best"}, "method"),
        ({"scheme": "lottery"}, "scheme"),
        ({"rounds": 0}, "rounds"),
        ({"p": 2, "method": "root_leverage"}, "p < 2"),
        ({"p": 3, "method": "sensitivity_plus_leverage"}, "p <= 2"),
        ({"p": 2, "method": "split"}, "p > 2"),
        ({"method": "root_leverage", "rounds": 3, "scheme": "pivotal"}, "several rounds"),
    ],
)
def test_bad_parameters(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LpRowSampler(**options).fit(gaussian(20, 2))
