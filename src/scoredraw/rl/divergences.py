r"""How far a policy is from its reference: four divergences, in every form a trainer meets them.

    KL(p‖q) = E_p[log p/q]       χ²(p‖q) = E_p[p/q] - 1 = Σ (p - q)²/q
    sqrt χ²                      TV(p, q) = ½ Σ |p - q|

χ² sees what KL forgives, a rare outcome made common: 1 + χ² >= e^KL. It is finite only where q is
not much narrower than p. For a product of independent parts, and for the tokens of an answer, KL
adds up and 1 + χ² multiplies, so χ² is computed as expm1 of a sum of logarithms.

KL is in nats. Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185; k1, k3: Schulman 2020,
"Approximating KL divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta, Categorical, Distribution, Independent, Normal

from scoredraw.errors import InputError, require

KINDS = ("kl", "chi2", "sqrt_chi2", "tv")
SMALLEST = 1e-4  # of χ² under the root, whose slope at 0 is infinite
SUMS_TO_ONE = 1e-4


# ── from samples of the policy ──────────────────────────────────────────────────────────────────


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π/π_ref of each sampled token, (B, T): its mean under π is KL(π‖π_ref); may be negative.

    >>> kl_k1(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.5000]])
    """
    here, there = _alike(logp, ref_logp)
    return here - there


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^{-k} - 1 + k of each sampled token, k = log π/π_ref: the same mean as `kl_k1`, never < 0.

    (B, T). Its gradient through logp alone is not that of KL; in a reward it is an estimate of it.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]])).round(decimals=4)
    tensor([[0.1065]])
    """
    back = -kl_k1(logp, ref_logp)
    return torch.expm1(back) - back


def sequence_log_ratio(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """d = Σ_t log π/π_ref of a whole answer, (B,), over the tokens that count.

    Tokens follow one another without chance, so e^d is the ratio of the two policies' chances to
    be in any state at the end of this answer: what a discriminator would have to learn is known.
    logp, ref_logp: (B, T), half precision is summed in float32; mask: (B, T), or None for all
    tokens. O(B T).

    >>> sequence_log_ratio(torch.zeros(1, 2), torch.full((1, 2), -0.5), torch.tensor([[1, 0]]))
    tensor([0.5000])
    """
    require(logp.ndim == 2, "logp", f"shape {tuple(logp.shape)}", "(B, T)")
    each = kl_k1(logp, ref_logp)
    if mask is None:
        return each.sum(dim=1)
    require(mask.shape == each.shape, "mask", tuple(mask.shape), f"{tuple(each.shape)}, as logp")
    return torch.where(mask.bool(), each, 0.0).sum(dim=1)


def chi2_from_log_ratios(log_ratio: Tensor) -> Tensor:
    """χ²(π‖π_ref) from d = log π/π_ref of N samples of π: mean e^d - 1, in float64, a scalar.

    Unbiased, but where π makes rare things common the mean hangs on the few samples with the
    largest d, and most batches give too little. log_ratio: (N,), of states and actions, or of whole
    answers. Raises InputError for none and for NaN.

    >>> chi2_from_log_ratios(torch.tensor([0.0, 1.0])).round(decimals=4)
    tensor(0.8591, dtype=torch.float64)
    """
    fits = log_ratio.ndim == 1 and len(log_ratio) > 0 and not bool(log_ratio.isnan().any())
    require(fits, "log_ratio", f"shape {tuple(log_ratio.shape)}", "(N,) of numbers, N >= 1")
    d = log_ratio.double()
    return torch.expm1(torch.logsumexp(d, dim=0) - torch.log(torch.tensor(float(len(d)))))


def _alike(logp: Tensor, ref_logp: Tensor) -> list[Tensor]:
    """Both, half precision as float32: their differences are small, and are summed."""
    shapes = f"{tuple(logp.shape)} and {tuple(ref_logp.shape)}"
    require(logp.shape == ref_logp.shape, "logp and ref_logp", shapes, "the same shape")
    half = {torch.float16, torch.bfloat16}
    return [x.float() if x.dtype in half else x for x in (logp, ref_logp)]


# ── tables of probabilities, and logits ─────────────────────────────────────────────────────────


def divergence(p: Any, q: Any, kind: str = "chi2", floor: float | None = None) -> Tensor:
    """Divergence of p from q, both (..., A) probabilities, over the last axis: (...).

    kind: "kl", "chi2", "sqrt_chi2" or "tv". Where q is 0 and p is not, all but TV are infinite:
    that is an InputError, unless a `floor` > 0 is given, to which q is raised and then scaled to
    sum to 1 again, with a warning. Numbers that are no tensors are taken in float64. For a state
    and action occupancy pass it flat. Raises InputError for shapes that differ, an unknown kind and
    what is not a distribution. O(A) a row.

    >>> divergence([0.5, 0.5], [0.25, 0.75]).round(decimals=4)
    tensor(0.3333, dtype=torch.float64)
    """
    a, b = _distribution(p, "p"), _distribution(q, "q")
    require(a.shape == b.shape, "p and q", f"{tuple(a.shape)}, {tuple(b.shape)}", "one shape")
    _known(kind)
    outside = int(((b == 0) & (a > 0)).sum())
    if outside and kind != "tv":
        came = f"0 at {outside} of the places where p is not"
        require(floor is not None and floor > 0, "q", came, "q > 0 there, or floor=")
        assert floor is not None
        warnings.warn(f"q is {came}; raised to {floor:g}", stacklevel=2)
        b = b.clamp(min=floor)
        b = b / b.sum(dim=-1, keepdim=True)
    return _of_logs(a.log(), b.log(), kind)


def divergence_from_logits(logits: Tensor, ref_logits: Tensor, kind: str = "chi2") -> Tensor:
    """Divergence of softmax(logits) from softmax(ref_logits), (..., A) -> (...), for a loss.

    An action that has -inf in both counts nothing; in ref_logits alone it makes all but TV
    infinite. For the root in a loss see `action_divergence`: here it is exact, and its gradient is
    not finite where both are equal. Raises InputError as `divergence`.

    >>> divergence_from_logits(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]), "tv")
    tensor(0.2311)
    """
    shapes = f"{tuple(logits.shape)} and {tuple(ref_logits.shape)}"
    require(logits.shape == ref_logits.shape, "logits and ref_logits", shapes, "one shape")
    _known(kind)
    return _of_logs(logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1), kind)


def _of_logs(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "tv":
        return (p - q).abs().sum(dim=-1) / 2
    never = log_p == -torch.inf
    log_ratio = (log_p - log_q).masked_fill(never, 0.0)
    if kind == "kl":
        return (p * log_ratio).sum(dim=-1)
    chi2 = torch.where(never, q, (p - q) * torch.expm1(log_ratio)).sum(dim=-1)
    return chi2.sqrt() if kind == "sqrt_chi2" else chi2


def _known(kind: str) -> None:
    require(kind in KINDS, "kind", repr(kind), ", ".join(KINDS))


def _distribution(p: Any, name: str) -> Tensor:
    x = p if isinstance(p, Tensor) else torch.as_tensor(p, dtype=torch.float64)
    fits = x.ndim >= 1 and x.shape[-1] > 0 and x.is_floating_point()
    require(fits, name, f"shape {tuple(x.shape)} of {x.dtype}", "probabilities (..., A)")
    total = x.detach().sum(dim=-1)
    fine = bool((x >= 0).all()) and bool(((total - 1).abs() < SUMS_TO_ONE).all())
    require(fine, name, "numbers below 0, or that do not sum to 1", "probabilities (..., A)")
    return x


# ── policies as torch distributions ─────────────────────────────────────────────────────────────


def chi2_divergence(p: Distribution, q: Distribution) -> Tensor:
    """χ²(p‖q) in closed form, of the distributions' batch shape; infinite where it does not exist.

    Categorical: Σ (p - q)²/q. Beta: B(2a_p - a_q, 2b_p - b_q) B(a_q, b_q) / B(a_p, b_p)² - 1,
    infinite unless both arguments are positive. Normal, with v = 2σ_q² - σ_p², infinite unless
    v > 0: σ_q² / (σ_p √v) exp((m_p - m_q)² / v) - 1. `Independent` of these: their 1 + χ²
    multiplied.
    Raises InputError for other or different families. Row-local.

    >>> wide = torch.distributions.Normal(0.0, 1.0)
    >>> chi2_divergence(torch.distributions.Normal(1.0, 1.0), wide).round(decimals=4)
    tensor(1.7183)
    >>> chi2_divergence(torch.distributions.Normal(0.0, 2.0), wide)
    tensor(inf)
    """
    return torch.expm1(_log_moment(p, q))


def action_divergence(p: Distribution, q: Distribution, kind: str = "kl") -> Tensor:
    """What a loss adds to keep the actions near the reference's, a number a state.

    "kl": KL(p‖q). "chi2": χ²(p‖q), and KL at the states where χ² is infinite. "sqrt_chi2": the root
    of that, with χ² >= 1e-4 under it. The usual term is coef x the mean over the visited states;
    it limits each action, not where the actions lead. Gradients are finite. Errors as
    `chi2_divergence`. Row-local.

    >>> p, q = (torch.distributions.Categorical(logits=torch.tensor([x, 0.0])) for x in (1.0, 1.0))
    >>> action_divergence(p, q, "sqrt_chi2")
    tensor(0.0100)
    """
    require(kind in KINDS[:3], "kind", repr(kind), ", ".join(KINDS[:3]))
    log_moment = _log_moment(p, q)
    kl = torch.distributions.kl_divergence(p, q)
    if kind == "kl":
        return kl
    finite = log_moment < math.log(torch.finfo(kl.dtype).max)
    chi2 = torch.where(finite, torch.expm1(torch.where(finite, log_moment, 0.0)), kl)
    return chi2.clamp(min=SMALLEST).sqrt() if kind == "sqrt_chi2" else chi2


def _log_moment(p: Distribution, q: Distribution) -> Tensor:
    """log E_q[(p/q)²] = log(1 + χ²), of the batch shape."""
    both = f"{type(p).__name__} and {type(q).__name__}"
    if isinstance(p, Independent) and isinstance(q, Independent):
        dims = p.reinterpreted_batch_ndims
        require(dims == q.reinterpreted_batch_ndims, "p and q", both, "as many dimensions")
        inner = _log_moment(p.base_dist, q.base_dist)
        return inner.sum(dim=tuple(range(-dims, 0))) if dims else inner
    for family, formula in FORMULAS.items():
        if isinstance(p, family) and isinstance(q, family):
            return formula(p, q)
    raise InputError(f"p and q: got {both}, want two Categorical, Normal, Beta or Independent")


def _categorical(p: Categorical, q: Categorical) -> Tensor:
    return torch.log1p(_of_logs(_log_probabilities(p), _log_probabilities(q), "chi2"))


def _log_probabilities(p: Categorical) -> Tensor:
    """Exact zeros where it was made of probabilities, which its `logits` are without."""
    return p.probs.log() if "probs" in vars(p) else p.logits


def _normal(p: Normal, q: Normal) -> Tensor:
    spare = 2 * q.variance - p.variance
    exists = spare > 0
    spare = torch.where(exists, spare, 1.0)
    found = (q.variance / p.stddev).log() - spare.log() / 2 + (p.loc - q.loc) ** 2 / spare
    return found.masked_fill(~exists, torch.inf)


def _beta(p: Beta, q: Beta) -> Tensor:
    (a_p, b_p), (a_q, b_q) = (  # in float64: large logarithms that nearly cancel
        (law.concentration1.double(), law.concentration0.double()) for law in (p, q)
    )
    a, b = 2 * a_p - a_q, 2 * b_p - b_q
    exists = (a > 0) & (b > 0)
    a, b = torch.where(exists, a, 1.0), torch.where(exists, b, 1.0)
    found = _log_beta(a, b) + _log_beta(a_q, b_q) - 2 * _log_beta(a_p, b_p)
    return found.masked_fill(~exists, torch.inf).to(p.concentration1.dtype)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


FORMULAS: dict[type[Distribution], Callable[[Any, Any], Tensor]] = {
    Categorical: _categorical,
    Normal: _normal,
    Beta: _beta,
}
