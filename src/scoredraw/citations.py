"""BibTeX for the papers of the catalogue.

A paper that appeared somewhere is cited there, with its arXiv id as the eprint; one that did not
is cited as the preprint.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scoredraw.registry import Paper

JOURNALS = ("TMLR", "Dialogue & Discourse")
LATEX = {"ℓp": r"$\ell_p$", "&": r"\&", "%": r"\%", '"': "''", "–": "--"}


def bibtex(paper: Paper) -> str:
    r"""One entry: an article, a paper in proceedings, or a preprint, whose key is slug-year.

    >>> from scoredraw.registry import paper
    >>> print(bibtex(paper(1)))
    @inproceedings{lp-sensitivity-2023,
      title = {{Sharper Bounds for $\ell_p$ Sensitivity Sampling}},
      author = {Woodruff and Yasuda},
      year = {2023},
      booktitle = {ICML},
      eprint = {2306.00732},
      archiveprefix = {arXiv},
      url = {https://arxiv.org/abs/2306.00732},
    }
    """
    venue = paper.published.removesuffix(str(paper.year)).strip()
    kind, container = "inproceedings", "booktitle"
    if venue == "arXiv":
        kind, container = "misc", ""
    elif venue in JOURNALS:
        kind, container = "article", "journal"
    fields = {
        "title": f"{{{_latex(paper.title)}}}",
        "author": " and ".join(name for name in re.split(r", | and ", paper.authors) if name),
        "year": str(paper.year),
        container: _latex(venue),
        "eprint": paper.arxiv,
        "archiveprefix": "arXiv" if paper.arxiv else "",
        "url": paper.url,
        "note": f"Later titled: {_latex(paper.retitled)}" if paper.retitled else "",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if name and value]
    return "\n".join([f"@{kind}{{{paper.slug}-{paper.year},", *lines, "}"])


def _latex(text: str) -> str:
    # An opening quotation mark stands at the start or after a space; the rest close.
    text = re.sub(r'(^|\s)"', r"\1``", text)
    for plain, escaped in LATEX.items():
        text = text.replace(plain, escaped)
    return text
