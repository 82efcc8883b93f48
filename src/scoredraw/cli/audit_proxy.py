"""What `scoredraw audit proxy` reads, prints and shows."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from scoredraw.cli.compare import check_report
from scoredraw.cli.options import named_columns
from scoredraw.cli.outcome import written_by
from scoredraw.errors import require
from scoredraw.pages import Page, cell_text
from scoredraw.reports import Cell, Figure, ReportTable, Series, plain, stamp

if TYPE_CHECKING:
    from scoredraw.calibration import Reliability
    from scoredraw.rl.pairwise_rewards import ScoreGapAudit
    from scoredraw.rl.proxy_rewards import ProxyAudit

ROLES = {
    "proxy": ("proxy", "reward", "score"),
    "true": ("true", "correct", "gold"),
    "problem": ("problem", "prompt", "question"),
    "episode": ("episode",),
    "time": ("time", "step", "t"),
    "confidence": ("confidence",),
}
NUMBERS = ("proxy", "true", "confidence")


@dataclass
class Audits:
    """What the columns at hand allow to be said; each part None where its columns are missing."""

    rows: int
    proxy: ProxyAudit | None = None
    gaps: ScoreGapAudit | None = None
    calibration: dict[str, float] | None = None
    reliability: Reliability | None = None
    notes: list[str] = field(default_factory=list)


def carry_out(
    source: str, columns: str | None, margin: float | None, gamma: float, level: float, seed: int,
    report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Read the rollouts, make every audit they allow, say what was found."""
    if report is not None:
        check_report(report)
    data = read_rollouts(source, named_columns(columns))
    found = audits(data, margin, gamma, level, seed)
    if report is not None:
        page(found, source).save(report)
    if as_json:
        typer.echo(json.dumps(plain(facts(found)), indent=2, allow_nan=False))
        return
    shown = page(found, source)
    typer.echo(shown.answer)
    for table in shown.tables:
        typer.echo(f"\n{table.title}")
        for row in table.rows:
            typer.echo("  " + "  ".join(cell_text(cell) for cell in row))
    for note in found.notes:
        typer.echo(f"\n{note}")
    if report is not None:
        typer.echo(f"wrote {report}")


def read_rollouts(source: str, named: dict[str, str]) -> dict[str, list[Any]]:
    """Role -> column, for the roles that the table has."""
    from scoredraw.tables import open_table

    unknown = sorted(set(named) - set(ROLES))
    require(not unknown, "columns", ", ".join(unknown), f"roles {', '.join(ROLES)}")
    table = open_table(source)
    data = {}
    for role, names in ROLES.items():
        wanted = [named[role]] if role in named else names
        name = next((n for n in wanted if n in table.column_names), None)
        if role in named:
            table.require_columns(wanted, "columns")
        if name is not None:
            values = table.column(name, "columns").to_pylist()
            data[role] = numbers(values, role) if role in NUMBERS else values
    enough = "proxy" in data or {"true", "confidence"} <= set(data)
    have = ", ".join(table.column_names[:12])
    require(enough, "input", f"columns {have}", "proxy and true, or confidence and true")
    require(all(len(values) > 0 for values in data.values()), "input", "no rows", "some rollouts")
    return data


def audits(
    data: dict[str, list[Any]], margin: float | None, gamma: float, level: float, seed: int
) -> Audits:
    """Every audit whose columns are there."""
    from scoredraw.calibration import reliability
    from scoredraw.rl.calibrated_reward import calibration_report
    from scoredraw.rl.pairwise_rewards import audit_score_gaps
    from scoredraw.rl.proxy_rewards import audit_proxy

    whole = np.array([data[role] for role in NUMBERS if role in data])
    rows = np.flatnonzero(~np.isnan(whole).any(axis=0)).tolist()
    found = Audits(len(rows))
    left = whole.shape[1] - len(rows)
    if left:
        found.notes.append(f"{left} rows without a proxy, a true reward or a confidence left out.")
    some = {role: [values[i] for i in rows] for role, values in data.items()}
    require(bool(rows), "input", "no row with all values", "some rollouts")
    if {"proxy", "true"} <= set(some):
        episodes = some.get("episode", some.get("problem"))
        found.proxy = audit_proxy(
            some["proxy"], some["true"], episodes, times=some.get("time"), gamma=gamma,
            level=level, rng=seed,
        )  # fmt: skip
    if {"proxy", "problem"} <= set(some):
        if margin is None:
            found.notes.append("--margin, the noise of the proxy, brings the audit of score gaps.")
        else:
            _, ids = np.unique([str(p) for p in some["problem"]], return_inverse=True)
            found.gaps = audit_score_gaps(some["proxy"], ids, margin=margin, rng=seed)
    if {"confidence", "true"} <= set(some):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # one class: said by the NaN
            found.calibration = calibration_report(some["true"], some["confidence"])
        found.reliability = reliability(some["confidence"], some["true"])
    return found


def numbers(values: list[Any], role: str) -> list[float]:
    """A column of numbers, NaN where there is none; InputError for anything else."""
    odd = next((v for v in values if not isinstance(v, (int, float, type(None)))), None)
    require(odd is None, "columns", f"{odd!r} in {role}", "numbers, or none")
    return [math.nan if v is None else float(v) for v in values]


def facts(found: Audits) -> dict[str, Any]:
    """The audits as JSON."""
    out: dict[str, Any] = {"rows": found.rows, "notes": found.notes}
    if found.proxy is not None:
        p = found.proxy
        out["proxy"] = {
            "r": p.r, "correlated": p.correlated, "coefficient": p.coefficient, "sigma": p.sigma,
            "episodes": p.episodes, "steps": p.steps,
        }  # fmt: skip
    return {**out, "score_gaps": found.gaps, "calibration": found.calibration}


def page(found: Audits, name: str) -> Page:
    """The audits as a page."""
    answers, tables, figures = [], [], []
    if found.proxy is not None:
        p = found.proxy
        verdict = {
            True: "the proxy correlates with the true reward",
            False: "the proxy points AWAY from the true reward",
            None: "these rollouts do not tell whether the proxy correlates with the true reward",
        }[p.correlated]
        answers.append(f"Over {p.episodes:,} episodes {verdict}: r = {p.r}.")
        rows: list[list[Cell]] = [
            ["correlation r", p.r], ["penalty on sqrt(chi2), lambda", p.coefficient],
            ["deviation of the proxy", p.sigma], ["of the true reward", p.sigma_true],
        ]  # fmt: skip
        tables.append(ReportTable("Proxy against true reward", ["what", "value"], rows))
    if found.gaps is not None:
        g = found.gaps
        answers.append(
            f"Dividing by a group's deviation, {g.illusory} of all |A| comes from the groups (of "
            f"{g.groups:,}) whose scores lie within {g.margin:g} of one another."
        )
        rows = [
            ["median range of a group", g.score_range],
            ["median of max |A| / range", g.amplification],
            ["groups within the margin", g.within_margin], ["share of |A| in those", g.illusory],
            ["mean |A| by score", g.pointwise], ["by rank", g.ranked],
            ["by win rate with the margin", g.win_rate], ["groups silent by win rate", g.silent],
        ]  # fmt: skip
        tables.append(ReportTable("Differences within a group", ["what", "value"], rows))
    if found.calibration is not None:
        c = found.calibration
        answers.append(
            f"Stated confidence averages {c['mean_conf']:.3f} where {c['acc']:.3f} are right "
            f"(Brier {c['brier']:.3f}, ECE {c['ece']:.3f}, AUROC {c['auroc']:.3f})."
        )
        rows = [
            ["Brier score", c["brier"]], ["expected calibration error", c["ece"]],
            ["AUROC", c["auroc"]], ["share that is right", c["acc"]],
            ["mean confidence", c["mean_conf"]],
        ]  # fmt: skip
        tables.append(ReportTable("Stated confidence", ["what", "value"], rows))
        r = found.reliability
        assert r is not None
        x, y = r.confidence.tolist(), r.credit.tolist()
        figures.append(
            Figure("line", "Reliability", "stated confidence", "share that is right",
                   [Series("as stated", x, y), Series("calibrated", [0, 1], [0, 1], baseline=True)])
        )  # fmt: skip
    if not answers:
        answers.append(f"{found.rows:,} rewards; a column true would tell how far to trust them.")
    return Page(
        title="How far to trust a reward", kicker=f"scoredraw audit proxy · {name}",
        answer=" ".join(answers), tables=tables, figures=figures, notes=found.notes,
        provenance={**written_by(kind="proxy"), **stamp()},
    )  # fmt: skip
