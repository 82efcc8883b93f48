"""The two processes of a graph: their kernels, their noise, their loss and their exact scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.graph_arrays import mask_edges, mask_nodes  # noqa: E402
from scoredraw.diffusion.graph_system import (  # noqa: E402
    GraphMixtureScore,
    GraphSDESystem,
    discrete_step,
    graph_noise,
    score_matching_loss,
    transition,
)
from scoredraw.diffusion.schedules import (  # noqa: E402
    Cosine,
    LinearBeta,
    NoiseSchedule,
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

VP, WIDE = LinearBeta(0.1, 1.0), LinearBeta(0.1, 20.0)
SUB = SubVariancePreserving(0.1, 20.0)
VE = VarianceExploding(0.2, 1.5, time="geometric")
SCHEDULES = [VP, WIDE, SUB, VE]
FLAGS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_transition_solves_the_reversed_linear_process(schedule: NoiseSchedule) -> None:
    """Its moments, by quadrature of the drift and of the noise carried to the end."""

    def scale(start: float, end: float) -> float:
        return math.exp(-quad(lambda s: float(schedule.drift(s)), end, start)[0])

    for t, end in ((1.0, 0.9), (0.5, 0.49), (0.1, 0.0)):
        move = transition(schedule, t, end)
        assert move.mean == pytest.approx(scale(t, end), rel=1e-8)
        variance = quad(lambda s: scale(s, end) ** 2 * float(schedule.diffusion(s)), end, t)[0]  # noqa: B023
        assert move.std**2 == pytest.approx(variance, rel=1e-8)


def test_the_released_spread_is_the_forward_one() -> None:
    lost = float(VP.lost(0.6) - VP.lost(0.5))
    exact, released = (transition(VP, 0.6, 0.5, kind) for kind in ("exact", "code"))
    assert exact.std == pytest.approx(math.sqrt(math.expm1(lost)))
    assert released.std == pytest.approx(math.sqrt(-math.expm1(-lost)))
    assert exact.mean == released.mean == pytest.approx(math.exp(lost / 2))
    # where half a step loses B = 0.0775 the two are 0.284 and 0.273
    end = float(VP.time_of_lost(VP.lost(1.0) - 0.0775))
    spreads = [round(transition(VP, 1.0, end, kind).std, 3) for kind in ("exact", "code")]
    assert spreads == [0.284, 0.273]
    assert transition(VE, 0.6, 0.5) == pytest.approx(transition(VE, 0.6, 0.5, "code"))


def test_a_released_transition_that_runs_below_zero_has_no_spread() -> None:
    assert transition(VP, -0.09, -0.17, "code").std == 0.0
    assert transition(VP, 1e-4, -0.08, "code").std > 0


@pytest.mark.parametrize("schedule", [VP, WIDE])
def test_the_chain_multiplies_up_to_the_continuous_process(schedule: LinearBeta) -> None:
    n = 2000
    steps = [discrete_step(schedule, t, n) for t in np.linspace(1.0, 1e-4, n)]
    product = math.prod(1 + step.change for step in steps)
    assert product == pytest.approx(float(schedule.alpha(1.0)), rel=0.05)
    assert sum(step.gain for step in steps) == pytest.approx(float(schedule.lost(1.0)), rel=1e-3)
    assert [step.damping for step in steps] == [1 - step.gain for step in steps]


def test_the_exploding_chain_adds_up_to_its_largest_variance() -> None:
    steps = [discrete_step(VE, t, 50) for t in np.linspace(1.0, 1e-4, 50)]
    assert sum(step.gain for step in steps) == pytest.approx(1.5**2)
    assert steps[-1].gain == pytest.approx(0.2**2)
    assert {(step.change, step.damping) for step in steps} == {(0.0, 1.0)}


def test_sub_vp_takes_euler_steps() -> None:
    step = discrete_step(SUB, 0.5, 100)
    assert step.change == pytest.approx(float(SUB.drift(0.5)) / 100)
    assert step.gain == pytest.approx(float(SUB.diffusion(0.5)) / 100)


# ── noise and priors ────────────────────────────────────────────────────────────────────────────


def test_noise_is_standard_symmetric_and_zero_at_padding() -> None:
    """12,000 normals an entry: 0.05 is more than five standard errors of a variance."""
    flags = FLAGS.repeat(6000, 1)
    z_x, z_adj = graph_noise(flags, 2, torch.Generator().manual_seed(0))
    assert torch.equal(z_adj, z_adj.mT)
    assert float(z_adj.diagonal(dim1=1, dim2=2).abs().max()) == 0.0
    assert float(z_x[flags == 0].abs().max()) == 0.0
    assert float(z_adj[flags == 0].abs().max()) == 0.0
    assert float(z_x[:, :3].var()) == pytest.approx(1, abs=0.05)
    assert float(z_adj[:, 0, 1].var()) == pytest.approx(1, abs=0.05)
    assert z_x.dtype == flags.dtype


def test_the_exploding_prior_is_as_wide_as_its_largest_sigma() -> None:
    """Where the released code draws unit normals whatever sigma_max."""
    system = GraphSDESystem(VarianceExploding(0.1, 7.0, time="geometric"), VP)
    x, adj = system.draw_prior(torch.ones(2000, 3), 2, torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(7.0, rel=0.05)
    assert float(adj[:, 0, 1].std()) == pytest.approx(1.0, rel=0.1)


# ── loss ────────────────────────────────────────────────────────────────────────────────────────


def toy_batch() -> tuple[torch.Tensor, torch.Tensor]:
    x, adj = graph_noise(FLAGS, 2, torch.Generator().manual_seed(1))
    return x, adj


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_loss_is_what_it_says(schedule: NoiseSchedule) -> None:
    system = GraphSDESystem(schedule, VP)
    x, adj = toy_batch()
    t, noises = torch.tensor([0.3, 0.8]), graph_noise(FLAGS, 2, torch.Generator().manual_seed(2))
    found = score_matching_loss(
        lambda x, a, f: 2 * x, lambda x, a, f: 3 * a, x, adj, system, FLAGS, t=t, noises=noises
    )
    want = np.zeros(2)
    for i in range(2):
        alpha, sigma = float(schedule.alpha(t[i])), float(schedule.sigma(t[i]))
        noisy = 2 * (alpha * x[i] + sigma * noises[0][i])
        score = noisy if isinstance(schedule, VarianceExploding) else -noisy / sigma
        want[0] += 0.25 * float((sigma * score + noises[0][i]).square().sum())
        alpha, sigma = float(VP.alpha(t[i])), float(VP.sigma(t[i]))
        error = noises[1][i] - 3 * (alpha * adj[i] + sigma * noises[1][i])
        want[1] += 0.25 * float(error.square().sum())
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_the_exact_partial_score_has_the_least_loss() -> None:
    """Data N(0, v): the network sigma x/(alpha² v + sigma²) beats any multiple of itself.

    The same 20,000 graphs and noises for all; multiples cost at least 1 % of the loss.
    """
    v, flags = 0.5, torch.ones(20_000, 2, dtype=torch.float64)
    z_x, z_adj = graph_noise(flags, 1, torch.Generator().manual_seed(3))
    t = torch.full((len(flags),), 0.7)
    alpha, sigma = float(VP.alpha(0.7)), float(VP.sigma(0.7))
    exact = sigma / (alpha**2 * v + sigma**2)
    noises = graph_noise(flags, 1, torch.Generator().manual_seed(4))

    def loss(factor: float) -> float:
        both = score_matching_loss(
            lambda x, a, f: factor * exact * x, lambda x, a, f: factor * exact * a,
            math.sqrt(v) * z_x, math.sqrt(v) * z_adj, GraphSDESystem(), flags, t=t, noises=noises,
        )  # fmt: skip
        return float(sum(both))

    assert loss(1.0) < loss(0.9)
    assert loss(1.0) < loss(1.1)


def test_couplings_hide_what_they_say() -> None:
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def spy(name: str) -> object:
        def net(x: torch.Tensor, adj: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
            seen[name] = x, adj
            return x if name == "x" else adj

        return net

    x, adj = toy_batch()
    noises = graph_noise(FLAGS, 2, torch.Generator().manual_seed(5))
    t = torch.tensor([0.5, 0.5])
    noisy_x, noisy_adj = GraphSDESystem().perturb(x, adj, t, noises)
    ones, none = mask_nodes(torch.ones_like(x), FLAGS), torch.zeros_like(adj)
    shown = {
        "joint": (noisy_x, noisy_adj, noisy_x, noisy_adj),
        "independent": (noisy_x, none, ones, noisy_adj),
        "sequential": (noisy_x, none, x, noisy_adj),
        "adjacency": (noisy_x, noisy_adj, ones, noisy_adj),
    }
    for coupling, want in shown.items():
        score_matching_loss(
            spy("x"), spy("adj"), x, adj, GraphSDESystem(), FLAGS,  # type: ignore[arg-type]
            coupling=coupling, t=t, noises=noises,
        )  # fmt: skip
        for got, expected in zip((*seen["x"], *seen["adj"]), want, strict=True):
            torch.testing.assert_close(got, expected)


# ── exact scores ────────────────────────────────────────────────────────────────────────────────


def mixture(system: GraphSDESystem) -> GraphMixtureScore:
    rng = np.random.default_rng(6)
    roots = rng.normal(size=(2, 5, 5))
    covariances = roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(5)
    return GraphMixtureScore([0.3, 0.7], rng.normal(size=(2, 5)), covariances, system, 2, 2)


def test_mixture_scores_are_the_gradients_of_the_diffused_density() -> None:
    system = GraphSDESystem(WIDE, VE)
    exact = mixture(system)
    x, adj = (part.double() for part in exact.sample(5, rng=0))
    v = exact.flatten(x, adj).requires_grad_()
    a = torch.tensor([float(WIDE.alpha(0.3))] * 4 + [1.0], dtype=torch.float64)
    s = torch.tensor([float(WIDE.sigma(0.3))] * 4 + [float(VE.sigma(0.3))], dtype=torch.float64)
    normals = torch.distributions.MultivariateNormal(
        a * exact.means, a[:, None] * exact.covariances * a + torch.diag(s**2)
    )
    density = (normals.log_prob(v[:, None]) + exact.weights.log()).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(density, v)
    found = exact.flatten(
        exact.score_x(x, adj, torch.ones(5, 2), 0.3), exact.score_adj(x, adj, torch.ones(5, 2), 0.3)
    )
    torch.testing.assert_close(found, gradient)


def test_independent_scores_see_their_own_part_only() -> None:
    apart = mixture(GraphSDESystem(WIDE, VE)).independent()
    x, adj = apart.sample(4, rng=1)
    flags = torch.ones(4, 2)
    assert len(apart.weights) == 4
    torch.testing.assert_close(
        apart.score_x(x, adj, flags, 0.4), apart.score_x(x, adj.flip(0), flags, 0.4)
    )
    torch.testing.assert_close(
        apart.score_adj(x, adj, flags, 0.4), apart.score_adj(x.flip(0), adj, flags, 0.4)
    )


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_refused() -> None:
    x, adj = toy_batch()
    nothing = lambda x, adj, flags: x  # noqa: E731
    system = GraphSDESystem()
    for schedule in (Cosine(), VarianceExploding(0.1, 2.0)):
        with pytest.raises(InputError, match="sde_adj: got "):
            GraphSDESystem(VP, schedule)
    with pytest.raises(InputError, match="transition: got 'forward'"):
        transition(VP, 0.5, 0.4, "forward")
    with pytest.raises(InputError, match="n_steps: got 20, want more than the largest beta"):
        discrete_step(WIDE, 1.0, 20)
    with pytest.raises(InputError, match="coupling: got 'none'"):
        score_matching_loss(nothing, None, x, adj, system, FLAGS, coupling="none")
    with pytest.raises(InputError, match="adj: got an asymmetric"):
        score_matching_loss(nothing, None, x, adj.triu(), system, FLAGS)
    with pytest.raises(InputError, match="x, adj: got values, want zeros at padding"):
        score_matching_loss(nothing, None, x, mask_edges(adj, FLAGS), system, FLAGS.flip(0))
    with pytest.raises(InputError, match=r"means: got \(1, 2\)"):
        GraphMixtureScore([1.0], [[0.0, 0.0]], np.eye(2)[None], system, 2, 2)
    with pytest.raises(InputError, match="an eigenvalue"):
        GraphMixtureScore([1.0], np.zeros((1, 2)), np.diag([1.0, -1.0])[None], system, 1, 2)
