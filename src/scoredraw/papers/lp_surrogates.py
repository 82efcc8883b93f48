"""Cheap surrogates of the sensitivities: how near they are, and what they cost.

Beside the exact sensitivities stand those against a Lewis-weight sample (as many programmes, each
smaller), those of random blocks (fewer programmes), and the upper and lower bounds by Lewis weights
and leverage (none). Held to account are what each promises: bounds that no row breaks, an interval
of the total that covers it as often as it says, and Lewis weights within their certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from scoredraw.coresets.approximate import (
    DRAWS,
    approximate_sensitivities,
    block_sensitivities,
    total_sensitivity,
)
from scoredraw.coresets.certified import convex_lewis_weights, lewis_certificate
from scoredraw.coresets.combined import sensitivity_lower_bounds, sensitivity_upper_bounds
from scoredraw.coresets.lewis import lewis_weights
from scoredraw.coresets.sensitivities import lp_sensitivities
from scoredraw.errors import MissingExtraError
from scoredraw.metrics import Estimate, proportion_interval
from scoredraw.reports import Claim, Report, ReportTable
from scoredraw.sampling import multinomial

Float = NDArray[np.float64]
Distortion = Callable[[Float], Estimate]

SLACK = 1 + 1e-8  # the exact values are certified to 1e-8
COVERAGE = 0.9  # least share of nominal 95 % intervals that must cover
EXPONENTS = (1.0, 1.5, 3.0, 6.0)
CERTIFIED = (3.0, 4.0, 6.0)


def add_surrogates(report: Report, A: Float, totals: int, distortion: Distortion, rng: int) -> None:
    """The surrogates' table and claims; distortion: of a score's draws, for p = 1."""
    exact = {p: lp_sensitivities(A, p) for p in EXPONENTS}
    report.tables.append(surrogate_table(A, exact, distortion, rng))
    report.claims.append(upper_claim(A, exact))
    report.claims.append(total_claim(A, exact[1], totals, rng))
    try:
        report.claims.append(certificate_claim(A[:60, -6:]))
    except MissingExtraError as error:
        report.notes.append(f"The convex programme of Lewis weights was not solved: {error}.")


def surrogate_table(
    A: Float, exact: dict[float, Float], distortion: Distortion, rng: int
) -> ReportTable:
    """Each surrogate's ratio to the exact sensitivities, and what was solved for it."""
    rows: list[list[Any]] = []
    for p in (1.0, 3.0):
        sigma = exact[p]
        for name, arm in arms(A, p, rng).items():
            solved = [0]
            score = arm(lambda _, total, solved=solved: solved.__setitem__(0, total))
            ratio = score / sigma
            off = np.abs(score / score.sum() - sigma / sigma.sum()).sum() / 2
            share = f"{np.mean(ratio < 1 / SLACK):.1%}"
            kept = distortion(score) if p == 1 else None
            rows.append([f"{p:g}", name, solved[0], ratio.min(), np.median(ratio),
                         ratio.max(), share, off, kept])  # fmt: skip
    columns = ["p", "score", "programmes", "least", "median", "largest ratio to σ",
               "rows below σ", "apart", "distortion"]  # fmt: skip
    n, d = A.shape
    note = (
        "apart: total variation between the two as distributions. distortion: of ‖Ax‖_1, median of "
        "fixed-size draws of 250 rows. A programme has as many terms as its sample has rows (569 "
        "for the exact ones)."
    )
    title = f"Surrogates of the sensitivities, breast cancer {n} x {d}"
    return ReportTable(title, columns, rows, note)


def arms(A: Float, p: float, rng: int) -> dict[str, Callable[..., Float]]:
    """Name -> the score, given a callback for the number of programmes."""

    def blocks(length: int) -> Callable[..., Float]:
        return lambda see: block_sensitivities(A, p, block=length, rng=rng, progress=see)

    return {
        "exact": lambda see: lp_sensitivities(A, p, progress=see),
        "against 150 rows": lambda see: approximate_sensitivities(A, p, 150, rng=rng, progress=see),
        "against 400 rows": lambda see: approximate_sensitivities(A, p, 400, rng=rng, progress=see),
        "blocks of 8": blocks(8),
        "blocks of 32": blocks(32),
        "upper bounds": lambda see: sensitivity_upper_bounds(A, p),
        "lower bounds": lambda see: sensitivity_lower_bounds(A, p),
    }


def upper_claim(A: Float, exact: dict[float, Float]) -> Claim:
    """No upper bound below a sensitivity, for any of the exponents; and no lower one above."""
    broken, looseness = 0, 0.0
    for p, sigma in exact.items():
        high, low = sensitivity_upper_bounds(A, p), sensitivity_lower_bounds(A, p)
        broken += int((high * SLACK < sigma).sum() + (low > sigma * SLACK).sum())
        looseness = max(looseness, float((high / sigma).max()))
    powers = ", ".join(f"{p:g}" for p in exact)
    return Claim.judge(
        f"sensitivities outside their bounds by Lewis weights and leverage, p = {powers}",
        "w and τ^{p/2}, times powers of d and n, bound σ from both sides: certain, but not tight",
        f"{broken} of {2 * len(A) * len(exact)}; upper bounds up to {looseness:.1f} times σ",
        "none",
        broken == 0,
    )


def total_claim(A: Float, sigma: Float, totals: int, rng: int) -> Claim:
    """How often 𝔖̂ ± t s.e. covers 𝔖, k = 16√d rows each; the library's own estimate is the first.

    The exact sensitivities are known here, so that an estimate is a draw and a sum.
    """
    weights, rank = lewis_weights(A, 1), A.shape[1]
    k = int(np.ceil(DRAWS * np.sqrt(rank)))
    seeds = [10_000 * rng + i for i in range(totals)]
    found = np.array([multinomial(weights, k, rng=seed).total(sigma) for seed in seeds])
    own = total_sensitivity(A, 1, rng=seeds[0])
    same = bool(np.allclose(found[0], own, rtol=1e-6))
    reach = stdtrit(k - 1, 0.975) * found[:, 1]
    covered = int((np.abs(found[:, 0] - sigma.sum()) <= reach).sum())
    share = proportion_interval(covered, totals)
    typical = float(np.median(found[:, 1]) / sigma.sum())
    claim = Claim.at_least(
        f"95 % intervals of the total sensitivity that cover it, {k} of {len(A)} programmes each",
        f"about √d sensitivities are enough for 𝔖 (here: relative standard error {typical:.1%})",
        share,
        COVERAGE,
        rule=f"at least {COVERAGE:.0%} of {totals} intervals",
    )
    return claim if same else Claim.judge(
        claim.name, claim.paper_says, "total_sensitivity gives another estimate", claim.rule, False
    )  # fmt: skip


def certificate_claim(A: Float) -> Claim:
    """The iteration's and the programme's Lewis weights lie within both certificates."""
    outside, worst, programme = 0, 0.0, 0.0
    for p in CERTIFIED:
        sure = lewis_certificate(A, p, lewis_weights(A, p, tol=1e-12, max_iter=1000))
        _, convex = convex_lewis_weights(A, p)
        outside += int((sure.lower > convex.upper).sum() + (convex.lower > sure.upper).sum())
        worst, programme = max(worst, sure.error), max(programme, convex.error)
    n, d = A.shape
    powers = ", ".join(f"{p:g}" for p in CERTIFIED)
    return Claim.judge(
        f"certified Lewis weights, iteration and convex programme, {n} x {d}, p = {powers}",
        "weights are the solution of a log det programme; any weights bound its optimum",
        f"relative error at most {worst:.1e} (iteration), {programme:.1e} (programme); "
        f"{outside} rows where the intervals do not meet",
        "intervals meet at every row, and the iteration's error is certified below 1e-8",
        outside == 0 and worst < 1e-8,
    )
