"""Diffusion tree sampling: the problems and their measures against what is known, and the runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.tree_proposals import exact_values  # noqa: E402
from scoredraw.papers import p17_dts  # noqa: E402
from scoredraw.papers.p17_dts import PLANS, Cloud, variation  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(17)


def test_the_ring_is_the_one_that_was_measured() -> None:
    found = exact_values(*p17_dts.ring_chain(), p17_dts.RING, p17_dts.RING_LAMBDA)
    assert variation(found.base, found.target) == pytest.approx(0.678, abs=5e-4)
    assert found.root == pytest.approx(1.070, abs=5e-4)


def test_rewards_are_the_same_for_arrays_and_tensors() -> None:
    x = RNG.normal(size=(5, 2)) * 3
    for reward, z in ((p17_dts.plane_reward, x), (p17_dts.digits().case.reward,
                                                  RNG.normal(size=(5, 8)))):  # fmt: skip
        np.testing.assert_allclose(reward(z), reward(torch.from_numpy(z)).numpy(), rtol=1e-10)
    density = np.exp(p17_dts.plane_reward(p17_dts.CENTRES))
    want = p17_dts.SHARES / (2 * np.pi * 0.3**2)  # the modes are far apart
    np.testing.assert_allclose(density, want, rtol=1e-6)
    data = p17_dts.digits()
    z = RNG.normal(size=(5, 8))
    np.testing.assert_allclose(np.log(data.probabilities(z)[:, 8]), data.case.reward(z), rtol=1e-9)


def test_the_modes_of_the_target_have_the_rewards_shares() -> None:
    """p exp(λ r) integrated over each of the eight equal modes, on a grid."""
    axis = np.linspace(-1.5, 1.5, 61)
    offset = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mass = []
    for centre in p17_dts.CENTRES:
        x = centre + offset
        log_p = -np.square(offset).sum(1) / (2 * p17_dts.SPREAD**2)
        mass.append(logsumexp(log_p + p17_dts.plane_reward(x)))
    shares = np.exp(mass - logsumexp(mass))
    np.testing.assert_allclose(shares, p17_dts.SHARES, rtol=1e-4)


def test_measures_by_hand() -> None:
    x = p17_dts.CENTRES[[7, 7, 0]] + 0.1
    error = p17_dts.mode_error(Cloud(x, np.array([0.25, 0.25, 0.5]), np.zeros(3)))
    want = np.zeros(8)
    want[[7, 0]] = 0.5
    assert error == pytest.approx(abs(want - p17_dts.SHARES).sum() / 2)
    z, p = RNG.normal(size=(50, 3)), RNG.dirichlet(np.ones(50))
    points = p17_dts.moments(Cloud(z, p, np.zeros(50)))
    np.testing.assert_allclose(points.mean(0), p @ z, atol=1e-12)
    np.testing.assert_allclose(np.cov(points.T), np.cov(z.T, aweights=p, ddof=0), atol=1e-12)


@pytest.mark.parametrize("arm", p17_dts.SAMPLERS)
def test_no_method_gets_more_calls_than_another(arm: str) -> None:
    """Counted at the network, a call a sample; at least two thirds of them are used."""
    seen = [0]
    case = p17_dts.plane_problem()
    chain = []
    for one in (case.chain, case.tensors):
        predict, step, finish = one.predict, one.step, one.finish
        assert predict is not None
        assert finish is not None

        def counted(x, i, predict=predict):
            seen[0] += len(x)
            return predict(x, i)

        def stepped(x, i, source, step=step):
            seen[0] += len(x)
            return step(x, i, source)

        def finished(x, i, finish=finish, T=one.steps):
            seen[0] += len(x) * (T - i)
            return finish(x, i)

        at = [one.steps - last for _, last in one.edges[:-1]]
        chain.append(replace(one, predict=counted, step=stepped, finish=finished, branch_at=at))
    cloud = p17_dts.sampled(case._replace(chain=chain[0], tensors=chain[1]), arm, 3000, [0])
    assert 2000 <= seen[0] <= 3000
    assert cloud.p.sum() == pytest.approx(1.0)
    assert cloud.x.shape[1:] == (2,)


def test_the_base_of_the_digits() -> None:
    """A digit in ten is an 8 to the classifier, more than half of the tilted ones."""
    data = p17_dts.digits()
    base = p17_dts.steered(data.case, p17_dts.BASE, 2000 * 50, [0])
    hit = data.probabilities(base.x).argmax(1) == p17_dts.WANTED
    assert base.p @ hit == pytest.approx(0.107, abs=0.035)  # 5 standard errors
    weighted = p17_dts.steered(data.case, p17_dts.ROLLOUTS, 2000 * 50, [0])
    assert weighted.p @ hit == pytest.approx(0.680, abs=0.15)


def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(17, "smoke", 0)
    assert all(claim.verdict is None for claim in report.claims)
    plan = PLANS["smoke"]
    searches = len(plan.digits)
    assert len(report.claims) == 6 + len(plan.plane) + 5 + 6 + searches
    assert [len(table.rows) for table in report.tables] == [10, 10, 10, 10, 3]
    assert [figure.kind for figure in report.figures] == ["line", "line", "line", "pictures"]
    assert Report.from_json(report.to_json()).notes == report.notes
    assert len(report.to_json()) < 300_000
