"""Additions of two numbers of three digits, worked out a column a line, from the right.

State the final answer to the following arithmetic problem: 758 + 467 =
8+7=15
5+6+1=12
7+4+1=12
#1225
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from scoredraw.papers.small_policy import Problem, said

ASKED = "State the final answer to the following arithmetic problem: {} + {} =\n"
FAMILY = "column_sum"
DIGITS = 3
PROBLEMS, APART = 20_000, 300  # drawn, and kept from SFT


def additions(n: int, seed: int = 0) -> list[Problem]:
    """n different problems at most, as `small_policy.problems` has them."""
    found: dict[str, Problem] = {}
    for a, b in np.random.default_rng(seed).integers(10 ** (DIGITS - 1), 10**DIGITS, (n, 2)):
        prompt, answer = ASKED.format(a, b), str(a + b)
        target = "".join(f"{line}\n" for line in columns(str(a), str(b))) + "#" + answer
        found[prompt] = {"prompt": prompt, "answer": answer, "family": FAMILY, "target": target}
    return list(found.values())


def shown_additions() -> list[Problem]:
    """What SFT may learn from."""
    return additions(PROBLEMS)[APART:]


def dealt_additions(spared: int, tested: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Of those that SFT doesn't see: to train on, and numbers of them to tune by and test with."""
    rows, rest = additions(PROBLEMS)[:APART], tested + spared
    return rows[rest:], rows[tested:rest], rows[:tested]


def columns(a: str, b: str) -> list[str]:
    """The lines of a + b.

    >>> columns("758", "467")
    ['8+7=15', '5+6+1=12', '7+4+1=12']
    """
    lines, carry = [], 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}{'+1' * carry}={total}")
        carry = total // 10
    return lines


def score_columns(
    prompts: Sequence[str], steps: Sequence[Sequence[str]]
) -> list[list[float | None]]:
    """A process reward: 1 for a line that is the next column's, -1 for another sum.

    An answer after `#` is worth 1 if the lines before say so, read from the top; nothing where they
    are not all there. What is no sum has no score.

    >>> score_columns([ASKED.format(758, 467)], [["8+7=15", "hm", "5+6=11", "5+6+1=12", "#12"]])
    [[1.0, None, -1.0, 1.0, None]]
    """
    return [
        _next_columns(lines, *re.findall(r"\d+", prompt)[-2:])
        for prompt, lines in zip(prompts, steps, strict=True)
    ]


def _next_columns(lines: Sequence[str], a: str, b: str) -> list[float | None]:
    due, found = columns(a, b), list[float | None]()
    for line in lines:
        if re.fullmatch(r"\d\+\d(\+1)?=\d+", line.strip()):
            right = line.strip() == next(iter(due), None)
            due = due[right:]
            found.append(1.0 if right else -1.0)
        elif "#" in line and not due:
            found.append(1.0 if said(line) == str(int(a) + int(b)) else -1.0)
        else:
            found.append(None)
    return found
