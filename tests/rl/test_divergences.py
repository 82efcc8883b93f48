"""Divergences against integrals, samples and one another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from torch.distributions import Beta, Categorical, Independent, Normal, Poisson

from scoredraw.errors import InputError
from scoredraw.rl.divergences import (
    KINDS,
    action_divergence,
    chi2_divergence,
    chi2_from_log_ratios,
    divergence,
    divergence_from_logits,
    kl_k1,
    kl_k3,
    sequence_log_ratio,
)

pytestmark = pytest.mark.oracle


def double(*values: Any) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


LOGITS = st.lists(st.floats(-6, 6), min_size=6, max_size=6)


@pytest.mark.property
@given(LOGITS, LOGITS)
def test_laws_of_a_table(a: list[float], b: list[float]) -> None:
    x, y = double(a, b)
    p, q = x.softmax(0), y.softmax(0)
    found = {kind: float(divergence(p, q, kind)) for kind in KINDS}
    for kind in KINDS:
        same = float(divergence_from_logits(x, y, kind))
        assert same == pytest.approx(found[kind], rel=1e-9, abs=1e-12)
        assert float(divergence_from_logits(x, x + 1, kind)) == pytest.approx(0, abs=1e-7)
    assert found["sqrt_chi2"] == pytest.approx(math.sqrt(found["chi2"]))
    assert found["chi2"] >= math.expm1(found["kl"]) * (1 - 1e-9) - 1e-12
    assert math.expm1(found["kl"]) >= found["kl"] >= 2 * found["tv"] ** 2 - 1e-12  # Pinsker
    assert found["chi2"] >= 4 * found["tv"] ** 2 - 1e-12  # Cauchy and Schwarz
    plain = ((p - q) ** 2 / q).sum()
    assert found["chi2"] == pytest.approx(float(plain), rel=1e-9, abs=1e-12)
    assert found["chi2"] == pytest.approx(
        float(chi2_divergence(Categorical(logits=x), Categorical(logits=y))), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(
    ("p", "q", "low", "high"),
    [
        (stats.norm(0.5, 0.8), stats.norm(0.0, 1.0), -12, 12),
        (stats.norm(-1.0, 1.3), stats.norm(0.2, 1.1), -40, 40),
        (stats.beta(2.5, 2.0), stats.beta(2.0, 3.0), 0, 1),
        (stats.beta(0.9, 1.5), stats.beta(1.2, 1.1), 0, 1),
    ],
)
def test_chi2_is_its_integral(p: Any, q: Any, low: float, high: float) -> None:
    want = quad(lambda x: p.pdf(x) ** 2 / q.pdf(x), low, high, epsabs=1e-11, limit=400)[0] - 1
    family = Normal if p.dist.name == "norm" else Beta
    found = chi2_divergence(family(*double(*p.args)), family(*double(*q.args)))
    assert float(found) == pytest.approx(want, rel=1e-6)


def test_sharp_betas_in_single_precision() -> None:
    """Logarithms of some thousands cancel to .2: in float32 that is off by a hundredth."""
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b, c = (torch.tensor(x, dtype=dtype) for x in (1000.0, 1020.0, 1000.0))
        found.append(chi2_divergence(Beta(a, c), Beta(b, c)))
    assert [x.dtype for x in found] == [torch.float32, torch.float64]
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-5)


def test_where_chi2_does_not_exist() -> None:
    wide, narrow = Normal(*double(0.0, 1.5)), Normal(*double(0.0, 1.0))
    assert chi2_divergence(wide, narrow).isinf()
    assert float(chi2_divergence(narrow, wide)) == pytest.approx(1.5**2 / math.sqrt(3.5) - 1)
    p, q = Beta(*double(1.0, 2.0)), Beta(*double(2.0, 2.0))
    assert chi2_divergence(p, q).isinf()
    assert chi2_divergence(q, p).isfinite()
    impossible, usual = Categorical(*double([0.0, 1.0])), Categorical(*double([0.5, 0.5]))
    assert chi2_divergence(usual, impossible).isinf()
    assert float(chi2_divergence(impossible, usual)) == pytest.approx(1.0)
    both = Independent(Normal(*double([0.0, 0.0], [1.0, 1.5])), 1)
    assert chi2_divergence(both, Independent(Normal(*double([0.0, 0.0], [1.0, 1.0])), 1)).isinf()


def test_what_a_loss_adds_is_finite_and_so_is_its_gradient() -> None:
    spread = torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    q = Normal(*double([0.0] * 3, [1.0] * 3))
    for kind in ("kl", "chi2", "sqrt_chi2"):
        p = Normal(torch.zeros(3, dtype=torch.float64), spread)
        found = action_divergence(p, q, kind)
        assert found.isfinite().all()
        (slope,) = torch.autograd.grad(found.sum(), spread)
        assert slope.isfinite().all()
        kl = torch.distributions.kl_divergence(p, q)
        beyond = found**2 if kind == "sqrt_chi2" else found
        torch.testing.assert_close(beyond[1:], kl[1:])  # χ² does not exist there
    assert float(action_divergence(q, q, "sqrt_chi2")[0]) == pytest.approx(0.01)  # √1e-4


def test_the_gradient_of_logits_is_that_of_the_formula() -> None:
    x, y = double([0.3, -1.0, 0.5], [0.0, 0.2, -0.4])
    x.requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda z, kind=kind: divergence_from_logits(z, y, kind), x)


def test_masked_actions_count_nothing() -> None:
    x, y = double([0.3, -math.inf, 0.5], [0.0, -math.inf, -0.4])
    for kind in KINDS:
        small = divergence_from_logits(x[[0, 2]], y[[0, 2]], kind)
        torch.testing.assert_close(divergence_from_logits(x, y, kind), small)
    assert divergence_from_logits(y[[0, 2, 2]], x, "chi2").isinf()


def test_sampled_estimators_have_the_mean_they_say() -> None:
    """200,000 draws, within 4 standard errors each: 4 in 10,000 false alarms, seed fixed."""
    p, q = (Categorical(logits=z) for z in double([0.5, 0.0, -0.5, 0.2], [0.0, 0.3, 0.1, -0.2]))
    torch.manual_seed(0)
    x = p.sample((200_000,))
    kl, chi2 = torch.distributions.kl_divergence(p, q), chi2_divergence(p, q)
    logp, ref = p.log_prob(x), q.log_prob(x)
    estimates = {"k1": kl_k1(logp, ref), "k3": kl_k3(logp, ref), "χ²": torch.expm1(logp - ref)}
    for name, each in estimates.items():
        error = 4 * float(each.std()) / len(x) ** 0.5
        want = float(chi2 if name == "χ²" else kl)
        assert float(each.mean()) == pytest.approx(want, abs=error), name
    assert float(chi2_from_log_ratios(logp - ref)) == pytest.approx(float(estimates["χ²"].mean()))
    assert (estimates["k3"] >= 0).all()
    assert estimates["k3"].var() < estimates["k1"].var()


def test_a_sequence_multiplies() -> None:
    """χ² of two independent tokens, summed over all four answers, is that of the product law."""
    p, q = double([0.7, 0.3], [0.4, 0.6])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    d = sequence_log_ratio(p.log()[pairs], q.log()[pairs])
    weight = p[pairs].prod(dim=1)
    both = float((weight * torch.expm1(d)).sum())
    one = float(divergence(p, q, "chi2"))
    assert both == pytest.approx((1 + one) ** 2 - 1)
    masked = sequence_log_ratio(p.log()[pairs], q.log()[pairs], torch.tensor([[1, 0]] * 4))
    torch.testing.assert_close(masked, (p / q).log()[pairs[:, 0]])
    hidden = torch.where(torch.tensor([[True, False]]), p.log()[pairs], -torch.inf)
    assert sequence_log_ratio(hidden, q.log()[pairs], torch.tensor([[1, 0]] * 4)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """Of 1,000 tokens: a sum in bfloat16 has three digits, and it goes into an exponential."""
    torch.manual_seed(0)
    logp = (-torch.rand(4, 1000)).to(dtype)
    ref = logp - (torch.rand(4, 1000) / 50).to(dtype)
    found, want = sequence_log_ratio(logp, ref), (logp.double() - ref.double()).sum(dim=1)
    assert found.dtype == kl_k3(logp, ref).dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert (kl_k3(logp, ref) >= 0).all()


def test_a_floor_is_asked_for_and_said() -> None:
    p, q = [0.5, 0.5], [1.0, 0.0]
    with pytest.raises(InputError, match="q: got 0 at 1 of the places where p is not, want q > 0"):
        divergence(p, q, "chi2")
    with pytest.warns(UserWarning, match=r"raised to 0\.01"):
        found = divergence(p, q, "chi2", floor=0.01)
    exact = float(divergence(p, np.array([1.0, 0.01]) / 1.01, "chi2"))
    assert float(found) == pytest.approx(exact)
    assert float(divergence(p, q, "tv")) == 0.5  # needs no floor
    assert float(divergence(q, p, "chi2")) == pytest.approx(1.0)


def test_bad_input() -> None:
    half = torch.tensor([0.5, 0.5])
    bad: list[tuple[Any, str]] = [
        (lambda: divergence(half, half, "js"), "kind: got 'js'"),
        (lambda: divergence([0.5, 0.4], half), "p: got numbers below 0, or that do not sum to 1"),
        (lambda: divergence([math.nan, 1.0], half), "p: got numbers below 0"),
        (lambda: divergence(half, [1.0]), r"p and q: got \(2,\), \(1,\)"),
        (lambda: divergence_from_logits(half, half[:1]), "logits and ref_logits"),
        (lambda: kl_k1(half, half[:1]), "logp and ref_logp"),
        (lambda: sequence_log_ratio(half, half), "logp: got shape"),
        (lambda: chi2_from_log_ratios(half[:0]), "log_ratio"),
        (lambda: chi2_from_log_ratios(half * math.nan), "log_ratio"),
        (lambda: chi2_divergence(Poisson(half), Poisson(half)), "p and q: got Poisson and Poisson"),
        (lambda: chi2_divergence(Normal(half, half), Beta(half, half)), "p and q: got Normal"),
        (lambda: action_divergence(Normal(half, half), Normal(half, half), "tv"), "kind"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()
