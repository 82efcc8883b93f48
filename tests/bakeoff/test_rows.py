"""The bake-off of rows: its verdicts on planted data, and that nothing but the seed decides."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from scoredraw import datasets, registry
from scoredraw.bakeoff import rows
from scoredraw.bakeoff.comparison import Comparison, listing
from scoredraw.bakeoff.rows import compare_rows, read_sizes
from scoredraw.errors import InputError
from scoredraw.features import read_examples

pytestmark = pytest.mark.oracle


def planted_regression(n: int = 600) -> pa.Table:
    """A feature that few rows have and that decides most of the target: uniform draws miss it."""
    rng = np.random.default_rng(0)
    rare = np.where(rng.random(n) < 0.04, rng.normal(0, 20, n), 0.0)
    plain = rng.normal(size=n)
    y = rare + 0.1 * plain + 0.1 * rng.normal(size=n)
    return pa.table({"rare": rare, "plain": plain, "y": y})


def records(values: np.ndarray) -> tuple[dict, ...]:
    """Records of a made-up bake-off: values (repeats, methods, sizes), the first one uniform."""
    return tuple(
        {
            "repeat": r,
            "results": {
                f"m{m}" if m else "uniform": {
                    "values": value.tolist(),
                    "losses": [None] * len(value),
                    "wrong": [0.0] * len(value),
                    "seconds": 0.5,
                    "picks": None,
                }
                for m, value in enumerate(repeat)
            },
            "full": {"value": 0.9, "loss": None, "seconds": 1.0},
        }
        for r, repeat in enumerate(values)
    )


def comparison(values: np.ndarray) -> Comparison:
    _, methods, sizes = values.shape
    protocol = {
        "methods": ("uniform", *(f"m{m}" for m in range(1, methods))),
        "sizes": tuple(f"{s + 1}%" for s in range(sizes)),
        "counts": tuple(10 * (s + 1) for s in range(sizes)),
        "model": "logistic",
        "repeats": len(values),
        "seed": 0,
        "train_rows": 1000,
        "encoder": "none",
    }
    return Comparison(read_examples("iris", None), protocol, records(values), 1250, 1.0)


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────


def test_leverage_beats_uniform_where_few_rows_decide() -> None:
    found = compare_rows(
        planted_regression(), "y", methods="leverage", sizes=[15], repeats=10, workers=1
    )
    entry = found.of("leverage")[0]
    assert entry.verdict == "beats"
    assert entry.gain.low > 0.1
    assert found.answer.startswith("leverage beats a uniform draw at 15: with 15 of the rows")


def test_nothing_beats_uniform_where_labels_are_noise() -> None:
    # Bonferroni: a false alarm on such a table has probability at most 5 %; the seed is fixed
    rng = np.random.default_rng(1)
    found = compare_rows(
        rng.normal(size=(300, 4)), rng.integers(0, 2, 300),
        methods="uniform@class,leverage,el2n", sizes=[20, 60], repeats=6, workers=1,
    )  # fmt: skip
    assert {entry.verdict for entry in found.entries} == {"undecided"}
    assert found.answer.startswith("Nothing beats a uniform draw of the same size on arrays")


def test_false_alarms_are_as_rare_as_promised() -> None:
    # 400 tables without a difference, 12 gains each: any verdict but "undecided" is a false alarm.
    # Their number is at most binomial(400, 0.05); above 20 + 4.4 sd = 39 has probability < 1e-4
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(400):
        shared = rng.normal(size=(6, 1, 3))  # what a split does to every method
        found = comparison(shared + 0.1 * rng.normal(size=(6, 5, 3)))
        alarms += any(e.verdict != "undecided" for e in found.entries if e.method != "uniform")
    assert alarms <= 39


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(3)
    values = np.repeat(10 * rng.normal(size=(5, 1, 1)), 2, axis=1)
    values[:, 1] += 0.1 + 0.01 * rng.normal(size=(5, 1))  # tiny beside the spread of splits
    entry = comparison(values).of("m1")[0]
    assert entry.verdict == "beats"
    assert entry.gain.value == pytest.approx(0.1, abs=0.02)
    assert entry.value.half_width > 1


def test_what_is_said_is_what_was_found() -> None:
    values = np.full((4, 4, 2), 0.5) + 0.001 * np.random.default_rng(4).normal(size=(4, 4, 2))
    values[:, 1] += 0.2
    values[:, 2, 1] += 0.1
    values[:, 3] -= 0.2
    found = comparison(values)
    assert found.ranking == ["m1", "m2", "uniform", "m3"]
    assert "m1 beats a uniform draw at every size" in found.answer
    assert "So does m2 at 2%." in found.answer
    assert "m3 is worse than uniform at every size." in found.answer
    assert [e.method for e in found.leaderboard("2%")] == found.ranking
    assert listing(["a"]) == "a"


# ── one seed, one result ──────────────────────────────────────────────────────────────────────


def values(found: Comparison) -> list:
    """Everything a seed decides: all but the seconds."""
    return [
        {m: (r["values"], r["losses"], r["picks"]) for m, r in record["results"].items()}
        | {"full": record["full"]["value"]}
        for record in found.records
    ]


OPTIONS = {"methods": "leverage,uniform@class,el2n,vog:poisson", "sizes": [12, 30], "repeats": 3}


@pytest.fixture(scope="module")
def once() -> Comparison:
    return compare_rows("iris", **OPTIONS, workers=1)


def test_processes_do_not_change_the_result(once: Comparison) -> None:
    assert values(compare_rows("iris", **OPTIONS, workers=2)) == values(once)


def test_another_seed_changes_it(once: Comparison) -> None:
    assert values(compare_rows("iris", **OPTIONS, workers=1, seed=1)) != values(once)


def test_a_method_does_not_depend_on_its_company(once: Comparison) -> None:
    alone = compare_rows("iris", **OPTIONS | {"methods": "leverage", "sizes": [30]}, workers=1)
    assert [e.value for e in alone.of("leverage")] == [once.of("leverage")[1].value]
    assert [e.value for e in alone.of("uniform")] == [once.of("uniform")[1].value]


def test_an_interrupted_comparison_goes_on_to_the_same_result(once, tmp_path, monkeypatch) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_rows("iris", **OPTIONS, workers=1, journal=tmp_path, progress=interrupt)
    (log,) = tmp_path.iterdir()
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:  # a line that a kill cut off
        file.write('{"key": "torn", "rep')
    ran = []
    real = rows.run_repeat
    monkeypatch.setattr(rows, "run_repeat", lambda *a: ran.append(a[-1]) or real(*a))
    resumed = compare_rows("iris", **OPTIONS, workers=1, journal=tmp_path)
    assert ran == [2]
    assert values(resumed) == values(once)
    again = compare_rows("iris", **OPTIONS, workers=1, journal=log)
    assert ran == [2]
    assert again.entries == resumed.entries


def test_other_data_or_options_have_another_journal(tmp_path) -> None:
    common = {"methods": "leverage", "sizes": [12], "repeats": 2, "workers": 1}
    compare_rows("iris", **common, journal=tmp_path)
    compare_rows("wine", **common, journal=tmp_path)
    compare_rows("iris", **common | {"seed": 1}, journal=tmp_path)
    logs = sorted(tmp_path.iterdir())
    assert len(logs) == 3
    with pytest.raises(InputError, match=r"^journal: got .* of another comparison"):
        compare_rows("iris", **common | {"seed": 2}, journal=logs[0])


def test_held_out_rows_are_not_seen_by_features_scores_or_draws(monkeypatch) -> None:
    iris = datasets.load("iris")
    assert iris.x is not None
    protocol = rows.Protocol(("uniform",), ("12",), (12,), "logistic", 2, 0, 120, "none")
    first = rows.Repeat(read_examples(iris.x, iris.y), protocol, None, 0)
    changed = iris.x.copy()
    changed[np.setdiff1d(np.arange(150), first.train)] *= 1000
    second = rows.Repeat(read_examples(changed, iris.y), protocol, None, 0)
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.rows.x, second.rows.x)
    assert np.array_equal(first.rows.matrix, second.rows.matrix)
    assert not np.allclose(first.test[0], second.test[0])
    counts = np.bincount(first.rows.y)
    assert counts.max() - counts.min() <= 1  # split by class


# ── methods, models, sizes ────────────────────────────────────────────────────────────────────

METHODS = [m.name for kind in ("rows", "examples") for m in registry.methods(kind) if not m.takes]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"uniform"}))
def test_every_method_of_the_catalogue_can_compete(name: str) -> None:
    found = compare_rows("iris", methods=name, sizes=[30], repeats=2, workers=1)
    assert 0.2 < found.of(name)[0].value.value <= 1


@pytest.mark.parametrize("model", ["logistic", "ridge", "mlp", "boosting"])
def test_every_classifier(model: str) -> None:
    found = compare_rows("iris", methods="leverage", sizes=[60], model=model, repeats=2, workers=1)
    assert found.full.value > 0.75
    loss = found.of("leverage")[0].loss
    assert (loss is None) == (model == "ridge")


@pytest.mark.parametrize("model", ["ridge", "mlp", "boosting"])
def test_every_regressor(model: str) -> None:
    found = compare_rows(
        "diabetes", methods="leverage", sizes=["50%"], model=model, repeats=2, workers=1
    )
    assert math.isfinite(found.full.value)
    assert found.metric == "R²"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_draw_of_one_class_is_a_model_that_predicts_it() -> None:
    found = compare_rows("iris", methods="el2n:bottom_k", sizes=[2], repeats=2, workers=1)
    assert 0 <= found.of("el2n:bottom_k")[0].value.value <= 1


def test_sizes_are_shares_of_the_training_rows() -> None:
    assert read_sizes("1%,5%,10%", 9600) == (("1%", "5%", "10%"), (96, 480, 960))
    assert read_sizes([0.5, 7, "7"], 100) == (("7", "50%"), (7, 50))


def test_wrong_labels_are_moved_counted_and_told() -> None:
    found = compare_rows(
        "iris", methods="el2n,el2n:bottom_k", sizes=[24], repeats=4, flip="20%", workers=1
    )
    drawn = {entry.method: entry.wrong for entry in found.entries}
    assert drawn["el2n"] > 0.5 > drawn["uniform"] > drawn["el2n:bottom_k"]
    assert 0.1 < drawn["uniform"] < 0.3
    assert found.of("el2n")[0].verdict == "worse"
    assert any(note.startswith("20 % of the labels to learn from") for note in found.notes)
    assert "Wrong labels among the rows drawn" in found.page().html()
    clean = compare_rows("iris", methods="el2n", sizes=[24], repeats=4, workers=1)
    assert clean.of("el2n")[0].wrong == 0


def test_a_large_table_is_sampled_first_and_says_so() -> None:
    found = compare_rows(
        "digits", methods="leverage", sizes=[20], repeats=2, max_rows=200, workers=1
    )
    assert len(found.examples) == 200
    assert any("1,797 rows; this is a uniform sample of 200" in note for note in found.notes)


IRIS = datasets.load("iris")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "500%"}, r"^sizes: got '?500% \(600 rows\).* want 2 to 120 training rows$"),
        ({"sizes": "121"}, r"^sizes: got 121 \(121 rows\)"),
        ({"sizes": "few"}, "^sizes: got 'few'"),
        ({"sizes": "-5"}, "^sizes: got '-5'"),
        ({"sizes": "2.5"}, r"^sizes: got '2\.5'"),
        ({"sizes": []}, "^sizes: got none"),
        (
            {"sizes": [2], "methods": "uniform@class"},
            r"^sizes: got 2 .* for each of 3 classes$",
        ),
        ({"methods": "levrage"}, "^methods: got 'levrage'"),
        ({"methods": "leverage:dice"}, "^methods: got scheme 'dice'"),
        ({"methods": "leverage@town"}, "^methods: got 'leverage@town'"),
        ({"methods": "uniform"}, "^methods: got only uniform"),
        ({"model": "oracle"}, "^model: got 'oracle'"),
        ({"task": "ranking"}, "^task: got 'ranking'"),
        ({"repeats": 1}, "^repeats: got 1"),
        ({"seed": -1}, "^seed: got -1"),
        ({"flip": "100%"}, "^flip: got '100%', want a share of the labels"),
        ({"flip": "some"}, "^flip: got 'some'"),
        ({"methods": "quad:poisson"}, "^methods: got 'quad:poisson', want 'quad' alone"),
        ({"methods": "ches"}, "^methods: got 'ches', want some of"),
    ],
)
def test_options_that_cannot_be_compared(options, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        compare_rows(IRIS.x, IRIS.y, **{"repeats": 2, "workers": 1} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"methods": "el2n"}, {"methods": "leverage@class"},
                                    {"model": "logistic"}, {"flip": 0.1}])  # fmt: skip
def test_what_needs_classes_is_refused_for_a_regression(option) -> None:
    with pytest.raises(InputError, match=r"^(methods|model|flip): got [^\n]*$"):
        compare_rows("diabetes", repeats=2, workers=1, **option)


def test_the_outcome_is_strict_json_and_a_page(once: Comparison) -> None:
    data = json.loads(once.to_json(), parse_constant=pytest.fail)
    assert {"answer", "task", "metric", "leaderboard", "full", "protocol"} <= set(data)
    assert len(data["leaderboard"]) == 5 * 2
    assert set(data["leaderboard"][0]["gain"]) == {"value", "low", "high", "n"}
    page = once.page().html()
    assert once.answer.split(":")[0] in page
    assert page.count("<svg") == 6
