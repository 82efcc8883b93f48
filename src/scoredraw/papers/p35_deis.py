"""DEIS and its ingredients: how near a few network calls come to the exact solution.

The data are the 8x8 digits. A mixture of ten Gaussians fitted to them has a known eps, so that all
error is the solver's: x_T is carried from t = 1 to 1e-3 (betas 0.1 to 20) by every method with the
same number of calls and compared, pixel by pixel, with a 400-step fourth-order solution. A block
is 64 noises, methods share them, and intervals are over blocks. The discrete DDPM schedule sets
DEIS beside DPM-Solver++ and UniPC as diffusers has them, all on the same integer times. At full
scale small networks are trained on the digits, and what they generate is compared with their own
exact solution and with held-out digits.

Zhang and Chen, "Fast sampling of diffusion models with exponential integrator", ICLR 2023,
arXiv 2204.13902.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta, NoiseSchedule
from scoredraw.diffusion.time_grids import time_grid
from scoredraw.errors import MissingExtraError, import_extra
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import digit_diffusion as digits
from scoredraw.papers.digit_diffusion import (
    Errors,
    level,
    pixel_errors,
    ratio,
    rmse,
    typical,
    weakest,
)
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]

DDIM, EULER, SCORE, IPNDM = "DDIM", "Euler", "EI, score frozen", "iPNDM"
METHODS: dict[str, dict[str, Any]] = {
    EULER: {"variant": "euler"},
    SCORE: {"variant": "ei_score"},
    DDIM: {"variant": "ei_eps"},
    **{f"tAB{r}": {"variant": "tab", "order": r} for r in (1, 2, 3)},
    **{f"ρAB{r}": {"variant": "rhoab", "order": r} for r in (1, 2, 3)},
    **{f"log ρAB{r}": {"variant": "logrhoab", "order": r} for r in (1, 2, 3)},
    IPNDM: {"variant": "ipndm", "order": 3},
    "ρ2Heun": {"variant": "rhork", "tableau": "2heun"},
    "ρ3Kutta": {"variant": "rhork", "tableau": "3kutta"},
    "ρ4RK": {"variant": "rhork", "tableau": "4rk"},
}
STAGES = {"ρ2Heun": 2, "ρ3Kutta": 3, "ρ4RK": 4}
CONVERGING = (DDIM, "tAB1", "tAB2", "tAB3", "ρAB3", "log ρAB3", "ρ3Kutta")
SHOWN = (DDIM, EULER, SCORE, "tAB1", "tAB2", "tAB3", "ρAB3", "log ρAB3", IPNDM)
GENERATING = (DDIM, EULER, "tAB1", "tAB2", "tAB3", "ρAB3", "log ρAB3")
CHAIN = [(DDIM, "tAB1"), ("tAB1", "tAB2"), ("tAB2", "tAB3")]
EXACT, UNIFORM, QUADRATIC = "exact solution", "t, uniform", "t, quadratic"
GRIDS: dict[str, tuple[str, float]] = {
    UNIFORM: ("t", 1.0),
    QUADRATIC: ("t", 2.0),
    "log ρ, uniform": ("log", 1.0),
    "ρ, power 7": ("rho", 7.0),
}
PEERS: dict[str, tuple[str, int]] = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", 2),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", 3),
    "UniPC 2": ("UniPCMultistepScheduler", 2),
    "UniPC 3": ("UniPCMultistepScheduler", 3),
}
OURS = (DDIM, "tAB1", "tAB2", "tAB3", "log ρAB2", "log ρAB3")
FID = {  # CIFAR-10 at 5, 10, 15 and 20 calls
    DDIM: (26.9, 11.1, 7.1, 5.5),
    "tAB1": (19.7, 6.1, 4.3, 3.5),
    "tAB2": (16.3, 4.6, 3.6, 3.1),
    "tAB3": (15.4, 4.17, 3.37, 2.86),
}
PEER_GRIDS = [name for name, (kind, _) in GRIDS.items() if kind != "log"]
PICTURES = 14
WITH_SKIP, WITHOUT_SKIP = "network", "network without skip"
NOTES = [
    (
        "The paper measures FID on CIFAR-10 with a trained network. Here it is the distance to the "
        "exact solution of the same equation, on 64 pixels: orderings compare with the paper's, "
        "sizes do not. Its 4.17, 3.37 and 2.86 stand in the abstract; the other FIDs are those "
        "of its Table 2 as remembered, and were not read again."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    blocks: int
    noises: int = 64
    reference: int = 400
    calls: tuple[int, ...] = (5, 10, 15, 20)
    doublings: tuple[int, ...] = (10, 20, 40, 80, 160)
    peers: bool = True
    trained: tuple[str, ...] = ()
    networks: int = 0
    steps: int = 3000
    samples: int = 719
    epochs: int = 20  # of the classifier that looks at them
    own: int = 125  # steps of a network's own exact solution


PLANS = {
    "smoke": Plan(
        2, noises=8, reference=20, calls=(5, 10), doublings=(5, 10, 20), peers=False,
        trained=(WITH_SKIP,), networks=2, steps=3, samples=24, epochs=2, own=8,
    ),
    "quick": Plan(8, reference=100, doublings=(10, 20, 40, 80)),
    "full": Plan(32, trained=(WITH_SKIP, WITHOUT_SKIP), networks=5),
    "study": Plan(256, trained=(WITH_SKIP, WITHOUT_SKIP), networks=20, steps=20_000),
}  # fmt: skip


def run(scale: str, rng: int) -> Report:
    """Solve with every method, compare, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=35, scale=scale, seed=rng)
    mixture = digits.Mixture(LinearBeta(), plan.blocks, plan.noises, plan.reference, rng)
    errors = mixture_errors(plan, mixture)
    report.claims.extend([*mixture_claims(plan, errors), *convergence_claims(plan, errors)])
    report.tables.extend(mixture_tables(plan, errors))
    report.figures.extend([calls_figure(plan, errors), convergence_figure(plan, errors)])
    if plan.peers:
        add_peers(report, plan, rng)
    made: digits.Mixture | digits.Networks = mixture
    for name in plan.trained:
        networks = add_networks(report, plan, name, rng)
        made = networks if name == WITH_SKIP else made
    report.figures.append(picture_figure(plan, made))
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── solving: exact eps ──────────────────────────────────────────────────────────────────────────


def steps_of(method: str, calls: int) -> int:
    return max(1, calls // STAGES.get(method, 1))


def solver(schedule: NoiseSchedule, method: str, grid: str, calls: int) -> DEISSolver:
    """The solver of a method that makes `calls` calls, or for Runge-Kutta the most below them."""
    steps = steps_of(method, calls)
    if method == IPNDM:  # its weights hold on uniform times only
        return DEISSolver(schedule, steps, **METHODS[method])
    kind, power = GRIDS[grid]
    return DEISSolver(schedule, steps, grid=kind, grid_power=power, **METHODS[method])


def mixture_errors(plan: Plan, mixture: digits.Mixture) -> Errors:
    """All methods on the quadratic grid, DDIM and tAB3 on the others, and many steps."""
    wanted = [(method, QUADRATIC, n) for method in METHODS for n in plan.calls]
    wanted += [(m, grid, n) for m in (DDIM, "tAB3") for grid in GRIDS for n in plan.calls]
    wanted += [(m, QUADRATIC, n) for m in CONVERGING for n in plan.doublings]
    solvers = {key: solver(mixture.schedule, *key) for key in wanted}
    return {key: pixel_errors(mixture.solve(one), mixture.exact) for key, one in solvers.items()}


# ── solving: the peers, on the discrete schedule ────────────────────────────────────────────────


def peer_errors(plan: Plan, rng: int) -> Errors:
    """DEIS and the schedulers of diffusers on the same integer times."""
    diffusers = import_extra("diffusers", "diffusion")
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    mixture = digits.Mixture(schedule, plan.blocks, plan.noises, plan.reference, rng)
    errors: Errors = {}
    for grid in PEER_GRIDS:
        kind, power = GRIDS[grid]
        for n in plan.calls:
            times = time_grid(schedule, n, kind, power, integer=True)
            for method in OURS:
                found = mixture.solve(DEISSolver(schedule, times=times, **METHODS[method]))
                errors[method, grid, n] = pixel_errors(found, mixture.exact)
            for method, (name, order) in PEERS.items():
                sample = peer(mixture, getattr(diffusers, name), order, times)
                errors[method, grid, n] = pixel_errors(mixture.each_block(sample), mixture.exact)
    return errors


def peer(
    mixture: digits.Mixture, scheduler: Any, order: int, times: Float
) -> Callable[[Float], Float]:
    """A diffusers scheduler along these times; its sigma/alpha and times are set by hand."""
    torch = import_extra("torch", "torch")

    def sample(noise: Float) -> Float:
        one = scheduler(solver_order=order, final_sigmas_type="sigma_min")
        one.set_timesteps(len(times) - 1)
        one.timesteps = torch.as_tensor(times[:-1].astype(np.int64))
        one.sigmas = torch.as_tensor(mixture.schedule.rho(times), dtype=torch.float32)
        x = torch.from_numpy(noise)
        for t in one.timesteps:
            eps = torch.from_numpy(mixture.score.eps(x.numpy(), int(t)))
            x = one.step(eps, t, x).prev_sample
        return np.asarray(x.numpy())

    return sample


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def ordering(
    name: str,
    says: str,
    errors: Errors,
    pairs: Sequence[tuple[str, str]],
    calls: Sequence[int],
    statistic: Callable[[Float], Float] = rmse,
    grid: str = QUADRATIC,
) -> Claim:
    """Each pair is (larger error, smaller error): so at every number of calls, all at once."""
    found = {
        (a, b, n): ratio(
            statistic(errors[a, grid, n]), statistic(errors[b, grid, n]), len(pairs) * len(calls)
        )
        for a, b in pairs
        for n in calls
    }
    (a, b, n), least = weakest(found)
    rule = f"above 1 for all {len(found)} comparisons at once; shown: {a} over {b} at {n} calls"
    return Claim.at_least(name, says, least, 1.0, rule)


def fid(method: str) -> str:
    return "/".join(f"{value:g}" for value in FID[method])


def mixture_claims(plan: Plan, errors: Errors) -> list[Claim]:
    """The paper's orderings, on the distance to the exact solution."""
    claims = []
    for a, b in CHAIN:
        says = f"CIFAR-10 FID {fid(a)} and {fid(b)} at 5/10/15/20 calls"
        for statistic, of in ((rmse, "RMSE"), (typical, "median noise")):
            name = f"{b} is nearer the exact solution than {a}, {of}"
            claims.append(ordering(name, says, errors, [(a, b)], plan.calls, statistic))
    few = [n for n in plan.calls if n <= 10]
    many = [n for n in plan.calls if n >= 15]
    found: list[tuple[str, str, list[tuple[str, str]], Sequence[int]]] = [
        ("tAB is nearer than ρAB of its order",
         "FID of ρAB3 21.4/6.5/4.0/3.2, of tAB3 15.4/4.17/3.37/2.86; alike at lower orders",
         [(f"ρAB{r}", f"tAB{r}") for r in (1, 2, 3)], plan.calls),
        ("tAB3 is the nearest of all multistep methods", "FID: tAB3 is the best at every count",
         [(m, "tAB3") for m in METHODS if m not in {"tAB3", EULER, SCORE, *STAGES}], plan.calls),
        ("Runge-Kutta at 5 and 10 calls is worse than DDIM",
         "FID 100 and more at 5, 14.7/13.2/28.7 at 10; DDIM 26.9 and 11.1",
         [(m, DDIM) for m in STAGES], few),
        ("ρ3Kutta at 15 and 20 calls is better than DDIM",
         "FID about 4.9 and 3.5, DDIM 7.1 and 5.5: competitive", [(DDIM, "ρ3Kutta")], many),
        ("freezing eps (DDIM) is nearer than freezing the score",
         "freezing eps is what makes the integrator work", [(SCORE, DDIM)], plan.calls),
        ("the integrator with the score frozen is worse than Euler up to 10 calls",
         "no better than Euler at few calls", [(SCORE, EULER)], few),
        ("Euler is farther off than DDIM", "FID: Euler is far worse at few calls",
         [(EULER, DDIM)], plan.calls),
    ]  # fmt: skip
    claims += [ordering(*one[:2], errors, *one[2:]) for one in found if one[3]]
    return [*claims, *gain_claims(plan, errors)]


def gain_claims(plan: Plan, errors: Errors) -> list[Claim]:
    """What the order and the grid are worth in size, and in calls."""
    at = {key: rmse(values) for key, values in errors.items()}
    claims = []
    if {10, 20} <= set(plan.calls):
        ours = at["tAB3", QUADRATIC, 10]
        gain = ratio(at[DDIM, QUADRATIC, 10], ours)
        says = "FID 11.1 and 4.17: 2.7 times"
        claims.append(Claim.at_least("10 calls: DDIM's RMSE in tAB3's", says, gain, 2.0))
        gain = ratio(at[DDIM, QUADRATIC, 20], ours)
        name = "half the calls: RMSE of DDIM at 20 in tAB3's at 10"
        claims.append(Claim.at_least(name, "FID 5.5 and 4.17: 1.3 times", gain, 1.0))
    for m in (DDIM, "tAB3"):
        found = {
            n: ratio(at[m, UNIFORM, n], at[m, QUADRATIC, n], len(plan.calls)) for n in plan.calls
        }
        n, least = weakest(found)
        name = f"{m}: the quadratic grid is nearer than the uniform one"
        rule = f"above 1 at all calls at once; shown: {n} calls"
        claims.append(Claim.at_least(name, "the grid is the last ingredient", least, 1.0, rule))
    return claims


def slopes(plan: Plan, errors: Errors, method: str) -> Estimate:
    """-d log error / d log N over the last two doublings, of the median noise, mean over blocks."""
    last = plan.doublings[-3:]
    logs = np.stack([np.log(typical(errors[method, QUADRATIC, n])) for n in last])
    slope = np.polyfit(np.log([steps_of(method, n) for n in last]), logs, 1)[0]
    return mean_interval(-slope)


def convergence_claims(plan: Plan, errors: Errors) -> list[Claim]:
    says = "a polynomial of degree r gives order r + 1; starting at order 1 holds tAB3 near 3"
    claims = []
    for r, method in enumerate((DDIM, "tAB1", "tAB2", "tAB3")):
        low, high = (2.5, 4.5) if r == 3 else (r + 0.5, r + 1.5)
        slope = slopes(plan, errors, method)
        claims.append(Claim.within(f"order of convergence of {method}", says, slope, low, high))
    return claims


def network_claims(name: str, calls: Sequence[int], errors: Errors, quality: Errors) -> list[Claim]:
    """The same on what was learned, and how good the digits are."""
    says = f"CIFAR-10 FID: DDIM {fid(DDIM)}, tAB3 {fid('tAB3')} at 5/10/15/20 calls"
    title = f"{name}: tAB3 is nearer its exact solution than DDIM"
    claims = [ordering(title, says, errors, [(DDIM, "tAB3")], calls)]
    title = f"{name}: nearer with every order, DDIM, tAB1, tAB2, tAB3"
    claims.append(ordering(title, says, errors, CHAIN, calls))
    for n in calls:
        theirs, ours = (quality[m, QUADRATIC, n][:, 0] for m in (DDIM, "tAB3"))
        gap = paired_difference(theirs, ours, comparisons=len(calls))
        title = f"{name}, {n} calls: Fréchet distance of DDIM's digits minus tAB3's"
        at = (5, 10, 15, 20).index(n)
        said = f"FID {FID[DDIM][at]:g} and {FID['tAB3'][at]:g}"
        claims.append(Claim.at_least(title, said, gap, 0.0))
    return claims


def peer_claims(plan: Plan, errors: Errors) -> list[Claim]:
    """DEIS against later solvers on the uniform times of diffusers, and each on its best grid."""
    says = "not in the paper: these solvers are later than it"
    name = "discrete schedule, uniform times: tAB3 is nearer than every later solver"
    pairs = [(m, "tAB3") for m in PEERS]
    claims = [ordering(name, says, errors, pairs, plan.calls, grid=UNIFORM)]
    for n in plan.calls:
        best = {
            m: min((rmse(errors[m, g, n]) for g in PEER_GRIDS), key=lambda e: np.log(e).mean())
            for m in ("tAB3", *PEERS)
        }
        found = {m: ratio(best[m], best["tAB3"], len(PEERS) * len(plan.calls)) for m in PEERS}
        rival, least = weakest(found)
        name = f"discrete schedule, {n} calls, best grids: RMSE of the best rival in tAB3's"
        rule = "above 1 for all rivals and calls at once; a method's grid is its best here"
        claims.append(Claim.at_least(f"{name} ({rival})", says, least, 1.0, rule))
    return claims


# ── tables and figures ──────────────────────────────────────────────────────────────────────────


def error_table(
    title: str,
    errors: Errors,
    arms: Iterable[tuple[str, str]],
    calls: Sequence[int],
    statistic: Callable[[Float], Float] = rmse,
    note: str = "",
) -> ReportTable:
    """Errors by method and grid."""
    rows: list[list[Cell]] = [
        [m, grid, *(level(statistic(errors[m, grid, n])) for n in calls)] for m, grid in arms
    ]
    return ReportTable(title, ["method", "grid", *(f"{n} calls" for n in calls)], rows, note)


def mixture_tables(plan: Plan, errors: Errors) -> list[ReportTable]:
    arms = [(method, QUADRATIC) for method in METHODS]
    grids = [(m, grid) for m in (DDIM, "tAB3") for grid in GRIDS]
    note = (
        f"{plan.blocks} blocks of {plan.noises} noises: geometric means of the blocks' values, "
        "95 % intervals. Runge-Kutta has the most steps that its calls allow; iPNDM's grid is "
        "uniform. "
    )
    carried = "RMSE is carried by the few noises whose path passes near a border of components."
    rows: list[list[Cell]] = []
    for m in CONVERGING:
        found = [level(typical(errors[m, QUADRATIC, n])) for n in plan.doublings]
        rows.append([m, *found, slopes(plan, errors, m)])
    title = "Convergence: median noise, and the order by its last two doublings"
    columns = ["method", *(f"{n} calls" for n in plan.doublings), "order"]
    title_rmse = "RMSE to the exact solution, exact eps"
    title_median = "Error of the median noise of a block, exact eps"
    return [
        error_table(title_rmse, errors, arms, plan.calls, note=note + carried),
        error_table(title_median, errors, arms, plan.calls, typical),
        error_table("RMSE by time grid, exact eps", errors, grids, plan.calls),
        ReportTable(title, columns, rows),
    ]


def add_peers(report: Report, plan: Plan, rng: int) -> None:
    """DEIS beside the solvers of diffusers; a note where that is not installed."""
    try:
        errors = peer_errors(plan, rng)
    except MissingExtraError as error:
        report.notes.append(f"The later solvers were not run: {error}.")
        return
    arms = [(method, grid) for grid in PEER_GRIDS for method in (*OURS, *PEERS)]
    title = "Discrete DDPM schedule: RMSE to the exact solution, on the same integer times"
    note = (
        "DPM-Solver++ and UniPC are diffusers' own, ending at index 0 as ours do. Its DPM-Solver++ "
        "lowers the order of the last steps below 15 steps only, hence the jump from 10 to 15."
    )
    report.claims.extend(peer_claims(plan, errors))
    report.tables.append(error_table(title, errors, arms, plan.calls, note=note))


def add_networks(report: Report, plan: Plan, name: str, rng: int) -> digits.Networks:
    """Train, solve, and say how near and how good the digits are."""
    schedule, calls = LinearBeta(), [n for n in plan.calls if n != 15]
    seeds = [1000 * rng + s for s in range(plan.networks)]
    networks = digits.Networks(
        schedule, seeds, plan.steps, plan.samples, reference=plan.own, skip=name == WITH_SKIP
    )
    distances = digits.Distances(rng, plan.epochs)
    arms = [(m, QUADRATIC) for m in METHODS]
    arms += [(m, grid) for m in (DDIM, "tAB3") for grid in GRIDS if grid != QUADRATIC]
    solvers = {(*arm, n): solver(schedule, *arm, n) for arm in arms for n in calls}
    errors, quality = networks.measure(solvers, distances)
    report.claims.extend(network_claims(name, calls, errors, quality))
    title = f"{name.capitalize()}: RMSE to its own exact solution"
    note = f"{plan.networks} networks, {plan.samples} samples each. The exact solution itself is "
    note += f"off by {networks.exact_error:.1g}."
    report.tables.append(error_table(title, errors, arms, calls, note=note))
    rows: list[list[Cell]] = [
        [m, n or None, *(mean_interval(column) for column in values.T)]
        for (m, grid, n), values in quality.items()
        if grid in ("", QUADRATIC)
    ]
    title = f"{name.capitalize()}: distance of generated to held-out digits"
    note = (
        f"Features of a classifier that is right on {distances.accuracy:.1%}, not Inception's. All "
        "are biased upwards on finite samples: compare with real digits. W2 of pixels rewards "
        "digits that are too smooth."
    )
    columns = ["method", "calls", *distances.names]
    report.tables.append(ReportTable(title, columns, rows, note))
    report.figures.append(quality_figure(name, calls, quality))
    farther = [
        f"{grid} at {n}"
        for grid in GRIDS
        for n in calls
        if ratio(rmse(errors["tAB3", grid, n]), rmse(errors[DDIM, grid, n])).above(1)
    ]
    where = f"({', '.join(farther)} calls)" if farther else "nowhere"
    report.notes.append(f"{name.capitalize()}: tAB3 is farther off than DDIM {where}.")
    return networks


def line(name: str, x: Sequence[int], values: Iterable[Float]) -> Series:
    cells = [level(v) for v in values]
    value, low, high = ([getattr(c, end) for c in cells] for end in ("value", "low", "high"))
    return Series(name, [float(n) for n in x], value, low, high, baseline=name in (DDIM, EXACT))


def calls_figure(plan: Plan, errors: Errors) -> Figure:
    series = [
        line(m, plan.calls, [rmse(errors[m, QUADRATIC, n]) for n in plan.calls]) for m in SHOWN
    ]
    caption = "95 % bands over blocks of noises. Dashed: DDIM. Runge-Kutta is in the table."
    return Figure(
        "line", "Error against network calls, exact eps", "network calls",
        "RMSE to the exact solution", series, log_x=True, log_y=True, caption=caption,
    )  # fmt: skip


def convergence_figure(plan: Plan, errors: Errors) -> Figure:
    x = plan.doublings
    series = [line(m, x, [typical(errors[m, QUADRATIC, n]) for n in x]) for m in CONVERGING]
    return Figure(
        "line", "Order of convergence, exact eps", "network calls", "median error of a noise",
        series, log_x=True, log_y=True,
    )  # fmt: skip


def quality_figure(name: str, calls: Sequence[int], quality: Errors) -> Figure:
    series = [line(m, calls, [quality[m, QUADRATIC, n][:, 0] for n in calls]) for m in GENERATING]
    series.append(line(EXACT, calls, [quality["exact", "", 0][:, 0]] * len(calls)))
    return Figure(
        "line", f"Quality of generated digits, {name}", "network calls",
        "Fréchet distance to held-out digits", series, log_x=True, log_y=True,
    )  # fmt: skip


def picture_figure(plan: Plan, made: digits.Mixture | digits.Networks) -> Figure:
    strips = [Picture(EXACT, digits.picture_strip(made.exact[0, :PICTURES]))]
    for n in (n for n in plan.calls if n != 15):
        for m in (DDIM, "tAB3", IPNDM, "ρ3Kutta"):
            found = made.solve(solver(LinearBeta(), m, QUADRATIC, n))[0, :PICTURES]
            strips.append(Picture(f"{m}, {n} calls", digits.picture_strip(found)))
    caption = "The same noises in every strip."
    return Figure("pictures", "What comes of few calls", caption=caption, pictures=strips)
