"""Noisy flow steps: torch's own density, the marginals of the flow, the ratio in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from scoredraw.errors import InputError
from scoredraw.rl.flow_policy import (
    flow_policy_loss,
    flow_sde_step,
    group_noise,
    normalised_log_ratio,
    shifted_sigmas,
    trained_steps,
)
from scoredraw.rl.pairwise_rewards import normalised_advantages, score_win_rate

pytestmark = pytest.mark.oracle

F64 = torch.float64
X, V = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_a_step_by_hand() -> None:
    """Levels a row; the density is torch's; the first level's noise is that of sigma_max."""
    sigma, after = (
        torch.tensor([1.0, 0.5, 0.2], dtype=F64),
        torch.tensor([0.9, 0.3, 0.0], dtype=F64),
    )
    step = flow_sde_step(X, V, sigma, after, 0.7, 0.9, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        s, dt = float(sigma[i]), float(after[i] - sigma[i])
        noise = 0.7 * math.sqrt(s / (1 - (0.9 if s == 1 else s)))
        mean = X[i] * (1 + noise**2 / (2 * s) * dt)
        mean += V[i] * (1 + noise**2 * (1 - s) / (2 * s)) * dt
        assert torch.allclose(step.mean[i], mean)
        assert step.std[i].item() == pytest.approx(noise * math.sqrt(-dt))
        density = Normal(mean, noise * math.sqrt(-dt)).log_prob(step.next[i]).mean()
        assert step.logp[i].item() == pytest.approx(density.item())
    again = flow_sde_step(X, V, sigma, after, 0.7, 0.9, taken=step.next)
    assert torch.equal(again.logp, step.logp)
    half = flow_sde_step(X.half(), V.half(), 0.5, 0.4)
    assert half.next.dtype == half.logp.dtype == torch.float32


def test_without_noise_it_is_the_flow() -> None:
    step = flow_sde_step(X, V, 0.5, 0.4, eta=1e-6)
    assert torch.allclose(step.mean, X - 0.1 * V)


def test_the_noise_leaves_the_distribution() -> None:
    """Data N(2, .3²), its exact velocity: 400 noisy steps end where the flow does.

    20,000 samples: the mean is off by at most .01 and the deviation by at most .01, more than four
    and six standard errors; the steps' own error is below .003.
    """
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20_000, 1, generator=g, dtype=F64)
    sigmas = shifted_sigmas(400).double()
    for now, after in itertools.pairwise(sigmas):
        spread = (1 - now) ** 2 * 0.09 + now**2
        away = (x - (1 - now) * 2) / spread
        v = now * away - (2 + (1 - now) * 0.09 * away)  # E[noise | x] - E[data | x]
        x = flow_sde_step(x, v, now, after, 0.7, float(sigmas[1]), generator=g).next
    assert x.mean().item() == pytest.approx(2, abs=0.01)
    assert x.std().item() == pytest.approx(0.3, abs=0.01)


def test_the_normalised_ratio_is_the_mean_of_noise_times_change() -> None:
    """At every level, where the plain ratio's mean is -mean(Δ²)/(2 s²)."""
    for now, after in ((0.9, 0.85), (0.3, 0.2)):
        old = flow_sde_step(X, V, now, after, generator=torch.Generator().manual_seed(3))
        new = flow_sde_step(X, V + 0.1 * X, now, after, taken=old.next)
        noise, change = (old.next - old.mean) / old.std, new.mean - old.mean
        found = normalised_log_ratio(new.logp, old.logp, new.mean, old.mean, old.std)
        assert torch.allclose(found, (noise * change).flatten(1).mean(1))
        s = old.std.item()
        plain = (noise * change / s - change**2 / (2 * s**2)).flatten(1).mean(1)
        assert torch.allclose(new.logp - old.logp, plain)
    rows = flow_sde_step(X, V, torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.8, 0.4, 0.1]))
    same = normalised_log_ratio(rows.logp, rows.logp, rows.mean, rows.mean, rows.std)
    assert not same.any()


def test_the_loss_by_hand() -> None:
    ratio = torch.tensor([[0.0, 0.02], [-0.02, 0.00005]], dtype=F64)
    A = torch.tensor([7.0, -1.0], dtype=F64)
    rho = ratio.exp()
    want = torch.stack([
        torch.maximum(-a * rho[i], -a * rho[i].clamp(1 - 1e-4, 1 + 1e-4))
        for i, a in enumerate((5.0, -1.0))
    ])  # fmt: skip
    assert flow_policy_loss(ratio, A).loss.item() == pytest.approx(want.mean().item())
    mask = torch.tensor([[True, False], [True, True]])
    dt = torch.tensor([0.1, 0.2], dtype=F64)
    found = flow_policy_loss(ratio, A, step_size=dt, trained=mask).loss
    assert found.item() == pytest.approx((want / dt)[mask].mean().item())


def test_trained_steps_and_noise() -> None:
    chosen = trained_steps(200, 10, 0.6, torch.Generator().manual_seed(0))
    assert (chosen.sum(1) == 5).all()  # 60 % of 9, rounded down
    assert not chosen[:, -1].any()
    assert chosen[:, :-1].any(dim=0).all()
    assert len(chosen.unique(dim=0)) > 20
    assert trained_steps(200, 10, 0.6, last=True)[:, -1].any()
    noise = group_noise(2, 3, (4, 5))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[2], noise[3])


@pytest.mark.parametrize("normalise", [False, True])
def test_a_flow_learns_from_win_rates(normalise: bool) -> None:
    """A drift is pulled where the reward is: group noise, 8 steps, clipped steps on old samples."""
    g = torch.Generator().manual_seed(4)
    drift = torch.zeros(2, requires_grad=True)
    target, sigmas = torch.tensor([1.0, -0.5]), shifted_sigmas(8)
    optimizer = torch.optim.Adam([drift], lr=0.05)

    def steps(path: list[Tensor] | None) -> Any:
        x = group_noise(8, 8, (2,), g) if path is None else path[0]
        seen, found = [x], []
        for t in range(8):
            taken = None if path is None else path[t + 1]
            now = flow_sde_step(
                x, x - drift, sigmas[t], sigmas[t + 1], sigma_max=float(sigmas[1]),
                taken=taken, generator=g,
            )  # fmt: skip
            x = now.next
            seen.append(x)
            found.append(now)
        return seen, found

    def distance(x: Tensor) -> Tensor:
        return (x - target).norm(dim=1)

    first = None
    for _ in range(60):
        with torch.no_grad():
            path, old = steps(None)
        first = distance(path[-1]).mean() if first is None else first
        A = normalised_advantages(
            score_win_rate(-distance(path[-1]), num_generations=8, margin=0.05), num_generations=8
        )
        for _ in range(2):
            new = steps(path)[1]
            ratios = [
                normalised_log_ratio(n.logp, o.logp, n.mean, o.mean, o.std)
                if normalise
                else n.logp - o.logp
                for n, o in zip(new, old, strict=True)
            ]
            loss = flow_policy_loss(
                torch.stack(ratios, 1), A, clip=0.2, trained=trained_steps(64, 8, generator=g),
                step_size=-sigmas.diff() if normalise else None,
            ).loss  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert first is not None
    assert distance(path[-1]).mean() < 0.8 * first
    assert (drift.detach() * target > 0).all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: flow_sde_step(X, V[:2], 0.5, 0.4), "x, velocity"),
        (lambda: flow_sde_step(X, V, 0.4, 0.5), "sigma, sigma_next"),
        (lambda: flow_sde_step(X, V, 1.1, 0.5), "sigma, sigma_next"),
        (lambda: flow_sde_step(X, V, math.nan, 0.5), "sigma, sigma_next"),
        (lambda: flow_sde_step(X, V, 1.0, 0.5), "sigma_max"),
        (lambda: flow_sde_step(X, V, 1.0, 0.5, sigma_max=1.0), "sigma_max"),
        (lambda: flow_sde_step(X, V, torch.tensor([0.5, 0.5]), 0.4), "sigma"),
        (lambda: flow_sde_step(X, V, 0.5, 0.4, eta=0.0), "eta"),
        (lambda: normalised_log_ratio(V[0, 0], V[0, 0], X, X, X), "logp"),
        (lambda: normalised_log_ratio(V[:, 0, 0], V[:, 0, 0], X, X, X[:2, :1, :1]), "std"),
        (lambda: flow_policy_loss(X[0], X[0, :, 0], max_advantage=0), "max_advantage"),
        (lambda: flow_policy_loss(X[0], X[0, :, 0], trained=X[0] > 99), "trained"),
        (lambda: flow_policy_loss(X[0], X[0, :, 0], trained=X[0, :1] > 0), "trained"),
        (lambda: flow_policy_loss(X[0], X[0, :, 0], step_size=torch.zeros(5)), "step_size"),
        (lambda: trained_steps(2, 10, 0.05), "share"),
        (lambda: shifted_sigmas(1), "steps"),
        (lambda: group_noise(0, 2, (1,)), "prompts"),
    ],
)
def test_refuses(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"^{named}"):
        call()
