"""Time shift: the claim-makers against invented distances, and the experiment itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.papers import p53_time_shift as p53  # noqa: E402
from scoredraw.papers.p53_time_shift import BASES, CODE, DDIM, MATCHED, PLAIN, PLANS  # noqa: E402
from scoredraw.reports import Report, run_paper  # noqa: E402

PLAN = replace(PLANS["quick"], host_counts=(10, 20))


def invented(sign: float = 1.0) -> p53.Quality:
    """Distances as the paper would have them, and turned round with sign -1."""
    draw = np.random.default_rng(53)
    level = 2 + draw.random(PLAN.networks)

    def near(offset: float) -> np.ndarray:
        return level + sign * offset + 0.01 * draw.normal(size=PLAN.networks)

    quality: p53.Quality = {(DDIM, 100): near(0.5)}
    for n in PLAN.counts:
        quality |= {(DDIM, n): near(0.0), (PLAIN, n): near(-0.4), (MATCHED, n): near(-0.5)}
        quality |= {(CODE, n): near(-0.3)}
        quality |= {(f"ES {s:g}", n): near(-0.1) for s in p53.SCALES}
        quality |= {(name, n): near(0.3) for name in p53.NORMALISED}
    for n in PLAN.host_counts:
        for base in BASES:
            quality |= {(base, n): near(0.0), (f"{base} + {PLAIN}", n): near(-0.3)}
            quality |= {(f"{base} + {MATCHED}", n): near(-0.3)}
    return quality


@pytest.mark.oracle
@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_claims_hold_where_the_paper_is_right_and_fail_where_it_is_not(sign, verdict) -> None:
    quality = invented(sign)
    claims = [*p53.main_claims(PLAN, quality), *p53.host_claims(PLAN, quality)]
    assert len(claims) == 6 + 2 + 2 + 3 + 2 * 5 + 1
    assert {c.name: c.verdict for c in claims} == {c.name: verdict for c in claims}


@pytest.mark.oracle
def test_the_gain_at_50_steps_has_to_be_worth_something() -> None:
    quality = invented()
    quality[PLAIN, 50] = quality[DDIM, 50] - 0.01
    claims = {c.name: c.verdict for c in p53.main_claims(PLAN, quality)}
    assert claims["50 steps: Fréchet distance, TS minus DDIM"] == "fails"
    assert claims["50 steps: networks that TS improves"] == "holds"


@pytest.mark.oracle
def test_the_best_scaling_is_the_least_on_average() -> None:
    quality = invented()
    quality["ES 1.01", 50] = quality["ES 1.01", 50] - 1.0
    assert p53.best_scaling(quality, 50) == "ES 1.01"


@pytest.mark.contract
def test_every_part_of_the_full_run_works() -> None:
    with pytest.MonkeyPatch.context() as patch:
        plan = replace(PLANS["smoke"], counts=(20, 50), samples=30, search=2, epochs=1)
        plan = replace(plan, skipped=2, peers=True)
        patch.setitem(PLANS, "full", plan)
        report = run_paper(53, "full", 0)
    assert all(claim.verdict in ("holds", "fails", "undecided") for claim in report.claims)
    assert [figure.kind for figure in report.figures] == ["line", "line", "pictures"]
    assert len(report.tables) == 5
    assert len(report.figures[-1].pictures) == 6
    assert Report.from_json(report.to_json()).notes == report.notes
    assert len(report.to_json()) < 300_000
    verdicts = {claim.name[:9]: claim.verdict for claim in report.claims}
    assert verdicts["eps 1 % s"] != "fails"


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(53, "smoke", 0)
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)


@pytest.mark.oracle
def test_networks_see_whole_and_halved_times_alike() -> None:
    trained = p53.Trained(replace(PLANS["smoke"], networks=1, steps=1), 0)
    network = trained.networks[0].eval()
    eps, x = trained.eps(network), trained.noises[0]
    t = torch.arange(40) * 20
    torch.testing.assert_close(eps(x, t.double()), eps(x, t))
    for time in (20, 700):
        torch.testing.assert_close(eps(x, torch.full((40,), time)), network.eps(x, time))
    between = eps(x, torch.full((40,), 20.5, dtype=torch.float64))
    torch.testing.assert_close(between, network.eps(x, 20.5))
