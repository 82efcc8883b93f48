"""What every scheme keeps to: sizes, zeros, ties, strata, ids, costs and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw import sampling
from scoredraw.errors import InputError
from scoredraw.uniforms import hash_ids

FIXED = ("priority", "exponential_keys", "systematic", "pivotal")
REPLACED = ("multinomial", "residual")
LOCAL = ("poisson", "priority", "exponential_keys", "top_k")
measures = st.lists(
    st.one_of(st.just(0.0), st.sampled_from([1.0, 1e-9, 1e9]), st.floats(1e-3, 1e3)),
    min_size=1,
    max_size=40,
).filter(any)


@pytest.mark.property
@settings(max_examples=150)
@given(measures, st.integers(0, 2**32), st.data())
@pytest.mark.parametrize("name", [*FIXED, *REPLACED, "poisson"])
def test_sizes_and_zeros(name: str, measure, seed: int, data) -> None:
    s = np.array(measure)
    size = data.draw(st.integers(1, len(s)))
    positive = np.count_nonzero(s)
    draw = sampling.SCHEMES[name](s, size, rng=seed)
    assert (s[draw.indices] > 0).all()
    assert np.isfinite(draw.weights).all()
    assert (draw.weights > 0).all()
    np.testing.assert_allclose(draw.weights * draw.inclusion, 1.0)
    assert draw.scores.tolist() == s[draw.indices].tolist()
    if name in REPLACED:
        assert len(draw) == size
        return
    assert (np.diff(draw.indices) > 0).all()  # sorted, none twice
    assert (draw.weights >= 1).all()
    if name in FIXED:
        assert len(draw) == min(size, positive)
    if size >= positive:
        assert draw.indices.tolist() == np.flatnonzero(s).tolist()
        assert (draw.weights == 1).all()
        assert draw.total(np.ones(len(s))) == (positive, 0.0)


@pytest.mark.contract
@pytest.mark.parametrize("name", [*FIXED, *REPLACED, "poisson", "top_k"])
def test_edges(name: str) -> None:
    scheme = sampling.SCHEMES[name]
    one = scheme([3.0], 1, rng=0)
    assert (one.indices.tolist(), one.weights.tolist(), one.n) == ([0], [1.0], 1)
    same = scheme(np.full(50, 2.0), 50, rng=0)
    if name not in REPLACED:
        assert same.indices.tolist() == list(range(50))
    if name == "residual":
        assert same.indices.tolist() == list(range(50))
    twice = [scheme(np.arange(1.0, 41.0), 7, rng=5) for _ in range(2)]
    assert twice[0].indices.tolist() == twice[1].indices.tolist()
    assert twice[0].weights.tolist() == twice[1].weights.tolist()
    other = [scheme(np.arange(1.0, 41.0), 7, rng=seed) for seed in range(5, 15)]
    if name != "top_k":
        assert len({tuple(d.indices.tolist()) for d in other}) > 1


@pytest.mark.contract
def test_uniform() -> None:
    draw = sampling.uniform(10, 4, rng=0)
    assert draw.weights.tolist() == [2.5] * 4
    assert draw.inclusion.tolist() == [0.4] * 4
    assert sampling.uniform(10, 10, rng=0).indices.tolist() == list(range(10))
    assert sampling.uniform(10, 10, rng=0).total(np.arange(10)) == (45.0, 0.0)


@pytest.mark.contract
@pytest.mark.parametrize("name", [*FIXED, *REPLACED, "poisson", "top_k", "uniform"])
@pytest.mark.parametrize("size", [0, -1, 6, 2.5, float("nan"), True, "2", None])
def test_impossible_sizes(name: str, size) -> None:
    if name == "poisson" and size in (2.5, True):
        return  # an expected size is any positive number
    if name in REPLACED and size == 6:
        return  # more draws than rows
    scheme = sampling.SCHEMES.get(name)
    with pytest.raises((InputError, TypeError)) as error:
        sampling.uniform(5, size) if scheme is None else scheme(np.ones(5), size)
    if not isinstance(size, str | None):
        assert str(error.value).startswith("size: got")


@pytest.mark.contract
@pytest.mark.parametrize("name", [*FIXED, *REPLACED, "poisson"])
@pytest.mark.parametrize(
    "measure",
    [[], [[1.0, 2.0]], [1.0, np.nan], [1.0, -1e-9], [np.inf, 1.0], [0.0, 0.0], [1e308, 1e308],
     [1e-320, 1e-320]],
)  # fmt: skip
def test_impossible_measures(name: str, measure) -> None:
    with pytest.raises(InputError, match=r"^size_measure: got"):
        sampling.SCHEMES[name](measure, 1)


@pytest.mark.contract
def test_other_refusals() -> None:
    ones = np.ones(4)
    for call, word in [
        (lambda: sampling.systematic(ones, 2, order="up"), "order"),
        (lambda: sampling.poisson(ones, 2, ids=[1, 2, 3]), "ids"),
        (lambda: sampling.poisson(ones, 2, ids=[1, 2, 2, 3]), "ids: got duplicate"),
        (lambda: sampling.poisson(ones, 2, ids=["a", "b", "c", "d"]), "ids: got dtype"),
        (lambda: sampling.poisson(ones, 2, ids=[0.1, 0.2, 0.3, 0.4]), "ids: got dtype"),
        (lambda: sampling.priority(ones, 4, ids=[1, 1, 1, 1]), "ids: got duplicate"),
        (lambda: sampling.multinomial(ones, 4, ids=[1, 1, 1, 1]), "ids: got duplicate"),
        (lambda: sampling.poisson(ones, 2, by=[1, 2]), "by"),
        (lambda: sampling.poisson(ones, 2, by=[1, 1, 2, 2], costs=ones), "costs"),
        (lambda: sampling.top_k(ones, 2, by=[1, 1, 2, 2], costs=ones), "costs"),
        (lambda: sampling.top_k(ones, 0.5, costs=ones), "budget"),
        (lambda: sampling.top_k(ones, 2, costs=-ones), "costs"),
        (lambda: sampling.threshold(ones, np.nan), "cutoff"),
        (lambda: sampling.uniform(0, 1), "n"),
        (lambda: sampling.priority(ones, 1, by=[1, 1, 2, 2]), "size"),
        (lambda: sampling.pivotal([1, 1, 0, 0], 2, by=["a", "a", "b", "b"]), "scores.* stratum b"),
    ]:
        with pytest.raises(InputError, match=f"^{word}") as error:
            call()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------ top_k and threshold


@pytest.mark.oracle
@settings(max_examples=150)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.booleans(), st.data())
def test_top_k_takes_the_best(scores, largest: bool, data) -> None:
    s = np.array(scores, float)
    k = data.draw(st.integers(1, len(s)))
    draw = sampling.top_k(s, k, largest=largest, rng=0)
    kept = np.sort(s[draw.indices])
    assert kept.tolist() == (np.sort(s)[-k:] if largest else np.sort(s)[:k]).tolist()
    assert len(set(draw.indices.tolist())) == k
    assert (draw.weights == 1).all()
    assert not draw.unbiased
    cutoff = float(data.draw(st.integers(-4, 4)))
    over = sampling.threshold(s, cutoff, largest=largest).indices
    assert over.tolist() == np.flatnonzero(s >= cutoff if largest else s <= cutoff).tolist()


@pytest.mark.oracle
@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=20,
                unique_by=lambda row: row[0]), st.integers(10, 80))  # fmt: skip
def test_top_k_spends_a_budget_from_the_best_down(rows, budget: int) -> None:
    scores, costs = np.array(rows, float).T
    taken, spent = [], 0.0
    for row in np.argsort(-scores):
        if spent + costs[row] > budget:
            break
        taken.append(int(row))
        spent += costs[row]
    assert sampling.top_k(scores, budget, costs=costs).indices.tolist() == sorted(taken)


# ------------------------------------------------------------------ ids and strata


@pytest.mark.property
@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 300), st.data())
@pytest.mark.parametrize("name", [*LOCAL, "uniform"])
def test_rows_keep_their_luck_in_any_order(name: str, seed: int, n: int, data) -> None:
    """Row-local schemes: shuffling rows with their ids gives the same ids and weights."""
    rng = np.random.default_rng(seed)
    s, ids = rng.choice([0.5, 1.0, 4.0], n) * 1.0, hash_ids(np.arange(n))
    size, order = data.draw(st.integers(1, n)), rng.permutation(n)

    def chosen(measure, names) -> dict[int, float]:
        if name == "uniform":
            draw = sampling.uniform(n, size, rng=seed, ids=names)
        else:
            draw = sampling.SCHEMES[name](measure, size, rng=seed, ids=names)
        return dict(zip(names[draw.indices].tolist(), draw.weights.tolist(), strict=True))

    straight, mixed = chosen(s, ids), chosen(s[order], ids[order])
    assert straight.keys() == mixed.keys()
    for key, weight in straight.items():
        assert mixed[key] == pytest.approx(weight, rel=1e-12)


@pytest.mark.contract
@pytest.mark.parametrize("name", [*LOCAL, *FIXED, *REPLACED])
def test_positions_are_the_ids_of_rows_without(name: str) -> None:
    s = np.random.default_rng(0).uniform(size=500)
    a = sampling.SCHEMES[name](s, 40, rng=3)
    b = sampling.SCHEMES[name](s, 40, rng=3, ids=np.arange(500))
    assert a.indices.tolist() == b.indices.tolist()


@pytest.mark.property
@settings(max_examples=40)
@given(st.integers(0, 2**32), st.data())
@pytest.mark.parametrize("name", [*LOCAL, *FIXED, *REPLACED, "uniform"])
def test_strata_get_their_shares(name: str, seed: int, data) -> None:
    labels = np.array(data.draw(st.lists(st.sampled_from("abc"), min_size=6, max_size=60)))
    kinds, counts = np.unique(labels, return_counts=True)
    size = data.draw(st.integers(len(kinds), len(labels)))
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.5, 2.0, len(labels))
    if name == "uniform":
        draw = sampling.uniform(len(s), size, rng=seed, by=labels)
    else:
        draw = sampling.SCHEMES[name](s, size, rng=seed, by=labels)
    share = dict(zip(kinds, sampling.allocate(counts, size), strict=True))
    assert (np.diff(draw.indices) >= 0).all()
    assert (draw.scores == (1.0 if name == "uniform" else s[draw.indices])).all()
    for kind in kinds:
        mine = draw.indices[labels[draw.indices] == kind]
        if name != "poisson":
            assert len(mine) == share[kind]
        if name in (*LOCAL, "uniform"):  # a stratum draws as if it were alone, by the same luck
            rows = np.flatnonzero(labels == kind)
            call = {"rng": seed, "ids": rows}
            alone = (
                sampling.uniform(len(rows), int(share[kind]), **call)
                if name == "uniform"
                else sampling.SCHEMES[name](s[rows], int(share[kind]), **call)
            )
            assert mine.tolist() == rows[alone.indices].tolist()
    if draw.unbiased:
        error = draw.total(np.ones(len(s))).standard_error
        assert error >= 0 or (np.isnan(error) and name != "poisson")  # NaN: one row tells nothing
    if name == "uniform":
        inside = np.bincount(np.searchsorted(kinds, labels[draw.indices]), draw.weights)
        np.testing.assert_allclose(inside, counts)


@pytest.mark.contract
def test_strata_have_luck_of_their_own() -> None:
    """Schemes that draw points take other points in each stratum."""
    s = np.ones(2000)
    by = np.arange(2000) % 2
    for name in ("systematic", "multinomial"):
        equal = 0
        for seed in range(50):
            rows = sampling.SCHEMES[name](s, 200, rng=seed, by=by).indices
            equal += (rows[by[rows] == 0] // 2).tolist() == (rows[by[rows] == 1] // 2).tolist()
        assert equal < 20  # systematic: one in ten by chance, 20 or more of 50 with 5e-8


@pytest.mark.contract
def test_merged_strata_and_groups() -> None:
    s = np.r_[np.ones(8), 50.0, 50.0]
    draw = sampling.multinomial(s, 10, rng=0, by=np.arange(10) % 2)
    assert len(draw.merged()) < 10
    assert draw.merged().total(s).value == pytest.approx(s.sum())
    assert np.isnan(draw.merged().total(s).standard_error)
    from dataclasses import replace

    with pytest.raises(InputError, match=r"^merged: got a draw made in groups"):
        replace(draw, offsets=np.array([0, 5, 10])).merged()


@pytest.mark.contract
def test_generators_advance_and_row_uniforms_repeat() -> None:
    from scoredraw.uniforms import RowUniforms

    rng = np.random.default_rng(0)
    first, second = (sampling.uniform(1000, 10, rng=rng).indices.tolist() for _ in range(2))
    assert first != second
    u = RowUniforms(0)
    a, b = (sampling.uniform(1000, 10, rng=u).indices.tolist() for _ in range(2))
    assert a == b == sampling.uniform(1000, 10, rng=0).indices.tolist()
