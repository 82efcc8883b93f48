"""The outsiders against brute force, the plain greedy loop and the laws they are known for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from scoredraw.data_selection import facility
from scoredraw.data_selection.representatives import (
    facility_location,
    facility_location_examples,
    herding,
    herding_examples,
    k_center,
    k_center_examples,
    k_means_centers,
    uncertainty,
    uncertainty_scores,
)
from scoredraw.errors import InputError
from scoredraw.sampling import top_k

pytestmark = pytest.mark.oracle

KINDS = ("cosine", "euclidean", "sqeuclidean", "rbf")
WRAPPERS = (
    k_center_examples,
    facility_location_examples,
    herding_examples,
)


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, d)) * 2
    return centres[rng.integers(6, size=n)] + rng.normal(size=(n, d)) + 0.5


def similarities(x: np.ndarray, kind: str) -> np.ndarray:
    """The matrix that the code under test never makes."""
    if kind == "cosine":
        return 1 - cdist(x, x, "cosine") / 2
    off = x - x.mean(axis=0)
    reach = 2 * np.sqrt(np.square(off).sum(axis=1).max())
    if kind == "rbf":
        return np.exp(-cdist(x, x, "sqeuclidean") / (2 * np.square(off).sum(axis=1).mean()))
    return reach - cdist(x, x) if kind == "euclidean" else reach**2 - cdist(x, x, "sqeuclidean")


def plain_greedy(s: np.ndarray, size: int, tolerance: float = 0.0) -> tuple[list[int], list[float]]:
    best, picks, gains = np.zeros(len(s)), [], []
    for _ in range(size):
        gain = np.maximum(s - best[:, None], 0).sum(axis=0)
        gain[picks] = -np.inf
        row = int(np.argmax(gain >= gain.max() - tolerance))
        picks.append(row)
        gains.append(float(gain[row]))
        best = np.maximum(best, s[:, row])
    return picks, gains


# ── Facility location ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "size"), [(40, 2, 40), (300, 3, 120), (400, 12, 60)])
def test_lazy_takes_what_the_plain_greedy_takes(kind, n, d, size) -> None:
    x = rows(n, d)
    s = similarities(x, kind)
    draw = facility_location(x, size, similarity=kind, method="lazy")
    picks, gains = plain_greedy(s, size, 1e-10 * s.max())
    assert draw.indices.tolist() == picks
    np.testing.assert_allclose(draw.scores, gains, rtol=1e-7, atol=1e-8 * n * s.max())
    value = s[:, picks].max(axis=1).sum()
    assert draw.info["objective"] == pytest.approx(value, rel=1e-9)
    assert (draw.weights == 1).all()


@pytest.mark.parametrize("pairs", [0, 10**9])
def test_bounds_alone_and_pairs_alone_agree(pairs, monkeypatch) -> None:
    x = rows(500, 5)
    expected = facility_location(x, 100, similarity="sqeuclidean").indices
    monkeypatch.setattr(facility, "few_pairs", lambda state: bool(pairs))
    got = facility_location(x, 100, similarity="sqeuclidean").indices
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_within_its_factor_of_the_best_subset(kind) -> None:
    for seed in range(3):
        x = rows(14, 3, seed)
        s = similarities(x, kind)
        for size in (2, 3, 4):
            best = max(s[:, c].max(axis=1).sum() for c in itertools.combinations(range(14), size))
            got = facility_location(x, size, similarity=kind).info["objective"]
            assert (1 - 1 / np.e) * best <= got <= best * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
def test_apricot_reaches_the_same_objective(kind) -> None:
    """Its picks, too, up to the ties that symmetric pairs of rows make."""
    apricot = pytest.importorskip("apricot", reason="the peer, not a dependency")
    x = rows(600, 8)
    s = similarities(x, kind)
    peer = apricot.FacilityLocationSelection(80, metric="precomputed", optimizer="lazy").fit(s)
    draw = facility_location(x, 80, similarity=kind)
    np.testing.assert_allclose(draw.scores, peer.gains, rtol=1e-7, atol=1e-7 * s.max())
    value = s[:, peer.ranking].max(axis=1).sum()
    assert draw.info["objective"] == pytest.approx(value, rel=1e-9)
    assert np.mean(draw.indices == peer.ranking) > 0.9


def test_gains_never_rise_and_add_up() -> None:
    for kind in KINDS:
        draw = facility_location(rows(300, 4), 300, similarity=kind)
        assert (np.diff(draw.scores) <= 1e-7 * draw.scores[0]).all()
        assert draw.scores.sum() == pytest.approx(draw.info["objective"], rel=1e-9)


def test_stochastic_greedy_stays_close_to_greedy() -> None:
    x = rows(2000, 6)
    lazy, loose = (
        facility_location(x, 40, method=method, rng=3).info["objective"]
        for method in ("lazy", "stochastic")
    )
    assert (1 - 1 / np.e - 0.1) * lazy <= loose <= lazy
    assert loose > 0.98 * lazy  # in practice
    first = facility_location(x, 40, method="stochastic", rng=3).indices
    assert len(set(first.tolist())) == 40
    assert (first == facility_location(x, 40, method="stochastic", rng=3).indices).all()
    assert (first != facility_location(x, 40, method="stochastic", rng=4).indices).any()


def test_cluster_sizes_are_of_the_nearest_pick() -> None:
    x = rows(400, 3)
    for draw in (
        facility_location(x, 30, similarity="euclidean", weights="cluster_size"),
        k_center(x, 30),
    ):
        nearest = cdist(x, x[draw.indices]).argmin(axis=1)
        expected = np.bincount(nearest, minlength=30)
        assert draw.info["cluster_size"].tolist() == expected.tolist()
        assert draw.weights.sum() in (400, 30)


def test_by_class_is_each_class_alone() -> None:
    x, y = rows(200, 3), np.repeat(["b", "a"], [140, 60])
    draw = facility_location(x, 20, labels=y)
    assert np.unique(y[draw.indices], return_counts=True)[1].tolist() == [6, 14]
    alone = facility_location(x[:140], 14)
    assert draw.indices[6:].tolist() == alone.indices.tolist()
    assert draw.info["cluster_size"][:6].sum() == 60


# ── Farthest first ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "size"), [(60, 60), (3000, 400)])
def test_k_center_is_the_textbook_loop(metric, n, size) -> None:
    x = rows(n, 5)
    draw = k_center(x, size, metric=metric, start=7)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    near, picks = np.full(n, np.inf), [7]
    for _ in range(size - 1):
        near = np.minimum(near, np.linalg.norm(unit - unit[picks[-1]], axis=1))
        picks.append(int(near.argmax()))
    assert draw.indices.tolist() == picks
    radius = cdist(unit, unit[picks]).min(axis=1).max()
    assert draw.info["radius"] == pytest.approx(radius, abs=1e-6)
    assert (np.diff(draw.scores) <= 1e-9).all()


def test_k_center_is_a_2_approximation() -> None:
    for seed in range(4):
        x = rows(13, 2, seed)
        d = cdist(x, x)
        for size in (2, 3, 4):
            choices = itertools.combinations(range(13), size)
            best = min(d[:, c].min(axis=1).max() for c in choices)
            for start in range(13):
                assert k_center(x, size, start=start).info["radius"] <= 2 * best + 1e-9


# ── Herding, k-means, uncertainty ────────────────────────────────────────────────────────────────


def test_the_herded_mean_closes_in_as_one_over_the_size() -> None:
    """t times the error stays bounded, where a uniform draw's grows as the root of t."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(20_000, 4))
    errors = {t: herding(x, t).info["mean_error"] for t in (25, 100, 400, 1600)}
    assert all(t * error < 2.0 for t, error in errors.items())
    assert errors[1600] < errors[25] / 16
    rng = np.random.default_rng(1)
    uniform = np.mean(
        [np.linalg.norm(x[rng.permutation(20_000)[:1600]].mean(0) - x.mean(0)) for _ in range(20)]
    )
    assert errors[1600] < uniform / 10


def test_herding_on_the_sphere_is_wellings_rule() -> None:
    x = rows(300, 4)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w, picks = x.mean(axis=0), []
    for _ in range(40):
        value = x @ w
        value[picks] = -np.inf
        picks.append(int(value.argmax()))
        w = w + x.mean(axis=0) - x[picks[-1]]
    assert herding(x, 40).indices.tolist() == picks


def test_herding_by_class_keeps_each_mean() -> None:
    x, y = rows(300, 3), np.repeat([0, 1, 2], 100)
    draw = herding(x, 60, labels=y)
    errors = [
        np.linalg.norm(x[draw.indices[y[draw.indices] == c]].mean(0) - x[y == c].mean(0))
        for c in range(3)
    ]
    assert draw.info["mean_error"] == pytest.approx(max(errors), abs=1e-12)
    assert draw.info["cluster_size"].tolist() == [5.0] * 60


def test_k_means_centres_lie_in_their_clusters() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(np.arange(5.0) * 100, 40)[:, None] + rng.normal(size=(200, 1))
    best = min((k_means_centers(x, 5, rng=s) for s in range(20)), key=lambda d: _spread(x, d))
    assert np.bincount(best.indices // 40).tolist() == [1] * 5
    assert best.info["cluster_size"].tolist() == [40] * 5
    medians = np.abs(x.reshape(5, 40) - x.reshape(5, 40).mean(axis=1, keepdims=True)).argmin(axis=1)
    assert (best.indices % 40).tolist() == medians.tolist()


def _spread(x: np.ndarray, draw) -> float:
    return float(cdist(x, x[draw.indices]).min(axis=1).sum())


def test_uncertainty_by_hand() -> None:
    p = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(uncertainty(p), [1.0296530140645737, 0.0, np.log(3)])
    np.testing.assert_allclose(uncertainty(p, "margin"), [0.8, 0.0, 1.0])
    np.testing.assert_allclose(uncertainty(p, "least_confident"), [0.5, 0.0, 2 / 3])


def test_uncertain_examples_lie_at_the_border() -> None:
    x = np.linspace(-1, 1, 200)[:, None]
    for kind in ("entropy", "margin", "least_confident"):
        draw = top_k(uncertainty_scores(x, x[:, 0] > 0.2, kind=kind), 20)
        assert np.abs(x[draw.indices, 0] - 0.2).max() < 0.3


# ── Whatever comes in ────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40)
@given(n=st.integers(1, 40), d=st.integers(1, 4), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_picks_are_distinct_whatever_repeats(n, d, seed, share) -> None:
    x = np.random.default_rng(seed).integers(-1, 2, size=(n, d)).astype(float)
    size = max(1, round(share * n))
    draws = [k_center(x, size), herding(x, size), k_means_centers(x, size)]
    draws += [facility_location(x, size, similarity=kind) for kind in KINDS[1:]]
    draws.append(facility_location(x + 2, size, method="stochastic"))
    for draw in draws:
        assert len(set(draw.indices.tolist())) == len(draw) == size
        assert draw.info["cluster_size"].sum() == pytest.approx(n)
    distinct = len(np.unique(x, axis=0))
    if size >= distinct:  # nothing is left to cover
        assert draws[0].info["radius"] == 0
        for draw in (draws[0], *draws[3:6]):
            assert len(np.unique(x[draw.indices], axis=0)) == distinct


@pytest.mark.parametrize("method", WRAPPERS)
def test_wrappers_tell_progress_repeat_and_take_everything(method) -> None:
    x, y = rows(150, 3), np.random.default_rng(0).integers(3, size=150)
    told: list[tuple[int, int]] = []
    draw = method(x, y, size=30, rng=1, progress=lambda done, total: told.append((done, total)))
    assert len(draw) == 30
    assert (draw.weights == 1).all()
    assert not draw.unbiased
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    assert draw.indices.tolist() == method(x, y, size=30, rng=1).indices.tolist()
    assert sorted(method(x, y, size=150).indices.tolist()) == list(range(150))


@pytest.mark.parametrize("similarity", KINDS)
def test_equal_rows_are_taken_in_order(similarity) -> None:
    x = np.ones((50, 2))
    assert facility_location(x, 50, similarity=similarity).indices.tolist() == list(range(50))
    assert k_center(x, 50, start=0).indices.tolist() == list(range(50))
    assert herding(x, 50).indices.tolist() == list(range(50))


@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1e8, 1e60])
def test_units_do_not_matter(scale) -> None:
    x = rows(300, 4)
    for kind in KINDS:
        one = facility_location(x, 60, similarity=kind).indices
        assert facility_location(x * scale, 60, similarity=kind).indices.tolist() == one.tolist()
    one = k_center(x, 60, start=0).indices
    assert k_center(x * scale + scale, 60, start=0).indices.tolist() == one.tolist()


BAD = [
    (lambda: k_center(np.zeros((0, 2)), 1), "X: got shape"),
    (lambda: k_center([1.0, 2.0], 1), "X: got shape"),
    (lambda: herding([[1.0], [np.nan]], 1), "X: got NaN or infinity in example 1"),
    (lambda: facility_location([[np.inf], [1.0]], 1), "X: got NaN"),
    (lambda: facility_location([["a"], ["b"]], 1), "X: got <U1 values"),
    (lambda: k_center([[1.0], [2.0]], 3), "size: got 3, want a count from 1 to 2"),
    (lambda: herding([[1.0], [2.0]], 0), "size: got 0"),
    (lambda: k_means_centers([[1.0], [2.0]], 1.5), "size: got 1.5"),
    (lambda: k_center([[1.0], [2.0]], 1, metric="l7"), "metric: got 'l7'"),
    (lambda: k_center([[1.0], [2.0]], 1, start=2), "start: got 2, want a row from 0 to 1"),
    (lambda: k_center([[1.0], [0.0]], 1, metric="cosine"), "X: got zeros in row 1"),
    (lambda: facility_location([[0.0], [1.0]], 1), "X: got zeros in row 0"),
    (lambda: facility_location([[1.0]], 1, similarity="dot"), "similarity: got 'dot'"),
    (lambda: facility_location([[1.0]], 1, method="fast"), "method: got 'fast'"),
    (lambda: facility_location([[1.0]], 1, weights="no"), "weights: got 'no'"),
    (lambda: facility_location([[1.0]], 1, gamma=0.0), "gamma: got 0.0"),
    (lambda: facility_location([[1.0], [2.0]], 1, labels=[0]), "labels: got shape"),
    (lambda: herding([[1.0], [2.0]], 1, labels=[0, 1]), "size: got 1, want at least 1 for each"),
    (lambda: herding([[1.0], [2.0]], 2, labels=[0, np.nan]), "labels: got NaN"),
    (lambda: uncertainty([[1.0]]), "probabilities: got shape"),
    (lambda: uncertainty([[0.5, 0.6]]), "probabilities: got negative numbers or other sums"),
    (lambda: uncertainty([[np.nan, 1.0]]), "probabilities: got NaN"),
    (lambda: uncertainty([[0.5, 0.5]], "x"), "kind: got 'x'"),
    (lambda: uncertainty_scores(rows(20, 2), [0] * 20), "labels: got one class"),
    (lambda: uncertainty_scores(rows(4, 2), [0, 0, 1, 1]), "folds: got 5, want from 2 to the 4"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_mistakes_are_named(call, message) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
