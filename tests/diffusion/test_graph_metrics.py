"""Orbit counts and MMDs against enumeration, networkx and closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

nx = pytest.importorskip("networkx", reason="the diffusion extra is not installed")

from scoredraw.diffusion import graph_metrics  # noqa: E402
from scoredraw.diffusion.graph_metrics import (  # noqa: E402
    METRICS,
    as_matrices,
    clustering,
    earth_mover_kernel,
    graph_mmd,
    orbit_counts,
    spectrum,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

Float = NDArray[np.float64]

FOURS = {  # edges and largest degree of a connected graph of four nodes -> orbit of each degree
    (3, 2): {1: 4, 2: 5},
    (3, 3): {1: 6, 3: 7},
    (4, 2): {2: 8},
    (4, 3): {1: 9, 2: 10, 3: 11},
    (5, 3): {2: 12, 3: 13},
    (6, 3): {3: 14},
}


def random_matrix(rng: np.random.Generator, n: int, p: float) -> Float:
    upper = np.triu(rng.random((n, n)) < p, 1).astype(float)
    return upper + upper.T


def enumerated(A: Float) -> Float:
    """Orbits of every connected set of two to four nodes."""
    counts = np.zeros((len(A), 15))
    for size in (2, 3, 4):
        for nodes in itertools.combinations(range(len(A)), size):
            part = A[np.ix_(nodes, nodes)]
            if not nx.is_connected(nx.from_numpy_array(part)):
                continue
            degree, edges = part.sum(0).astype(int), int(part.sum()) // 2
            orbit = {2: {1: 0}, 3: {1: 1, 2: 2 if edges == 2 else 3}}.get(size)
            orbit = orbit or FOURS[edges, degree.max()]
            for node, d in zip(nodes, degree, strict=True):
                counts[node, orbit[d]] += 1
    return counts


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_orbits_are_those_of_enumeration(p: float) -> None:
    rng = np.random.default_rng(int(10 * p))
    for n in (1, 2, 3, 5, 9):
        A = random_matrix(rng, n, p)
        np.testing.assert_array_equal(orbit_counts(A), enumerated(A))


def test_orbits_do_not_depend_on_how_edges_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    A = random_matrix(np.random.default_rng(0), 12, 0.7)
    whole = orbit_counts(A)
    monkeypatch.setattr(graph_metrics, "EDGES_AT_ONCE", 30)
    np.testing.assert_array_equal(orbit_counts(A), whole)


def test_statistics_are_those_of_networkx() -> None:
    rng = np.random.default_rng(1)
    for p in (0.0, 0.2, 0.6):
        A = random_matrix(rng, 10, p)
        graph = nx.from_numpy_array(A)
        np.testing.assert_allclose(clustering(A), list(nx.clustering(graph).values()))
        np.testing.assert_allclose(
            spectrum(A), np.clip(nx.normalized_laplacian_spectrum(graph), 0, 2), atol=1e-9
        )


def test_a_bipartite_spectrum_stays_in_its_bins() -> None:
    shares = METRICS["spectral"][0](as_matrices([nx.complete_bipartite_graph(3, 4)], "a"))
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0, -1] == pytest.approx(1 / 7)
    assert shares[0, 0] == pytest.approx(1 / 7)


def test_earth_mover_distance_is_scipys() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.dirichlet(np.ones(8), size=(2, 4))
    kernel = earth_mover_kernel(0.7, 3.0)(a, b)
    places = np.arange(8) / 3
    for i, j in itertools.product(range(4), range(4)):
        distance = wasserstein_distance(places, places, a[i], b[j])
        assert kernel[i, j] == pytest.approx(np.exp(-(distance**2) / (2 * 0.7**2)))


def test_mmd_of_two_single_graphs_is_two_less_twice_the_kernel() -> None:
    ring, full = nx.cycle_graph(5), nx.complete_graph(5)
    found = graph_mmd([ring], [full], ("degree", "cluster", "orbit", "spectral"))
    assert found["degree"] == pytest.approx(2 - 2 * np.exp(-(2.0**2) / 2))
    # clustering 0 and 1 fall 99 bins apart
    assert found["cluster"] == pytest.approx(2 - 2 * np.exp(-(0.99**2) / (2 * 0.1**2)))
    between = orbit_counts(nx.to_numpy_array(ring)).mean(0) - np.eye(15)[[0, 3, 14]].T @ [4, 6, 4]
    assert found["orbit"] == pytest.approx(2 - 2 * np.exp(-(between @ between) / (2 * 30**2)))
    assert 0 < found["spectral"] < 2 - 2 * np.exp(-0.5) + 1e-12


def test_the_same_set_is_at_no_distance_and_the_order_is_no_matter() -> None:
    rng = np.random.default_rng(3)
    a = [random_matrix(rng, int(n), 0.4) for n in rng.integers(3, 9, size=6)]
    b = [random_matrix(rng, int(n), 0.6) for n in rng.integers(3, 9, size=5)]
    for value in graph_mmd(a, a[::-1], tuple(METRICS)).values():
        assert value == pytest.approx(0, abs=1e-12)
    there, back = graph_mmd(a, b, tuple(METRICS)), graph_mmd(b, a, tuple(METRICS))
    for metric, value in there.items():
        assert value == pytest.approx(back[metric])
        assert value > 0


def test_matrices_tensors_and_graphs_are_the_same() -> None:
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    a, b = nx.path_graph(6), nx.star_graph(5)
    want = graph_mmd([a], [b])
    for form in (nx.to_numpy_array, lambda g: torch.as_tensor(nx.to_numpy_array(g))):
        assert graph_mmd([form(a)], [form(b)]) == want


def test_single_nodes_are_graphs() -> None:
    found = graph_mmd([nx.empty_graph(1)], [nx.empty_graph(1), nx.path_graph(2)], tuple(METRICS))
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ([], "generated: got no graphs"),
        ([np.ones((2, 3))], r"generated: got shape \(2, 3\)"),
        ([np.triu(np.ones((3, 3)), 1)], "generated: got an asymmetric matrix"),
        ([np.ones((2, 2))], "generated: got self-loops"),
        ([np.full((2, 2), np.nan)], "generated: got NaN"),
        ([nx.empty_graph(0)], r"generated: got shape \(0, 0\)"),
        ([nx.path_graph(3, create_using=nx.DiGraph)], "generated: got a directed graph"),
    ],
)
def test_sets_that_are_refused(graphs: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        graph_mmd([nx.path_graph(3)], graphs)
    with pytest.raises(InputError, match="metrics: got 'diameter', want of degree"):
        graph_mmd([nx.path_graph(3)], [nx.path_graph(3)], ("diameter",))
