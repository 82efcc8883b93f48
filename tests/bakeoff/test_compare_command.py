"""`scoredraw compare rows` as a person runs it."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from scoredraw.cli import app
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract

QUICK = ["--methods", "leverage", "--sizes", "30", "--repeats", "2", "--workers", "1"]


@pytest.fixture
def csv(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 2))
    label = np.array(["no", "yes"])[(x[:, 0] > 0).astype(int)]
    pa.csv.write_csv(pa.table({"a": x[:, 0], "b": x[:, 1], "label": label}), "table.csv")
    return "table.csv"


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["compare", "rows", *arguments])


def test_a_table_is_compared_and_the_answer_said(csv, tmp_path) -> None:
    done = invoke(csv, "--target", "label", *QUICK)
    assert done.exit_code == 0, done.output
    assert "leverage" in done.stdout
    assert "uniform draw" in done.stdout
    assert "label is not a number" in done.stdout
    assert len(list((tmp_path / ".scoredraw").glob("compare-rows-*.jsonl"))) == 1


def test_json_is_one_object_and_nothing_else(csv) -> None:
    done = invoke(csv, "--target", "label", *QUICK, "--json")
    data = json.loads(done.stdout, parse_constant=pytest.fail)
    assert data["data"] == "table.csv"
    assert data["metric"] == "accuracy"
    assert {row["method"] for row in data["leaderboard"]} == {"uniform", "leverage"}
    assert data["leaderboard"][0]["rows"] == 30


def test_a_report_is_written(csv, tmp_path) -> None:
    done = invoke(csv, "--target", "label", *QUICK, "--report", "page.html")
    assert done.exit_code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "colour"], r"^target: got 'colour', want one of a, b, label$"),
        (["--target", "label", "--report", "no/such/page.html"], "^report: got no/such"),
        (["--target", "label", "--report", "."], "^report: got ., which is a folder"),
        (["--target", "label", "--model", "crystal"], "^model: got 'crystal'"),
    ],
)
def test_mistakes_are_found_before_any_work(csv, tmp_path, arguments, message) -> None:
    done = invoke(csv, *QUICK, *arguments)
    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv"]


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    csv, tmp_path, monkeypatch, capsys
) -> None:
    from scoredraw.bakeoff import rows
    from scoredraw.cli import main

    real = rows.run_repeat

    def second_is_interrupted(*arguments):
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(rows, "run_repeat", second_is_interrupted)
    asked = ["compare", "rows", str(csv), "--target", "label", *QUICK, "--report", "page.html"]
    monkeypatch.setattr("sys.argv", ["scoredraw", *map(str, asked)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    (log,) = (tmp_path / ".scoredraw").iterdir()
    assert len(log.read_text().splitlines()) == 1
    monkeypatch.setattr(rows, "run_repeat", real)
    assert invoke(csv, "--target", "label", *QUICK).exit_code == 0
    assert len(log.read_text().splitlines()) == 2
