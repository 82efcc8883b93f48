"""Sampled answers to problems, read from a table: a row a sample, or a row a problem with lists.

The columns `problem` and `correct` are enough for coverage; `answer`, `reward`, `logprob`, `text`,
`tokens` (the sample's length) and `path` (which samples are the same text) bring the ways of
choosing among answers. Without `answer` the texts are the answers. Problems keep the order in which
they first appear, samples their order within a problem; problems may have different numbers of
samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.answers import AnswerPool, Equal, Key, group_ragged
from scoredraw.errors import InputError, require

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# name -> file in the package; see data/README.md for where they come from
BUNDLED = {
    "gsm8k-solutions": "gsm8k-solutions.jsonl.gz",
    "smollm2-arith": "smollm2-arith.jsonl.gz",
    "gsm8k-smollm2": "gsm8k-smollm2.jsonl.gz",
}
COLUMNS = ("problem", "correct", "answer", "reward", "logprob", "tokens", "text", "path")


@dataclass(frozen=True, eq=False)
class Samples:
    """Problems and their samples; those of problem g lie at offsets[g]:offsets[g + 1].

    problems: G names. offsets: int64 (G + 1,). correct: bool (m,). answers: m values, None where
    none was found. rewards, logprobs (nats, at most 0) and tokens: float64 (m,). texts: m strings;
    paths: int64 (m,), equal for the same text. places: int64 (m,), the sample's row in the table.
    What the table lacks is None (`correct` only where it was not asked for).
    """

    name: str
    problems: tuple[str, ...]
    offsets: Int
    correct: npt.NDArray[np.bool_] | None
    answers: npt.NDArray[np.object_] | None = None
    rewards: Float | None = None
    logprobs: Float | None = None
    tokens: Float | None = None
    texts: npt.NDArray[np.object_] | None = None
    paths: Int | None = None
    places: Int | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def counts(self) -> Int:
        """Samples of each problem, int64 (G,)."""
        return np.diff(self.offsets)

    @cached_property
    def right(self) -> Int:
        """Correct samples of each problem, int64 (G,)."""
        return np.add.reduceat(self.grades.astype(np.int64), self.offsets[:-1])

    @property
    def grades(self) -> npt.NDArray[np.bool_]:
        """Which samples are correct, bool (m,); InputError where the table did not say."""
        require(self.correct is not None, "correct", "no such column", "a grade of every sample")
        assert self.correct is not None
        return self.correct

    def rows(self, problem: int) -> slice:
        """Where the samples of a problem lie."""
        return slice(int(self.offsets[problem]), int(self.offsets[problem + 1]))

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Which of some columns the table did not have.

        >>> read_samples("gsm8k-solutions").lacks(("answer", "logprob"))
        ['logprob']
        """
        here = {"answer": self.answers, "reward": self.rewards, "logprob": self.logprobs,
                "tokens": self.tokens, "text": self.texts, "correct": self.correct}  # fmt: skip
        return [column for column in columns if here[column] is None]

    def pools(self, *, equal: Equal | None = None, key: Key | None = None) -> Iterator[AnswerPool]:
        """The pool of each problem; answers are grouped once (see `answers.group_ragged`).

        Without answers every sample is an answer of its own: votes then mean nothing, scores do.
        Raises InputError, naming the problem, for what an `AnswerPool` refuses.
        """
        answers = np.arange(self.offsets[-1]) if self.answers is None else self.answers
        codes = group_ragged(answers, self.offsets, equal=equal, key=key)
        for problem, name in enumerate(self.problems):
            here = self.rows(problem)
            mine = codes[here]
            first = np.unique(mine, return_index=True)[1][int((mine < 0).any()) :]
            known = {
                "rewards": self.rewards, "logprobs": self.logprobs, "lengths": self.tokens,
                "texts": self.texts, "paths": self.paths,
            }  # fmt: skip
            parts: dict[str, Any] = {k: None if v is None else v[here] for k, v in known.items()}
            try:
                yield AnswerPool(mine, **parts, answers=tuple(answers[here][first]))
            except InputError as error:
                raise InputError(f"problem {name[:60]!r}: {error}") from None


def read_samples(
    source: Any, columns: Mapping[str, str] | None = None, *, graded: bool = True
) -> Samples:
    """Read samples from a file, a glob, a folder, a frame, a mapping of columns, or by name.

    source: as in `tables.open_table`, or one of `BUNDLED`. columns: other names for `problem`,
    `correct`, `answer`, `reward`, `logprob`, `tokens`, `text`, `path`. `correct` is true/false or
    0/1; a column of lists holds one problem a row (`problem` may then be left out). graded: whether
    `correct` must be there. A missing answer (null, NaN or
    empty text) is a sample without an answer; one that is marked correct all the same counts for
    coverage but is no choice, and a warning says how many there are.

    Raises InputError for missing or unknown columns, an empty problem, a `correct` that is missing
    or neither 0 nor 1, a reward that is not finite, a log-probability that is missing or above
    zero, a length below one.

    >>> table = {"problem": ["a", "a", "b"], "correct": [True, False, False]}
    >>> samples = read_samples(table)
    >>> samples.problems, samples.counts.tolist(), samples.right.tolist()
    (('a', 'b'), [2, 1], [1, 0])
    """
    if isinstance(source, Samples):
        return source
    named = dict(columns or {})
    for role in named:
        require(role in COLUMNS, "columns", repr(role), f"one of {', '.join(COLUMNS)}")
    name = Path(source).name if isinstance(source, str) else "samples"
    return _from_columns(name, _read(located(source), named, graded))


def located(source: Any) -> Any:
    """Where the samples of a bundled name lie, for `tables.open_table`; other sources as they are.

    >>> located("samples.jsonl")
    'samples.jsonl'
    """
    if isinstance(source, str) and source in BUNDLED and not Path(source).exists():
        return str(Path(__file__).parent / "data" / BUNDLED[source])
    return source


def _read(source: Any, named: dict[str, str], graded: bool) -> dict[str, Any]:
    """The columns there are, by their role, as Arrow arrays without lists."""

    from scoredraw.tables import open_table

    table = open_table(source)
    for role, column in named.items():
        table.require_columns([column], role)
    roles = {role: named.get(role, role) for role in COLUMNS}
    roles = {role: column for role, column in roles.items() if column in table.column_names}
    if graded:
        table.require_columns([named.get("correct", "correct")], "correct")
    said = [role for role in ("correct", "answer", "text") if role in roles]
    wanted = "a column of answers or texts (or of grades)"
    require(bool(said), "input", f"columns {', '.join(table.column_names)}", wanted)
    found = table.read(list(dict.fromkeys(roles.values())))
    arrays = {role: found[column].combine_chunks() for role, column in roles.items()}
    if _listed(arrays[said[0]]):
        return _flat(arrays, said[0])
    table.require_columns([roles.get("problem", "problem")], "problem")
    return arrays


def _listed(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(column.type) or pa.types.is_large_list(column.type))


def _flat(arrays: dict[str, Any], first: str) -> dict[str, Any]:
    """One problem a row, lists of samples (in the column `first` too) -> one sample a row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(arrays[first])
    sizes = lengths.fill_null(0).to_numpy(zero_copy_only=False)
    empty = np.flatnonzero(sizes == 0)
    require(len(empty) == 0, first, f"row {_first(empty)} without samples", "at least one")
    problem = np.repeat(np.arange(len(sizes)), sizes)
    names = arrays.get("problem", pa.array(np.arange(len(sizes)).astype(str)))
    flat = {"problem": names.take(pa.array(problem))}
    for role, column in arrays.items():
        if role == "problem":
            continue
        same = _listed(column) and pc.list_value_length(column).equals(lengths)
        require(same, role, f"lists of other lengths than {first}'s", "one value a sample")
        flat[role] = column.flatten()
    return flat


def _from_columns(name: str, columns: dict[str, Any]) -> Samples:
    """Check the columns, and bring the samples of a problem together."""

    problem = columns["problem"]
    require(problem.null_count == 0, "problem", "an empty cell", "a problem in every row")
    encoded = problem.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    order = np.argsort(codes, kind="stable")
    correct = _numbers(columns, "correct")
    if correct is not None:
        _check(correct, "correct", (correct == 0) | (correct == 1), "true or false, 1 or 0")
    rewards, logprobs, tokens = (_numbers(columns, r) for r in ("reward", "logprob", "tokens"))
    for role, values, low, high in (
        ("reward", rewards, -np.finfo(float).max, np.finfo(float).max),
        ("logprob", logprobs, -np.inf, 0.0),
        ("tokens", tokens, 1.0, np.finfo(float).max),
    ):
        wanted = {"reward": "a finite number", "logprob": "at most 0", "tokens": "at least 1"}[role]
        if values is not None:
            _check(values, role, (low <= values) & (values <= high), wanted)
    texts = None if "text" not in columns else _strings(columns["text"])
    answers = _answers(columns, texts)
    if answers is not None and correct is not None:
        mute = int(correct[[answer is None for answer in answers]].sum())
        if mute:
            text = f"{mute:,} samples are marked correct but have no answer: none can be chosen"
            warnings.warn(text, stacklevel=3)
    paths = None
    if "path" in columns:
        require(columns["path"].null_count == 0, "path", "an empty cell", "one in every row")
        indices = columns["path"].dictionary_encode().indices
        paths = indices.to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.bincount(codes)

    def ordered(values: Any) -> Any:
        return None if values is None else values[order]

    return Samples(
        name,
        tuple(str(value) for value in encoded.dictionary.to_pylist()),
        np.concatenate([[0], np.cumsum(counts)]),
        ordered(None if correct is None else correct == 1),
        ordered(answers), ordered(rewards), ordered(logprobs), ordered(tokens), ordered(texts),
        ordered(paths), order,
    )  # fmt: skip


def _strings(column: Any) -> npt.NDArray[np.object_]:
    import pyarrow as pa

    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    require(text or pa.types.is_null(column.type), "text", f"values of type {column.type}", "text")
    return np.array([value or "" for value in column.to_pylist()] + [None], object)[:-1]


def _answers(
    columns: dict[str, Any], texts: npt.NDArray[np.object_] | None
) -> npt.NDArray[np.object_] | None:
    """The answers, None where there is none; without a column of them the texts."""
    import pyarrow as pa

    if "answer" not in columns:
        return None if texts is None else np.array([t or None for t in texts] + [None], object)[:-1]
    kind = columns["answer"].type
    require(not pa.types.is_nested(kind), "answer", f"values of type {kind}", "text or numbers")
    return np.array([_known(v) for v in columns["answer"].to_pylist()] + [None], object)[:-1]


def _numbers(columns: dict[str, Any], role: str) -> Float | None:
    import pyarrow as pa

    if role not in columns:
        return None
    column = columns[role]
    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    require(number or pa.types.is_null(kind), role, f"values of type {kind}", "numbers")
    if not pa.types.is_floating(kind):
        column = column.cast(pa.float64()) if number else pa.nulls(len(column), pa.float64())
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def _known(value: Any) -> Any:
    """The answer, None for one that is missing."""
    return None if value is None or value != value or value == "" else value


def _check(values: Float, role: str, fine: npt.NDArray[np.bool_], wanted: str) -> None:
    wrong = np.flatnonzero(~fine)
    if len(wrong):
        value = values[wrong[0]]
        came = "nothing (or NaN)" if np.isnan(value) else f"{value:g}"
        raise InputError(f"{role}: got {came} in row {_first(wrong)}, want {wanted}")


def _first(rows: Int) -> str:
    return f"{int(rows[0]):,}" if len(rows) else ""
