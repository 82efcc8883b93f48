"""The data sets that come along: shapes, contents, licences."""

from __future__ import annotations

import hashlib
import sys
from importlib import resources

import numpy as np
import pytest

from scoredraw import datasets
from scoredraw.errors import InputError, MissingExtraError

pytestmark = pytest.mark.contract

HASHES = {
    "fashion-mnist.npz": "6db3532e03c0651860f48dceb0b73072f18f8754aff87efef91130c2e1016da9",
    "clinc150.csv.gz": "d6c2ed2a7de2781f9817eddfeaf071e6f93c973d3f6e6ed87b257748af8ce6a2",
    "gsm8k-solutions.jsonl.gz": "9f3f14ecaba7edf80d181dea74029728059fc7dec54ba4149b9d971f454fa206",
    "smollm2-arith.jsonl.gz": "c7a145f4fe481fd2121d3e4eb990fbf1f9109a084b67ea03fecb8fc54c630a24",
}


@pytest.mark.parametrize("name", datasets.names())
def test_every_data_set_loads_and_is_consistent(name: str) -> None:
    if name == "randhie":
        pytest.importorskip("statsmodels", reason="randhie comes with statsmodels")
    data = datasets.load(name)
    assert data.name == name
    assert data.licence
    assert data.source
    assert not data.y.flags.writeable
    if data.x is None:
        assert data.texts is not None
        assert len(data.texts) == len(data)
    else:
        assert data.x.shape == (len(data), len(data.feature_names))
        assert np.isfinite(data.x).all()
        assert not data.x.flags.writeable
    if data.task == "classification":
        assert data.y.dtype == np.int64
        assert np.array_equal(np.unique(data.y), np.arange(len(data.target_names)))
    else:
        assert data.y.dtype == np.float64
        assert data.target_names == ()
    if data.splits:
        rows = np.concatenate(list(data.splits.values()))
        assert np.array_equal(np.sort(rows), np.arange(len(data)))
    assert datasets.load(name) is data


@pytest.mark.parametrize("file", sorted(HASHES))
def test_files_are_the_ones_that_were_published(file: str) -> None:
    content = resources.files("scoredraw").joinpath("data", file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == HASHES[file]


def test_every_file_has_its_licence_beside_it() -> None:
    folder = resources.files("scoredraw").joinpath("data")
    readme = folder.joinpath("README.md").read_text(encoding="utf-8")
    for name in HASHES:
        assert f"## {name}" in readme
    assert "Copyright © 2017 Zalando SE" in readme
    assert "Copyright (c) 2021 OpenAI" in readme
    assert "creativecommons.org/licenses/by/3.0" in readme
    for name in datasets.names():
        assert name in readme


def test_fashion_mnist() -> None:
    data = datasets.load("fashion-mnist")
    assert data.x is not None
    assert data.x.shape == (12_000, 784)
    assert data.x.dtype == np.uint8
    assert (len(data.splits["train"]), len(data.splits["test"])) == (10_000, 2_000)
    boots = data.x[data.y == 9].mean(axis=0).reshape(28, 28)
    sandals = data.x[data.y == 5].mean(axis=0).reshape(28, 28)
    assert boots[4:8].mean() > 3 * sandals[4:8].mean()  # a boot has a shaft, a sandal has none
    assert data.target_names[9] == "Ankle boot"


def test_clinc150() -> None:
    data = datasets.load("clinc150")
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [15_100, 3_100, 5_500]
    assert len(data.target_names) == 151
    assert data.texts is not None
    first = data.splits["test"][0]
    assert data.texts[first] == "how would you say fly in italian"
    assert data.target_names[data.y[first]] == "translate"
    outside = data.target_names.index("oos")
    assert int((data.y[data.splits["test"]] == outside).sum()) == 1_000


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^name: got 'mnist', want one of [^\n]*fashion-mnist"):
        datasets.load("mnist")


def test_randhie_without_statsmodels_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets.randhie", None)
    datasets.load.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install"):
        datasets.load("randhie")
