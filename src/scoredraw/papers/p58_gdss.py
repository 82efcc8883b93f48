"""Graphs from two coupled diffusions: what the solvers and the coupling are worth.

First on graphs whose scores are known: three nodes with one feature each, three edges, jointly
Gaussian, so that a sample's covariance says what a solver gets wrong, and the covariance between
nodes and edges what is lost without the coupling; then two modes, of which independent diffusions
make four. Then on learned scores: small networks are trained on ego graphs, from several seeds, for
the paper's system and for its ablations, and their graphs are compared with held-out ones by the
MMDs of degrees, clustering and orbits. Random graphs of the same sizes and densities are the
baseline, and as many training graphs are the floor. Intervals are over seeds.

Jo, Lee and Hwang, "Score-based generative modeling of graphs via the system of stochastic
differential equations", ICML 2022, arXiv 2202.02514.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.graph_arrays import quantize_adjacency, to_networkx
from scoredraw.diffusion.graph_networks import GraphScores, Training, load_graph_scores
from scoredraw.diffusion.graph_sampling import sample_graphs
from scoredraw.diffusion.graph_system import GraphMixtureScore, GraphSDESystem, graph_noise
from scoredraw.diffusion.schedules import LinearBeta
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import graph_sets
from scoredraw.papers.graph_sets import METRICS, Compared, GraphSet
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]

WIDE = GraphSDESystem(LinearBeta(0.1, 20.0), LinearBeta(0.1, 20.0))
PAPER = GraphSDESystem()
CROSS, VARIANCE = 0.2, 0.5  # between a node and its edge; of either
MEAN = np.array([0.5] * 3 + [-0.3] * 3)
TOLERANCE = 0.08

S4, RELEASED, EULER, REVERSE = "S4", "S4, released spread", "Euler", "Reverse"
SPLIT_ALONE: dict[str, dict[str, Any]] = {
    S4: {"corrector": None},
    RELEASED: {"corrector": None, "transition": "code"},
    EULER: {"method": "pc", "corrector": None},
    REVERSE: {"method": "pc", "predictor": "reverse", "corrector": None},
}
LANGEVIN = {"snr": 0.05, "scale_eps": 1.0}
SHARPENING = {"snr": 0.15, "scale_eps": 0.7}
CORRECTED: dict[str, dict[str, Any]] = {
    f"{S4} + Langevin": LANGEVIN,
    f"{EULER} + Langevin": {"method": "pc", **LANGEVIN},
    f"{REVERSE} + Langevin": {"method": "pc", "predictor": "reverse", **LANGEVIN},
}
AT_SETTINGS: dict[str, dict[str, Any]] = {
    f"{S4}, snr 0.15, η 0.7": SHARPENING,
    f"{EULER}, snr 0.15, η 0.7": {"method": "pc", **SHARPENING},
}
NAMES = {
    "joint": "both at once",
    "adjacency": "edges only",
    "sequential": "nodes, then edges",
    "independent": "independent",
}
SOLVED: dict[str, dict[str, Any]] = {"S4": {}, "PC": {"method": "pc"}}
SETTINGS = {"snr": 0.05, "scale_eps": 0.7}  # the paper's for these sets
PUBLISHED = {
    "community": ("EDP-GNN 0.053, 0.144, 0.026; GDSS 0.045, 0.086, 0.007"),
    "ego": ("EDP-GNN 0.052, 0.093, 0.007; GDSS 0.021, 0.024, 0.007"),
}
PICTURED = 8
NOTES = [
    (
        "The paper's MMDs are quoted as remembered; they were not read again. Its networks are "
        "larger and were trained for 5000 epochs; QM9, ZINC250k, ENZYMES and grids are not run."
    ),
    (
        "The corrector at η = 0.7 is no Langevin dynamics: it takes a third to a half off every "
        "variance of Gaussian data. It sharpens, which helps where edges are cut at a threshold."
    ),
    (
        "With betas from 0.1 to 1 the process keeps 0.76 of the signal at t = 1: N(0, I) is not "
        "where its reversal starts."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    samples: int = 4000  # of the Gaussian
    steps: int = 200
    halvings: tuple[int, ...] = (25, 50, 100, 200)
    repeats: int = 4
    seeds: int = 3  # networks of a kind
    families: tuple[str, ...] = ("ego",)
    couplings: tuple[str, ...] = ("joint", "adjacency", "sequential", "independent")
    epochs: int = 160
    batch: int = 32
    small: bool = True
    evaluations: int = 200  # NFE of learned scores
    draws: int = 6  # sets of graphs from the shipped networks


PLANS = {
    "smoke": Plan(
        40, 22, (22,), repeats=2, seeds=2, couplings=("joint",), epochs=1, batch=160,
        evaluations=4, draws=2,
    ),
    "quick": Plan(
        3000, 100, (25, 50), repeats=3, couplings=("joint",), epochs=120, evaluations=100,
        draws=3,
    ),
    "full": Plan(),
    "study": Plan(
        20_000, 400, (25, 50, 100, 200, 400), repeats=10, seeds=5, families=graph_sets.FAMILIES,
        epochs=5000, batch=128, small=False, evaluations=1000, draws=20,
    ),
}  # fmt: skip


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Sample, compare, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=58, scale=scale, seed=rng, notes=list(NOTES))
    with one_thread(), torch.no_grad():
        add_gaussian(report, plan, rng)
        add_modes(report, plan, rng)
        add_shipped(report, plan, rng)
    with one_thread():
        for family in plan.families:
            add_family(report, plan, family, rng)
    return replace(report, seconds=time.perf_counter() - started)


# ── known scores ────────────────────────────────────────────────────────────────────────────────


def gaussian(system: GraphSDESystem) -> GraphMixtureScore:
    """Three nodes with one feature, three edges; node i and edge i have covariance CROSS."""
    tie = CROSS * np.kron(1 - np.eye(2), np.eye(3))
    return GraphMixtureScore([1.0], [MEAN], [VARIANCE * np.eye(6) + tie], system, 3, 1)


def drawn_moments(
    plan: Plan,
    rng: Sequence[int],
    system: GraphSDESystem,
    *,
    apart: bool = False,
    noised: bool = False,
    **options: Any,
) -> Float:
    """Of one set of sampled graphs: error of the covariance, variance, cross-covariance, mean.

    The error is relative, in the Frobenius norm; variance, cross-covariance and mean are shares of
    the true ones. apart: with independent scores. noised: started from noised data.
    """
    exact = gaussian(system)
    used = exact.independent() if apart else exact
    seed = np.random.default_rng([*rng, 58])
    random = torch.Generator().manual_seed(int(seed.integers(2**62)))
    flags, start = torch.ones(plan.samples, 3, dtype=torch.float64), None
    if noised:
        start = system.perturb(
            *exact.sample(plan.samples, seed), 1.0, graph_noise(flags, 1, random)
        )
    settings = {"n_steps": plan.steps, **options}
    found = sample_graphs(
        used.score_x, used.score_adj, flags, 1, system, start=start, generator=random, **settings
    )
    return moments(exact, exact.flatten(found.x, found.adj).numpy())


def add_gaussian(report: Report, plan: Plan, rng: int) -> None:
    cases: dict[str, dict[str, Any]] = {
        **{name: {"system": WIDE, **options} for name, options in SPLIT_ALONE.items()},
        **{name: {"system": WIDE, **options} for name, options in CORRECTED.items()},
        **{name: {"system": WIDE, **options} for name, options in AT_SETTINGS.items()},
        "independent": {"system": WIDE, "apart": True, "corrector": None},
        "β 0.1 to 1, from N(0, I)": {"system": PAPER, "corrector": None},
        "β 0.1 to 1, from noised data": {"system": PAPER, "corrector": None, "noised": True},
    }
    found = {name: repeated(plan, rng, **options) for name, options in cases.items()}
    exact, seeds = gaussian(WIDE), range(plan.repeats)
    draws = [exact.flatten(*exact.sample(plan.samples, np.random.default_rng([rng, r, 59])))
             for r in seeds]  # fmt: skip
    exact_draws = np.stack([moments(exact, v.numpy()) for v in draws])
    report.claims.extend(gaussian_claims(found))
    rows: list[list[Cell]] = [
        [name, *map(mean_interval, values.T)]
        for name, values in {"exact draws": exact_draws, **found}.items()
    ]
    title = f"A joint Gaussian, {plan.samples} graphs, {plan.steps} steps (β 0.1 to 20)"
    columns = ["solver", "covariance, relative error", "variance", "node × edge", "mean"]
    note = "Variance, node × edge covariance and mean as shares of the true ones."
    report.tables.append(ReportTable(title, columns, rows, note))
    report.figures.append(step_figure(plan, rng))


def repeated(plan: Plan, rng: int, **options: Any) -> Float:
    """`drawn_moments` of every repeat: (repeats, 4). All solvers share the seeds."""
    return np.stack([drawn_moments(plan, [rng, r], **options) for r in range(plan.repeats)])


def moments(exact: GraphMixtureScore, v: Float) -> Float:
    """Error of the covariance, variance, cross-covariance and mean of vectors (B, 6)."""
    covariance, true = np.cov(v.T), exact.covariances[0].numpy()
    return np.array([
        np.linalg.norm(covariance - true) / np.linalg.norm(true),
        np.diag(covariance).mean() / VARIANCE, np.diag(covariance[:3, 3:]).mean() / CROSS,
        (v.mean(0) / MEAN).mean(),
    ])  # fmt: skip


def gaussian_claims(found: dict[str, Float]) -> list[Claim]:
    """What the solvers are said to do, on data for which it can be checked."""
    reverses = "the reverse of the system generates the data, X and A and what ties them"
    claims = [
        Claim.at_most(
            f"{name}: relative error of the covariance", reverses,
            mean_interval(found[name][:, 0]), TOLERANCE,
        )
        for name in (*SPLIT_ALONE, *CORRECTED)
    ]  # fmt: skip
    bounds = 1 - TOLERANCE, 1 + TOLERANCE
    cross = "the partial scores of the joint density carry what ties nodes to edges"
    claims += [
        Claim.within(
            f"{S4}: node × edge covariance kept", cross, mean_interval(found[S4][:, 2]), *bounds
        ),
        Claim.within(
            "independent: node × edge covariance kept",
            "without the coupling it is lost", mean_interval(found["independent"][:, 2]),
            -TOLERANCE, TOLERANCE,
        ),
    ]  # fmt: skip
    says = "Langevin steps at snr 0.15 and scale 0.7 correct the predictor (S4's settings)"
    claims += [
        Claim.within(f"{name}: variance kept", says, mean_interval(found[name][:, 1]), *bounds)
        for name in AT_SETTINGS
    ]
    for name in ("β 0.1 to 1, from N(0, I)", "β 0.1 to 1, from noised data"):
        says = "sampling starts from N(0, I)" if "N(0" in name else "the reversal of its own p_1"
        variance = mean_interval(found[name][:, 1])
        claims.append(Claim.within(f"{name}: variance", says, variance, *bounds))
    return claims


def step_figure(plan: Plan, rng: int) -> Figure:
    """Variance against the number of steps, without a corrector."""
    series = []
    for name, options in SPLIT_ALONE.items():
        points = [
            mean_interval(repeated(plan, rng, system=WIDE, **options, n_steps=n)[:, 1])
            for n in plan.halvings
        ]
        series.append(line(name, list(plan.halvings), points))
    return Figure(
        "line", "How few steps a solver needs", "steps (β 0.1 to 20, no corrector)",
        "variance, as a share of the true one", series, log_x=True, reference=1.0,
        caption="The released spread of S4's linear move is the forward one: too small.",
    )  # fmt: skip


def line(name: str, x: list[Any], points: list[Estimate], *, baseline: bool = False) -> Series:
    columns = ([p.value for p in points], [p.low for p in points], [p.high for p in points])
    return Series(name, x, *columns, baseline=baseline)


def add_modes(report: Report, plan: Plan, rng: int) -> None:
    """Two modes at ±0.5, correlation 0.9 within; how many samples lie where there is no mode."""
    S = 0.01 * (0.9 + 0.1 * np.eye(3))
    two = GraphMixtureScore([0.5, 0.5], [[0.5] * 3, [-0.5] * 3], [S, S], WIDE, 2, 1)
    flags = torch.ones(plan.samples // 4, 2, dtype=torch.float64)
    spurious: dict[str, list[float]] = {"joint": [], "independent": []}
    for r in range(plan.repeats):
        for name, exact in (("joint", two), ("independent", two.independent())):
            found = sample_graphs(
                exact.score_x, exact.score_adj, flags, 1, WIDE, n_steps=plan.steps, corrector=None,
                generator=torch.Generator().manual_seed(1000 * rng + r),
            )  # fmt: skip
            wrong = found.x[:, 0, 0] * found.adj[:, 0, 1] < 0
            spurious[name].append(float(wrong.double().mean()))
    says = "the system keeps the two modes; a product of marginals has four"
    share = {name: mean_interval(values) for name, values in spurious.items()}
    report.claims.extend([
        Claim.at_most("two modes, joint: share in spurious ones", says, share["joint"], 0.01),
        Claim.within("two modes, independent: share there", says, share["independent"], 0.4, 0.6),
    ])  # fmt: skip


# ── learned scores ──────────────────────────────────────────────────────────────────────────────


COLUMNS = ["graphs", *METRICS, "share isomorphic to training graphs"]


def add_shipped(report: Report, plan: Plan, rng: int) -> None:
    """The networks of this package on communities drawn by their own rule."""
    graphs = graph_sets.community_graphs(100, rng=10_000 + rng)
    compared = Compared(GraphSet("community", graphs[20:], graphs[:20], False), rng)
    scores = load_graph_scores()
    sets, seconds = generated(scores, compared, plan, range(rng, rng + plan.draws))
    rows = compared.rows()
    for name, drawn in sets.items():
        values = np.array([compared.distances(graphs) for graphs in drawn])
        rows.append([name, *map(mean_interval, values.T), compared.known(drawn)])
    says = f"community-small, after 5000 epochs: {PUBLISHED['community']}"
    report.claims.extend(random_claims("shipped networks, communities", says, compared, sets["S4"]))
    report.claims.append(time_claim(seconds))
    title = f"Communities by the shipped networks: MMD² to 20 others, NFE {plan.evaluations}"
    report.tables.append(ReportTable(title, COLUMNS, rows))
    pictures = [
        Picture(name, graph_sets.graph_strip(drawn[:PICTURED]))
        for name, drawn in (
            ("held out", compared.data.test), ("the shipped networks", sets["S4"][0]),
            ("random graphs", compared.random_sets[0]),
        )
    ]  # fmt: skip
    caption = "Each strip is the first of its set, none chosen."
    report.figures.append(Figure("pictures", "Communities", caption=caption, pictures=pictures))


def generated(
    scores: GraphScores, compared: Compared, plan: Plan, seeds: Sequence[int]
) -> tuple[dict[str, list[list[Any]]], dict[str, list[float]]]:
    """Sets of as many graphs as are held out, by S4 and by PC with the same NFE; CPU seconds
    a step."""
    sets: dict[str, list[list[Any]]] = {name: [] for name in SOLVED}
    seconds: dict[str, list[float]] = {name: [] for name in SOLVED}
    for seed in seeds:
        for name, options in SOLVED.items():
            steps = plan.evaluations // (1 if name == "S4" else 2)
            started = time.process_time()
            sets[name].append(drawn_graphs(scores, compared, seed, n_steps=steps, **options))
            seconds[name].append((time.process_time() - started) / steps)
    return sets, seconds


def drawn_graphs(scores: GraphScores, compared: Compared, seed: int, **options: Any) -> list[Any]:
    """As many graphs as are held out, of sizes drawn from the training graphs'."""
    random = torch.Generator().manual_seed(seed)
    sizes = [len(graph) for graph in compared.data.train]
    rows = torch.randint(len(sizes), (len(compared.data.test),), generator=random)
    found = scores.sample([sizes[i] for i in rows.tolist()], random, **SETTINGS, **options)
    return to_networkx(quantize_adjacency(found.adj))


def random_claims(
    what: str, says: str, compared: Compared, sets: Sequence[Sequence[Any]]
) -> list[Claim]:
    """Nearer to the held-out graphs than random graphs are, metric by metric."""
    shares = compared.relative(np.array([compared.distances(graphs) for graphs in sets]))
    return [
        Claim.at_most(
            f"{what}: {metric} MMD² as a share of random graphs'", says, mean_interval(column), 1.0
        )
        for metric, column in zip(METRICS, shares.T, strict=True)
    ]


def time_claim(seconds: dict[str, list[float]]) -> Claim:
    share = mean_interval(np.array(seconds["S4"]) / np.array(seconds["PC"]))
    says = "S4 takes about half the time of predictor-corrector sampling with as many steps"
    return Claim.at_most("CPU seconds a step, S4 as a share of PC", says, share, 0.65)


def add_family(report: Report, plan: Plan, family: str, rng: int) -> None:
    """Train on a set, from several seeds, with every coupling, and compare."""
    compared = Compared(graph_sets.graph_set(family, rng), rng)
    decay = 0.1 ** (1 / plan.epochs) if plan.small else 0.999  # to a tenth of the rate
    training = Training(epochs=plan.epochs, batch=plan.batch, decay=decay)
    sets: dict[str, list[list[Any]]] = {}
    for coupling in plan.couplings:
        for seed in range(rng, rng + plan.seeds):
            scores = graph_sets.learn(
                compared.data, training, seed, coupling=coupling, small=plan.small
            )
            for name, drawn in family_sets(scores, compared, plan, seed).items():
                sets.setdefault(f"{NAMES[coupling]}{name}", []).append(drawn)
    values = {
        name: np.array([compared.distances(graphs) for graphs in drawn])
        for name, drawn in sets.items()
    }
    says = f"{family}-small: {PUBLISHED[family]}"
    joint = NAMES["joint"]
    report.claims.extend(random_claims(f"{family}, {joint}", says, compared, sets[joint]))
    report.claims.extend(coupling_claims(family, compared, values))
    report.claims.append(solver_claim(family, compared, values))
    report.tables.append(family_table(plan, compared, sets, values))
    report.figures.append(family_figure(family, compared, values))


def family_sets(
    scores: GraphScores, compared: Compared, plan: Plan, seed: int
) -> dict[str, list[Any]]:
    """By S4; for the joint system also by predictor-corrector, as many evaluations."""
    steps = plan.evaluations // (2 if scores.coupling == "sequential" else 1)
    found = {"": drawn_graphs(scores, compared, seed, n_steps=steps)}
    if scores.coupling == "joint":
        found[", PC"] = drawn_graphs(
            scores, compared, seed, n_steps=plan.evaluations // 2, method="pc"
        )
    return found


def coupling_claims(family: str, compared: Compared, values: dict[str, Float]) -> list[Claim]:
    """The joint system against each ablation: better on at least one metric."""
    joint, claims = values[NAMES["joint"]], []
    for coupling in ("adjacency", "sequential", "independent"):
        if NAMES[coupling] not in values:
            continue
        other = compared.relative(values[NAMES[coupling]])
        gains = [
            paired_difference(a, b, comparisons=len(METRICS))
            for a, b in zip(other.T, compared.relative(joint).T, strict=True)
        ]
        best = max(gains, key=lambda gain: gain.low)
        holds = True if best.above(0) else False if all(g.below(0) for g in gains) else None
        says = "the coupled system beats its ablations (EDP-GNN; GDSS-seq)"
        name = f"{family}, {NAMES[coupling]}: MMD² beyond the coupled system's"
        rule = "above 0 on some metric, as a share of random graphs'; shown: the surest metric"
        claims.append(Claim.judge(name, says, best, rule, holds))
    return claims


def solver_claim(family: str, compared: Compared, values: dict[str, Float]) -> Claim:
    joint = NAMES["joint"]
    split, pc = (compared.relative(values[f"{joint}{name}"]).mean(1) for name in ("", ", PC"))
    says = "S4 is as good as predictor-corrector sampling"
    rule = "at most a tenth of random graphs' MMD² worse, over the three metrics, same NFE"
    worse = paired_difference(split, pc)
    return Claim.at_most(f"{family}: MMD² of S4 less that of PC", says, worse, 0.1, rule)


def family_table(
    plan: Plan, compared: Compared, sets: dict[str, list[list[Any]]], values: dict[str, Float]
) -> ReportTable:
    data = compared.data
    rows = compared.rows()
    for name, found in values.items():
        rows.append([name, *map(mean_interval, found.T), compared.known(sets[name])])
    source = "The paper's graphs" if data.real else "Graphs made here"
    title = (
        f"{data.name}: MMD² to {len(data.test)} held-out graphs, {plan.seeds} networks each, "
        f"{plan.epochs} epochs, NFE {plan.evaluations}"
    )
    copies = graph_sets.share_known(data.test, data.train)
    note = (
        f"{source.capitalize()}; {copies:.0%} of the held-out ones are isomorphic to training ones."
    )
    return ReportTable(title, COLUMNS, rows, note)


def family_figure(family: str, compared: Compared, values: dict[str, Float]) -> Figure:
    names = list(METRICS)
    series = [
        line(name, names, [mean_interval(column) for column in compared.relative(found).T])
        for name, found in values.items()
    ]
    floor = compared.relative(compared.floor)
    series.append(Series("training graphs", names, floor.tolist(), baseline=True))
    return Figure(
        "bar", f"{family.capitalize()} graphs", "", "MMD² as a share of random graphs'", series,
        reference=1.0,
    )  # fmt: skip
