"""Feynman-Kac correctors: do weighted particles sample annealed, guided, mixed and tilted targets?

Every model's score is exact (Gaussian mixtures) but that of the 13 Lennard-Jones particles, which
a small network learns at temperature 2. Arms of a seed share first states, steps and model calls:
"plain" is the mixed score without weights, "importance" weighs its end points, "FKC" resamples on
the way. A Gaussian whose answers are closed forms; a mixture on a line; four targets in a plane of
iris measurements; digits tilted by a classifier; at full scale forty components and the particles.

Skreta, Akhound-Sadegh, Ohanesian, Bondesan, Aspuru-Guzik, Doucet, Brekelmans, Tong and Neklyudov,
"Feynman-Kac correctors in diffusion", ICML 2025, arXiv 2503.02819.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax

from scoredraw.diffusion.feynman_kac import Target, ramp
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.guidance_bias import uncorrected_gaussian
from scoredraw.diffusion.schedules import LinearBeta, NoiseSchedule, VarianceExploding
from scoredraw.diffusion.weighted_sampling import WeightedSample, WeightedSampler
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers.digit_diffusion import fitted_mixture, picture_strip, ratio
from scoredraw.papers.training import digits_split
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]
Arms = dict[str, dict[str, Float]]  # arm -> measure -> (seeds,)

VE = VarianceExploding(0.01, 10.0, time="geometric")
PLAIN, SNIS, FKC = "plain", "importance", "FKC"
BETA, LEFT, MEAN = 3.0, 0.35064, 0.2468  # of the mixture on a line
SAYS = "better with FKC than without; the paper's figures were not read"
NOTES = [
    (
        "The paper's docking scores, ImageNet-512 and text-to-image models need networks that are "
        "not here. Exact scores stand in for them, so that all error is the sampler's."
    ),
    (
        "The weights are right for any noise scale ζ; what N particles make of them is not. Their "
        "tails are heavy: they are quadratic in x, and with tempered noise or ζ = 1 the error "
        "falls far more slowly than N^-1/2. ζ = 2 is an extension of ours with the same weights."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much a scale runs; the numbers are particles and steps."""

    seeds: int
    gaussian: Mapping[float, tuple[int, int]]  # ζ² -> (N, T)
    line: tuple[int, int, int]
    iris: tuple[int, int]
    digits: tuple[int, int]
    forty: tuple[int, int] | None = None
    particles: tuple[int, int, int, int] | None = None  # seeds, training steps, N, T
    colder: tuple[str, ...] = ("T1p5",)  # to which the particles are annealed


PLANS = {
    "smoke": Plan(2, {1 / 3: (50, 80), 4.0: (50, 80)}, (60, 20, 60), (60, 20), (20, 8)),
    "quick": Plan(
        4, {1 / 3: (2000, 500), 1.0: (2000, 500), 4.0: (4000, 1000)},
        (2000, 300, 1000), (4000, 200), (300, 80),
    ),
    "full": Plan(
        5, {1 / 3: (8000, 500), 1.0: (8000, 500), 4.0: (4000, 2000), 10.0: (4000, 2000)},
        (5000, 500, 1500), (8000, 400), (400, 120), (1500, 300), (3, 800, 200, 120),
    ),
    "study": Plan(
        24, {1 / 3: (100_000, 500), 1.0: (100_000, 500), 4.0: (20_000, 4000),
             10.0: (10_000, 8000)},
        (20_000, 500, 4000), (10_000, 500), (2000, 500), (10_000, 1000), (5, 40_000, 2000, 1000),
        ("T1p5", "T0p8"),
    ),
}  # fmt: skip


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Sample every target in every way, measure, and judge."""
    plan = PLANS[scale]
    report = Report(paper=24, scale=scale, seed=rng, title="Feynman-Kac correctors in diffusion")
    with warnings.catch_warnings():  # importance sampling collapses, which is measured
        warnings.simplefilter("ignore", RuntimeWarning)
        add_gaussian(report, plan, rng)
        add_line(report, plan, rng)
        add_iris(report, plan, rng)
        add_digits(report, plan, rng)
        if plan.forty is not None:
            add_forty(report, plan, plan.forty, rng)
        if plan.particles is not None:
            add_particles(report, plan.particles, plan.colder, rng)
    report.notes.extend(NOTES)
    return report


def sampled(
    schedule: NoiseSchedule, target: Target, models: Any, n: int, steps: int, key: list[int],
    dimension: int = 1, **how: Any,
) -> WeightedSample:  # fmt: skip
    """A run from first states that depend on the key alone."""
    sampler = WeightedSampler(schedule, target, steps, **how)
    x = sampler.draw_prior((n, dimension), np.random.default_rng(key))
    return sampler.sample(models, x, np.random.default_rng([*key, 1]))


def collect(rows: list[dict[str, dict[str, float]]]) -> Arms:
    """Of one dictionary a seed: arm -> measure -> (seeds,)."""
    return {
        arm: {m: np.array([row[arm][m] for row in rows]) for m in rows[0][arm]} for arm in rows[0]
    }


def table(title: str, arms: Arms, note: str = "") -> ReportTable:
    measures = list(next(iter(arms.values())))
    rows: list[list[Cell]] = [
        [arm, *(mean_interval(found[m]) if m in found else None for m in measures)]
        for arm, found in arms.items()
    ]
    return ReportTable(title, ["arm", *measures], rows, note)


# ── a Gaussian ──────────────────────────────────────────────────────────────────────────────────


def add_gaussian(report: Report, plan: Plan, rng: int) -> None:
    """N(0, 1) to the power 3: variance 1/3 and log Z in closed form, without weights as well."""
    data = GaussianMixtureScore([1.0], [[0.0]], [[[1.0]]], VE)
    ends = [1 + float(VE.sigma(t)) ** 2 for t in (VE.ends.t_end, VE.ends.t_start)]
    exact, log_z = ends[0] / BETA, (1 - BETA) / 2 * float(np.log(ends[0] / ends[1]))
    rows: list[list[Cell]] = []
    plain, fkc, log_zs, biased = {}, {}, {}, {}
    for square, (n, steps) in plan.gaussian.items():
        target, zeta = Target.anneal(BETA).with_noise(square**0.5), square**0.5
        keys = [[rng, 24, 1, seed] for seed in range(plan.seeds)]
        bare = [sampled(VE, target, data.eps, n, steps, k, resampler=None) for k in keys]
        runs = [sampled(VE, target, data.eps, n, steps, k, ess_threshold=0.5) for k in keys]
        biased[square] = uncorrected_gaussian([BETA], [0.0], [1.0], zeta, 10.0, 0.01)[1]
        plain[square] = np.array([one.x.var() for one in bare])
        fkc[square] = np.array([spread(one) for one in runs])
        log_zs[square] = np.array([one.log_z for one in runs])
        rows.append([square, n, steps, mean_interval(plain[square]), biased[square],
                     mean_interval(fkc[square]), exact, mean_interval(log_zs[square]), log_z,
                     float(np.mean([one.ess[-1] for one in bare]))])  # fmt: skip
    columns = ["ζ²", "N", "T", "plain variance", "its closed form", "FKC variance", "exact",
               "FKC log Z", "exact log Z", "ESS without resampling"]  # fmt: skip
    report.tables.append(ReportTable("N(0, 1) annealed at β = 3", columns, rows))
    gaps = [abs(float(plain[square].mean()) / biased[square] - 1) for square in plain]
    says = "the weighted SDE samples q^β, with any noise of the family"
    report.claims.extend([
        Claim.at_most("Gaussian: plain variance off its closed form, worst ζ",
                      "mixed scores alone do not sample the target", max(gaps), 0.05),
        Claim.within("Gaussian, ζ² = 4: FKC's variance over the exact one", says,
                     mean_interval(fkc[4.0] / exact), 0.95, 1.05),
        Claim.within("Gaussian, ζ² = 4: FKC's log Z minus the exact one", "weights give log Z",
                     mean_interval(log_zs[4.0] - log_z), -0.25, 0.25),
        Claim.within("Gaussian, tempered noise: FKC's variance over the exact one", says,
                     mean_interval(fkc[1 / 3] / exact), 0.9, 1.1),
    ])  # fmt: skip
    x = list(plan.gaussian)
    series = [
        Series("plain, closed form", x, list(biased.values()), baseline=True),
        Series("plain", x, [float(plain[square].mean()) for square in x]),
        Series("FKC", x, [float(fkc[square].mean()) for square in x]),
    ]
    title = "Annealing N(0, 1) at β = 3: variance by noise"
    report.figures.append(Figure("line", title, "ζ²", "variance", series, log_x=True,
                                 reference=exact, caption="The line is exact."))  # fmt: skip


def spread(found: WeightedSample) -> float:
    mean = float(found.estimate(found.x)[0])
    return float(found.estimate((found.x - mean) ** 2)[0])


# ── a mixture on a line ─────────────────────────────────────────────────────────────────────────

LINE: dict[str, tuple[str | float, dict[str, Any]]] = {  # noise or ζ, options
    PLAIN: ("target", {"resampler": None}),
    "plain, tempered": ("tempered", {"resampler": None}),
    SNIS: ("tempered", {"resampler": None}),
    "FKC, systematic": ("target", {}),
    "FKC, tempered": ("tempered", {}),
    "FKC, below half the ESS": ("target", {"ess_threshold": 0.5}),
    "FKC, multinomial": ("target", {"resampler": "multinomial", "ess_threshold": 0.5}),
    "FKC, birth-death": ("target", {"resampler": "birth_death"}),
    "FKC, birth-death, accumulated": (
        "target", {"resampler": "birth_death", "births": "accumulated"}),
    "FKC, ζ² = 4": (2.0, {"ess_threshold": 0.5}),
}  # fmt: skip


def add_line(report: Report, plan: Plan, rng: int) -> None:
    """0.6 N(-3, 1) + 0.4 N(2, .16) to the power 3: the mass of the left mode."""
    data = GaussianMixtureScore([0.6, 0.4], [[-3.0], [2.0]], [[[1.0]], [[0.16]]], VE)
    n, steps, fine = plan.line
    rows = []
    for seed in range(plan.seeds):
        row = {}
        for arm, (noise, how) in LINE.items():
            loud = isinstance(noise, float)
            target = Target.anneal(BETA).with_noise(noise) if isinstance(noise, float) else (
                Target.anneal(BETA, noise))  # fmt: skip
            one = sampled(VE, target, data.eps, n, fine if loud else steps, [rng, 24, 2, seed],
                          **how)  # fmt: skip
            weighed = not arm.startswith(PLAIN)
            x = one.x[:, 0]
            mean = one.estimate if weighed else lambda v: float(np.mean(v))
            left = float(mean((x < 0) * 1.0))
            row[arm] = {"mass left": left, "mean": float(mean(x)), "gap": abs(left - LEFT),
                        "last ESS": float(one.ess[-1])}  # fmt: skip
        rows.append(row)
    arms = collect(rows)
    title = "A mixture on a line at β = 3: exact mass left 0.351, mean 0.247"
    report.tables.append(table(title, arms, f"N = {n}, T = {steps}, {fine} with ζ² = 4"))
    for arm in ("FKC, systematic", "FKC, tempered", "FKC, birth-death", "FKC, ζ² = 4"):
        base = arms["plain, tempered" if arm == "FKC, tempered" else PLAIN]["gap"]
        gain = paired_difference(base, arms[arm]["gap"], comparisons=4)
        report.claims.append(Claim.at_least(f"line: {arm} is nearer the exact mass than plain",
                                            SAYS, gain, 0.0))  # fmt: skip
    best = mean_interval(arms["FKC, ζ² = 4"]["mass left"])
    report.claims.append(Claim.within("line, ζ² = 4: mass of the left mode",
                                      "0.351, exact", best, LEFT - 0.06, LEFT + 0.06))  # fmt: skip
    values = [mean_interval(found["mass left"]) for found in arms.values()]
    report.figures.append(Figure(
        "interval", "Mass of the left mode", series=[Series(
            "seeds", list(arms), [v.value for v in values], [v.low for v in values],
            [v.high for v in values])], reference=LEFT, caption="The line is exact."))  # fmt: skip


# ── four targets in a plane ─────────────────────────────────────────────────────────────────────

BINS, FINER = 40, 8
PLANE = {
    "guidance 2": Target.guidance(2.0),
    "product": Target.product(1.0, 1.0),
    "guidance 2, annealed 1.5": Target.guidance(2.0).raised(1.5),
    "weighted product": Target.product(1.5, 0.75),
}


@cache
def iris_experts() -> tuple[tuple[GaussianMixtureScore, ...], Float]:
    """Three Gaussians on all flowers, one on a species, in two principal components; the range."""
    from sklearn.datasets import load_iris
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    data, species = load_iris(return_X_y=True)
    z = PCA(2).fit_transform(data)
    fits = [
        GaussianMixture(k, covariance_type="full", reg_covar=1e-2, random_state=0).fit(rows)
        for k, rows in ((3, z), (1, z[species == 1]))
    ]
    models = tuple(GaussianMixtureScore.from_sklearn(fit, VE) for fit in fits)
    return models, np.array([z.min(axis=0) - 1.5, z.max(axis=0) + 1.5]).T


def cells(x: Float, weights: Float, limits: Float, bins: int = BINS) -> Float:
    """Mass of the bins x bins cells, and last what lies outside."""
    inside = np.histogramdd(x, bins, list(map(tuple, limits)), weights=weights)[0].ravel()
    return np.append(inside, weights.sum() - inside.sum())


@cache
def plane_target(name: str) -> tuple[Float, Float, Float]:
    """Its mass in every cell, and the points of a finer grid with theirs."""
    models, limits = iris_experts()
    fine = [low + (np.arange(BINS * FINER) + 0.5) * (high - low) / (BINS * FINER)
            for low, high in limits]  # fmt: skip
    points = np.stack(np.meshgrid(*fine, indexing="ij"), axis=-1).reshape(-1, 2)
    powers = PLANE[name].powers_at(0.0)
    log = sum(b * q.log_density(points, 0.0) for b, q in zip(powers, models, strict=True))
    mass = softmax(log)
    return cells(points, mass, limits), points, mass


def add_iris(report: Report, plan: Plan, rng: int) -> None:
    n, steps = plan.iris
    models, limits = iris_experts()
    eps = [model.eps for model in models]
    rows: list[list[Cell]] = []
    for k, (name, target) in enumerate(PLANE.items()):
        exact, points, mass = plane_target(name)
        found = []
        for seed in range(plan.seeds):
            key = [rng, 24, 3, k, seed]
            bare = sampled(VE, target, eps, n, steps, key, 2, resampler=None)
            one = sampled(VE, target, eps, n, steps, key, 2, ess_threshold=0.5)
            counts = np.random.default_rng([*key, 2]).multinomial(n, mass)
            even = np.full(n, 1 / n)
            laws = {
                PLAIN: (bare.x, even), SNIS: (bare.x, softmax(bare.log_weights)),
                FKC: (one.x, softmax(one.log_weights)), "exact draws": (points, counts / n),
            }  # fmt: skip
            found.append({arm: {"TV": 0.5 * float(np.abs(cells(*law, limits) - exact).sum())}
                          for arm, law in laws.items()})  # fmt: skip
        arms = collect(found)
        rows.append([name, *(mean_interval(arm["TV"]) for arm in arms.values())])
        gain = ratio(arms[FKC]["TV"], arms[PLAIN]["TV"], len(PLANE))
        report.claims.append(Claim.at_most(f"iris, {name}: FKC's TV over plain's", SAYS, gain, 0.7))
    columns = ["target", PLAIN, SNIS, FKC, "exact draws"]
    note = f"N = {n}, T = {steps}; 40 x 40 cells and one for what lies outside"
    report.tables.append(ReportTable("Iris in a plane: total variation", columns, rows, note))


# ── digits and a classifier ─────────────────────────────────────────────────────────────────────

WANTED, STRENGTH, REFERENCE = 8, 2.0, 100_000
DIGITS = LinearBeta()


@cache
def classifier() -> tuple[Float, Float]:
    """Weights (10, 64) and biases of a multinomial logistic regression of digits in [-1, 1]."""
    from sklearn.linear_model import LogisticRegression

    split = digits_split()
    fit = LogisticRegression(C=0.01, max_iter=500).fit(2.0 * split.train_x - 1, split.train_y)
    return np.asarray(fit.coef_, np.float64), np.asarray(fit.intercept_, np.float64)


def reward(x: Any, t: float) -> Any:
    """log P(an 8 | x), (n,)."""
    W, bias = classifier()
    return log_softmax(x @ W.T + bias, axis=1)[:, WANTED]


def reward_gradient(x: Any, t: float) -> Any:
    W, bias = classifier()
    return W[WANTED] - softmax(x @ W.T + bias, axis=1) @ W


def tilted(gradient: Callable[..., Any] | None, b: Any) -> Target:
    return Target.anneal(1.0).tilted(reward, gradient, b)


def add_digits(report: Report, plan: Plan, rng: int) -> None:
    """Digits exp(2 log P(8 | x)): energy distance to, and mean reward of, exact draws."""
    n, steps = plan.digits
    data = GaussianMixtureScore.from_sklearn(fitted_mixture(), DIGITS)
    draw = np.random.default_rng([rng, 24, 4])
    pool = data.sample(REFERENCE if plan.seeds > 2 else 2000, draw)
    weights = softmax(STRENGTH * reward(pool, 0.0))
    exact = pool[np.searchsorted(np.cumsum(weights), draw.random(min(4 * n, 2000))).clip(
        max=len(pool) - 1)]  # fmt: skip
    goal = float(weights @ reward(pool, 0.0))
    b = ramp(DIGITS, STRENGTH, power=2.0)
    ways: dict[str, tuple[Target, dict[str, Any]]] = {
        "no reward": (tilted(None, 0.0), {"resampler": None}),
        SNIS: (tilted(None, b), {"resampler": None}),
        PLAIN: (tilted(reward_gradient, b), {"resampler": None}),
        "importance with gradient": (tilted(reward_gradient, b), {"resampler": None}),
        "FKC without gradient": (tilted(None, b), {"ess_threshold": 0.5}),
        FKC: (tilted(reward_gradient, b), {"ess_threshold": 0.5}),
        "FKC, birth-death": (tilted(reward_gradient, b), {"resampler": "birth_death"}),
    }
    found: list[dict[str, dict[str, float]]] = []
    shown: dict[str, Float] = {}
    for seed in range(plan.seeds):
        row = {}
        for arm, (target, how) in ways.items():
            one = sampled(DIGITS, target, data.eps, n, steps, [rng, 24, 5, seed], 64, **how)
            p = np.full(n, 1 / n) if arm in ("no reward", PLAIN) else softmax(one.log_weights)
            row[arm] = {
                "energy distance": energy_distance(one.x, p, exact),
                "reward off by": abs(float(p @ reward(one.x, 0.0)) - goal),
                "last ESS": float(one.ess[-1]),
            }
            shown.setdefault(arm, one.equally_weighted(0)[:: max(1, n // 14)][:14])
        found.append(row)
    arms = collect(found)
    title = f"Digits tilted to {WANTED}: {n} particles, {steps} calls of the model each"
    report.tables.append(table(title, arms, f"exact mean reward {goal:.3f}"))
    gap = {arm: values["energy distance"] for arm, values in arms.items()}
    for other in ("no reward", PLAIN):
        gain = paired_difference(gap[other], gap[FKC], comparisons=2)
        report.claims.append(Claim.at_least(
            f"digits: energy distance of {other!r} minus FKC's", SAYS, gain, 0.0))  # fmt: skip
    gain = paired_difference(arms[PLAIN]["reward off by"], arms[FKC]["reward off by"])
    report.claims.append(Claim.at_least(
        "digits: error of the mean reward, plain minus FKC", SAYS, gain, 0.0))  # fmt: skip
    strips = [Picture(arm, picture_strip(x)) for arm, x in shown.items()]
    strips.append(Picture("exact draws", picture_strip(exact[:14])))
    report.figures.append(Figure("pictures", f"Digits tilted to {WANTED}", pictures=strips))


def energy_distance(x: Float, p: Float, y: Float) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| with weights p on x."""
    cross = float(p @ cdist(x, y).mean(axis=1))
    return 2 * cross - float(p @ cdist(x, x) @ p) - float(cdist(y, y).mean())


# ── forty components ────────────────────────────────────────────────────────────────────────────

WIDE = VarianceExploding(0.01, 100.0, time="geometric")


def add_forty(report: Report, plan: Plan, size: tuple[int, int], rng: int) -> None:
    """Forty unit Gaussians in a square of side 80 at β = 3; W2, MMD and TV to exact draws."""
    n, steps = size
    found = []
    for seed in range(plan.seeds):
        draw = np.random.default_rng([rng, 24, 6, seed])
        means = draw.uniform(-40, 40, size=(40, 2))
        data = GaussianMixtureScore(
            np.full(40, 1 / 40), means, np.tile(np.eye(2), (40, 1, 1)), WIDE
        )
        third = GaussianMixtureScore(data.weights, means, np.tile(np.eye(2) / 3, (40, 1, 1)), WIDE)
        pool = third.sample(20 * n, draw)  # q³ where components overlap: by their weights
        p = softmax(3 * data.log_density(pool, 0.0) - third.log_density(pool, 0.0))
        exact = pool[np.searchsorted(np.cumsum(p), draw.random(n)).clip(max=len(pool) - 1)]
        key = [rng, 24, 7, seed]
        bare = sampled(WIDE, Target.anneal(BETA), data.eps, n, steps, key, 2, resampler=None)
        row = {PLAIN: bare.x}
        for arm, scale in ((FKC, 1.0), ("FKC, ζ² = 4", 2.0)):
            target = Target.anneal(BETA).with_noise(scale)
            one = sampled(WIDE, target, data.eps, n, steps, key, 2, ess_threshold=0.5)
            row[arm] = one.equally_weighted(0)
        row["exact draws"] = pool[np.searchsorted(np.cumsum(p), draw.random(n)).clip(
            max=len(pool) - 1)]  # fmt: skip
        found.append({arm: plane_distances(x, exact) for arm, x in row.items()})
    arms = collect(found)
    title = "Forty components at β = 3"
    report.tables.append(table(title, arms, f"N = {n}, T = {steps}, sigma from 100 to 0.01"))
    for measure in ("W2", "TV"):
        gain = paired_difference(arms[PLAIN][measure], arms["FKC, ζ² = 4"][measure], comparisons=2)
        report.claims.append(Claim.at_least(
            f"forty components: {measure} of plain minus FKC's (ζ² = 4)", SAYS, gain, 0.0,
        ))  # fmt: skip


def plane_distances(x: Float, y: Float) -> dict[str, float]:
    """W1, W2, MMD with Gaussian kernels of widths 10^-2 .. 1, TV of 200 x 200 cells."""
    import ot

    x, y = x[:1000], y[:1000]
    costs = cdist(x, y)
    even = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    widths = np.logspace(-2, 0, 10)

    def kernel(squared: Float) -> float:
        return float(np.mean([np.exp(squared / (-2 * w * w)).mean() for w in widths]))

    mmd = kernel(cdist(x, x, "sqeuclidean")) + kernel(cdist(y, y, "sqeuclidean"))
    mmd -= 2 * kernel(costs**2)
    square = np.array([[-45.0, 45.0]] * 2)
    grids = [cells(z, even[0], square, 200) for z in (x, y)]
    return {
        "W1": float(ot.emd2(*even, costs)), "W2": float(ot.emd2(*even, costs**2)) ** 0.5,
        "MMD": max(mmd, 0.0) ** 0.5, "TV": 0.5 * float(np.abs(grids[0] - grids[1]).sum()),
    }  # fmt: skip


# ── Lennard-Jones particles ─────────────────────────────────────────────────────────────────────


def add_particles(
    report: Report, size: tuple[int, int, int, int], colder: tuple[str, ...], rng: int
) -> None:
    """Learned at temperature 2 and annealed; energies beside those of real samples."""
    from scoredraw.papers import lennard_jones as lj

    seeds, training, n, steps = size
    networks = [lj.train(training, seed=rng + seed) for seed in range(seeds)]
    for name in colder:
        beta = lj.TEMPERATURES["T2p0"] / lj.TEMPERATURES[name]
        found = [lj.annealed(network, beta, name, n, steps, [rng, 24, 8, seed])
                 for seed, network in enumerate(networks)]  # fmt: skip
        arms = collect(found)
        title = f"13 Lennard-Jones particles from temperature 2 to {lj.TEMPERATURES[name]:g}"
        report.tables.append(table(title, arms, (
            f"{n} particles, {steps} steps, networks of {training} training steps; energies above "
            f"{lj.CAP:g} count as that, as a learned score lets particles touch")))  # fmt: skip
        gain = paired_difference(arms[PLAIN]["energy W1"], arms[FKC]["energy W1"])
        report.claims.append(Claim.at_least(
            f"13 particles, to {lj.TEMPERATURES[name]:g}: energy W1 of plain minus FKC's", SAYS,
            gain, 0.0))  # fmt: skip
    virial: list[list[Cell]] = [[name, mean_interval(lj.virial_temperature(lj.samples(name))), T]
              for name, T in lj.TEMPERATURES.items()]  # fmt: skip
    report.tables.append(
        ReportTable("Real samples: <x · ∇U>/36 is the temperature", ["data", "measured", "T"],
                    virial))  # fmt: skip
