"""The catalogue: 61 papers and the methods they brought, as strings until somebody asks for one.

`catalogue.toml` holds it all; this module parses it once and imports nothing heavy, so that a
command line can list, search and dispatch before NumPy is loaded. A method is known by its kind
(what it takes: "rows", "examples") and its name; `resolve` turns its "module:function" into code.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import tomllib
import unicodedata
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from scoredraw.citations import bibtex
from scoredraw.errors import InputError, MissingExtraError

# What brings a third-party package that a lazily imported module turned out to need.
EXTRA_OF_PACKAGE = {
    "torch": "torch",
    "diffusers": "diffusion",
    "networkx": "diffusion",
    "rdkit": "molecules",
    "transformers": "language",
    "sentence_transformers": "language",
    "openai": "language",
    "math_verify": "language",
    "sacrebleu": "language",
    "gguf": "language",
    "accelerate": "language",
    "trl": "rl",
    "datasets": "rl",
    "peft": "rl",
    "zenoh": "swarm",
    "ray": "ray",
    "jinja2": "web",
    "pandas": "frames",
    "polars": "frames",
}

# Words of a question that say nothing about its subject.
SMALL_WORDS = (
    "a an and are as at be by can do does for from have how i if in into is it me my of on or our"
    " so that the their them then there this to use want we what when where which who why will with"
    " you your"
)


@dataclass(frozen=True)
class Paper:
    """A paper: how it is cited, where its method lives here and how far that has come.

    task: the commands it serves, separated by commas ("run": Python and `scoredraw run` only).
    retitled: the title a later version bears, or "".
    """

    number: int
    slug: str
    title: str
    acronym: str
    arxiv: str
    published: str
    year: int
    room: str
    status: str
    task: str
    summary: str
    keywords: tuple[str, ...]
    api: tuple[str, ...]
    authors: str = ""
    retitled: str = ""

    @property
    def url(self) -> str:
        """The arXiv abstract page, or "" for a paper that is not there."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @property
    def experiment(self) -> str:
        """Where the experiment that reruns the paper's claims is found, as "module:function"."""
        return f"scoredraw.papers.p{self.number:02d}_{self.slug.replace('-', '_')}:run"


@dataclass(frozen=True)
class Method:
    """What `--method NAME` means for one kind of input.

    paper: its number; 0 for a baseline. function: computes the scores ("" where only `draw` is
    needed). scheme: the draw its scores get by default. draw: makes the whole draw itself, or "".
    easy: the end of the scores ("low" or "high") at which the least informative examples lie.
    takes: what it takes where that is not the kind's own input (see `example_inputs`).
    Of a choice among answers: needs: the columns of `samples.COLUMNS` it can't do without;
    standing: how each sample stands, for choices of several; confidence: what
    `answer_calibration.calibration_at_k` calls its confidence, "" where it has none.
    """

    kind: str
    name: str
    paper: int
    function: str
    scheme: str
    extra: str
    summary: str
    draw: str = ""
    easy: str = "low"
    takes: str = ""
    needs: tuple[str, ...] = ()
    standing: str = ""
    confidence: str = ""


@cache
def _catalogue() -> tuple[tuple[Paper, ...], tuple[Method, ...]]:
    tables = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    found = []
    for row in tables["paper"]:
        lists = {name: tuple(row[name]) for name in ("keywords", "api")}
        found.append(Paper(**{**row, **lists}))
    methods_ = [{**row, "needs": tuple(row.get("needs", ()))} for row in tables["method"]]
    return tuple(found), tuple(Method(**row) for row in methods_)


def papers() -> tuple[Paper, ...]:
    """All papers in the order of their numbers.

    >>> [paper.acronym for paper in papers() if paper.room == "coresets"]
    ['lp sensitivity']
    """
    return _catalogue()[0]


def paper(number_or_slug: int | str) -> Paper:
    """The paper of that number, slug, acronym, title or arXiv id; otherwise an `InputError`.

    >>> paper(16).slug, paper("2305.18424").acronym, paper("rs2").number
    ('rs2', 'RS2', 16)
    """
    text = str(number_or_slug)
    for candidate in papers():
        if _plain(text) in _names(candidate):
            return candidate
    known = {name: name for candidate in papers() for name in (candidate.slug, candidate.acronym)}
    wanted = f"a number from 1 to {len(papers())}, a slug or an arXiv id{_nearest(text, known)}"
    raise InputError(f"paper: got {text!r}, want {wanted}")


def search(text: str) -> tuple[Paper, ...]:
    """Papers about `text`, best first; every paper for an empty text.

    A word counts by its rarity in the catalogue times the weight of the best field it stands in
    (title and acronym, then keywords, then the rest), half where it only begins a word there. A
    paper named exactly (title, acronym, slug, number, arXiv id) comes first, then those that have
    the text as a keyword. Papers that score under a quarter of the best are left out.

    >>> search("root cause")[0].slug
    'coral'
    """
    every = set(_words(text))
    if not every:
        return papers()
    words = {word for word in every if word not in SMALL_WORDS.split()} or every
    weight = {word: _rarity(word) for word in words}
    ranked = []
    for candidate in papers():
        named = _plain(text) in _names(candidate)
        keyword = _plain(text) in {_plain(keyword) for keyword in candidate.keywords}
        score = sum(weight[word] * _field_weight(word, candidate) for word in words)
        if named or score > 0:
            ranked.append((2 * named + keyword, score, candidate))
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    best = max((score for _, score, _ in ranked), default=0.0)
    return tuple(found for exact, score, found in ranked if exact or score >= best / 4)


def methods(kind: str | None = None) -> tuple[Method, ...]:
    """The methods for one kind of input ("rows", "examples"), or all; an `InputError` otherwise.

    >>> [m.name for m in methods("rows")][:3]
    ['uniform', 'leverage', 'ridge-leverage']
    """
    every = _catalogue()[1]
    if kind is None:
        return every
    kinds = dict.fromkeys(m.kind for m in every)
    if kind not in kinds:
        raise InputError(f"kind: got {kind!r}, want {' or '.join(kinds)}{_nearest(kind, kinds)}")
    return tuple(m for m in every if m.kind == kind)


def method(kind: str, name: str) -> Method:
    """The method of that name for one kind of input; an `InputError` lists the names otherwise.

    >>> method("rows", "lewis").function
    'scoredraw.coresets.lewis:lewis_weights'
    """
    named = {m.name: m for m in methods(kind)}
    if name not in named:
        wanted = f"one of {', '.join(named)}{_nearest(name, named)}"
        raise InputError(f"method: got {name!r} for {kind}, want {wanted}")
    return named[name]


def resolve(reference: str, extra: str = "", argument: str = "reference") -> Any:
    """Import what "module:name" stands for (a function, a class, "Class.method").

    Raises `MissingExtraError` naming the extra (`extra`, or the one that brings the package) where
    an optional dependency is absent, and `InputError`, naming `argument`, for a reference that
    leads nowhere.

    >>> resolve("scoredraw.errors:require").__name__
    'require'
    """
    module, separator, name = reference.partition(":")
    if not (module and separator and name):
        raise InputError(f"{argument}: got {reference!r}, want 'module:function'")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        package = absent.partition(".")[0]
        if f"{module}.".startswith(f"{absent}."):
            raise InputError(f"{argument}: got {reference!r}, want an existing module") from error
        if package == "scoredraw":
            raise
        extra = extra or EXTRA_OF_PACKAGE.get(package, "all")
        hint = f"{package} is not installed: pip install 'scoredraw[{extra}]'"
        raise MissingExtraError(hint) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{argument}: got {reference!r}, want a name that {module} has")
        found = getattr(found, part)
    return found


def cite(thing: Any) -> str:
    """BibTeX entries of the papers behind `thing`, as text; "" where it is only a baseline.

    thing: a function or class of the library (or an object of such a class), a method's name, a
    paper's number, slug or acronym, a `Paper`, a `Method`, a `Draw` (its `.method`) or a `Report`
    (its `.paper`). An `InputError` is raised where it belongs to no paper in the catalogue.

    >>> print(cite("lewis").splitlines()[0])
    @inproceedings{lp-sensitivity-2023,
    """
    numbers = sorted(_papers_behind(thing) - {0})
    return "\n".join(bibtex(paper(number)) for number in numbers)


def _papers_behind(thing: Any) -> set[int]:
    if isinstance(thing, Paper):
        return {thing.number}
    if isinstance(thing, str):
        return {m.paper for m in methods() if m.name == thing} or {paper(thing).number}
    if isinstance(thing, int) and not isinstance(thing, bool):
        return {paper(thing).number}
    if isinstance(thing, partial):
        return _papers_behind(thing.func)
    if callable(thing) and hasattr(thing, "__qualname__"):
        return _papers_of_code(thing)
    numbers = getattr(thing, "paper", None)
    if isinstance(numbers, int):
        return {numbers}
    if isinstance(drawn := getattr(thing, "method", None), str):
        # A draw made from a draw names both ("lewis then poisson"); schemes are no paper's.
        words = re.findall(r"[\w-]+", drawn)
        return {m.paper for m in methods() if m.name in words}
    return _papers_of_code(type(thing))


def _papers_of_code(code: Any) -> set[int]:
    references = [(p.number, reference) for p in papers() for reference in p.api]
    references += [(m.paper, place) for m in methods() for place in (m.function, m.draw) if place]
    found = {number for number, reference in references if _stands_for(reference, code)}
    if not found:
        name = f"{code.__module__}:{code.__qualname__}"
        raise InputError(f"thing: got {name}, want a function or class of a paper in the catalogue")
    return found


def _stands_for(reference: str, code: Any) -> bool:
    """Whether `code` is what "module:name" leads to, or a method of that class."""
    module, _, name = reference.partition(":")
    if name not in (code.__qualname__, code.__qualname__.partition(".")[0]):
        return False
    # The catalogue names the public place; the definition may lie in another file of the room.
    public = getattr(sys.modules.get(module), name, None)
    return module == code.__module__ or (public is not None and public is code)


def _nearest(text: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(text.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plain(text: str) -> str:
    """The text with case, accents and typographic variants (ℓ, ³) put aside."""
    return " ".join(_words(text)) or text


def _words(text: str) -> list[str]:
    """Its words, plainly written and in the singular; an arXiv id is one word."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    bare = "".join(c for c in folded if not unicodedata.combining(c))
    words = re.findall(r"\d{4}\.\d{4,5}|\w+", bare)
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words]


@cache
def _names(entry: Paper) -> frozenset[str]:
    number = f"{entry.number:02d}"
    names = {entry.title, entry.retitled, entry.acronym, entry.slug, entry.arxiv, number}
    names |= {str(entry.number), f"{number}-{entry.slug}"}
    return frozenset(_plain(name) for name in names if name)


@cache
def _fields(entry: Paper) -> tuple[tuple[float, frozenset[str]], ...]:
    names = f"{entry.title} {entry.acronym} {entry.slug} {entry.arxiv} {entry.retitled}"
    rest = f"{entry.summary} {entry.authors} {entry.room} {entry.task} {entry.published}"
    weighted = ((3.0, names), (2.0, " ".join(entry.keywords)), (1.0, rest))
    return tuple((weight, frozenset(_words(text))) for weight, text in weighted)


def _field_weight(word: str, entry: Paper) -> float:
    whole = [weight for weight, words in _fields(entry) if word in words]
    if whole or len(word) < 3:
        return max(whole, default=0.0)
    begun = [w / 2 for w, words in _fields(entry) if any(o.startswith(word) for o in words)]
    return max(begun, default=0.0)


def _rarity(word: str) -> float:
    """log((1 + N) / (1 + n)), n of the N papers holding the word: common words weigh little."""
    holding = sum(_field_weight(word, entry) > 0 for entry in papers())
    return math.log((1 + len(papers())) / (1 + holding)) + 1e-3
