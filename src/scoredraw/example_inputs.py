"""Training examples as a method takes them: features and labels, ratings, texts or pairs.

A method's `takes` in the catalogue says which of `READERS` opens its input; every reader has the
same arguments and returns the arrays that the method's function begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, require
from scoredraw.tables import Table, open_table

Float = NDArray[np.float64]
Int = NDArray[np.int64]

PAIR_COLUMNS = ("prompt", "chosen", "rejected")


def labelled(
    source: Any,
    *,
    target: Any,
    columns: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    text: str | None = None,
) -> tuple[Float, Int]:
    """Features float64 (n, d) and class indices (n,) of an input, encoded on all its rows."""
    from scoredraw.features import Encoder, has_sentence_encoder, read_examples, sentence_vectors

    require(target is not None, "target", "none", "the column of labels, for examples")
    data = source
    if isinstance(source, Table):
        names = columns or [name for name in source.column_names if name not in exclude]
        source.require_columns(names, "columns")
        for name, argument in ((target, "target"), (text, "text")):
            if isinstance(name, str):
                source.require_columns([name], argument)
        data = source.read(list(dict.fromkeys([*names, *([text] if text else []), target])))
    examples = read_examples(data, target, text=text, task="classification")
    rows, vectors = np.arange(len(examples)), None
    if examples.texts is not None and has_sentence_encoder():
        vectors = sentence_vectors(examples.texts)
    return Encoder(examples, rows, vectors).transform(rows), examples.y


def ratings(
    source: Any,
    *,
    target: Any = None,
    columns: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    text: str | None = None,
) -> tuple[Float]:
    """Quality ratings (n, K): an array, a table's numeric columns, or those measured on a text."""
    require(target is None, "target", repr(target), "none: a rating needs no label")
    if text is not None:
        from scoredraw import registry

        (texts,) = written(source, target=None, text=text)
        measure = registry.resolve("scoredraw.data_selection.text_metrics:text_metrics")
        return (np.asarray(measure(texts), np.float64),)
    if isinstance(source, np.ndarray):
        require(source.ndim == 2, "source", f"{source.ndim} dimensions", "examples and ratings")
        return (source.astype(np.float64),)
    table = open_table(source)
    names = columns if columns is not None else table.numeric_columns(exclude)
    table.require_columns(names, "columns")
    require(len(names) > 1, "columns", f"{len(names)} numeric columns", "two ratings or more")
    return (np.column_stack([table.numbers(name, "columns") for name in names]),)


def written(
    source: Any,
    *,
    target: Any = None,
    columns: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    text: str | None = None,
) -> tuple[list[str]]:
    """The texts of a list, or of a table's column."""
    require(target is None, "target", repr(target), "none: the method reads the text alone")
    if isinstance(source, list | tuple) and all(isinstance(one, str) for one in source):
        return (list(source),)
    require(text is not None, "text", "none", "the column of texts")
    assert text is not None
    return (_strings(open_table(source), text, "text"),)


def pairs(
    source: Any,
    *,
    target: Any = None,
    columns: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    text: str | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Prompts, preferred and other answers of a table: prompt, chosen, rejected, or three named."""
    require(target is None, "target", repr(target), "none: a pair needs no label")
    names = tuple(columns) if columns is not None else PAIR_COLUMNS
    require(len(names) == 3, "columns", f"{len(names)} names", "those of prompt, chosen, rejected")
    table = open_table(source)
    prompt, chosen, rejected = (_strings(table, name, "columns") for name in names)
    return prompt, chosen, rejected


def _strings(table: Table, name: str, argument: str) -> list[str]:
    import pyarrow as pa

    column = table.column(name, argument)
    words = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    require(words, argument, f"{name!r} of type {column.type}", "a column of strings")
    require(column.null_count == 0, argument, f"{column.null_count} empty cells in {name!r}",
            "a text in every row")  # fmt: skip
    return list(column.to_pylist())


READERS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "": labelled,
    "ratings": ratings,
    "texts": written,
    "pairs": pairs,
}


class Pilots(NamedTuple):
    """Encoded rows of several sources, and of what a model will be judged on."""

    features: Float
    labels: NDArray[Any]
    sources: NDArray[Any]
    val_features: Float
    val_labels: NDArray[Any]


def pilots(
    table: str,
    validation: str,
    *,
    target: str,
    source: str,
    columns: list[str] | None = None,
    text: str | None = None,
) -> Pilots:
    """Two tables with the same columns as features, labels and sources; encoded by the first.

    A validation table need not have the source column. Raises InputError where a column is absent,
    empty or of another type in the second, or a label has one row only.
    """
    import pyarrow as pa

    from scoredraw.features import Encoder, has_sentence_encoder, read_examples, sentence_vectors

    first, second = open_table(table), open_table(validation)
    first.require_columns([source], "source")
    require(source != target, "source", repr(source), "another column than the target")
    names = columns or [name for name in first.column_names if name not in (source, target)]
    names = list(dict.fromkeys([*names, *([text] if text else []), target]))
    first.require_columns(names, "target")
    second.require_columns(names, "validation")
    parts = first.read(names), second.read(names)
    try:
        whole = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        why = str(error).splitlines()[0]
        raise InputError(f"validation: got columns of other types ({why}), want the same") from None
    examples = read_examples(whole, target, text=text, task="classification")
    rows, vectors = np.arange(len(examples)), None
    if examples.texts is not None and has_sentence_encoder():
        vectors = sentence_vectors(examples.texts)
    n = first.num_rows
    features = Encoder(examples, rows[:n], vectors).transform(rows)
    labels = np.array(examples.classes)[examples.y]
    column = first.column(source, "source")
    require(column.null_count == 0, "source", f"{column.null_count} empty cells in {source!r}",
            "a source in every row")  # fmt: skip
    of = np.asarray([str(value) for value in column.to_pylist()])
    return Pilots(features[:n], labels[:n], of, features[n:], labels[n:])


def measurements(source: Any) -> dict[str, Any]:
    """The columns of a small table of measurements: text as it is, numbers as float64."""
    table = open_table(source).read()
    found: dict[str, Any] = {}
    for name in table.column_names:
        values = table.column(name)
        require(values.null_count == 0, name, f"{values.null_count} empty cells", "none")
        found[name] = values.to_pylist() if name == "group" else values.to_numpy()
    return found
