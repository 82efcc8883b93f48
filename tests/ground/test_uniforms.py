"""Counter-based uniforms against NumPy's Philox, and the ids that address them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scoredraw.errors import InputError
from scoredraw.uniforms import RowUniforms, _stream, generator, hash_ids

TOP = 2**64
seeds = st.integers(0, 2**64 - 1)
rounds = st.integers(0, 2**64 - 1)


def numpy_uniform(seed: int, row: int, stream: str, round_: int) -> float:
    """The row's uniform by NumPy's own generator, jumped to the row's counter."""
    key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    number = (row // 4) | round_ << 64 | _stream(stream) << 128
    word = np.random.Philox(key=key, counter=number).random_raw(4)[row % 4]
    return float(int(word) >> 11) * 2.0**-53


@pytest.mark.oracle
@settings(max_examples=60)
@given(seeds, st.integers(0, TOP - 1), st.sampled_from(["draw", "", "ü"]), rounds)
def test_a_row_is_numpys_philox_at_its_counter(seed, row, stream, round_) -> None:
    value = RowUniforms(seed).at(np.array([row], np.uint64), stream=stream, round=round_)[0]
    assert value == numpy_uniform(seed, row, stream, round_)
    assert 0.0 <= value < 1.0


@pytest.mark.oracle
@pytest.mark.parametrize("row", [0, 3, 4, 2**32 - 1, 2**34 - 1, 2**63, TOP - 4, TOP - 1])
def test_rows_at_the_edges_of_the_counter(row: int) -> None:
    at = RowUniforms(5).at(np.array([row], np.uint64), stream="s")
    assert at[0] == numpy_uniform(5, row, "s", 0)
    if row < TOP - 1:
        assert RowUniforms(5).block(row, row + 1, stream="s")[0] == at[0]


@pytest.mark.property
@settings(max_examples=60)
@given(seeds, st.integers(0, TOP - 50), st.integers(0, 40), rounds)
def test_block_and_at_agree_anywhere(seed, start, length, round_) -> None:
    uniforms = RowUniforms(seed)
    block = uniforms.block(start, start + length, stream="x", round=round_)
    ids = np.uint64(start) + np.arange(length, dtype=np.uint64)
    np.testing.assert_array_equal(block, uniforms.at(ids, stream="x", round=round_))
    assert block.dtype == np.float64
    assert block.shape == (length,)


@pytest.mark.property
@settings(max_examples=40)
@given(st.lists(st.integers(0, 300), max_size=8))
def test_a_block_does_not_depend_on_its_cuts(cuts: list[int]) -> None:
    edges = sorted({0, 300, *cuts})
    uniforms = RowUniforms(11)
    parts = [uniforms.block(a, b, stream="s") for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), uniforms.block(0, 300, stream="s"))


@pytest.mark.contract
def test_streams_rounds_and_seeds_are_unrelated() -> None:
    u = RowUniforms(0)
    families = [
        u.block(0, 4000, stream="a"),
        u.block(0, 4000, stream="b"),
        u.block(0, 4000, stream="a", round=1),
        u.block(0, 4000, stream="a", round=2**40),
        RowUniforms(1).block(0, 4000, stream="a"),
    ]
    assert len(np.unique(np.concatenate(families))) == 20_000
    # Ten correlations of 4,000 pairs, each beyond 5/sqrt(4000) with chance 6e-7: 6e-6 in all.
    off = np.corrcoef(families)[np.triu_indices(5, 1)]
    assert np.abs(off).max() < 5 / np.sqrt(4000)


@pytest.mark.oracle
@pytest.mark.parametrize("ids", ["positions", "hashed integers", "hashed text"])
def test_uniforms_are_uniform(ids: str) -> None:
    """Kolmogorov-Smirnov on 200,000 rows; false alarm 1e-6 each."""
    n = 200_000
    if ids == "positions":
        u = RowUniforms(3).block(0, n, stream="s")
    else:
        column = pa.array(np.arange(n))
        column = column.cast(pa.string()) if ids == "hashed text" else column
        u = RowUniforms(3).at(hash_ids(column), stream="s")
    assert stats.kstest(u, "uniform").pvalue > 1e-6
    # neighbours too: correlation beyond five deviations has chance 6e-7
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.contract
def test_what_rng_may_be() -> None:
    a = RowUniforms(7)
    assert (RowUniforms(a).key == a.key).all()
    g = np.random.default_rng(0)
    first, second = RowUniforms(g), RowUniforms(g)
    assert (first.key != second.key).any()  # a generator advances
    assert (RowUniforms(np.random.default_rng(0)).key == first.key).all()
    assert (RowUniforms(None).key != RowUniforms(None).key).any()
    assert generator(g) is g
    assert generator(RowUniforms(7)).random() == generator(RowUniforms(7)).random()
    assert generator(4).random() == generator(4).random() != generator(5).random()


# ------------------------------------------------------------------ ids


@pytest.mark.property
@settings(max_examples=80)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=30), st.data())
def test_a_text_id_hashes_the_same_in_any_company(texts: list[str], data) -> None:
    alone = {text: int(hash_ids([text])[0]) for text in texts}
    np.testing.assert_array_equal(hash_ids(texts), np.array([alone[t] for t in texts], np.uint64))
    order = data.draw(st.permutations(range(len(texts))))
    np.testing.assert_array_equal(hash_ids([texts[i] for i in order]), hash_ids(texts)[order])
    cut = data.draw(st.integers(0, len(texts)))
    column = pa.array(texts, pa.string())
    chunked = pa.chunked_array([column[:cut], column[cut:]])
    np.testing.assert_array_equal(hash_ids(chunked), hash_ids(texts))
    np.testing.assert_array_equal(hash_ids(column[cut:]), hash_ids(texts)[cut:])  # sliced buffers
    assert len(set(alone.values())) == len(set(texts))


@pytest.mark.contract
def test_the_type_that_holds_an_id_does_not_matter() -> None:
    texts = ["", "ann", "日本", "a\x00b", "ann "]
    want = hash_ids(pa.array(texts))
    kinds = [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
    for kind in kinds:
        np.testing.assert_array_equal(hash_ids(pa.array(texts).cast(kind)), want)
    np.testing.assert_array_equal(hash_ids(pa.array(texts).dictionary_encode()), want)
    plain = [text for text in texts if "\x00" not in text]  # NumPy's text has no zero bytes
    np.testing.assert_array_equal(hash_ids(np.array(plain)), hash_ids(plain))
    assert len(set(want.tolist())) == 5
    whole = hash_ids([1, 2, 127])
    for kind in (np.int8, np.uint8, np.int32, np.uint64):
        np.testing.assert_array_equal(hash_ids(np.array([1, 2, 127], kind)), whole)
    assert len(hash_ids(pa.array([], pa.string()))) == 0
    assert len(hash_ids(pa.chunked_array([], pa.int64()))) == 0


@pytest.mark.contract
def test_arbitrary_bytes_are_ids() -> None:
    assert len(set(hash_ids(pa.array([b"\xff", b"\xfe", b""])).tolist())) == 3


@pytest.mark.contract
@pytest.mark.parametrize(
    "column",
    [pa.array([1, None]), pa.array(["a", None]), pa.array([[1], [2]]), pa.array([{"a": 1}])],
)
def test_ids_must_be_there_and_be_text_or_numbers(column) -> None:
    with pytest.raises(InputError, match=r"^ids: got"):
        hash_ids(column)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["serial", "padded", "paths", "hex", "swapped", "integers"])
def test_a_million_realistic_ids_do_not_collide(kind: str) -> None:
    """False alarm: a random 64-bit hash collides with chance 3e-8 each."""
    i = np.arange(1_000_000)
    if kind == "integers":
        column = pa.array(i * 2**32 - 5)
    elif kind == "serial":
        column = pa.array(i).cast(pa.string())
    elif kind == "padded":
        column = pa.array(np.char.add("user-", np.char.zfill(i.astype("U7"), 12)))
    elif kind == "paths":
        column = pa.array([f"s3://bucket/{k % 97}/part-{k // 97}.jpg" for k in i.tolist()])
    elif kind == "hex":
        words = RowUniforms(1).words(0, 2 * len(i), stream="hex").reshape(-1, 2)
        column = pa.array([f"{a:016x}{b:016x}" for a, b in words.tolist()])
    else:  # the same blocks in another order: what a polynomial hash is weak against
        two = [f"{k:04d}" for k in range(1000)]
        column = pa.array([a + "-abcdefg-" + b for a in two for b in two])
    assert len(np.unique(hash_ids(column))) == len(i)
