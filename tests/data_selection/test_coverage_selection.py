"""Coverage-enhanced selection: its laws, its edges, and the draws made of a table."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare, spearmanr

from scoredraw.data_selection import coverage_selection as coverage
from scoredraw.data_selection.coverage_selection import (
    DEALRecSelector,
    ccs_examples,
    cluster_select,
    combined_score,
    coverage_select,
    dealrec_examples,
    dealrec_scores,
)
from scoredraw.data_selection.probe import score_el2n
from scoredraw.errors import InputError

pytestmark = pytest.mark.property

SCORES = st.lists(st.floats(-1e6, 1e6) | st.integers(-3, 3), min_size=1, max_size=80)


# ── Laws ─────────────────────────────────────────────────────────────────────────────────────────


@given(
    scores=SCORES,
    budget=st.integers(1, 100),
    k=st.integers(1, 30),
    prune=st.floats(0, 0.95),
    seed=st.integers(0, 5),
)
@settings(max_examples=150)
def test_the_laws_of_the_budget(
    scores: list[float], budget: int, k: int, prune: float, seed: int
) -> None:
    values = np.array(scores, float)
    chosen = coverage_select(values, budget, n_groups=k, hard_prune=prune, rng=seed)
    kept = np.flatnonzero(chosen.groups >= 0)
    assert len(kept) == len(values) - int(prune * len(values) + 1e-9)
    assert len(chosen.indices) == chosen.budgets.sum() == min(budget, len(kept))
    assert (chosen.budgets <= chosen.sizes).all()
    assert chosen.sizes.sum() == len(kept)
    assert len(np.unique(chosen.indices)) == len(chosen.indices)
    assert np.isin(chosen.indices, kept).all()
    counts = np.bincount(chosen.groups[chosen.indices], minlength=k)
    np.testing.assert_array_equal(counts, chosen.budgets)
    in_order = chosen.budgets[np.argsort(chosen.sizes, kind="stable")]
    assert (np.diff(in_order) >= 0).all(), "a larger group never gets less"
    dropped = values[chosen.groups == -1]
    assert len(dropped) == 0 or dropped.min() >= values[kept].max()
    # the ends belong to the first interval and to the last, whatever the rounding of the edges
    groups = chosen.groups[kept]
    assert (groups[values[kept] == values[kept].min()] == 0).all()
    top = 0 if np.ptp(values[kept]) == 0 else k - 1
    assert (groups[values[kept] == values[kept].max()] == top).all()


@given(scores=SCORES, budget=st.integers(1, 60), seed=st.integers(0, 5))
@settings(max_examples=60)
def test_a_permutation_permutes_the_choice(scores: list[float], budget: int, seed: int) -> None:
    values = np.array(scores, float)
    order = np.random.default_rng(seed).permutation(len(values))
    options: dict[str, Any] = {"n_groups": 7, "hard_prune": 0.2, "rng": seed}
    plain = coverage_select(values, budget, **options)
    moved = coverage_select(values[order], budget, ids=order, **options)
    np.testing.assert_array_equal(np.sort(order[moved.indices]), plain.indices)
    np.testing.assert_array_equal(moved.groups, plain.groups[order])


@given(
    pairs=st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 50)), min_size=2, max_size=40),
    a=st.integers(-4, 4), shift=st.integers(-8, 8), weight=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
@settings(max_examples=80)
def test_positive_affine_changes_of_either_score_change_nothing(
    pairs: list[tuple[int, int]], a: int, shift: int, weight: float
) -> None:
    """Powers of two and whole shifts, so that the change itself is exact."""
    influence, effort = np.array(pairs, float).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = combined_score(influence, effort, effort_weight=weight)
        moved = combined_score(
            2.0**a * (influence + shift), 2.0**a * effort + abs(shift), effort_weight=weight
        )
    np.testing.assert_array_equal(plain, moved)
    chosen = [coverage_select(s, 5, n_groups=4, rng=1).indices for s in (plain, moved)]
    np.testing.assert_array_equal(chosen[0], chosen[1])


def test_within_a_group_everybody_has_the_same_chance() -> None:
    """Two groups of 12 and 30; 4,000 draws of 5 and 5 each. False alarms: 1e-4 a group."""
    scores = np.concatenate([np.linspace(0, 0.4, 12), np.linspace(0.6, 1, 30)])
    counts = np.zeros(42)
    for seed in range(4000):
        chosen = coverage_select(scores, 10, n_groups=2, rng=seed)
        counts[chosen.indices] += 1
    assert chosen.budgets.tolist() == [5, 5]
    for group, draws in ((slice(0, 12), 5 / 12), (slice(12, 42), 5 / 30)):
        # fixed-size draws vary less than independent ones, by the factor 1 - q (and k/(k-1))
        k = len(counts[group])
        statistic = chisquare(counts[group]).statistic / (1 - draws) * (k - 1) / k
        assert 1e-4 < chi2.sf(statistic, k - 1) < 1 - 1e-4
    shares = np.repeat([5 / 12, 5 / 30], 5)
    np.testing.assert_allclose(np.asarray(chosen.draw.inclusion), shares)


def test_one_group_is_a_uniform_draw() -> None:
    """Inclusion 10 / 40 for each of 40 very different scores; false alarms 1e-4."""
    scores, counts = np.exp(np.linspace(0, 20, 40)), np.zeros(40)
    for seed in range(3000):
        counts[coverage_select(scores, 10, n_groups=1, rng=seed).indices] += 1
    assert chisquare(counts).pvalue > 1e-4
    draw = coverage_select(scores, 10, n_groups=1, rng=0).draw
    assert (np.asarray(draw.inclusion) == 0.25).all()
    assert (draw.weights == 1).all()
    assert not draw.unbiased
    with pytest.raises(InputError, match="unbiased"):
        draw.total(np.ones(40))


def test_a_budget_that_is_large_enough_takes_all_that_was_not_pruned() -> None:
    scores = np.arange(20.0)
    for budget in (18, 19, 500):
        chosen = coverage_select(scores, budget, hard_prune=0.1, rng=0)
        assert chosen.indices.tolist() == list(range(18))


def test_a_budget_smaller_than_the_groups_is_still_spent() -> None:
    sizes = [1, 2, 3, 4]
    scores = np.repeat([0.0, 1.0, 2.0, 3.0], sizes)
    chosen = coverage_select(scores, 2, n_groups=4, rng=0)
    assert chosen.budgets.tolist() == [0, 0, 1, 1]  # floors leave it to the large groups


def test_empty_groups_do_not_share_in_the_budget() -> None:
    scores = np.array([0.0] * 10 + [1.0] * 10)
    chosen = coverage_select(scores, 10, n_groups=50, rng=0)
    assert chosen.sizes[[0, 49]].tolist() == [10, 10]
    assert chosen.budgets[[0, 49]].tolist() == [5, 5]


def test_the_highest_score_is_not_lost_at_the_last_edge() -> None:
    """Edges summed up from a rounded width end below the maximum; ours is the maximum."""
    lost = 0
    for seed in range(300):
        scores = np.random.default_rng(seed).normal(size=30)
        width, edge = np.ptp(scores) / 25, scores.min()
        for _ in range(25):
            edge += width
        lost += edge < scores.max()
        chosen = coverage_select(scores, 30, n_groups=25, rng=0)
        assert len(chosen.indices) == 30
        assert chosen.groups[scores.argmax()] == 24
    assert lost > 20, "the defect would show here"


def test_edges_are_closed_on_the_right() -> None:
    scores = np.array([0.0, 0.25, 0.26, 0.5, 0.75, 1.0])
    assert coverage_select(scores, 6, n_groups=4).groups.tolist() == [0, 0, 1, 1, 2, 3]


def test_equal_scores_are_one_group() -> None:
    chosen = coverage_select(np.full(10, 3.0), 4, hard_prune=0.2, rng=0)
    assert chosen.sizes[0] == 8 == chosen.sizes.sum()
    assert len(chosen.indices) == 4
    pruned = {tuple(np.flatnonzero(coverage_select(np.full(10, 3.0), 4, hard_prune=0.2, rng=s)
              .groups < 0)) for s in range(20)}  # fmt: skip
    assert len(pruned) > 5, "ties are pruned at random, not by position"


# ── The combined score ───────────────────────────────────────────────────────────────────────────


def test_no_weight_ignores_effort() -> None:
    influence, random = np.array([3.0, -1.0, 0.5]), np.random.default_rng(0)
    scores = [combined_score(influence, random.random(3), effort_weight=0.0) for _ in range(3)]
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], [1.0, 0.0, 0.375])


def test_raw_values_are_added_as_printed() -> None:
    got = combined_score([1.0, -2.0], [10.0, 0.0], effort_weight=0.3, scaling="raw")
    np.testing.assert_allclose(got, [4.0, -2.0])


def test_a_constant_column_counts_as_zeros_and_says_so() -> None:
    with pytest.warns(UserWarning, match="effort: all values are 2, taken as 0"):
        np.testing.assert_array_equal(combined_score([0.0, 1.0], [2.0, 2.0]), [0.0, 1.0])
    with pytest.warns(UserWarning, match="influence: all values are 0"):
        np.testing.assert_array_equal(combined_score([0.0, 0.0], [2.0, 4.0]), [0.0, 0.5])


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("influence", "effort", "options", "message"),
    [
        ([1.0, np.nan], [1.0, 1.0], {}, "influence: got NaN or infinity in example 1"),
        ([1.0, 2.0], [np.inf, 1.0], {}, "effort: got NaN or infinity in example 0"),
        ([1.0, 2.0], [1.0, -0.5], {}, "effort: got -0.5, want lengths of gradients"),
        ([1.0, 2.0], [1.0], {}, "effort: got 1 values, want 2"),
        ([], [], {}, "influence: got shape"),
        ([1.0, 2.0], [1.0, 2.0], {"effort_weight": -1}, "effort_weight: got -1"),
        ([1.0, 2.0], [1.0, 2.0], {"effort_weight": np.nan}, "effort_weight: got nan"),
        ([1.0, 2.0], [1.0, 2.0], {"scaling": "rank"}, "scaling: got 'rank'"),
        ([-1e308, 1e308], [1.0, 2.0], {}, "influence: got -1e.308 to 1e.308"),
    ],
)
def test_bad_scores(influence: Any, effort: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        combined_score(influence, effort, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": [1.0, np.nan]}, "score: got NaN or infinity in example 1"),
        ({"score": []}, "score: got shape"),
        ({"budget": 0}, "budget: got 0, want a count of at least 1"),
        ({"budget": 2.5}, "budget: got 2.5, want a count"),
        ({"n_groups": 0}, "n_groups: got 0"),
        ({"hard_prune": 1.0}, "hard_prune: got 1.0, want a share in"),
        ({"hard_prune": -0.1}, "hard_prune: got -0.1"),
    ],
)
def test_bad_selections(options: dict[str, Any], message: str) -> None:
    arguments = {"score": [1.0, 2.0, 3.0], "budget": 2, **options}
    with pytest.raises(InputError, match=message):
        coverage_select(**arguments)


def test_an_unfitted_selector() -> None:
    with pytest.raises(InputError, match="select: got an unfitted DEALRecSelector"):
        DEALRecSelector().select(3)


# ── The selector, clusters ───────────────────────────────────────────────────────────────────────


def test_the_selector_is_its_parts() -> None:
    random = np.random.default_rng(0)
    influence, effort = random.normal(size=100), random.random(100)
    selector = DEALRecSelector(effort_weight=0.3, n_groups=8).fit(influence, effort)
    score = combined_score(influence, effort, effort_weight=0.3)
    want = coverage_select(score, 20, n_groups=8, hard_prune=0.1, rng=5)
    np.testing.assert_array_equal(selector.select(20, rng=5).indices, want.indices)
    np.testing.assert_array_equal(selector.score_, score)


def test_the_selector_scores_two_torch_models() -> None:
    import torch

    from scoredraw.data_selection.influence_on_risk import effort_scores, influence_on_risk

    torch.manual_seed(0)
    small, large = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 9),
        torch.nn.ReLU(), torch.nn.Linear(9, 2))  # fmt: skip
    data = (torch.randn(30, 3), torch.randint(2, (30,)))
    selector = DEALRecSelector(n_groups=5).fit_models(
        small, data, large, [data], influence={"penalty": 0.1}, effort={"params": "2"}
    )
    np.testing.assert_allclose(
        selector.influence_, influence_on_risk((small, data), penalty=0.1), rtol=1e-6
    )
    np.testing.assert_allclose(selector.effort_, effort_scores(large, [data], params="2"))
    assert len(selector.select(6, rng=0).indices) == 6
    with pytest.raises(InputError, match="effort: got 60 values, want 30"):
        DEALRecSelector().fit_models(small, data, large, [data, data])


def test_clusters_all_send_somebody() -> None:
    random = np.random.default_rng(0)
    centres = 20 * np.eye(5)
    x = np.repeat(centres, [100, 50, 30, 15, 5], axis=0) + random.normal(size=(200, 5))
    home = np.repeat(np.arange(5), [100, 50, 30, 15, 5])
    for seed in range(5):
        draw = cluster_select(x, 20, n_clusters=5, rng=seed)
        assert len(draw) == 20
        nearest = cluster_select(x, 5, pick="centre", rng=seed)
        found = len(np.unique(home[nearest.indices]))
        assert found >= 4  # k-means from one start may split a cluster
    shares = np.bincount(home[draw.indices], minlength=5)
    assert shares.max() <= 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"budget": 9}, "budget: got 9, want at most the pool's 6"),
        ({"n_clusters": 5}, "n_clusters: got 5, want at most the budget, 3"),
        ({"n_clusters": 0}, "n_clusters: got 0"),
        ({"pick": "best"}, "pick: got 'best'"),
        ({"embeddings": np.ones(3)}, "embeddings: got shape"),
        ({"embeddings": np.full((6, 2), np.nan)}, "embeddings: got NaN"),
    ],
)
def test_bad_clusters(options: dict[str, Any], message: str) -> None:
    arguments = {"embeddings": np.eye(6), "budget": 3, "n_clusters": 2, **options}
    with pytest.raises(InputError, match=message):
        cluster_select(**arguments)


# ── From a table ─────────────────────────────────────────────────────────────────────────────────


def table(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = random.integers(3, size=n)
    return np.eye(3)[y] * 2 + random.normal(size=(n, 3)), y


@pytest.mark.parametrize("method", [dealrec_examples, ccs_examples])
def test_a_table_is_drawn_from(method: Any) -> None:
    x, y = table()
    names = np.array(["a", "b", "c"])[y]
    draw = method(x, names, size=30, rng=1)
    assert len(draw) == 30
    assert draw.n == 300
    assert not draw.unbiased
    assert (draw.weights == 1).all()
    np.testing.assert_array_equal(draw.indices, method(x, y, size=30, rng=1).indices)
    assert not np.array_equal(draw.indices, method(x, y, size=30, rng=2).indices)
    for size in (1, 290, 300):  # more than a tenth pruned would leave
        assert len(method(x, y, size=size)) == size


def test_the_hardest_tenth_is_left_out() -> None:
    x, y = table()
    scores = dealrec_scores(x, y, rng=3)
    drawn = dealrec_examples(x, y, size=200, rng=3)
    np.testing.assert_array_equal(drawn.scores, scores[drawn.indices])
    assert drawn.scores.max() <= np.sort(scores)[-30]  # type: ignore[union-attr]
    everything = dealrec_examples(x, y, size=200, hard_prune=0.0, rng=3)
    assert everything.scores.max() > np.sort(scores)[-30]  # type: ignore[union-attr]


def test_influence_in_the_table_score_is_that_of_leaving_out() -> None:
    """Ranks of the linear influence against refitting without each of 40 rows, to the end."""
    from scoredraw.data_selection.softmax_surrogate import fit_softmax, softmax_influence

    x, y = table(120)
    design = np.column_stack([x, np.ones(len(x))])

    def risk(w: np.ndarray) -> float:
        p = np.exp(design @ w)
        return float(-np.log((p / p.sum(axis=1, keepdims=True))[np.arange(120), y]).mean())

    weights = fit_softmax(design, y, penalty=0.05, steps=400)
    linear, _ = softmax_influence(design, y, weights, penalty=0.05, tolerance=1e-10)
    exact = []
    for i in range(40):
        rest = np.arange(120) != i
        again = fit_softmax(design[rest], y[rest], penalty=0.05 * 120 / 119, steps=400)
        exact.append(risk(again) - risk(weights))
    assert np.corrcoef(linear[:40], exact)[0, 1] > 0.97
    assert spearmanr(linear[:40], exact).statistic > 0.95


def test_ccs_takes_scores_that_are_known() -> None:
    x, y = table()
    known = score_el2n(x, y, rng=1)
    ours = ccs_examples(x, y, size=20, rng=1, scores=known)
    np.testing.assert_array_equal(ours.indices, ccs_examples(x, y, size=20, rng=1).indices)
    with pytest.raises(InputError, match="scores: got 2 values, want 300"):
        ccs_examples(x, y, size=20, scores=[1.0, 2.0])


@pytest.mark.parametrize("method", [dealrec_examples, ccs_examples])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: got 0"),
        ({"size": 301}, "size: got 301, want at most the pool's 300"),
        ({"n_groups": 0}, "n_groups: got 0"),
        ({"hard_prune": 1.0}, "hard_prune: got 1.0"),
        ({"features": np.full((300, 2), np.nan)}, "features: got NaN"),
        ({"labels": np.ones(300)}, "labels: got one class"),
    ],
)
def test_bad_tables(method: Any, options: dict[str, Any], message: str) -> None:
    x, y = table()
    arguments = {"features": x, "labels": y, "size": 20, **options}
    with pytest.raises(InputError, match=message):
        method(**arguments)
    with pytest.raises(InputError, match="effort_weight: got -1"):
        dealrec_examples(x, y, size=20, effort_weight=-1)


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    dealrec_examples(*table(), size=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert coverage.SURROGATE_STEPS > 0
