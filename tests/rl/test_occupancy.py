"""Penalties from logits, discriminators against exact log-ratios, answers of language models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.divergences import divergence
from scoredraw.rl.occupancy import (
    KINDS,
    OccupancyDiscriminator,
    SequencePenaltyReward,
    discriminator_loss,
    occupancy_penalty,
    pointwise_divergence,
    sequence_occupancy_penalty,
    train_discriminator,
)
from scoredraw.rl.tabular_control import occupancy_measure

pytestmark = pytest.mark.oracle


# ── the penalty ─────────────────────────────────────────────────────────────────────────────────


def test_the_mean_penalty_is_the_divergence_of_the_occupancies() -> None:
    """Samples laid out in exact proportion, d = log mu_π/mu_ref: no chance is involved."""
    counts = torch.tensor([40, 30, 20, 10])
    p, q = counts / 100, torch.tensor([0.25, 0.25, 0.4, 0.1])
    d = (p / q).log().repeat_interleave(counts).double()
    mean = {kind: float(pointwise_divergence(d, kind, trim=0).mean()) for kind in KINDS}
    for kind in ("kl", "chi2", "sqrt_chi2"):
        assert mean[kind] == pytest.approx(float(divergence(p, q, kind)), rel=1e-5)
    assert float(torch.exp(-d).mean()) == pytest.approx(1.0)  # E_π[mu_ref/mu_π]
    assert float((q * (p / q)).sum()) == pytest.approx(1.0)  # E_ref[e^{d*}]


@pytest.mark.parametrize("n", [1, 2, 50, 99, 100, 250])
def test_short_batches_are_not_trimmed_away(n: int) -> None:
    """The released slice [0 : -0] is empty below 100 values, and its mean NaN."""
    d = torch.linspace(0.1, 2.0, n, dtype=torch.float64)
    excess = np.sort(np.expm1(d.numpy()))
    cut = n // 100
    c = excess[cut : n - cut].mean()
    np.testing.assert_allclose(pointwise_divergence(d), excess / math.sqrt(c), rtol=1e-12)


def test_where_the_trimmed_mean_is_not_positive() -> None:
    d = torch.tensor([-1.0, -0.5, 0.1])
    torch.testing.assert_close(pointwise_divergence(d, "sqrt_chi2"), torch.expm1(d))
    same = pointwise_divergence(torch.zeros(300))
    assert (same == 0).all()


def test_trimming_leaves_out_the_ends() -> None:
    d = torch.zeros(200, dtype=torch.float64) + 0.5
    d[0], d[1], d[2], d[3] = 9.0, 9.5, -30.0, -30.0
    c = math.expm1(0.5)
    torch.testing.assert_close(pointwise_divergence(d), torch.expm1(d) / math.sqrt(c))
    whole = torch.expm1(d) / torch.expm1(d).mean().sqrt()
    torch.testing.assert_close(pointwise_divergence(d, trim=0.0), whole)


def test_what_is_no_number_is_nothing_and_nothing_overflows() -> None:
    d = torch.tensor([0.0, 1.0, math.nan, 800.0, math.inf, -math.inf])
    for kind in KINDS:
        found = pointwise_divergence(d, kind)
        assert found.isfinite().all()
        assert found[2] == 0
    assert pointwise_divergence(d, "chi2")[3:5].tolist() == [pytest.approx(math.expm1(20))] * 2
    assert pointwise_divergence(d, "kl")[3:].tolist() == [800, 0, 0]
    good = pointwise_divergence(d[:2])
    torch.testing.assert_close(pointwise_divergence(d[:3])[:2], good)  # NaN is not in the mean
    half = pointwise_divergence(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert half.dtype == torch.float32


@pytest.mark.property
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=150), st.sampled_from(KINDS))
def test_laws_of_the_penalty(values: list[float], kind: str) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    D = pointwise_divergence(d, kind)
    assert D.isfinite().all()
    rising = D[d.argsort()].diff()
    assert (rising >= 0).all()  # more suspicious, dearer
    torch.testing.assert_close(occupancy_penalty(d, kind, 0.3), -0.3 * D)
    clipped = occupancy_penalty(d, kind, 0.3, clip=0.1)
    torch.testing.assert_close(clipped, (-0.3 * D).clamp(-0.1, 0.1))
    assert (occupancy_penalty(d, kind, coef=0.0) == 0).all()


def test_wasserstein_less_the_reference() -> None:
    d, there = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    found = occupancy_penalty(d, "wasserstein", reference_logits=there)
    assert found.tolist() == [-0.5, -1.5]


# ── the discriminator ───────────────────────────────────────────────────────────────────────────


def test_losses_by_hand() -> None:
    p, q = torch.tensor([1.0, -1.0]), torch.tensor([0.5])
    soft = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2 + math.log1p(math.exp(0.5))
    assert float(discriminator_loss(p, q)) == pytest.approx(soft)
    tv = 0.01 + math.tanh(0.5) + 0.0025
    assert float(discriminator_loss(p, q, "tv")) == pytest.approx(tv)
    assert float(discriminator_loss(p, q, "wasserstein")) == pytest.approx(0.5)
    weighted = discriminator_loss(p, q, "wasserstein", torch.tensor([3.0, 1.0]))
    assert float(weighted) == pytest.approx(0.5 - 0.5)


def chain(states: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Occupancies of a policy that goes right and of one that wanders, on a chain, (S A,)."""
    at = np.arange(states)
    P = np.zeros((states * 2, states))
    P[at * 2, np.maximum(at - 1, 0)] = 1
    P[at * 2 + 1, np.minimum(at + 1, states - 1)] = 1
    P = 0.9 * P + 0.1 * np.eye(states).repeat(2, axis=0)
    start = np.full(states, 1 / states)
    left = 0.4 - 0.1 * np.sin(at / 30)
    right = np.stack([left, 1 - left], axis=1)
    mu = occupancy_measure(P, right, 0.98, start).reshape(-1)
    mu_ref = occupancy_measure(P, np.full((states, 2), 0.5), 0.98, start).reshape(-1)
    return mu, mu_ref


def features(index: torch.Tensor, states: int = 200) -> torch.Tensor:
    """Where on the chain, smoothly, and the action."""
    s, a = index // 2, index % 2
    knots = torch.linspace(0, 1, 20)
    bumps = torch.exp(-(((s / states)[:, None] - knots) ** 2) / (2 * 0.05**2))
    return torch.cat([bumps, torch.nn.functional.one_hot(a, 2)], dim=1).float()


def test_the_discriminator_finds_the_log_ratio_of_the_occupancies() -> None:
    mu, mu_ref = chain()
    want = np.log(mu / mu_ref)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    samples = [
        features(torch.multinomial(torch.from_numpy(x), 100_000, True, generator=generator))
        for x in (mu, mu_ref)
    ]
    net = OccupancyDiscriminator(22, width=64)
    train_discriminator(
        net, *samples, steps=300, batch_size=2048, learning_rate=3e-3, generator=generator
    )
    with torch.no_grad():
        d = net(features(torch.arange(400))).numpy()
    assert np.corrcoef(d, want)[0, 1] > 0.95
    assert float(mu @ np.abs(d - want)) < 0.1
    assert float(mu @ np.expm1(d)) == pytest.approx(float(mu @ np.expm1(want)), rel=0.15)


def test_weights_are_as_good_as_copies() -> None:
    """Counts of each of 400 pairs against the pairs drawn: the same loss and the same step."""
    mu, _ = chain()
    drawn = torch.multinomial(torch.from_numpy(mu), 5000, True, generator=torch.manual_seed(1))
    counts = torch.bincount(drawn, minlength=400)
    x = features(torch.arange(400))
    found = []
    for policy, weights in ((features(drawn), None), (x, counts)):
        torch.manual_seed(2)
        net = OccupancyDiscriminator(22, width=16)
        loss = train_discriminator(net, policy, x, steps=3, policy_weights=weights)
        found.append((loss, net(x)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_total_variation_has_a_sign_that_tells() -> None:
    mu, mu_ref = (torch.from_numpy(x).float() for x in chain())
    torch.manual_seed(0)
    x = torch.eye(400)
    net = torch.nn.Sequential(torch.nn.Linear(400, 1), torch.nn.Flatten(0))
    train_discriminator(
        net, x, x, "tv", steps=400, learning_rate=0.05, policy_weights=mu, reference_weights=mu_ref
    )
    D = pointwise_divergence(net(x), "tv")
    tv = float(divergence(mu, mu_ref, "tv"))
    assert float((D * (mu - mu_ref)).sum()) / 2 == pytest.approx(tv, rel=0.05)


@pytest.mark.parametrize("lipschitz", [{"gradient_penalty": 10.0}, {"weight_clip": 0.1}])
def test_a_critic_sees_how_far_apart_two_clouds_are(lipschitz: dict[str, float]) -> None:
    """Clouds two apart: the penalised critic measures 2, the clipped one only which is which."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    q = torch.randn(512, 2, generator=generator)
    p = torch.randn(512, 2, generator=generator) + torch.tensor([2.0, 0.0])
    net = OccupancyDiscriminator(2, width=32)
    train_discriminator(
        net, p, q, "wasserstein", steps=400, learning_rate=3e-3, generator=generator, **lipschitz
    )
    with torch.no_grad():
        D = pointwise_divergence(net(p), "wasserstein", reference_logits=net(q))
    if "weight_clip" in lipschitz:
        assert max(float(w.detach().abs().max()) for w in net.parameters()) <= 0.1 + 1e-6
        assert float(D.mean()) > 0
    else:
        assert float(D.mean()) == pytest.approx(2.0, abs=0.3)


# ── language models ─────────────────────────────────────────────────────────────────────────────


def test_answers_are_charged_for_the_whole_of_them() -> None:
    logp, ref = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-2.0, -2.0], [-1, -3.0]])
    found = sequence_occupancy_penalty(logp, ref, kind="chi2", coef=0.5)
    torch.testing.assert_close(found, torch.full((2,), -0.5 * math.expm1(2.0)))
    short = torch.tensor([[1, 0], [1, 0]])
    found = sequence_occupancy_penalty(logp, ref, short, kind="kl")
    assert found.tolist() == [-1.0, 0.0]


def test_a_trl_reward(new_policy: Callable[[], Any], letters: Any) -> None:
    """Against one answer at a time, without padding."""
    policy, reference = new_policy(), new_policy()
    with torch.no_grad():
        for weights in policy.parameters():
            weights.mul_(1.5)
    reward = SequencePenaltyReward(policy, reference, letters, kind="kl", coef=2.0, batch_size=2)
    prompts, answers = ["1+1=", "12+30=", "7-"], ["2", "42", "1=6"]
    ids = [letters(answer)["input_ids"] for answer in answers]
    policy.train()
    found = reward(prompts=prompts, completions=answers, completion_ids=ids, other=[1, 2, 3])
    assert policy.training
    assert reward.__name__ == "kl_penalty"
    for prompt, answer, value in zip(prompts, ids, found, strict=True):
        row = torch.tensor([letters(prompt)["input_ids"] + answer])
        d = 0.0
        for sign, model in ((1, policy.eval()), (-1, reference.eval())):
            with torch.no_grad():
                logp = model(input_ids=row).logits.log_softmax(-1)[0, :-1]
            n = len(answer)
            d += sign * float(logp[-n:].gather(1, row[0, -n:, None]).sum())
        assert value == pytest.approx(-2 * d, abs=1e-4)
    same = SequencePenaltyReward(policy, policy, letters)
    assert same(prompts=prompts, completions=answers, completion_ids=ids) == [0.0] * 3
    assert same(prompts=[], completions=[], completion_ids=[]) == []
    reward.tokenizer = copy.deepcopy(letters)
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts]
    again = reward(prompts=chat, completions=answers, completion_ids=ids)
    assert again == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_in_a_trl_run(
    bf16: bool, new_policy: Callable[[], Any], letters: Any, grpo_config: Callable[..., Any]
) -> None:
    """The policy starts at the reference, so the penalty is 0 in the first step, and not after;
    also where half precision is used for it and not for the reference."""
    from datasets import Dataset
    from trl import GRPOTrainer

    policy = new_policy()
    penalty = SequencePenaltyReward(policy, new_policy(), letters, kind="chi2", coef=1.0)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[
            lambda completions, **columns: [float("1" in c) for c in completions],
            penalty,
        ],
        args=grpo_config(learning_rate=1e-2, bf16=bf16),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 8}),
        processing_class=letters,
    )
    trainer.train()
    seen = [row["rewards/chi2_penalty/mean"] for row in trainer.state.log_history if "loss" in row]
    assert seen[0] == pytest.approx(0, abs=1e-5)
    assert abs(seen[1]) > 1e-5


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


def test_bad_input() -> None:
    x, net = torch.zeros(4, 2), OccupancyDiscriminator(2, 4)
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: occupancy_penalty([]), "logits: got shape"),
        (lambda: occupancy_penalty([[0.0]]), r"logits: got shape \(1, 1\)"),
        (lambda: occupancy_penalty([0.0], "js"), "kind: got 'js'"),
        (lambda: occupancy_penalty([0.0], coef=-1.0), "coef: got -1"),
        (lambda: occupancy_penalty([0.0], clip=0.0), "clip: got 0"),
        (lambda: occupancy_penalty([0.0], trim=0.5), "trim: got 0.5"),
        (lambda: occupancy_penalty([0.0], reference_logits=[0.0]), "reference_logits"),
        (
            lambda: occupancy_penalty([0.0], "wasserstein", reference_logits=[math.nan]),
            "reference_logits: got NaN",
        ),
        (lambda: discriminator_loss(x, x), "policy_logits: got shape"),
        (lambda: discriminator_loss(x[0], x[0], policy_weights=-x[0] - 1), "policy_weights"),
        (lambda: discriminator_loss(x[0], x[0], "no"), "kind"),
        (lambda: train_discriminator(net, x, x[:, :1]), "policy_x and reference_x"),
        (lambda: train_discriminator(net, x, x, steps=0), "steps: got 0"),
        (lambda: train_discriminator(net, x[:0], x, batch_size=2), "policy_x and reference_x"),
        (lambda: train_discriminator(net, x, x, batch_size=0), "batch_size: got 0"),
        (
            lambda: train_discriminator(net, x, x, batch_size=2, policy_weights=torch.ones(9)),
            r"policy_weights: got shape \(9,\), want \(4,\)",
        ),
        (
            lambda: train_discriminator(net, x, x, "wasserstein", weight_clip=-1.0),
            "gradient_penalty, weight_clip: got 10.0 and -1.0",
        ),
        (
            lambda: train_discriminator(net, x, x, "wasserstein", gradient_penalty=None),
            "gradient_penalty, weight_clip",
        ),
        (lambda: OccupancyDiscriminator(0), "features, width"),
        (lambda: SequencePenaltyReward(None, None, None, kind="no"), "kind: got 'no'"),
        (lambda: SequencePenaltyReward(None, None, None, batch_size=0), "batch_size: got 0"),
        (lambda: SequencePenaltyReward(None, None, None)([], []), "completion_ids: got None"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()
