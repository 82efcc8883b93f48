"""ODiS: the laws of its components, its lists and its estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from scoredraw.data_selection.orthogonal_scores import (
    ODiSSelector,
    odis_examples,
    odis_scores_draw,
)
from scoredraw.data_selection.principal_scores import is_contrast, principal_scores, varimax
from scoredraw.data_selection.score_lists import overlap_matrix, select
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]


def ratings(n: int = 400, k: int = 6, seed: int = 0) -> Float:
    """Correlated ratings whose eigenvalues lie far apart."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * 2.0 ** -np.arange(k)[:, None]
    return np.asarray(rng.standard_normal((n, k)) @ mix + 5)


# ── components ──────────────────────────────────────────────────────────────────────────────────


def test_components_are_those_of_scikit_learn_up_to_sign() -> None:
    S = ratings()
    Z = (S - S.mean(0)) / S.std(0)
    pca = PCA().fit(Z)
    fit = principal_scores(S, 4)
    np.testing.assert_allclose(fit.explained, pca.explained_variance_ratio_, atol=1e-12)
    signs = np.sign((fit.loadings * pca.components_[:4]).sum(1, keepdims=True))
    np.testing.assert_allclose(fit.loadings, signs * pca.components_[:4], atol=1e-10)
    assert (fit.loadings.sum(1) >= 0).all()
    covariance = principal_scores(S, 2, standardize=False)
    np.testing.assert_allclose(
        covariance.explained, PCA().fit(S).explained_variance_ratio_, atol=1e-12
    )


@pytest.mark.parametrize("rotation", [None, "varimax", "ica", "zca"])
@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_uncorrelated(rotation: str | None, whiten: bool) -> None:
    S = ratings()
    S[:, 0] = np.exp(S[:, 0] / 3)  # ICA has something to find
    k = None if rotation == "zca" else 3
    fit = principal_scores(S, k, rotation=rotation, whiten=whiten)
    y = fit.transform(S)
    r = np.corrcoef(y.T) - np.eye(y.shape[1])
    assert np.abs(r).max() < 1e-10
    np.testing.assert_allclose(np.linalg.norm(fit.loadings, axis=1), 1)
    np.testing.assert_allclose(fit.spread, y.std(0))
    if rotation or whiten:
        np.testing.assert_allclose(y.std(0), 1)
    if k:  # a rotation moves variance between the components, not out of them
        assert fit.component_share.sum() == pytest.approx(fit.explained[:3].sum())
    else:
        np.testing.assert_allclose(fit.component_share, 1 / 6)


def test_zca_is_the_whitening_nearest_to_the_metrics() -> None:
    """ZCA has correlations with its metrics equal to the root of the correlation matrix."""
    S = ratings()
    R = np.corrcoef(S.T)
    values, vectors = np.linalg.eigh(R)
    root = vectors * np.sqrt(values) @ vectors.T
    y = principal_scores(S, None, rotation="zca").transform(S)
    np.testing.assert_allclose(np.corrcoef(S.T, y.T)[:6, 6:], root, atol=1e-9)


def test_varimax_finds_the_simple_structure() -> None:
    """Metrics of two disjoint factors, mixed by a turn: each rotated factor has its own again."""
    rng = np.random.default_rng(0)
    simple = np.zeros((7, 2))
    simple[:4, 0], simple[4:, 1] = 1 + rng.random(4), 1 + rng.random(3)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    found = np.abs(simple @ turn @ varimax(simple @ turn))
    order = np.argsort(-found[0])
    np.testing.assert_allclose(found[:, order], simple, atol=1e-8)


def test_ica_finds_independent_sources() -> None:
    """Skewed independent sources, whitened and turned: PCA leaves them mixed, ICA doesn't."""
    sources = np.random.default_rng(0).exponential(size=(4000, 2))
    S = sources @ np.array([[1.0, 0.6], [0.4, 1.0]])
    found = principal_scores(S, 2, rotation="ica").transform(S)
    best = np.abs(np.corrcoef(found.T, sources.T)[:2, 2:]).max(axis=0)
    assert best.min() > 0.99


@pytest.mark.filterwarnings("ignore:eigenvalues")
def test_signs() -> None:
    rng = np.random.default_rng(0)
    S = rng.standard_normal((300, 2)) @ [[1, 0.5], [0, 1]]
    fit = principal_scores(S, 2)
    np.testing.assert_allclose(fit.loadings, np.array([[1, 1], [1, -1]]) / 2**0.5, atol=1e-9)
    assert fit.contrast.tolist() == [False, True]
    assert fit.loadings[1, 0] > 0  # loadings that sum to 0: the first of the largest
    for side in (1, -1):  # an overall score decides
        overall = side * (S[:, 0] - S[:, 1]) + 0.1 * side * S.sum(1)
        y = principal_scores(S, 2, sign="anchor", anchor=overall).transform(S)
        assert (overall - overall.mean()) @ y[:, 0] > 0 < (overall - overall.mean()) @ y[:, 1]
    flipped = principal_scores(S * [1, -1], 2, directions=[1, -1])
    np.testing.assert_allclose(flipped.transform(S * [1, -1]), fit.transform(S), atol=1e-12)
    assert is_contrast(np.array([[0.995, 0.0995]])).tolist() == [False]


def test_two_sided_takes_both_ends_of_contrasts_alone() -> None:
    rng = np.random.default_rng(0)
    S = 2 * rng.standard_normal((400, 1)) + rng.standard_normal((400, 3)) * [1, 2, 3]
    selector = ODiSSelector(2, sign="two_sided", size=40).fit(S)
    assert selector.contrasts_.tolist() == [False, True]
    names, lists = selector.selection_.names, selector.selection_.lists
    assert names == ("component 1", "component 2", "component 2, low end")
    assert [len(one) for one in lists] == [20, 10, 10]
    y = selector.scores_[:, 1]
    assert set(lists[1]) == set(np.argsort(y)[-10:])
    assert set(lists[2]) == set(np.argsort(y)[:10])


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 5))
@pytest.mark.property
@pytest.mark.filterwarnings("ignore:eigenvalues")
def test_rescaled_and_permuted_metrics_choose_the_same(seed: int, k: int) -> None:
    S = ratings(80, 5, seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(5)
    other = (S * np.exp(rng.normal(size=5) * 3) + rng.normal(size=5) * 10)[:, order]
    a, b = (ODiSSelector(k, size=20).fit(x).selection_ for x in (S, other))
    assert a.indices.tolist() == b.indices.tolist()
    assert a.component.tolist() == b.component.tolist()


def test_a_duplicated_metric_is_no_new_direction() -> None:
    S = ratings(k=3)
    fit = principal_scores(np.column_stack([S, 7 * S[:, 1] - 2]), None, explained=1.0)
    assert fit.explained[-1] < 1e-25
    assert len(fit.loadings) == 3
    with pytest.raises(InputError, match="n_components: got 4, want at most 3, the rank"):
        principal_scores(np.column_stack([S, S[:, 1]]), 4)


def test_explained_variance_decides_how_many() -> None:
    S = ratings()
    reached = np.cumsum(principal_scores(S, 6).explained)
    for k in range(1, 7):
        assert len(principal_scores(S, None, explained=min(1, reached[k - 1])).loadings) == k


def test_equal_eigenvalues_warn() -> None:
    independent = np.random.default_rng(0).standard_normal((5000, 5))
    with pytest.warns(UserWarning, match="other samples may give other components"):
        principal_scores(independent, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert principal_scores(ratings(), 3).gap > 0.05
        principal_scores(independent, None, rotation="zca")  # does not depend on the order


def test_small_and_incomplete_ratings() -> None:
    S = ratings(k=4)
    with pytest.warns(UserWarning, match="constant metrics dropped: columns 2"):
        fit = principal_scores(np.insert(S, 2, 3.0, axis=1), 2)
    np.testing.assert_allclose(fit.transform(np.insert(S, 2, 9.0, axis=1)),
                               principal_scores(S, 2).transform(S))  # fmt: skip
    with pytest.warns(UserWarning, match="3 documents for 4 metrics"):
        principal_scores(S[:3], 2)
    holes = S.copy()
    holes[3, 1] = np.nan
    filled = S.copy()
    filled[3, 1] = np.nanmean(holes[:, 1])
    a = principal_scores(holes, 2, impute="mean")
    np.testing.assert_allclose(a.loadings, principal_scores(filled, 2).loadings)
    np.testing.assert_allclose(a.transform(holes), a.transform(filled))
    one = ODiSSelector(size=10).fit(S[:, :1])  # a single metric: its own top
    assert set(one.draw_.indices) == set(np.argsort(S[:, 0])[-10:])


# ── the selector ────────────────────────────────────────────────────────────────────────────────


def test_one_component_is_the_top_of_it() -> None:
    S = ratings()
    first = PCA(1).fit_transform((S - S.mean(0)) / S.std(0))[:, 0]
    first *= np.sign(np.corrcoef(first, S.sum(1))[0, 1])
    chosen = ODiSSelector(1, size=0.05).fit(S).get_support(indices=True)
    assert set(chosen) == set(np.argsort(first)[-20:])


def test_shares_by_variance_and_by_tokens() -> None:
    S = ratings(2000)
    selector = ODiSSelector(3, size=200, share="variance").fit(S)
    expected = 200 * selector.explained_variance_ratio_[:3] / selector.explained_variance_ratio_[
        :3].sum()  # fmt: skip
    assert np.abs(np.bincount(selector.selection_.component) - expected).max() < 1
    tokens = np.random.default_rng(0).integers(0, 90, 2000)
    selector = ODiSSelector(3, size=0.1).fit(S, tokens=tokens)
    kept = selector.draw_.indices
    assert 0.1 * tokens.sum() <= tokens[kept].sum() < 0.1 * tokens.sum() + 3 * 90
    assert (tokens[kept] > 0).all()
    assert (selector.select(selector.scores_, size=50, tokens=tokens).indices.size) < len(kept)


def test_scorers_learn_the_components() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((500, 8))
    S = features @ rng.standard_normal((8, 5)) * [4, 2, 1, 1, 1]
    selector = ODiSSelector(3, size=30, scorer=Ridge(1e-6)).fit(S[:400], features=features[:400])
    predicted = selector.component_scores(features[400:])
    np.testing.assert_allclose(predicted, selector.components_.transform(S[400:]), atol=1e-3)
    assert len(selector.select(predicted, size=12)) == 12


def test_scorers_read_texts() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.pipeline import make_pipeline

    texts = [f"{'good ' * (i % 5)}{'long ' * (i % 7)}end" for i in range(70)]
    S = np.array([[i % 5, i % 7, i % 5 + i % 7] for i in range(70)], float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two directions of equal size are this test's, not PCA's
        selector = ODiSSelector(2, size=5, scorer=make_pipeline(CountVectorizer(), Ridge(1e-6)))
        selector.fit(S, features=texts)
    scores = selector.component_scores(["good good good good long end", "end"])
    assert scores[0, 0] > scores[1, 0]


def test_draws_for_tables_and_examples() -> None:
    S = ratings(1000)
    draw = odis_scores_draw(S, size=101, n_components=3, rng=1)
    assert (len(draw), draw.n, draw.method) == (101, 1000, "odis")
    assert np.bincount(draw.info["component"]).tolist() == [34, 34, 33]
    assert len(np.unique(draw.indices)) == 101
    assert draw.to_arrow().num_rows == 101
    x = np.random.default_rng(0).normal(size=(300, 4))
    calls: list[tuple[int, int]] = []
    y = (x[:, 0] > 0).astype(int)
    wrong = np.arange(0, 300, 10)
    y[wrong] = 1 - y[wrong]
    draw = odis_examples(
        x, y, size=80, n_components=1, rng=3, progress=lambda i, n: calls.append((i, n))
    )
    assert calls[-1] == (30, 30)
    # high is clean: of 80 at random 8 would be mislabelled, sd 2.3; 4 sd below is none
    assert np.isin(draw.indices, wrong).sum() == 0
    again = odis_examples(x, y, size=80, n_components=1, rng=3)
    assert (again.indices == draw.indices).all()


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [ODiSSelector(None), ODiSSelector(1, share="variance", random_state=0, impute="mean")]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

NAN = ratings(20, 5)
NAN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": NAN}, r"scores: got NaN or infinity \(nan in row 3, metric 1\)"),
        ({"scores": NAN * np.inf, "impute": "mean"}, "NaN or infinity"),
        ({"scores": np.where(np.arange(5) == 1, np.nan, NAN), "impute": "mean"}, "some ratings"),
        ({"scores": np.ones((9, 3))}, "constant metrics only"),
        ({"scores": NAN[:1, 2:]}, "two documents"),
        ({"scores": [["good", "bad"]] * 4}, "not numbers"),
        ({"scores": np.arange(5.0)}, "shape"),
        ({"n_components": 7}, "n_components: got 7, want at most 5, the rank"),
        ({"n_components": 0}, "n_components: got 0"),
        ({"n_components": 1.5}, "n_components: got 1.5"),
        ({"explained": 1.2}, "explained: got 1.2"),
        ({"sign": "up"}, "sign: got 'up'"),
        ({"sign": "anchor"}, "anchor: got none"),
        ({"anchor": np.ones(20)}, "anchor: got one with sign='loadings_sum'"),
        ({"sign": "anchor", "anchor": np.ones(7)}, "anchor: got shape"),
        ({"rotation": "promax"}, "rotation"),
        ({"rotation": "zca"}, "n_components: got 2, want all 5 metrics"),
        ({"directions": [1, 1]}, "directions"),
        ({"directions": [1, 1, 0, 1, 1]}, "directions"),
        ({"impute": "zero"}, "impute"),
    ],
)
def test_bad_ratings(options: dict[str, Any], words: str) -> None:
    given_: dict[str, Any] = {"scores": ratings(20, 5), "n_components": 2, **options}
    with pytest.raises(InputError, match=words):
        principal_scores(**given_)


def test_bad_selectors() -> None:
    S = ratings(50, 5)
    for options, words in [
        ({"share": "fair"}, "share"),
        ({"size": 0}, "size: got 0"),
        ({"size": "ten"}, "size: got ten"),
        ({"scorer": Ridge()}, "features: got none"),
        ({"joint": "max"}, "joint: got 'max'"),
        ({"joint_threshold": 9.0, "joint": "min"}, "joint_threshold: got 9.0"),
    ]:
        with pytest.raises(InputError, match=words):
            ODiSSelector(2, **options).fit(S)
    with pytest.raises(InputError, match="features: got 3 rows"):
        ODiSSelector(2, scorer=Ridge()).fit(S, features=S[:3])
    with pytest.raises(InputError, match=r"scores: got shape \(50, 5\)"):
        ODiSSelector(2).fit(S).select(S)
    with pytest.raises(InputError, match="not numbers"):
        odis_scores_draw([["a", "b"]] * 9, size=2)
    with pytest.raises(InputError, match="two documents"):
        odis_scores_draw(S[:1], size=1)
    assert len(odis_scores_draw(S, size=900)) == 50  # a budget above the pool takes all of it


def test_overlap_of_the_lists_is_on_the_selection() -> None:
    chosen = ODiSSelector(3, size=60).fit(ratings(600)).selection_
    np.testing.assert_allclose(chosen.overlap, overlap_matrix(chosen.lists, 600))
    np.testing.assert_allclose(chosen.lift, chosen.overlap / (20 / 600))
    scores = np.random.default_rng(0).normal(size=(10, 2))
    assert np.isnan(select(scores, 2, shares=[1, 0]).overlap[0, 1])
