"""The two networks that learn a graph's partial scores, and how they are trained.

Both are permutation-equivariant and see the noisy graph alone; time enters outside them, as
1/sigma(t). With Â = D^{-1/2} A' D^{-1/2}, A' being A with ones on the diagonal:

    X-network   H_l = tanh(Â H_{l-1} W_l + b_l),  H_0 = X;    net = MLP([H_0, ..., H_L])

    A-network   channels C_0 = [A, A², ...]. A layer makes, of every channel c and head h,
                Q, K, V = graph convolutions of H on c,    S_c = mean_h tanh(Q_h K_hᵀ / sqrt(d)),
                C' = MLP([S + Sᵀ, C]) symmetrised,         H' = tanh(MLP([V of all channels]));
                net_ij = MLP of all channels of all layers at (i, j)

d is the width of a head. The released code divides by the width of V instead.

Jo, Lee and Hwang, ICML 2022, arXiv 2202.02514. Attention: Baek, Kang and Hwang, ICLR 2021.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoredraw.diffusion.graph_arrays import (
    checked_graphs,
    flags_of_sizes,
    mask_edges,
    mask_nodes,
    quantize_adjacency,
    to_networkx,
)
from scoredraw.diffusion.graph_sampling import GraphSample, sample_graphs
from scoredraw.diffusion.graph_system import GraphSDESystem, score_matching_loss
from scoredraw.diffusion.schedules import (
    LinearBeta,
    NoiseSchedule,
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.errors import InputError, import_extra, require
from scoredraw.journal import atomic_path

SHIPPED = "graph-scores.safetensors"


# ── layers ──────────────────────────────────────────────────────────────────────────────────────


def perceptron(layers: int, inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear layers with ELU between them."""
    sizes = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ELU()]
    return nn.Sequential(*parts[:-1])


def normalised(adj: Tensor) -> Tensor:
    """D^{-1/2} A' D^{-1/2} of (..., N, N), with ones on A's diagonal and degrees of at least 1.

    >>> normalised(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()[0][0]  # doctest: +ELLIPSIS
    0.49999...
    """
    loops = torch.eye(adj.shape[-1], dtype=adj.dtype, device=adj.device)
    with_loops = adj * (1 - loops) + loops
    scale = with_loops.sum(-1).clamp(min=1).rsqrt()
    return scale[..., :, None] * with_loops * scale[..., None, :]


def adjacency_powers(adj: Tensor, count: int) -> Tensor:
    """A, A², ..., A^count as channels (B, count, N, N)."""
    powers = [adj]
    for _ in range(count - 1):
        powers.append(powers[-1] @ adj)
    return torch.stack(powers, 1)


class GraphConvolutions(nn.Module):
    """Â_c H W_c + b_c for every channel c at once: (B, C, N, N), (B, N, F) -> (B, C, N, out)."""

    def __init__(self, channels: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (inputs + outputs))  # Glorot and Bengio
        self.weight = nn.Parameter(torch.empty(channels, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels, 1, outputs))

    def forward(self, h: Tensor, normal: Tensor) -> Tensor:
        return normal @ (h[:, None] @ self.weight) + self.bias


class AttentionLayer(nn.Module):
    """One layer of the A-network: (h, channels, flags) -> (h', channels').

    hidden: the width of h'; 0 in the last layer, whose h' nobody would look at.
    """

    def __init__(
        self, inputs: int, width: int, hidden: int, channels: tuple[int, int], heads: int
    ) -> None:
        super().__init__()
        before, after = channels
        self.heads, self.width = heads, width
        self.queries = GraphConvolutions(before, inputs, width)
        self.keys = GraphConvolutions(before, inputs, width)
        self.mix_channels = perceptron(2, 2 * before, 2 * max(before, after), after)
        self.onward = hidden > 0
        if self.onward:
            self.values = GraphConvolutions(before, inputs, hidden)
            self.mix_values = perceptron(2, before * hidden, 2 * max(inputs, hidden), hidden)

    def attention(self, h: Tensor, normal: Tensor) -> Tensor:
        """S (B, C, N, N): how much two nodes have to do with each other, in [-1, 1]."""
        q, k = self.queries(h, normal), self.keys(h, normal)
        head = self.width // self.heads
        by_head = (*q.shape[:3], self.heads, head)
        q, k = q.reshape(by_head).transpose(2, 3), k.reshape(by_head).transpose(2, 3)
        return torch.tanh(q @ k.mT / math.sqrt(head)).mean(2)

    def forward(self, h: Tensor, channels: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        normal = normalised(channels)
        found = self.attention(h, normal)
        mixed = torch.cat([(found + found.mT) / 2, channels], 1).movedim(1, -1)
        edges = self.mix_channels(mixed).movedim(-1, 1)
        both = flags[:, None, :, None] * flags[:, None, None, :]
        if self.onward:
            values = self.values(h, normal).transpose(1, 2).flatten(2)  # (B, N, C hidden)
            h = mask_nodes(torch.tanh(self.mix_values(values)), flags)
        return h, (edges + edges.mT) * both


# ── the networks ────────────────────────────────────────────────────────────────────────────────


class ScoreNetworkX(nn.Module):
    """sigma times minus the score of the node features: (x, adj, flags) -> (B, N, F).

    n_features: F. depth graph convolutions of width `hidden`, all of whose outputs go through a
    perceptron of three layers. Raises InputError for sizes below 1.

    >>> net = ScoreNetworkX(3)
    >>> net(torch.ones(1, 4, 3), torch.zeros(1, 4, 4), torch.ones(1, 4)).shape
    torch.Size([1, 4, 3])
    """

    def __init__(self, n_features: int, *, depth: int = 3, hidden: int = 32) -> None:
        super().__init__()
        for name, value in (("n_features", n_features), ("depth", depth), ("hidden", hidden)):
            require(value >= 1, name, value, "a positive count")
        self.config = {"n_features": n_features, "depth": depth, "hidden": hidden}
        widths = [n_features, *[hidden] * depth]
        self.layers = nn.ModuleList(
            GraphConvolutions(1, a, b) for a, b in itertools.pairwise(widths)
        )
        self.last = perceptron(3, sum(widths), 2 * sum(widths), n_features)

    def forward(self, x: Tensor, adj: Tensor, flags: Tensor) -> Tensor:
        normal, found = normalised(adj)[:, None], [x]
        for layer in self.layers:
            found.append(torch.tanh(layer(found[-1], normal)[:, 0]))
        return mask_nodes(self.last(torch.cat(found, -1)), flags)


class ScoreNetworkA(nn.Module):
    """sigma times minus the score of the adjacency matrix: (x, adj, flags) -> (B, N, N).

    n_features: F. `layers` layers of attention with `heads` heads of width / heads each, hidden
    node features of width `hidden`; powers: how many powers of adj are channels at first, channels
    between layers, last_channels at the end. The answer is symmetric and zero on the diagonal.
    Raises InputError for sizes below 1 and heads that do not divide width.

    >>> net = ScoreNetworkA(3, layers=2)
    >>> answer = net(torch.ones(1, 4, 3), torch.zeros(1, 4, 4), torch.ones(1, 4))
    >>> answer.shape, bool((answer.diagonal(dim1=1, dim2=2) == 0).all())
    (torch.Size([1, 4, 4]), True)
    """

    def __init__(
        self,
        n_features: int,
        *,
        layers: int = 5,
        hidden: int = 32,
        width: int = 32,
        heads: int = 4,
        powers: int = 2,
        channels: int = 8,
        last_channels: int = 4,
    ) -> None:
        super().__init__()
        self.config = {
            "n_features": n_features, "layers": layers, "hidden": hidden, "width": width,
            "heads": heads, "powers": powers, "channels": channels, "last_channels": last_channels,
        }  # fmt: skip
        for name, value in self.config.items():
            require(value >= 1, name, value, "a positive count")
        require(width % heads == 0, "heads", heads, f"a divisor of width = {width}")
        counts = [powers, *[channels] * (layers - 1), last_channels]
        self.layers = nn.ModuleList(
            AttentionLayer(
                hidden if i else n_features, width, hidden if i < layers - 1 else 0, step, heads
            )
            for i, step in enumerate(itertools.pairwise(counts))
        )
        self.last = perceptron(3, sum(counts), 2 * sum(counts), 1)

    def forward(self, x: Tensor, adj: Tensor, flags: Tensor) -> Tensor:
        channels, h = adjacency_powers(adj, self.config["powers"]), x
        found = [channels]
        for layer in self.layers:
            h, channels = layer(h, channels, flags)
            found.append(channels)
        net = self.last(torch.cat(found, 1).movedim(1, -1))[..., 0]
        return mask_edges((net + net.mT) / 2, flags)


# ── training ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Training:
    """How the networks are trained; the defaults are the paper's for small graphs.

    Adam with weight decay; the learning rate is multiplied by `decay` after every epoch; gradients
    are clipped to length `clip`. The trained weights are an exponential average of those of all
    steps: w <- w + (1 - min(ema, (1 + n)/(10 + n))) (new - w), n counting the steps.
    """

    epochs: int = 5000
    batch: int = 128
    learning_rate: float = 0.01
    decay: float = 0.999
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999


class ScoreTrainer:
    """Two networks, two optimisers and two moving averages; `step` trains on one batch.

    net_x may be None, for coupling "adjacency". coupling: see `score_matching_loss`.
    """

    def __init__(
        self,
        net_x: nn.Module | None,
        net_adj: nn.Module,
        system: GraphSDESystem,
        training: Training,
        *,
        coupling: str = "joint",
    ) -> None:
        needs_x = coupling != "adjacency"
        require((net_x is not None) == needs_x, "net_x", net_x, f"as coupling={coupling!r} has it")
        self.net_x, self.net_adj, self.system = net_x, net_adj, system
        self.training, self.coupling = training, coupling
        self.networks = [net for net in (net_x, net_adj) if net is not None]
        self.averages = [
            torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=self._average)
            for net in self.networks
        ]
        rate, weight_decay = training.learning_rate, training.weight_decay
        self.optimisers = [
            torch.optim.Adam(net.parameters(), lr=rate, weight_decay=weight_decay)
            for net in self.networks
        ]

    def _average(self, average: list[Tensor], new: list[Tensor], n: Tensor | int) -> None:
        keep = min(self.training.ema, (1 + int(n)) / (10 + int(n)))
        with torch.no_grad():
            torch._foreach_lerp_(average, new, 1 - keep)

    def step(
        self, x: Tensor, adj: Tensor, flags: Tensor, generator: torch.Generator | None = None
    ) -> tuple[float, float]:
        """The losses of x and adj on this batch, before the step."""
        losses = score_matching_loss(
            self.net_x, self.net_adj, x, adj, self.system, flags,
            coupling=self.coupling, generator=generator,
        )  # fmt: skip
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        (losses[0] + losses[1]).backward()
        for net, optimiser, average in zip(
            self.networks, self.optimisers, self.averages, strict=True
        ):
            nn.utils.clip_grad_norm_(net.parameters(), self.training.clip)
            optimiser.step()
            average.update_parameters(net)
        return losses[0].item(), losses[1].item()

    def end_epoch(self) -> None:
        """Lower the learning rate."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] *= self.training.decay

    def averaged(self) -> tuple[nn.Module | None, nn.Module]:
        """The networks with averaged weights."""
        found = [average.module.requires_grad_(False) for average in self.averages]
        return (found[0] if self.net_x is not None else None), found[-1]


def train_scores(
    x: Tensor,
    adj: Tensor,
    system: GraphSDESystem | None = None,
    flags: Tensor | None = None,
    *,
    training: Training | None = None,
    coupling: str = "joint",
    networks: tuple[nn.Module | None, nn.Module] | None = None,
    generator: torch.Generator | None = None,
) -> GraphScores:
    """Networks that have learned the partial scores of graphs (x, adj).

    x, adj, flags: a batch that `checked_graphs` accepts. networks: two to go on with, default a
    `ScoreNetworkX` and a `ScoreNetworkA` of the paper's sizes, initialised from torch's own
    generator. generator: of the batches and noises. training: see `Training`.
    Raises InputError for such batches, and with the epoch once a loss is not finite.
    Time: epochs · n/batch steps of two small networks. Jo, Lee and Hwang 2022, arXiv 2202.02514.

    >>> adj = torch.ones(4, 3, 3) - torch.eye(3)
    >>> found = train_scores(torch.ones(4, 3, 2), adj, training=Training(epochs=1))
    >>> found.sample([3, 2], n_steps=3).adj.shape
    torch.Size([2, 3, 3])
    """
    real = checked_graphs(x, adj, flags).to(x.dtype)
    plan, sde = training or Training(), system or GraphSDESystem()
    if networks is None:
        net_x = None if coupling == "adjacency" else ScoreNetworkX(x.shape[-1])
        networks = net_x, ScoreNetworkA(x.shape[-1])
    trainer = ScoreTrainer(networks[0], networks[1], sde, plan, coupling=coupling)
    for epoch in range(plan.epochs):
        for rows in batches(real, plan.batch, generator):
            used = real[rows].any(0).nonzero()[:, 0]  # what is padding in all of them is left out
            parts = x[rows][:, used], adj[rows][:, used][:, :, used], real[rows][:, used]
            losses = trainer.step(*parts, generator)
            if not all(map(math.isfinite, losses)):
                wanted = "finite ones: a smaller learning_rate"
                raise InputError(f"training: got losses {losses} in epoch {epoch}, want {wanted}")
        trainer.end_epoch()
    return GraphScores(*trainer.averaged(), sde, x.shape[1], x.shape[2], coupling)


def batches(flags: Tensor, size: int, generator: torch.Generator | None) -> list[Tensor]:
    """Rows in batches of graphs of about the same size, so that little padding is computed.

    >>> flags = flags_of_sizes([1, 3, 1, 3], 3)
    >>> [sorted(rows.tolist()) for rows in batches(flags, 2, None)] in ([[0, 2], [1, 3]],
    ...     [[1, 3], [0, 2]])
    True
    """
    order = torch.randperm(len(flags), generator=generator)
    parts = order[flags[order].sum(1).argsort(stable=True)].split(size)
    return [parts[i] for i in torch.randperm(len(parts), generator=generator)]


# ── trained networks ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class GraphScores:
    """A trained pair of networks with all that sampling needs.

    max_nodes: the largest graph trained on. sizes: numbers of nodes to draw from, as of the
    training graphs.
    """

    net_x: nn.Module | None
    net_adj: nn.Module
    system: GraphSDESystem
    max_nodes: int
    n_features: int
    coupling: str = "joint"
    sizes: tuple[int, ...] = ()

    def sample(
        self, sizes: Any, generator: torch.Generator | None = None, **options: Any
    ) -> GraphSample:
        """Real-valued graphs with these numbers of nodes; options as of `sample_graphs`."""
        flags = flags_of_sizes(sizes, self.max_nodes)
        scores = self.system.scores(self.net_x, self.net_adj, self.coupling)
        with torch.no_grad():
            return sample_graphs(
                *scores, flags, self.n_features, self.system, coupling=self.coupling,
                generator=generator, **options,
            )  # fmt: skip

    def graphs(
        self, count: int, generator: torch.Generator | None = None, **options: Any
    ) -> list[Any]:
        """`count` networkx graphs with sizes drawn from `sizes`; nodes without edges dropped."""
        require(count >= 1, "count", count, "a positive count")
        known = torch.tensor(self.sizes or (self.max_nodes,))
        sizes = known[torch.randint(len(known), (count,), generator=generator)]
        return to_networkx(quantize_adjacency(self.sample(sizes, generator, **options).adj))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and settings as one safetensors file."""
        safetensors = import_extra("safetensors.torch", "diffusion")
        settings = {
            "net_x": None if self.net_x is None else self.net_x.config,
            "net_adj": self.net_adj.config,
            "system": [describe(schedule) for schedule in self.system.parts],
            "max_nodes": self.max_nodes, "n_features": self.n_features,
            "coupling": self.coupling, "sizes": self.sizes,
        }  # fmt: skip
        tensors = {f"{name}.{key}": value for name, key, value in self._weights()}
        with atomic_path(Path(path)) as temporary:
            safetensors.save_file(tensors, temporary, {"settings": json.dumps(settings)})

    def _weights(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, net in (("net_x", self.net_x), ("net_adj", self.net_adj)):
            for key, value in {} if net is None else net.state_dict().items():
                yield name, key, value.contiguous()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GraphScores:
        """Read what `save` wrote. Raises InputError for another file."""
        safetensors = import_extra("safetensors", "diffusion")
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as file:
                settings = json.loads(file.metadata()["settings"])
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            came = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"path: got {came}, want a file of GraphScores.save") from None
        nets: list[Any] = []
        for name, kind in (("net_x", ScoreNetworkX), ("net_adj", ScoreNetworkA)):
            config = settings.pop(name)
            nets.append(None if config is None else kind(**config).requires_grad_(False))
            own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
            if config is not None:
                nets[-1].load_state_dict(own)
        system = GraphSDESystem(*(schedule_of(**one) for one in settings.pop("system")))
        settings["sizes"] = tuple(settings["sizes"])
        return cls(nets[0], nets[1], system, **settings)


KINDS: dict[str, type[NoiseSchedule]] = {
    "vp": LinearBeta,
    "subvp": SubVariancePreserving,
    "ve": VarianceExploding,
}


def describe(schedule: NoiseSchedule) -> dict[str, Any]:
    """What `schedule_of` makes the schedule from again."""
    kind = next(kind for kind, made in KINDS.items() if type(schedule) is made)
    names = ("sigma_min", "sigma_max") if kind == "ve" else ("beta_0", "beta_1")
    return {"kind": kind, **{name: getattr(schedule, name) for name in names}}


def schedule_of(kind: str, **settings: float) -> NoiseSchedule:
    """The schedule of a description.

    >>> describe(schedule_of("ve", sigma_min=0.2, sigma_max=1.0))
    {'kind': 've', 'sigma_min': 0.2, 'sigma_max': 1.0}
    """
    if kind == "ve":
        return VarianceExploding(settings["sigma_min"], settings["sigma_max"], time="geometric")
    return KINDS[kind](**settings)


def load_graph_scores() -> GraphScores:
    """The networks in this package, trained on random graphs of two communities."""
    with resources.as_file(resources.files("scoredraw") / "data" / SHIPPED) as path:
        return GraphScores.load(path)


def generate_graphs(
    count: int,
    scores: GraphScores | str | os.PathLike[str] | None = None,
    *,
    rng: int = 0,
    **options: Any,
) -> list[Any]:
    """`count` networkx graphs from trained networks, the shipped ones by default.

    scores: a `GraphScores`, the path of one, or None for the networks in this package, which were
    trained on random graphs of two communities with 12 to 20 nodes. options: as of
    `sample_graphs` (method, n_steps, snr, ...). rng: a seed.

    >>> [len(graph) <= 20 for graph in generate_graphs(2, n_steps=5)]
    [True, True]
    """
    if scores is None:
        scores = load_graph_scores()
    elif not isinstance(scores, GraphScores):
        scores = GraphScores.load(scores)
    return scores.graphs(count, torch.Generator().manual_seed(rng), **options)
