"""`Draw`: totals and their errors, composition, taking rows, saving and loading."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw import sampling
from scoredraw.draws import Draw
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract


def some(**changes) -> Draw:
    settings_ = {
        "indices": [4, 1, 1],
        "weights": [2.0, 3.0, 1.0],
        "n": 6,
        "inclusion": [0.5, 0.25, 0.25],
        "unbiased": True,
        "scores": [9.0, 8.0, 8.0],
        "method": "made up",
    }
    return Draw(**{**settings_, **changes})


def test_arrays_are_brought_to_the_documented_types() -> None:
    draw = some()
    assert draw.indices.dtype == np.int64
    assert draw.weights.dtype == draw.inclusion.dtype == draw.scores.dtype == np.float64
    assert len(draw) == 3
    assert "3 of 6" in repr(draw)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weights": [1.0]}, "weights"),
        ({"inclusion": [1.0]}, "inclusion"),
        ({"scores": [[1.0, 2.0, 3.0]]}, "scores"),
        ({"indices": [6, 0, 0]}, "indices"),
        ({"indices": [-1, 0, 0]}, "indices"),
        ({"n": 4}, "indices"),
    ],
)
def test_what_does_not_fit_is_refused(changes, word: str) -> None:
    with pytest.raises(InputError, match=f"^{word}: got"):
        some(**changes)


def test_totals_and_means_are_those_of_the_formulas() -> None:
    draw, f = some(info={"design": "independent"}), np.array([0, 10.0, 0, 0, 1.0, 0])
    value, error = draw.total(f)
    assert value == 2 * 1 + 3 * 10 + 1 * 10
    # sum (1 - q) (f / q)^2 with q = 1/w
    assert error == pytest.approx(np.sqrt(0.5 * 2.0**2 + (2 / 3) * 30.0**2 + 0.0))
    assert draw.total(lambda rows: f[rows]) == (value, error)
    mean = draw.mean(f)
    assert mean.value == pytest.approx(42 / 6)
    centred = np.array([2 * (1 - 7.0), 3 * (10 - 7.0), 3.0])
    variance = (np.array([0.5, 2 / 3, 0]) * centred**2).sum()
    assert mean.standard_error == pytest.approx(np.sqrt(variance) / 6)
    assert draw.sample_weight.mean() == pytest.approx(1.0)


def test_totals_need_probabilities_and_values_of_the_right_shape() -> None:
    with pytest.raises(InputError, match=r"^total: got a top_k draw"):
        sampling.top_k([1.0, 2.0], 1).total([1.0, 2.0])
    assert np.isnan(sampling.top_k([1.0, 2.0], 1).mean([1.0, 2.0]).standard_error)
    for wrong in (np.ones(5), np.ones((6, 1)), lambda rows: np.ones(2)):
        with pytest.raises(InputError, match=r"^f: got shape"):
            some().total(wrong)
    empty = Draw([], [], 4, unbiased=True)
    with pytest.raises(InputError, match=r"^mean: got an empty draw"):
        empty.mean(np.ones(4))
    assert empty.total(np.ones(4)).value == 0.0
    assert len(empty.sample_weight) == 0


def test_then_composes() -> None:
    first = Draw([5, 2, 8], [2.0, 4.0, 1.0], 9, [0.5, 0.25, 1.0], True, [7.0, 6.0, 5.0], method="a")
    second = Draw([2, 0], [3.0, 1.0], 3, [1 / 3, 1.0], True, method="b")
    both = first.then(second)
    assert both.indices.tolist() == [8, 5]
    assert both.weights.tolist() == [3.0, 2.0]
    assert both.inclusion.tolist() == pytest.approx([1 / 3, 0.5])
    assert both.scores.tolist() == [5.0, 7.0]
    assert (both.n, both.unbiased, both.method) == (9, True, "a then b")
    assert np.isnan(both.total(np.ones(9)).standard_error)
    assert not first.then(sampling.top_k([1.0, 2.0, 3.0], 2)).unbiased
    with pytest.raises(InputError, match=r"^then: got a pool of 4"):
        first.then(Draw([0], [1.0], 4))


@pytest.mark.oracle
def test_a_draw_from_a_draw_is_unbiased() -> None:
    """4,000 pairs of draws, six totals within 4.5 deviations: false alarm 4e-5."""
    s, f = np.arange(1.0, 7.0), np.eye(6)
    totals = []
    for seed in range(4000):
        first = sampling.systematic(s, 4, rng=seed)
        both = first.then(sampling.poisson(np.ones(4), 2, rng=seed + 10**6))
        totals.append(np.bincount(both.indices, both.weights, minlength=6) @ f)
    totals = np.array(totals)
    error = totals.std(0) / np.sqrt(len(totals))
    assert (np.abs(totals.mean(0) - 1) < 4.5 * error).all()


@pytest.mark.property
@settings(max_examples=50)
@given(st.lists(st.integers(0, 7), max_size=20))
def test_merged_keeps_every_total(rows: list[int]) -> None:
    weights = np.linspace(1, 2, len(rows))
    draw = Draw(rows, weights, 8, scores=np.array(rows, float), unbiased=True)
    merged = draw.merged()
    assert sorted(set(rows)) == sorted(merged.indices.tolist())
    assert merged.scores.tolist() == merged.indices.tolist()
    for f in np.eye(8):
        assert merged.total(f).value == pytest.approx(draw.total(f).value)


# ------------------------------------------------------------------ take


@pytest.mark.parametrize("kind", ["numpy", "sparse", "torch", "pandas", "series", "polars", "arrow",
                                  "batch", "chunked", "datasets", "list", "tuple"])  # fmt: skip
def test_take(kind: str) -> None:
    draw, x = some(), np.arange(6) * 10
    want = [40, 10, 10]
    if kind == "numpy":
        assert draw.take(np.column_stack([x, x]))[:, 1].tolist() == want
    elif kind == "sparse":
        from scipy.sparse import csr_array

        assert draw.take(csr_array(x[:, None])).toarray().ravel().tolist() == want
    elif kind == "torch":
        import torch

        assert draw.take(torch.from_numpy(x)).tolist() == want
    elif kind in ("pandas", "series"):
        import pandas as pd

        frame = pd.DataFrame({"x": x}, index=list("fedcba"))  # positions, not labels
        taken = draw.take(frame if kind == "pandas" else frame["x"])
        assert (taken["x"] if kind == "pandas" else taken).tolist() == want
        assert taken.index.tolist() == ["b", "e", "e"]
    elif kind == "polars":
        import polars as pl

        assert draw.take(pl.DataFrame({"x": x}))["x"].to_list() == want
        assert draw.take(pl.Series(x)).to_list() == want
    elif kind in ("arrow", "batch", "chunked"):
        table = pa.table({"x": x})
        data = {"arrow": table, "batch": table.to_batches()[0], "chunked": table["x"]}[kind]
        taken = draw.take(data)
        assert (taken if kind == "chunked" else taken["x"]).to_pylist() == want
    elif kind == "datasets":
        import datasets

        assert draw.take(datasets.Dataset.from_dict({"x": x}))["x"][:] == want
    else:
        data = x.tolist() if kind == "list" else tuple(x.tolist())
        assert draw.take(data) == type(data)(want)


def test_take_wants_the_whole_pool() -> None:
    for data in (np.zeros(5), [0] * 7, pa.table({"x": [1]})):
        with pytest.raises(InputError, match=r"^data: got \d rows, want the pool's 6"):
            some().take(data)


# ------------------------------------------------------------------ save and load


@pytest.mark.parametrize("fields", [{}, {"inclusion": None, "scores": None, "unbiased": False}])
def test_a_saved_draw_comes_back(tmp_path, fields) -> None:
    info = {"design": "fixed", "strata": np.array([0, 1, 1]), "rounds": 3, "grid": np.eye(2)}
    draw = some(info=info, offsets=np.array([0, 1, 3]), weights=[1 / 3, np.pi, 1e-300], **fields)
    draw.save(tmp_path / "draw.parquet")
    back = Draw.load(tmp_path / "draw.parquet")
    for name in ("indices", "weights", "inclusion", "scores", "offsets"):
        mine, other = getattr(draw, name), getattr(back, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            np.testing.assert_array_equal(mine, other)
    assert (back.n, back.unbiased, back.method) == (6, draw.unbiased, "made up")
    assert back.info.keys() == info.keys()
    np.testing.assert_array_equal(back.info["strata"], info["strata"])
    np.testing.assert_array_equal(back.info["grid"], np.eye(2))
    assert (back.info["design"], back.info["rounds"]) == ("fixed", 3)


def test_every_scheme_can_be_saved(tmp_path) -> None:
    s, f = np.arange(1.0, 21.0), np.sin(np.arange(20))
    for name, scheme in sampling.SCHEMES.items():
        for by in (None, np.arange(20) % 3):
            draw = scheme(s, 8, rng=1, by=by)
            draw.save(tmp_path / "draw.parquet")
            back = Draw.load(tmp_path / "draw.parquet")
            assert back.info["design"] == draw.info["design"], name
            if draw.unbiased:
                np.testing.assert_equal(back.total(f), draw.total(f))


def test_the_tables_of_a_draw(tmp_path) -> None:
    assert some().to_arrow().column_names == ["_row", "_weight", "_inclusion", "_score"]
    assert json.loads(some().to_arrow().schema.metadata[b"scoredraw"])["n"] == 6
    assert some().to_frame()["_row"].tolist() == [4, 1, 1]
    other = tmp_path / "other.parquet"
    import pyarrow.parquet as pq

    for metadata in (None, {"scoredraw": "{}"}):
        pq.write_table(pa.table({"_row": [1]}).replace_schema_metadata(metadata), other)
        with pytest.raises(InputError, match=r"^path: got .*other.parquet"):
            Draw.load(other)
