"""Answers compared as mathematics: 1/2, 0.5 and \\frac{1}{2} are the same.

Parsing and comparing are the package math-verify's. Each distinct text is parsed once.
"""

from __future__ import annotations

import logging
import signal
import threading
from functools import lru_cache
from typing import Any

from scoredraw.errors import import_extra

LONGEST = 2_000  # characters: no answer, and parsing it would take for ever
SECONDS = 2  # for one: what takes longer (9**9**9**9 would take for ever) can't be read


def math_equal(a: Any, b: Any) -> bool:
    """Whether two answers are the same mathematics; for `group_answers(..., equal=math_equal)`.

    Texts are read as LaTeX or plain expressions, the last one in the text; what can't be read is
    equal to the same text only. Not transitive in odd cases (rounded decimals), so the order of the
    answers may decide. Raises `MissingExtraError` without math-verify. A comparison takes about a
    millisecond; one of a text above 2,000 characters compares texts. What takes more than 2 seconds
    is not equal; there is no such limit outside the main thread, on Windows, or where an alarm of
    one's own is set.

    >>> math_equal("1/2", "0.5"), math_equal("1,200", 1200), math_equal("7", "8")  # doctest: +SKIP
    (True, True, False)
    """
    left, right = str(a).strip(), str(b).strip()
    if left == right:
        return True
    gold, said = _parsed(left), _parsed(right)
    if not gold or not said:
        return False
    verify = import_extra("math_verify", "language").verify
    return bool(verify(list(gold), list(said), timeout_seconds=_seconds()))


@lru_cache(2**16)
def _parsed(text: str) -> tuple[Any, ...]:
    math_verify = import_extra("math_verify", "language")
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that there is no limit
        logging.getLogger(name).setLevel(logging.ERROR)
    if len(text) > LONGEST:
        return ()
    return tuple(math_verify.parse(text, parsing_timeout=_seconds()))


def _seconds() -> int | None:
    """The time limit of math-verify, which works by an alarm; None where that can't be set."""
    alone = threading.current_thread() is threading.main_thread()
    free = hasattr(signal, "SIGALRM") and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    return SECONDS if alone and free else None


def equality(name: str) -> Any:
    """ "exact" -> None (as Python compares), "math" -> `math_equal`; otherwise an InputError."""
    from scoredraw.errors import require

    require(name in ("exact", "math"), "equal", repr(name), "exact or math")
    return math_equal if name == "math" else None
