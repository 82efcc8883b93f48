"""`scoredraw plan budget` and `plan mixture` as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from scoredraw.cli import app
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract

GROUPS = {
    "group": ["north", "north", "south", "south"],
    "n": [50, 200, 20, 40],
    "performance": [0.71, 0.84, 0.55, 0.63],
    "cost": [1.0, 1.0, 2.0, 2.0],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with groups.csv, pilots.csv (a good and a useless source) and wanted.csv."""
    monkeypatch.chdir(tmp_path)
    pa.csv.write_csv(pa.table(GROUPS), "groups.csv")
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(120, 2)), rng.normal(size=(60, 2))
    source = np.repeat(["crowd", "expert"], 60)
    label = np.where(source == "expert", x[:, 0] > 0, rng.random(120) > 0.5)
    names = np.array(["no", "yes"])
    table = {"a": x[:, 0], "b": x[:, 1], "label": names[label.astype(int)]}
    pa.csv.write_csv(pa.table(table | {"source": source}), "pilots.csv")
    wanted = {"a": v[:, 0], "b": v[:, 1], "label": names[(v[:, 0] > 0).astype(int)]}
    pa.csv.write_csv(pa.table(wanted), "wanted.csv")
    return tmp_path


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


MIXTURE = (
    *("mixture", "pilots.csv", "--validation", "wanted.csv", "--target", "label"),
    *("--source", "source", "--rows", "200", "--grid", "4", "--repeats", "2"),
)


def test_a_budget_goes_to_the_group_that_gains_most(here: Path) -> None:
    done = invoke("budget", "groups.csv", "--budget", "300", "-o", "plan.csv", "--report", "p.html")
    assert done.exit_code == 0, done.output
    assert "Collect next: " in done.stdout
    plan = pa.csv.read_csv("plan.csv").to_pydict()
    bought = np.array(plan["planned"]) - plan["held"]
    assert bought @ [1, 2] <= 300
    assert bought[1] > 0  # the steep curve
    assert Path("p.html").read_text().count("<svg") == 4  # two figures, light and dark


def test_the_same_seed_gives_the_same_plan_as_json(here: Path) -> None:
    first, again = (invoke("budget", "groups.csv", "--budget", "99", "--json") for _ in "ab")
    assert first.stdout == again.stdout
    data = json.loads(first.stdout, parse_constant=pytest.fail)
    assert data["plan"]["group"] == ["north", "south"]


def test_a_mixture_comes_from_the_source_that_helps(here: Path) -> None:
    done = invoke(*MIXTURE, "-o", "plan.csv", "--report", "page.html", "--log", "log.jsonl")
    assert done.exit_code == 0, done.output
    plan = pa.csv.read_csv("plan.csv").to_pydict()
    rows = dict(zip(plan["source"], plan["rows"], strict=True))
    assert sum(rows.values()) == 200
    assert rows["expert"] > rows["crowd"]
    assert Path("page.html").read_text().startswith("<!doctype html>")
    trained = len(Path("log.jsonl").read_text().splitlines())
    again = invoke(*MIXTURE, "--log", "log.jsonl")
    assert len(Path("log.jsonl").read_text().splitlines()) == trained  # nothing is trained twice
    assert again.stdout in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("budget", "pilots.csv", "--budget", "9"), "table: got no column group, n, performance"),
        (("budget", "groups.csv", "--budget", "-1"), "budget: got -1"),
        (("budget", "groups.csv", "--budget", "9", "--utility", "x"), "utility: got 'x'"),
        (("budget", "groups.csv", "--budget", "9", "--family", "x"), "family: got 'x'"),
        (("budget", "groups.csv", "--budget", "9", "-o", "no/plan.csv"), "out: got no/plan.csv"),
        (("budget", "groups.csv", "--budget", "9", "-o", "plan.png"), "out: "),
        ((*MIXTURE, "--sizes", "30"), "sizes: got 30, want two counts"),
        ((*MIXTURE, "--sizes", "60,30"), "sizes: got 60 and 30"),
        ((*MIXTURE, "--source", "nobody"), "source: got 'nobody'"),
        ((*MIXTURE, "--source", "label"), "source: got 'label', want another column"),
        ((*MIXTURE, "--target", "nothing"), "target: got 'nothing'"),
        ((*MIXTURE, "--validation", "groups.csv"), "validation: got 'a', want one of the columns"),
        ((*MIXTURE, "--model", "oracle"), "model: got 'oracle'"),
        ((*MIXTURE, "--report", "no/page.html"), "report: got no/page.html"),
    ],
)
def test_what_makes_no_sense(here: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(here.iterdir())
    done = invoke(*arguments)
    assert isinstance(done.exception, InputError), done.output
    assert str(done.exception).startswith(message)
    assert "\n" not in str(done.exception)
    assert sorted(here.iterdir()) == before
