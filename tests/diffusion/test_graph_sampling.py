"""Solvers of the coupled reverse processes, on graphs whose partial scores are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.graph_arrays import mask_edges, mask_nodes  # noqa: E402
from scoredraw.diffusion.graph_sampling import (  # noqa: E402
    GraphSample,
    GraphSolver,
    langevin_size,
    sample_graphs,
)
from scoredraw.diffusion.graph_system import (  # noqa: E402
    GraphMixtureScore,
    GraphSDESystem,
    graph_noise,
    transition,
)
from scoredraw.diffusion.schedules import (  # noqa: E402
    LinearBeta,
    SubVariancePreserving,
    VarianceExploding,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

WIDE = GraphSDESystem(LinearBeta(0.1, 20.0), LinearBeta(0.1, 20.0))
PAPER = GraphSDESystem()
MIXED = GraphSDESystem(
    SubVariancePreserving(0.1, 20.0), VarianceExploding(0.01, 10.0, time="geometric")
)
SOLVERS: dict[str, dict[str, Any]] = {
    "S4": {},
    "S4, released": {"transition": "code"},
    "S4 alone": {"corrector": None},
    "PC, Euler": {"method": "pc"},
    "PC, Reverse": {"method": "pc", "predictor": "reverse"},
    "Euler": {"method": "pc", "corrector": None},
    "Reverse": {"method": "pc", "predictor": "reverse", "corrector": None},
}
SAMPLES, CROSS = 4000, 0.2
COVARIANCE = 0.5 * np.eye(6)
COVARIANCE[:3, 3:] = COVARIANCE[3:, :3] = CROSS * np.eye(3)
MEAN = np.array([0.5] * 3 + [-0.3] * 3)


def gaussian(system: GraphSDESystem) -> GraphMixtureScore:
    """Three nodes with one feature each, each tied to one of the three edges."""
    return GraphMixtureScore([1.0], [MEAN], [COVARIANCE], system, 3, 1)


def moments(
    system: GraphSDESystem,
    *,
    apart: bool = False,
    start: Any = None,
    samples: int = SAMPLES,
    **options: Any,
) -> tuple[Any, Any]:
    """Mean (6,) and covariance (6, 6) of sampled graphs."""
    exact = gaussian(system).independent() if apart else gaussian(system)
    flags = torch.ones(samples, 3, dtype=torch.float64)
    settings = {"n_steps": 200, "snr": 0.05, "scale_eps": 1.0, **options}
    found = sample_graphs(
        exact.score_x, exact.score_adj, flags, 1, system, start=start,
        generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    v = exact.flatten(found.x, found.adj).numpy()
    return v.mean(0), np.cov(v.T)


def error(covariance: Any) -> float:
    return float(np.linalg.norm(covariance - COVARIANCE) / np.linalg.norm(COVARIANCE))


# ── exact scores: what comes out ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SOLVERS)
def test_a_joint_gaussian_comes_back(name: str) -> None:
    """Within 8 % of the covariance's norm and 0.06 of the mean; 4000 exact draws are off by 3.7 %
    with a spread of 0.6, and by 0.011 an entry: no false alarms."""
    mean, covariance = moments(WIDE, **SOLVERS[name])
    assert error(covariance) < 0.08
    assert np.abs(mean - MEAN).max() < 0.06
    assert np.diag(covariance[:3, 3:]).mean() == pytest.approx(CROSS, rel=0.08)


def test_other_processes_of_x_and_of_adj() -> None:
    mean, covariance = moments(MIXED, **SOLVERS["S4 alone"])
    assert error(covariance) < 0.08
    assert np.abs(mean - MEAN).max() < 0.06


def test_the_probability_flow_takes_half_the_score_and_no_noise() -> None:
    """The released Euler predictor crashes here."""
    for predictor, steps in (("euler", 200), ("reverse", 600)):  # whose error does not contract
        options = {"predictor": predictor, "corrector": None, "probability_flow": True}
        _, covariance = moments(WIDE, method="pc", n_steps=steps, **options)
        assert error(covariance) < 0.08


def test_independent_scores_lose_what_ties_nodes_to_edges() -> None:
    """0 with a standard error of 0.5/sqrt(1500) = 0.013 an entry, each of nine."""
    _, covariance = moments(WIDE, apart=True, samples=1500, corrector=None)
    assert np.abs(covariance[:3, 3:]).max() < 0.06
    assert np.diag(covariance).mean() == pytest.approx(0.5, rel=0.06)


def test_the_papers_langevin_settings_take_two_fifths_off_every_variance() -> None:
    for method in ("s4", "pc"):
        _, covariance = moments(WIDE, samples=1000, method=method, snr=0.15, scale_eps=0.7)
        assert 0.35 < 1 - np.diag(covariance).mean() / 0.5 < 0.5
        assert np.diag(covariance[:3, 3:]).mean() < 0.7 * CROSS


def test_the_papers_betas_need_their_own_start() -> None:
    """They keep 0.76 of the signal: from N(0, I) the covariance is too large and the mean too
    small; from the noised data both are right."""
    mean, covariance = moments(PAPER, samples=2000, corrector=None)
    assert 1.06 < np.diag(covariance).mean() / 0.5 < 1.2
    assert np.abs(mean[:3]).mean() < 0.42
    z = graph_noise(torch.ones(SAMPLES, 3).double(), 1, torch.Generator().manual_seed(1))
    start = PAPER.perturb(*gaussian(PAPER).sample(SAMPLES, 2), 1.0, z)
    mean, covariance = moments(PAPER, corrector=None, start=start)
    assert error(covariance) < 0.08
    assert np.abs(mean - MEAN).max() < 0.06


def test_two_modes_stay_two_together_and_become_four_apart() -> None:
    """Modes at ±0.5 in every entry; a node and the edge have opposite signs in a spurious one."""
    S = 0.01 * (0.9 + 0.1 * np.eye(3))
    two = GraphMixtureScore([0.5, 0.5], [[0.5] * 3, [-0.5] * 3], [S, S], WIDE, 2, 1)
    flags, share = torch.ones(500, 2, dtype=torch.float64), []
    for exact in (two, two.independent()):
        found = sample_graphs(
            exact.score_x, exact.score_adj, flags, 1, WIDE, n_steps=100, corrector=None,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        share.append(float((found.x[:, 0, 0] * found.adj[:, 0, 1] < 0).double().mean()))
    assert share[0] < 0.01
    assert share[1] == pytest.approx(0.5, abs=0.11)  # five standard errors


# ── any scores: what always holds ───────────────────────────────────────────────────────────────

FLAGS = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.float64)


def scores(system: GraphSDESystem) -> tuple[Any, Any]:
    """Equivariant, not linear, and careless about padding and the diagonal."""
    return system.scores(
        lambda x, adj, flags: torch.tanh(x + adj @ x) + 0.1,
        lambda x, adj, flags: adj + torch.tanh(x @ x.mT) + 0.1,
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_every_state_is_a_graph_and_the_start_is_kept(name: str) -> None:
    solver = GraphSolver(MIXED, 25, **SOLVERS[name])
    x, adj = MIXED.draw_prior(FLAGS, 2, torch.Generator().manual_seed(0))
    kept = x.clone(), adj.clone()
    random = torch.Generator().manual_seed(1)
    state = solver.init(x, adj, FLAGS)
    for index in range(25):
        state = solver.step(state, *scores(MIXED), lambda k: graph_noise(FLAGS, 2, random)[k])
        assert state.index == index + 1
        for a in (state.adj, state.mean_adj):
            assert torch.equal(a, a.mT)
            assert float(a.diagonal(dim1=1, dim2=2).abs().max()) == 0.0
            assert float(a[FLAGS == 0].abs().max()) == 0.0
        assert float(state.x[FLAGS == 0].abs().max()) == 0.0
    assert torch.equal(kept[0], x)
    assert torch.equal(kept[1], adj)
    with pytest.raises(InputError, match="state: got one after the last"):
        solver.step(state, *scores(MIXED), lambda k: graph_noise(FLAGS, 2, random)[k])


@pytest.mark.parametrize("name", SOLVERS)
def test_numbering_the_nodes_differently_numbers_the_sample_differently(name: str) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    random = torch.Generator().manual_seed(2)
    noises = [part for _ in range(3 * 12) for part in graph_noise(FLAGS, 2, random)]
    start = PAPER.draw_prior(FLAGS, 2, random)

    def run(permute: Any, flags: torch.Tensor) -> GraphSample:
        return sample_graphs(
            *scores(PAPER), flags, 2, PAPER, n_steps=12, start=tuple(map(permute, start)),
            noises=map(permute, noises), **SOLVERS[name],
        )  # fmt: skip

    def renumber(v: torch.Tensor) -> torch.Tensor:
        return v[:, order] if v.shape[-1] == 2 else v[:, order][:, :, order]

    plain, permuted = run(lambda v: v, FLAGS), run(renumber, FLAGS[:, order])
    torch.testing.assert_close(renumber(plain.x), permuted.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(renumber(plain.adj), permuted.adj, rtol=0, atol=1e-10)


def test_a_seed_gives_the_same_graphs_and_a_dtype_stays() -> None:
    a, b, c = (
        sample_graphs(
            *scores(PAPER), FLAGS.float(), 2, PAPER, n_steps=5,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert torch.equal(a.adj, b.adj)
    assert not torch.equal(a.adj, c.adj)
    assert a.adj.dtype == torch.float32


def test_evaluations_are_counted() -> None:
    calls = {"x": 0, "adj": 0}

    def counted(name: str, score: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return score(*arguments)

        return call

    pair = [counted(k, s) for k, s in zip(calls, scores(PAPER), strict=True)]
    for options, each in (
        ({}, 1),
        ({"method": "pc"}, 2),
        ({"method": "pc", "corrector": None}, 1),
        ({"method": "pc", "n_corrections": 3}, 4),
    ):
        calls.update(x=0, adj=0)
        found = sample_graphs(*pair, FLAGS, 2, PAPER, n_steps=4, **options)
        assert (calls["x"], calls["adj"], found.nfe) == (4 * each,) * 3
    calls.update(x=0, adj=0)
    found = sample_graphs(*pair, FLAGS, 2, PAPER, n_steps=4, coupling="sequential")
    assert (calls["x"], calls["adj"], found.nfe) == (4, 4, 8)
    calls.update(x=0, adj=0)
    found = sample_graphs(None, pair[1], FLAGS, 2, PAPER, n_steps=4, coupling="adjacency")
    assert (calls["x"], calls["adj"], found.nfe) == (0, 4, 4)
    assert torch.equal(found.x, mask_nodes(torch.ones(3, 5, 2).double(), FLAGS))


def test_adj_is_corrected_beside_the_x_before_its_correction() -> None:
    """Two Langevin steps of each, written out."""
    start, random = PAPER.draw_prior(FLAGS, 2, torch.Generator().manual_seed(0)), torch.Generator()
    noises = [z for _ in range(3) for z in graph_noise(FLAGS, 2, random.manual_seed(4))]
    order = [noises[0], noises[2], noises[1], noises[3], *noises[4:]]
    found = sample_graphs(
        *scores(PAPER), FLAGS, 2, PAPER, "pc", n_steps=2, n_corrections=2, start=start,
        noises=order * 2,
    )  # fmt: skip
    s_x, s_adj = scores(PAPER)
    x, adj = start
    for t, beta in ((1.0, 0.5), (1e-4, 0.05)):
        old_x, old_adj = x, adj
        for z in order[:2]:
            s = mask_nodes(s_x(x, old_adj, FLAGS, t), FLAGS)
            h = langevin_size(s, z, 0.15, 1 - beta)
            x = x + h * s + (2 * h).sqrt() * 0.7 * z
        for z in order[2:4]:
            s = mask_edges(s_adj(old_x, adj, FLAGS, t), FLAGS)
            h = langevin_size(s, z, 0.15, 1 - beta)
            adj = adj + h * s + (2 * h).sqrt() * 0.7 * z
        rate = float(PAPER.sde_x.beta(t)) / 2  # beta times the length of a step
        pair = mask_nodes(s_x(x, adj, FLAGS, t), FLAGS), mask_edges(s_adj(x, adj, FLAGS, t), FLAGS)
        mean_x, mean_adj = (
            v + rate * (v / 2 + s) for v, s in zip((x, adj), pair, strict=True)
        )  # fmt: skip
        x, adj = mean_x + rate**0.5 * order[4], mean_adj + rate**0.5 * order[5]
    torch.testing.assert_close(found.x, mean_x)
    torch.testing.assert_close(found.adj, mean_adj)


def test_the_last_exact_step_removes_the_noise_that_is_left() -> None:
    """It ends at t = 0: with the score of a single known graph, at that graph, up to rounding."""
    noises = graph_noise(FLAGS, 2, torch.Generator().manual_seed(7))
    sigma = float(PAPER.sde_x.sigma(1e-4))
    clean = PAPER.draw_prior(FLAGS, 2, torch.Generator().manual_seed(8))
    solver = GraphSolver(PAPER, 10, corrector=None)
    late = solver.init(*PAPER.perturb(*clean, 1e-4, noises), FLAGS)
    object.__setattr__(late, "index", 9)
    state = solver.step(
        late, lambda x, a, f, t: -noises[0] / sigma, lambda x, a, f, t: -noises[1] / sigma,
        lambda k: 0 * noises[k],
    )  # fmt: skip
    assert float((state.mean_x - clean[0]).abs().max()) < 1e-4
    assert float((state.mean_adj - clean[1]).abs().max()) < 1e-4
    assert transition(PAPER.sde_x, 0.0, 0.0) == (1.0, 0.0)


# ── bad input and edge cases ────────────────────────────────────────────────────────────────────


def test_scores_of_zero_and_graphs_of_one_node_are_sampled() -> None:
    zero = PAPER.scores(lambda x, a, f: 0 * x, lambda x, a, f: 0 * a)
    for name, options in SOLVERS.items():
        found = sample_graphs(*zero, torch.ones(2, 1), 3, PAPER, n_steps=5, **options)
        assert bool(torch.isfinite(found.x).all()), name
        assert float(found.adj.abs().max()) == 0.0
    nobody = sample_graphs(*zero, torch.zeros(1, 3), 2, PAPER, n_steps=5)
    assert float(nobody.x.abs().max()) == 0.0
    assert langevin_size(torch.zeros(2, 3), torch.ones(2, 3), 0.1, 1.0).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ddim"}, "method: got 'ddim', want one of s4, pc"),
        ({"predictor": "heun"}, "predictor: got 'heun'"),
        ({"corrector": "ald"}, "corrector: got 'ald'"),
        ({"transition": "half"}, "transition: got 'half'"),
        ({"n_steps": 0}, "n_steps: got 0"),
        ({"n_corrections": 2}, "n_corrections: got 2, want 1 for s4"),
        ({"probability_flow": True}, "probability_flow: got True, want False for s4"),
        ({"snr": 0.0}, "snr: got 0.0"),
        ({"scale_eps": -1.0}, "scale_eps: got -1.0"),
        ({"coupling": "both"}, "coupling: got 'both'"),
        ({"start": (torch.ones(3, 5, 2), torch.zeros(3, 5, 5))}, "x, adj: got values, want zeros"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_graphs(*scores(PAPER), FLAGS, 2, PAPER, **options)


def test_too_few_steps_for_the_betas_are_refused_where_they_matter() -> None:
    with pytest.raises(InputError, match="n_steps: got 15, want more than the largest beta, 20"):
        GraphSolver(WIDE, 15)
    assert GraphSolver(WIDE, 15, corrector=None).nfe == 15


def test_bad_flags_and_bad_scores_are_refused() -> None:
    s_x, s_adj = scores(PAPER)
    with pytest.raises(InputError, match="flags: got other values, want 0 for padding"):
        sample_graphs(s_x, s_adj, 2 * FLAGS, 2, PAPER)
    with pytest.raises(InputError, match="score_x: got None, want a function, for joint"):
        sample_graphs(None, s_adj, FLAGS, 2, PAPER)
    with pytest.raises(InputError, match="score_adj: got None"):
        sample_graphs(s_x, None, FLAGS, 2, PAPER)
    with pytest.raises(InputError, match=r"score_x: got shape \(3, 5, 1\) at step 0"):
        sample_graphs(lambda x, a, f, t: x[..., :1], s_adj, FLAGS, 2, PAPER)
    with pytest.raises(InputError, match="score_adj: got an asymmetric answer at step 0"):
        sample_graphs(s_x, lambda x, a, f, t: a.triu(), FLAGS, 2, PAPER)
    late = lambda x, a, f, t: x * (np.nan if t < 0.5 else 0.0)  # noqa: E731
    with pytest.raises(InputError, match="score_x: got NaN or infinity at step 5"):
        sample_graphs(late, s_adj, FLAGS, 2, PAPER, n_steps=10)


def test_a_sample_that_blows_up_is_refused_with_its_step() -> None:
    huge = PAPER.scores(lambda x, a, f: -1e30 * x, lambda x, a, f: 0 * a)
    with pytest.raises(InputError, match=r"NaN or infinity at step \d"):
        sample_graphs(*huge, FLAGS.float(), 2, PAPER, n_steps=10, corrector=None)
