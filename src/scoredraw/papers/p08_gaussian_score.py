"""Teleportation: how many network calls the data's mean and covariance save.

The data are the 8x8 digits. A mixture of ten Gaussians fitted to them stands for a trained network,
with all error the solver's: how much of its score do simpler models explain, and where do the paths
of noise end, in RMSE of the pixels, if the first part is the closed form of one Gaussian? Ends are
compared with those of Heun's method with many steps; a block is as many noises as `noises`, methods
share them, errors are medians over a block's noises (the mean is carried by the few that change
sides), and intervals are over blocks. Then the schedulers of diffusers are wrapped, and denoisers
are trained: is the Gaussian score learned first, and do their samples stay as good?

Wang and Vastola, "The unreasonable effectiveness of Gaussian score approximation for diffusion
models and its applications", TMLR 2024, arXiv 2412.09726.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import GaussianScore, edm_schedule
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.score_models import EmpiricalScore, fit_mixture, isotropic_score
from scoredraw.diffusion.teleportation import Teleport, heun, sampling_times
from scoredraw.diffusion.teleportation import score_explained_variance as explained
from scoredraw.errors import MissingExtraError, import_extra
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import digit_diffusion as digits
from scoredraw.papers.digit_diffusion import level, pixel_errors, ratio, typical, weakest
from scoredraw.papers.gaussian_score_learning import Learning
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]

GAUSSIAN, TRAINING, ISOTROPIC, SCALED = "Gaussian", "training set", "isotropic", "scaled noise"
WITH_STD, LOW, FULL = "isotropic with std", "10 clusters, rank 8", "10 clusters"
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CIFAR = {0.5: "", 1.0: ".984", 2.0: ".996", 5.0: ".9996"}
SKIPS = (20.0, 10.0, 5.0, 3.3, 1.9, 1.1)
STEPS, TAILS = 18, (4, 6, 7, 8, 9, 10)
RESPACED = (20.0, 10.0, 5.0, 3.0)
PEERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISScheduler", {}),
}
PEER_SKIP = 4.0
AS_NEAR = 0.95  # of an error that counts as unchanged
PICTURES = 14
NOTES = [
    (
        "The paper's FIDs (CIFAR-10 1.93 with 15-30 % of the steps skipped, 1.97 without) need its "
        "networks and Inception. Here ends are compared with the exact ones on 64 pixels, and "
        "samples by the features of a digit classifier: orderings compare, sizes do not."
    ),
    (
        "The mixture that stands for a network was fitted to the same digits by EM: from sigma = 1 "
        "up it is nearer to the training set's score than networks are, hence that the Gaussian "
        "does not win there as it does on the paper's CIFAR-10 network."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    blocks: int
    noises: int
    reference: int = 200
    rows: int = 1797
    peer_steps: tuple[int, ...] = (10, 20)
    networks: int = 3
    updates: int = 1000
    samples: int = 719
    epochs: int = 20


PLANS = {
    "smoke": Plan(2, 4, 12, rows=60, peer_steps=(), networks=2, updates=6, samples=24, epochs=1),
    "quick": Plan(5, 32, 100, rows=600, updates=1500),
    "full": Plan(5, 256, networks=5, updates=6000),
    "study": Plan(20, 512, 400, networks=20, updates=50_000),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Explain, teleport, wrap, train, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=8, scale=scale, seed=rng)
    bench = Bench(plan, rng)
    add_shares(report, plan, bench, rng)
    add_fine(report, bench)
    add_tails(report, bench)
    add_respaced(report, bench)
    if plan.peer_steps:
        add_peers(report, plan, bench, rng)
    add_learning(report, plan, bench, rng)
    report.figures.append(picture_figure(bench))
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


class Bench:
    """The digits, the mixture that stands for a network, blocks of noises and their exact ends."""

    def __init__(self, plan: Plan, rng: int) -> None:
        from sklearn.datasets import load_digits

        self.data: Float = load_digits().data / 8 - 1
        self.schedule = edm_schedule()
        self.teacher = GaussianMixtureScore.from_sklearn(digits.fitted_mixture(), self.schedule)
        self.carriers = {
            GAUSSIAN: GaussianScore.fit(self.data, schedule=self.schedule),
            ISOTROPIC: isotropic_score(self.data, schedule=self.schedule),
            SCALED: GaussianScore(np.zeros(digits.PIXELS), schedule=self.schedule),
        }
        random = np.random.default_rng([rng, 8])
        self.noises = 80.0 * random.standard_normal((plan.blocks, plan.noises, digits.PIXELS))
        self.fine = sampling_times(self.schedule, plan.reference)
        self.exact = self.ends(heun(self.schedule, self.fine))

    def ends(self, sampler: Any, eps: Any = None) -> Float:
        """Where a solver or a teleportation leads every noise, (blocks, noises, 64)."""
        eps = eps or self.teacher.eps
        return np.stack(digits.each(lambda x: sampler.sample(eps, x), list(self.noises)))

    def error(self, carrier: str, num_steps: int = STEPS, **options: Any) -> Float:
        """Median RMSE to the exact ends, (blocks,)."""
        with warnings.catch_warnings():  # skips below sqrt(largest variance) are meant here
            warnings.simplefilter("ignore", UserWarning)
            jump = Teleport(self.carriers[carrier], num_steps, **options)
        return typical(pixel_errors(self.ends(jump), self.exact))


# ── how much of the score is explained ──────────────────────────────────────────────────────────


def add_shares(report: Report, plan: Plan, bench: Bench, rng: int) -> None:
    """Shares of the teacher's score by model and noise; a block is another noise on the rows."""
    rows = bench.data[: plan.rows]
    models: dict[str, Any] = {
        GAUSSIAN: bench.carriers[GAUSSIAN],
        TRAINING: EmpiricalScore(bench.data),
        ISOTROPIC: bench.carriers[ISOTROPIC],
        WITH_STD: isotropic_score(bench.data, "data"),
        FULL: fit_mixture(bench.data, 10, rng=rng),
        LOW: fit_mixture(bench.data, 10, rank=8, rng=rng),
    }

    def shares(model: Any) -> Float:
        return np.stack([
            explained(
                model.eps, bench.teacher.eps, rows, SIGMAS, schedule=bench.schedule,
                rng=np.random.default_rng([rng, block]),
            ).score
            for block in range(plan.blocks)
        ])  # fmt: skip

    found = dict(zip(models, digits.each(shares, list(models.values())), strict=True))
    report.claims.extend(share_claims(found))
    add_ends(report, bench, models)
    cells: list[list[Cell]] = [[name, *map(mean_interval, v.T)] for name, v in found.items()]
    note = "1 - Σ|a - b|²/Σ|a|², a the mixture's score on digits with noise. Not all is above 0: "
    note += "what explains less than nothing is worse than no score at all."
    columns = ["model", *(f"σ = {s:g}" for s in SIGMAS)]
    title = "Share of the score that a model explains"
    report.tables.append(ReportTable(title, columns, cells, note))
    series = [
        line(name, SIGMAS, [mean_interval(v) for v in values.T], name == ISOTROPIC)
        for name, values in found.items()
        if name != LOW
    ]
    caption = "Drawn without the mixture of rank 8, which falls far below the others at low noise."
    report.figures.append(Figure(
        "line", title, "noise σ", "share explained", series, log_x=True, caption=caption
    ))  # fmt: skip


def share_claims(found: dict[str, Float]) -> list[Claim]:
    index = {s: i for i, s in enumerate(SIGMAS)}
    gaussian = found[GAUSSIAN]
    upper = [s for s in SIGMAS if s >= 0.5]
    rises = {
        (a, b): paired_difference(
            gaussian[:, index[b]], gaussian[:, index[a]], comparisons=len(upper) - 1
        )
        for a, b in itertools.pairwise(upper)
    }
    (a, b), least = weakest(rises, 0.0)
    says = "CIFAR-10 network: .818 at σ = .1, .984 at 1, .996 at 2, .9996 at 5"
    rule = f"above 0 between all neighbours at once; shown: σ = {a:g} to {b:g}"
    name = "the Gaussian explains more of the score the higher the noise, from σ = 0.5"
    claims = [Claim.at_least(name, says, least, 0.0, rule)]
    for sigma, bound in ((2.0, 0.99), (5.0, 0.999)):
        share = mean_interval(gaussian[:, index[sigma]])
        name = f"share of the score that the Gaussian explains at σ = {sigma:g}"
        claims.append(Claim.at_least(name, f"{CIFAR[sigma]} on CIFAR-10", share, bound))
    pairs = [
        (ISOTROPIC, SIGMAS, "isotropic .774 at σ = 1, Gaussian .984"),
        (TRAINING, (0.05, 0.1, 0.2, 0.5), "training set .786 at σ = .1 and -.24 at .01"),
        (TRAINING, (1.0, 2.0, 5.0), "the network is nearer to the Gaussian up to σ = 5"),
        (LOW, (0.05, 0.1, 0.2), "mixtures of low rank collapse: rank 8 at σ = .1 -8.5"),
    ]
    for other, sigmas, says in pairs:
        gaps = {
            s: paired_difference(
                gaussian[:, index[s]], found[other][:, index[s]], comparisons=len(sigmas)
            )
            for s in sigmas
        }
        at, least = weakest(gaps, 0.0)
        name = f"the Gaussian explains more than {other}, σ from {sigmas[0]:g} to {sigmas[-1]:g}"
        rule = f"difference above 0 at all of them at once; shown: σ = {at:g}"
        claims.append(Claim.at_least(name, says, least, 0.0, rule))
    return claims


def add_ends(report: Report, bench: Bench, models: dict[str, Any]) -> None:
    """Where a model's own path ends, with as many steps, beside the teacher's."""
    solver = heun(bench.schedule, sampling_times(bench.schedule, 2 * STEPS))
    errors = {}
    for name in (FULL, GAUSSIAN, TRAINING, ISOTROPIC):
        ends = bench.ends(solver, models[name].eps)
        errors[name] = np.square(ends - bench.exact).mean(axis=(1, 2))
    for near, far, bound in ((FULL, GAUSSIAN, 1.0), (GAUSSIAN, TRAINING, 2.0)):
        gain = ratio(errors[far], errors[near])
        name = f"MSE of the end of the path of {far} in that of {near}"
        says = "to the network's CIFAR-10 samples: mixture .0118, Gaussian .0130, delta .0473"
        report.claims.append(Claim.at_least(name, says, gain, bound))
    rows: list[list[Cell]] = [[name, level(values)] for name, values in errors.items()]
    title = "MSE of the end of a model's own path to the mixture's"
    report.tables.append(ReportTable(title, ["model", "MSE"], rows))


# ── teleportation under the exact score ─────────────────────────────────────────────────────────


def add_fine(report: Report, bench: Bench) -> None:
    """The closed form's own error: then solved as finely as the reference."""
    found = {
        (carrier, s): bench.error(carrier, times=bench.fine, sigma_skip=s)
        for carrier in bench.carriers
        for s in SKIPS
    }
    gains = {s: ratio(found[ISOTROPIC, s], found[GAUSSIAN, s], len(SKIPS)) for s in SKIPS}
    at, least = weakest(gains, 2.0)
    name = "solved finely from σ_skip on: error of isotropic teleportation in the Gaussian's"
    says = "not in the paper: the isotropic start is what one gets without eigenvectors"
    rule = f"at least 2 at all σ_skip at once; shown: σ_skip = {at:g}"
    report.claims.append(Claim.at_least(name, says, least, 2.0, rule))
    rows: list[list[Cell]] = [
        [carrier, *(level(found[carrier, s]) for s in SKIPS)] for carrier in bench.carriers
    ]
    title = "Error of the teleportation itself, then solved finely"
    columns = ["carried by", *(f"σ_skip = {s:g}" for s in SKIPS)]
    note = f"{SCALED}: x σ_skip/σ_max, without the mean. Medians of a block's noises."
    report.tables.append(ReportTable(title, columns, rows, note))
    series = [
        line(c, SKIPS, [level(found[c, s]) for s in SKIPS], c == SCALED) for c in bench.carriers
    ]
    report.figures.append(Figure(
        "line", title, "σ_skip", "median RMSE to the exact end", series, log_x=True, log_y=True
    ))  # fmt: skip


def add_tails(report: Report, bench: Bench) -> None:
    """Heun's 18 steps, and what is left of them: fewer calls."""
    base = bench.error(GAUSSIAN, skip_steps=0)
    found = {(c, k): bench.error(c, skip_steps=k) for c in bench.carriers for k in TAILS}
    nodes = sampling_times(bench.schedule, STEPS)
    calls = 2 * STEPS - 1
    for k in (4, 6, 8):
        share = 2 * k / calls
        name = f"Heun {STEPS}: {share:.0%} fewer calls (k = {k}), error of all calls in it"
        says = "15-30 % of the steps skipped: FID 1.93, all of them 1.97"
        kept = ratio(base, found[GAUSSIAN, k], 3)
        report.claims.append(Claim.at_least(name, says, kept, AS_NEAR))
    low = [k for k in TAILS if nodes[k] < 2 * bench.carriers[GAUSSIAN].widest]
    gains = {k: ratio(found[ISOTROPIC, k], found[GAUSSIAN, k], len(low)) for k in low}
    at, least = weakest(gains)
    name = f"Heun {STEPS}: isotropic's error in the Gaussian's, σ_skip below 2 sqrt(λ_max)"
    rule = f"above 1 at k = {', '.join(map(str, low))} at once; shown: k = {at}"
    says = "not in the paper: above that the solver's own error hides the difference"
    report.claims.append(Claim.at_least(name, says, least, 1.0, rule))
    rows: list[list[Cell]] = [["all steps", calls, float(nodes[0]), level(base), None, None]]
    rows += [
        [f"k = {k}", calls - 2 * k, float(nodes[k]), *(level(found[c, k]) for c in bench.carriers)]
        for k in TAILS
    ]
    columns = ["skipped", "calls", "σ_skip", *bench.carriers]
    title = f"The tail of Heun's {STEPS} steps: median error"
    report.tables.append(ReportTable(title, columns, rows))
    x = [calls, *(calls - 2 * k for k in TAILS)]
    series = [
        line(c, x, [level(base), *(level(found[c, k]) for k in TAILS)], c == SCALED)
        for c in bench.carriers
    ]
    report.figures.append(Figure(
        "line", title, "network calls", "median RMSE to the exact end", series, log_y=True
    ))  # fmt: skip


def add_respaced(report: Report, bench: Bench) -> None:
    """As many calls, all of them below sigma_skip."""
    rows: list[list[Cell]] = []
    for n in (5, 10):
        base = bench.error(GAUSSIAN, n, skip_steps=0)
        found = {
            (c, s): bench.error(c, n, sigma_skip=s, grid="respace")
            for c in bench.carriers
            for s in RESPACED
        }
        gains = {s: ratio(base, found[GAUSSIAN, s], len(RESPACED)) for s in RESPACED}
        at, least = weakest(gains)
        name = f"{2 * n - 1} calls, respaced: error of the whole grid in the teleported"
        rule = f"above 1 at all σ_skip at once; shown: {at:g}"
        says = "the calls saved buy quality"
        report.claims.append(Claim.at_least(name, says, least, 1.0, rule))
        gain = {c: np.log(base) - np.log(found[c, 10.0]) for c in (GAUSSIAN, ISOTROPIC)}
        name = f"{2 * n - 1} calls, σ_skip = 10: isotropic's share of the Gaussian's (log) gain"
        says = "not in the paper: most of the gain is the shorter grid"
        share = mean_interval(gain[ISOTROPIC] / gain[GAUSSIAN])
        report.claims.append(Claim.at_least(name, says, share, 0.5))
        rows.append([2 * n - 1, "whole grid", level(base), *[None] * (len(RESPACED) - 1)])
        rows += [[2 * n - 1, c, *(level(found[c, s]) for s in RESPACED)] for c in bench.carriers]
    columns = ["calls", "carried by", *(f"σ_skip = {s:g}" for s in RESPACED)]
    title = "As many calls, spent below σ_skip: median error"
    report.tables.append(ReportTable(title, columns, rows))


# ── around the schedulers of diffusers ──────────────────────────────────────────────────────────


def add_peers(report: Report, plan: Plan, bench: Bench, rng: int) -> None:
    """DDIM, DPM-Solver++, UniPC and DEIS wrapped; a note where diffusers is not installed."""
    try:
        import_extra("diffusers", "diffusion")
    except MissingExtraError as error:
        report.notes.append(f"No scheduler was wrapped: {error}.")
        return
    discrete = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000)).with_ends(last="denoise")
    teacher = GaussianMixtureScore.from_sklearn(digits.fitted_mixture(), discrete)
    noises = bench.noises / 80.0
    fine = DEISSolver(discrete, plan.reference, variant="rhork", tableau="4rk", grid="log")
    exact = np.stack(digits.each(lambda x: fine.sample(teacher.eps, x), list(noises)))
    grids = ("all steps", "tail", "respace")
    rows: list[list[Cell]] = []
    errors: dict[Any, Float] = {}
    for name in PEERS:
        for n in plan.peer_steps:
            for grid in grids:
                ends, calls = wrapped(name, grid, n, noises, teacher, bench.carriers[GAUSSIAN])
                errors[name, n, grid] = typical(pixel_errors(ends, exact))
                rows.append([name, grid, calls, level(errors[name, n, grid])])
    for grid, bound in (("tail", AS_NEAR), ("respace", 1.0)):
        gains = {
            key: ratio(errors[(*key, "all steps")], errors[(*key, grid)], len(PEERS))
            for key in ((name, n) for name in PEERS for n in plan.peer_steps)
        }
        key, least = weakest(gains, bound)
        what = "fewer calls" if grid == "tail" else "as many calls"
        name = f"around {', '.join(PEERS)}, {what}: error of all steps in the teleported"
        rule = f"at least {bound:g} for all, at {plan.peer_steps} steps; shown: {key}"
        says = "works on DPM-Solver-v3 and UniPC"
        report.claims.append(Claim.at_least(name, says, least, bound, rule))
    title = f"Around schedulers of diffusers, σ_skip = {PEER_SKIP:g}: median error"
    report.tables.append(ReportTable(title, ["scheduler", "grid", "calls", "error"], rows))


def wrapped(
    name: str, grid: str, steps: int, noises: Float, teacher: Any, gaussian: GaussianScore
) -> tuple[Float, int]:
    """Ends (blocks, noises, 64) of a scheduler alone or teleported, and its network calls."""
    import diffusers
    import torch

    from scoredraw.diffusion.deis_scheduler import DEISScheduler
    from scoredraw.diffusion.teleport_scheduler import TeleportScheduler

    made, config = PEERS[name]
    one: Any = DEISScheduler() if name == "DEIS" else getattr(diffusers, made)(**config)
    if grid != "all steps":
        one = TeleportScheduler(one, gaussian, sigma_skip=PEER_SKIP, grid=grid)
    one.set_timesteps(steps)
    x = torch.from_numpy(noises.reshape(-1, digits.PIXELS))
    for t in one.timesteps:
        eps = teacher.eps(one.scale_model_input(x, t), float(t))
        x = one.step(eps, t, x).prev_sample
    return x.numpy().reshape(noises.shape), len(one.timesteps)


# ── denoisers that learn ────────────────────────────────────────────────────────────────────────


def add_learning(report: Report, plan: Plan, bench: Bench, rng: int) -> None:
    """Is the Gaussian score learned first, and do samples stay as good with fewer calls?"""
    models: dict[str, Any] = {
        GAUSSIAN: bench.carriers[GAUSSIAN],
        TRAINING: EmpiricalScore(bench.data),
        ISOTROPIC: bench.carriers[ISOTROPIC],
    }
    sigmas = (0.1, 0.5, 1.0, 2.0, 5.0)
    seeds = [1000 * rng + s for s in range(plan.networks)]
    data = bench.data.astype(np.float32)
    learning = Learning(data, models, sigmas, seeds, plan.updates, min(plan.rows, 600))
    later = ratio(learning.reached(TRAINING, 0.5), learning.reached(GAUSSIAN, 0.5))
    name = "σ = 0.5: updates until the training set explains 90 % of its most, in the Gaussian's"
    says = "Gaussian structure is learned first"
    report.claims.append(Claim.at_least(name, says, later, 1.0))
    final = learning.shares[GAUSSIAN][:, -1] - learning.shares[TRAINING][:, -1]
    name = "trained networks, σ from 0.1 to 2: share of the Gaussian minus the training set's"
    says = "the network is nearer to the Gaussian up to σ = 5"
    least = weakest({s: mean_interval(final[:, i]) for i, s in enumerate(sigmas[:-1])}, 0.0)[1]
    report.claims.append(Claim.at_least(name, says, least, 0.0, "above 0 at each of 4 σ"))
    rows: list[list[Cell]] = [
        [name, s, *learning.curve(name, s)] for s in sigmas for name in models
    ]
    columns = ["model", "σ", *(f"{n} updates" for n in learning.updates)]
    title = "Share of a learning network's score that a model explains"
    note = (
        f"{plan.networks} networks, by updates of {plan.updates}; their last column is what they "
    )
    note += "know in the end."
    report.tables.append(ReportTable(title, columns, rows, note))
    series = [
        line(f"{name}, σ = {s:g}", learning.updates, learning.curve(name, s))
        for s in (0.5, 2.0)
        for name in (GAUSSIAN, TRAINING)
    ]
    report.figures.append(Figure("line", title, "updates", "share", series, log_x=True))
    add_quality(report, plan, bench, learning, rng)


def add_quality(report: Report, plan: Plan, bench: Bench, learning: Learning, rng: int) -> None:
    """How far generated digits are from held-out ones, with all calls and with fewer."""
    distances = digits.Distances(rng, plan.epochs)
    random = np.random.default_rng([rng, 80])
    starts = 80.0 * random.standard_normal((len(learning.final), plan.samples, digits.PIXELS))
    arms: dict[str, tuple[str, int, int]] = {"all steps": (GAUSSIAN, STEPS, 0)}
    arms |= {f"{c}, k = {k}": (c, STEPS, k) for c in (GAUSSIAN, ISOTROPIC) for k in (4, 6, 8, 10)}
    found, calls = {}, {}
    for name, (carrier, n, k) in arms.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            jump = Teleport(bench.carriers[carrier], n, skip_steps=k)
        pairs = list(zip(learning.final, starts, strict=True))

        def sample(pair: Any, jump: Teleport = jump) -> Any:
            return jump.sample(pair[0].eps, pair[1])

        made = digits.each(sample, pairs)
        found[name], calls[name] = distances.each(np.stack(made)), jump.solver.nfe
    for k in (4, 6, 8):
        kept = ratio(found["all steps"][:, 0], found[f"{GAUSSIAN}, k = {k}"][:, 0], 3)
        share = 2 * k / (2 * STEPS - 1)
        name = f"trained networks, {share:.0%} fewer calls: Fréchet distance of all calls in it"
        says = "FID unchanged with 15-30 % of the steps skipped"
        report.claims.append(Claim.at_least(name, says, kept, AS_NEAR))
    rows: list[list[Cell]] = [
        [name, calls[name], *map(mean_interval, values.T)] for name, values in found.items()
    ]
    title = f"Trained networks, Heun {STEPS}: distance of generated to held-out digits"
    note = f"Features of a classifier that is right on {distances.accuracy:.1%}; the digits were "
    note += "held out from it, not from the networks, which learn from all."
    report.tables.append(ReportTable(title, ["steps", "calls", *distances.names], rows, note))


def line(
    name: str, x: Sequence[float], cells: Sequence[Estimate], baseline: bool = False
) -> Series:
    value, low, high = ([getattr(c, end) for c in cells] for end in ("value", "low", "high"))
    return Series(name, [float(n) for n in x], value, low, high, baseline=baseline)


def picture_figure(bench: Bench) -> Figure:
    strips = [Picture("exact end", digits.picture_strip(bench.exact[0, :PICTURES]))]
    for k in (0, 6, 8, 10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            jump = Teleport(bench.carriers[GAUSSIAN], STEPS, skip_steps=k)
        shown = jump.sample(bench.teacher.eps, bench.noises[0, :PICTURES])
        strips.append(Picture(f"{jump.solver.nfe} calls, k = {k}", digits.picture_strip(shown)))
    last = bench.carriers[GAUSSIAN].teleport(bench.noises[0, :PICTURES], 80.0, 0.0)
    strips.append(Picture("no call: the Gaussian alone", digits.picture_strip(last)))
    caption = "The same noises in every strip."
    return Figure("pictures", "What is left of a digit", caption=caption, pictures=strips)
