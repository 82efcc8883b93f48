"""Feynman-Kac correctors: the measures and the particles against what is known, and the runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.papers import lennard_jones as lj  # noqa: E402
from scoredraw.papers import p24_fkc  # noqa: E402
from scoredraw.papers.p24_fkc import PLANS, cells, energy_distance, plane_distances  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

pytestmark = pytest.mark.oracle

RNG = np.random.default_rng(24)
RELEASED = Path(__file__).parents[3] / "shared" / "data" / "24-lj13" / "lj13_samples.npz"


# ── the particles ───────────────────────────────────────────────────────────────────────────────


def test_the_energy_by_hand_and_its_gradient() -> None:
    """13 particles far apart but two at distance 1: -2 for the pair, and the spring."""
    x = np.zeros((1, 13, 3))
    x[0, :, 0] = 50.0 * np.arange(13)
    x[0, 1, 0] = 1.0
    spring = 0.5 * np.square(x - x.mean(axis=1, keepdims=True)).sum()
    assert lj.energy(x.reshape(1, 39))[0] == pytest.approx(spring - 2.0, rel=1e-9)
    y = lj.samples("T1p5")[:5]
    step = RNG.normal(size=y.shape)
    slope = (lj.energy(y + 1e-6 * step) - lj.energy(y - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose((lj.energy_gradient(y) * step).sum(axis=1), slope, rtol=1e-5)


def test_real_samples_have_their_temperature() -> None:
    """<x · ∇U>/36 = T; judged at 4 standard errors, as if samples were independent."""
    for name, temperature in lj.TEMPERATURES.items():
        values = lj.virial_temperature(lj.samples(name))
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - temperature) < 4 * error


@pytest.mark.skipif(not RELEASED.is_file(), reason="the released samples are not beside this")
def test_what_ships_is_what_was_released() -> None:
    """Up to rounding, by half a step, and to centring again, by half a step at most."""
    with np.load(RELEASED) as released:
        for name, rows in (("T2p0", 1), ("T1p5", 2), ("T0p8", 4)):
            gap = np.abs(lj.samples(name) - released[name][::rows]).max()
            assert gap < 1.9e-4


def test_the_network_turns_and_renumbers_with_the_particles() -> None:
    network = lj.PairNetwork(0).double().requires_grad_(False)
    x = torch.from_numpy(lj.samples("T2p0")[:3])
    turn = torch.linalg.qr(torch.from_numpy(RNG.normal(size=(3, 3))))[0]
    order = torch.from_numpy(RNG.permutation(13))

    def moved(x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(-1, 13, 3)[:, order] @ turn + 0.7).reshape(-1, 39)

    for t in (0.1, 0.8):
        eps = network.eps(x, t).reshape(-1, 13, 3)
        want = (eps[:, order] @ turn).reshape(-1, 39)
        torch.testing.assert_close(network.eps(moved(x), t), want)


def test_training_helps_and_is_the_same_again() -> None:
    """What is left of the noise after 40 steps is well below what is left without training."""
    x = torch.from_numpy(lj.samples("T2p0")[:200]).float()
    noise = torch.from_numpy(RNG.normal(size=(200, 13, 3))).float()
    noise = (noise - noise.mean(1, keepdim=True)).reshape(200, 39)

    def loss(network: lj.PairNetwork) -> float:
        of = [
            float((network.eps(x + float(lj.SCHEDULE.sigma(t)) * noise, t) - noise).square().mean())
            for t in (0.4, 0.6, 0.8)
        ]
        return float(np.mean(of))

    short, again = lj.train(3, 1), lj.train(3, 1)
    assert loss(short) == loss(again)
    assert loss(lj.train(40, 1)) < 0.8 * loss(lj.PairNetwork(1).requires_grad_(False))


# ── the measures ────────────────────────────────────────────────────────────────────────────────


def test_cells_and_distances() -> None:
    x = np.array([[0.1, 0.1], [0.9, 0.9], [5.0, 5.0]])
    mass = cells(x, np.array([0.5, 0.3, 0.2]), np.array([[0.0, 1.0], [0.0, 1.0]]), bins=2)
    np.testing.assert_allclose(mass, [0.5, 0.0, 0.0, 0.3, 0.2])
    y = RNG.normal(size=(60, 2))
    same = plane_distances(y, y)
    assert max(same.values()) < 1e-6
    far = plane_distances(y, y + np.array([3.0, 4.0]))
    assert far["W1"] == pytest.approx(5.0)
    assert far["W2"] == pytest.approx(5.0)
    even = np.full(60, 1 / 60)
    assert energy_distance(y, even, y) == pytest.approx(0.0, abs=1e-12)
    assert energy_distance(y, even, y + 1.0) > 0.1


def test_the_exact_plane_is_the_targets() -> None:
    """The mean of a finer grid's mass is that of importance sampling from the second expert."""
    models, _ = p24_fkc.iris_experts()
    for name, target in p24_fkc.PLANE.items():
        mass, points, fine = p24_fkc.plane_target(name)
        assert mass.sum() == pytest.approx(1.0)
        x = models[1].sample(20_000, 5)
        x = x[0] + 1.5 * (x - x[0])
        powers = target.powers_at(0.0)
        log = sum(b * q.log_density(x, 0.0) for b, q in zip(powers, models, strict=True))
        # widened by 1.5, the proposal's density is the expert's at the point it came from
        back = x[0] + (x - x[0]) / 1.5
        log = log - models[1].log_density(back, 0.0)
        p = np.exp(log - log.max())
        np.testing.assert_allclose((p / p.sum()) @ x, fine @ points, atol=0.03)


def test_the_reward_is_a_log_probability_and_has_its_gradient() -> None:
    x, step = RNG.normal(size=(6, 64)), RNG.normal(size=(6, 64))
    slope = (p24_fkc.reward(x + 1e-5 * step, 0) - p24_fkc.reward(x - 1e-5 * step, 0)) / 2e-5
    np.testing.assert_allclose((p24_fkc.reward_gradient(x, 0) * step).sum(1), slope, rtol=1e-6)
    assert (p24_fkc.reward(x, 0) < 0).all()


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


def test_every_part_of_the_full_run_works() -> None:
    with pytest.MonkeyPatch.context() as patch:
        small = replace(PLANS["smoke"], forty=(60, 30), particles=(2, 2, 6, 24),
                        colder=("T1p5", "T0p8"))  # fmt: skip
        patch.setitem(PLANS, "full", small)
        report = run_paper(24, "full", 0)
    assert all(claim.verdict in ("holds", "fails", "undecided") for claim in report.claims)
    assert len(report.tables) == 4 + 1 + 2 + 1
    assert [figure.kind for figure in report.figures] == ["line", "interval", "pictures"]
    again = Report.from_json(report.to_json())
    assert [t.columns for t in again.tables] == [t.columns for t in report.tables]
    assert len(report.to_json()) < 300_000


def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(24, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
