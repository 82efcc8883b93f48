"""NTK score: the splits, the samplers and the claim-makers, and the experiment itself."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from scoredraw.diffusion.score_regression import GaussianScoreEstimator, NoisyPairs
from scoredraw.papers import p50_ntk_score as p50
from scoredraw.papers.p50_ntk_score import (
    EXACT,
    EXACT_NEVER,
    GAUSSIAN,
    HELD_OUT,
    MANY,
    NEVER_NAME,
    PLANS,
    Risks,
)
from scoredraw.reports import Claim, Report, run_paper

Float = NDArray[np.float64]
RNG = np.random.default_rng(50)


def verdicts(claims: list[Claim]) -> dict[str, str | None]:
    return {claim.name: claim.verdict for claim in claims}


# ── the parts ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_splits_are_standardised_and_share_no_row() -> None:
    train, test = p50.split_rows("diabetes", 300, 3, 0)
    assert (train.shape, test.shape) == ((300, 10), (142, 10))
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(axis=0), 1)
    assert not set(map(tuple, train)) & set(map(tuple, test))
    assert (p50.split_rows("diabetes", 300, 3, 1)[0] != train).any()


@pytest.mark.oracle
def test_the_reverse_sde_of_a_gaussian_ends_in_it() -> None:
    """Denoised at t = 0.05: covariance alpha² S S'⁻¹ S. Moments of 3000 at 5 sd and a step of 1 %.

    False alarm below 1e-5; with the score left out or doubled the covariance is off by 0.3.
    """
    X = RNG.standard_normal((400, 2)) @ [[1.0, 0.6], [0.0, 0.8]]
    learned = GaussianScoreEstimator().fit(X)
    x = p50.reverse_sde(learned, (3000, 2), 200, np.random.default_rng(1))
    S, alpha = np.corrcoef(X.T), np.exp(-0.05)
    want = alpha**2 * S @ np.linalg.inv(alpha**2 * S + (1 - alpha**2) * np.eye(2)) @ S
    found = np.cov(((x - learned.mean_) / learned.scale_).T)
    np.testing.assert_allclose(found, want, atol=5 * np.sqrt(2 / 3000) + 0.02)


@pytest.mark.oracle
def test_energy_distance() -> None:
    x = np.array([[0.0], [1.0]])
    assert p50.energy_distance(x, np.array([[5.0], [5.0]])) == pytest.approx(2 * 4.5 - 1)
    a, b = RNG.standard_normal((2, 2000, 3))
    assert abs(p50.energy_distance(a, b)) < 0.02 < p50.energy_distance(a, b + 0.5)


@pytest.mark.oracle
def test_the_kernel_density_denoises_held_out_rows_best() -> None:
    """Of a standard Gaussian's rows: near alpha z, and far from pulling to the nearest row."""
    rows = RNG.standard_normal((300, 2))
    density = p50.kernel_density(rows, 0)
    pairs = NoisyPairs.draw(RNG.standard_normal((500, 2)), p50.OU, 1, 1)
    exact = p50.OU.alpha(pairs.t)[:, None] * pairs.x
    off = np.square(density.denoise(pairs.x, pairs.t) - exact).mean()
    assert off < 0.03
    assert density.eigenvalues.min() >= p50.BANDWIDTHS[0] ** 2 * 0.999


# ── the claim-makers ────────────────────────────────────────────────────────────────────────────


def invented(sign: float, splits: int = 12) -> Risks:
    """Errors that agree with every claim; with sign -1 each ordering is turned round."""
    base = {
        "k = 1": 0.80, "k = 3": 0.76, NEVER_NAME: 0.86, HELD_OUT: 0.75, p50.CHOSEN: 0.749,
        p50.RIDGE: 0.751, p50.RWY: 0.752, p50.K_RWY: 1.0,
    }  # fmt: skip
    against = {
        "k = 1": 0.70, "k = 3": 0.70, NEVER_NAME: 0.70, HELD_OUT: 0.75, p50.CHOSEN: 0.70,
        p50.RIDGE: 0.70, p50.RWY: 0.80, p50.K_RWY: 0.0,
    }  # fmt: skip
    risks: Risks = {}
    for name in p50.TABLES:
        shared = 0.02 * RNG.standard_normal(splits)
        for m in p50.REPEATS:
            gain = 0.0 if m == 1 else 0.004 * sign
            for label, value in (base if sign > 0 else against).items():
                own = 0.0003 * RNG.standard_normal(splits)
                exact = label == p50.K_RWY
                risks[name, m, label] = np.full(splits, value) + (not exact) * (shared + own - gain)
        others = {GAUSSIAN: 0.72, MANY: 0.73, p50.MLP: 0.74}
        for label, value in others.items():
            high = 0.12 * (sign < 0) * (label != p50.MLP)
            own = 0.0003 * RNG.standard_normal(splits)
            risks[name, 0, label] = value + high + shared + own
    return risks


@pytest.mark.oracle
@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_claims_about_the_tables_hold_and_fail(sign: float, verdict: str) -> None:
    risks = invented(sign)
    claims = verdicts(p50.real_claims(risks))
    assert len(claims) == 4 * 9 + 2
    latest = {name for name in claims if name.endswith("latest stop")}
    assert {name: v for name, v in claims.items() if name not in latest} == dict.fromkeys(
        set(claims) - latest, verdict
    )
    assert {claims[name] for name in latest} == {"holds"}
    for key in [key for key in risks if key[2] == p50.K_RWY]:
        risks[key] = risks[key] + 5
    assert {v for k, v in verdicts(p50.real_claims(risks)).items() if k in latest} == {"fails"}


@pytest.mark.oracle
def test_claims_about_rivals_hold_and_fail() -> None:
    for sign, verdict in ((1.0, "holds"), (-1.0, "fails")):
        risks = invented(sign)
        for (name, m), numbers in p50.INDEPENDENT.items():
            for label, value in zip(p50.COMPARED, numbers, strict=True):
                key = (name, 0 if label == GAUSSIAN else m, label)
                risks[key] = np.full(12, value + 0.004 + 0.05 * (sign < 0))
        assert set(verdicts(p50.rival_claims(risks)).values()) == {verdict}


@pytest.mark.oracle
def test_claims_about_known_answers_hold_and_fail() -> None:
    plan = PLANS["full"]
    noise = np.exp(0.05 * RNG.standard_normal(plan.seeds))
    for power, verdict in ((1.0, "holds"), (-1.0, "fails")):
        size = {HELD_OUT: 1.0, NEVER_NAME: 2.0, EXACT: 1.0, EXACT_NEVER: 0.3}
        known = {
            (label, n): (value * (n / 100) ** -0.5) ** power * noise
            for label, value in size.items() for n in plan.sizes
        }  # fmt: skip
        claims = verdicts(p50.mixture_claims(plan, known))
        assert claims == dict.fromkeys(claims, verdict)
        gaps = {m: noise[:6] * (m / 256) ** (-0.5 * power) for m in plan.widths}
        claims = verdicts(p50.network_claims(plan, gaps, noise[:6] * 0.005**power))
        assert claims == dict.fromkeys(claims, verdict)
        distances = {
            (name, 0, label): value**power * noise
            for name in p50.TABLES for label, value in ((HELD_OUT, 1), (MANY, 1), (NEVER_NAME, 2))
        }  # fmt: skip
        claims = verdicts(p50.sample_claims(distances))
        assert claims == dict.fromkeys(claims, verdict)


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def smoke() -> Report:
    return run_paper(50, "smoke", 0)


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts(smoke: Report) -> None:
    assert len(smoke.claims) == 38 + 3 + 5 + 2 + 4
    assert all(claim.verdict is None for claim in smoke.claims)
    assert [figure.kind for figure in smoke.figures] == ["line"] * 4
    assert "Credit Default" in smoke.notes[0]
    again = Report.from_json(smoke.to_json())
    assert [t.columns for t in again.tables] == [t.columns for t in smoke.tables]


@pytest.mark.contract
def test_every_method_and_every_independent_number_is_in_the_table(smoke: Report) -> None:
    table, rows = smoke.tables[0], {row[0]: row for row in smoke.tables[0].rows}
    for (name, m), numbers in p50.INDEPENDENT.items():
        column = table.columns.index(f"independent: {name}, {m}")
        assert [rows[label][column] for label in p50.COMPARED] == list(numbers)
    assert {p50.MLP, p50.KDE, p50.MEAN, p50.RWY, p50.DISCREPANCY, p50.CLIPPED} <= set(rows)


@pytest.mark.contract
def test_the_same_seed_gives_the_same_numbers() -> None:
    plan = PLANS["smoke"]
    train, test = p50.split_rows("diabetes", 30, 0, 0)
    asked = NoisyPairs.draw(test, p50.OU, 1, 0)
    assert p50.rivals(plan, train, asked, 1) == p50.rivals(plan, train, asked, 1)
    assert p50.descents(train, asked, 2, 1) == p50.descents(train, asked, 2, 1)
    assert p50.descents(train, asked, 2, 2) != p50.descents(train, asked, 2, 1)
    course = [p50.network_gaps(plan, seed)[1].tolist() for seed in (0, 0, 1)]
    assert course[0] == course[1] != course[2]
