"""The Gaussian score's experiment: its denoiser, its measures, and that it runs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.gaussian_score import GaussianScore  # noqa: E402
from scoredraw.papers import digit_diffusion as digits  # noqa: E402
from scoredraw.papers import p08_gaussian_score as p08  # noqa: E402
from scoredraw.papers.gaussian_score_learning import (  # noqa: E402
    DigitDenoiser,
    Learning,
    checkpoints,
    trained,
)
from scoredraw.reports import Report, run_paper  # noqa: E402

RNG = np.random.default_rng(8)
DIGITS = digits.real_digits()[0]


@pytest.mark.oracle
def test_a_denoiser_that_has_learned_nothing_takes_the_data_for_a_gaussian() -> None:
    """D = c_skip x is the posterior mean of N(0, s² I)."""
    network = DigitDenoiser(0.7, 0).requires_grad_(False)
    network.layers[-1].weight.zero_()
    network.layers[-1].bias.zero_()
    x = RNG.normal(size=(5, 64))
    for t in (0.1, 1.0, 80.0):
        want = GaussianScore(np.zeros(64), residual=0.49).eps(x, t)
        np.testing.assert_allclose(network.eps(x, t), want, rtol=1e-3, atol=1e-6)


@pytest.mark.property
def test_training_depends_on_its_seed_alone_and_lowers_the_loss() -> None:
    together = digits.each(lambda seed: trained(DIGITS, 60, seed, [0, 60]), [4, 5])
    alone = trained(DIGITS, 60, 5, [60])[0]
    for ours, theirs in zip(alone.parameters(), together[1][1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    clean = torch.from_numpy(DIGITS[:200])
    noisy = clean + torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    first, last = (
        float(((network(noisy, torch.ones(200, 1)) - clean) ** 2).mean()) for network in together[0]
    )
    assert last < 0.7 * first


@pytest.mark.oracle
def test_updates_until_most_is_explained_are_read_off_the_curve() -> None:
    learning = object.__new__(Learning)
    learning.updates, learning.sigmas = [1, 10, 100, 1000], [0.5, 1.0]
    shares = np.zeros((2, 4, 2))
    shares[0, :, 1] = [0.0, 0.5, 1.0, 0.7]  # 0.9 lies four fifths of the way from 10 to 100
    shares[1, :, 1] = [1.0, 0.9, 0.0, 0.0]
    learning.shares = {"x": shares}
    np.testing.assert_allclose(learning.reached("x", 1.0), [10**1.8, 1.0])
    assert [c.value for c in learning.curve("x", 1.0)] == [0.5, 0.7, 0.5, 0.35]
    assert checkpoints(5) == [4, 5]
    assert checkpoints(2) == [2]


@pytest.mark.oracle
def test_the_reference_is_the_exact_path_and_a_skip_of_nothing_is_the_solver() -> None:
    plan = p08.Plan(blocks=2, noises=3, reference=60)
    bench = p08.Bench(plan, 0)
    whole = bench.error("Gaussian", times=bench.fine, skip_steps=0)
    np.testing.assert_allclose(whole, 0, atol=1e-12)
    coarse = [bench.error("Gaussian", n, skip_steps=0) for n in (10, 18, 40)]
    assert (np.diff(coarse, axis=0) < 0).all()
    assert bench.noises.std() == pytest.approx(80, rel=0.1)


@pytest.mark.contract
def test_every_scheduler_is_wrapped_and_saves_its_calls() -> None:
    pytest.importorskip("diffusers")
    bench = p08.Bench(p08.Plan(blocks=1, noises=2, reference=5), 0)
    gaussian, noises = bench.carriers["Gaussian"], bench.noises / 80
    for name in p08.PEERS:
        arms = {
            grid: p08.wrapped(name, grid, 8, noises, bench.teacher, gaussian)
            for grid in ("all steps", "tail", "respace")
        }
        calls = {grid: count for grid, (_, count) in arms.items()}
        assert calls["tail"] < calls["all steps"] == calls["respace"] == 8
        assert all(np.isfinite(ends).all() for ends, _ in arms.values())


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # two blocks have wide intervals
def test_the_experiment_runs_and_can_be_read_back() -> None:
    report = run_paper(8, "smoke", 0)
    assert Report.from_json(report.to_json()) == report
    names = [claim.name for claim in report.claims]
    assert len(names) == len(set(names))
    assert len(report.claims) >= 18
    assert all(claim.verdict is None for claim in report.claims)
    assert {figure.kind for figure in report.figures} == {"line", "pictures"}
    again = run_paper(8, "smoke", 0)
    assert [str(c.measured) for c in again.claims] == [str(c.measured) for c in report.claims]
