"""Claims' verdicts, the JSON of a report, and the page made of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw import reports
from scoredraw.drawing import VARIABLES, figure_svg
from scoredraw.errors import InputError
from scoredraw.metrics import Estimate
from scoredraw.pages import Page, report_page
from scoredraw.reports import Claim, Figure, Picture, Report, ReportTable, Series

pytestmark = pytest.mark.contract

numbers = st.floats(allow_nan=True, allow_infinity=False, width=32)
finite = st.floats(-1e6, 1e6)
texts = st.text(max_size=30)
estimates = st.builds(Estimate, numbers, numbers, numbers, st.integers(0, 99))
cells = estimates | numbers | st.integers() | texts | st.booleans() | st.none()
claims = st.builds(
    Claim, texts, texts, estimates | finite | texts | st.none(), texts,
    st.sampled_from(["holds", "fails", "undecided", None]),
)  # fmt: skip


@st.composite
def tables(draw) -> ReportTable:
    columns = draw(st.lists(texts, max_size=4))
    row = st.lists(cells, min_size=len(columns), max_size=len(columns))
    return ReportTable(draw(texts), columns, draw(st.lists(row, max_size=4)), draw(texts))


@st.composite
def series(draw) -> Series:
    n = draw(st.integers(0, 5))
    column = st.lists(numbers, min_size=n, max_size=n)
    ends = draw(st.booleans())
    low, high = (draw(column), draw(column)) if ends else (None, None)
    return Series(draw(texts), draw(column), draw(column), low, high, baseline=draw(st.booleans()))


figures = st.builds(
    Figure, st.sampled_from(["line", "bar", "scatter", "interval"]), texts, texts, texts,
    st.lists(series(), max_size=3), caption=texts,
    pictures=st.lists(st.builds(Picture, texts, st.just("iVBORw0KGgo=")), max_size=1),
)  # fmt: skip
full_reports = st.builds(
    Report, st.integers(1, 61), st.sampled_from(reports.SCALES), st.integers(0, 9), finite,
    st.lists(claims, max_size=3), st.lists(tables(), max_size=2), st.lists(figures, max_size=2),
    st.lists(texts, max_size=2), st.dictionaries(texts, texts, max_size=2), texts,
)  # fmt: skip


@pytest.mark.property
@given(full_reports)
def test_a_report_survives_strict_json(report: Report) -> None:
    text = report.to_json()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=refuse)
    assert Report.from_json(text).to_json() == text


def test_numpy_values_become_plain_numbers() -> None:
    table = ReportTable("t", ["a", "b", "c"], [[np.int64(3), np.float32(0.5), np.bool_(True)]])
    curve = Series("s", np.array([1, 2]), np.array([0.5, np.nan]), [0, 0], [1, 1])
    report = Report(
        1, "quick", 0, 1.0, tables=[table], figures=[Figure("line", "f", series=[curve])]
    )
    data = json.loads(report.to_json())
    assert data["tables"][0]["rows"] == [[3, 0.5, True]]
    assert data["figures"][0]["series"][0]["y"] == [0.5, None]
    back = Report.from_json(report.to_json()).figures[0].series[0]
    assert math.isnan(back.y[1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"paper": 1}', "null", "NaN"])
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^text: got [^\n]* want the JSON of a report$"):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (1.1, 1.5, "holds", "fails"),
        (0.5, 0.9, "fails", "holds"),
        (0.9, 1.1, "undecided", "undecided"),
        (1.0, 1.0, "holds", "holds"),
        (math.nan, math.nan, "undecided", "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, at_least, at_most) -> None:
    estimate = Estimate(1.0, low, high, 5)
    assert Claim.at_least("c", "p", estimate, 1.0).verdict == at_least
    assert Claim.at_most("c", "p", estimate, 1.0).verdict == at_most


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.2, 1.8, "holds"), (0.0, 0.9, "fails"), (2.1, 3.0, "fails"), (0.9, 1.2, "undecided")],
)
def test_within_a_range(low, high, verdict) -> None:
    assert Claim.within("c", "p", Estimate(1.5, low, high, 5), 1.0, 2.0).verdict == verdict
    assert Claim.within("c", "p", 1.5, 1.0, 2.0).verdict == "holds"


def test_a_claim_judged_by_its_own_rule() -> None:
    verdicts = [Claim.judge("c", "p", None, "r", holds).verdict for holds in (True, False, None)]
    assert verdicts == ["holds", "fails", "undecided"]


def test_ragged_tables_and_series_are_refused() -> None:
    with pytest.raises(InputError, match=r"^rows: got a row of 1 cells"):
        ReportTable("t", ["a", "b"], [[1]])
    with pytest.raises(InputError, match=r"^y: got 1 values .* want 2"):
        Series("s", [1, 2], [1])
    with pytest.raises(InputError, match=r"^low, high: got one of them"):
        Series("s", [1], [1], low=[0])
    with pytest.raises(InputError, match=r"^kind: got 'pie'"):
        Figure("pie", "t")  # type: ignore[arg-type]


def test_saving_stamps_where_it_ran(tmp_path) -> None:
    path = tmp_path / "r.json"
    Report(1, "quick", 0, 1.0).save(path)
    stamp = Report.from_json(path.read_text()).environment
    assert {"version", "commit", "date", "cpu", "cores", "python", "numpy"} <= set(stamp)
    assert stamp["numpy"] == np.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_commit_is_of_our_checkout_and_of_no_other(tmp_path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(reports, "PACKAGE", tmp_path)
    assert reports.commit() is None  # a checkout, but not of this package


def fake_paper(monkeypatch, run) -> None:
    module = types.ModuleType("scoredraw.papers.p01_fake")
    module.run = run
    monkeypatch.setattr(reports, "paper_module", lambda number: module)


@pytest.mark.parametrize(("scale", "verdict"), [("smoke", None), ("quick", "holds")])
def test_a_smoke_run_judges_nothing(monkeypatch, scale, verdict) -> None:
    claim = Claim.at_least("c", "p", 2.0, 1.0)
    fake_paper(monkeypatch, lambda scale, rng: Report(1, scale, rng, claims=[claim]))
    report = reports.run_paper(1, scale, seed=7)
    assert report.claims[0].verdict == verdict
    assert report.claims[0].measured == 2.0
    assert (report.seed, report.scale) == (7, scale)
    assert report.environment["date"]
    assert report.title == "Sharper Bounds for ℓp Sensitivity Sampling"


def test_a_paper_that_cannot_be_run_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^paper: got '99', want [^\n]*$"):
        reports.run_paper(99)
    planned = set(range(1, 62)) - set(reports.paper_modules())
    with pytest.raises(InputError, match=r"^paper: got \d\d \(.*want one that can be run[^\n]*$"):
        reports.run_paper(max(planned))
    with pytest.raises(InputError, match=r"^scale: got 'big'"):
        reports.run_paper(1, "big")


# ── pages ─────────────────────────────────────────────────────────────────────────────────────

EVIL = '<script>alert("x")</script> & $5 or $10'
CURVE = Series(EVIL, [1, 10, 100], [0.1, 0.2, 0.3], [0, 0.1, 0.2], [0.2, 0.3, 0.4])
BASE = Series("uniform", [1, 10, 100], [0.1, 0.2, 0.3], baseline=True)
NAMED = Series("gain", ["a", EVIL], [0.1, math.nan], [0.0, math.nan], [0.2, math.nan])
FIGURES = [
    Figure("line", EVIL, EVIL, EVIL, [BASE, CURVE], log_x=True, caption=EVIL),
    Figure("line", "many", series=[BASE, *[CURVE] * 9], log_x=True),
    Figure("bar", "bars", series=[NAMED, NAMED]),
    Figure("interval", "gain", series=[NAMED], reference=0.0),
    Figure("scatter", "cost", series=[Series("m", [1, 2], [1, 2], labels=["a", EVIL])]),
    Figure("pictures", "picks", pictures=[Picture(EVIL, 'x" onerror="alert(1)')]),
]


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that elements close in order."""

    void = frozenset(["meta", "img", "link", "br", "hr"])

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    report = Report(
        1, "quick", 0, 1.0, title=EVIL, notes=[EVIL], environment={"cpu": EVIL}, figures=FIGURES,
        claims=[Claim(EVIL, EVIL, EVIL, EVIL, "holds"), Claim("b", "", None, "", "fails")],
        tables=[
            ReportTable(EVIL, [EVIL, "n"], [[EVIL, -0.5], [None, Estimate(-1, -2, 0, 3)]], EVIL),
        ],
    )  # fmt: skip
    return report_page(report).html()


def test_a_page_is_well_formed_and_escapes_everything(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not [tag for tag, _ in reader.tags if tag in ("script", "link", "iframe")]
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "1 of 2 claims holds, 1 fails." in page


def test_a_page_loads_nothing_from_elsewhere(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    for _, attributes in reader.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href"):
                assert str(value).startswith(("data:image/png;base64,", "#"))
    outside = set(re.findall(r"(?:https?:)?//[\w.]+", page)) - {"http://www.w3.org"}
    assert outside == set()
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


@pytest.mark.parametrize("figure", FIGURES[:5], ids=lambda f: f.kind)
@pytest.mark.parametrize("width", [760, 380])
def test_a_figure_is_svg_in_the_pages_colours_and_font(figure: Figure, width: int) -> None:
    svg = figure_svg(figure, width)
    root = ET.fromstring(svg)
    assert root.attrib["viewBox"] == f"0 0 {width} {root.attrib['viewBox'].split()[-1]}"
    assert "width" not in root.attrib
    assert not any(colour in svg for colour in VARIABLES)
    assert "var(--ink)" in svg
    assert "DejaVu" not in svg
    assert root.findall(".//{http://www.w3.org/2000/svg}text")


def test_the_same_figure_is_drawn_the_same_way_twice() -> None:
    assert figure_svg(FIGURES[0]) == figure_svg(FIGURES[0])


def test_an_empty_page_is_a_page() -> None:
    reader = Reader()
    reader.feed(Page("nothing").html())
    assert "h1" in [tag for tag, _ in reader.tags]


def test_reading_reports_does_not_load_matplotlib() -> None:
    code = "import sys, scoredraw.pages; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
