"""The catalogue: complete, findable, citable, and every name in it leads to code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw import registry
from scoredraw.cli import papers as command
from scoredraw.errors import InputError, MissingExtraError
from scoredraw.samples import COLUMNS

pytestmark = pytest.mark.contract

ROOMS = {
    "coresets",
    "data_selection",
    "ranking",
    "diffusion",
    "distillation",
    "language",
    "rl",
    "audit",
    "causal",
    "conformal",
    "routing",
    "graphs",
    "layer_selection",
}
VERBS = {"compare", "score", "draw", "plan", "generate", "train", "audit", "run"}
PAPERS = registry.papers()
named = pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.slug)


def test_there_are_61_papers_numbered_in_order():
    assert [paper.number for paper in PAPERS] == list(range(1, 62))


def test_slugs_acronyms_and_arxiv_ids_are_unique():
    for name in ("slug", "acronym", "title", "arxiv"):
        values = [getattr(paper, name).lower() for paper in PAPERS if getattr(paper, name)]
        assert len(set(values)) == len(values), name
        assert len(values) >= 60, name


@named
def test_fields_are_well_formed(paper):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.slug)
    assert re.fullmatch(r"(\d{4}\.\d{5})?", paper.arxiv)
    assert paper.published.endswith(f" {paper.year}")
    assert 2020 <= paper.year <= 2026
    if paper.arxiv:
        # What appeared somewhere did so in the year of its preprint or later.
        assert paper.year >= 2000 + int(paper.arxiv[:2])
    assert paper.room in ROOMS
    assert paper.status in {"planned", "building", "working"}
    assert {task.split()[0] for task in paper.task.split(", ")} <= VERBS
    assert 20 < len(paper.summary) < 300
    assert paper.summary.endswith(".")
    assert len(paper.keywords) >= 5
    assert len(set(paper.keywords)) == len(paper.keywords)
    assert bool(paper.api) == (paper.status != "planned")


def test_every_room_of_the_design_has_a_paper():
    assert {paper.room for paper in PAPERS} == ROOMS


@pytest.mark.parametrize(
    "reference", sorted({reference for paper in PAPERS for reference in paper.api})
)
def test_api_resolves(reference):
    found = _resolved(reference)
    assert callable(found) or re.search(r"pip install 'scoredraw\[[a-z]+\]'", str(found))


@pytest.mark.parametrize("method", registry.methods(), ids=lambda m: f"{m.kind}-{m.name}")
def test_methods_resolve(method):
    places = [place for place in (method.function, method.draw, method.standing) if place]
    assert places
    for place in places:
        found = _resolved(place, method.extra)
        assert callable(found) or f"scoredraw[{method.extra}]" in str(found)
    if method.kind in ("rows", "examples"):  # the others are chosen, sampled or trained
        assert callable(registry.resolve(f"scoredraw.sampling:{method.scheme}"))
    assert method.paper == 0 or registry.paper(method.paper).status != "planned"
    assert method.summary.endswith(".")
    assert set(method.needs) <= set(COLUMNS)


def _resolved(reference: str, extra: str = ""):
    """The code, or the error where an optional package is absent on this machine."""
    try:
        return registry.resolve(reference, extra)
    except MissingExtraError as error:
        return error


@named
def test_search_finds_a_paper_first_by_its_names(paper):
    for text in (paper.title, paper.acronym, paper.slug, paper.arxiv, paper.retitled):
        if text:
            assert registry.search(text)[0] is paper, text
            assert registry.search(text.upper())[0] is paper, text
            assert registry.paper(text) is paper, text
    assert registry.paper(paper.number) is paper
    assert registry.paper(f"{paper.number:02d}-{paper.slug}") is paper


@named
def test_search_finds_a_paper_by_every_keyword(paper):
    for keyword in paper.keywords:
        assert paper in registry.search(keyword), keyword


@pytest.mark.parametrize(
    ("question", "slug"),
    [
        ("coreset", "lp-sensitivity"),
        ("which examples to train on", "influence-scores-vog"),
        ("random subset every epoch", "rs2"),
        ("llm as a judge", "fair-eval"),
        ("root cause", "coral"),
        ("false discovery rate", "optcs"),
        ("sample a directed graph", "jdm-dcm-sampling"),
        ("treatment effects of a dose", "transtee"),
    ],
)
def test_search_answers_a_question(question, slug):
    assert registry.search(question)[0].slug == slug


def test_search_for_nothing_lists_all_and_for_nonsense_nothing():
    assert registry.search("") == PAPERS
    assert registry.search("  ?!") == PAPERS
    assert registry.search("xyzzyplugh") == ()


@pytest.mark.property
@given(st.text(max_size=60))
def test_search_takes_any_text(text):
    found = registry.search(text)
    assert len(set(found)) == len(found)
    assert set(found) <= set(PAPERS)


@pytest.mark.property
@given(st.sampled_from(PAPERS), st.randoms(use_true_random=False))
def test_search_does_not_depend_on_the_order_of_words(paper, random):
    words = paper.title.split()
    random.shuffle(words)
    assert paper in registry.search(" ".join(words))[:3]


@named
def test_cite_gives_the_paper(paper):
    entry = registry.cite(paper.number)
    assert entry.startswith("@")
    assert "\n@" not in entry
    assert entry.count("{") == entry.count("}")
    assert not paper.arxiv or f"eprint = {{{paper.arxiv}}}" in entry
    assert f"year = {{{paper.year}}}" in entry
    assert registry.cite(paper) == registry.cite(paper.slug) == entry
    assert registry.cite(SimpleNamespace(paper=paper.number)) == entry


def test_cite_keys_are_unique():
    keys = [registry.cite(paper).split("{")[1].split(",")[0] for paper in PAPERS]
    assert len(set(keys)) == 61


@pytest.mark.parametrize("method", registry.methods(), ids=lambda m: f"{m.kind}-{m.name}")
def test_cite_gives_the_paper_behind_a_method(method):
    expected = registry.cite(method.paper) if method.paper else ""
    assert registry.cite(method) == registry.cite(method.name) == expected
    assert registry.cite(SimpleNamespace(method=method.name)) == expected
    for place in (method.function, method.draw):
        if place:
            code = registry.resolve(place)
            assert registry.cite(code) == registry.cite(partial(code)) == expected


def test_cite_follows_a_draw_from_a_draw():
    both = registry.cite(SimpleNamespace(method="lewis then el2n then poisson"))
    assert re.findall(r"eprint = \{(.*)\}", both) == ["2306.00732", "2311.16298"]
    assert registry.cite(SimpleNamespace(method="poisson")) == ""


def test_cite_finds_code_by_its_public_place():
    for paper in PAPERS:
        for reference in paper.api:
            code = _resolved(reference)
            assert not callable(code) or paper.arxiv in registry.cite(code)


@pytest.mark.parametrize("thing", [print, 3.5, object(), "no such method", 0, 62, True])
def test_cite_refuses_what_it_does_not_know(thing):
    with pytest.raises(InputError):
        registry.cite(thing)


def test_errors_name_the_nearest():
    with pytest.raises(InputError, match=r"one of uniform, .*split.*mean 'leverage'") as error:
        registry.method("rows", "leverages")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"rows or examples.*mean 'rows'"):
        registry.methods("row")
    with pytest.raises(InputError, match="from 1 to 61"):
        registry.paper(99)
    with pytest.raises(InputError, match="mean 'fair-eval'"):
        registry.paper("faireva")


@pytest.mark.parametrize(
    "reference", ["", "module", "scoredraw.errors:", "scoredraw.nope:f", "scoredraw.errors:nope"]
)
def test_resolve_refuses_a_reference_that_leads_nowhere(reference):
    with pytest.raises(InputError, match="reference"):
        registry.resolve(reference)


def test_resolve_names_the_extra_of_an_absent_package(tmp_path, monkeypatch):
    (tmp_path / "needs_much.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "needs_ray.py").write_text("import ray.nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"scoredraw\[diffusion\]"):
        registry.resolve("needs_much:f", "diffusion")
    with pytest.raises(MissingExtraError, match=r"scoredraw\[all\]"):
        registry.resolve("needs_much:f")
    with pytest.raises(MissingExtraError, match=r"scoredraw\[ray\]"):
        registry.resolve("needs_ray:f")


def test_method_names_are_unique_within_a_kind():
    names = [(method.kind, method.name) for method in registry.methods()]
    assert len(set(names)) == len(names)
    kinds = {kind for kind, _ in names}
    assert kinds == {"rows", "examples", "answers", "texts", "images", "policies"}


def test_json_lists_the_papers(capsys):
    command.papers(search=None, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 61
    fields = {"number", "slug", "title", "arxiv", "published", "room", "status", "api"}
    for entry, paper in zip(listed, PAPERS, strict=True):
        assert set(entry) == fields
        assert entry["api"] == list(paper.api)
        assert {name: entry[name] for name in fields - {"api"}} == {
            name: getattr(paper, name) for name in fields - {"api"}
        }
    command.papers(search="RS2", as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["number"] == 16
    command.papers(search="xyzzyplugh", as_json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_the_table_has_a_line_for_each_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    command.papers(search=None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3].strip() for line in lines[1:]] == [f"{n:02d}" for n in range(1, 62)]
    assert max(map(len, lines)) <= 90
    assert [line.split()[-1] for line in lines[1:]] == [paper.status for paper in PAPERS]
    command.papers(search="xyzzyplugh", as_json=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no paper matches 'xyzzyplugh'" in shown.err


def test_the_markdown_table_links_every_preprint():
    rows = command.table_markdown().splitlines()[2:]
    assert len(rows) == 61
    for row, paper in zip(rows, PAPERS, strict=True):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7
        assert not paper.arxiv or f"(https://arxiv.org/abs/{paper.arxiv})" in row
    assert "`lewis`" in rows[0]
    assert "`RepeatedSampling`" in rows[15]


def test_the_registry_imports_nothing_heavy():
    heavy = ["numpy", "scipy", "sklearn", "pyarrow", "matplotlib", "torch", "rich", "typer", "ray"]
    program = (
        "import sys; before = set(sys.modules); from scoredraw import registry;"
        "registry.search('leverage'); registry.cite(1);"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
