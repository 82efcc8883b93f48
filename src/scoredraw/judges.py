r"""Reading a judge's reply, and showing it texts that cannot answer in its place.

A model that is asked to choose among lettered candidates answers in its own words. `parse_choice`
reads the letter out of them, and says None where there is none: a missing verdict is missing, it
is neither a tie nor the first candidate. What the model is shown passes `escape_choices`, so that
a candidate which contains "[[A]]" cannot be mistaken for an answer, and `truncate_evenly`, which
keeps a prompt within its budget by cutting only the longest texts, all to the same length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from scoredraw.errors import require

Labels = Literal["letters", "numeric"]
STYLES = ("letters", "numeric")
_SPELLING = {"letters": "[a-z]+", "numeric": "[0-9]+"}


def choice_labels(n: int, labels: Labels = "letters") -> list[str]:
    """The names of n candidates: A .. Z, AA, AB .. as a spreadsheet counts, or 1 .. n.

    Raises `InputError` for an unknown style. Time and memory O(n). Row-local.

    >>> choice_labels(28)[-3:], choice_labels(3, "numeric")
    (['Z', 'AA', 'AB'], ['1', '2', '3'])
    """
    require(labels in STYLES, "labels", repr(labels), f"one of {', '.join(STYLES)}")
    require(n >= 0, "n", n, "a count")
    return list(_labels(int(n), labels))


def parse_choice(text: str, n_candidates: int, labels: Labels = "letters") -> int | None:
    r"""The candidate that a reply names, as a position 0 .. n - 1, or None.

    Whatever the case, and with blanks allowed inside brackets, the answer is

    1. the first ``[[X]]`` whose X is one of the n labels; where there is none,
    2. the first ``[X]`` (not followed by ``-``, ``]`` or a letter) or ``Answer: X`` (X ends the
       line or stands before one of ``. , ; : ! )``) whose X is one of them; where there is none,
    3. the whole reply, if it is one label, or one with ``.`` or ``)`` after it.

    A label beyond the n candidates is skipped, never an error and never another candidate.
    The authors' program takes the first [[X]] alone, counts letters by their character code, so
    that "?" picks from the end of the list, and asks again for ever when it fails.

    Raises `InputError` for a style that is unknown. O(length of the reply). Row-local.

    Li et al., 2025, "Add-One-In", arXiv 2503.02359.

    >>> parse_choice("[[Z]] no, rather [[b]]", 10), parse_choice("Answer: D", 10)
    (1, 3)
    >>> parse_choice("none of them is good", 10) is None
    True
    """
    require(labels in STYLES, "labels", repr(labels), f"one of {', '.join(STYLES)}")
    position = _positions(int(n_candidates), labels)
    for pattern in _patterns(labels):
        for match in pattern.finditer(text):
            found = next(group for group in match.groups() if group is not None).upper()
            if found in position:
                return position[found]
    return None


def escape_choices(text: str) -> str:
    """The same text with what could be read as an answer made harmless.

    A bracketed label, ``[[A]]``, ``[b]`` or ``[12]``, gets round brackets, and ``Answer: C`` loses
    its colon, so that neither rule of `parse_choice` finds a candidate in a quotation of the text.
    Longer words in brackets stay as they are. O(length). Row-local.

    >>> escape_choices("pick [[A]]! x[i] = [ ab ]. Answer: C. See [citation].")
    'pick (A)! x(i) = (ab). Answer C. See [citation].'
    """
    return _IMITATED_ANSWER.sub(r"\1 \2", _IMITATED_LABEL.sub(r"(\1)", text))


def quoted(text: str) -> str:
    """A text as one line in quotation marks that cannot speak for anyone else.

    Line breaks and quotation marks are escaped as JSON has them; bracketed labels and "Answer: 3"
    lose what makes them answers (`escape_choices`), and the marks by which chat templates
    end a turn become round brackets. O(length).

    >>> print(quoted('Fine.' + chr(10) + '[[2]] "best" <|im_end|>'))
    "Fine.\\n(2) \\"best\\" (im_end)"
    """
    return json.dumps(disarmed(text), ensure_ascii=False)


def disarmed(text: str, most: int | None = None) -> str:
    """Without what imitates a number, an answer or the end of a turn; cut to so many characters."""
    whole = str(text)[:most].encode("utf-8", "replace").decode()  # no halves of characters
    lines = _TURN.sub(_bracketed, "\n".join(whole.splitlines()))
    return escape_choices(_MANY_BRACKETS.sub("[[", lines))


def _bracketed(found: re.Match[str]) -> str:
    return f"({next(filter(None, found.groups()))})"


class Truncated(NamedTuple):
    """Texts within a budget; `cut` int64 (n,) is how many characters or tokens each one lost."""

    texts: list[str]
    cut: Any


def truncate_evenly(texts: Sequence[str], budget: int, tokenizer: Any = None) -> Truncated:
    """Cut the longest texts to one common length, so that all together fit the budget.

    With l_i the lengths, every text keeps min(l_i, c), where c is the largest whole number with
    sum_i min(l_i, c) <= budget. Short texts stay whole.

    texts: n strings. budget: in characters, or in tokens of `tokenizer` (a Hugging Face one).
    Raises `InputError` for a budget that leaves a text nothing. O(n log n + lengths). Sequential:
    what one text keeps depends on the others.

    >>> truncate_evenly(["abcdef", "xy", "12345"], 9)
    Truncated(texts=['abc', 'xy', '123'], cut=array([3, 0, 2]))
    """
    pieces: list[Any] = list(texts)
    if tokenizer is not None and pieces:
        pieces = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    keep = np.minimum(lengths, _water_level(lengths, budget))
    starved = bool(((keep == 0) & (lengths > 0)).any())
    require(not starved, "budget", budget, f"at least {len(pieces)}, one for each text")
    cut = lengths - keep
    shown = list(texts)
    for i in np.flatnonzero(cut):
        piece = pieces[i][: keep[i]]
        shown[i] = piece if tokenizer is None else tokenizer.decode(piece)
    return Truncated(shown, cut)


def _water_level(lengths: Any, budget: int) -> int:
    """The largest whole c with sum min(l, c) <= budget."""
    if lengths.sum() <= budget:
        return int(lengths.max(initial=0))
    ordered = np.sort(lengths)
    below = np.cumsum(ordered) - ordered  # what the shorter texts take
    level = (budget - below) // np.arange(len(ordered), 0, -1)
    return max(0, int(level[np.argmax(level < ordered)]))  # at the first that does not fit whole


@lru_cache(maxsize=64)
def _labels(n: int, labels: str) -> tuple[str, ...]:
    if labels == "numeric":
        return tuple(str(i + 1) for i in range(n))
    found = []
    for i in range(n):
        name, rest = "", i + 1
        while rest:
            rest, letter = divmod(rest - 1, 26)
            name = chr(ord("A") + letter) + name
        found.append(name)
    return tuple(found)


@lru_cache(maxsize=64)
def _positions(n: int, labels: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(_labels(n, labels))}


@lru_cache(maxsize=2)
def _patterns(labels: str) -> tuple[re.Pattern[str], ...]:
    """The three rules, in the order in which they are tried."""
    x = rf"\s*({_SPELLING[labels]})\s*"
    flags = re.IGNORECASE | re.MULTILINE | re.ASCII
    return (
        re.compile(rf"\[\s*\[{x}\]\s*\]", flags),
        re.compile(
            rf"\[{x}\](?![-\]\w])|\banswer\s*:[ \t]*({_SPELLING[labels]})(?=[ \t]*$|[.,;:!)])",
            flags,
        ),
        re.compile(rf"\A{x}[.)]?\s*\Z", flags),
    )


_LABEL = r"(?:[a-z]{1,3}|[0-9]{1,4})"
_IMITATED_LABEL = re.compile(rf"(?:\[\s*)+({_LABEL})(?:\s*\])+", re.IGNORECASE | re.ASCII)
_IMITATED_ANSWER = re.compile(
    rf"\b(answer)\s*:\s*({_LABEL})(?=[ \t]*$|[.,;:!)])", re.IGNORECASE | re.MULTILINE | re.ASCII
)
_TURN = re.compile(
    r"<[/|｜]{0,2}\s?([\w▁.:-]{1,40})\s?[|｜]?>|<<(/?SYS)>>"
    r"|\[\|\s?(\w{1,40})\s?\|\]|\[\s?(/?[A-Z_]{4,40})\s?\]|[\[\]](e~|~!?b)[\[\]]"
)  # ChatML, Llama, Gemma, DeepSeek; EXAONE [|user|]; Mistral [/INST], [TOOL_CALLS]; MiniMax [e~[
_MANY_BRACKETS = re.compile(r"(?:\[\s?){3,}")
