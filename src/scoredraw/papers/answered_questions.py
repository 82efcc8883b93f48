"""Questions with answers that are right: grade school problems, and instructions of AlpacaFarm.

The problems are in the package. The instructions may not be handed on: $SCOREDRAW_ALPACAFARM names
a `val800.json`, a list of objects with input, output and qtype.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, require
from scoredraw.rl.relevance_reward import CONSTRAINED

VARIABLE = "SCOREDRAW_ALPACAFARM"
ALPACA, SCHOOL = "AlpacaFarm", "grade school problems"


@dataclass(frozen=True)
class Items:
    """Questions, their answers, and which have one exact answer."""

    name: str
    questions: list[str]
    answers: list[str]
    exact: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.questions)

    def head(self, n: int) -> Items:
        return Items(self.name, self.questions[:n], self.answers[:n], self.exact[:n])


def stored(name: str) -> list[dict[str, Any]]:
    """The rows of one of the package's files."""
    path = resources.files("scoredraw").joinpath("data", name)
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def school_problems() -> Items:
    rows = stored("gsm8k-preferences.jsonl.gz")
    questions, answers = ([row[key] for row in rows] for key in ("prompt", "chosen"))
    return Items(SCHOOL, questions, answers, np.ones(len(rows), np.bool_))


def instructions(path: Path) -> Items:
    """AlpacaFarm's; InputError for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        columns = [[str(row[key]) for row in rows] for key in ("input", "output", "qtype")]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{VARIABLE}: {path} cannot be read: {error!r}") from error
    require(len(rows) >= 8, VARIABLE, f"{len(rows)} items", "8 or more")
    questions, answers, kinds = columns
    return Items(ALPACA, questions, answers, np.array(kinds) == CONSTRAINED)


def by_words(texts: Sequence[str]) -> Any:
    """Words by TF-IDF, unit vectors (sparse), fitted on these texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(texts).transform
