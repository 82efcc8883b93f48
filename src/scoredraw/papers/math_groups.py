"""Groups of real answers: 100 problems of MATH, eight sampled answers each, and their scores.

From the evaluation example of Qwen2.5-Math as PURE redistributes it (MIT): whether an answer is
right, and what a reward model gives it. 86 groups are all right, 4 all wrong.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def math_groups() -> tuple[dict[str, Any], ...]:
    """A row a problem: question, gt, level, and lists correct (0 or 1), rm_score and responses.

    >>> rows = math_groups()
    >>> len(rows), len(rows[0]["responses"]), sum(sum(row["correct"]) == 8 for row in rows)
    (100, 8, 86)
    """
    path = resources.files("scoredraw").joinpath("data", "math-groups.jsonl.gz")
    with path.open("rb") as file:
        return tuple(map(json.loads, gzip.decompress(file.read()).decode().splitlines()))
