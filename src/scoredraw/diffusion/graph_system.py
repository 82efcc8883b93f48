"""A graph's node features X and adjacency A, diffused side by side.

Both are noised by a linear process of their own, with independent noises,

    dX = f1(t) X dt + g1(t) dw1,        dA = f2(t) A dt + g2(t) dw2   (w2 symmetric, no diagonal)

and what ties them together on the way back is that each partial score sees both:

    dX = [f1 X - g1² ∇_X log p_t(X, A)] dt + g1 dw1
    dA = [f2 A - g2² ∇_A log p_t(X, A)] dt + g2 dw2,                  from t = 1 to 0.

Two networks learn the two partial scores by matching the noise that was added.

Jo, Lee and Hwang, "Score-based generative modeling of graphs via the system of stochastic
differential equations", ICML 2022, arXiv 2202.02514.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.graph_arrays import check_flags, checked_graphs, mask_edges, mask_nodes
from scoredraw.diffusion.parameterisations import as_times, per_sample
from scoredraw.diffusion.schedules import (
    LinearBeta,
    NoiseSchedule,
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.errors import require

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, adj, flags) -> like x, or like adj
Score = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # (x, adj, flags, t) -> the same
Pair = tuple[Tensor, Tensor]

COUPLINGS = ("joint", "independent", "sequential", "adjacency")
TRANSITIONS = ("exact", "code")
LEAST_TIME = 1e-5  # of training


class Kernel(NamedTuple):
    """What a move does: the state is multiplied by `mean`, and noise of this `std` is added."""

    mean: float
    std: float


def transition(schedule: NoiseSchedule, t: float, end: float, kind: str = "exact") -> Kernel:
    """The reversed linear process from time t back to `end`, without its score term.

    Reversing dx = f x dt + g dw and leaving out the score keeps dx = f x dt + g dw, run backward:

        mean = alpha(end)/alpha(t),     std² = ∫_end^t (alpha(end)/alpha(s))² g²(s) ds
                                             = alpha(end)² [rho²(t) - rho²(end)]

    which is e^{B/2} and e^B - 1, B = ∫ beta, for a VP process. kind="code" has the spread of the
    *forward* move, alpha(t)² [...] or 1 - e^{-B}, which is what the released code uses; the two
    agree for VE. A spread that would be imaginary (times below 0) is 0.

    >>> transition(LinearBeta(0.1, 1.0), 1.0, 0.995).std > transition(
    ...     LinearBeta(0.1, 1.0), 1.0, 0.995, "code").std
    True
    """
    require(kind in TRANSITIONS, "transition", repr(kind), f"one of {', '.join(TRANSITIONS)}")
    scale = float(schedule.alpha(end if kind == "exact" else t))
    gained = _squared_rho(schedule, t) - _squared_rho(schedule, end)
    mean = math.exp(float(schedule.log_alpha(end) - schedule.log_alpha(t)))
    return Kernel(mean, scale * math.sqrt(max(gained, 0.0)))


def _squared_rho(schedule: NoiseSchedule, t: float) -> float:
    """rho²(t), also at the negative times to which the released solver runs."""
    if t < 0 and type(schedule) is LinearBeta:
        return math.expm1(float(schedule.lost(t)))
    return float(schedule.rho(t)) ** 2


class DiscreteStep(NamedTuple):
    """One of N steps of the discrete model: x -> (1 + change) x + sqrt(gain) z.

    damping: the factor of the Langevin step size, 1 - beta_i or 1.
    """

    change: float
    gain: float
    damping: float


def discrete_step(schedule: NoiseSchedule, t: float, n_steps: int) -> DiscreteStep:
    """Step i = floor(t (N - 1)) of the N-step chain that the schedule is the limit of.

    VP: beta_i evenly spaced from beta_0/N to beta_1/N; change sqrt(1 - beta_i) - 1, gain beta_i.
    VE: sigma_i geometric from sigma_min to sigma_max; change 0, gain sigma_i² - sigma_{i-1}², and
    sigma_0² at the first. sub-VP, which has no chain of its own: f/N and g²/N.
    Raises InputError where a beta_i would reach 1, that is for too few steps.

    >>> discrete_step(LinearBeta(0.5, 1.0), 1.0, 4).gain
    0.25
    """
    last = max(n_steps - 1, 1)
    i = int(t * (n_steps - 1))
    if isinstance(schedule, VarianceExploding):
        sigma, before = (schedule.sigma_min * math.exp(schedule.log_ratio * k / last)
                         for k in (i, i - 1))  # fmt: skip
        return DiscreteStep(0.0, sigma**2 - (before**2 if i > 0 else 0.0), 1.0)
    assert isinstance(schedule, LinearBeta)
    beta = (schedule.beta_0 + (schedule.beta_1 - schedule.beta_0) * i / last) / n_steps
    largest = max(schedule.beta_0, schedule.beta_1)
    require(largest < n_steps, "n_steps", n_steps, f"more than the largest beta, {largest:g}")
    if isinstance(schedule, SubVariancePreserving):
        change, gain = schedule.drift(t) / n_steps, schedule.diffusion(t) / n_steps
        return DiscreteStep(float(change), float(gain), 1 - beta)
    return DiscreteStep(math.sqrt(1 - beta) - 1, beta, 1 - beta)


@dataclass(frozen=True)
class GraphSDESystem:
    """The two processes of a graph: one for its node features, one for its adjacency matrix.

    sde_x, sde_adj: `LinearBeta` (VP; the paper's betas run from 0.1 to 1), `SubVariancePreserving`,
    or `VarianceExploding(..., time="geometric")`; anything else raises InputError.

    >>> GraphSDESystem().sde_adj.beta_1
    1.0
    """

    sde_x: NoiseSchedule = field(default_factory=lambda: LinearBeta(0.1, 1.0))
    sde_adj: NoiseSchedule = field(default_factory=lambda: LinearBeta(0.1, 1.0))

    def __post_init__(self) -> None:
        for name in ("sde_x", "sde_adj"):
            sde = getattr(self, name)
            geometric = isinstance(sde, VarianceExploding) and sde.time == "geometric"
            wanted = "LinearBeta, SubVariancePreserving or VarianceExploding(time='geometric')"
            require(isinstance(sde, LinearBeta) or geometric, name, repr(sde), wanted)

    @property
    def parts(self) -> tuple[NoiseSchedule, NoiseSchedule]:
        """(sde_x, sde_adj)."""
        return self.sde_x, self.sde_adj

    def perturb(self, x: Tensor, adj: Tensor, t: Any, noises: Pair) -> Pair:
        """The graphs at time t, one for all or one each: alpha x + sigma z, and so for adj."""
        z_x, z_adj = noises
        return self.sde_x.perturb(x, t, z_x), self.sde_adj.perturb(adj, t, z_adj)

    def draw_prior(
        self, flags: Tensor, n_features: int, generator: torch.Generator | None = None
    ) -> Pair:
        """Graphs of pure noise: independent normals, symmetric in adj, zero at padding.

        The standard deviation is the schedule's `prior_std`: 1 for VP, sigma_max for VE, where the
        released code always takes 1.

        >>> x, adj = GraphSDESystem().draw_prior(torch.ones(1, 3), 2)
        >>> x.shape, bool((adj == adj.mT).all())
        (torch.Size([1, 3, 2]), True)
        """
        z_x, z_adj = graph_noise(flags, n_features, generator)
        return z_x * self.sde_x.prior_std, z_adj * self.sde_adj.prior_std

    def scores(
        self, net_x: Network | None, net_adj: Network | None, coupling: str = "joint"
    ) -> tuple[Score | None, Score | None]:
        """Score functions of (x, adj, flags, t) made of networks of (x, adj, flags).

        VP and sub-VP: -net/sigma(t). VE: net itself. Time enters nowhere else. With a coupling
        other than "joint" a network is shown a `blank` where it must not look. None stays None.
        """
        require(coupling in COUPLINGS, "coupling", repr(coupling), f"one of {', '.join(COUPLINGS)}")
        hide_adj = coupling in ("independent", "sequential")  # from the network of x
        hide_x = coupling in ("independent", "adjacency")

        def score(net: Network, schedule: NoiseSchedule, hide: tuple[bool, bool]) -> Score:
            def partial(x: Tensor, adj: Tensor, flags: Tensor, t: Any) -> Tensor:
                answer = net(*blank(x, adj, flags, hide), flags)
                if isinstance(schedule, VarianceExploding):
                    return answer
                return -answer / per_sample(schedule.sigma(as_times(t)), answer)

            return partial

        return (
            None if net_x is None else score(net_x, self.sde_x, (False, hide_adj)),
            None if net_adj is None else score(net_adj, self.sde_adj, (hide_x, False)),
        )


def blank(x: Tensor, adj: Tensor, flags: Tensor, hide: tuple[bool, bool]) -> Pair:
    """What a network sees of a graph that it may see in part: ones for x, no edges for adj."""
    hide_x, hide_adj = hide
    seen_x = mask_nodes(torch.ones_like(x), flags) if hide_x else x
    return seen_x, torch.zeros_like(adj) if hide_adj else adj


def graph_noise(flags: Tensor, n_features: int, generator: torch.Generator | None = None) -> Pair:
    """Standard normals for x (B, N, F), then for adj (B, N, N): symmetric, zero at padding."""
    check_flags(flags)
    return node_noise(flags, n_features, generator), edge_noise(flags, generator)


def node_noise(flags: Tensor, n_features: int, generator: torch.Generator | None) -> Tensor:
    return mask_nodes(_normal((*flags.shape, n_features), flags, generator), flags)


def edge_noise(flags: Tensor, generator: torch.Generator | None) -> Tensor:
    """One normal a pair of nodes."""
    upper = _normal((*flags.shape, flags.shape[1]), flags, generator).triu(1)
    return mask_edges(upper + upper.mT, flags)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn where the generator lives, moved to where `like` is."""
    device = like.device if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=device)
    return drawn.to(like.device)


def score_matching_loss(
    net_x: Network | None,
    net_adj: Network | None,
    x: Tensor,
    adj: Tensor,
    system: GraphSDESystem,
    flags: Tensor | None = None,
    *,
    coupling: str = "joint",
    generator: torch.Generator | None = None,
    t: Tensor | None = None,
    noises: Pair | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of the two partial scores, each  ½ E Σ |sigma(t) s(G_t, t) + z|².

    The sum runs over a graph's entries (both of a symmetric pair), the mean over the batch;
    t ~ U[1e-5, 1], one a graph, and z, the noise, unless given. Networks take (x, adj, flags); one
    that is None costs 0. coupling: what they see of the noisy graph.

        joint        both see both
        independent  each sees only its own part
        sequential   x is learned alone; adj is learned beside the clean x
        adjacency    adj is learned alone

    Raises InputError for a batch that `checked_graphs` refuses. Jo et al. 2022, arXiv 2202.02514.

    >>> nothing = lambda x, adj, flags: 0 * x
    >>> x, adj = torch.zeros(1, 2, 1), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> z = torch.ones(1, 2, 1), adj
    >>> score_matching_loss(nothing, None, x, adj, GraphSDESystem(), noises=z)[0].item()
    1.0
    """
    real = checked_graphs(x, adj, flags).to(x.dtype)
    if t is None:
        device = x.device if generator is None else generator.device
        share = torch.rand(len(x), generator=generator, dtype=x.dtype, device=device)
        t = LEAST_TIME + (1 - LEAST_TIME) * share.to(x.device)
    z = graph_noise(real, x.shape[-1], generator) if noises is None else noises
    noisy_x, noisy_adj = system.perturb(x, adj, t, z)
    score_x, score_adj = system.scores(net_x, net_adj, coupling)
    seen_x = x if coupling == "sequential" else noisy_x
    losses = []
    for score, schedule, noise, seen in (
        (score_x, system.sde_x, z[0], noisy_x),
        (score_adj, system.sde_adj, z[1], seen_x),
    ):
        if score is None:
            losses.append(x.new_zeros(()))
            continue
        sigma = per_sample(schedule.sigma(as_times(t)), noise)
        error = sigma * score(seen, noisy_adj, real, t) + noise
        losses.append(0.5 * error.square().flatten(1).sum(1).mean())
    return losses[0], losses[1]


class GraphMixtureScore:
    """The exact partial scores of graphs whose entries are a Gaussian mixture.

    A graph is the vector v of its x, row by row, and of adj above the diagonal, row by row: d =
    N F + N (N - 1)/2 entries. Diffusing Σ_k w_k N(m_k, S_k) entry by entry, D_a and D_s holding
    alpha and sigma of x or adj, gives

        C_k = D_a S_k D_a + D_s²,    ∇log p_t(v) = -Σ_k gamma_k(v) C_k⁻¹ (v - D_a m_k).

    weights (K,), means (K, d), covariances (K, d, d); every graph has all N nodes. Stands in for
    trained networks where a sampler is to be judged by its own error alone; float64.
    Raises InputError for shapes that disagree, and as `GaussianMixtureScore` does.

    >>> flat = GraphMixtureScore([1.0], [[0.0] * 3], [torch.eye(3)], GraphSDESystem(), 2, 1)
    >>> x, adj = flat.sample(4, rng=0)
    >>> bool(torch.allclose(flat.score_x(x, adj, torch.ones(4, 2), 0.5), -x))
    True
    """

    def __init__(
        self,
        weights: Any,
        means: Any,
        covariances: Any,
        system: GraphSDESystem,
        nodes: int,
        n_features: int,
    ) -> None:
        w, m = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (weights, means))
        S = torch.as_tensor(np.asarray(covariances), dtype=torch.float64)
        self.split, size = nodes * n_features, nodes * n_features + nodes * (nodes - 1) // 2
        require(m.shape == (len(w), size), "means", tuple(m.shape), f"({len(w)}, {size})")
        wanted = f"({len(w)}, {size}, {size})"
        require(S.shape == (len(w), size, size), "covariances", tuple(S.shape), wanted)
        self.undiffused = GaussianMixtureScore(w, m, S)  # which checks what they hold
        self.weights, self.means, self.covariances = w, m, S
        self.system, self.nodes, self.n_features = system, nodes, n_features

    def score_x(self, x: Tensor, adj: Tensor, flags: Tensor, t: Any) -> Tensor:
        """∇_X log p_t(X, A); one time for all graphs."""
        return self._unflatten(self._score(self.flatten(x, adj), float(t)))[0]

    def score_adj(self, x: Tensor, adj: Tensor, flags: Tensor, t: Any) -> Tensor:
        """∇_A log p_t(X, A), of an edge's one value, at both its places."""
        return self._unflatten(self._score(self.flatten(x, adj), float(t)))[1]

    def independent(self) -> GraphMixtureScore:
        """The scores of p_t(X) p_t(A): what two networks learn that do not see each other."""
        k, n = self.split, len(self.weights)
        w = (self.weights[:, None] * self.weights).flatten()
        means = torch.cat([self.means[:, :k].repeat_interleave(n, 0),
                           self.means[:, k:].repeat(n, 1)], 1)  # fmt: skip
        S = torch.zeros(n * n, *self.covariances.shape[1:], dtype=torch.float64)
        S[:, :k, :k] = self.covariances[:, :k, :k].repeat_interleave(n, 0)
        S[:, k:, k:] = self.covariances[:, k:, k:].repeat(n, 1, 1)
        return GraphMixtureScore(w, means, S, self.system, self.nodes, self.n_features)

    def sample(self, count: int, rng: int | np.random.Generator | None = None) -> Pair:
        """Graphs (x, adj) of the undiffused mixture."""
        return self._unflatten(torch.from_numpy(self.undiffused.sample(count, rng)))

    def flatten(self, x: Tensor, adj: Tensor) -> Tensor:
        """(x, adj) as vectors (B, d)."""
        rows, columns = torch.triu_indices(self.nodes, self.nodes, 1)
        return torch.cat([x.flatten(1), adj[:, rows, columns]], 1).double()

    def _unflatten(self, v: Tensor) -> Pair:
        rows, columns = torch.triu_indices(self.nodes, self.nodes, 1)
        adj = v.new_zeros(len(v), self.nodes, self.nodes)
        adj[:, rows, columns] = adj[:, columns, rows] = v[:, self.split :]
        return v[:, : self.split].reshape(len(v), self.nodes, self.n_features), adj

    def _score(self, v: Tensor, t: float) -> Tensor:
        of_x = torch.arange(self.means.shape[1]) < self.split
        a, s = (
            torch.where(of_x, *(float(getattr(part, name)(t)) for part in self.system.parts))
            for name in ("alpha", "sigma")
        )
        C = a[:, None] * self.covariances * a + torch.diag(s**2)
        y = v - (a * self.means)[:, None]  # (K, B, d)
        root = torch.linalg.cholesky(C)
        solved = y @ torch.cholesky_inverse(root)
        log = -0.5 * (y * solved).sum(-1) - root.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
        gamma = (log + self.weights.log()[:, None]).softmax(0)
        return -(gamma[..., None] * solved).sum(0)
