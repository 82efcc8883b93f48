"""`scoredraw draw`: what it prints, what it writes, and what its options mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import scoredraw as sd
from scoredraw.cli.draw import Request
from scoredraw.sampling import SCHEMES, allocate
from scoredraw.table_output import provenance
from scoredraw.tables import FORMATS, open_table
from scoredraw.uniforms import hash_ids

pytestmark = pytest.mark.contract

N = 2000
RNG = np.random.default_rng(0)
DATA = {
    "id": [f"u{i}" for i in range(N)],
    "a": RNG.standard_t(3, N),
    "b": RNG.integers(-9, 9, N),
    "y": RNG.standard_normal(N),
    "cost": RNG.uniform(1, 3, N),
    "group": np.array(["x", "y", "z"])[np.minimum(RNG.integers(0, 5, N), 2)].tolist(),
}
FEATURES = np.column_stack([DATA["a"], DATA["b"], DATA["y"]])
DRAW = ("draw", "rows")
PLAIN = ("--columns", "a,b,y", "--method", "leverage")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("in") / "table.parquet"
    pq.write_table(pa.table(DATA), path, row_group_size=300)
    return path


def written(path: Path) -> dict[str, list]:
    return open_table(path).read().to_pydict()


def test_json_says_what_was_done(scoredraw, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    code, text, err = scoredraw(*DRAW, table, *PLAIN, "--size", "5%", "-o", out, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert list(facts) == ["method", "n", "size", "seconds", "rows_per_second", "peak_rss_mb",
                           "out"]  # fmt: skip
    assert (facts["method"], facts["n"], facts["out"]) == ("leverage", N, str(out))
    assert facts["size"] == open_table(out).num_rows
    assert facts["seconds"] > 0
    assert facts["rows_per_second"] == pytest.approx(N / facts["seconds"], rel=0.05)
    assert 20 < facts["peak_rss_mb"] < 100_000
    code, text, err = scoredraw(*DRAW, table, *PLAIN, "--size", "5%", "-o", out)
    assert text.startswith(f"leverage: {facts['size']:,} of 2,000 rows in ")
    assert text.rstrip().endswith(f"-> {out}")
    assert "\n" not in text.rstrip()


@pytest.mark.parametrize("kind", FORMATS)
def test_out_is_the_input_with_three_columns(scoredraw, tmp_path: Path, kind: str) -> None:
    """In and out in every format: the rows in their order, their weights and scores."""
    from scoredraw.table_output import write_table

    source, out = tmp_path / f"in{kind}", tmp_path / f"out{kind}"
    data = {k: v for k, v in DATA.items() if kind not in (".npy", ".npz") or k in "aby"}
    whole = pa.table(data)
    write_table(source, whole.schema, whole.to_batches(300), {})
    names = ["x0", "x1", "x2"] if kind == ".npy" else ["a", "b", "y"]
    code, _, err = scoredraw(*DRAW, source, "--columns", ",".join(names), "--method", "leverage",
                             "--size", 100, "--seed", 3, "-o", out)  # fmt: skip
    assert (code, err) == (0, "")
    want = sd.draw("rows", DATA, columns=["a", "b", "y"], method="leverage", size=100, seed=3)
    found = open_table(out).read()
    if kind == ".npy":
        found = found.rename_columns(["a", "b", "y", "_row", "_weight", "_score"])
    assert found.column_names == [*data, "_row", "_weight", "_score"]
    assert found["_row"].to_pylist() == want.indices.tolist()
    np.testing.assert_array_equal(found["_weight"], want.weights)
    np.testing.assert_allclose(found["_score"], want.scores, rtol=1e-12)
    for name in data:
        assert found[name].to_pylist() == whole[name].take(want.indices).to_pylist(), name
    made = provenance(out)
    if kind in (".parquet", ".arrow", ".feather"):
        assert made["scoredraw"] == sd.__version__
        assert made["command"][:2] == ["draw", "rows"]
        assert (made["kind"], made["method"], made["n"]) == ("rows", "leverage by poisson", N)
        assert (made["size"], made["seed"], made["unbiased"]) == (len(want), 3, True)
        assert made["input"] == str(source)
    else:
        assert made == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scoredraw, table: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "kept.parquet"
    assert scoredraw(*DRAW, table, *PLAIN, "--scheme", scheme, "--size", 50, "-o", out).code == 0
    want = sd.draw("rows", FEATURES, method="leverage", scheme=scheme, size=50)
    rows = np.sort(want.indices, kind="stable")
    assert written(out)["_row"] == rows.tolist()  # repeated rows are repeated
    assert written(out)["_weight"] == want.weights[np.argsort(want.indices, kind="stable")].tolist()


def test_several_sizes_of_one_scoring(scoredraw, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.csv.gz"
    done = scoredraw(*DRAW, table, *PLAIN, "--size", "1%,50,1500", "-o", out, "--json")
    facts = json.loads(done.out)
    assert [Path(f["out"]).name for f in facts] == [
        "kept-20.csv.gz", "kept-50.csv.gz", "kept-1500.csv.gz"]  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(Path(f["out"]).name for f in facts)
    for fact in facts:
        assert open_table(fact["out"]).num_rows == fact["size"]
    assert scoredraw(*DRAW, table, *PLAIN, "--size", "50", "-o", out, "--json").code == 0
    assert written(out) == written(tmp_path / "kept-50.csv.gz")


def test_sizes_of_millions_keep_their_digits(scoredraw, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.ones(1_300_000))
    out = tmp_path / "kept.npy"
    done = scoredraw(*DRAW, tmp_path / "in.npy", "--method", "uniform", "--size",
                     "1234567,1234568", "-o", out)  # fmt: skip
    assert done.code == 0
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["in.npy", "kept-1234567.npy", "kept-1234568.npy"]


def test_without_out_nothing_is_written(scoredraw, table: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = scoredraw(*DRAW, table, *PLAIN, "--size", 50, "--json")
    assert done.code == 0
    assert json.loads(done.out)["out"] is None
    assert list(tmp_path.iterdir()) == []


def test_seeds_batches_workers_and_splits(scoredraw, table: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, (a, b) in enumerate([(0, 5), (5, 1999), (1999, N)]):
        pq.write_table(pa.table(DATA).slice(a, b - a), parts / f"part-{i}.parquet")
    common = (*PLAIN, "--size", 60, "--seed", 5)
    sources = [table, f"{parts}/*.parquet", parts]
    options = [(), ("--workers", 1, "--batch-rows", 7), ("--workers", 2)]
    outs = []
    for i, (source, more) in enumerate(zip(sources, options, strict=True)):
        out = tmp_path / f"{i}.parquet"
        assert scoredraw(*DRAW, source, *common, *more, "-o", out).code == 0
        outs.append(written(out))
    assert outs[0] == outs[1] == outs[2]
    other = tmp_path / "other.parquet"
    scoredraw(*DRAW, table, *common[:-1], 6, "-o", other)
    assert written(other) != outs[0]


def test_by_draws_every_values_share(scoredraw, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    for method in ("uniform", "leverage"):
        done = scoredraw(*DRAW, table, "--method", method, "--scheme", "priority", "--by", "group",
                         "--size", 100, "-o", out)  # fmt: skip
        assert done.code == 0
        kinds, counts = np.unique(DATA["group"], return_counts=True)
        kept = written(out)
        share = dict(zip(kinds.tolist(), allocate(counts, 100).tolist(), strict=True))
        assert {kind: kept["group"].count(kind) for kind in share} == share


def test_id_keeps_the_luck_of_rows(scoredraw, table: Path, tmp_path: Path) -> None:
    """The same rows in another order and another format: the same ids are drawn."""
    import pyarrow.csv as pacsv

    order = np.random.default_rng(1).permutation(N)
    pacsv.write_csv(pa.table(DATA).take(order), tmp_path / "mixed.csv")
    out = tmp_path / "kept.parquet"
    for more in (("--by", "group"), ()):
        kept = []
        for source in (table, tmp_path / "mixed.csv"):
            done = scoredraw(*DRAW, source, "--method", "uniform", "--id", "id", "--size", 71,
                             "-o", out, *more)  # fmt: skip
            assert done.code == 0
            kept.append(set(written(out)["id"]))
        assert kept[0] == kept[1]
    want = sd.draw("rows", FEATURES, method="uniform", size=71, ids=hash_ids(DATA["id"]))
    assert kept[0] == {DATA["id"][i] for i in want.indices}


def test_cost_and_budget(scoredraw, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    done = scoredraw(*DRAW, table, *PLAIN, "--cost", "cost", "--budget", 200, "-o", out)
    assert done.code == 0
    costs = np.array(DATA["cost"])
    want = sd.draw("rows", FEATURES, method="leverage", size=200.0, costs=costs)
    assert written(out)["_row"] == want.indices.tolist()
    assert 120 < costs[want.indices].sum() < 280  # the expected cost is 200, deviation about 20
    scoredraw(*DRAW, table, *PLAIN, "--cost", "cost", "--budget", 200, "-o", out,
              "--scheme", "top_k")  # fmt: skip
    assert 197 < sum(written(out)["cost"]) <= 200


def test_columns_named_by_options_are_no_features(scoredraw, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    done = scoredraw(*DRAW, table, "--method", "leverage", "--cost", "cost", "--budget", 100,
                     "-o", out)  # fmt: skip
    assert done.code == 0
    want = sd.draw("rows", FEATURES, method="leverage", size=100.0, costs=np.array(DATA["cost"]))
    assert written(out)["_row"] == want.indices.tolist()
    scoredraw(*DRAW, table, "--columns", "a,b", "--target", "y", "--method", "lewis", "--p", "1",
              "--size", 100, "-o", out)  # fmt: skip
    want = sd.draw("rows", FEATURES, method="lewis", p=1.0, size=100)
    assert written(out)["_row"] == want.indices.tolist()


def test_keep_and_exclude(scoredraw, table: Path, tmp_path: Path) -> None:
    keep, gone, out = (tmp_path / name for name in ("keep.csv", "gone.csv", "kept.parquet"))
    keep.write_text("_row,note\n1999,a\n3,b\n3,again\n")
    gone.write_text("_row\n" + "".join(f"{i}\n" for i in range(100, 1000)))
    common = (*DRAW, table, *PLAIN, "--size", 80, "--keep", keep, "--exclude", gone, "-o", out)
    assert scoredraw(*common, "--scheme", "priority").code == 0
    kept = written(out)
    assert len(kept["_row"]) == 80
    assert {3, 1999} <= set(kept["_row"])
    assert not set(range(100, 1000)) & set(kept["_row"])
    weights = dict(zip(kept["_row"], kept["_weight"], strict=True))
    assert weights[3] == weights[1999] == 1.0
    assert provenance(out)["unbiased"] is False
    # by identity; the output of an earlier draw serves as it is
    keep.write_text("id,x\nu1999,1\nu3,2\n")
    done = scoredraw(*DRAW, table, *PLAIN, "--size", 80, "--id", "id", "--keep", keep,
                     "--exclude", tmp_path / "before.parquet", "-o", out)  # fmt: skip
    assert done.code == 2
    scoredraw(*DRAW, table, "--method", "uniform", "--size", 500, "-o", tmp_path / "before.parquet")
    (tmp_path / "keep2.csv").write_text("_row\n")
    before = set(written(tmp_path / "before.parquet")["_row"])
    done = scoredraw(*DRAW, table, *PLAIN, "--size", 80, "--id", "id", "--exclude",
                     tmp_path / "before.parquet", "-o", out)  # fmt: skip
    assert done.code == 0
    assert not before & set(written(out)["_row"])


def test_scores_from_a_file(scoredraw, table: Path, tmp_path: Path) -> None:
    scores, out = tmp_path / "scores.csv", tmp_path / "kept.parquet"
    assert scoredraw("score", "rows", table, *PLAIN, "-o", scores).code == 0
    done = scoredraw(*DRAW, table, "--scores", scores, "--size", 90, "-o", out, "--json")
    assert json.loads(done.out)["method"] == "scores"
    want = sd.draw("rows", FEATURES, method="leverage", size=90)
    assert written(out)["_row"] == want.indices.tolist()
    assert written(out)["_score"] == pytest.approx(want.scores.tolist(), rel=1e-12)
    for map_ in ("linear", "softmax", "rank"):
        assert scoredraw(*DRAW, table, "--scores", scores, "--map", map_, "--size", 90,
                         "-o", out).code == 0  # fmt: skip
        want = sd.draw("rows", FEATURES, method="leverage", map=map_, size=90)
        assert written(out)["_row"] == want.indices.tolist()


def test_a_page_about_the_draw(scoredraw, table: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = scoredraw(*DRAW, table, *PLAIN, "--size", "50,100", "-o", tmp_path / "kept.parquet",
                     "--report", page)  # fmt: skip
    assert (done.code, done.err) == (0, "")
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched


def test_types_survive(scoredraw, tmp_path: Path) -> None:
    """Categories, lists, missing values and text of every kind come out as they went in."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            "c": pd.Categorical(["x", "y", None, "x"] * 50),
            "v": [[1.0, 2.0]] * 200,
            "when": pd.Timestamp("2020-01-01"),
            "t": ["", None, "null", "ü\n"] * 50,
            "n": RNG.standard_normal(200),
        }
    )
    frame.to_parquet(tmp_path / "in.parquet", row_group_size=64)
    for kind in ("parquet", "arrow"):
        out = tmp_path / f"out.{kind}"
        done = scoredraw(*DRAW, tmp_path / "in.parquet", "--method", "leverage", "--size", 50,
                         "-o", out)  # fmt: skip
        assert (done.code, done.err) == (0, "")
        rows = written(out)["_row"]
        source = pq.read_table(tmp_path / "in.parquet").take(rows)
        for name in frame.columns:
            assert written(out)[name] == source[name].to_pylist(), name
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back["c"].dtype == "category"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    pytest.importorskip("torch", reason="probes are trained with the extra scoredraw[torch]")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 4))
    label = np.where(x[:, 0] + 0.3 * rng.standard_normal(300) > 0, "yes", "no")
    path = tmp_path_factory.mktemp("labelled") / "train.csv"
    import pandas as pd

    pd.DataFrame({**{f"x{i}": x[:, i] for i in range(4)}, "label": label}).to_csv(path, index=False)
    return path


def test_examples(scoredraw, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.csv"
    for method, options in (("uniform", ()), ("el2n", ("--seeds", 1, "--epochs", 2))):
        done = scoredraw("draw", "examples", labelled, "--target", "label", "--method", method,
                         "--size", "20%", "--by", "label", *options, "-o", out,
                         "--json")  # fmt: skip
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["size"] == 60
        kept = open_table(out)
        assert kept.column_names[-4:] == ["label", "_row", "_weight", "_score"]
        assert kept.num_rows == 60
    scores = np.array(written(out)["_score"])
    assert np.ptp(scores) > 0


@pytest.mark.contract
def test_a_scores_file_in_another_order_is_read_by_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    order, scores = rng.permutation(40), rng.random(40)
    pq.write_table(pa.table({"x": np.arange(40.0)}), tmp_path / "table.parquet")
    pq.write_table(pa.table({"_row": order, "_score": scores[order]}), tmp_path / "s.parquet")
    request = Request(
        "rows", str(tmp_path / "table.parquet"), None, "5", tmp_path / "out.parquet",
        tmp_path / "s.parquet", "top_k", None, None, None, None, None, None, None, 0, None, True,
    )  # fmt: skip
    request.carry_out({}, "local", None, 1000)
    kept = pq.read_table(tmp_path / "out.parquet")
    assert set(kept["_row"].to_pylist()) == set(np.argsort(-scores)[:5].tolist())
