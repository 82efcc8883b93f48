"""Group advantages: closed forms, laws, what must not matter, real groups, and a TRL run."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.papers.math_groups import math_groups
from scoredraw.rl.group_advantages import (
    GROUP_METHODS,
    GroupAdvantage,
    fill_batch,
    group_advantages,
    kept_answers,
    overlong_penalty,
)
from scoredraw.rl.policy_loss import clipped_token_loss
from scoredraw.rl.reward_groups import to_tokens
from scoredraw.rl.token_credit import whiten

pytestmark = pytest.mark.oracle

COMPARING = ("grpo", "dapo", "dr_grpo", "rloo", "ngrpo")
VERDICTS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9)
GRADES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.9]), min_size=2, max_size=9)


def one_group(rewards: Any, **options: Any) -> Tensor:
    """In float64, of one group."""
    values = torch.as_tensor(rewards, dtype=torch.float64)
    return group_advantages(values, None, len(values), **options)


# ── closed forms ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("G", [2, 3, 4, 8, 16])
def test_closed_forms_of_verdicts(G: int) -> None:
    """k right of G: ngrpo and grpo at eps = 0, and how little the usual eps changes."""
    for k in range(G + 1):
        rewards = [1.0] * k + [0.0] * (G - k)
        right = math.sqrt(G * (G - k) / ((k + 1) * (G + 1)))
        wrong = -math.sqrt(G * (k + 1) / ((G - k) * (G + 1))) if k < G else 0.0
        found = one_group(rewards, eps=0.0)
        want = torch.tensor([right] * k + [wrong] * (G - k), dtype=torch.float64)
        assert torch.allclose(found, want, atol=0, rtol=1e-12)
        assert torch.allclose(one_group(rewards), want, atol=0, rtol=5e-6)
        ghost = right if k else math.sqrt(G * G / (G + 1))
        assert found.sum() == pytest.approx(-ghost if k < G else 0.0, abs=1e-6)
        grpo = one_group(rewards, estimator="grpo", eps=0.0)
        spread = math.sqrt(k * (G - k) / G / (G - 1))
        by_hand = [(r - k / G) / spread if spread else 0.0 for r in rewards]
        assert torch.allclose(grpo, torch.tensor(by_hand).double(), atol=1e-12, rtol=1e-6)


@given(GRADES, st.integers(0, 4))
def test_the_sum_rule(rewards: list[float], n: int) -> None:
    """All deviations sum to 0, so those of real answers to -n times the virtual one's, <= 0."""
    values = np.array([*rewards, *[1.0] * n])
    ghost = (1 - values.mean()) / (values.std(ddof=1) + 1e-6)
    total = float(one_group(rewards, num_virtual=n).sum())
    assert total == pytest.approx(-n * ghost, abs=1e-5)
    assert total < 1e-9


@given(st.floats(-5, 0.999), st.integers(2, 16))
def test_equal_rewards(level: float, G: int) -> None:
    """Nothing from a comparison; -1/√(G+1) from the virtual answer, whatever the level."""
    for estimator in ("grpo", "dapo", "dr_grpo", "rloo"):
        assert not one_group([level] * G, estimator=estimator).any()
    found = one_group([level] * G, eps=0.0)
    assert torch.allclose(found, torch.full_like(found, -1 / math.sqrt(G + 1)), rtol=1e-9)
    assert not one_group([level] * G, max_reward=level).any()


def test_equal_rewards_in_float32() -> None:
    """0.1 three times has no mean of 0.1 in float32."""
    for estimator in ("grpo", "dr_grpo", "rloo"):
        for G in range(2, 40):
            assert not group_advantages([0.1] * G, None, G, estimator).any()


def test_equal_rewards_over_a_batch_or_beside_the_greedy_answer() -> None:
    """Also at eps = 0, where a deviation that is only rounding would make them large."""
    for kind in (torch.float16, torch.float32, torch.float64):
        same = torch.full((6,), 0.1, dtype=kind)
        for estimator in ("reinforce_pp", "reinforce_pp_baseline"):
            assert not group_advantages(same, None, 3, estimator, eps=0.0).any()
        assert not group_advantages(same, None, 3, "remax", greedy_rewards=[0.1, 0.1]).any()


@given(GRADES)
def test_no_virtual_answer_is_grpo(rewards: list[float]) -> None:
    assert torch.equal(one_group(rewards, num_virtual=0), one_group(rewards, estimator="grpo"))


@given(GRADES, st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_level_of_the_rewards_do_not_matter(
    rewards: list[float], a: float, b: float
) -> None:
    moved = [a * r + b for r in rewards]
    for estimator in ("ngrpo", "grpo"):
        plain = one_group(rewards, estimator=estimator, eps=0.0)
        top = a + b if estimator == "ngrpo" else 1.0
        found = one_group(moved, estimator=estimator, eps=0.0, max_reward=top)
        if len(set(rewards)) > 1 or estimator == "ngrpo":
            assert torch.allclose(found, plain, rtol=1e-12, atol=1e-9)


def test_the_others_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)

    def of(estimator: str, **options: Any) -> list[float]:
        return group_advantages(rewards, None, 3, estimator, **options).tolist()

    third = 1 / 3
    assert of("dr_grpo") == pytest.approx([2 * third, -third, -third, 0, 0, 0])
    assert of("rloo") == pytest.approx([1, -0.5, -0.5, 0, 0, 0])
    assert of("dapo") == of("grpo")
    assert of("psr") == [1, 0, 0, 1, 1, 1]
    assert of("nsr") == [0, -1, -1, 0, 0, 0]
    assert of("w_reinforce", positive_weight=0.25) == [0.25, -1, -1, 0.25, 0.25, 0.25]
    assert of("remax", greedy_rewards=[0.0, 1.0]) == [1, 0, 0, 0, 0, 0]
    away = rewards - rewards.mean()
    assert of("reinforce_pp", eps=0.0) == pytest.approx((away / away.std()).tolist())
    centred = torch.tensor(of("dr_grpo"), dtype=torch.float64)
    assert of("reinforce_pp_baseline", eps=0.0) == pytest.approx((centred / centred.std()).tolist())


def test_whitening_over_tokens_is_a_step_more() -> None:
    """As the released REINFORCE++ has it, from rewards or from ours."""
    rewards = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
    ours = whiten(to_tokens(group_advantages(rewards, None, 2, "reinforce_pp"), mask), mask)
    tokens = rewards[:, None].expand(4, 5)[mask]
    want = (tokens - tokens.mean()) / tokens.std()
    assert torch.allclose(ours[mask], want, atol=1e-6)


def test_grpo_as_trl_has_it() -> None:
    rewards = torch.rand(32, generator=torch.Generator().manual_seed(0))
    table = rewards.reshape(-1, 8)
    want = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
    found = group_advantages(rewards, None, 8, "grpo", eps=1e-4)
    assert torch.allclose(found, want.reshape(-1), atol=1e-6)


# ── the clip ────────────────────────────────────────────────────────────────────────────────────


def test_two_bounds_are_one_bound_a_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(64, 50, generator=generator, dtype=torch.float64) / 3
    A = torch.randn(64, 50, generator=generator, dtype=torch.float64)
    loss, clipped = clipped_token_loss(logp, torch.zeros_like(logp), A, 0.16, 0.24)
    ratio = logp.exp()
    by_sign = torch.where(A > 0, ratio.clamp(max=1.24), ratio.clamp(min=1 - 0.16))
    assert torch.equal(loss, -by_sign * A)
    assert torch.equal(clipped, by_sign != ratio)
    assert clipped.any()


def test_what_each_method_brings() -> None:
    bounds = {name: (m.eps_low, m.eps_high) for name, m in GROUP_METHODS.items()}
    assert bounds.pop("ngrpo") == (0.16, 0.24)
    assert bounds.pop("dapo") == (0.2, 0.28)
    assert set(bounds.values()) == {(0.2, 0.2)}
    filters = {name: m.filter for name, m in GROUP_METHODS.items() if m.filter != "none"}
    assert filters == {
        "dapo": "all", "ngrpo": "all_correct", "psr": "incorrect", "nsr": "correct",
    }  # fmt: skip
    losses = {name: m.trl_options()["loss_type"] for name, m in GROUP_METHODS.items()}
    assert (losses["grpo"], losses["dr_grpo"], losses["dapo"]) == ("grpo", "dr_grpo", "dapo")
    assert losses["ngrpo"] == "bnpo"


# ── the law of a group that is all wrong ────────────────────────────────────────────────────────


def test_the_mean_and_the_variance_of_an_all_wrong_group() -> None:
    """A softmax over 6 answers, 10^5 groups of 8, some 10 % all wrong.

    The mean by χ², 3 degrees of freedom, at .1 % false alarms; the variance along the law's
    direction within 4 standard errors, .01 %. Seed fixed."""
    from scipy.stats import chi2

    groups, G, K = 100_000, 8, 6
    logits = torch.tensor([0.0, -0.5, 1.5, 1.0, 0.5, 0.0], dtype=torch.float64)
    pi, right = logits.softmax(0), torch.arange(K) < 2
    p = float(pi[right].sum())
    u = torch.rand(groups, G, generator=torch.Generator().manual_seed(27), dtype=torch.float64)
    y = torch.searchsorted(pi.cumsum(0), u).clamp(max=K - 1)
    rewards = right[y].double()
    A = group_advantages(rewards.flatten(), None, G).reshape(groups, G)
    wrong = ~right[y].any(dim=1)
    counts = torch.zeros(groups, K, dtype=torch.float64).scatter_add(1, y, A)
    gradient = (counts - A.sum(dim=1, keepdim=True) * pi)[wrong].numpy()  # Σ A (e_y - π)
    n, c = len(gradient), 1 / math.sqrt(G + 1)
    assert n / groups == pytest.approx((1 - p) ** G, abs=4 * math.sqrt(0.25 / groups))
    score = (torch.where(right, pi / p, 0.0) - pi).numpy()  # E[∇ log π | right]
    law = c * G * p / (1 - p) * score
    off = gradient.mean(axis=0) - law
    spread = np.linalg.pinv(np.cov(gradient.T), rcond=1e-9)
    assert np.linalg.matrix_rank(np.cov(gradient.T), tol=1e-9) == 3  # 4 wrong answers, sum 0
    assert np.abs(off[:2]).max() < 1e-5  # no chance in what right answers get
    assert n * off @ spread @ off < chi2.ppf(0.999, 3)
    assert n * law @ spread @ law > 1000  # the law itself would be seen
    q = torch.where(right, 0.0, pi / (1 - p)).numpy()
    variance = c**2 * G * (score**2 @ q - (score @ q) ** 2)
    along = gradient @ score
    error = math.sqrt(np.mean((along - along.mean()) ** 4) - along.var() ** 2) / math.sqrt(n)
    assert along.var() == pytest.approx(variance, abs=4 * error)


def test_all_wrong_is_silence_elsewhere() -> None:
    for estimator in ("grpo", "dapo", "dr_grpo", "rloo", "psr"):
        assert not one_group([0.0] * 8, estimator=estimator).any()
    assert one_group([0.0] * 8, estimator="ngrpo").tolist() == pytest.approx([-1 / 3] * 8, rel=1e-5)
    assert one_group([0.0] * 8, estimator="nsr").tolist() == [-1.0] * 8


# ── groups, and what has no reward ──────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0.0, 0.5, 1.0])), min_size=1))
def test_ragged_groups_are_each_alone(rows: list[tuple[int, float | None]]) -> None:
    """Also in another order of rows, and without those that have no reward."""
    ids, rewards = [i for i, _ in rows], [r for _, r in rows]
    for estimator in COMPARING:
        found = group_advantages(rewards, ids, estimator=estimator)
        for group in set(ids):
            mine = [k for k, (i, r) in enumerate(rows) if i == group and r is not None]
            if mine:
                alone = group_advantages([rewards[k] for k in mine], None, len(mine), estimator)
                assert torch.allclose(found[mine], alone, atol=1e-6)
        assert not found[[k for k, r in enumerate(rewards) if r is None]].any()
        back = group_advantages(rewards[::-1], ids[::-1], estimator=estimator)
        assert torch.allclose(back.flip(0), found, atol=1e-6)


def test_a_group_of_one() -> None:
    def one(estimator: str, single_sample: str) -> float:
        how: dict[str, Any] = {"estimator": estimator, "single_sample": single_sample}
        return float(group_advantages([0.5, 0.0, 1.0], [1, 2, 2], eps=1e-3, **how)[0])

    for estimator in COMPARING:
        assert one(estimator, "zero") == 0
        scaled = estimator in {"grpo", "dapo", "ngrpo"}
        assert one(estimator, "raw") == pytest.approx(0.5 / (1.001 if scaled else 1.0))
    centred = torch.tensor([0.5, -0.5, 0.5])
    standard = (centred - centred.mean()) / (centred.std() + 1e-3)
    assert one("reinforce_pp_baseline", "raw") == pytest.approx(float(standard[0]))


def test_a_highest_reward_for_each_group() -> None:
    rewards, ids = [2.0, 0.0, 1.0, 0.0], [9, 9, 4, 4]
    found = group_advantages(rewards, ids, max_reward=[1.0, 2.0])  # in rising order of ids
    want = one_group([1.0, 0.0]).float()
    assert torch.allclose(found, torch.cat([want, want]), atol=1e-5)
    assert group_advantages(rewards, ids, max_reward=[1.0, 2.0], estimator="nsr").tolist() == [
        0.0, -2.0, 0.0, -1.0,
    ]  # fmt: skip


def test_types() -> None:
    half = torch.tensor([0.7, 0.0], dtype=torch.float16)
    assert group_advantages(half, None, 2, max_reward=0.7).dtype == torch.float32
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        top = torch.tensor([0.7, 0.7, 0.7, 0.0], dtype=kind)
        assert not group_advantages(top, None, 2, max_reward=0.7)[:2].any()
        assert not kept_answers(top, None, 2, max_reward=0.7)[:2].any()
    for numbers in (np.float16, np.float32, np.float64):
        assert not group_advantages(np.full(2, 0.7, numbers), None, 2, max_reward=0.7).any()
    assert group_advantages(np.array([1.0, 0.0]), None, 2).dtype == torch.float64
    assert group_advantages([1, 0], None, 2).dtype == torch.float32
    assert group_advantages([], None, 2).tolist() == []
    assert group_advantages([], torch.zeros(0, dtype=torch.int64)).tolist() == []


# ── filters ─────────────────────────────────────────────────────────────────────────────────────


def test_filters() -> None:
    rewards = [1, 1, 0, 0, 1, 0, 0.5, 0.5, None, 1, None, None]
    dropped = {
        "none": [], "all_correct": [0, 1], "all_incorrect": [2, 3, 6, 7],
        "all": [0, 1, 2, 3, 6, 7], "correct": [0, 1, 4, 9], "incorrect": [2, 3, 5, 6, 7],
    }  # fmt: skip
    for name, rows in dropped.items():
        kept = kept_answers(rewards, None, 2, name)
        assert (~kept).nonzero()[:, 0].tolist() == rows, name
    assert kept_answers(rewards, None, 2, "all_correct", max_reward=2.0).all()
    assert kept_answers([3, 3, 0, 3], None, 2, "all").tolist() == [False, False, True, True]


@given(st.lists(VERDICTS, min_size=1, max_size=4))
def test_dropped_groups_had_no_gradient(groups: list[list[float]]) -> None:
    rewards = [r for group in groups for r in group]
    ids = [i for i, group in enumerate(groups) for _ in group]
    for estimator, method in GROUP_METHODS.items():
        if method.filter != "none":
            kept = kept_answers(rewards, ids, filter=method.filter)
            assert not group_advantages(rewards, ids, estimator=estimator)[~kept].any()


def test_a_batch_is_filled() -> None:
    random = torch.Generator().manual_seed(0)
    batches: list[Tensor] = []

    def generate() -> Tensor:
        batches.append((torch.rand(12, generator=random) < 0.15).float())
        return batches[-1]

    places = fill_batch(generate, 5, 4)
    rewards = torch.stack(batches)[places[:, 0], places[:, 1]].reshape(-1, 4)
    assert len(rewards) == 5
    assert ((rewards.sum(dim=1) > 0) & (rewards.sum(dim=1) < 4)).all()
    mixed = [int((b.reshape(-1, 4).sum(dim=1) % 4 != 0).sum()) for b in batches]
    assert sum(mixed[:-1]) < 5 <= sum(mixed)
    endless = iter([torch.ones(4)] * 11)
    assert fill_batch(lambda: next(endless), 1, 4).shape == (0, 2)
    assert len(list(endless)) == 1  # ten were asked for
    assert fill_batch(lambda: torch.ones(4), 1, 4, "none").tolist() == [[0, i] for i in range(4)]


def test_penalty_for_length_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    for longest, cache in ((100, 20), (8, 8), (7, 3)):
        theirs = get_soft_overlong_punishment(longest, cache)([[0] * n for n in range(120)])
        assert overlong_penalty(range(120), longest, cache).tolist() == pytest.approx(theirs)
    assert overlong_penalty([7, 8, 9], 8, 0).tolist() == [0.0, 0.0, -1.0]


def test_real_groups() -> None:
    """100 MATH problems, 8 answers each: 86 all right, 4 all wrong."""
    groups = math_groups()
    rewards = torch.tensor([float(right) for group in groups for right in group["correct"]])

    def silent(estimator: str) -> int:
        found = group_advantages(rewards, None, 8, estimator).reshape(-1, 8)
        return int((found == 0).all(dim=1).sum())

    assert {name: silent(name) for name in ("grpo", "rloo", "dr_grpo", "dapo", "ngrpo", "nsr")} == {
        "grpo": 90, "rloo": 90, "dr_grpo": 90, "dapo": 90, "ngrpo": 86, "nsr": 86,
    }  # fmt: skip
    kept = [int(kept_answers(rewards, None, 8, f).sum()) for f in ("all", "all_correct")]
    assert kept == [80, 112]


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_trl_runs(letters: Any, new_policy: Callable[[], Any], grpo_config: Any) -> None:
    """All wrong: ngrpo moves the weights, grpo doesn't; all right: neither, and nothing is NaN."""
    from datasets import Dataset

    from scoredraw.rl.trainer import AdvantageGRPOTrainer

    prompts = Dataset.from_list([{"prompt": f"{a}+{a}="} for a in range(8)])

    def run(estimator: str, level: float) -> tuple[dict[str, Tensor], Any]:
        def same(completions: list[str], **_: Any) -> list[float]:
            return [level] * len(completions)

        trainer = AdvantageGRPOTrainer(
            model=new_policy(), reward_funcs=same, advantage_fn=GroupAdvantage(estimator),
            train_dataset=prompts, processing_class=letters,
            args=grpo_config(num_iterations=2, **GROUP_METHODS[estimator].trl_options()),
        )  # fmt: skip
        trainer.train()
        return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}, trainer

    before = {k: v.clone() for k, v in new_policy().state_dict().items()}

    def moved(weights: dict[str, Tensor]) -> bool:
        assert all(value.isfinite().all() for value in weights.values())
        return any(not torch.equal(value, before[name]) for name, value in weights.items())

    weights, trainer = run("ngrpo", 0.0)
    assert moved(weights)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.16, 0.24)
    assert trainer.state.log_history[0]["frac_dead_groups"] == 0
    assert not moved(run("ngrpo", 1.0)[0])
    for level in (0.0, 1.0):
        weights, trainer = run("dapo", level)
        assert not moved(weights)
        assert trainer.state.log_history[0]["frac_dead_groups"] == 1


@pytest.mark.contract
def test_the_adapter_is_the_functions() -> None:
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 1, torch.nan, 0])
    batch: Any = SimpleNamespace(reward=rewards, group_ids=torch.arange(8) // 2)
    for estimator, method in GROUP_METHODS.items():
        how = {} if estimator != "remax" else {"greedy_rewards": torch.ones(4)}
        adapter = GroupAdvantage(
            estimator, greedy_rewards=(lambda rollouts: torch.ones(4)) if how else None
        )
        found = adapter(batch)
        A, keep = found if isinstance(found, tuple) else (found, None)
        assert torch.equal(A, group_advantages(rewards, None, 2, estimator, **how))
        assert isinstance(found, tuple) == (method.filter != "none")
        if keep is not None:
            assert torch.equal(keep, kept_answers(rewards, None, 2, method.filter))
    A = GroupAdvantage("ngrpo", filter="none", max_reward=2.0, eps=0.0)(batch)
    assert isinstance(A, Tensor)
    assert A[:2].tolist() == pytest.approx([-1 / math.sqrt(3)] * 2)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: group_advantages([1.0, math.inf], None, 2), "rewards: got an infinite one"),
    (lambda: group_advantages([1.0, -math.inf], None, 2), "rewards: got an infinite one"),
    (lambda: group_advantages([1.0] * 3, None, 2), "rewards: got 3 rows, want a multiple of num_g"),
    (lambda: group_advantages([1.0] * 2, [1]), r"group_ids: got shape \(1,\)"),
    (lambda: group_advantages([1.5, 0.0], None, 2), r"rewards: got \[1.5\] above max_reward"),
    (
        lambda: group_advantages([1.5, 0.0], None, 2, "nsr"),
        r"rewards: got \[1.5\] above max_reward",
    ),
    (lambda: group_advantages([0.5, 0.0], None, 2, "psr"), r"rewards: got \[0.5\], want 0 or max"),
    (lambda: group_advantages([0.5, 0.0], None, 2, max_reward=[1.0, 1.0]), "max_reward: got shape"),
    (lambda: group_advantages([0.5, 0.0], None, 2, max_reward=math.nan), "max_reward: got NaN"),
    (lambda: group_advantages([0.5, 0.0], None, 2, "ppo"), "estimator: got 'ppo', want grpo"),
    (lambda: group_advantages([0.5, 0.0], None, 2, num_virtual=-1), "num_virtual: got -1"),
    (lambda: group_advantages([0, 1], None, num_virtual=cast("int", 1.5)), "num_virtual: got 1.5"),
    (lambda: group_advantages([0.5, 0.0], None, 2, ddof=2), "ddof: got 2"),
    (lambda: group_advantages([0.5, 0.0], None, 2, eps=-1.0), "eps: got -1.0"),
    (lambda: group_advantages([0.5, 0.0], None, 2, single_sample="no"), "single_sample: got 'no'"),
    (lambda: group_advantages([0, 1], None, 2, positive_weight=-1.0), "positive_weight: got -1.0"),
    (lambda: group_advantages([0, 1], None, 2, "remax"), "greedy_rewards: got None"),
    (
        lambda: group_advantages([0, 1], None, 2, "remax", greedy_rewards=[math.nan]),
        "greedy_rewards: got NaN or infinity",
    ),
    (lambda: kept_answers([0, 1], None, 2, "some"), "filter: got 'some', want none, all_correct"),
    (lambda: kept_answers([0, 2], None, 2), r"rewards: got \[2.0\] above max_reward"),
    (lambda: fill_batch(list, 0), r"groups, max_batches: got \(0, 10\)"),
    (lambda: fill_batch(list, 1, filter="correct"), "filter: got 'correct', want none, all_corr"),
    (lambda: overlong_penalty([1], 10, 11), r"longest, cache: got \(10, 11\)"),
    (lambda: overlong_penalty([-1], 10, 1), "lengths: got a negative one"),
    (lambda: GroupAdvantage(num_virtual=-1), "num_virtual: got -1"),
    (lambda: GroupAdvantage(max_reward=math.nan), "max_reward: got nan"),
    (lambda: GroupAdvantage("ppo"), "estimator: got 'ppo'"),
    (lambda: GroupAdvantage(filter="some"), "filter: got 'some'"),
    (lambda: GroupAdvantage("remax"), "greedy_rewards: got None"),
]


@pytest.mark.contract
@pytest.mark.parametrize(("call", "message"), BAD)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_device_of_another_library_is_no_matter() -> None:
    class Elsewhere(list[float]):
        device = object()

    rewards = Elsewhere([1.0, 0.0, 0.0, 0.0])
    want = group_advantages(list(rewards), num_generations=2)
    assert torch.equal(group_advantages(rewards, num_generations=2), want)
    assert kept_answers(rewards, num_generations=2).device.type == "cpu"
