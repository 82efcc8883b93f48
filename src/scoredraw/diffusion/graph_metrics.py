"""How far a set of graphs is from another: maximum mean discrepancies of their statistics.

    MMD² = mean k(a, a') + mean k(b, b') - 2 mean k(a, b)      over all pairs, equal ones too

degree      histograms of degrees,                        k = exp(-EMD²/2)
cluster     of clustering coefficients, 100 bins,         k = exp(-EMD²/(2 · 0.1²))
orbit       mean counts of the 15 orbits of graphlets     k = exp(-|a - b|²/(2 · 30²))
            of up to four nodes
spectral    histograms of the normalised Laplacian's      k = exp(-TV²/2)
            eigenvalues, 200 bins from 0 to 2

EMD, the earth mover's distance of two histograms on a line, is the sum of the differences of their
cumulative sums times the width of a bin; TV, total variation, half the sum of their differences.
Counting equal pairs biases MMD² upward, the more the fewer graphs there are: compare with the MMD²
of as many real graphs. You et al. 2018, arXiv 1802.08773 (the first three); Liao et al. 2019,
arXiv 1910.00760 (spectral); Jo, Lee and Hwang 2022, arXiv 2202.02514 (settings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from scoredraw.arrays import on_host
from scoredraw.errors import import_extra, require

Float = NDArray[np.float64]

CLUSTER_BINS, SPECTRAL_BINS = 100, 200
LOWEST = -1e-5  # of the spectral bins, so that 0 lies inside the first
EDGES_AT_ONCE = 4_000_000  # entries of the edges' neighbourhoods that are held at a time


def graph_mmd(
    reference: Sequence[Any],
    generated: Sequence[Any],
    metrics: Sequence[str] = ("degree", "cluster", "orbit"),
) -> dict[str, float]:
    """MMD² between two sets of graphs, one for each of the metrics.

    Graphs are networkx graphs or adjacency matrices (n, n), of any sizes; edges have no weights.
    metrics: of "degree", "cluster", "orbit" and "spectral".
    Raises InputError for sets without graphs, an unknown metric, and adjacency matrices that are
    not square, symmetric, zero on the diagonal or without nodes.
    Time O(n³ + m n²) a graph of n nodes and m edges, for the orbits; memory O(n²).

    >>> ring = np.roll(np.eye(6), 1, 0) + np.roll(np.eye(6), -1, 0)
    >>> graph_mmd([ring], [1 - np.eye(6)], ("degree",))["degree"].__round__(4)
    1.9778
    """
    for metric in metrics:
        require(metric in METRICS, "metrics", repr(metric), f"of {', '.join(METRICS)}")
    first, second = as_matrices(reference, "reference"), as_matrices(generated, "generated")
    found = {}
    for metric in metrics:
        statistic, kernel = METRICS[metric]
        values = statistic([*first, *second])
        found[metric] = mmd(values[: len(first)], values[len(first) :], kernel)
    return found


def mmd(a: Float, b: Float, kernel: Callable[[Float, Float], Float]) -> float:
    """Biased MMD² of two samples (n, d), (m, d): equal pairs are counted."""
    return float(kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())


def as_matrices(graphs: Sequence[Any], argument: str) -> list[Float]:
    """Each graph as a matrix (n, n) of zeros and ones."""
    require(len(graphs) > 0, argument, "no graphs", "at least one")
    return [as_matrix(graph, argument) for graph in graphs]


def as_matrix(graph: Any, argument: str) -> Float:
    if hasattr(graph, "nodes"):
        require(not graph.is_directed(), argument, "a directed graph", "undirected graphs")
        nx = import_extra("networkx", "diffusion")
        A = nx.to_numpy_array(graph, weight=None) if len(graph) else np.zeros((0, 0))
    else:
        A = np.asarray(on_host(graph), np.float64)
    square = A.ndim == 2 and A.shape[0] == A.shape[1] and A.size > 0
    require(square, argument, f"shape {A.shape}", "(n, n), at least one node")
    require(bool(np.isfinite(A).all()), argument, "NaN or infinity", "finite values")
    require(bool((A == A.T).all()), argument, "an asymmetric matrix", "undirected graphs")
    require(not A.diagonal().any(), argument, "self-loops", "zeros on the diagonal")
    return (A != 0).astype(np.float64)


# ── statistics ──────────────────────────────────────────────────────────────────────────────────


def degree_shares(graphs: Sequence[Float]) -> Float:
    """The share of nodes of each degree, (graphs, largest number of nodes)."""
    width = max(len(A) for A in graphs)
    counts = [np.bincount(A.sum(0).astype(np.int64), minlength=width) for A in graphs]
    return np.stack([count / count.sum() for count in counts])


def clustering(A: Float) -> Float:
    """The share of a node's pairs of neighbours that are joined, 0 for fewer than two neighbours.

    >>> clustering(np.ones((3, 3)) - np.eye(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    degree = A.sum(0)
    ordered_pairs = degree * (degree - 1)
    joined = ((A @ A) * A).sum(0)
    return np.divide(joined, ordered_pairs, out=np.zeros(len(A)), where=ordered_pairs > 0)


def cluster_shares(graphs: Sequence[Float]) -> Float:
    return np.stack([shares(clustering(A), CLUSTER_BINS, 0.0, 1.0) for A in graphs])


def spectral_shares(graphs: Sequence[Float]) -> Float:
    """Of the eigenvalues of I - D^{-1/2} A D^{-1/2}, 0 for nodes without edges."""
    return np.stack([shares(spectrum(A), SPECTRAL_BINS, LOWEST, 2.0) for A in graphs])


def spectrum(A: Float) -> Float:
    """Eigenvalues of the normalised Laplacian, in [0, 2]; rounding doesn't leave the interval."""
    degree = A.sum(0)
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros(len(A)), where=degree > 0)
    laplacian = np.diag((degree > 0).astype(np.float64)) - scale[:, None] * A * scale
    return np.clip(np.linalg.eigvalsh(laplacian), 0.0, 2.0)


def shares(values: Float, bins: int, low: float, high: float) -> Float:
    return np.histogram(values, bins, (low, high))[0] / len(values)


def mean_orbit_counts(graphs: Sequence[Float]) -> Float:
    return np.stack([orbit_counts(A).mean(0) for A in graphs])


def orbit_counts(A: Float) -> Float:
    """How often each node touches each of the 15 orbits of induced graphlets of 2 to 4 nodes.

    A: (n, n) of zeros and ones. Returns (n, 15) in the usual order: 0 edge; 1, 2 path of three
    (end, middle); 3 triangle; 4, 5 path of four (end, middle); 6, 7 star (leaf, centre); 8 ring of
    four; 9, 10, 11 paw (its tail, the two plain corners, the corner with the tail); 12, 13 diamond
    (two edges, three edges); 14 complete.

    Subgraphs that need not be induced have closed forms in degrees, triangles and numbers of shared
    neighbours; subtracting what denser graphlets contribute leaves the induced ones.
    Time O(n³ + m n²) for m edges, memory O(n²). Pržulj 2007; Hočevar and Demšar 2014.

    >>> orbit_counts(np.ones((4, 4)) - np.eye(4))[0].astype(int).tolist()
    [3, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    d = A.sum(0)
    common = A @ A
    np.fill_diagonal(common, 0.0)
    shared = A * common  # of the two ends of every edge
    triangles = shared.sum(0) / 2
    reach = A @ (d - 1)

    complete = complete_four(A)
    diamond_3 = (A * choose_two(common)).sum(0) - 3 * complete
    inside = A * np.maximum(common - 1, 0)
    diamond_2 = (A * (A @ inside)).sum(1) / 2 - 3 * complete
    paw_3 = triangles * (d - 2) - 2 * diamond_3 - 3 * complete
    paw_2 = shared @ (d - 2) - 2 * diamond_2 - 2 * diamond_3 - 6 * complete
    paw_1 = A @ triangles - 2 * triangles - 2 * diamond_2 - 3 * complete
    ring = choose_two(common).sum(0) - diamond_2 - diamond_3 - 3 * complete
    centre = d * (d - 1) * (d - 2) / 6 - paw_3 - diamond_3 - complete
    leaf = A @ choose_two(d - 1) - paw_1 - paw_2 - 2 * diamond_2 - diamond_3 - 3 * complete
    middle = (d - 1) * reach - 2 * triangles
    middle -= 2 * ring + 2 * paw_3 + paw_2 + 4 * diamond_3 + 2 * diamond_2 + 6 * complete
    end = A @ reach - d * (d - 1) - 2 * triangles
    end -= 2 * ring + 2 * paw_1 + paw_2 + 4 * diamond_2 + 2 * diamond_3 + 6 * complete
    return np.stack([
        d, reach - 2 * triangles, choose_two(d) - triangles, triangles, end, middle, leaf, centre,
        ring, paw_1, paw_2, paw_3, diamond_2, diamond_3, complete,
    ], axis=1)  # fmt: skip


def complete_four(A: Float) -> Float:
    """Complete graphs of four nodes at each node: edges among the shared neighbours of edges."""
    ends = np.argwhere(np.triu(A))
    found = np.zeros(len(A))
    for part in np.array_split(ends, max(1, -(-len(ends) * len(A) // EDGES_AT_ONCE))):
        shared = A[part[:, 0]] * A[part[:, 1]]
        edges = ((shared @ A) * shared).sum(1) / 2
        found += np.bincount(part.ravel(), np.repeat(edges, 2), minlength=len(A))
    return found / 3


def choose_two(count: Float) -> Float:
    return count * (count - 1) / 2


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────


def earth_mover_kernel(sigma: float, bins_per_unit: float = 1.0) -> Callable[[Float, Float], Float]:
    """exp(-EMD²/2σ²) of histograms (n, bins), (m, bins) -> (n, m)."""

    def kernel(a: Float, b: Float) -> Float:
        distance = cdist(np.cumsum(a, 1), np.cumsum(b, 1), "cityblock") / bins_per_unit
        return np.exp(-(distance**2) / (2 * sigma**2))

    return kernel


def total_variation_kernel(a: Float, b: Float) -> Float:
    """exp(-TV²/2) of histograms (n, bins), (m, bins) -> (n, m)."""
    return np.exp(-((cdist(a, b, "cityblock") / 2) ** 2) / 2)


def gaussian_kernel(sigma: float) -> Callable[[Float, Float], Float]:
    """exp(-|a - b|²/2σ²) of vectors (n, d), (m, d) -> (n, m)."""
    return lambda a, b: np.exp(-cdist(a, b, "sqeuclidean") / (2 * sigma**2))


METRICS: dict[str, tuple[Callable[[Sequence[Float]], Float], Callable[[Float, Float], Float]]] = {
    "degree": (degree_shares, earth_mover_kernel(1.0)),
    "cluster": (cluster_shares, earth_mover_kernel(0.1, CLUSTER_BINS)),
    "orbit": (mean_orbit_counts, gaussian_kernel(30.0)),
    "spectral": (spectral_shares, total_variation_kernel),
}
