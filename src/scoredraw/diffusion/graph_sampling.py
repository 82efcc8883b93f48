"""Sampling graphs from two partial scores: predictor-corrector, and S4 at half the price.

N steps lead from noise at t = 1 to data. With s = (s_X, s_A), the scores at the current graph,

    Langevin     v <- v + h s + sqrt(2h) eta z,   h = 2 damping (snr |z| / |s|)²
    Euler        v <- v - (f v - g² s)/N + g z/sqrt(N)
    Reverse      v <- v - (change v - gain s) + sqrt(gain) z     (one step of the discrete chain)

for v = X and v = A at once, neither seeing the other's new value. Predictor-corrector runs one
Langevin step and one Euler or Reverse step, and so asks for the scores twice. S4 asks once, and
splits the equation (Lie-Trotter within a Langevin step, symmetric in the linear part):

    Langevin with s;   half a step of dx = f x dt + g dw, exact;   v <- v + g²(t) s/N with the
    same s;   the other half.

|z| and |s| are norms of a graph's entries, averaged over the batch: the company that a graph is
sampled in has a say in its steps. What is returned is the last step's mean, without its noise.

Langevin at eta = 1 and small snr leaves the diffused distribution as it is. The paper's settings
(eta 0.7; snr 0.15) don't: they sharpen, and take some 40 % off every variance of Gaussian data.

Jo, Lee and Hwang, ICML 2022, arXiv 2202.02514. Predictor-corrector: Song et al. 2021, arXiv
2011.13456.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoredraw.diffusion.graph_arrays import check_flags, checked_graphs, mask_edges, mask_nodes
from scoredraw.diffusion.graph_system import (
    COUPLINGS,
    TRANSITIONS,
    GraphSDESystem,
    Pair,
    Score,
    blank,
    discrete_step,
    edge_noise,
    node_noise,
    transition,
)
from scoredraw.diffusion.time_grids import whole
from scoredraw.errors import InputError, require

METHODS = ("s4", "pc")
PREDICTORS = ("euler", "reverse")
CORRECTORS = ("langevin", None)
END = 1e-4  # of the times at which scores are asked for
ASYMMETRY = 1e-4  # of a score of adj, beside its largest entry, that counts as rounding

Noise = Callable[[int], Tensor]  # of part 0, x, or of part 1, adj
Scores = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class GraphState:
    """Where a solver stands: graphs (x, adj) before step `index`, and the last step's means."""

    x: Tensor
    adj: Tensor
    flags: Tensor
    mean_x: Tensor
    mean_adj: Tensor
    index: int

    @property
    def parts(self) -> Pair:
        """(x, adj)."""
        return self.x, self.adj


class GraphSample(NamedTuple):
    """Real-valued graphs x (B, N, F), adj (B, N, N), and how often scores were asked for."""

    x: Tensor
    adj: Tensor
    nfe: int


class GraphSolver:
    """N steps of S4 or of predictor-corrector sampling, one by one by `init` and `step`.

    system: the two processes. method: "s4" or "pc". For "pc": predictor "euler" or "reverse";
    n_corrections Langevin steps before each, a pair of scores each; probability_flow=True drops
    the predictor's noise and halves its score (the released Euler predictor crashes there).
    corrector: "langevin" or None. snr, scale_eps: Langevin's signal-to-noise ratio and eta.
    transition (S4): "exact", or "code" for the released spread (see `transition`), which also runs
    past t = 0 in its last step, where "exact" stops at 0.

    Score functions take (x, adj, flags, t), t a float; one that is None leaves its part as it is.
    Their answers are masked and adj's is symmetrised.

    Raises InputError for options outside these, and during the steps for scores of another shape,
    an asymmetric one of adj, and NaN or infinity, naming the step. Memory: a few copies of the
    batch. Sequential in the steps; graphs of a batch share their step sizes. Jo et al. 2022.

    >>> solver = GraphSolver(GraphSDESystem(), 5, corrector=None)
    >>> solver.nfe, GraphSolver(GraphSDESystem(), 5, "pc").nfe
    (5, 10)
    """

    def __init__(
        self,
        system: GraphSDESystem,
        n_steps: int = 1000,
        method: str = "s4",
        *,
        predictor: str = "euler",
        corrector: str | None = "langevin",
        n_corrections: int = 1,
        snr: float = 0.15,
        scale_eps: float = 0.7,
        transition: str = "exact",
        probability_flow: bool = False,
    ) -> None:
        steps = whole(n_steps, "n_steps", 1)
        for name, value, choices in (
            ("method", method, METHODS),
            ("predictor", predictor, PREDICTORS),
            ("corrector", corrector, CORRECTORS),
            ("transition", transition, TRANSITIONS),
        ):
            require(value in choices, name, repr(value), f"one of {', '.join(map(str, choices))}")
        corrections = whole(n_corrections, "n_corrections", 1)
        split = method == "s4"
        require(corrections == 1 or not split, "n_corrections", corrections, "1 for s4")
        require(not (split and probability_flow), "probability_flow", True, "False for s4")
        require(0 < snr < math.inf, "snr", snr, "a positive number")
        require(0 <= scale_eps < math.inf, "scale_eps", scale_eps, "a number >= 0")
        self.system, self.n_steps, self.method = system, steps, method
        self.predictor, self.corrector, self.n_corrections = predictor, corrector, corrections
        self.snr, self.scale_eps = float(snr), float(scale_eps)
        self.transition, self.probability_flow = transition, probability_flow
        self.times = np.linspace(1.0, END, steps)
        if corrector is not None or (not split and predictor == "reverse"):
            for schedule in system.parts:  # too few steps are refused here
                discrete_step(schedule, 1.0, steps)

    @property
    def nfe(self) -> int:
        """How often a run asks for the scores."""
        again = self.n_corrections if self.corrector and self.method == "pc" else 0
        return self.n_steps * (1 + again)

    def init(self, x: Tensor, adj: Tensor, flags: Tensor) -> GraphState:
        """The state at t = 1; raises InputError for what `checked_graphs` refuses."""
        checked_graphs(x, adj, flags)
        return GraphState(x, adj, flags, x, adj, 0)

    def step(
        self, state: GraphState, score_x: Score | None, score_adj: Score | None, noise: Noise
    ) -> GraphState:
        """The state one time further on. noise(0) is the next noise of x, noise(1) of adj."""
        i = state.index
        require(i < self.n_steps, "state", f"one after the last of {i} steps", "an earlier one")
        move = self._split_step if self.method == "s4" else self._predict_and_correct
        parts, means = move(state, (score_x, score_adj), noise)
        for name, mean in zip(("x", "adj"), means, strict=True):
            check_finite(name, mean, i)
        return replace(
            state, x=parts[0], adj=parts[1], mean_x=means[0], mean_adj=means[1], index=i + 1
        )

    def _split_step(
        self, state: GraphState, functions: tuple[Score | None, Score | None], noise: Noise
    ) -> tuple[Pair, Pair]:
        t, h = float(self.times[state.index]), 1 / self.n_steps
        scores = self._evaluate(functions, state.parts, state, t)
        parts = state.parts
        if self.corrector is not None:
            parts = self._langevin(parts, scores, t, noise)
        end = max(t - h, 0.0) if self.transition == "exact" else t - h
        middle = (t + end) / 2
        parts, _ = self._linear(parts, scores, t, middle, noise)
        gains = [float(schedule.diffusion(t)) * (t - end) for schedule in self.system.parts]
        parts = pair(
            v if s is None else v + gain * s
            for v, s, gain in zip(parts, scores, gains, strict=True)
        )
        return self._linear(parts, scores, middle, end, noise)

    def _linear(
        self, parts: Pair, scores: Scores, t: float, end: float, noise: Noise
    ) -> tuple[Pair, Pair]:
        """Both parts moved by the linear process from t to end, and their means."""
        kernels = [transition(schedule, t, end, self.transition) for schedule in self.system.parts]
        means = pair(
            v if s is None else kernel.mean * v
            for v, s, kernel in zip(parts, scores, kernels, strict=True)
        )
        stds = [kernel.std for kernel in kernels]
        return add_noise(means, scores, stds, noise), means

    def _predict_and_correct(
        self, state: GraphState, functions: tuple[Score | None, Score | None], noise: Noise
    ) -> tuple[Pair, Pair]:
        t = float(self.times[state.index])
        parts = state.parts
        if self.corrector is not None:
            parts = self._correct(parts, functions, state, t, noise)
        scores = self._evaluate(functions, parts, state, t)
        weight = 0.5 if self.probability_flow else 1.0
        means, stds = list(parts), [0.0, 0.0]
        for k, (v, s, schedule) in enumerate(zip(parts, scores, self.system.parts, strict=True)):
            if s is None:
                continue
            if self.predictor == "euler":
                change = float(schedule.drift(t)) / self.n_steps
                gain = float(schedule.diffusion(t)) / self.n_steps
            else:
                change, gain, _ = discrete_step(schedule, t, self.n_steps)
            means[k] = v - (change * v - weight * gain * s)
            stds[k] = math.sqrt(gain)
        found = pair(means)
        if self.probability_flow:
            return found, found
        return add_noise(found, scores, stds, noise), found

    def _correct(
        self,
        parts: Pair,
        functions: tuple[Score | None, Score | None],
        state: GraphState,
        t: float,
        noise: Noise,
    ) -> Pair:
        """All Langevin steps of x beside the old adj, and of adj beside the old x."""
        if self.n_corrections == 1:
            return self._langevin(parts, self._evaluate(functions, parts, state, t), t, noise)
        corrected = list(parts)
        for k, function in enumerate(functions):
            only: tuple[Score | None, Score | None] = (
                (function, None) if k == 0 else (None, function)
            )
            now = parts
            for _ in range(self.n_corrections):
                now = self._langevin(now, self._evaluate(only, now, state, t), t, noise)
            corrected[k] = now[k]
        return pair(corrected)

    def _langevin(self, parts: Pair, scores: Scores, t: float, noise: Noise) -> Pair:
        moved = list(parts)
        for k, (v, s, schedule) in enumerate(zip(parts, scores, self.system.parts, strict=True)):
            if s is None:
                continue
            z = noise(k)
            damping = discrete_step(schedule, t, self.n_steps).damping
            size = langevin_size(s, z, self.snr, damping)
            moved[k] = v + size * s + (2 * size).sqrt() * self.scale_eps * z
        return pair(moved)

    def _evaluate(
        self,
        functions: tuple[Score | None, Score | None],
        parts: Pair,
        state: GraphState,
        t: float,
    ) -> Scores:
        """Both scores at the graphs `parts`, checked, masked, and adj's symmetrised."""
        found: list[Tensor | None] = []
        for k, (name, function) in enumerate(zip(("score_x", "score_adj"), functions, strict=True)):
            if function is None:
                found.append(None)
                continue
            score = function(*parts, state.flags, t)
            shape, wanted = tuple(score.shape), tuple(parts[k].shape)
            require(shape == wanted, name, f"shape {shape} at step {state.index}", f"{wanted}")
            score = mask_edges(score, state.flags) if k else mask_nodes(score, state.flags)
            check_finite(name, score, state.index)
            found.append(symmetric(score, state.index) if k else score)
        return found[0], found[1]


def langevin_size(score: Tensor, noise: Tensor, snr: float, damping: float) -> Tensor:
    """2 damping (snr |z| / |s|)², with norms averaged over the batch; 0 where the score is 0.

    >>> langevin_size(torch.full((1, 2), 2.0), torch.ones(1, 2), 0.5, 1.0).item()
    0.125
    """
    length = score.flatten(1).norm(dim=1).mean()
    ratio = snr * noise.flatten(1).norm(dim=1).mean() / length
    return torch.where(length > 0, 2 * damping * ratio.square(), torch.zeros_like(length))


def add_noise(means: Pair, scores: Scores, stds: list[float], noise: Noise) -> Pair:
    """The means with noise on the parts that move, x first."""
    return pair(
        mean if s is None else mean + std * noise(k)
        for k, (mean, s, std) in enumerate(zip(means, scores, stds, strict=True))
    )


def symmetric(score: Tensor, step: int) -> Tensor:
    """(s + sᵀ)/2, once s has been found to be symmetric up to rounding."""
    least = ASYMMETRY * float(score.abs().max())
    fine = float((score - score.mT).abs().max()) <= least
    require(fine, "score_adj", f"an asymmetric answer at step {step}", "a symmetric one")
    return (score + score.mT) / 2


def check_finite(name: str, values: Tensor, step: int) -> None:
    if not bool(torch.isfinite(values).all()):
        wanted = "finite values; train longer, or take more steps"
        raise InputError(f"{name}: got NaN or infinity at step {step}, want {wanted}")


def pair(parts: Iterable[Tensor]) -> Pair:
    x, adj = parts
    return x, adj


def sample_graphs(
    score_x: Score | None,
    score_adj: Score | None,
    flags: Tensor,
    n_features: int,
    system: GraphSDESystem,
    method: str = "s4",
    *,
    predictor: str = "euler",
    corrector: str | None = "langevin",
    n_corrections: int = 1,
    n_steps: int = 1000,
    snr: float = 0.15,
    scale_eps: float = 0.7,
    transition: str = "exact",
    probability_flow: bool = False,
    coupling: str = "joint",
    start: Pair | None = None,
    noises: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> GraphSample:
    """Whole graphs from the partial scores of (X, A): real-valued; see `quantize_adjacency`.

    score_x, score_adj: functions of (x, adj, flags, t), such as `GraphSDESystem.scores` makes of
    networks. flags (B, N): 1 for the nodes of each graph; their dtype and device are the sample's.
    start: graphs at t = 1, default the prior (with the paper's betas, which leave 0.76 of the
    signal at t = 1, the prior is too wide or too narrow; start from noised data to be exact).
    noises: tensors to use in place of drawn ones, in the order they are consumed: x before adj in
    the corrector, then in the predictor, or in either half of S4's linear move.
    coupling: "joint"; "independent" (the scores were learned apart); "sequential": all steps for x
    beside a blank adj, then all for adj beside the finished x; "adjacency": x stays blank (ones)
    and score_x is not used. The other options are those of `GraphSolver`.

    Returns (x, adj, nfe): nfe counts the times at which scores are asked for, N for S4 and
    N (1 + n_corrections) for pc, and twice that for "sequential", one network at a time.
    Raises InputError as `GraphSolver` does, and for a missing score.
    Time nfe networks; memory a few batches. Jo, Lee and Hwang 2022, arXiv 2202.02514.

    >>> gaussian = GraphSDESystem().scores(lambda x, a, f: 0.6 * x, lambda x, a, f: 0.6 * a)
    >>> sample = sample_graphs(*gaussian, torch.ones(2, 4), 3, GraphSDESystem(), n_steps=20)
    >>> sample.adj.shape, bool((sample.adj == sample.adj.mT).all()), sample.nfe
    (torch.Size([2, 4, 4]), True, 20)
    """
    require(coupling in COUPLINGS, "coupling", repr(coupling), f"one of {', '.join(COUPLINGS)}")
    needs_x = coupling != "adjacency"
    require(score_x is not None or not needs_x, "score_x", None, f"a function, for {coupling}")
    require(score_adj is not None, "score_adj", None, "a function")
    whole(n_features, "n_features", 1)
    check_flags(flags)
    solver = GraphSolver(
        system, n_steps, method, predictor=predictor, corrector=corrector,
        n_corrections=n_corrections, snr=snr, scale_eps=scale_eps, transition=transition,
        probability_flow=probability_flow,
    )  # fmt: skip
    x, adj = system.draw_prior(flags, n_features, generator) if start is None else start
    given = None if noises is None else iter(noises)

    def noise(part: int) -> Tensor:
        if given is None:
            return (
                edge_noise(flags, generator) if part else node_noise(flags, n_features, generator)
            )
        value = next(given, None)
        require(value is not None, "noises", "too few", "one for every move of every part")
        assert value is not None
        return value

    def run(x: Tensor, adj: Tensor, *scores: Score | None) -> Pair:
        state = solver.init(x, adj, flags)
        for _ in range(solver.n_steps):
            state = solver.step(state, scores[0], scores[1], noise)
        return state.mean_x, state.mean_adj

    hide = (coupling == "adjacency", coupling == "sequential")
    if coupling == "sequential":
        x, _ = run(*blank(x, adj, flags, hide), score_x, None)
        x, adj = run(x, adj, None, score_adj)
    elif coupling == "adjacency":
        x, adj = run(*blank(x, adj, flags, hide), None, score_adj)
    else:
        x, adj = run(x, adj, score_x, score_adj)
    return GraphSample(x, adj, solver.nfe * (1 + (coupling == "sequential")))
