"""`score` and `draw` by name: methods, options, sizes, schemes, and rows kept or excluded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scoredraw as sd
from scoredraw import registry, sampling, verbs
from scoredraw.coresets.leverage import leverage_scores
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.errors import InputError
from scoredraw.tables import open_table

pytestmark = pytest.mark.contract

RNG = np.random.default_rng(0)
A = RNG.standard_t(3, (400, 3))
B = RNG.standard_normal(400)
S = RNG.lognormal(0, 1, 400)


def refuses(call, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ sizes


@pytest.mark.property
@settings(max_examples=100)
@given(st.integers(1, 10**9), st.data())
def test_sizes(n: int, data) -> None:
    k = data.draw(st.integers(1, n))
    assert verbs.parse_size(k, n) == verbs.parse_size(str(k), n) == k
    assert verbs.parse_size(np.int64(k), n) == k
    share = data.draw(st.floats(0.001, 100))
    size = verbs.parse_size(f"{share}%", n)
    assert 1 <= size <= n
    assert abs(size - n * share / 100) <= max(0.5 + 1e-6, 1 - n * share / 100)
    assert verbs.parse_size("100%", n) == verbs.parse_size(" 100 % ", n) == n


@pytest.mark.parametrize("size", [0, -1, 11, "0", "-1", "11", "120 %", "0%", "-5%", "abc", "", "%",
                                  "nan%", "inf%", "1.5", 2.0, None, "1e3", "5 rows"])  # fmt: skip
def test_sizes_that_are_none(size) -> None:
    refuses(lambda: verbs.parse_size(size, 10), r"^size: got .*, want a count from 1 to 10 or a")
    refuses(lambda: sd.draw("rows", np.eye(10), method="uniform", size=size), "^size: got ")


@pytest.mark.parametrize("budget", [0, -1, "x", np.inf, np.nan])
def test_budgets_that_are_none(budget) -> None:
    refuses(lambda: verbs.parse_budget(budget), "^budget: got ")


# ------------------------------------------------------------------ methods and their options


def test_methods_are_the_functions_of_the_rooms() -> None:
    np.testing.assert_array_equal(sd.score("rows", A, method="leverage"), leverage_scores(A))
    np.testing.assert_array_equal(sd.score("rows", A, method="lewis", p=1.5), lewis_weights(A, 1.5))
    with_target = leverage_scores(np.column_stack([A, B]))
    np.testing.assert_array_equal(sd.score("rows", A, method="leverage", target=B), with_target)
    for name in (m.name for m in registry.methods("rows") if m.function):
        scores = sd.score("rows", A, method=name)
        assert scores.shape == (400,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        draw = sd.draw("rows", A, method=name, size=40, seed=1)
        assert draw.unbiased
        assert draw.method.startswith(name)
        assert 10 < len(draw) < 90


def test_matrices_of_every_kind() -> None:
    want = leverage_scores(np.column_stack([A, B]))
    table = {"a": A[:, 0], "b": A[:, 1], "c": A[:, 2], "y": B, "text": ["x"] * 400}
    kinds = [
        (np.asarray(A, order="F"), B),
        (sparse.csr_array(A), B),
        (sparse.coo_matrix(A), B),
        (table, "y"),
        (pa.table(table), "y"),
        (open_table(table).blocks(["a", "b", "c", "y"]), None),
        (np.column_stack([A, B]).tolist(), None),
    ]
    for source, target in kinds:
        np.testing.assert_allclose(
            sd.score("rows", source, method="leverage", target=target), want, rtol=1e-9
        )
    chosen = sd.score("rows", table, method="leverage", columns=["c", "a"])
    np.testing.assert_allclose(chosen, leverage_scores(A[:, [2, 0]]), rtol=1e-9)
    assert sd.draw("rows", sparse.csr_array(A), method="uniform", size=4).n == 400


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"method": "levrage"}, r"^method: got 'levrage' for rows, want .*did you mean 'leverage'"),
        ({"method": "leverage", "p": 1}, "^p: got an option that leverage does not have"),
        ({"method": "uniform", "p": 1}, "^p: got an option that uniform does not have"),
        ({"method": "lewis", "epochs": 1}, "^epochs: got an option .*, want p"),
        ({"method": "lewis", "p": 0}, "^p: got 0"),
        ({"method": "ridge-leverage", "ridge": -1}, "^ridge: got -1"),
        ({}, "^method: got both or neither"),
        ({"method": "leverage", "scores": S}, "^method: got both or neither"),
        ({"scores": S[:-1]}, "^scores: got 399 scores, want 400"),
        ({"scores": S, "p": 1}, "^p: got an option beside scores"),
        ({"scores": np.r_[S[:-1], np.nan]}, "^scores: got nan at row 399"),
        ({"scores": -S}, "^size_measure: got -"),
        ({"method": "leverage", "scheme": "poison"}, "^scheme: got 'poison', want one of poisson"),
        ({"method": "leverage", "map": "log"}, "^map: got 'log', want one of linear"),
        ({"method": "leverage", "target": B[:5]}, "^target: got shape"),
        ({"method": "leverage", "costs": S, "scheme": "pivotal"}, "^cost: got the scheme pivotal"),
        ({"method": "leverage", "costs": S, "by": B > 0}, "^cost: got a cost and strata"),
        ({"method": "leverage", "keep": [400]}, "^keep: got row 400, want rows from 0 to 399"),
        ({"method": "leverage", "keep": [-2, 5]}, "^keep: got row -2, want"),
        ({"method": "leverage", "exclude_rows": [500]}, "^exclude: got row 500"),
        ({"method": "leverage", "keep": [1, 2], "exclude_rows": [2]}, "^exclude: got row 2, which"),
        ({"method": "leverage", "keep": range(40)}, "^keep: got 40 kept already, want less"),
        ({"method": "leverage", "exclude_rows": range(380)}, "^size: got 40, want at most 20"),
        ({"method": "leverage", "ids": [1] * 400}, "^ids: got duplicate ids"),
        ({"method": "leverage", "by": [1]}, "^by: got shape"),
    ],
)
def test_requests_that_make_no_sense(arguments, pattern: str) -> None:
    refuses(lambda: sd.draw("rows", A, size=40, **arguments), pattern)


def test_tables_that_make_no_sense() -> None:
    table = {"a": A[:, 0], "t": ["x"] * 400}
    for arguments, pattern in [
        ({"target": "nope"}, "^target: got 'nope', want one of the columns a, t"),
        ({"target": "t"}, "^columns: got 't' of type string, want numbers"),
        ({"target": B}, "^target: got a ndarray, want a column's name"),
        ({"columns": ["b"]}, "^columns: got 'b'"),
        ({"columns": ["t"]}, "^columns: got 't' of type string"),
    ]:
        refuses(lambda a=arguments: sd.score("rows", table, method="leverage", **a), pattern)
    refuses(lambda: sd.score("rows", table, method="uniform"), "^method: got uniform, want")
    refuses(lambda: sd.score("rows", {"t": ["x"]}, method="leverage"), "no numeric column")
    refuses(lambda: sd.score("column", A, method="leverage"), "^(kind|method): got")


def test_a_job_scores_once(monkeypatch) -> None:
    calls = []
    real = leverage_scores

    def counted(A, *, engine=None):
        calls.append(1)
        return real(A, engine=engine)

    monkeypatch.setattr("scoredraw.coresets.leverage.leverage_scores", counted)
    job = verbs.bind("rows", A, "leverage")
    for size in (10, "20%", 30):
        verbs.draw_job(job, size)
    assert calls == [1]


# ------------------------------------------------------------------ draws


@pytest.mark.parametrize("scheme", sampling.SCHEMES)
def test_schemes_are_those_of_sampling(scheme: str) -> None:
    want = sampling.SCHEMES[scheme](S, 40, rng=3)
    draw = sd.draw("rows", A, scores=S, size="10%", scheme=scheme, seed=3)
    np.testing.assert_array_equal(draw.indices, want.indices)
    np.testing.assert_array_equal(draw.weights, want.weights)
    assert draw.method == f"given scores by {want.method}"
    assert draw.unbiased == want.unbiased
    mapped = sd.draw("rows", A, scores=-S, size=40, scheme=scheme, map="rank", seed=3)
    want = sampling.SCHEMES[scheme](sampling.rank(-S), 40, rng=3)
    np.testing.assert_array_equal(mapped.indices, want.indices)


def test_uniform_is_the_baseline() -> None:
    draw = sd.draw("rows", A, method="uniform", size=40, seed=3)
    want = sampling.uniform(400, 40, rng=3)
    np.testing.assert_array_equal(draw.indices, want.indices)
    assert draw.method == "uniform"
    poisson = sd.draw("rows", A, method="uniform", size=40, seed=3, scheme="poisson")
    assert set(np.unique(poisson.weights)) == {10.0}


def test_seeds() -> None:
    for method in ("leverage", "root-leverage", "uniform"):
        one, same, other = (
            sd.draw("rows", A, method=method, size=40, seed=seed).indices.tolist()
            for seed in (1, 1, 2)
        )
        assert one == same != other


def test_costs() -> None:
    costs = RNG.uniform(1, 5, 400)
    q, _ = sampling.calibrate_inclusion(S, 100.0, costs=costs)
    draw = sd.draw("rows", A, scores=S, size=100.0, costs=costs)
    np.testing.assert_allclose(draw.inclusion, q[draw.indices])
    best = sd.draw("rows", A, scores=S, size=100.0, costs=costs, scheme="top_k")
    spent = costs[best.indices].sum()
    assert 100 - 5 < spent <= 100
    kept = sd.draw("rows", A, scores=S, size=100.0, costs=costs, scheme="top_k", keep=[0, 1])
    assert {0, 1} <= set(kept.indices.tolist())
    assert costs[kept.indices].sum() <= 100


SCHEMES = ("poisson", "priority", "exponential_keys", "systematic", "pivotal", "multinomial",
           "residual", "top_k", None)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("strata", [False, True])
def test_rows_kept_and_excluded(scheme, strata: bool) -> None:
    keep, gone = [5, 399, 7], np.arange(100, 200)
    by = np.arange(400) % 2 if strata else None
    options = {"size": 40, "scheme": scheme, "keep": keep, "by": by, "seed": 2}
    source = {"scores": S} if scheme else {"method": "uniform"}
    draw = sd.draw("rows", A, exclude_rows=gone, **source, **options)
    rows = draw.indices.tolist()
    assert rows == sorted(rows)
    assert set(keep) <= set(rows)
    assert not set(gone.tolist()) & set(rows)
    assert (draw.weights[np.isin(draw.indices, keep)] == 1).all()
    assert not draw.unbiased  # what was excluded cannot be estimated
    if scheme != "poisson":
        assert len(rows) == 40
    np.testing.assert_array_equal(draw.scores, S[rows] if scheme else 1.0)
    whole = sd.draw("rows", A, **source, **options)
    assert whole.unbiased == (scheme != "top_k")
    if whole.unbiased:
        error = whole.total(B).standard_error
        assert np.isnan(error) == (scheme in ("multinomial", "residual"))
        if scheme is None and not strata:  # the kept rows are certain, the others alike
            pool = ~np.isin(np.arange(400), keep)
            values = B[whole.indices[~np.isin(whole.indices, keep)]]
            n, k = pool.sum(), 37
            assert error == pytest.approx(n * np.sqrt((1 - k / n) * values.var(ddof=1) / k))


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", ["poisson", "systematic", "priority", "multinomial"])
def test_totals_with_rows_kept_are_unbiased(scheme: str) -> None:
    """2,000 draws, 5 deviations: false alarm 6e-7 each."""
    s, f = S[:30], B[:30]
    job = verbs.given_scores("rows", s)
    totals = [
        verbs.draw_job(job, 12, scheme=scheme, keep=[0, 9], seed=seed).total(f).value
        for seed in range(2000)
    ]
    assert abs(np.mean(totals) - f.sum()) < 5 * np.std(totals) / np.sqrt(2000)


def test_keeping_and_excluding_leave_the_others_luck_alone() -> None:
    """Row-local: a row's uniform does not depend on which others are in the pool."""
    plain = sd.draw("rows", A, method="uniform", size=40, seed=3)
    out = [int(plain.indices[0])]
    again = sd.draw("rows", A, method="uniform", size=39, seed=3, exclude_rows=out)
    assert again.indices.tolist() == plain.indices.tolist()[1:]


def test_the_easy_end() -> None:
    """Where high scores mark the easy examples, top_k keeps the low ones, scores unflipped."""
    entry = registry.method("examples", "pvi")
    assert entry.easy == "high"
    job = verbs.Job(entry, 400, lambda: B, None)
    draw = verbs.draw_job(job, 40, scheme="top_k")
    assert sorted(draw.scores) == sorted(np.sort(B)[:40])
    np.testing.assert_array_equal(draw.scores, B[draw.indices])
    poisson = verbs.draw_job(job, 40, scheme="poisson", seed=1)
    q, _ = sampling.calibrate_inclusion(sampling.linear(-B), 40)
    np.testing.assert_allclose(poisson.inclusion, q[poisson.indices])


def test_public_names() -> None:
    assert sd.score is verbs.score
    assert sd.draw is verbs.draw
    assert sd.Draw is sampling.Draw
    assert {m.name for m in sd.methods("rows")} >= {"uniform", "leverage", "lewis"}
    with pytest.raises(AttributeError):
        sd.nothing  # noqa: B018
