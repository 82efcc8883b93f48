"""`scoredraw run` as a command function, on a paper made for the test and on the real ones."""

from __future__ import annotations

import json
import types

import pytest

from scoredraw import reports
from scoredraw.cli.run import run
from scoredraw.errors import InputError
from scoredraw.metrics import Estimate
from scoredraw.reports import Claim, Report

pytestmark = pytest.mark.contract


@pytest.fixture
def fake(monkeypatch) -> list[tuple[str, int]]:
    """Papers that only note what they are called with."""
    calls: list[tuple[str, int]] = []

    def experiment(scale: str, rng: int) -> Report:
        calls.append((scale, rng))
        claims = [
            Claim.at_least("gain", "more than 1 [sic]", Estimate(1.5, 1.2, 1.8, 9), 1.0),
            Claim("broken", "a number", float("nan"), "none", "undecided"),
        ]
        return Report(1, scale, rng, claims=claims)

    module = types.ModuleType("scoredraw.papers.p01_fake")
    module.run = experiment
    monkeypatch.setattr(reports, "paper_module", lambda number: module)
    return calls


def test_claims_are_printed_with_their_verdicts(fake, capsys) -> None:
    run(["01", "1", "lp-sensitivity"], scale="quick", seed=4)
    out, err = capsys.readouterr()
    assert fake == [("quick", 4)]  # the same paper three times is one run
    assert "more than 1 [sic]" in out
    assert "1.50 [1.20, 1.80]" in out
    assert "holds" in out
    assert "01-lp-sensitivity (quick)" in err
    assert "1 of 2 claims holds" in err


def test_json_is_the_promised_list(fake, capsys) -> None:
    run(["01", "02"], scale="smoke", as_json=True)
    out = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(out) == 2
    assert set(out[0]) == {"paper", "scale", "seed", "seconds", "claims"}
    first, second = out[0]["claims"]
    assert first["measured"] == {"value": 1.5, "low": 1.2, "high": 1.8, "n": 9}
    assert set(first) == {"name", "paper_says", "measured", "rule", "verdict"}
    assert first["verdict"] is None  # smoke
    assert second["measured"] is None


def test_out_gets_a_json_and_a_page_for_each_paper(fake, tmp_path) -> None:
    run(["01"], scale="quick", out=tmp_path / "deep" / "folder")
    files = sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir())
    assert files == ["01-lp-sensitivity.html", "01-lp-sensitivity.json"]
    report = Report.from_json((tmp_path / "deep" / "folder" / files[1]).read_text())
    assert report.claims[0].verdict == "holds"


@pytest.mark.parametrize(
    ("numbers", "scale", "message"),
    [
        (["01", "99"], "smoke", "^paper: got '99'"),
        (["nonsense"], "smoke", "^paper: got 'nonsense'"),
        (["01"], "huge", "^scale: got 'huge'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(fake, numbers, scale, message) -> None:
    with pytest.raises(InputError, match=message):
        run(numbers, scale=scale)
    assert fake == []


def test_a_planned_paper_is_refused_in_one_line() -> None:
    planned = max(set(range(1, 62)) - set(reports.paper_modules()))
    with pytest.raises(InputError, match=r"^paper: got [^\n]*want one that can be run[^\n]*$"):
        run([str(planned)], scale="smoke")


def test_out_that_is_a_file_is_refused(fake, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^out: got .* want a folder$"):
        run(["01"], out=tmp_path / "file")
    assert fake == []
