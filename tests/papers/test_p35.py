"""DEIS: the measures and the claim-makers against what is known, and the experiment itself."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.diffusion.deis import DEISSolver  # noqa: E402
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta  # noqa: E402
from scoredraw.diffusion.time_grids import time_grid  # noqa: E402
from scoredraw.metrics import Estimate, frechet_distance  # noqa: E402
from scoredraw.papers import digit_diffusion as digits  # noqa: E402
from scoredraw.papers import p35_deis  # noqa: E402
from scoredraw.papers.p35_deis import DDIM, PLANS, QUADRATIC, UNIFORM, WITH_SKIP  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

RNG = np.random.default_rng(35)


# ── the measures ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_frechet_distance_is_the_closed_form() -> None:
    from scipy.linalg import sqrtm

    x, y = RNG.normal(size=(90, 5)), RNG.normal(1.0, 2.0, size=(70, 5))
    S, T = np.cov(x.T), np.cov(y.T)
    gap = np.square(x.mean(0) - y.mean(0)).sum()
    want = gap + np.trace(S + T - 2 * sqrtm(S @ T).real)
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    few = RNG.normal(size=(4, 5))  # fewer rows than columns
    assert frechet_distance(few, few + 2.0) == pytest.approx(20.0, rel=1e-9)


@pytest.mark.oracle
def test_transport_and_mean_distances_by_hand() -> None:
    x = RNG.normal(size=(40, 6))
    assert digits.transport_distance(x, x[::-1]) == 0.0
    assert digits.transport_distance(x, x[::-1] + 0.5) == pytest.approx(0.5 * np.sqrt(6))
    line = np.array([[0.0], [1.0], [3.0]])
    assert digits.mean_distance(line, line) == pytest.approx(2.0)
    assert digits.mean_distance(line, np.array([[1.0]])) == pytest.approx(1.0)


@pytest.mark.oracle
def test_a_strip_shows_the_digits_it_is_given() -> None:
    from matplotlib.image import imread

    pixels = np.where(np.arange(128).reshape(2, 64) % 3 == 0, 1.0, -1.0)
    strip = imread(io.BytesIO(base64.b64decode(digits.picture_strip(pixels))), format="png")
    assert strip.shape[:2] == (10, 20)
    np.testing.assert_allclose(strip[1:9, 11:19, 0].ravel(), (pixels[1] + 1) / 2)


# ── the two kinds of eps ────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_network_that_has_learned_nothing_takes_the_data_for_a_gaussian() -> None:
    schedule = LinearBeta()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for skip, want in ((True, float(schedule.sigma(0.4)) * x), (False, torch.zeros(5, 64))):
        network = digits.EpsNetwork(schedule, 0, skip=skip).requires_grad_(False)
        network.last.weight.zero_()
        network.last.bias.zero_()
        torch.testing.assert_close(network.eps(x, 0.4), want)


@pytest.mark.property
def test_a_network_does_not_depend_on_the_company_it_is_trained_in() -> None:
    data, schedule = digits.real_digits()[0], LinearBeta()
    together = digits.each(lambda seed: digits.train(schedule, data, 3, seed), [4, 5])
    alone = digits.each(lambda seed: digits.train(schedule, data, 3, seed), [5])[0]
    start = digits.EpsNetwork(schedule, 5)
    for a, b, c in zip(
        together[1].parameters(), alone.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.oracle
def test_first_order_dpm_solver_is_ddim_on_the_same_times() -> None:
    """Which shows that a peer runs along our times, from the same start to the same end."""
    diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    mixture = digits.Mixture(schedule, 1, 6, 5, rng=0)
    for n in (4, 17):
        times = time_grid(schedule, n, "t", 2.0, integer=True)
        sample = p35_deis.peer(mixture, diffusers.DPMSolverMultistepScheduler, 1, times)
        want = mixture.solve(DEISSolver(schedule, times=times, variant="ei_eps"))
        np.testing.assert_allclose(mixture.each_block(sample), want, atol=2e-5)


# ── the claim-makers ────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_the_comparison_that_decides() -> None:
    low, wide = Estimate(0.9, 0.8, 0.95, 9), Estimate(3.0, 0.1, 90.0, 9)
    above = Estimate(1.2, 1.1, 1.3, 9)
    assert digits.weakest({"a": above, "b": wide, "c": low}) == ("c", low)
    assert digits.weakest({"a": above, "b": wide}) == ("b", wide)
    noise = np.exp(RNG.normal(size=12))
    exact = digits.ratio(3 * noise, noise)
    assert (exact.value, exact.low, exact.high) == pytest.approx((3.0, 3.0, 3.0))


PLAN = p35_deis.Plan(blocks=12, noises=10, doublings=(40, 80, 160))
SIZES = {  # errors that agree with every claim; UNIFORM and peers are twice as large
    p35_deis.SCORE: 4.0, p35_deis.EULER: 3.0, DDIM: 2.0, "ρ3Kutta": 1.5, "tAB1": 1.0, "tAB2": 0.5,
    "tAB3": 0.2, "ρAB1": 1.2, "ρAB2": 0.7, "ρAB3": 0.6,
}  # fmt: skip
ORDERS = {DDIM: 1.0, "tAB1": 2.0, "tAB2": 3.0, "tAB3": 3.2}


def invented(power: float = 1.0) -> digits.Errors:
    """Errors as the paper would have them; with power -1 every ordering is turned round."""
    shared = np.exp(0.3 * RNG.normal(size=(PLAN.blocks, PLAN.noises)))
    errors: digits.Errors = {}
    for method in (*p35_deis.METHODS, *p35_deis.PEERS):
        for grid in p35_deis.GRIDS:
            for n in (*PLAN.calls, *PLAN.doublings):
                size = SIZES.get(method, 2.5) * (1 + (grid == UNIFORM) + (method in p35_deis.PEERS))
                if method in p35_deis.STAGES and n <= 10:
                    size = 100.0
                size *= (n / 20) ** -ORDERS.get(method, 1.0) if n > 20 else 1.0
                own = np.exp(0.01 * RNG.normal(size=shared.shape))
                errors[method, grid, n] = (size * shared * own) ** power
    return errors


@pytest.mark.oracle
def test_every_claim_holds_where_the_paper_is_right_and_fails_where_it_is_not() -> None:
    for power, verdict in ((1.0, "holds"), (-1.0, "fails")):
        errors = invented(power)
        claims = [
            *p35_deis.mixture_claims(PLAN, errors),
            *p35_deis.convergence_claims(PLAN, errors),
            *p35_deis.peer_claims(PLAN, errors),
        ]
        assert len(claims) == 26
        assert {c.name: c.verdict for c in claims} == {c.name: verdict for c in claims}


@pytest.mark.oracle
def test_one_method_made_worse_fails_its_own_claims_only() -> None:
    errors = invented()
    for grid in p35_deis.GRIDS:
        errors["tAB3", grid, 15] = 1.1 * errors["tAB2", grid, 15]
    failed = [c.name for c in p35_deis.mixture_claims(PLAN, errors) if c.verdict != "holds"]
    nearer = "tAB3 is nearer the exact"
    assert [name[:24] for name in failed] == [nearer, nearer, "tAB3 is the nearest of a"]


@pytest.mark.oracle
def test_network_claims_hold_and_fail() -> None:
    calls = (5, 10, 20)
    for power, verdict in ((1.0, "holds"), (-1.0, "fails")):
        errors = invented(power)
        quality = {key: values[:5, :3] for key, values in errors.items()}
        claims = p35_deis.network_claims("network", calls, errors, quality)
        assert [c.verdict for c in claims] == [verdict] * 5


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small() -> Report:
    """Every part of the full run, and little of each."""
    pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    with pytest.MonkeyPatch.context() as patch:
        plan = replace(PLANS["smoke"], calls=(5, 10, 20), peers=True)
        patch.setitem(PLANS, "full", replace(plan, trained=PLANS["full"].trained))
        return run_paper(35, "full", 0)


@pytest.mark.contract
def test_every_part_of_the_full_run_works(small: Report) -> None:
    assert all(claim.verdict in ("holds", "fails", "undecided") for claim in small.claims)
    assert len(small.tables) == 4 + 1 + 2 * 2
    assert [figure.kind for figure in small.figures] == ["line"] * 4 + ["pictures"]
    assert len(small.figures[-1].pictures) == 1 + 3 * 4
    methods = [row[0] for row in small.tables[0].rows]
    assert methods == list(p35_deis.METHODS)
    again = Report.from_json(small.to_json())
    assert [t.columns for t in again.tables] == [t.columns for t in small.tables]
    assert len(small.to_json()) < 300_000


@pytest.mark.oracle
def test_the_mixture_part_finds_what_the_exact_eps_implies(small: Report) -> None:
    """At 20 calls tAB3's median error is under a fifth of DDIM's: by 16 noises, far from chance."""
    medians = {row[0]: row[-1] for row in small.tables[1].rows}
    assert medians["tAB3"].value < medians[DDIM].value / 5
    assert medians["tAB2"].value < medians["tAB1"].value < medians[DDIM].value
    assert small.tables[1].columns[-1] == "20 calls"
    assert small.tables[0].rows[0][1] == QUADRATIC


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(35, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
    assert WITH_SKIP.capitalize() in {table.title.split(":")[0] for table in report.tables}
    assert Report.from_json(report.to_json()).notes == report.notes
