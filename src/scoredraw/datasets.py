"""Real data sets that need no network: two in the package, the rest from installed libraries.

`names()` lists them, `load(name)` reads one. Arrays are read-only and loaded once, so that two
experiments in one process share them.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, import_extra

UCI = "CC BY 4.0"


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set.

    x: (n, d) features, or None where the inputs are `texts`. y: (n,) int64 class labels, which
    index `target_names`, or float64 values. feature_names: d names. splits: the published splits,
    name -> row indices (empty where there are none).
    """

    name: str
    task: Literal["classification", "regression"]
    x: NDArray[Any] | None
    y: NDArray[Any]
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    texts: tuple[str, ...] | None
    licence: str
    source: str
    splits: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        inputs = "texts" if self.x is None else f"{self.x.shape[1]} features"
        kind = f"{len(self.target_names)} classes" if self.target_names else "regression"
        return f"<Dataset {self.name}: {len(self):,} rows, {inputs}, {kind}; {self.licence}>"


def names() -> list[str]:
    """The names `load` knows.

    >>> names()[:3]
    ['breast-cancer', 'clinc150', 'diabetes']
    """
    return sorted([*BUNDLED, *LOADERS])


@lru_cache(maxsize=4)
def load(name: str) -> Dataset:
    """Load a data set by name. Raises `InputError` for an unknown name.

    randhie needs statsmodels; without it the error says how to install it.

    >>> load("iris")
    <Dataset iris: 150 rows, 4 features, 3 classes; CC BY 4.0>
    """
    if name in BUNDLED:
        return from_scikit_learn(name)
    if name in LOADERS:
        return LOADERS[name]()
    raise InputError(f"name: got {name!r}, want one of {', '.join(names())}")


def flip_labels(
    y: NDArray[np.int64], classes: int, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Class labels with a uniform share of them wrong, and which are.

    A wrong label is any other class of the `classes`, each as likely.

    >>> y = np.arange(10) % 3
    >>> labels, wrong = flip_labels(y, 3, 0.4, 0)
    >>> int(wrong.sum()), bool(((labels != y) == wrong).all())
    (4, True)
    """
    random, labels, wrong = np.random.default_rng(seed), y.copy(), np.zeros(len(y), bool)
    rows = random.permutation(len(y))[: round(share * len(y))]
    wrong[rows] = True
    labels[rows] = (y[rows] + random.integers(1, classes, len(rows))) % classes
    return labels, wrong


def fashion_mnist() -> Dataset:
    """12,000 images of clothing as (n, 784) uint8 pixels, row by row."""
    with (
        resources.files("scoredraw").joinpath("data", "fashion-mnist.npz").open("rb") as file,
        np.load(io.BytesIO(file.read())) as stored,
    ):
        x = np.concatenate([stored["x_train"], stored["x_test"]]).reshape(-1, 784)
        y = np.concatenate([stored["y_train"], stored["y_test"]]).astype(np.int64)
        train = len(stored["y_train"])
    return Dataset(
        "fashion-mnist",
        "classification",
        frozen(x),
        frozen(y),
        tuple(f"pixel {i // 28},{i % 28}" for i in range(784)),
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        None,
        "MIT",
        "Xiao, Rasul, Vollgraf (2017), arXiv:1708.07747; a random sample of 12,000",
        {"train": frozen(np.arange(train)), "test": frozen(np.arange(train, len(y)))},
    )


def clinc150() -> Dataset:
    """23,700 requests to a voice assistant: 150 intents, and `oos` for out of scope."""
    path = resources.files("scoredraw").joinpath("data", "clinc150.csv.gz")
    with path.open("rb") as file:
        text = gzip.decompress(file.read()).decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    intents, labels = np.unique([row["intent"] for row in rows], return_inverse=True)
    split = np.array([row["split"] for row in rows])
    return Dataset(
        "clinc150",
        "classification",
        None,
        frozen(labels.astype(np.int64)),
        ("text",),
        tuple(intents.tolist()),
        tuple(row["text"] for row in rows),
        "CC BY 3.0",
        "Larson et al. (2019), arXiv:1909.02027; https://github.com/clinc/oos-eval",
        {name: frozen(np.flatnonzero(split == name)) for name in ("train", "val", "test")},
    )


# name -> (loader in sklearn.datasets, licence, source)
BUNDLED = {
    "breast-cancer": (
        "load_breast_cancer",
        UCI,
        "UCI Breast Cancer Wisconsin (Diagnostic); Wolberg, Mangasarian, Street, Street (1995)",
    ),
    "diabetes": (
        "load_diabetes",
        "BSD 3-Clause (with scikit-learn)",
        "Efron, Hastie, Johnstone, Tibshirani (2004), Least Angle Regression",
    ),
    "digits": (
        "load_digits",
        UCI,
        "UCI Optical Recognition of Handwritten Digits; Alpaydin (1998)",
    ),
    "iris": ("load_iris", UCI, "UCI Iris; Fisher (1936)"),
    "wine": ("load_wine", UCI, "UCI Wine; Aeberhard, Forina (1991)"),
}


def from_scikit_learn(name: str) -> Dataset:
    import sklearn.datasets

    function, licence, source = BUNDLED[name]
    bunch = getattr(sklearn.datasets, function)()
    classes = getattr(bunch, "target_names", None)
    return Dataset(
        name,
        "regression" if classes is None else "classification",
        frozen(np.asarray(bunch.data, dtype=np.float64)),
        frozen(np.asarray(bunch.target, dtype=np.float64 if classes is None else np.int64)),
        tuple(str(feature) for feature in bunch.feature_names),
        () if classes is None else tuple(str(label) for label in classes),
        None,
        licence,
        source,
    )


def randhie() -> Dataset:
    """20,190 persons of the RAND health insurance experiment: visits to a doctor, 9 covariates."""
    module = import_extra("statsmodels.datasets.randhie", "dev")
    table = module.load_pandas().data
    covariates = [column for column in table.columns if column != "mdvis"]
    return Dataset(
        "randhie",
        "regression",
        frozen(table[covariates].to_numpy(dtype=np.float64)),
        frozen(table["mdvis"].to_numpy(dtype=np.float64)),
        tuple(covariates),
        (),
        None,
        "public domain",
        "RAND health insurance experiment; Deb, Trivedi (2002), through statsmodels",
    )


LOADERS = {"clinc150": clinc150, "fashion-mnist": fashion_mnist, "randhie": randhie}


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
