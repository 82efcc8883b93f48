"""The graph sets, the claim-makers on invented figures, and a short run."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
nx = pytest.importorskip("networkx", reason="the diffusion extra is not installed")
pytest.importorskip("safetensors", reason="the diffusion extra is not installed")

from scoredraw.diffusion.graph_networks import GraphScores, Training  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402
from scoredraw.metrics import Estimate  # noqa: E402
from scoredraw.papers import graph_sets, p58_gdss  # noqa: E402
from scoredraw.papers.graph_sets import METRICS, Compared, GraphSet  # noqa: E402
from scoredraw.papers.p58_gdss import NAMES, PLANS  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

pytestmark = pytest.mark.oracle

Float = NDArray[np.float64]
RNG = np.random.default_rng(58)
PLAN = PLANS["smoke"]


@pytest.fixture(autouse=True)
def without_the_papers_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(graph_sets.VARIABLE, raising=False)


# ── sets of graphs ──────────────────────────────────────────────────────────────────────────────


def test_communities_follow_their_rule() -> None:
    """Of 400: a share of 0.7 inside a community within 0.01, five standard errors, and at least
    one edge between; 1 % of the pairs beside, within 0.3 %."""
    graphs = graph_sets.community_graphs(400)
    inside, between = np.zeros(2), np.zeros(2)
    for graph in graphs:
        A, half = nx.to_numpy_array(graph), len(graph) // 2
        inside += np.array([A[:half, :half].sum() + A[half:, half:].sum(), 2 * half * (half - 1)])
        assert A[:half, half:].any()
        between += np.array([max(A[:half, half:].sum() - 1, 0), half**2])
    assert inside[0] / inside[1] == pytest.approx(0.7, abs=0.01)
    assert between[0] / between[1] < 0.008
    assert {len(graph) for graph in graphs} == {12, 14, 16, 18, 20}
    again = graph_sets.community_graphs(400)
    assert all(nx.utils.graphs_equal(a, b) for a, b in zip(graphs, again, strict=True))
    assert not nx.utils.graphs_equal(graphs[0], graph_sets.community_graphs(1, rng=1)[0])


def test_egos_are_a_node_and_neighbours_of_it() -> None:
    graphs = graph_sets.ego_graphs(200)
    assert len(graphs) == 200
    assert {len(graph) for graph in graphs} >= {4, 5, 6, 7, 8, 9, 10}
    assert all(4 <= len(graph) <= 17 for graph in graphs)
    assert all(max(dict(graph.degree).values()) == len(graph) - 1 for graph in graphs)
    again = graph_sets.ego_graphs(200)
    assert all(nx.utils.graphs_equal(a, b) for a, b in zip(graphs, again, strict=True))


def test_a_set_holds_out_its_first_fifth() -> None:
    for family in graph_sets.FAMILIES:
        data = graph_sets.graph_set(family)
        assert not data.real
        assert len(data.test) == int(0.2 * (len(data.test) + len(data.train)))
        x, adj, flags = data.batch()
        assert x.shape == (len(data.train), data.max_nodes, data.n_features)
        assert adj.sum((1, 2)).tolist() == [2 * g.number_of_edges() for g in data.train]
        assert flags.sum(1).tolist() == list(map(len, data.train))
    with pytest.raises(InputError, match="family: got 'grid', want one of community, ego"):
        graph_sets.graph_set("grid")


def test_the_variable_names_a_folder_of_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graph_sets.VARIABLE, str(tmp_path))
    stored = [{"n": n, "edges": [[0, 1], [1, 2]]} for n in (3, 4, 5, 6, 7)]
    (tmp_path / "ego_small.json").write_text(json.dumps(stored))
    data = graph_sets.graph_set("ego")
    assert data.real
    assert [len(graph) for graph in data.test + data.train] == [3, 4, 5, 6, 7]
    assert list(data.train[0].edges) == [(0, 1), (1, 2)]
    with pytest.raises(InputError, match=r"SCOREDRAW_GRAPHS: got FileNotFoundError.*community"):
        graph_sets.graph_set("community")
    (tmp_path / "community_small.json").write_text('{"n": 3}')
    with pytest.raises(InputError, match=r"SCOREDRAW_GRAPHS: got TypeError"):
        graph_sets.graph_set("community")


def test_random_graphs_have_the_sizes_and_on_average_the_densities() -> None:
    """0.01 is over five standard errors of 200 times 20 nodes."""
    like = [nx.empty_graph(5), nx.complete_graph(6), *[nx.gnp_random_graph(20, 0.3, seed=1)] * 200]
    made = graph_sets.random_graphs(like, 0)
    assert [len(graph) for graph in made] == [len(graph) for graph in like]
    assert (made[0].number_of_edges(), made[1].number_of_edges()) == (0, 15)
    density = np.mean([nx.density(graph) for graph in made[2:]])
    assert density == pytest.approx(nx.density(like[2]), abs=0.01)


def test_isomorphic_graphs_are_known() -> None:
    path = nx.relabel_nodes(nx.path_graph(4), {0: 2, 1: 0, 2: 3, 3: 1})
    assert graph_sets.share_known([path, nx.star_graph(3)], [nx.path_graph(4)]) == 0.5


def test_a_strip_has_a_tile_a_graph() -> None:
    from matplotlib.image import imread

    strip = graph_sets.graph_strip([nx.path_graph(3), nx.complete_graph(5), nx.empty_graph(1)])
    pixels = imread(io.BytesIO(base64.b64decode(strip)), format="png")
    assert pixels.shape[1] == pytest.approx(3 * pixels.shape[0], abs=2)
    assert pixels[..., :3].std() > 0.01


def test_shipped_networks_are_made_by_their_function(tmp_path: Path) -> None:
    graph_sets.train_shipped(tmp_path / "a.safetensors", Training(epochs=0))
    made = GraphScores.load(tmp_path / "a.safetensors")
    shipped = p58_gdss.load_graph_scores()
    assert made.net_adj.config == shipped.net_adj.config
    assert made.sizes == shipped.sizes
    assert (made.max_nodes, made.n_features) == (shipped.max_nodes, shipped.n_features)
    assert (tmp_path / "a.safetensors").stat().st_size < 1_000_000


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def invented_moments(works: bool) -> dict[str, Float]:
    """Figures that agree with every claim of the paper, or with none."""
    right = [0.04, 1.0, 1.0, 1.0]
    wrong = [0.3, 0.6, 0.5, 0.5]
    names = (*p58_gdss.SPLIT_ALONE, *p58_gdss.CORRECTED, *p58_gdss.AT_SETTINGS)
    starts = ("β 0.1 to 1, from N(0, I)", "β 0.1 to 1, from noised data")
    found = {name: np.array([right if works else wrong] * 4) for name in (*names, *starts)}
    found["independent"] = np.array([[0.4, 1.0, 0.0 if works else 0.9, 1.0]] * 4)
    return {name: v + RNG.normal(size=v.shape) * 1e-3 for name, v in found.items()}


def test_gaussian_claims_hold_and_fail() -> None:
    for works, verdict in ((True, "holds"), (False, "fails")):
        claims = p58_gdss.gaussian_claims(invented_moments(works))
        assert len(claims) == 7 + 2 + 2 + 2
        assert {c.name: c.verdict for c in claims} == {c.name: verdict for c in claims}


@pytest.fixture(scope="module")
def compared() -> Compared:
    graphs = graph_sets.community_graphs(100)
    return Compared(GraphSet("community", graphs[20:], graphs[:20], False), 0)


def test_distances_are_shares_of_the_random_graphs(compared: Compared) -> None:
    assert compared.random.shape == (5, 3)
    np.testing.assert_allclose(compared.relative(compared.random).mean(0), 1.0)
    np.testing.assert_allclose(compared.distances(compared.data.test), 0.0, atol=1e-12)
    assert (compared.relative(compared.all_train) < 0.5).all()


def test_random_claims_hold_for_training_graphs_and_fail_for_stars(compared: Compared) -> None:
    train = compared.data.train
    near = p58_gdss.random_claims("x", "", compared, [train[:20], train[20:40], train[40:60]])
    far = p58_gdss.random_claims("x", "", compared, [[nx.star_graph(19)] * 20] * 3)
    assert near[0].verdict != "fails"  # degrees hardly tell twenty random graphs from communities
    assert [c.verdict for c in near[1:]] == ["holds"] * 2
    assert far[0].verdict == "fails"
    assert [c.name.split(":")[1].split()[0] for c in near] == list(METRICS)


def values(compared: Compared, joint: float, other: float) -> dict[str, Float]:
    noise = 1 + 0.01 * RNG.normal(size=(5, 3))
    scale = compared.random.mean(0)
    found = {NAMES[c]: other * scale * noise for c in ("adjacency", "sequential", "independent")}
    found[NAMES["joint"]] = joint * scale * (1 + 0.01 * RNG.normal(size=(5, 3)))
    found[f"{NAMES['joint']}, PC"] = other * scale * noise
    return found


def test_coupling_and_solver_claims(compared: Compared) -> None:
    for joint, other, verdict in ((0.3, 0.7, "holds"), (0.7, 0.3, "fails")):
        found = values(compared, joint, other)
        claims = p58_gdss.coupling_claims("ego", compared, found)
        assert [c.verdict for c in claims] == [verdict] * 3
        assert p58_gdss.solver_claim("ego", compared, found).verdict == verdict
    some = values(compared, 0.5, 0.5)
    some[NAMES["adjacency"]][:, 2] *= 2  # worse on orbits alone
    first, *others = p58_gdss.coupling_claims("ego", compared, some)
    assert first.verdict == "holds"
    assert all(c.verdict != "fails" for c in others)
    assert isinstance(first.measured, Estimate)
    assert first.measured.value == pytest.approx(0.5, abs=0.03)


def test_the_time_of_a_step_is_compared_in_pairs() -> None:
    claim = p58_gdss.time_claim({"S4": [1.0, 1.1, 4.9], "PC": [2.0, 2.1, 10.0]})
    assert claim.verdict == "holds"
    assert p58_gdss.time_claim({"S4": [2.0, 2.1], "PC": [2.0, 2.1]}).verdict == "fails"


def test_moments_of_exact_draws_are_right() -> None:
    """20,000 draws: errors are below 0.02, five of their standard errors."""
    exact = p58_gdss.gaussian(p58_gdss.WIDE)
    v = exact.flatten(*exact.sample(20_000, 0)).numpy()
    found = p58_gdss.moments(exact, v)
    assert found[0] < 0.03
    np.testing.assert_allclose(found[1:], 1.0, atol=0.05)
    assert p58_gdss.moments(exact, 2 * v)[1] == pytest.approx(4 * found[1])


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, couplings=PLANS["full"].couplings, families=graph_sets.FAMILIES)
    monkeypatch.setitem(PLANS, "smoke", plan)
    report = run_paper(58, "smoke", 0)
    assert all(claim.verdict is None for claim in report.claims)
    assert len(report.claims) == 13 + 2 + 3 + 1 + 2 * (3 + 3 + 1)
    again: Any = Report.from_json(report.to_json())
    assert [t.columns for t in again.tables] == [t.columns for t in report.tables]
    assert [f.kind for f in report.figures] == ["line", "pictures", "bar", "bar"]
    assert len(report.to_json()) < 300_000
    names = [row[0] for row in report.tables[-1].rows]
    assert names[3:] == [
        NAMES["joint"], f"{NAMES['joint']}, PC",
        *(NAMES[c] for c in ("adjacency", "sequential", "independent")),
    ]  # fmt: skip
