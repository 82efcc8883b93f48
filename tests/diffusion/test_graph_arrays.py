"""Graphs as tensors and back, and which of them are molecules."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
nx = pytest.importorskip("networkx", reason="the diffusion extra is not installed")

from scoredraw.diffusion.graph_arrays import (  # noqa: E402
    BOND_THRESHOLDS,
    checked_graphs,
    flags_of_edges,
    flags_of_sizes,
    from_networkx,
    mask_edges,
    mask_nodes,
    molecule_validity,
    one_hot_degrees,
    quantize_adjacency,
    quantize_atoms,
    to_networkx,
)
from scoredraw.errors import InputError, MissingExtraError  # noqa: E402

pytestmark = pytest.mark.property

RDKIT = importlib.util.find_spec("rdkit") is not None
SYMBOLS = ["C", "N", "O"]


def edges(n: int, bits: int) -> Any:
    """A graph on n nodes, one bit of `bits` for each pair."""
    graph = nx.empty_graph(n)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    graph.add_edges_from(pair for k, pair in enumerate(pairs) if bits >> k & 1)
    return graph


graphs = st.builds(edges, st.integers(1, 7), st.integers(0, 2**21 - 1))


@settings(max_examples=60)
@given(st.lists(graphs, min_size=1, max_size=4))
def test_there_and_back(given_graphs: list[Any]) -> None:
    adj, flags = from_networkx(given_graphs, 8)
    checked_graphs(one_hot_degrees(adj, flags, 8), adj, flags)
    back = to_networkx(adj, flags, keep_isolated=True)
    assert all(nx.utils.graphs_equal(a, b) for a, b in zip(given_graphs, back, strict=True))
    for before, bare in zip(given_graphs, to_networkx(adj), strict=True):
        joined = [node for node, degree in before.degree if degree]
        assert len(bare) == max(len(joined), 1)
        assert nx.is_isomorphic(bare, before.subgraph(joined) if joined else nx.empty_graph(1))


@settings(max_examples=40)
@given(graphs)
def test_one_hot_degrees_are_degrees(graph: Any) -> None:
    adj, flags = from_networkx([graph], 9)
    hot = one_hot_degrees(adj, flags, 7)[0]
    n = len(graph)
    assert hot[:n].argmax(1).tolist() == [degree for _, degree in graph.degree]
    assert hot[:n].sum(1).tolist() == [1.0] * n
    assert float(hot[n:].abs().max()) == 0.0
    alone = torch.tensor([degree > 0 for _, degree in graph.degree])
    assert torch.equal(flags_of_edges(adj)[0, :n] > 0, alone)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_masks_leave_real_pairs_of_different_nodes(sizes: list[int]) -> None:
    flags = flags_of_sizes(sizes, 6)
    assert flags.sum(1).tolist() == sizes
    x, adj = torch.ones(len(sizes), 6, 2), torch.ones(len(sizes), 6, 6)
    assert mask_nodes(x, flags).sum((1, 2)).tolist() == [2 * n for n in sizes]
    assert mask_edges(adj, flags).sum((1, 2)).tolist() == [n * (n - 1) for n in sizes]


def test_thresholds_are_reached_from_below() -> None:
    values = torch.tensor([-3.0, 0.499, 0.5, 1.499, 1.5, 2.5, 9.0])
    assert quantize_adjacency(values).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert quantize_adjacency(values, BOND_THRESHOLDS).tolist() == [0, 0, 1, 1, 2, 3, 3]
    with pytest.raises(InputError, match="thresholds: got"):
        quantize_adjacency(values, (1.5, 0.5))
    with pytest.raises(InputError, match="adj: got NaN"):
        quantize_adjacency(values * np.nan)


def test_empty_graphs_and_weights() -> None:
    assert [len(g) for g in to_networkx(torch.zeros(2, 3, 3))] == [1, 1]
    only = to_networkx(torch.zeros(1, 3, 3), torch.tensor([[1.0, 1.0, 0.0]]), keep_isolated=True)
    assert len(only[0]) == 2
    adj = torch.zeros(1, 3, 3)
    adj[0, 0, 2] = adj[0, 2, 0] = 2.0
    (graph,) = to_networkx(adj)
    assert graph[0][1]["weight"] == 2.0
    again, _ = from_networkx([graph], weight="weight")
    assert again.tolist() == [[[0.0, 2.0], [2.0, 0.0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adj": torch.zeros(2, 3, 4)}, "adj: got shape"),
        ({"adj": torch.ones(2, 3, 3).triu(1)}, "adj: got an asymmetric matrix"),
        ({"adj": torch.ones(2, 3, 3)}, "adj: got self-loops"),
        ({"adj": torch.full((2, 3, 3), torch.nan)}, "adj: got NaN"),
        ({"x": torch.zeros(2, 4, 1)}, "x: got"),
        ({"x": torch.full((2, 3, 1), torch.inf)}, "x: got NaN or infinity"),
        ({"flags": torch.full((2, 3), 0.5)}, "flags: got other values"),
        ({"flags": torch.ones(2, 4)}, "flags: got"),
        ({"x": torch.ones(2, 3, 1), "flags": torch.zeros(2, 3)}, "x, adj: got values, want zeros"),
        ({"x": torch.ones(2, 3, 1), "flags": None}, "give the flags where nodes have no edges"),
    ],
)
def test_batches_that_are_refused(changes: dict[str, Any], message: str) -> None:
    batch = {"x": torch.zeros(2, 3, 1), "adj": torch.zeros(2, 3, 3), "flags": torch.ones(2, 3)}
    assert checked_graphs(**batch) is batch["flags"]
    with pytest.raises(InputError, match=message):
        checked_graphs(**{**batch, **changes})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "graphs: got none"),
        ([nx.path_graph(3, create_using=nx.DiGraph)], "graphs: got directed or parallel edges"),
        ([nx.MultiGraph([(0, 1), (0, 1)])], "graphs: got directed or parallel edges"),
        ([nx.Graph([(0, 0)])], "adj: got self-loops"),
        ([nx.empty_graph(0)], "sizes: got 0 to 0"),
        ([nx.path_graph(9)], "sizes: got 9 to 9, want 1 to 8 nodes"),
    ],
)
def test_graphs_that_are_refused(made: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_networkx(made, 8)


def test_degrees_beyond_the_features_are_refused_by_name() -> None:
    adj, flags = from_networkx([nx.star_graph(4)])
    assert one_hot_degrees(adj, flags, 5).shape == (1, 5, 5)
    with pytest.raises(InputError, match="n_features: got 4, want more than the largest degree, 4"):
        one_hot_degrees(adj, flags, 4)


# ── molecules ───────────────────────────────────────────────────────────────────────────────────


def molecules() -> tuple[Any, Any]:
    """CO2, a carbon with five bonds, ammonium-like nitrogen with four, and no atoms at all."""
    atoms = [[2, 0, 2], [0, 0, 0], [1, 0, 0], [-1, -1, -1]]
    orders = [{(0, 1): 2, (1, 2): 2}, {(0, 1): 3, (1, 2): 2}, {(0, 1): 2, (0, 2): 2}, {}]
    x, adj = torch.zeros(4, 3, 3), torch.zeros(4, 3, 3)
    for b, (kinds, bonds) in enumerate(zip(atoms, orders, strict=True)):
        for i, kind in enumerate(kinds):
            if kind >= 0:
                x[b, i, kind] = 0.8
        for (i, j), order in bonds.items():
            adj[b, i, j] = adj[b, j, i] = order + 0.3
    return x, adj


def test_atoms_are_the_largest_feature_above_a_half() -> None:
    x, _ = molecules()
    kinds = quantize_atoms(x, torch.ones(4, 3))
    assert kinds.tolist() == [[2, 0, 2], [0, 0, 0], [1, 0, 0], [-1, -1, -1]]
    assert quantize_atoms(x, torch.zeros(4, 3)).max().item() == -1


@pytest.mark.skipif(RDKIT, reason="RDKit is installed here")
def test_without_rdkit_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"rdkit.Chem is not installed.*molecules"):
        molecule_validity(*molecules(), SYMBOLS)


@pytest.mark.skipif(not RDKIT, reason="RDKit, which says what a molecule is, is not installed")
def test_rdkit_tells_molecules_from_others() -> None:
    found = molecule_validity(*molecules(), SYMBOLS)
    assert found.valid == [True, False, True, False]
    assert found.smiles[0] == "O=C=O"
    assert found.smiles[2] == "C=[N+]=C"
    assert found.validity == 0.5


def test_a_symbol_for_every_feature() -> None:
    with pytest.raises(InputError, match="symbols: got 2, want 3, one a feature"):
        molecule_validity(*molecules(), ["C", "N"])
