"""Time shift on digits: do samplers improve when the network is told the time that fits?

Networks learn the noise in the 8x8 digits, at 1000 levels (betas 1e-4 to 0.02), each from its own
seed; each has its own noises x_T, which all samplers share. Quality is the Fréchet distance of the
generated pixels to the digits that were trained on; at full scale also what a digit classifier sees
of held-out ones. Window and cutoff were fixed before: (100, 200) at 10 steps, (40, 200) at 20,
(20, 200) at 50; not so DEIS (20, 300), whose published cutoff of 900 shifts nothing at 10 steps.
Beside the hosts stand the authors' program, a tuned epsilon scaling, variance normalising, and
later solvers from diffusers. Intervals are over networks. What has to hold without any network is
shown on data whose eps is known.

Li, Qu, Yao, Sun and Moens, "Alleviating exposure bias in diffusion models through sampling with
shifted time steps", ICLR 2024, arXiv 2305.15583.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.diffusion.exposure_bias import (
    coupling_losses,
    epsilon_scaling,
    variance_normalising,
)
from scoredraw.diffusion.pseudo_numerical import PseudoNumericalSampler, step_times
from scoredraw.diffusion.schedules import DiscreteAlphas
from scoredraw.diffusion.time_shift import TimeShiftSampler, sample_variance, search_shift
from scoredraw.errors import MissingExtraError, import_extra
from scoredraw.metrics import Estimate, frechet_distance, mean_interval, paired_difference
from scoredraw.papers import digit_diffusion as digits
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]
Sampler = Callable[[Any], Any]
Quality = dict[tuple[str, int], Float]  # (sampler, steps) -> distances (networks,)

DDIM, PLAIN, MATCHED, CODE = "DDIM", "TS", "TS, matched", "TS, as released"
NORMALISED = ("variance normalised", "variance normalised, matched")
SETTINGS = {10: (100, 200), 20: (40, 200), 50: (20, 200)}  # steps -> window, cutoff
OWN_SETTINGS = {"deis": (20, 300), "dpm-solver": (30, 300)}  # windows as published
SCALES = (0.99, 1.005, 1.01, 1.02, 1.04)  # λ of epsilon scaling
BASES = {
    "DDPM": "ddpm", "S-PNDM": "s-pndm", "F-PNDM": "f-pndm", "DEIS": "deis",
    "DPM-Solver": "dpm-solver",
}  # fmt: skip
PEERS = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", 2),
    "UniPC 2": ("UniPCMultistepScheduler", 2),
}
LEAST_GAIN = 0.02  # of the Fréchet distance, set beforehand
ENTRIES = 8192  # of a sample, where there are many
PICTURES = 14
NOTES = [
    (
        "The paper measures FID on CIFAR-10 and CelebA; here it is 64 pixels: directions compare, "
        "not sizes. Its 6.99 is inferred from its abstract (3.88, a gain of 44.49 %)."
    ),
    "Clean samples are clipped to [-1, 1] at every step, for all but diffusers' solvers.",
    "Networks put out eps itself: chosen after those with sigma x added had shown no gain.",
    (
        "64 entries tell a variance to 18 %, so that many shifts are chance; the 3072 of a CIFAR "
        "image tell it to 2.6 %."
    ),
    "Epsilon scaling is shown at the best of its five λ on the very samples it is judged by.",
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    networks: int
    steps: int  # of training
    samples: int
    counts: tuple[int, ...] = (10, 20, 50)
    host_counts: tuple[int, ...] = (10,)
    rows: int = 32  # of the data of many entries
    search: int = 0  # batches of noises for windows and cutoffs
    epochs: int = 0  # of the digit classifier
    peers: bool = True  # solvers of diffusers
    skip: bool = False  # add sigma x to what the networks put out
    skipped: int = 0  # networks of that kind, beside the others


PLANS = {
    "smoke": Plan(2, 3, 40, counts=(10, 50), rows=2, peers=False),
    "quick": Plan(4, 1000, 400),
    "full": Plan(6, 3000, 1000, host_counts=(10, 20), rows=64, search=3, epochs=20, skipped=3),
    "study": Plan(30, 20_000, 5000, host_counts=(5, 10, 20, 50), search=6, epochs=20, skipped=10),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train, sample every way, compare, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=53, scale=scale, seed=rng)
    trained = Trained(plan, rng)
    quality = trained.measure()
    report.claims.extend([*main_claims(plan, quality), *host_claims(plan, quality)])
    report.tables.extend([quality_table(plan, quality), gain_table(plan, quality)])
    if plan.skipped:
        add_skipped(report, replace(plan, skip=True, networks=plan.skipped), rng)
    report.figures.append(steps_figure(plan, quality))
    add_bias(report, trained)
    add_exact(report, plan, rng)
    if plan.search:
        add_search(report, plan, trained)
    if plan.epochs:
        add_classifier(report, plan, trained, rng)
    report.figures.append(picture_figure(trained))
    report.notes.extend(NOTES)
    return replace(report, seconds=time.perf_counter() - started)


# ── networks and samplers ───────────────────────────────────────────────────────────────────────


def shifted(schedule: DiscreteAlphas, base: str, steps: int, **how: Any) -> TimeShiftSampler:
    """Time shift as it was fixed for this base, or else for the nearest number of steps."""
    nearest = min(SETTINGS, key=lambda n: abs(n - steps))
    window, cutoff = OWN_SETTINGS.get(base, SETTINGS[nearest])
    return TimeShiftSampler(schedule, steps, base, window=window, cutoff=cutoff, clip=1.0, **how)


class Trained:
    """The networks, their noises, and every way to sample from them."""

    def __init__(self, plan: Plan, rng: int) -> None:
        self.plan, self.rng = plan, rng
        self.schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
        self.data = digits.real_digits()[0]
        self.v0 = float(sample_variance(self.data).mean())
        self.log_rho = torch.from_numpy(np.log(self.schedule.rho(np.arange(1000))).astype("f4"))
        seeds = [1000 * rng + s for s in range(plan.networks)]
        self.networks = digits.each(
            lambda seed: digits.train(self.schedule, self.data, plan.steps, seed, skip=plan.skip),
            seeds,
        )
        self.noises = [self.noise(seed) for seed in seeds]
        self.ways = [self.samplers(network) for network in self.networks]

    def noise(self, *seed: int) -> torch.Tensor:
        draw = np.random.default_rng([*seed, 53])
        return torch.from_numpy(draw.standard_normal((self.plan.samples, 64), np.float32))

    def eps(self, network: Any) -> Callable[[Any, Any], Any]:
        """eps(x, t) of a network, for a time a sample, whole or between two."""

        def call(x: Any, t: Any) -> Any:
            if t.is_floating_point():
                log_rho = np.log(self.schedule.rho(t.numpy())).astype(np.float32)
                return network(x, torch.from_numpy(log_rho)[:, None])
            return network(x, self.log_rho[t][:, None])

        return call

    def samplers(self, network: Any) -> dict[tuple[str, int], Sampler]:
        """Every sampler at every number of steps: functions of x_T."""
        eps, found = self.eps(network), dict[tuple[str, int], Sampler]()
        for n in (*self.plan.counts, 100):
            host = PseudoNumericalSampler(self.schedule, n, clip=1.0)
            found[DDIM, n] = plainly(host, eps)
            if n == 100:
                continue
            for name, how in self.shifts().items():
                found[name, n] = plainly(shifted(self.schedule, "ddim", n, **how), eps)
            for scale in SCALES:
                found[f"ES {scale:g}", n] = plainly(host, epsilon_scaling(eps, scale))
            abar = self.schedule.values
            for name, v0 in zip(NORMALISED, (None, self.v0), strict=True):
                target = "plain" if v0 is None else "matched"
                seen = variance_normalising(eps, abar, target, v0)
                found[name, n] = plainly(host, seen)
        for n in self.plan.host_counts:
            for base, key in BASES.items():
                host = PseudoNumericalSampler(self.schedule, n, key, clip=1.0)
                found[base, n] = plainly(host, eps)
                for name in (PLAIN, MATCHED):
                    how = self.shifts()[name]
                    found[f"{base} + {name}", n] = plainly(
                        shifted(self.schedule, key, n, **how), eps
                    )
        return found | (self.peers(network) if self.plan.peers else {})

    def shifts(self) -> dict[str, dict[str, Any]]:
        """What each kind of time shift is given."""
        return {
            PLAIN: {},
            MATCHED: {"target": "matched", "data_variance": self.v0},
            CODE: {"mode": "code"},
        }

    def peers(self, network: Any) -> dict[tuple[str, int], Sampler]:
        """Later solvers, as diffusers has them, on the same trailing times."""
        try:
            diffusers = import_extra("diffusers", "diffusion")
        except MissingExtraError:
            return {}

        def sampler(kind: Any, order: int, n: int) -> Sampler:
            def sample(x: Any) -> Any:
                scheduler = kind(solver_order=order, timestep_spacing="trailing")
                scheduler.set_timesteps(n)
                for t in scheduler.timesteps:
                    x = scheduler.step(network.eps(x, int(t)), t, x).prev_sample
                return x

            return sample

        return {
            (name, n): sampler(getattr(diffusers, kind), order, n)
            for name, (kind, order) in PEERS.items()
            for n in self.plan.counts
        }

    def measure(self, names: Sequence[str] = ()) -> Quality:
        """Fréchet distances of pixels to the training digits, a network an entry; of all names."""

        def one(pair: tuple[Any, Any]) -> dict[tuple[str, int], float]:
            ways, noise = pair
            chosen = [key for key in ways if not names or key[0] in names]
            return {key: self.distance(ways[key](noise)) for key in chosen}

        found = digits.each(one, list(zip(self.ways, self.noises, strict=True)))
        return {key: np.array([each[key] for each in found]) for key in found[0]}

    def distance(self, samples: Any) -> float:
        x = np.clip(np.asarray(samples, np.float64), -1, 1)
        return frechet_distance(x, self.data)


def plainly(sampler: Any, eps: Callable[[Any, Any], Any]) -> Sampler:
    """The samples alone, of either kind of sampler; noise of DDPM from a fixed seed."""

    def sample(x: Any) -> Any:
        found = sampler.sample(eps, x, torch.Generator().manual_seed(53))
        return found[0] if isinstance(found, tuple) else found

    return sample


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def gap(quality: Quality, ours: tuple[str, int], theirs: tuple[str, int], of: int = 1) -> Estimate:
    return paired_difference(quality[ours], quality[theirs], comparisons=of)


def best_scaling(quality: Quality, n: int) -> str:
    """The epsilon scaling whose mean distance is least."""
    return min((f"ES {s:g}" for s in SCALES), key=lambda name: quality[name, n].mean())


def main_claims(plan: Plan, quality: Quality) -> list[Claim]:
    """DDIM with and without, at settings fixed before; the released reading; the remedies."""
    claims = []
    says = "CIFAR-10, CelebA: FID improves at 5 to 100 steps"
    for n in plan.counts:
        for name in (PLAIN, MATCHED):
            bound = -LEAST_GAIN if n == 50 else 0.0
            title = f"{n} steps: Fréchet distance, {name} minus DDIM"
            found = gap(quality, (name, n), (DDIM, n))
            claims.append(Claim.at_most(title, says, found, bound))
    for name in (PLAIN, MATCHED):
        better = int((quality[name, 50] < quality[DDIM, 50]).sum())
        rule, came = "in at least 5 of 6", f"{better} of {plan.networks}"
        title = f"50 steps: networks that {name} improves"
        claims.append(Claim.judge(title, says, came, rule, 6 * better >= 5 * plan.networks))
    for n in (20, 50):
        if n in plan.counts:
            title = f"{n} steps: Fréchet distance, the released reading minus DDIM"
            found = gap(quality, (CODE, n), (DDIM, n))
            claims.append(Claim.at_most(title, "the released program made the FIDs", found, 0.0))
    best = best_scaling(quality, 50)
    rivals = "not in the paper: it compares with no other remedy"
    for rival in (best, *NORMALISED):
        found = gap(quality, (MATCHED, 50), (rival, 50))
        title = f"50 steps: Fréchet distance, {MATCHED} minus {rival}"
        claims.append(Claim.at_most(title, rivals, found, 0.0))
    return claims


def host_claims(plan: Plan, quality: Quality) -> list[Claim]:
    """The other samplers, and few steps of the best against many of DDIM."""
    says = {
        "F-PNDM": "CIFAR-10 at 10 steps: FID from 6.99 to 3.88",
        "DEIS": "FID improves", "DPM-Solver": "FID improves",
    }  # fmt: skip
    claims = []
    for n in plan.host_counts:
        for base in BASES:
            found = gap(quality, (f"{base} + {MATCHED}", n), (base, n))
            title = f"{n} steps: Fréchet distance, {base} with {MATCHED} minus without"
            said = says.get(base, "FID improves consistently at 5 to 100 steps")
            claims.append(Claim.at_most(title, said, found, 0.0))
    if 10 in plan.host_counts:
        found = gap(quality, (f"F-PNDM + {PLAIN}", 10), (DDIM, 100))
        title = "Fréchet distance, F-PNDM with TS at 10 steps minus DDIM at 100"
        said = "below the FID of DDIM at 100 steps"
        claims.append(Claim.at_most(title, said, found, 0.0))
    return claims


# ── bias and what must hold ─────────────────────────────────────────────────────────────────────


def add_bias(report: Report, trained: Trained) -> None:
    """By how much states are too noisy, with and without shifts, and where they couple best."""
    schedule, n = trained.schedule, 20
    times = step_times(1000, n)[1:-1]
    clean = 1 - schedule.abar(times) * (1 - trained.v0)
    kinds: dict[str, dict[str, Any]] = {DDIM: {"window": 0}, **trained.shifts()}
    found: dict[str, list[Float]] = {name: [] for name in kinds}
    for network, noise in zip(trained.networks, trained.noises, strict=True):
        for name, how in kinds.items():
            window = {"window": 40, "cutoff": 200, **how}
            sampler = TimeShiftSampler(schedule, n, clip=1.0, **window)
            state, gaps = sampler.init(noise), []
            for _ in times:
                state, _ = sampler.step(state, trained.eps(network))
                gaps.append(float(sample_variance(state.x).mean()))
            found[name].append(np.array(gaps) - clean)
    series = [
        line(name, times[::-1], [np.array(gaps)[:, i] for i in range(n - 1)[::-1]])
        for name, gaps in found.items()
    ]
    report.figures.append(Figure(
        "line", "Exposure bias: how much variance states have too much, 20 steps", "nominal time",
        "mean variance minus that of the forward process", series, reference=0.0,
        caption="At each sampler's nominal times. 95 % bands over networks. Dashed: DDIM.",
    ))  # fmt: skip
    late = times <= 500
    bias = {name: np.abs(np.array(gaps)[:, late]).mean(axis=1) for name, gaps in found.items()}
    lessened = paired_difference(bias[MATCHED], bias[DDIM])
    title = f"20 steps: mean |variance gap| below time 500, {MATCHED} minus DDIM"
    report.claims.append(Claim.at_most(title, "exposure bias is lessened", lessened, 0.0))
    report.claims.append(coupling_claim(trained))


def coupling_claim(trained: Trained) -> Claim:
    """Noise digits, take a DDIM step, and show the result at the time best for other digits."""
    schedule, shares = trained.schedule, []
    host = PseudoNumericalSampler(schedule, times=[550, 500, -1], clip=1.0)
    candidates = np.arange(440, 561, 10)
    for network, noise in zip(trained.networks, trained.noises, strict=True):
        eps = trained.eps(network)
        x0 = torch.from_numpy(trained.data[: len(noise)])
        state = host.step(host.init(schedule.perturb(x0, 550.0, noise[: len(x0)])), eps)
        losses = coupling_losses(eps, state.x, x0, candidates, schedule)
        chosen, judged = losses[:, ::2].mean(axis=1), losses[:, 1::2].mean(axis=1)
        shares.append(1 - judged[chosen.argmin()] / judged[candidates == 500].item())
    title = "one step from 550 to 500: share of x_0's error that the best time saves"
    says = "another time than the nominal one fits the state better"
    return Claim.at_least(title, says, mean_interval(shares), 0.0)


def add_exact(report: Report, plan: Plan, rng: int) -> None:
    """Where eps is exact there is no bias to take back: N(0, 1/4) data of many entries."""
    abar = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000)).values
    x = np.random.default_rng([rng, 54]).standard_normal((plan.rows, ENTRIES))

    def eps(x: Any, t: Any, factor: float = 1.0) -> Any:
        return factor * np.sqrt(1 - abar[t])[:, None] * x / (1 - 0.75 * abar[t])[:, None]

    sampler = TimeShiftSampler(
        num_steps=100, window=20, cutoff=200, target="matched", data_variance=0.25
    )
    host = sampler.host.sample(eps, x).std(axis=1)
    made = sampler.sample(eps, x)[0].std(axis=1)
    noise = float(np.sqrt(0.5 / ENTRIES))
    change = mean_interval(made / host - 1)
    title = "exact eps, 100 steps, 8192 entries: relative change of a sample's standard deviation"
    says = "no bias, no change: follows from the method"
    rule = f"within one standard error of it, {noise:.2g}"
    report.claims.append(Claim.within(title, says, change, -noise, noise, rule))

    def weak(x: Any, t: Any) -> Any:
        return eps(x, t, 0.99)

    left = np.abs(sampler.sample(weak, x)[0].std(axis=1) - host)
    before = np.abs(sampler.host.sample(weak, x).std(axis=1) - host)
    title = "eps 1 % short: share of the error of the standard deviation that is left"
    report.claims.append(
        Claim.at_most(title, "bias is lessened", mean_interval(left / before), 0.5)
    )


def add_skipped(report: Report, plan: Plan, rng: int) -> None:
    """The same with networks that need not learn the noise of N(0, I) data."""
    quality = Trained(plan, rng).measure((DDIM, PLAIN, MATCHED, CODE))
    table = gain_table(plan, quality)
    report.tables.append(replace(table, title=f"{table.title}: networks with sigma x added"))
    says = "nothing on how a network is parameterised"
    title = f"50 steps, networks with sigma x added: Fréchet distance, {MATCHED} minus DDIM"
    found = gap(quality, (MATCHED, 50), (DDIM, 50))
    report.claims.append(Claim.at_most(title, says, found, 0.0))


def add_search(report: Report, plan: Plan, trained: Trained) -> None:
    """Windows and cutoffs at 20 steps, chosen on some noises and judged on the others."""
    network = trained.networks[0]
    noises = [trained.noise(trained.rng, 7 + i) for i in range(plan.search)]
    sampler = shifted(trained.schedule, "ddim", 20, **trained.shifts()[MATCHED])
    eps = trained.eps(network)
    found = search_shift(sampler, eps, noises, trained.distance, (20, 40, 100), (100, 200, 400))
    rows: list[list[Cell]] = [["none", None, mean_interval(found.host)]]
    for i, window in enumerate(found.windows):
        for j, cutoff in enumerate(found.cutoffs):
            rows.append([str(window), cutoff, mean_interval(found.losses[i, j])])
    note = (
        f"Least: window {found.window}, cutoff {found.cutoff:g}. Chosen on the other noises it "
        f"gains {mean_interval(found.gains)} over no shift. One network."
    )
    title = f"Window and cutoff, DDIM with {MATCHED}, 20 steps: Fréchet distance"
    report.tables.append(ReportTable(title, ["window", "cutoff", "distance"], rows, note))


def add_classifier(report: Report, plan: Plan, trained: Trained, rng: int) -> None:
    """The same samples as a digit classifier sees them, against held-out digits."""
    distances = digits.Distances(rng, plan.epochs)
    rows: list[list[Cell]] = []
    found = {}
    for name in (DDIM, PLAIN, MATCHED, CODE):
        made = [
            np.asarray(ways[name, 50](noise[: len(distances.held_out)]))
            for ways, noise in zip(trained.ways, trained.noises, strict=True)
        ]
        found[name] = distances.each(np.stack(made))
        rows.append([name, *(mean_interval(column) for column in found[name].T)])
    note = "To 719 held-out digits, 50 steps; Fréchet of a classifier's features."
    columns = ["sampler", *distances.names]
    report.tables.append(ReportTable("What a digit classifier sees", columns, rows, note))
    moved = paired_difference(found[MATCHED][:, 0], found[DDIM][:, 0])
    title = f"50 steps: Fréchet distance of a classifier's features, {MATCHED} minus DDIM"
    report.claims.append(Claim.at_most(title, "FID improves", moved, 0.0))


# ── tables and figures ──────────────────────────────────────────────────────────────────────────


def quality_table(plan: Plan, quality: Quality) -> ReportTable:
    counts = sorted({n for _, n in quality})
    names = dict.fromkeys(name for name, _ in quality)
    rows: list[list[Cell]] = []
    for name in names:
        cells = [quality.get((name, n)) for n in counts]
        rows.append([name, *(None if c is None else mean_interval(c) for c in cells)])
    note = (
        f"{plan.networks} networks, {plan.samples} samples each; lower is better. Pixels, to the "
        "digits trained on. PNDM's first steps take more calls: S-PNDM 1, F-PNDM 9 in all."
    )
    columns = ["sampler", *(f"{n} steps" for n in counts)]
    return ReportTable("Fréchet distance", columns, rows, note)


def gain_table(plan: Plan, quality: Quality) -> ReportTable:
    """Everything beside DDIM at the same number of steps, in shares of it."""
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(name for name, n in quality if n in plan.counts and name != DDIM):
        found: list[Cell] = []
        for n in plan.counts:
            values = quality.get((name, n))
            found.append(None if values is None else mean_interval(values / quality[DDIM, n] - 1))
        rows.append([name, *found])
    columns = ["sampler", *(f"{n} steps" for n in plan.counts)]
    return ReportTable("Fréchet distance, relative to DDIM's minus one", columns, rows)


def line(name: str, x: Any, values: list[Float]) -> Series:
    cells = [mean_interval(v) for v in values]
    value, low, high = ([getattr(c, end) for c in cells] for end in ("value", "low", "high"))
    return Series(name, [float(n) for n in x], value, low, high, baseline=name == DDIM)


def steps_figure(plan: Plan, quality: Quality) -> Figure:
    names = [DDIM, PLAIN, MATCHED, CODE, *(p for p in PEERS if (p, plan.counts[0]) in quality)]
    series = [line(name, plan.counts, [quality[name, n] for n in plan.counts]) for name in names]
    return Figure(
        "line", "Fréchet distance by steps", "steps", "Fréchet distance to the training digits",
        series, log_x=True, log_y=True, caption="95 % bands over networks. Dashed: DDIM.",
    )  # fmt: skip


def picture_figure(trained: Trained) -> Figure:
    ways, noise = trained.ways[0], trained.noises[0][:PICTURES]
    strips = [
        Picture(f"{name}, {n} steps", digits.picture_strip(ways[name, n](noise)))
        for n in (trained.plan.counts[0], 50)
        for name in (DDIM, MATCHED, CODE)
    ]
    return Figure("pictures", "The same noises", caption="One network.", pictures=strips)
