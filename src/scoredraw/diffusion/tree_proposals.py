r"""Markov chains from noise to data, as a tree of samples wants them, cut into edges.

A chain draws a first state and makes T steps. A tree may branch at some of the states only; the
steps between two of them are one edge. `branch_at` counts the steps that are left there, as in
{100, 80, 60, 40, 20} of 100, and what lies before the first of them belongs to the draw from the
root. Here are the chains of

    diffusion_chain   x_s = alpha_s x̂_0 + sqrt(sigma_s² - c²) eps + c z,
                      c² = η² sigma_s² (1 - rho_s²/rho_t²): DDIM, with η = 1 the ancestral step
    token_chain       a causal model of transformers
    masked_chain      masked diffusion of tokens
    finite_chain      transition matrices, whose every value `exact_values` knows

Those of diffusers' pipelines are in `pipeline_chains`.

A step may also come with log p/q, where it was drawn from another law q than the chain's own p.

Jain, Sareen, Pedramfar and Ravanbakhsh 2025, arXiv 2506.20701; Song, Meng and Ermon 2021,
arXiv 2010.02502.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scoredraw import categorical
from scoredraw.arrays import is_tensor
from scoredraw.diffusion.parameterisations import to_x0
from scoredraw.diffusion.schedules import NoiseSchedule
from scoredraw.diffusion.states import check_answer
from scoredraw.diffusion.time_grids import checked_times, time_grid, whole
from scoredraw.errors import require
from scoredraw.uniforms import generator as numpy_generator

Float = NDArray[np.float64]
Guide = Callable[[Any, int], Any]

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)  # of the steps, left where the paper's image trees branch


@dataclass(frozen=True, eq=False)
class MarkovChain:
    """A first draw and `steps` steps: x (n, *dims), arrays or tensors, whatever they hold.

    prior(n, generator) -> x. step(x, i, generator) -> x' or (x', log p/q (n,)), for the step
    i = 0 .. steps - 1. branch_at: the numbers of steps left at which a tree may branch; None: all.
    tensors: whether it works on tensors and wants a `torch.Generator`. discrete: whether equal
    children are nothing strange. Chains of diffusions further have predict(x, i) -> x̂_0, which
    makes the network call of step i, move(x, i, x̂_0, generator, guide) -> the step after it, and
    finish(x, i) -> where the steps without noise lead.

    Raises InputError for steps < 1 and branch_at outside 1 .. steps or repeated.

    >>> chain = MarkovChain(lambda n, g: np.zeros(n), lambda x, i, g: x + 1, 5, (4, 2))
    >>> chain.edges, chain.run(None, 0, None, n=2)[0].tolist()
    (((0, 1), (1, 3), (3, 5)), [1.0, 1.0])
    """

    prior: Callable[[int, Any], Any]
    step: Callable[[Any, int, Any], Any]
    steps: int
    branch_at: Iterable[int] | None = None
    tensors: bool = False
    discrete: bool = False
    predict: Callable[[Any, int], Any] | None = None
    move: Callable[..., Any] | None = None
    finish: Callable[[Any, int], Any] | None = None
    edges: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        T = whole(self.steps, "steps", 1)
        left = range(T, 0, -1) if self.branch_at is None else self.branch_at
        at = sorted((whole(t, "branch_at", 1) for t in left), reverse=True)
        require(len(set(at)) == len(at), "branch_at", at, "distinct numbers of steps left")
        require(not at or at[0] <= T, "branch_at", at[0] if at else 0, f"at most the {T} steps")
        stops = [0, *(T - t for t in at), T]
        object.__setattr__(self, "edges", tuple(pairwise(stops)))

    @property
    def calls(self) -> tuple[int, ...]:
        """Network calls of every edge, from the root down."""
        return tuple(last - first for first, last in self.edges)

    def run(self, x: Any, edge: int, generator: Any, n: int = 0) -> tuple[Any, Any]:
        """Along an edge: the states at its end, and log p/q summed along it (None: zeros).

        x: states at its start; n: how many, for edge 0, which starts with the prior.
        """
        ratio, (first, last) = None, self.edges[edge]
        if edge == 0:
            x = self.prior(n, generator)
            require(len(x) == n, "prior", f"{len(x)} states", f"{n}")
        for i in range(first, last):
            x = self.step(x, i, generator)
            if isinstance(x, tuple):
                x, more = x
                ratio = more if ratio is None else ratio + more
        return x, ratio

    def source(self, seed: Any) -> Any:
        """A seed or None as the generator that this chain wants; a generator as it is."""
        if not self.tensors:
            return numpy_generator(seed)
        import torch

        if isinstance(seed, torch.Generator):
            return seed
        made = torch.Generator()
        return made.manual_seed(made.seed() if seed is None else whole(seed, "generator", 0))


def paper_branches(steps: int) -> tuple[int, ...]:
    """All, 80, 60, 40 and 20 % of the steps.

    >>> paper_branches(50)
    (50, 40, 30, 20, 10)
    """
    return tuple(sorted({max(1, round(share * steps)) for share in SHARES}, reverse=True))


# ── continuous ──────────────────────────────────────────────────────────────────────────────────


def diffusion_chain(
    schedule: NoiseSchedule,
    eps_fn: Callable[[Any, float], Any],
    prior: Sequence[int] | Callable[[int, Any], Any],
    steps: int = 50,
    *,
    times: Any = None,
    eta: float = 1.0,
    branch_at: Iterable[int] | None = None,
    tensors: bool = False,
    guide: Guide | None = None,
) -> MarkovChain:
    """DDIM with noise η along a schedule, for an eps network.

    prior: the dims of a state, for N(0, prior_std² I), or a function (n, generator) -> x. times:
    (steps + 1,), by default uniform; `schedule.ends.last = "denoise"` makes x̂_0 of the last state
    in one more step, which has no noise. guide(x, i) -> g (n, *dims): the mean of step i moves by
    c² g, and log p/q = -c g·z - c²|g|²/2 comes with it. Memory: a state. Sequential.

    Raises InputError unless 0 < η and c² <= sigma_s², for times as `checked_times` and, when it
    runs, for eps of another shape or not finite, naming the step. Song et al. 2021,
    arXiv 2010.02502.

    >>> from scoredraw.diffusion.schedules import LinearBeta
    >>> chain = diffusion_chain(LinearBeta(), lambda x, t: x, (2,), 4, branch_at=(4, 2))
    >>> chain.edges, chain.run(None, 0, chain.source(0), n=3)[0].shape
    (((0, 0), (0, 2), (2, 4)), (3, 2))
    """
    require(0 < eta <= 1, "eta", eta, "in (0, 1]: without noise all children are equal")
    if times is None:
        times = time_grid(schedule, steps, "t", 1.0)
    denoise = schedule.ends.last == "denoise"
    require(schedule.ends.last != "clean", "schedule.ends.last", "'clean'", "'stop' or 'denoise'")
    grid = checked_times(schedule, times, clean_end=not denoise)
    alpha, sigma, rho = schedule.alpha(grid), schedule.sigma(grid), schedule.rho(grid)
    noise = eta * sigma[1:] * np.sqrt(1 - np.square(rho[1:] / rho[:-1]))
    count = len(grid) - 1 + denoise

    def predict(x: Any, i: int) -> Any:
        eps = eps_fn(x, float(grid[i]))
        check_answer(eps, x, f"at step {i}")
        return to_x0(eps, x, float(alpha[i]), float(sigma[i]))

    def move(x: Any, i: int, x0: Any, source: Any, guide: Any = None, scale: float = 1.0) -> Any:
        if i == len(grid) - 1:
            return x0 if guide is None else (x0, _zeros(x))
        c = scale * float(noise[i])
        eps = (x - float(alpha[i]) * x0) * (1 / float(sigma[i]))
        mean = float(alpha[i + 1]) * x0 + float(np.sqrt(sigma[i + 1] ** 2 - c * c)) * eps
        if c == 0:
            return mean
        z = _noise(x, source)
        if guide is None:
            return mean + c * z
        return mean + c * z + c * c * guide, -c * _dot(guide, z) - 0.5 * c * c * _dot(guide, guide)

    def step(x: Any, i: int, source: Any) -> Any:
        return move(x, i, predict(x, i), source, None if guide is None else guide(x, i))

    def finish(x: Any, i: int) -> Any:
        for j in range(i, count):
            x = move(x, j, predict(x, j), None, scale=0.0)
        return x

    first = prior if callable(prior) else _gaussian(tuple(prior), schedule.prior_std, tensors)
    return MarkovChain(first, step, count, branch_at, tensors, False, predict, move, finish)


# ── discrete ────────────────────────────────────────────────────────────────────────────────────


def token_chain(
    model: Any,
    prompt: Sequence[int],
    length: int,
    *,
    branch_at: Iterable[int] | None = None,
    end: int | None = None,
    **options: Any,
) -> MarkovChain:
    """`length` tokens after a prompt, from a causal model of transformers; states int64 (n, P + L).

    Tokens still to come are -1, and after `end` all are `end`. options: temperature, top_k, top_p,
    min_p as `categorical.truncate`; float64 draws. branch_at: by default every number of tokens
    left but all, as the prompt is one state. An edge reads its prefix once and then goes on from
    the model's cache. One call a token.
    """
    import torch

    P, L = len(prompt), whole(length, "length", 1)
    require(P >= 1, "prompt", "no tokens", "one or more")
    left = range(1, L) if branch_at is None else branch_at
    device = next(model.parameters()).device
    start = torch.full((1, P + L), -1, dtype=torch.long)
    start[0, :P] = torch.as_tensor(prompt)

    class Tokens(MarkovChain):
        def run(self, x: Any, edge: int, generator: Any, n: int = 0) -> tuple[Any, Any]:
            x = self.prior(n, generator) if edge == 0 else x.clone()
            cache, (first, last) = None, self.edges[edge]
            for i in range(P + first, P + last):
                given = x[:, :i] if cache is None else x[:, i - 1 : i]
                with torch.no_grad():
                    said = model(given.to(device), past_key_values=cache, use_cache=True)
                cache = said.past_key_values
                law = categorical.truncate(said.logits[:, -1], **options)
                x[:, i] = categorical.draw(law, generator).to(x.device)
                if end is not None and i > P:
                    x[:, i] = torch.where(x[:, i - 1] == end, end, x[:, i])
            return x, None

    def step(x: Any, i: int, source: Any) -> Any:
        one = Tokens(lambda n, g: x, step, L, (L, *range(L - 1, 0, -1)), True, True)
        return one.run(x, i + 1, source)[0]

    return Tokens(lambda n, g: start.repeat(n, 1), step, L, left, True, True)


def masked_chain(
    logits_fn: Callable[[Any], Any],
    x_init: Any,
    mask_id: int,
    steps: int = 64,
    *,
    schedule: Any = "linear",
    branch_at: Iterable[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> MarkovChain:
    """Ancestral steps of masked diffusion from x_init (L,), as `masked_diffusion` takes them.

    A masked token is shown with probability (m_t - m_s)/m_t and then drawn from the model's law,
    in float64. States are int64 (n, L). branch_at: by default all but the first state, as there is
    but one of it.
    """
    import torch

    from scoredraw.diffusion.mask_schedules import mask_schedule
    from scoredraw.diffusion.masked_diffusion import at, called, drawn, placed

    T, law = whole(steps, "steps", 1), mask_schedule(schedule)
    start = torch.as_tensor(x_init).long()
    require(start.ndim == 1, "x_init", tuple(start.shape), "tokens (L,)")

    def step(x: Any, i: int, source: Any) -> Any:
        p = 1.0 if i == T - 1 else float(law.unmasking(1 - i / T, 1 - (i + 1) / T))
        u = torch.rand(2, *x.shape, generator=source, device=source.device, dtype=torch.float64)
        u = u.cpu().numpy()
        where = np.nonzero((x == mask_id).cpu().numpy() & (u[0] < p))
        if not len(where[0]):
            return x
        with torch.no_grad():
            logits = at(called(logits_fn, x, mask_id), where)
        return placed(x, where, drawn(logits, mask_id, u[1][where], temperature, top_p)[0])

    left = range(1, T) if branch_at is None else branch_at
    return MarkovChain(lambda n, g: start.repeat(n, 1), step, T, left, True, True)


def finite_chain(
    prior: Any, transitions: Any, branch_at: Iterable[int] | None = None
) -> MarkovChain:
    """States 0 .. K - 1: prior (K,), transitions (T, K, K), the one used first last.

    transitions[t - 1, i, j] = p(x_{t-1} = j | x_t = i). One uniform a draw, by inversion. Raises
    InputError for shapes that disagree and rows that are no law.

    >>> chain = finite_chain([0.5, 0.5], [[[1.0, 0.0], [1.0, 0.0]]])
    >>> chain.run(np.array([1, 0]), 1, chain.source(0))[0].tolist()
    [0, 0]
    """
    p, P = _laws(prior, transitions)
    with np.errstate(divide="ignore"):
        log_p, log_P = np.log(p), np.log(P)

    def first(n: int, source: Any) -> Any:
        return categorical.invert(np.broadcast_to(log_p, (n, len(p))), source.random(n))

    def step(x: Any, i: int, source: Any) -> Any:
        return categorical.invert(log_P[len(P) - 1 - i, x], source.random(len(x)))

    return MarkovChain(first, step, len(P), branch_at, discrete=True)


class FiniteValues(NamedTuple):
    """values (T + 1, K), V_t of every state; root; the last state's law as it is, and tilted."""

    values: Float
    root: float
    base: Float
    target: Float


def exact_values(prior: Any, transitions: Any, reward: Any, lam: float = 1.0) -> FiniteValues:
    """V_t(x) = (1/λ) log E[exp(λ r(x_0)) | x_t = x] of a finite chain, and the laws of x_0.

    >>> found = exact_values([1.0], [[[1.0]]], [3.0])
    >>> found.values.tolist(), round(found.root, 9)
    ([[3.0], [3.0]], 3.0)
    """
    from scipy.special import logsumexp, softmax

    p, P = _laws(prior, transitions)
    values = [np.asarray(reward, np.float64)]
    for step in P:
        values.append(logsumexp(lam * values[-1][None], b=step, axis=1) / lam)
    base = p
    for step in P[::-1]:
        base = base @ step
    with np.errstate(divide="ignore"):
        target = softmax(np.log(base) + lam * values[0])
    root = float(logsumexp(lam * values[-1], b=p) / lam)
    return FiniteValues(np.stack(values), root, base, target)


def _laws(prior: Any, transitions: Any) -> tuple[Float, Float]:
    p, P = np.asarray(prior, np.float64), np.asarray(transitions, np.float64)
    require(p.ndim == 1 and p.size > 0, "prior", p.shape, "(K,)")
    K = len(p)
    fine = P.ndim == 3 and P.shape[1:] == (K, K) and len(P) > 0
    require(fine, "transitions", P.shape, f"(T, {K}, {K})")
    for name, law in (("prior", p), ("transitions", P)):
        good = bool((law >= 0).all()) and bool(np.abs(law.sum(-1) - 1).max() < 1e-5)
        require(good, name, "a row that is no law", "rows >= 0 that sum to 1")
    return p, P


# ── arrays and tensors ──────────────────────────────────────────────────────────────────────────


def _gaussian(dims: tuple[int, ...], std: float, tensors: bool) -> Callable[[int, Any], Any]:
    def draw(n: int, source: Any) -> Any:
        if not tensors:
            return std * source.standard_normal((n, *dims))
        torch = sys.modules["torch"]
        return std * torch.randn(n, *dims, generator=source, device=source.device)

    return draw


def _noise(x: Any, source: Any) -> Any:
    if not is_tensor(x):
        return source.standard_normal(x.shape)
    torch = sys.modules["torch"]
    z = torch.randn(x.shape, generator=source, device=source.device, dtype=x.dtype)
    return z.to(x.device)


def _dot(a: Any, b: Any) -> Any:
    """<a_k, b_k> of every state, (n,) float64."""
    product = (a * b).reshape(len(a), -1)
    return product.double().sum(1) if is_tensor(a) else product.astype(np.float64).sum(1)


def _zeros(x: Any) -> Any:
    return x.new_zeros(len(x)).double() if is_tensor(x) else np.zeros(len(x))
