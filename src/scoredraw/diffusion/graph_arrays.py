"""Graphs as dense tensors, and back.

A batch of graphs of up to N nodes is

    x      (B, N, F)   node features
    adj    (B, N, N)   edges: symmetric, zero on the diagonal; 1, or the order of a bond
    flags  (B, N)      1 where there is a node, 0 where there is padding

all floating; whatever lies at padding is 0. Sampled graphs are real-valued: `quantize_adjacency`
cuts them at thresholds, `to_networkx` drops the nodes without edges, and `molecule_validity` asks
RDKit which of them are molecules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoredraw.arrays import on_host
from scoredraw.errors import import_extra, require

BOND_THRESHOLDS = (0.5, 1.5, 2.5)
CHARGED = {"N": 4, "O": 3}  # the sum of bond orders at which an atom carries a charge of +1


# ── padding and masks ───────────────────────────────────────────────────────────────────────────


def mask_nodes(x: Tensor, flags: Tensor) -> Tensor:
    """x (B, N, F) with zeros at padding."""
    return x * flags[:, :, None]


def mask_edges(adj: Tensor, flags: Tensor) -> Tensor:
    """adj (B, N, N) with zeros at padding and on the diagonal."""
    both = flags[:, :, None] * flags[:, None, :]
    return adj * (both - torch.diag_embed(flags * flags))


def flags_of_sizes(sizes: Any, max_nodes: int) -> Tensor:
    """Flags (B, N) of graphs with these numbers of nodes, the first ones being real; float32.

    Raises InputError unless 1 <= sizes <= max_nodes.

    >>> flags_of_sizes([1, 3], 3).tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    counts = np.asarray(on_host(sizes), np.int64)
    require(counts.ndim == 1 and counts.size > 0, "sizes", counts.shape, "(B,), one a graph")
    inside = bool(((counts >= 1) & (counts <= max_nodes)).all())
    require(inside, "sizes", f"{counts.min()} to {counts.max()}", f"1 to {max_nodes} nodes")
    return torch.from_numpy((np.arange(max_nodes) < counts[:, None]).astype(np.float32))


def flags_of_edges(adj: Tensor) -> Tensor:
    """Flags (B, N) that take nodes without edges for padding, as the released code does.

    >>> flags_of_edges(torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])).tolist()
    [[1.0, 1.0, 0.0]]
    """
    return (adj.abs().sum(-1) > 0).to(adj.dtype)


def checked_graphs(x: Tensor, adj: Tensor, flags: Tensor | None = None) -> Tensor:
    """The flags of a batch, inferred from the edges where none are given; InputError for a bad one.

    adj has to be (B, N, N), finite, symmetric and zero on the diagonal; x (B, N, F), finite, with
    as many graphs and nodes; flags (B, N), 0 or 1; both x and adj zero at padding.
    """
    check_adjacency(adj)
    fits = x.ndim == 3 and x.shape[:2] == adj.shape[:2]
    require(fits, "x", tuple(x.shape), f"({len(adj)}, {adj.shape[1]}, F), the nodes of adj")
    require(bool(torch.isfinite(x).all()), "x", "NaN or infinity", "finite values")
    given = flags_of_edges(adj) if flags is None else flags
    check_flags(given)
    same = given.shape == adj.shape[:2]
    require(same, "flags", tuple(given.shape), f"{tuple(adj.shape[:2])}, the nodes of adj")
    clean = bool((adj * (1 - given)[:, :, None] == 0).all())
    wanted = "zeros at padding; give the flags where nodes have no edges"
    require(clean and bool((mask_nodes(x, 1 - given) == 0).all()), "x, adj", "values", wanted)
    return given


def check_adjacency(adj: Tensor) -> None:
    square = adj.ndim == 3 and adj.shape[1] == adj.shape[2] and 0 not in adj.shape
    require(square, "adj", f"shape {tuple(adj.shape)}", "(B, N, N), square and not empty")
    require(bool(torch.isfinite(adj).all()), "adj", "NaN or infinity", "finite values")
    require(bool((adj == adj.mT).all()), "adj", "an asymmetric matrix", "undirected graphs")
    loops = bool((adj.diagonal(dim1=1, dim2=2) != 0).any())
    require(not loops, "adj", "self-loops", "zeros on the diagonal")


def check_flags(flags: Tensor) -> None:
    require(flags.ndim == 2 and 0 not in flags.shape, "flags", tuple(flags.shape), "(B, N)")
    binary = bool(((flags == 0) | (flags == 1)).all())
    require(binary, "flags", "other values", "0 for padding and 1 for nodes")


def one_hot_degrees(adj: Tensor, flags: Tensor, n_features: int) -> Tensor:
    """Each node's number of neighbours as one of F features, (B, N, F), the usual first x.

    Raises InputError where a degree is F or more (the released code raises a bare error), and for
    adjacency matrices that are none.

    >>> one_hot_degrees(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.ones(1, 2), 3).tolist()
    [[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    check_adjacency(adj)
    degrees = (adj != 0).sum(-1)
    top = int(degrees.max())
    require(top < n_features, "n_features", n_features, f"more than the largest degree, {top}")
    hot = torch.nn.functional.one_hot(degrees, n_features).to(adj.dtype)
    return mask_nodes(hot, flags)


# ── networkx ────────────────────────────────────────────────────────────────────────────────────


def from_networkx(
    graphs: Sequence[Any], max_nodes: int | None = None, *, weight: str | None = None
) -> tuple[Tensor, Tensor]:
    """(adj, flags), float32, of undirected networkx graphs; nodes in their own order.

    max_nodes: N, default the largest graph's. weight: the edge attribute adj holds, default 1.
    Raises InputError for no graphs, directed graphs, parallel edges, self-loops, graphs without
    nodes or with more than N, and weights that are not finite.

    >>> import networkx as nx
    >>> adj, flags = from_networkx([nx.path_graph(2), nx.cycle_graph(3)])
    >>> adj[0].tolist(), flags.sum(1).tolist()
    ([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [2.0, 3.0])
    """
    nx = import_extra("networkx", "diffusion")
    require(len(graphs) > 0, "graphs", "none", "at least one")
    plain = not any(graph.is_directed() or graph.is_multigraph() for graph in graphs)
    require(plain, "graphs", "directed or parallel edges", "simple undirected graphs")
    sizes = [len(graph) for graph in graphs]
    largest = max(sizes) if max_nodes is None else max_nodes
    flags = flags_of_sizes(sizes, largest)
    adj = np.zeros((len(graphs), largest, largest), np.float32)
    for dense, graph, n in zip(adj, graphs, sizes, strict=True):
        dense[:n, :n] = nx.to_numpy_array(graph, weight=weight)
    found = torch.from_numpy(adj)
    check_adjacency(found)
    return found, flags


def to_networkx(
    adj: Tensor, flags: Tensor | None = None, *, keep_isolated: bool = False
) -> list[Any]:
    """networkx graphs of quantised adjacency matrices (B, N, N), nodes numbered from 0.

    Nodes without edges are dropped, unless `keep_isolated` (then flags say which are real); a graph
    without edges becomes one with a single node. Values other than 1 are edge weights.

    >>> [len(graph) for graph in to_networkx(torch.zeros(2, 4, 4))]
    [1, 1]
    """
    nx = import_extra("networkx", "diffusion")
    check_adjacency(adj)
    real = torch.ones(adj.shape[:2]) if flags is None else flags
    kept = real > 0 if keep_isolated else flags_of_edges(adj) * real > 0
    matrices, masks = np.asarray(on_host(adj), np.float64), np.asarray(on_host(kept))
    graphs = []
    for matrix, mask in zip(matrices, masks, strict=True):
        inside = np.flatnonzero(mask) if mask.any() else np.zeros(1, np.int64)
        part = matrix[np.ix_(inside, inside)]
        graph = nx.from_numpy_array(part)
        if ((part == 0) | (part == 1)).all():
            graph = nx.Graph(graph.edges())
            graph.add_nodes_from(range(len(part)))
        graphs.append(graph)
    return graphs


def quantize_adjacency(adj: Tensor, thresholds: float | Sequence[float] = 0.5) -> Tensor:
    """How many thresholds each entry reaches: 0 or 1 at 0.5, bonds 0 to 3 at BOND_THRESHOLDS.

    Raises InputError for thresholds that do not increase and values that are not finite.

    >>> quantize_adjacency(torch.tensor([0.49, 0.5, 1.7]), BOND_THRESHOLDS).tolist()
    [0.0, 1.0, 2.0]
    """
    cuts = torch.as_tensor(np.atleast_1d(thresholds), dtype=adj.dtype, device=adj.device)
    rising = bool((cuts[1:] > cuts[:-1]).all())
    require(rising, "thresholds", cuts.tolist(), "increasing numbers")
    require(bool(torch.isfinite(adj).all()), "adj", "NaN or infinity", "finite values")
    return torch.bucketize(adj.contiguous(), cuts, right=True).to(adj.dtype)


# ── molecules ───────────────────────────────────────────────────────────────────────────────────


class Molecules(NamedTuple):
    """Which of the sampled graphs are molecules, and the SMILES of those (None for the others)."""

    valid: list[bool]
    smiles: list[str | None]

    @property
    def validity(self) -> float:
        """The share of valid ones."""
        return float(np.mean(self.valid))


def quantize_atoms(x: Tensor, flags: Tensor) -> Tensor:
    """Each node's kind (B, N), int64: the largest of F features, -1 where none exceeds 0.5.

    >>> quantize_atoms(torch.tensor([[[0.9, 0.2], [0.3, 0.4]]]), torch.ones(1, 2)).tolist()
    [[0, -1]]
    """
    top = mask_nodes(x, flags).max(-1)
    return torch.where(top.values > 0.5, top.indices, -1)


def molecule_validity(
    x: Tensor, adj: Tensor, symbols: Sequence[str], flags: Tensor | None = None
) -> Molecules:
    """Which sampled (x, adj) RDKit accepts as molecules, without any correction.

    x: (B, N, F), F real-valued scores of the atoms `symbols` (such as ["C", "N", "O", "F"]).
    adj: (B, N, N) real-valued bond orders, cut at 0.5, 1.5 and 2.5. Nodes whose features stay below
    0.5 are no atoms. Nitrogen with four bonds and oxygen with three carry a charge of +1; a
    molecule without atoms is invalid. Validity as in Jo, Lee and Hwang 2022, arXiv 2202.02514.
    Raises MissingExtraError without RDKit, InputError for shapes that disagree.
    """
    require(x.shape[-1] == len(symbols), "symbols", len(symbols), f"{x.shape[-1]}, one a feature")
    chem = import_extra("rdkit.Chem", "molecules")
    real = torch.ones(adj.shape[:2], dtype=x.dtype) if flags is None else flags
    atoms = np.asarray(on_host(quantize_atoms(x, real)))
    bonds = np.asarray(on_host(quantize_adjacency(adj, BOND_THRESHOLDS)), np.int64)
    smiles = [_smiles(chem, *pair, symbols) for pair in zip(atoms, bonds, strict=True)]
    return Molecules([one is not None for one in smiles], smiles)


def _smiles(chem: Any, atoms: Any, bonds: Any, symbols: Sequence[str]) -> str | None:
    """SMILES of one molecule, None where RDKit refuses it."""
    inside = np.flatnonzero(atoms >= 0)
    orders = bonds[np.ix_(inside, inside)]
    molecule = chem.RWMol()
    for kind, valence in zip(atoms[inside], orders.sum(1), strict=True):
        atom = chem.Atom(symbols[kind])
        if CHARGED.get(symbols[kind]) == valence:
            atom.SetFormalCharge(1)
        molecule.AddAtom(atom)
    names = {1: chem.BondType.SINGLE, 2: chem.BondType.DOUBLE, 3: chem.BondType.TRIPLE}
    for i, j in np.argwhere(np.triu(orders, 1)):
        molecule.AddBond(int(i), int(j), names[int(orders[i, j])])
    refused = chem.SanitizeMol(molecule, catchErrors=True) != chem.SanitizeFlags.SANITIZE_NONE
    return None if refused or not inside.size else str(chem.MolToSmiles(molecule))
