"""Samples of a small model on GSM8K: how the file data/gsm8k-smollm2.jsonl.gz was made.

    python -m scoredraw.papers.gsm8k_answers test.jsonl samples.jsonl

SmolLM2-135M-Instruct answers the first 100 problems of the test set 32 times each, after four
short examples from its end, at temperature 0.7, nothing else cut off, up to 160 tokens. `logprob`
is the model's own (temperature 1), the token that ended the sample included. About an hour on one
core; a killed run goes on where it was.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scoredraw.journal import Journal
from scoredraw.models import Completion, TransformersModel
from scoredraw.small_models import small_model

PROBLEMS, SAMPLES, PORTION = 100, 32, 2
TEMPERATURE, MAX_TOKENS = 0.7, 160
LAST, SHOTS, SHORT = 200, 4, 330  # examples: of the last problems, the first so short
CALCULATOR = re.compile(r"<<.*?>>")
ANSWER = re.compile(r"answer is:?\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def final_number(text: str) -> str | None:
    """The number after the last "answer is", without separators and idle decimals.

    >>> final_number("So 3 * 400 = 1200. The answer is $1,200.00."), final_number("It is 7.")
    ('1200', None)
    """
    found = ANSWER.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """A number as text, the same for 1,200 and 1200.00."""
    number = text.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def truth_of(problem: dict[str, str]) -> str:
    """The final answer of a GSM8K problem."""
    return plain_number(problem["answer"].split("####")[1].strip())


def few_shot(problems: Sequence[dict[str, str]]) -> str:
    """The examples that stand before every question."""
    short = [p for p in problems[-LAST:] if len(p["question"]) + len(p["answer"]) < SHORT]
    return "".join(_example(p) for p in short[:SHOTS])


def _example(problem: dict[str, str]) -> str:
    steps = CALCULATOR.sub("", problem["answer"].split("####")[0]).strip().replace("\n", " ")
    answer = f"{steps} The answer is {truth_of(problem)}."
    return f"Question: {problem['question']}\nAnswer: {answer}\n\n"


def sample_row(problem: dict[str, str], sample: Completion) -> dict[str, Any]:
    """A sample as a row of the file."""
    assert sample.logprobs is not None
    answer, truth = final_number(sample.text), truth_of(problem)
    return {
        "problem": problem["question"],
        "truth": truth,
        "answer": answer,
        "correct": answer == truth,
        "logprob": round(sample.logprob, 4),
        "tokens": len(sample.logprobs),
        "text": sample.text.strip(),
    }


def main(source: str, target: str) -> None:
    """Sample what is not yet in the journal beside the target, then write the target."""
    problems = [json.loads(line) for line in Path(source).read_text().splitlines()]
    shots = few_shot(problems)
    journal = Journal(target + ".journal")
    done = {entry["problem"]: entry["rows"] for entry in journal.records()}
    model: TransformersModel | None = None
    for first in range(0, PROBLEMS, PORTION):
        if all(p in done for p in range(first, first + PORTION)):
            continue
        model = model or TransformersModel(*small_model())
        part = problems[first : first + PORTION]
        prompts = [f"{shots}Question: {p['question']}\nAnswer:" for p in part]
        samples = model.sample_all(
            prompts, SAMPLES, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, stop=["\n"],
            seed=0, first=first,
        )  # fmt: skip
        for place, (problem, made) in enumerate(zip(part, samples, strict=True), first):
            rows = [sample_row(problem, sample) for sample in made]
            journal.append({"problem": place, "rows": rows})
            done[place] = rows
            right = sum(row["correct"] for row in rows)
            print(f"problem {place + 1} of {PROBLEMS}: {right} of {SAMPLES} right", flush=True)
    every = [row for problem in range(PROBLEMS) for row in done[problem]]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in every]
    Path(target).write_text("".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
