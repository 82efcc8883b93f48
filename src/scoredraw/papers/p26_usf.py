"""USF and S³: one step for all solvers, and a search for the best schedule of such steps.

The data are the 8x8 digits: a mixture of ten Gaussians fitted to them has a known eps, so that all
error is the solver's. A search scores a schedule by its distance to the exact solution on 64
noises; what it finds is judged on others, beside the best of the presets (which is chosen on
the same 64). A seed is such a set of noises with its own searches; intervals are over seeds. The
orders of convergence are those on a mixture in the plane. On the discrete DDPM schedule the
searched schedules meet DEIS, DPM-Solver++ and UniPC as diffusers has them; the searches meet a
general optimiser's in the same space (`optuna_schedules`).

Liu, Ning, Yang and Wang, "A unified sampling framework for solver searching of diffusion
probabilistic models", ICLR 2024, arXiv 2312.07243.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedule_search import (
    FEATURES,
    METHODS,
    Breeder,
    SearchResult,
    SearchSpace,
    make_ranker,
    preset_seeds,
    schedule_features,
    search_schedule,
)
from scoredraw.diffusion.schedules import DiscreteAlphas, LinearBeta, NoiseSchedule
from scoredraw.diffusion.solver_schedules import SolverSchedule, solver_preset
from scoredraw.diffusion.unified_solver import SolutionError, UnifiedSolver
from scoredraw.errors import MissingExtraError, import_extra
from scoredraw.metrics import Estimate, mean_interval
from scoredraw.papers import digit_diffusion as digits
from scoredraw.papers.digit_diffusion import level, ratio, weakest
from scoredraw.papers.optuna_schedules import SAMPLERS, optuna_search
from scoredraw.papers.training import one_thread
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]

WIDE = "evolution with correctors and analytical first steps"
FID = {  # CIFAR-10, ScoreSDE, at 3, 4, 5, 6, 8 and 10 calls
    "DPM-Solver++": (91.2, 61.4, 28.4, 13.4, 5.33, 3.99),
    "UniPC": (93.5, 60.4, 23.6, 10.4, 5.16, 3.89),
    "DPM-Solver-v3": (139.8, 34.7, 12.7, 7.46, 3.94, 3.39),
    "S³, searched": (13.3, 6.81, 5.40, 4.05, 3.00, 2.70),
}
PEERS = {
    "DEIS": ("DEISMultistepScheduler", (1, 2, 3), {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", (2, 3), {"final_sigmas_type": "sigma_min"}),
    "UniPC": ("UniPCMultistepScheduler", (2, 3), {"final_sigmas_type": "sigma_min"}),
}
PEER_LEVELS: tuple[dict[str, bool], ...] = (
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
)  # fmt: skip
PLANE = (
    [0.45, 0.55],
    [[0.13, -0.13], [0.64, 0.1]],
    [np.diag([0.294, 0.324]), np.diag([0.232, 0.269])],
)
PICTURES, STAGE = 14, 20
NOTES = [
    (
        "The paper measures FID of trained networks on images; here it is the distance to the "
        "exact solution of the same equation, on 64 pixels. That a search beats its presets can be "
        "compared with the paper, by how much cannot. Its schedules also use the statistics of "
        "DPM-Solver-v3 and multipliers of a U-net's skips, which belong to networks: not searched."
    ),
    (
        "The predictor is not in the authors' repository; its form follows the paper, with trees "
        "in place of the LSTM in the search. The LSTM with its pairwise loss is compared as ranker."
    ),
    (
        "RMSE is carried by the few noises whose path passes near a border of components, so that "
        "64 of them tell schedules apart only roughly: much of what a search gains on its own "
        "noises is lost on others."
    ),
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    seeds: int
    evaluations: int
    calls: tuple[int, ...]
    searched: int = 64  # noises that schedules are scored on
    held_out: int = 448
    reference: int = 100
    doublings: tuple[int, ...] = (20, 40, 80, 160, 320)
    ranked: int = 150  # schedules that rankers learn from, and as many to be put in order
    peers: tuple[int, ...] = (5, 10, 20)
    pool: int = 200


PLANS = {
    "smoke": Plan(2, 4, (5,), 8, 8, 20, (10, 20, 40), 20, (), 20),
    "quick": Plan(4, 150, (5,), held_out=192, ranked=100, peers=(5, 10)),
    "full": Plan(8, 250, (5, 10)),
    "study": Plan(30, 1000, (3, 4, 5, 6, 8, 10, 15, 20), reference=400, ranked=500),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Search with every method, judge on other noises, and compare."""
    started = time.perf_counter()
    plan = PLANS[scale]
    report = Report(paper=26, scale=scale, seed=rng)
    add_convergence(report, plan)
    mixture = noises(LinearBeta(), plan, rng)
    for calls in plan.calls:
        trials = [Trials(mixture, seed, calls, plan, rng) for seed in range(plan.seeds)]
        report.claims.extend(search_claims(calls, trials))
        report.tables.extend([search_table(calls, trials, plan), preset_table(calls, trials)])
        report.figures.append(progress_figure(calls, trials))
        if calls == plan.calls[0]:
            add_rankers(report, plan, trials, rng)
            report.figures.append(picture_figure(mixture, trials[0], plan))
    if plan.peers:
        add_peers(report, plan, rng)
    columns = ["solver", *(f"{n} calls" for n in (3, 4, 5, 6, 8, 10))]
    rows: list[list[Cell]] = [[name, *values] for name, values in FID.items()]
    note = "Not measured here: the authors' networks on CIFAR-10, 50,000 images."
    report.tables.append(ReportTable("FID that the paper reports", columns, rows, note))
    report.notes.extend(NOTES)
    if not optimisers():
        report.notes.append("Left out, a general optimiser: optuna is not installed.")
    return replace(report, seconds=time.perf_counter() - started)


def noises(schedule: NoiseSchedule, plan: Plan, rng: int) -> digits.Mixture:
    """A block of noises a seed, with their exact solutions: those searched on come first."""
    count = plan.searched + plan.held_out
    return digits.Mixture(schedule, plan.seeds, count, plan.reference, rng)


def errors_on(mixture: digits.Mixture, seed: int, plan: Plan) -> tuple[SolutionError, ...]:
    """Two measures: on the noises to be searched on, and on the others."""
    x, exact, score = mixture.noises[seed], mixture.exact[seed], mixture.score
    n = plan.searched
    return tuple(
        SolutionError(score.eps, mixture.schedule, x[part], exact=exact[part])
        for part in (slice(0, n), slice(n, None))
    )


# ── orders of convergence ───────────────────────────────────────────────────────────────────────


def add_convergence(report: Report, plan: Plan) -> None:
    """Errors of orders 1 to 3 with and without free correctors, as steps double."""
    schedule = LinearBeta()
    score = GaussianMixtureScore(*PLANE, schedule)
    x = np.random.default_rng(26).standard_normal((64, 2))
    fine = DEISSolver(schedule, 5 * plan.reference, variant="rhork", tableau="4rk", grid="log")
    exact = SolutionError(score.eps, schedule, x, exact=fine.sample(score.eps, x))
    rows: list[list[Cell]] = []
    series = []
    for corrector in ("none", "pseudo"):
        for order in (1, 2, 3):
            for prediction in ("noise", "data"):
                errors = [
                    exact(solver_preset(
                        "dpm_solver", schedule, n, order=order, prediction=prediction,
                        corrector=corrector, lower_order_final=False,
                    ))
                    for n in plan.doublings
                ]  # fmt: skip
                last = np.log(plan.doublings[-3:])
                slope = float(-np.polyfit(last, np.log(errors[-3:]), 1)[0])
                name = f"{prediction}, order {order}" + (", corrected" * (corrector == "pseudo"))
                rows.append([name, *errors, slope])
                series.append(Series(name, [float(n) for n in plan.doublings], errors))
                wanted = order + (corrector == "pseudo")
                low, high = wanted - 0.5, wanted + (0.5 if order < 3 else 1.5)
                says = "order n; a corrector adds one; of 3, between 3 and 4"
                report.claims.append(
                    Claim.within(f"order of convergence, {name}", says, slope, low, high)
                )
    title = "Convergence in steps even in log SNR: RMSE, and the order of the last two doublings"
    columns = ["expansion", *(f"{n} steps" for n in plan.doublings), "order"]
    report.tables.append(
        ReportTable(title, columns, rows, "A mixture of two Gaussians, 64 noises.")
    )
    report.figures.append(Figure(
        "line", "Order of convergence", "steps", "RMSE to the exact solution", series,
        log_x=True, log_y=True,
    ))  # fmt: skip


# ── searching ───────────────────────────────────────────────────────────────────────────────────


class Trials:
    """The searches of one seed at one number of calls."""

    def __init__(
        self, mixture: digits.Mixture, seed: int, calls: int, plan: Plan, rng: int
    ) -> None:
        self.schedule, self.calls = mixture.schedule, calls
        self.search, self.held_out = errors_on(mixture, seed, plan)
        self.space = SearchSpace(calls, orders=(0.2, 0.4, 0.4), correctors=("none",))
        wide = SearchSpace(calls, first_steps=("none", "zero_x0"))
        choices: dict[str, Any] = {
            "evaluations": plan.evaluations, "held_out": self.held_out, "pool": plan.pool,
            "stage": STAGE, "rng": 1000 * rng + seed,
        }  # fmt: skip
        self.found: dict[str, SearchResult] = {
            method: search_schedule(
                self.search, self.schedule, self.space, method=method, **choices
            )
            for method in METHODS
        }
        self.found[WIDE] = search_schedule(self.search, self.schedule, wide, **choices)
        own = {name: choices[name] for name in ("evaluations", "held_out", "rng")}
        self.found |= {
            name: optuna_search(self.search, self.schedule, self.space, name, **own)
            for name in optimisers()
        }

    def ratios(self, method: str) -> tuple[float, float]:
        """Errors of what a method found, of the best preset's: on its own noises, on others."""
        one = self.found[method]
        assert one.held_out is not None
        return one.best.score / one.best_preset.score, one.held_out[0] / one.held_out[1]

    def so_far(self, method: str) -> Float:
        """The best score after each evaluation, of the best preset's."""
        scores = np.array([trial.score for trial in self.found[method].trials])
        return np.minimum.accumulate(scores) / self.found[method].best_preset.score


def optimisers() -> tuple[str, ...]:
    """Those of optuna, none where it is not installed."""
    return tuple(SAMPLERS) if find_spec("optuna") else ()


def held_out(trials: list[Trials], method: str, preset: bool = False) -> Float:
    """Errors of the schedule found, or of the best preset of its space, on the other noises."""
    found = [one.found[method].held_out for one in trials]
    return np.array([pair[int(preset)] for pair in found if pair is not None])


def search_claims(calls: int, trials: list[Trials]) -> list[Claim]:
    claims = []
    at = f"{calls} calls, held-out noises"
    said = "FID at 5 calls: UniPC 23.6, searched 5.40"
    for method in (*METHODS, WIDE, *optimisers()):
        gain = ratio(held_out(trials, method, preset=True), held_out(trials, method))
        name = f"{at}: error of the best preset in that of {method}'s schedule"
        claims.append(Claim.at_least(name, said, gain, 1.0))
    for worse, better, says in (
        ("random", "evolution", "the search is evolutionary"),
        ("evolution", "predictor", "the predictor saves evaluations"),
        *((other, better, "not in the paper: a general optimiser in the same space")
          for other in optimisers() for better in ("evolution", "predictor")),
    ):  # fmt: skip
        gain = ratio(held_out(trials, worse), held_out(trials, better))
        name = f"{at}: error of {worse}'s schedule in {better}'s, as many evaluations"
        claims.append(Claim.at_least(name, says, gain, 1.0))
    own = np.array([one.ratios("evolution") for one in trials])
    optimism = ratio(own[:, 1], own[:, 0])
    name = f"{calls} calls: what evolution gains on its own noises is more than on others"
    claims.append(Claim.at_least(name, "not in the paper", optimism, 1.0, "ratio at least 1"))
    return claims


def search_table(calls: int, trials: list[Trials], plan: Plan) -> ReportTable:
    rows: list[list[Cell]] = []
    for method in (*METHODS, WIDE, *optimisers()):
        own = np.array([one.found[method].best.score for one in trials])
        shares = np.array([one.ratios(method)[1] for one in trials])
        rows.append([method, level(own), level(held_out(trials, method)), level(shares)])
    for name, method in (("best preset", "evolution"), ("best preset, UniPC included", WIDE)):
        own = np.array([one.found[method].best_preset.score for one in trials])
        rows.append([name, level(own), level(held_out(trials, method, preset=True)), 1.0])
    note = (
        f"{plan.seeds} seeds of {plan.searched} noises searched on and {plan.held_out} held out; "
        f"{plan.evaluations} evaluations after the presets; geometric means. "
        "The best preset is chosen on the same noises, among those that the search starts from."
    )
    columns = ["search", "RMSE, searched on", "RMSE, held out", "of the best preset's"]
    return ReportTable(f"{calls} calls: what searches find", columns, rows, note)


def preset_table(calls: int, trials: list[Trials]) -> ReportTable:
    """The presets on held-out noises, best first."""
    rows: list[list[Cell]] = []
    for preset in preset_seeds(trials[0].schedule, SearchSpace(calls)):
        errors = level(np.array([one.held_out(preset) for one in trials]))
        about, kind = preset.about, preset.steps[0].prediction
        rows.append([about["preset"], kind, about["order"], about["grid"], errors])
    rows.sort(key=lambda row: row[-1].value if isinstance(row[-1], Estimate) else 0.0)
    columns = ["preset", "prediction", "order", "grid", "RMSE, held out"]
    return ReportTable(f"{calls} calls: presets", columns, rows)


def progress_figure(calls: int, trials: list[Trials]) -> Figure:
    series = []
    for method in (*METHODS, *optimisers()):
        mean = np.exp(np.mean([np.log(one.so_far(method)) for one in trials], axis=0))
        first = len(preset_seeds(trials[0].schedule, trials[0].space)) - 1
        x = np.arange(1, len(mean) + 1, dtype=np.float64)[first:]
        series.append(
            Series(method, x.tolist(), mean[first:].tolist(), baseline=method == "random")
        )
    caption = "Geometric mean over seeds, on the noises searched on: held-out gains are smaller."
    return Figure(
        "line", f"{calls} calls: best error so far, of the best preset's", "evaluations",
        "share of the best preset's RMSE", series, caption=caption,
    )  # fmt: skip


def picture_figure(mixture: digits.Mixture, trials: Trials, plan: Plan) -> Figure:
    """The same noises by the exact solution, the best preset and the searched schedule."""
    found = trials.found["predictor"]
    shown: dict[str, SolverSchedule] = {
        "best preset": found.best_preset.schedule, "searched": found.best.schedule,
    }  # fmt: skip
    part = slice(plan.searched, plan.searched + PICTURES)
    strips = [Picture("exact solution", digits.picture_strip(mixture.exact[0][part]))]
    for name, schedule in shown.items():
        made = UnifiedSolver(schedule, mixture.schedule).sample(
            mixture.score.eps, mixture.noises[0][part]
        )
        strips.append(Picture(f"{name}, {trials.calls} calls", digits.picture_strip(made)))
    return Figure("pictures", "Held-out noises", caption="Same noises.", pictures=strips)


# ── rankers ─────────────────────────────────────────────────────────────────────────────────────


class SequenceRanker:
    """The paper's predictor: an LSTM over the steps, a small network, and the pairwise hinge loss

    mean over pairs with score_i < score_j of max(0, margin - (f_j - f_i)).
    """

    def __init__(self, seed: int, width: int = 64, epochs: int = 80, margin: float = 0.1) -> None:
        self.torch, self.epochs, self.margin = import_extra("torch", "torch"), epochs, margin
        nn = self.torch.nn
        with self.torch.random.fork_rng(devices=[]):
            self.torch.manual_seed(seed)
            self.sequence = nn.LSTM(FEATURES, width, batch_first=True)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def _scores(self, X: Any) -> Any:
        steps = X.reshape(len(X), -1, FEATURES)
        x = self.torch.as_tensor((steps - self.centre) / self.spread, dtype=self.torch.float32)
        return self.head(self.sequence(x)[0][:, -1]).squeeze(-1)

    def fit(self, X: Any, y: Any) -> SequenceRanker:
        steps = X.reshape(len(X), -1, FEATURES)
        self.centre, self.spread = steps.mean(axis=(0, 1)), steps.std(axis=(0, 1)) + 1e-6
        worse = self.torch.as_tensor(y[None, :] > y[:, None])
        parameters = [*self.sequence.parameters(), *self.head.parameters()]
        optimiser = self.torch.optim.Adam(parameters, lr=5e-3)
        for _ in range(self.epochs):
            f = self._scores(X)
            gaps = (self.margin - (f[None, :] - f[:, None])).clamp(min=0)
            optimiser.zero_grad()
            gaps[worse].mean().backward()
            optimiser.step()
        return self

    def predict(self, X: Any) -> Any:
        with self.torch.no_grad():
            return self._scores(X).numpy().astype(np.float64)


def add_rankers(report: Report, plan: Plan, trials: list[Trials], rng: int) -> None:
    """Kendall's tau of what rankers predict for schedules that they have not seen."""
    kinds: dict[str, Any] = {"forest": "forest", "boosting": "boosting", "LSTM": SequenceRanker}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for seed, one in enumerate(trials):
        random = np.random.default_rng([rng, seed, 27])
        breeder, presets = Breeder(one.schedule, one.space), preset_seeds(one.schedule, one.space)
        made = [
            breeder.mutated(presets[int(random.integers(len(presets)))], random)
            for _ in range(2 * plan.ranked)
        ]
        X = schedule_features(made, one.schedule, one.calls)
        y = np.array([one.search(schedule) for schedule in made])
        y = np.argsort(np.argsort(y)) / len(y)
        n = plan.ranked
        for name, kind in kinds.items():
            with one_thread():
                ranker = make_ranker(kind, seed).fit(X[:n], y[:n])
            found[name].append(float(kendalltau(ranker.predict(X[n:]), y[n:])[0]))
    says = "a predictor ranks schedules, which saves evaluations"
    for name, values in found.items():
        tau = mean_interval(values)
        title = f"Kendall's tau of the {name} on {plan.ranked} unseen schedules"
        report.claims.append(Claim.at_least(title, says, tau, 0.3))


# ── the peers ───────────────────────────────────────────────────────────────────────────────────


def add_peers(report: Report, plan: Plan, rng: int) -> None:
    """Searched schedules beside diffusers' schedulers, each at its best, on a discrete schedule."""
    try:
        diffusers = import_extra("diffusers", "diffusion")
    except MissingExtraError as error:
        report.notes.append(f"diffusers' schedulers were not run: {error}.")
        return
    schedule = DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000))
    mixture = noises(schedule, plan, rng)
    rows: list[list[Cell]] = []
    gains: dict[int, Estimate] = {}
    for calls in plan.peers:
        ours: list[float] = []
        theirs: dict[str, list[float]] = {name: [] for name in PEERS}
        presets: list[float] = []
        for seed in range(plan.seeds):
            search, other = errors_on(mixture, seed, plan)
            found = search_schedule(
                search, schedule, SearchSpace(calls), evaluations=plan.evaluations,
                held_out=other, rng=1000 * rng + seed,
            )  # fmt: skip
            assert found.held_out is not None
            ours.append(found.held_out[0])
            presets.append(found.held_out[1])
            for name, errors in theirs.items():
                errors.append(peer_error(diffusers, name, calls, mixture, seed, plan))
        for name, errors in theirs.items():
            rows.append([calls, f"{name}, at its best", level(np.array(errors))])
        best = np.min(list(theirs.values()), axis=0)
        gains[calls] = ratio(best, np.array(ours), len(plan.peers))
        rows.append([calls, "our best preset", level(np.array(presets))])
        rows.append([calls, "searched", level(np.array(ours))])
    at, least = weakest(gains)
    name = "discrete schedule: error of the best of DEIS, DPM-Solver++, UniPC in the searched one's"
    rule = f"at least 1 at {', '.join(map(str, plan.peers))} calls at once; shown: {at} calls"
    says = "FID at 10 calls: UniPC 3.89, searched 2.70"
    report.claims.append(Claim.at_least(name, says, least, 1.0, rule))
    title = "Discrete DDPM schedule: RMSE to the exact solution on held-out noises"
    note = (
        "Theirs as diffusers has them: the best order on the best of even, Karras and exponential "
        "levels, chosen on the noises that are searched on. The last step ends at index 0."
    )
    report.tables.append(ReportTable(title, ["calls", "solver", "RMSE"], rows, note))


def peer_error(
    diffusers: Any, name: str, calls: int, mixture: digits.Mixture, seed: int, plan: Plan
) -> float:
    """Held-out error of a diffusers scheduler with the order and levels best on the others."""
    torch = import_extra("torch", "torch")
    kind, orders, end = PEERS[name]
    found = []
    for levels in PEER_LEVELS:
        for order in orders:
            scheduler = getattr(diffusers, kind)(solver_order=order, **levels, **end)
            scheduler.set_timesteps(calls)
            state = torch.from_numpy(mixture.noises[seed])
            for t in scheduler.timesteps:
                eps = torch.from_numpy(mixture.score.eps(state.numpy(), float(t)))
                state = scheduler.step(eps, t, state).prev_sample
            square = np.square(state.numpy() - mixture.exact[seed]).mean(axis=1)
            parts = square[: plan.searched], square[plan.searched :]
            found.append(tuple(float(np.sqrt(part.mean())) for part in parts))
    return min(pair for pair in found if np.isfinite(pair[0]))[1]
