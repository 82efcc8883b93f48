"""The experiment of paper 45: it runs, its claims can fail, and the flow that ships is good."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytest.importorskip("safetensors", reason="the diffusion extra is not installed")

from scoredraw.diffusion.flow_inversion import SegmentPlan  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402
from scoredraw.papers import p45_gs_jacobi as p45  # noqa: E402
from scoredraw.papers import small_flow  # noqa: E402
from scoredraw.papers.digit_diffusion import each  # noqa: E402
from scoredraw.papers.small_flow import NOISE_STD  # noqa: E402
from scoredraw.papers.training import one_thread  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def study() -> p45.Study:
    with one_thread():
        return p45.Study(small_flow.small_flow(), replace(p45.PLANS["smoke"], digits=24), 0)


def twin(study: p45.Study, **changes: Any) -> p45.Study:
    """The same study with other findings."""
    other = object.__new__(p45.Study)
    other.__dict__.update(study.__dict__, **changes)
    return other


# ── the flow that ships ─────────────────────────────────────────────────────────────────────────


def test_the_flow_that_ships_knows_digits_it_has_not_seen() -> None:
    """Nats a pixel of noisy digits; noise alone, N(0, 0.2²), has 0.19 at the best."""
    flow, (train, held_out) = small_flow.small_flow(), small_flow.digit_images()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad(), one_thread():
        seen, unseen = (
            float(flow.log_prob(x + NOISE_STD * torch.randn(x.shape, generator=source)).mean()) / 64
            for x in (train[:400], held_out[:400])
        )
    flat = torch.distributions.MultivariateNormal(
        train.flatten(1).mean(0), torch.cov(train.flatten(1).T) + NOISE_STD**2 * torch.eye(64)
    )
    noisy = held_out + NOISE_STD * torch.randn(held_out.shape, generator=source)
    assert unseen > float(flat.log_prob(noisy.flatten(1)).mean()) / 64 + 0.05
    assert seen - unseen < 0.1


def test_images_by_any_method_are_the_same_digits() -> None:
    with one_thread():
        made = {m: small_flow.generate(24, method=m, seed=1) for m in small_flow.METHODS}
        noisy, _ = small_flow.generate(24, noise_std=None, seed=1)
    exact, facts = made["sequential"]
    assert (facts["passes"], facts["overflowed"], exact.shape) == (60, 0, (24, 1, 8, 8))
    assert exact.dtype == np.float32
    assert np.abs(exact).max() <= 1
    for images, facts in made.values():
        assert np.abs(images - exact).max() < 1e-3
        assert facts["passes"] <= facts["sequential_passes"] == 60
        assert facts["converged"]
    assert 0.05 < np.sqrt(np.square(noisy - exact).mean()) < 0.3
    with pytest.raises(InputError, match="method: got 'newton'"):
        small_flow.generate(2, method="newton")


def test_a_flow_is_determined_by_its_seed_whatever_is_trained_beside_it() -> None:
    a, c = each(lambda seed: small_flow.train_small_flow(1, seed), [7, 8])
    b = small_flow.train_small_flow(1, 7)
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.dim() < 2 or not p.any() or not torch.equal(p, r)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


def test_costs_are_those_of_the_plans(study: p45.Study) -> None:
    error, passes, tokens = study.sweeps[4]
    assert (passes, tokens) == (16, 4 * 4 * 15)
    found = study.flow.inverse(study.z, SegmentPlan(1, 4, 0.0)).images
    exact = study.flow.inverse(study.z).images
    assert error == pytest.approx(float((found - exact).square().mean().sqrt()))
    assert [study.sweeps[k][0] for k in (1, 4, 8, 12)] == sorted(
        (study.sweeps[k][0] for k in (1, 4, 8, 12)), reverse=True
    )
    assert study.segmented[4, 4, False][0] < 1e-5
    assert study.segmented[2, 4, True][1] == study.segmented[2, 4, False][1] + 4
    assert study.in_doubles["Jacobi"] < p45.EXACT < study.in_doubles["one sweep less"]
    assert abs(study.plans["uniform"][1] - study.plans["by CRM"][1]) == 0
    assert study.plans["by CRM"] in [study.plans[f"block {b}"] for b in range(p45.K)]


def test_claims_hold_and_fail_with_what_is_found(study: p45.Study) -> None:
    worse = twin(
        study,
        in_doubles=dict.fromkeys(study.in_doubles, 0.001) | {"one sweep less": 0.0},
        crm=-study.isolated["z", p45.ALONE],
        igm_z=5 + study.isolated["z", p45.ALONE],
        igm_zero=np.array([1.0] * 4),
        favoured=-np.log(study.isolated["z", p45.ALONE] / 10),
        plans={name: ((9.0 if name == "by CRM" else 1.0), 45, 1) for name in study.plans},
        sweeps={k: (0.9**k, p, t) for k, (_, p, t) in study.sweeps.items()},
        tolerances={tol: (1.0, p, t) for tol, (_, p, t) in study.tolerances.items()},
        segmented={key: (9.0, p, t) for key, (_, p, t) in study.segmented.items()},
    )
    worse.sweeps[15] = (1e-8, 60, 900)
    worse.sweeps[12] = (0.9**8 * 0.99, 48, 720)

    def claims(one: p45.Study) -> dict[str, str | None]:
        pair = [one, one]
        found = [*p45.exactness_claims(pair), *p45.pass_claims(pair), *p45.metric_claims(pair),
                 *p45.allocation_claims(pair)]  # fmt: skip
        return {claim.name: claim.verdict for claim in found}

    good, bad = claims(study), claims(worse)
    assert len(good) == 24
    assert list(bad) == list(good)
    assert [name for name, verdict in bad.items() if verdict == "holds"] == []
    proved = [name for name in good if "float64" in name]
    assert len(proved) == 4
    assert all(good[name] == "holds" for name in proved)


def test_quality_is_judged_against_the_sequential_images() -> None:
    rng = np.random.default_rng(0)
    exact = np.column_stack([rng.uniform(5, 6, 4), np.ones(4), np.ones(4), np.full(4, 60.0)])
    for factor, passes, verdicts in ((1.001, 16, ["holds"] * 3), (1.2, 16, ["fails"] * 3)):
        other = exact * [factor, 1, 1, passes / 60]
        made = {"sequential": exact, "by CRM": other, "Jacobi, tolerance 1e-3": other}
        assert [claim.verdict for claim in p45.quality_claims(made)] == verdicts


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_smoke_runs_without_verdicts() -> None:
    report = run_paper(45, "smoke", 0)
    assert len(report.claims) == 27
    assert all(claim.verdict is None for claim in report.claims)
    assert [len(table.rows) for table in report.tables] == [11, 3, 10, 4, 7, 4]
    assert [figure.kind for figure in report.figures] == ["line", "scatter", "pictures"]
    assert Report.from_json(report.to_json()).claims == report.claims
    assert len(report.to_json()) < 300_000
