"""The prefix tree against a trie of dictionaries, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.prefix_tree import FIRST_BLOCK, prefix_tree, prefix_tree_values
from scoredraw.rl.tempo import group_standing, tempo_advantages

pytestmark = pytest.mark.property

Rows = list[list[int]]
TOKENS = [0, 1, 255, 256, 65_536, 2**40, -1]  # bytes that sort otherwise than numbers


class Trie(NamedTuple):
    """A list an answer, one entry a prefix: its node, mean value, answers; ways on from a node."""

    nodes: list[list[int]]
    value: list[list[float]]
    answers: list[list[int]]
    ways: dict[int, set[int | None]]


def dict_trie(rows: Rows, values: list[float], groups: list[int]) -> Trie:
    """What one would write: a dictionary of nodes, two passes over all tokens."""
    child: dict[tuple[Any, int | None], int] = {}
    total: list[float] = []
    known: list[int] = []
    count: list[int] = []
    paths = []
    ways: dict[int, set[int | None]] = {}
    for row, value, group in zip(rows, values, groups, strict=True):
        path = []
        key: tuple[Any, int | None] = ("root", group)
        for token in [*row, None]:
            node = child.setdefault(key, len(child))
            if node == len(count):
                total.append(0.0)
                known.append(0)
                count.append(0)
                ways[node] = set()
            count[node] += 1
            if value == value:
                total[node] += value
                known[node] += 1
            ways[node].add(token)
            path.append(node)
            key = (node, token)
        paths.append(path)
    mean = [t / n if n else math.nan for t, n in zip(total, known, strict=True)]
    return Trie(
        paths, [[mean[k] for k in path] for path in paths],
        [[count[k] for k in path] for path in paths], ways,
    )  # fmt: skip


def trie_advantages(rows: Rows, standing: list[float], groups: list[int]) -> list[list[float]]:
    """TEMPO by a dictionary and no more than it needs: r' + V(after the token) - V(before it)."""
    child: dict[tuple[int, int], int] = {}
    total: list[float] = []
    count: list[int] = []
    paths = []
    for row, own, group in zip(rows, standing, groups, strict=True):
        node = child.setdefault((-1, group), len(child))
        path = [node]
        for token in row:
            node = child.setdefault((node, token), len(child))
            path.append(node)
        missing = len(child) - len(total)
        total += [0.0] * missing
        count += [0] * missing
        for node in path:
            total[node] += own
            count[node] += 1
        paths.append(path)
    value = [t / n for t, n in zip(total, count, strict=True)]
    return [
        [own + value[after] - value[before] for before, after in pairwise(path)]
        for own, path in zip(standing, paths, strict=True)
    ]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, list[float], list[int]]:
    """Short answers of few tokens; often a copy of an earlier one, cut or carried on."""
    rows: Rows = []
    tokens = st.lists(st.sampled_from(TOKENS), max_size=5)
    for _ in range(draw(st.integers(1, 12))):
        again = draw(st.booleans())
        start = rows[draw(st.integers(0, len(rows) - 1))] if rows and again else []
        rows.append(start[: draw(st.integers(0, len(start)))] + draw(tokens))
    values = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan))
    groups = st.sampled_from([7, -2, 1000])
    n = len(rows)
    return (
        rows,
        draw(st.lists(values, min_size=n, max_size=n)),
        draw(st.lists(groups, min_size=n, max_size=n)),
    )


def check(rows: Rows, values: list[float], groups: list[int]) -> None:
    """All that the tree says, against the dictionary."""
    trie = dict_trie(rows, values, groups)
    tree = prefix_tree(rows, group_ids=groups)
    found = prefix_tree_values(rows, None, values, group_ids=groups)
    nodes = tree.nodes()
    at, change = tree.changes(torch.tensor(values, dtype=torch.float64))
    number: dict[int, int] = {}
    for i, row in enumerate(rows):
        n = len(row)
        assert found.count[i].tolist() == trie.answers[i] + [0] * (found.count.shape[1] - n - 1)
        np.testing.assert_allclose(found.value[i, : n + 1], trie.value[i], atol=1e-12)
        assert not found.value[i, n + 1 :].any()
        branches = [t for t in range(n) if len(trie.ways[trie.nodes[i][t]]) > 1]
        assert found.is_branch[i].nonzero().flatten().tolist() == branches
        used = at[i] < tree.longest
        assert sorted(at[i][used].tolist()) == branches  # each once
        assert not change[i][~used].any()
        for t, jump in zip(at[i][used].tolist(), change[i][used].tolist(), strict=True):
            want = trie.value[i][t + 1] - trie.value[i][t]
            assert math.isnan(want) or jump == pytest.approx(want, abs=1e-12)
        assert nodes[i, n + 1 :].eq(-1).all()
        for mine, theirs in zip(nodes[i, : n + 1].tolist(), trie.nodes[i], strict=True):
            assert number.setdefault(theirs, mine) == mine
    assert len(set(number.values())) == len(number) == len(trie.ways)
    tokens = max(sum(map(len, rows)), 1)
    stats = tree.statistics()
    roots = len(set(groups))
    assert stats["nodes"] == pytest.approx((len(trie.ways) - roots) / tokens)
    shared = sum(c > 1 for path in trie.answers for c in path[1:])
    assert stats["shared_tokens"] == pytest.approx(shared / tokens)
    branches_in_all = int(found.is_branch.sum())
    assert stats["branch_tokens"] == pytest.approx(branches_in_all / tokens)
    assert stats["branches"] == pytest.approx(branches_in_all / len(rows))


@given(batches())
@settings(max_examples=200)
def test_is_the_trie(batch: tuple[Rows, list[float], list[int]]) -> None:
    check(*batch)


EDGES = [0, 1, FIRST_BLOCK - 1, FIRST_BLOCK, FIRST_BLOCK + 1, 3 * FIRST_BLOCK - 1, 3 * FIRST_BLOCK]


@given(st.lists(st.tuples(st.sampled_from(EDGES), st.integers(0, 3), st.sampled_from(EDGES)),
                min_size=2, max_size=8))  # fmt: skip
@settings(max_examples=100)
def test_is_the_trie_at_the_edges_of_blocks(cuts: list[tuple[int, int, int]]) -> None:
    """Answers that part, end or go on exactly where a block of columns does."""
    rows = [[9] * part + [token] * (rest if token else 0) for part, token, rest in cuts]
    check(rows, [float(i) for i in range(len(rows))], [i % 2 for i in range(len(rows))])


def test_long_answers_of_a_random_tree() -> None:
    rng = np.random.default_rng(0)
    rows: Rows = []
    for _ in range(96):
        start = rows[rng.integers(len(rows))] if rows else []
        new = rng.integers(0, 50_000, rng.integers(0, 300)).tolist()
        rows.append(start[: rng.integers(0, len(start) + 1)] + new)
    check(rows, rng.normal(size=96).tolist(), rng.integers(0, 4, 96).tolist())


@given(batches())
def test_tempo_is_what_the_loop_computes(batch: tuple[Rows, list[float], list[int]]) -> None:
    rows, rewards, groups = batch
    r = torch.tensor(rewards, dtype=torch.float64).nan_to_num(nan=0.5)
    standing = group_standing(r, groups)
    want = trie_advantages(rows, standing.tolist(), groups)
    found = tempo_advantages(rows, None, r, groups)
    for mine, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=1e-12)


@given(batches(), st.randoms(use_true_random=False), st.integers(0, 3))
def test_neither_order_nor_padding_matters(
    batch: tuple[Rows, list[float], list[int]], random: Any, wider: int
) -> None:
    rows, values, groups = batch
    plain = prefix_tree_values(rows, None, values, group_ids=groups)
    order = random.sample(range(len(rows)), len(rows))
    T = max(map(len, rows)) + wider
    ids = torch.tensor([[random.choice(TOKENS) for _ in range(T)] for _ in rows]).long()
    mask = torch.zeros(len(rows), T, dtype=torch.int8)
    for new, old in enumerate(order):
        ids[new, : len(rows[old])] = torch.tensor(rows[old], dtype=torch.int64)
        mask[new, : len(rows[old])] = 1
    again = prefix_tree_values(
        ids, mask, [values[i] for i in order], group_ids=[groups[i] for i in order]
    )
    for mine, theirs in zip(again, plain, strict=True):
        width = theirs.shape[1]
        torch.testing.assert_close(mine[:, :width], theirs[order], equal_nan=True)
        assert not mine[:, width:].any()


def test_a_tensor_without_mask_and_small_integers() -> None:
    ids = torch.tensor([[1, 2], [1, 3]], dtype=torch.int32)
    assert prefix_tree(ids, num_generations=2).counts().tolist() == [[2, 2, 1], [2, 2, 1]]


def test_nothing_and_empty_answers() -> None:
    empty = prefix_tree_values([[], []], None, [1.0, 0.0], num_generations=2)
    assert (empty.value.tolist(), empty.count.tolist()) == ([[0.5], [0.5]], [[2], [2]])
    none = prefix_tree_values([], None, [], num_generations=2)
    assert none.value.shape == (0, 1)
    assert prefix_tree([[]], num_generations=1).statistics()["nodes"] == 0
    for groups in ({"num_generations": 2}, {"group_ids": torch.zeros(0, dtype=torch.int64)}):
        tree = prefix_tree([], None, **groups)
        assert not any(tree.statistics().values())
        assert tree.nodes().shape == (0, 1)


IDS = torch.tensor([[1, 2, 3], [1, 2, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
BAD: list[tuple[dict[str, Any], str]] = [
    ({"mask": MASK[:, :2]}, r"mask: got shape (2, 2), want (2, 3), as completion_ids"),
    ({"mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, "mask: got row 1 padded on the left, want"),
    ({"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "mask: got a hole in row 0, want the tokens"),
    ({"completion_ids": IDS.float()}, "completion_ids: got torch.float32, want integer token ids"),
    ({"completion_ids": IDS.bool()}, "completion_ids: got torch.bool, want integer token ids"),
    ({"completion_ids": IDS[0]}, "completion_ids: got shape (3,), want (B, T)"),
    ({"completion_ids": [[1, 2], [1]]}, "completion_ids: got ragged rows or no numbers"),
    ({"completion_ids": "ab"}, "completion_ids: got ragged rows or no numbers, want (B, T)"),
    ({"completion_ids": [[1.5], [1]], "mask": None}, "completion_ids: got rows of another kind"),
    ({"completion_ids": ["ab", "c"], "mask": None}, "completion_ids: got no numbers, want sequ"),
    ({"completion_ids": [["a"], ["b"]], "mask": None}, "completion_ids: got no numbers, want seq"),
    ({"completion_ids": [[1, None], [1]], "mask": None}, "completion_ids: got no numbers, want"),
    ({"values": [1.0]}, "values: got shape (1,), want (2,), one an answer"),
    ({"values": [1.0, math.inf]}, "values: got an infinite one, want finite numbers or NaN"),
    ({"group_ids": [1]}, "group_ids: got shape (1,), want (2,), one a row"),
    ({"num_generations": None}, "num_generations: got None, want a positive count"),
    ({"num_generations": 3}, "rewards: got 2 rows, want a multiple of num_generations = 3"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"completion_ids": IDS, "mask": MASK, "values": [1.0, 0.0], "num_generations": 2}
    with pytest.raises(InputError) as caught:
        prefix_tree_values(**{**good, **change})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
