r"""The best policy near a reference, exactly, in a world small enough to write down.

A policy's occupancy mu(s, a) is the discounted share of time spent in s doing a. Any mu >= 0 with

    Σ_a mu(s', a) - γ Σ_{s,a} P(s'|s, a) mu(s, a) = (1 - γ) ρ_0(s')      what flows out has flown in

belongs to the policy mu / Σ_a mu, and the mean reward <mu, R> is linear in it. So to maximise

    <mu, R> - coef · D(mu)

is a convex program for every D in KINDS: linear and second-order cones for χ², its root and total
variation, exponential cones for KL.

The root of χ² has a kink at mu_ref. Hence there is a finite coefficient, `kink_coefficient`, from
which on the best policy is the reference itself.

Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185; the occupancy program: Puterman 1994, ch. 6.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix, diags_array, identity, issparse, kron
from scipy.sparse.linalg import spsolve
from scipy.special import logsumexp

from scoredraw.errors import StoppedError, import_extra, require

Float = NDArray[np.float64]

KINDS = ("sqrt_chi2", "chi2", "kl", "tv", "action_kl", "action_chi2")
# one after the other, where one gives up: with mu / √mu_ref (or mu) as the solver's variable
ATTEMPTS: list[tuple[str, bool, dict[str, Any]]] = [
    ("CLARABEL", True, {}), ("CLARABEL", False, {}), ("SCS", True, {"eps": 1e-6}),
]  # fmt: skip
SUMS_TO_ONE = 1e-6
NOISE = 1e-9  # of an occupancy that a solver found


class OccupancyPolicy(NamedTuple):
    """mu: (S, A) of sum 1; policy: (S, A), the reference's in states that mu never visits."""

    mu: Float
    policy: Float


def solve_regularized(
    transitions: Any,
    rewards: ArrayLike,
    mu_ref: ArrayLike,
    gamma: float,
    start: ArrayLike,
    kind: str = "sqrt_chi2",
    coef: float = 1.0,
) -> OccupancyPolicy:
    """The occupancy that maximises <mu, rewards> - coef · D, and its policy.

    D, natural logarithms, of occupancies: "sqrt_chi2" √Σ (mu - mu_ref)²/mu_ref, "chi2" its square,
    "kl" Σ mu log mu/mu_ref, "tv" ½ Σ |mu - mu_ref|; of actions, averaged over the states that mu
    visits: "action_kl" Σ mu log π/π_ref, "action_chi2" Σ_s d(s) χ²(π(·|s)‖π_ref(·|s)).

    transitions: (S A, S), sparse or not, row s A + a the law of the state after a in s; rewards,
    mu_ref: (S, A), mu_ref an occupancy of this world; gamma in [0, 1); start: (S,). Where mu_ref is
    0, D is infinite for mu > 0 (but for "tv"), and mu is 0 there. coef = 0: the best policy of all.
    Raises InputError for shapes, laws that do not sum to 1, mu_ref that is no occupancy, an unknown
    kind and coef < 0; StoppedError where no solver finishes; MissingExtraError without cvxpy.
    What the solver returns is made an exact occupancy of its own policy.

    Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185. About 0.1 s for 900 pairs; memory O(S A +
    the entries of `transitions`).

    >>> stay_or_go = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    >>> ref = occupancy_measure(stay_or_go, [[0.9, 0.1], [0.9, 0.1]], 0.5, [1.0, 0.0])
    >>> best = solve_regularized(stay_or_go, [[0.0, 0.0], [1.0, 1.0]], ref, 0.5, [1, 0], coef=1.0)
    >>> best.policy.round(2).tolist()  # too much for this world: the reference
    [[0.9, 0.1], [0.9, 0.1]]
    """
    P, R, rho = _checked(transitions, rewards, gamma, start)
    ref = np.asarray(mu_ref, np.float64)
    require(ref.shape == R.shape, "mu_ref", f"shape {ref.shape}", f"{R.shape}, as rewards")
    fine = bool((ref >= 0).all()) and abs(ref.sum() - 1) < SUMS_TO_ONE
    require(fine, "mu_ref", f"a sum of {ref.sum():g}", "an occupancy: >= 0, of sum 1")
    flow = _flow(P, R.shape, gamma)
    off = float(np.abs(flow @ ref.reshape(-1) - (1 - gamma) * rho).max())
    require(off < SUMS_TO_ONE, "mu_ref", f"a flow that is off by {off:.1e}", "one of this world")
    require(kind in KINDS, "kind", repr(kind), ", ".join(KINDS))
    require(0 <= coef < np.inf, "coef", coef, "a number of at least 0")
    found = _solve(flow, R, ref, (1 - gamma) * rho, kind, float(coef))
    policy = _policy(found, _policy(ref))
    return OccupancyPolicy(occupancy_measure(P, policy, gamma, rho), policy)


def _solve(flow: Any, R: Float, ref: Float, inflow: Float, kind: str, coef: float) -> Float:
    cp = import_extra("cvxpy", "all")
    problems = []
    for solver, scaled, options in ATTEMPTS:
        # mu_ref goes down to 1e-9 and less, which most programs take better in its own scale
        root = np.sqrt(ref.reshape(-1)) if scaled else np.ones(ref.size)
        root[root == 0] = 1.0
        y = cp.Variable(ref.size, nonneg=True)
        constraints = [(flow @ diags_array(root)) @ y == inflow]
        objective = (R.reshape(-1) * root) @ y
        if coef > 0:
            penalty, more = _penalty(cp, y, root, ref, kind)
            objective = objective - coef * penalty
            constraints += more
        program = cp.Problem(cp.Maximize(objective), constraints)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an inaccurate solution: not taken
                program.solve(solver=solver, **options)
        except cp.error.SolverError as problem:
            problems.append(f"{solver}: {str(problem).splitlines()[0]}")
            continue
        if program.status == cp.OPTIMAL:
            return (np.maximum(y.value, 0.0) * root).reshape(ref.shape)
        problems.append(f"{solver}: {program.status}")
    raise StoppedError(f"no solver finished with kind {kind!r} and coef {coef:g}: {problems}")


def _penalty(cp: Any, y: Any, root: Float, ref: Float, kind: str) -> tuple[Any, list[Any]]:
    """D as a cvxpy expression of y = mu / root, and the constraints that go with it."""
    S, A = ref.shape
    m, seen = ref.reshape(-1), ref.reshape(-1) > 0
    mu = cp.multiply(root, y)
    if kind == "tv":
        return 0.5 * cp.norm1(mu - m), []
    outside = [] if seen.all() else [y[~seen] == 0]
    if kind in {"sqrt_chi2", "chi2"}:
        away = cp.multiply(mu[seen] - m[seen], 1 / np.sqrt(m[seen]))
        return (cp.norm2(away) if kind == "sqrt_chi2" else cp.sum_squares(away)), outside
    if kind == "kl":
        return cp.sum(cp.rel_entr(mu[seen], m[seen])), outside
    visits = kron(identity(S), np.ones((1, A)), format="csr") @ mu
    if kind == "action_kl":
        policy = _policy(ref).reshape(-1)
        each = kron(identity(S), np.ones((A, 1)), format="csr") @ visits
        return cp.sum(cp.rel_entr(mu[seen], cp.multiply(policy[seen], each[seen]))), outside
    # Σ_a mu²/π_ref <= t d in each state: |(2 mu/√π_ref, t - d)| <= t + d
    t = cp.Variable(S)
    scaled = cp.multiply(1 / np.sqrt(np.where(seen, _policy(ref).reshape(-1), 1.0)), mu)
    sides = cp.vstack([2 * cp.reshape(scaled, (A, S), order="F"), (t - visits)[None, :]])
    return cp.sum(t) - cp.sum(visits), [*outside, cp.SOC(t + visits, sides, axis=0)]


def kink_coefficient(
    transitions: Any, rewards: ArrayLike, mu_ref: ArrayLike, gamma: float
) -> float:
    """The coefficient from which on "sqrt_chi2" gives back the reference: a number >= 0.

    max <mu - mu_ref, R> / √χ²(mu‖mu_ref) over all occupancies. Near mu_ref every direction that
    keeps the flow is open, so it is a least squares problem,

        min_v √Σ mu_ref(s, a) (R(s, a) + γ E v(s') - v(s))²

    (the standard deviation of the best fitting advantages). The theory's coefficient can exceed it,
    where the proxy is not well correlated, and then the theory says to stay where one is.
    Arguments and errors as `solve_regularized`. O(S³) at worst.

    >>> stay_or_go = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    >>> ref = occupancy_measure(stay_or_go, [[0.9, 0.1], [0.9, 0.1]], 0.5, [1.0, 0.0])
    >>> round(kink_coefficient(stay_or_go, [[0.0, 0.0], [1.0, 1.0]], ref, 0.5), 3)
    0.124
    """
    P, R, _ = _checked(transitions, rewards, gamma)
    ref = np.asarray(mu_ref, np.float64)
    require(ref.shape == R.shape, "mu_ref", f"shape {ref.shape}", f"{R.shape}, as rewards")
    seen = ref.sum(axis=1) > 0
    root = diags_array(np.sqrt(ref.reshape(-1)))
    design = (root @ _flow(P, R.shape, gamma).T)[:, seen]
    target = root @ R.reshape(-1)
    v = spsolve((design.T @ design).tocsc(), design.T @ target)
    return float(np.linalg.norm(target - design @ v))


# ── occupancies and policies ────────────────────────────────────────────────────────────────────


def occupancy_measure(transitions: Any, policy: ArrayLike, gamma: float, start: ArrayLike) -> Float:
    """mu(s, a) = (1 - γ) Σ_t γ^t P(s_t = s, a_t = a), (S, A), of sum 1: one sparse solve.

    (I - γ P_π^T) d = (1 - γ) ρ_0, mu = d π; then the normalised return is Σ mu R. transitions: as
    `solve_regularized`; policy: (S, A), rows of sum 1. InputError for shapes and for what is not a
    law. Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185. O(the fill of the solve).

    >>> occupancy_measure([[0.0, 1.0], [0.0, 1.0]], [[1.0], [1.0]], 0.5, [1.0, 0.0]).tolist()
    [[0.5], [0.5]]
    """
    P, pi, rho = _checked(transitions, policy, gamma, start, "policy")
    law = bool((pi >= 0).all()) and bool((np.abs(pi.sum(axis=1) - 1) < SUMS_TO_ONE).all())
    require(law, "policy", "a row that is no law", "rows >= 0 of sum 1")
    S, A = pi.shape
    choice = csr_matrix((pi.reshape(-1), np.arange(S * A), np.arange(0, S * A + 1, A)))
    system = identity(S, format="csc") - gamma * (choice @ P).T
    visits = np.maximum(spsolve(system.tocsc(), (1 - gamma) * rho), 0.0).reshape(S)
    return visits[:, None] * pi


def soft_policy(
    transitions: Any,
    rewards: ArrayLike,
    gamma: float,
    temperature: float = 0.0,
    tolerance: float = 1e-10,
) -> Float:
    """The policy softmax(Q / temperature) of soft value iteration, (S, A); at 0 a best policy.

    Q = R + γ E V(s'), V = temperature · log Σ_a exp(Q / temperature), to within `tolerance` of the
    fixed point. At temperature 0 the first of the best actions has all. O(entries of `transitions`)
    a sweep, log(1 / tolerance) / (1 - γ) sweeps. Errors as `solve_regularized`, and InputError for
    a tolerance that is not above 0.

    >>> soft_policy([[1.0], [1.0]], [[1.0, 0.0]], 0.5, temperature=1.0).round(3).tolist()
    [[0.731, 0.269]]
    """
    P, R, _ = _checked(transitions, rewards, gamma)
    require(0 <= temperature < np.inf, "temperature", temperature, "a number of at least 0")
    require(tolerance > 0, "tolerance", tolerance, "a number above 0")
    v = np.zeros(len(R))
    while True:
        Q = R + gamma * (P @ v).reshape(R.shape)
        new = temperature * logsumexp(Q / temperature, axis=1) if temperature else Q.max(axis=1)
        if np.abs(new - v).max() * gamma <= tolerance * (1 - gamma):
            break
        v = new
    if not temperature:
        return np.eye(R.shape[1])[Q.argmax(axis=1)]
    return np.exp(Q / temperature - logsumexp(Q / temperature, axis=1, keepdims=True))


def _policy(mu: Float, otherwise: Float | None = None) -> Float:
    """mu / Σ_a mu; where that sum is a solver's noise the other policy, or a uniform one."""
    visits = mu.sum(axis=1, keepdims=True)
    least = NOISE if otherwise is not None else 0.0
    spare = np.full(mu.shape, 1 / mu.shape[1]) if otherwise is None else otherwise
    found = np.where(visits > least, mu / np.where(visits > least, visits, 1.0), spare)
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def _flow(P: csr_matrix, shape: tuple[int, ...], gamma: float) -> csr_matrix:
    """(S, S A): what leaves each state less what comes in."""
    S, A = shape
    return csr_matrix(kron(identity(S), np.ones((1, A))) - gamma * P.T)


def _checked(
    transitions: Any, table: ArrayLike, gamma: float, start: Any = None, name: str = "rewards"
) -> tuple[csr_matrix, Float, Float]:
    """The world and a table (S, A) of it; without a start all states are alike."""
    x = np.asarray(table, np.float64)
    fine = x.ndim == 2 and x.size > 0 and bool(np.isfinite(x).all())
    require(fine, name, f"shape {x.shape}", "finite numbers (S, A)")
    S, A = x.shape
    P = transitions if issparse(transitions) else np.asarray(transitions, np.float64)
    require(P.shape == (S * A, S), "transitions", f"shape {P.shape}", f"({S * A}, {S}) = (S A, S)")
    P = csr_matrix(P, dtype=np.float64)
    law = bool((P.data >= 0).all()) and bool((np.abs(P.sum(axis=1) - 1) < SUMS_TO_ONE).all())
    require(law, "transitions", "a row that is no law", "rows >= 0 of sum 1")
    require(0 <= gamma < 1, "gamma", gamma, "a number in [0, 1)")
    rho = np.full(S, 1 / S) if start is None else np.asarray(start, np.float64)
    fine = rho.shape == (S,) and bool((rho >= 0).all()) and abs(rho.sum() - 1) < SUMS_TO_ONE
    require(fine, "start", f"shape {rho.shape}", f"a law ({S},)")
    return P, x, rho
