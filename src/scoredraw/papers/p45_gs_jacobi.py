"""GS-Jacobi inversion of trained TarFlows: how few parallel passes give the sequential result.

The flows read the 8x8 digits as 16 patches: the one that ships, and others trained from their own
seeds. What is inverted is z = f(x) of held-out digits x with the flow's noise, so that the answer
is known and no prior sample overflows. Errors are root mean squares over pixels against the
token-by-token inverse. Sequential sampling takes 15 passes a block, 60 in all; every other plan is
charged for each of its passes, and for the tokens that these read. A plan is judged beside uniform
Jacobi with as many passes, and its choice of block beside every other choice. Intervals are over
flows. Wall-clock is the business of the benchmarks: at this size it says nothing.

Liu and Qin, "Accelerate TarFlow sampling with GS-Jacobi iteration", 2025, arXiv 2505.12849.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from scoredraw.diffusion.flow_inversion import SegmentPlan, plan_strategy
from scoredraw.diffusion.tarflow import SEQUENTIAL, FlowInverse, TarFlow
from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.papers import small_flow
from scoredraw.papers.digit_diffusion import Distances, each, level, picture_strip, ratio
from scoredraw.papers.small_flow import NOISE_STD, SHAPE, TRUNCATE
from scoredraw.reports import Cell, Claim, Figure, Picture, Report, ReportTable, Series

Float = NDArray[np.float64]
Ways = dict[str, SegmentPlan | Sequence[SegmentPlan]]

T, K = 16, SHAPE.blocks
SWEEPS = (1, 2, 3, 4, 6, 8, 10, 12, 15)
SEGMENTED = ((2, 2), (2, 4), (2, 6), (2, 8), (4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 2))
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
CLOSE = 1e-3  # RMSE, of pixels in [-1, 1]: an eighth of a grey level's hundredth
EXACT = 1e-12  # float64
ROUNDING = 1e-8  # smaller errors in float32 are no errors
SPEED_UP = 2.45  # the smallest that is published
BASE, EXTRA = 4, 6  # sweeps of all blocks, and of the one that is favoured
ALONE = 4  # sweeps of a block in isolation
PAPER = (  # strategy, seconds and FID of sequential sampling, and of GS-Jacobi
    ("ImageNet 128, conditional", "6-8-32-10", 133.19, 5.06, 29.41, 5.09),
    ("AFHQ 256", "7-8-32-10", 109.24, 13.60, 20.54, 13.73),
    ("ImageNet 64, unconditional", "0/6-8-32-20", 109.05, 14.67, 36.84, 14.80),
    ("ImageNet 64, conditional", "0/7-256/8-1/13-6", 12.16, 4.42, 4.97, 4.42),
)
WAYS = {
    "sequential": SEQUENTIAL,
    **{f"Jacobi, {k} sweeps": SegmentPlan(1, k, 0.0) for k in (2, 4, 6, 8)},
    "Jacobi, tolerance 1e-3": SegmentPlan(1, tol=1e-3),
}
NOTES = [
    (
        "The paper measures seconds on eight A800 for images of 256 to 1024 patches, and FID. Here "
        "passes are counted on 16 patches, and Fréchet distances are those of a digit classifier."
    ),
    "ImageNet 64, conditional: 12.16 s and 4.97 s make 2.45 times; the authors print 2.51.",
]


@dataclass(frozen=True)
class Plan:
    """How much of the experiment a scale runs."""

    trained: int
    steps: int
    digits: int = 128
    generated: int = 719
    metric_images: int = 1000
    epochs: int = 20
    segmented: tuple[tuple[int, int], ...] = SEGMENTED
    tolerances: tuple[float, ...] = TOLERANCES


PLANS = {
    "smoke": Plan(
        1, 2, digits=8, generated=24, metric_images=64, epochs=1,
        segmented=((2, 4), (4, 2), (4, 4)), tolerances=(1e-3,),
    ),
    "quick": Plan(2, 240, digits=32, generated=300),
    "full": Plan(4, 500),
    "study": Plan(16, 4000, digits=719),
}  # fmt: skip


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Train, invert in every way, and judge."""
    started = time.perf_counter()
    plan = PLANS[scale]
    seeds = [1000 * (rng + 1) + s for s in range(plan.trained)]
    flows = [small_flow.small_flow()]
    flows += each(lambda seed: small_flow.train_small_flow(plan.steps, seed), seeds)
    studies = each(lambda pair: Study(pair[1], plan, 100 * rng + pair[0]), list(enumerate(flows)))
    made = qualities(flows, plan, rng)
    report = Report(paper=45, scale=scale, seed=rng)
    report.claims.extend([
        *exactness_claims(studies), *pass_claims(studies), *metric_claims(studies),
        *allocation_claims(studies), *quality_claims(made),
    ])  # fmt: skip
    report.tables.extend([
        sweep_table(studies), segment_table(studies), plan_table(studies), block_table(studies),
        quality_table(made), paper_table(),
    ])  # fmt: skip
    report.figures.extend([pass_figure(studies), block_figure(studies), picture_figure(flows[0])])
    report.notes.extend(NOTES)
    report.notes.append(
        f"{len(flows)} flows: the one that ships and {plan.trained} trained for {plan.steps} steps."
    )
    return replace(report, seconds=time.perf_counter() - started)


def qualities(flows: Sequence[TarFlow], plan: Plan, rng: int) -> dict[str, Float]:
    """Distances to held-out digits and passes, (flows, 4), of every way from the same noise."""
    distances, data = Distances(rng, plan.epochs), small_flow.digit_images()[0]
    found: dict[str, list[Float]] = {}
    for i, flow in enumerate(flows):
        ways: Ways = {**WAYS, "by CRM": flow.plan(data[: plan.metric_images])}
        measured = small_flow.distances_by_way(flow, ways, plan.generated, distances, 100 * rng + i)
        for name, values in measured.items():
            found.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


# ── one flow ────────────────────────────────────────────────────────────────────────────────────


class Study:
    """Everything that is measured on one flow, with `digits` held-out digits.

    sweeps[k], segmented[G, k, refresh], tolerances[tol], plans[name]: (RMSE, passes, tokens).
    isolated[guess, k] (K,): error of each block alone, in standard deviations of what it returns.
    favoured (K,): RMSE where that block has EXTRA sweeps more than the others' BASE.
    """

    def __init__(self, flow: TarFlow, plan: Plan, seed: int) -> None:
        train, held_out = small_flow.digit_images()
        source = torch.Generator().manual_seed(seed)
        noisy = held_out[: plan.digits]
        noisy = noisy + NOISE_STD * torch.randn(noisy.shape, generator=source)
        data = train[: plan.metric_images]
        data = data + NOISE_STD * torch.randn(data.shape, generator=source)
        self.flow, self.metrics = flow, flow.metrics(data)
        with torch.no_grad():
            self.passed, _ = flow.trace(noisy)
        self.z = self.passed[-1]
        self.exact = flow.inverse(self.z)
        self.crm, self.igm_z, self.igm_zero = (
            np.array([one[name] for one in self.metrics]) for name in ("crm", "igm_z", "igm_zero")
        )
        self.sweeps = {k: self.cost(SegmentPlan(1, k, 0.0)) for k in SWEEPS}
        self.segmented = {
            (G, k, refresh): self.cost(SegmentPlan(G, k, 0.0, refresh=refresh))
            for G, k in SEGMENTED
            for refresh in (False, True)
            if (G, k) in plan.segmented
        }
        self.tolerances = {tol: self.cost(SegmentPlan(1, tol=tol)) for tol in plan.tolerances}
        self.clamped = self.cost(SegmentPlan(1, tol=0.0, clamp=3.0, clamp_finished=True))
        self.isolated = {
            (guess, k): self.alone(guess, k) for guess in ("z", "zero") for k in (1, 2, ALONE)
        }
        self.favoured = np.array([
            self.cost([SegmentPlan(1, BASE + EXTRA * (i == b), 0.0) for i in range(K)])[0]
            for b in range(K)
        ])  # fmt: skip
        self.plans = self.compare_plans()
        self.in_doubles = self.exactness()

    def error(self, found: FlowInverse) -> float:
        """RMSE of pixels to the token-by-token inverse."""
        error = float((found.images - self.exact.images).square().mean().sqrt())
        return max(error, ROUNDING)

    def cost(self, plans: SegmentPlan | Sequence[SegmentPlan]) -> tuple[float, int, int]:
        """RMSE, passes and tokens of a plan."""
        found = self.flow.inverse(self.z, plans)
        return self.error(found), found.passes, sum(block.tokens for block in found.blocks)

    def alone(self, guess: str, k: int) -> Float:
        """k sweeps of each block from its exact z."""
        errors = []
        for i, block in enumerate(self.flow.blocks):
            x = self.passed[i]
            got = block.inverse(self.passed[i + 1], SegmentPlan(1, k, 0.0, guess)).x
            error = float((got - x).square().mean().sqrt() / x.std())
            errors.append(max(error, ROUNDING))
        return np.array(errors)

    def compare_plans(self) -> dict[str, tuple[float, int, int]]:
        """The rule's plan, the same for every other block, and uniform Jacobi of as many passes."""
        own = [replace(p, tol=0.0) for p in plan_strategy(self.metrics, T)]
        top = int(self.crm.argmax())
        tough = next((p for p in own if p.segments > 1), own[top])
        easy = next((p for p in own if p.segments == 1), own[top])
        guesses = [p.init for p in own]
        costs = {"by CRM": self.cost(own)}
        for b in range(K):
            there = [replace(tough if i == b else easy, init=guesses[i]) for i in range(K)]
            costs[f"block {b}"] = self.cost(there)
        total = costs["by CRM"][1]
        uniform = [SegmentPlan(1, max(1, (total + i) // K), 0.0) for i in range(K)]
        costs["uniform"] = self.cost(uniform)
        return costs

    def exactness(self) -> dict[str, float]:
        """Largest error in float64 where the theory says that there is none."""
        double = TarFlow(SHAPE)
        double.load_state_dict(self.flow.state_dict())
        double = double.double().requires_grad_(False)
        z = self.z.double()
        exact = double.inverse(z).images
        plans = {f"GS {G}": SegmentPlan(G, T // G, 0.0) for G in (2, 4, 8)}
        plans |= {
            "Jacobi": SegmentPlan(1, T - 1, 0.0),
            "one sweep less": SegmentPlan(1, T - 2, 0.0),
        }
        found = {name: double.inverse(z, plan).images for name, plan in plans.items()}
        return {name: float((x - exact).abs().max()) for name, x in found.items()}

    def fewest(self, bound: float = CLOSE) -> tuple[int, int]:
        """Passes of the fewest uniform sweeps, and of the loosest tolerance, within the bound."""
        uniform = min(passes for error, passes, _ in self.sweeps.values() if error <= bound)
        close = [passes for error, passes, _ in self.tolerances.values() if error <= bound]
        return uniform, min(close, default=self.exact.passes)


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


def errors(studies: Sequence[Study], k: int) -> Float:
    """RMSE of k uniform sweeps, (flows,)."""
    return np.array([one.sweeps[k][0] for one in studies])


def exactness_claims(studies: Sequence[Study]) -> list[Claim]:
    """What is proved, in float64, and how errors fall."""
    worst = {name: max(one.in_doubles[name] for one in studies) for name in studies[0].in_doubles}
    says = "Jacobi is exact after T - 1 sweeps (proved)"
    name = f"Jacobi, {T - 1} sweeps, float64: largest error of a pixel"
    claims = [Claim.at_most(name, says, worst["Jacobi"], EXACT)]
    least = min(one.in_doubles["one sweep less"] for one in studies)
    name = f"Jacobi, {T - 2} sweeps: smallest of the flows' largest errors"
    claims.append(Claim.at_least(name, "one sweep less is not exact", least, EXACT))
    for G in (2, 4, 8):
        says = "T/G sweeps a segment are exact"
        name = f"GS-Jacobi, {G} segments of {T // G} sweeps, float64: largest error"
        claims.append(Claim.at_most(name, says, worst[f"GS {G}"], EXACT))
    early = np.log(errors(studies, 4) / errors(studies, 1)) / 3
    late = np.log(errors(studies, 12) / errors(studies, 8)) / 4
    gain = ratio(np.exp(early), np.exp(late))
    name = "error kept by a sweep, sweeps 1 to 4 over sweeps 8 to 12"
    claims.append(Claim.at_least(name, "convergence is superlinear", gain, 1.0))
    return claims


def pass_claims(studies: Sequence[Study]) -> list[Claim]:
    """How few passes are near enough, and what segments are worth."""
    says = "about T/2 sweeps or fewer are near enough"
    half = level(errors(studies, T // 2))
    claims = [Claim.at_most(f"RMSE after {T // 2} sweeps of each block", says, half, CLOSE)]
    says = "2.45 to 5.32 times faster in seconds, with T = 256 to 1024"
    for i, how in enumerate(("uniform sweeps", "a tolerance for each block")):
        gains = mean_interval([one.exact.passes / one.fewest()[i] for one in studies])
        name = f"passes saved at RMSE {CLOSE:g} by {how}: sequential over fewest"
        claims.append(Claim.at_least(name, says, gains, SPEED_UP))
    says = "cutting a block into segments makes it converge where Jacobi is slow"
    for G, k, same, what in (
        (2, 4, 8, "passes"), (4, 2, 8, "passes"),
        (2, 4, 4, "tokens"), (4, 2, 2, "tokens"), (4, 4, 4, "tokens"),
    ):  # fmt: skip
        segmented = np.array([one.segmented[G, k, False][0] for one in studies])
        gain = ratio(errors(studies, same), segmented)
        name = f"{G} segments of {k} sweeps against {same} sweeps, as many {what}: RMSE ratio"
        claims.append(Claim.at_least(name, says, gain, 1.0))
    return claims


def metric_claims(studies: Sequence[Study]) -> list[Claim]:
    """Whether the two metrics tell beforehand what the sweeps find."""
    alone = [one.isolated["z", ALONE] for one in studies]
    right = sum(int(one.crm.argmax() == e.argmax()) for one, e in zip(studies, alone, strict=True))
    name = f"CRM's largest block is the one with the largest error alone, {ALONE} sweeps"
    says, found = "CRM finds the tough blocks", f"{right} of {len(studies)} flows"
    claims = [Claim.judge(name, says, found, "in all flows", right == len(studies))]
    ranks = rank_correlations(studies)
    says = "CRM ranks the blocks by how they converge"
    name = "Spearman correlation of CRM with the blocks' errors"
    claims.append(Claim.at_least(name, says, mean_interval(ranks["CRM"]), 0.8))
    for rival in ("IGM(z)", "block index"):
        gap = paired_difference(ranks["CRM"], ranks[rival])
        name = f"Spearman correlation with the blocks' errors: CRM minus {rival}"
        claims.append(Claim.at_least(name, says, gap, 0.0))
    for k in (1, 2):
        gains = np.stack([guess_gain(one, k) for one in studies])
        name = f"error of the guess with the larger IGM in that of the other, {k} sweeps"
        says = "the guess with the smaller IGM is the better one"
        claims.append(Claim.at_least(name, says, level(np.exp(gains.mean(axis=1))), 1.0))
    return claims


def rank_correlations(studies: Sequence[Study]) -> dict[str, Float]:
    """Of each predictor with the blocks' errors alone, (flows,)."""
    found: dict[str, list[float]] = {}
    for one in studies:
        predictors = {"CRM": one.crm, "IGM(z)": one.igm_z, "block index": np.arange(K)}
        for name, values in predictors.items():
            rank = spearmanr(values, one.isolated["z", ALONE])[0]
            found.setdefault(name, []).append(float(rank))
    return {name: np.array(values) for name, values in found.items()}


def guess_gain(one: Study, k: int) -> Float:
    """log(error of the guess that IGM advises against / of the other), (K,)."""
    gain = np.log(one.isolated["zero", k] / one.isolated["z", k])
    return np.where(one.igm_z <= one.igm_zero, gain, -gain)


def allocation_claims(studies: Sequence[Study]) -> list[Claim]:
    """What the choice of the block is worth, at equal passes."""
    top = np.array([int(one.crm.argmax()) for one in studies])
    chosen = np.array([one.favoured[b] for one, b in zip(studies, top, strict=True)])
    random = np.array([np.exp(np.log(one.favoured).mean()) for one in studies])
    says = "the block with the largest CRM is where passes pay"
    name = f"{EXTRA} more sweeps than {BASE}: RMSE with a random block in that with CRM's block"
    claims = [Claim.at_least(name, says, ratio(random, chosen), 1.0)]
    first = np.array([one.favoured[K - 1] for one in studies])
    same = int((top == K - 1).sum())
    name = f"{EXTRA} more sweeps than {BASE}: the block inverted first against CRM's block"
    gain = ratio(first, chosen)
    found = f"RMSE ratio {gain}; the same block in {same} of {len(top)} flows"
    rule = "above 1; undecided where it is the same block in all flows"
    better = True if gain.above(1) else False if gain.below(1) else None
    claims.append(Claim.judge(name, says, found, rule, better))
    own, uniform = (np.array([one.plans[p][0] for one in studies]) for p in ("by CRM", "uniform"))
    name = "the plan by CRM against uniform sweeps, as many passes: RMSE ratio"
    says = "tough blocks get segments, the others few sweeps"
    claims.append(Claim.at_least(name, says, ratio(uniform, own), 1.0))
    others = np.array([
        np.exp(np.mean([np.log(one.plans[f"block {b}"][0]) for b in range(K)])) for one in studies
    ])  # fmt: skip
    name = "the plan by CRM against the same for a random block: RMSE ratio"
    claims.append(Claim.at_least(name, says, ratio(others, own), 1.0))
    return claims


def quality_claims(made: dict[str, Float]) -> list[Claim]:
    """Whether images are as good, and at how many passes."""
    exact = made["sequential"][:, 0]
    claims = []
    for name in ("by CRM", "Jacobi, tolerance 1e-3"):
        change = mean_interval(made[name][:, 0] / exact - 1)
        title = f"{name}: change of the Fréchet distance, as a share"
        says = "FID 5.06 to 5.09, 13.60 to 13.73, 14.67 to 14.80, 4.42 to 4.42: at most 1 %"
        claims.append(Claim.within(title, says, change, -0.01, 0.01))
    passes = made["sequential"][:, 3].copy()
    for values in made.values():
        good = values[:, 0] <= 1.01 * exact
        passes = np.where(good, np.minimum(passes, values[:, 3]), passes)
    gain = mean_interval(made["sequential"][:, 3] / passes)
    title = "passes saved where the Fréchet distance is at most 1 % larger"
    says = "2.45 to 5.32 times faster in seconds, with T = 256 to 1024"
    claims.append(Claim.at_least(title, says, gain, SPEED_UP))
    return claims


# ── tables and figures ──────────────────────────────────────────────────────────────────────────


def sweep_table(studies: Sequence[Study]) -> ReportTable:
    rows: list[list[Cell]] = [[f"{k} sweeps", k * K, level(errors(studies, k))] for k in SWEEPS]
    for tol in studies[0].tolerances:
        costs = np.array([one.tolerances[tol][:2] for one in studies])
        rows.append([f"tolerance {tol:g}", mean_interval(costs[:, 1]), level(costs[:, 0])])
    passes, found = np.array([one.clamped[1::-1] for one in studies]).T
    rows.append(["all tokens clamped to 3, as published", mean_interval(passes), level(found)])
    note = f"Sequential: {K * (T - 1)} passes. Geometric means over flows, 95 % intervals."
    return ReportTable("Uniform Jacobi", ["plan", "passes", "RMSE"], rows, note)


def segment_table(studies: Sequence[Study]) -> ReportTable:
    rows: list[list[Cell]] = []
    for G, k in sorted({key[:2] for key in studies[0].segmented}):
        row: list[Cell] = [G, k]
        for refresh in (False, True):
            costs = [one.segmented[G, k, refresh] for one in studies]
            row += [costs[0][1], costs[0][2], level(np.array([c[0] for c in costs]))]
        rows.append(row)
    columns = ["segments", "sweeps", "passes", "tokens", "RMSE"]
    columns += [f"{name}, refreshed" for name in columns[2:]]
    note = f"Sequential reads {K * (T - 1)} tokens; k sweeps of Jacobi {K * (T - 1)} k."
    return ReportTable("Segments in all blocks", columns, rows, note)


def plan_table(studies: Sequence[Study]) -> ReportTable:
    rows: list[list[Cell]] = []
    for name in studies[0].plans:
        costs = np.array([one.plans[name] for one in studies])
        rows.append([f"plan, {name}", mean_interval(costs[:, 1]), level(costs[:, 0])])
    for b in range(K):
        values = np.array([one.favoured[b] for one in studies])
        rows.append([f"{BASE} sweeps, block {b} {BASE + EXTRA}", BASE * K + EXTRA, level(values)])
    note = "Block b has the tough block's share, whatever CRM says; the last is inverted first."
    return ReportTable("Who gets the passes", ["plan", "passes", "RMSE"], rows, note)


def block_table(studies: Sequence[Study]) -> ReportTable:
    rows: list[list[Cell]] = []
    for b in range(K):
        share = mean_interval([one.crm[b] / one.crm.sum() for one in studies])
        metrics: list[Cell] = [
            mean_interval([getattr(one, name)[b] for one in studies])
            for name in ("crm", "igm_z", "igm_zero")
        ]
        alone: list[Cell] = [
            level(np.array([one.isolated[guess, k][b] for one in studies]))
            for guess, k in (("z", 1), ("zero", 1), ("z", ALONE))
        ]
        rows.append([b, share, *metrics, *alone])
    columns = ["block", "share of CRM", "CRM", "IGM(z)", "IGM(0)"]
    columns += ["error alone, z, 1 sweep", "zero, 1 sweep", f"z, {ALONE} sweeps"]
    ranks = ", ".join(
        f"{name} {mean_interval(values)}" for name, values in rank_correlations(studies).items()
    )
    note = f"Each block from its exact z. Spearman with the last column: {ranks}."
    return ReportTable("Metrics and errors of each block alone", columns, rows, note)


def quality_table(made: dict[str, Float]) -> ReportTable:
    exact = made["sequential"]
    rows: list[list[Cell]] = []
    for name, values in made.items():
        change = mean_interval(values[:, 0] / exact[:, 0] - 1)
        rows.append([name, mean_interval(values[:, 3]),
                     *(mean_interval(values[:, j]) for j in range(3)), change])  # fmt: skip
    columns = ["plan", "passes", *Distances.names, "change of Fréchet"]
    note = f"Prior noise truncated at {TRUNCATE:g}, the same for all; images denoised."
    return ReportTable("Distances of images to held-out digits", columns, rows, note)


def paper_table() -> ReportTable:
    rows: list[list[Cell]] = [
        [*row, round(row[2] / row[4], 2), f"{row[5] / row[3] - 1:.1%}"] for row in PAPER
    ]
    columns = [
        "model",
        "strategy",
        "sequential, s",
        "FID",
        "GS-Jacobi, s",
        "FID'",
        "times",
        "FID +",
    ]
    return ReportTable("As published", columns, rows, "Eight A800, seconds a batch.")


def line(name: str, found: Sequence[tuple[float, int, int]], *, baseline: bool = False) -> Series:
    """RMSE by passes, of one flow."""
    return Series(name, [float(c[1]) for c in found], [c[0] for c in found],
                  baseline=baseline)  # fmt: skip


def pass_figure(studies: Sequence[Study]) -> Figure:
    one = studies[0]
    series = [line("Jacobi", list(one.sweeps.values()), baseline=True)]
    for G in (2, 4, 8):
        found = [cost for (g, _, again), cost in one.segmented.items() if g == G and not again]
        series.append(line(f"{G} segments", found))
    series.append(line("tolerance", list(one.tolerances.values())))
    return Figure(
        "line", "Error against passes, the flow that ships", "passes of all blocks",
        "RMSE to the sequential result", series, log_y=True,
        caption=f"Sequential sampling takes {K * (T - 1)} passes.",
    )  # fmt: skip


def block_figure(studies: Sequence[Study]) -> Figure:
    series = [
        Series(f"block {b}", [float(one.crm[b]) for one in studies],
               [float(one.isolated["z", ALONE][b]) for one in studies])
        for b in range(K)
    ]  # fmt: skip
    return Figure(
        "scatter", "CRM and the error of a block alone", "CRM", f"error after {ALONE} sweeps",
        series, log_y=True, caption="A point a flow.",
    )  # fmt: skip


def picture_figure(flow: TarFlow) -> Figure:
    strips = []
    for name in ("sequential", *(f"Jacobi, {k} sweeps" for k in (2, 4, 8))):
        images, _ = small_flow.generate(14, flow, plans=WAYS[name], seed=45)
        strips.append(Picture(name, picture_strip(images.reshape(len(images), -1))))
    return Figure("pictures", "The same noise in few sweeps", caption="Denoised.", pictures=strips)
