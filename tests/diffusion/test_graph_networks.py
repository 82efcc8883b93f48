"""The score networks, their training and their files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
nx = pytest.importorskip("networkx", reason="the diffusion extra is not installed")
pytest.importorskip("safetensors", reason="the diffusion extra is not installed")

from scoredraw.diffusion.graph_arrays import (  # noqa: E402
    flags_of_sizes,
    from_networkx,
    one_hot_degrees,
)
from scoredraw.diffusion.graph_networks import (  # noqa: E402
    AttentionLayer,
    GraphScores,
    ScoreNetworkA,
    ScoreNetworkX,
    ScoreTrainer,
    Training,
    generate_graphs,
    normalised,
    train_scores,
)
from scoredraw.diffusion.graph_system import (  # noqa: E402
    GraphSDESystem,
    graph_noise,
    score_matching_loss,
)
from scoredraw.diffusion.schedules import (  # noqa: E402
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.contract

SMALL = {"layers": 2, "hidden": 8, "width": 8, "heads": 2, "channels": 3, "last_channels": 2}
FLAGS = flags_of_sizes([3, 5, 4], 5).double()


def networks(seed: int = 0) -> tuple[ScoreNetworkX, ScoreNetworkA]:
    torch.manual_seed(seed)
    return ScoreNetworkX(4, depth=2, hidden=8), ScoreNetworkA(4, **SMALL)


def batch() -> tuple[Any, Any, Any]:
    adj, flags = from_networkx([nx.path_graph(3), nx.cycle_graph(5), nx.star_graph(3)] * 4)
    return one_hot_degrees(adj, flags, 4), adj, flags


# ── networks ────────────────────────────────────────────────────────────────────────────────────


def test_networks_are_equivariant_and_blind_to_padding() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    x, adj = graph_noise(FLAGS, 4, torch.Generator().manual_seed(0))
    net_x, net_adj = (net.double() for net in networks())
    permuted = x[:, order], adj[:, order][:, :, order], FLAGS[:, order]
    torch.testing.assert_close(net_x(x, adj, FLAGS)[:, order], net_x(*permuted), rtol=0, atol=1e-10)
    answer = net_adj(x, adj, FLAGS).detach()
    torch.testing.assert_close(
        answer[:, order][:, :, order], net_adj(*permuted), rtol=0, atol=1e-10
    )
    assert torch.equal(answer, answer.mT)
    assert float(answer.diagonal(dim1=1, dim2=2).abs().max()) == 0.0
    assert float(answer[FLAGS == 0].abs().max()) == 0.0
    assert float(answer.std()) > 0
    cut = x[:1, :3], adj[:1, :3, :3], FLAGS[:1, :3]  # the first graph without its padding
    torch.testing.assert_close(net_x(x, adj, FLAGS)[:1, :3], net_x(*cut))
    torch.testing.assert_close(answer[:1, :3, :3], net_adj(*cut))


def test_both_networks_see_both_parts() -> None:
    x, adj = graph_noise(FLAGS, 4, torch.Generator().manual_seed(1))
    other_x, other_adj = graph_noise(FLAGS, 4, torch.Generator().manual_seed(2))
    for net in (net.double() for net in networks()):
        base = net(x, adj, FLAGS)
        assert float((net(other_x, adj, FLAGS) - base).detach().abs().max()) > 1e-4
        assert float((net(x, other_adj, FLAGS) - base).detach().abs().max()) > 1e-4


def test_normalised_adjacency() -> None:
    star = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    half, third = 1 / math.sqrt(6), 1 / 3
    want = torch.tensor([[third, half, half], [half, 0.5, 0], [half, 0, 0.5]])
    torch.testing.assert_close(normalised(star), want)
    negative = torch.tensor([[0.0, -5.0], [-5.0, 0.0]])  # a noisy graph: the degree is cut at 1
    torch.testing.assert_close(normalised(negative), torch.tensor([[1.0, -5.0], [-5.0, 1.0]]))


def test_attention_is_divided_by_the_width_of_a_head() -> None:
    """The released code divides by the width of the values, 32 here, not 4."""
    torch.manual_seed(0)
    layer = AttentionLayer(3, 8, 32, (2, 2), 2)
    h, channels = torch.randn(1, 4, 3), torch.zeros(1, 2, 4, 4)
    found = layer.attention(h, normalised(channels))
    want = torch.zeros(1, 2, 4, 4)
    for c in range(2):
        q, k = (h @ conv.weight[c] + conv.bias[c] for conv in (layer.queries, layer.keys))
        for head in (slice(0, 4), slice(4, 8)):
            want[:, c] += torch.tanh(q[..., head] @ k[..., head].mT / math.sqrt(4)) / 2
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreNetworkX(0), "n_features: got 0"),
        (lambda: ScoreNetworkX(3, depth=0), "depth: got 0"),
        (lambda: ScoreNetworkA(3, powers=0), "powers: got 0"),
        (lambda: ScoreNetworkA(3, heads=5), "heads: got 5, want a divisor of width = 32"),
    ],
)
def test_sizes_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# ── training ────────────────────────────────────────────────────────────────────────────────────


def held_out_loss(scores: GraphScores, coupling: str = "joint") -> float:
    x, adj, flags = batch()
    losses = score_matching_loss(
        scores.net_x, scores.net_adj, x.repeat(30, 1, 1), adj.repeat(30, 1, 1), scores.system,
        flags.repeat(30, 1), coupling=coupling, generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    return float(sum(losses))


@pytest.mark.parametrize("coupling", ["joint", "independent", "sequential", "adjacency"])
def test_training_lowers_the_loss_by_a_fifth(coupling: str) -> None:
    x, adj, flags = batch()
    net_x, net_adj = networks()
    pair = (None if coupling == "adjacency" else net_x, net_adj)
    losses = []
    for epochs in (0, 60):
        scores = train_scores(
            x, adj, None, flags, training=Training(epochs=epochs), coupling=coupling,
            networks=pair, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        losses.append(held_out_loss(scores, coupling))
    assert losses[1] < 0.8 * losses[0]
    found = scores.sample([3, 5], torch.Generator().manual_seed(0), n_steps=4)
    assert found.adj.shape == (2, 5, 5)


def test_the_average_follows_the_steps_it_has_seen() -> None:
    """w <- keep w + (1 - keep) new; keep = min(0.5, (1 + n)/(10 + n)); the first step is copied."""
    net_x, net_adj = networks()
    trainer = ScoreTrainer(net_x, net_adj, GraphSDESystem(), Training(ema=0.15))
    want = None
    for n in range(3):
        trainer.step(*batch(), torch.Generator().manual_seed(n))
        now = net_adj.last[0].weight.detach().clone()
        keep = min(0.15, (1 + n) / (10 + n))
        want = now if want is None else keep * want + (1 - keep) * now
    averaged = trainer.averaged()[1].last[0].weight
    torch.testing.assert_close(averaged, want)
    assert not torch.equal(averaged, now)


def test_the_learning_rate_falls_and_gradients_are_clipped() -> None:
    net_x, net_adj = networks()
    trainer = ScoreTrainer(net_x, net_adj, GraphSDESystem(), Training(decay=0.5, clip=0.01))
    trainer.step(*batch(), torch.Generator().manual_seed(0))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net_adj.parameters()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    trainer.end_epoch()
    assert trainer.optimisers[0].param_groups[0]["lr"] == 0.005


def test_training_is_repeatable_and_refuses_to_go_on_with_nan() -> None:
    x, adj, flags = batch()
    first, again = (
        train_scores(
            x, adj, None, flags, training=Training(epochs=2, batch=5), networks=networks(),
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first.net_adj.parameters(), again.net_adj.parameters(), strict=True):
        assert torch.equal(a, b)
    nan = networks()
    nan[1].last[0].weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"training: got losses .* in epoch 0, want finite"):
        train_scores(x, adj, None, flags, training=Training(epochs=1), networks=nan)
    with pytest.raises(InputError, match="net_x: got"):
        ScoreTrainer(*networks(), GraphSDESystem(), Training(), coupling="adjacency")
    with pytest.raises(InputError, match="adj: got self-loops"):
        train_scores(x, adj + torch.eye(5), None, flags)


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alone", [False, True])
def test_saved_scores_sample_the_same_graphs(tmp_path: Path, alone: bool) -> None:
    net_x, net_adj = networks()
    system = GraphSDESystem(
        SubVariancePreserving(0.1, 1.0), VarianceExploding(0.2, 1.0, time="geometric")
    )
    scores = GraphScores(
        None if alone else net_x, net_adj, system, 5, 4, "adjacency" if alone else "joint", (3, 5)
    )
    scores.save(tmp_path / "scores.safetensors")
    loaded = GraphScores.load(tmp_path / "scores.safetensors")
    samples = [
        one.sample([3, 5], torch.Generator().manual_seed(0), n_steps=3) for one in (scores, loaded)
    ]
    torch.testing.assert_close(samples[0].adj, samples[1].adj)
    assert loaded.sizes == (3, 5)
    assert {len(g) <= 5 for g in loaded.graphs(6, torch.Generator().manual_seed(0), n_steps=3)}
    drawn = replace(loaded, sizes=(4,)).sample([4], n_steps=2)
    assert drawn.adj[0, 4].abs().max() == 0.0


def test_files_and_counts_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    with pytest.raises(InputError, match="path: got FileNotFoundError"):
        GraphScores.load(path)
    path.write_text("nothing of the kind")
    with pytest.raises(InputError, match="path: got SafetensorError"):
        GraphScores.load(path)
    scores = GraphScores(*networks(), GraphSDESystem(), 5, 4)
    with pytest.raises(InputError, match="sizes: got 6 to 6, want 1 to 5 nodes"):
        scores.sample([6])
    with pytest.raises(InputError, match="count: got 0"):
        scores.graphs(0)
    assert list(tmp_path.iterdir()) == [path]


def test_the_shipped_networks_generate_graphs_of_two_communities() -> None:
    """Their halves are joined by few edges: far fewer than in random graphs as dense."""
    graphs = generate_graphs(12, rng=1, n_steps=60)
    again = generate_graphs(12, rng=1, n_steps=60)
    assert [sorted(g.edges) for g in graphs] == [sorted(g.edges) for g in again]
    assert max(map(len, graphs)) <= 20
    random = [nx.gnp_random_graph(len(g), nx.density(g), seed=i) for i, g in enumerate(graphs)]

    def crossing(graph: Any) -> float:
        halves = nx.algorithms.community.kernighan_lin_bisection(graph, seed=0)
        return nx.cut_size(graph, *halves) / max(graph.number_of_edges(), 1)

    assert sum(map(crossing, graphs)) < 0.5 * sum(map(crossing, random))
