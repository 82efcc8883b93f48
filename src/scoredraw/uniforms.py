"""Counter-based randomness: the uniform of a row is a function of (seed, stream, round, row id).

A draw that asks a stateful generator for n numbers depends on how the n rows were cut into files,
batches and workers. Here nothing is stateful. The Philox4x64-10 block cipher turns the counter

    (row id // 4, round, stream, 0)

under a key made of the seed into four 64-bit words; word `row id % 4` is the row's, and its top 53
bits are its uniform in [0, 1). Whoever asks for a row, in whatever company, gets the same number.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from scoredraw.errors import InputError, require

Float = npt.NDArray[np.float64]
UInt = npt.NDArray[np.uint64]


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK = (1 << 64) - 1
_SHIFT, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


class RowUniforms:
    """Uniforms in [0, 1) addressed by row: the same for any split, order, batch or worker.

    `rng` is a seed; a `Generator` gives two words and so advances; None takes fresh entropy;
    another `RowUniforms` gives its key, and so the same numbers.
    `stream` is the purpose (a short name), `round` counts repetitions of it: other numbers each.

    >>> uniforms = RowUniforms(7)
    >>> whole = uniforms.block(0, 10, stream="draw")
    >>> bool((uniforms.block(3, 10, stream="draw") == whole[3:]).all())
    True
    >>> bool((uniforms.at([9, 3], stream="draw") == whole[[9, 3]]).all())
    True
    """

    def __init__(self, rng: int | np.random.Generator | RowUniforms | None = None) -> None:
        if isinstance(rng, RowUniforms):
            self.key: UInt = rng.key
        elif isinstance(rng, np.random.Generator):
            self.key = rng.integers(0, 2**64, size=2, dtype=np.uint64)
        else:
            self.key = np.random.SeedSequence(rng).generate_state(2, np.uint64).astype(np.uint64)

    def words(self, start: int, stop: int, *, stream: str, round: int = 0) -> UInt:
        """The raw 64-bit words of rows start..stop, uint64 (stop - start,)."""
        first = start // 4
        if stop <= start:
            return np.zeros(0, np.uint64)
        counter = np.array([first, round, _stream(stream), 0], np.uint64)  # rounds reach 2^64
        philox = np.random.Philox(key=self.key, counter=counter)
        return np.asarray(philox.random_raw(stop - 4 * first)[start - 4 * first :], np.uint64)

    def block(self, start: int, stop: int, *, stream: str, round: int = 0) -> Float:
        """The uniforms of rows start..stop, float64 (stop - start,)."""
        return _unit(self.words(start, stop, stream=stream, round=round))

    def at(self, ids: Any, *, stream: str, round: int = 0) -> Float:
        """The uniforms of the rows with these ids, float64 (k,): `block`'s values, anywhere."""
        ids = np.asarray(ids, np.uint64)
        # NumPy's Philox steps the counter before it enciphers it, hence the + 1; ids // 4 leaves
        # two bits free, so that it never carries.
        low = ids // np.uint64(4) + np.uint64(1)
        counter = (low, np.uint64(round), np.uint64(_stream(stream)), np.uint64(0))
        return _unit(np.choose((ids % np.uint64(4)).astype(np.intp), _philox(counter, self.key)))


Rng = int | np.random.Generator | RowUniforms | None


def generator(rng: Rng) -> np.random.Generator:
    """A NumPy generator from a seed, a generator (returned as it is) or None (fresh entropy).

    >>> float(generator(0).random()) == float(generator(0).random())
    True
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, RowUniforms):
        return np.random.Generator(np.random.Philox(key=rng.key))
    return np.random.Generator(np.random.Philox(rng))


def hash_ids(values: Any) -> UInt:
    """64-bit ids from a column of integers or strings, so that a row keeps its uniform anywhere.

    Integers are mixed by a bijection (no collisions). Strings take a polynomial hash modulo 2^64
    of randomised bytes, over the whole column at once: h = sum_j t[byte_j] B^j, then mixed.

    values: Arrow array, NumPy array or sequence of n integers or strings; -> uint64 (n,).
    Raises InputError for missing ids and for types that have no text.
    Time O(bytes), memory 24 bytes a byte of text.

    >>> a = hash_ids(["ann", "bob", "eve"])
    >>> bool((hash_ids(["eve", "ann"]) == a[[2, 0]]).all())
    True
    """
    import pyarrow as pa

    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    missing = column.null_count
    require(missing == 0, "ids", f"{missing} missing ids", "one in every row")
    if not len(column):
        return np.zeros(0, np.uint64)
    if pa.types.is_integer(column.type):
        return mix(column.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64))
    try:
        binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        text = (column if binary else column.cast(pa.large_string())).cast(pa.large_binary())
    except pa.ArrowException:
        raise InputError(f"ids: got type {column.type}, want integers or text") from None
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    data = text.buffers()[2]
    bytes_ = np.frombuffer(data, np.uint8)[: offsets[-1]] if data else np.zeros(0, np.uint8)
    table = mix(np.arange(1, 257, dtype=np.uint64))
    base = 0x9E3779B97F4A7C15
    powers = np.full(len(bytes_) + 1, base, np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(table[bytes_] * powers[:-1])])
    # Dividing by B^start (B is odd, so invertible modulo 2^64) makes the hash position-free.
    inverse = np.full(len(bytes_) + 1, pow(base, -1, 1 << 64), np.uint64)
    inverse[0] = 1
    inverse = np.cumprod(inverse)
    start, stop = offsets[:-1], offsets[1:]
    polynomial = (prefix[stop] - prefix[start]) * inverse[start]
    return mix(polynomial + mix((stop - start).astype(np.uint64)))


def _stream(name: str) -> int:
    return zlib.crc32(name.encode())


def _unit(words: UInt) -> Float:
    whole = (words >> np.uint64(11)).view(np.int64)  # 53 bits: the sign is free, and signed is fast
    unit = whole.astype(np.float64)
    unit *= 2.0**-53
    return unit


def mix(x: UInt) -> UInt:
    """The finaliser of SplitMix64: a bijection of the 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _multiply(a: int, b: UInt) -> tuple[UInt, UInt]:
    """The high and low words of the 128-bit product a * b."""
    a_high, a_low = np.uint64(a >> 32), np.uint64(a & 0xFFFFFFFF)
    b_high, b_low = b >> _SHIFT, b & _LOW
    middle = a_high * b_low + ((a_low * b_low) >> _SHIFT)
    carry = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _SHIFT) + (carry >> _SHIFT), np.uint64(a) * b


def _philox(counter: tuple[Any, ...], key: UInt) -> list[UInt]:
    """Philox4x64-10 on arrays of counters: four words each."""
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]
