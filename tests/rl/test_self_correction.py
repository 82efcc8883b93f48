"""Returns, advantages and metrics of several attempts: laws, limits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.rl.self_correction import (
    check_shaping,
    score_advantages,
    score_returns,
    self_correction_metrics,
    turn_kl,
    turns_to_tokens,
)

pytestmark = pytest.mark.oracle

seeds = st.integers(0, 2**31)


def episodes(seed: int, B: int = 12, K: int = 2) -> tuple[Tensor, Tensor]:
    """0/1 rewards and KLs, (B, K) float64."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randint(0, 2, (B, K), generator=g).double()
    return r, torch.randn(B, K, generator=g, dtype=torch.float64)


def loo(x: Tensor) -> Tensor:
    """x less the mean of the other rows, spelled out."""
    rows = [x[i] - torch.cat([x[:i], x[i + 1 :]]).mean(dim=0) for i in range(len(x))]
    return torch.stack(rows)


# ── laws ────────────────────────────────────────────────────────────────────────────────────────


@given(seeds)
def test_the_second_turn_is_weighted_and_the_first_its_baseline(seed: int) -> None:
    """A_2 = (1 + α) LOO(r_2) - α LOO(r_1) without KL."""
    r, _ = episodes(seed)
    found = score_advantages(r, alpha=7.0)
    want = 8 * loo(r[:, 1]) - 7 * loo(r[:, 0])
    torch.testing.assert_close(found[:, 1], want)
    torch.testing.assert_close(found[:, 0], loo(r[:, 0]))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 10.0])
def test_the_total_pays_for_a_wrong_first_attempt(alpha: float) -> None:
    """The coefficient of r_1 in the total is 1 - α; under per-turn credit that of turn 1 is 1."""
    wrong, right = [[0.0, 1.0]], [[1.0, 1.0]]
    total = [score_returns(r, alpha=alpha, credit="total")[0, 0] for r in (wrong, right)]
    assert float(total[1] - total[0]) == pytest.approx(1 - alpha)
    own = [score_returns(r, alpha=alpha)[0, 0] for r in (wrong, right)]
    assert float(own[1] - own[0]) == 1


@given(seeds)
def test_the_first_stage_pays_nothing_for_the_first_attempt(seed: int) -> None:
    r, kl = episodes(seed)
    other = r.clone()
    other[:, 0] = 1 - other[:, 0]
    for credit in ("per_turn", "total"):
        first, second = (score_returns(x, kl, stage=1, credit=credit) for x in (r, other))
        assert torch.equal(first, second)
    own = score_returns(r, kl, stage=1, beta1=0.01, beta2=0.2)
    torch.testing.assert_close(own, torch.stack([-0.2 * kl[:, 0], r[:, 1] - 0.01 * kl[:, 1]], 1))


@given(seeds, st.integers(2, 4))
def test_without_bonus_it_is_learning_over_several_turns(seed: int, K: int) -> None:
    """α = 0 and one β: own reward less own penalty, and the sum of the episode."""
    r, kl = episodes(seed, K=K)
    with pytest.warns(RuntimeWarning, match="alpha: 0 does not pay"):
        own = score_returns(r, kl, alpha=0.0, beta1=0.05)
    with pytest.warns(RuntimeWarning, match="alpha: 0 does not pay"):
        total = score_returns(r, kl, alpha=0.0, beta1=0.05, credit="total")
    torch.testing.assert_close(own, r - 0.05 * kl)
    torch.testing.assert_close(total, (r - 0.05 * kl).sum(1, keepdim=True).expand(-1, K))


@given(seeds)
def test_more_turns_pay_for_progress_on_the_one_before(seed: int) -> None:
    """Stage II telescopes: Σ_k = Σ r_k + α (r_K - r_1) - β Σ KL; stage I frees all but turn 1."""
    r, kl = episodes(seed, K=4)
    found = score_returns(r, kl, alpha=3.0, beta1=0.1)
    torch.testing.assert_close(found[:, 2], r[:, 2] + 3 * (r[:, 2] - r[:, 1]) - 0.1 * kl[:, 2])
    total = score_returns(r, kl, alpha=3.0, beta1=0.1, credit="total")[:, 3]
    want = r.sum(1) + 3 * (r[:, 3] - r[:, 0]) - 0.1 * kl.sum(1)
    torch.testing.assert_close(total, want)
    first = score_returns(r, kl, stage=1, beta1=0.1)
    torch.testing.assert_close(first[:, 1:], r[:, 1:] - 0.1 * kl[:, 1:])


@given(seeds)
def test_groups_are_their_own_batches(seed: int) -> None:
    r, kl = episodes(seed, B=12)
    ids = torch.tensor([5, 3, 5, 3, 9, 9, 9, 3, 5, 9, 9, 9])
    for baseline in ("loo", "mean"):
        found = score_advantages(r, kl, baseline=baseline, group_ids=ids)
        for i in (3, 5, 9):
            mine = ids == i
            alone = score_advantages(r[mine], kl[mine], baseline=baseline)
            torch.testing.assert_close(found[mine], alone)
            assert found[mine].sum(0).abs().max() < 1e-9
    n = torch.tensor([{3: 3, 5: 3, 9: 6}[int(i)] for i in ids]).double()[:, None]
    mean = score_advantages(r, kl, baseline="mean", group_ids=ids)
    torch.testing.assert_close(score_advantages(r, kl, group_ids=ids), mean * n / (n - 1))


def test_a_missing_attempt_earns_nothing() -> None:
    """Whatever its reward says; the turn it would have bettered is charged as for a wrong one."""
    r = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    missing = torch.tensor([[False, True], [False, False]])
    assert score_returns(r, missing=missing).tolist() == [[1.0, -10.0], [0.0, 11.0]]
    r = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    found = score_returns(r, missing=missing, reward_range=(-1.0, 1.0))
    assert found.tolist() == [[-1.0, -1.0], [1.0, -21.0]]


def test_device_and_dtype() -> None:
    kinds = {torch.float64: torch.float64, torch.float16: torch.float32, torch.int64: torch.float32}
    for came, goes in kinds.items():
        assert score_advantages(torch.ones(3, 2, dtype=came)).dtype == goes
    assert score_returns([[True, False]]).tolist() == [[1.0, -10.0]]
    r = torch.ones(2, 2, requires_grad=True)
    assert not score_advantages(r, r).requires_grad


# ── what the two stages do to a gradient ────────────────────────────────────────────────────────


def two_attempt_gradient(credit: str, alpha: float) -> tuple[float, float]:
    """Exact expected gradient of (logit of a right first, logit of mending) of a tiny policy.

    The first attempt is right with σ(θ_1) = 1/2; then it stays; a wrong one is mended with σ(θ_2).
    """
    outcomes = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    chance = torch.tensor([0.5, 0.25, 0.25])
    slope = torch.tensor([[0.5, 0.0], [-0.5, 0.5], [-0.5, -0.5]])  # ∇ log π of each turn
    paid = score_returns(outcomes, alpha=alpha, credit=credit)
    gradient = (chance[:, None] * slope * paid).sum(0)
    return float(gradient[0]), float(gradient[1])


def test_only_the_total_teaches_to_be_wrong_first() -> None:
    """Both pay (1 + α)/8 for mending. A right first attempt earns a total of 2, a wrong one
    (1 + α)/2, so that above α = 3 its gradient p(1 - p) [2 - (1 + α)/2] points down.
    """
    for alpha in (2.0, 10.0):
        own, total = (two_attempt_gradient(credit, alpha) for credit in ("per_turn", "total"))
        assert own == pytest.approx((0.25, (1 + alpha) / 8))
        assert total == pytest.approx((0.25 * (2 - (1 + alpha) / 2), (1 + alpha) / 8))
    assert two_attempt_gradient("total", 10.0)[0] < 0


# ── KL ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_estimators_agree_in_the_mean() -> None:
    """k1 and k3 of 20,000 samples of three tokens against the exact KL, within 4 s.e.

    False alarm: 2 x 6e-5. k3 is never negative, k1 is.
    """
    g = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    exact = turn_kl(logits[None], ref[None], torch.ones(1, 3), "exact")
    n = 20_000
    tokens = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=g).T  # (n, 3)
    at = torch.arange(3)
    lp, rp = logits.log_softmax(-1)[at, tokens], ref.log_softmax(-1)[at, tokens]
    for estimator in ("k1", "k3"):
        found = turn_kl(lp, rp, torch.ones(n, 3), estimator)
        assert abs(float(found.mean() - exact[0])) < 4 * float(found.std() / n**0.5)
        assert (float(found.min()) < 0) == (estimator == "k1")


@given(seeds)
def test_k3_is_never_negative_and_padding_counts_nothing(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lp, rp = torch.randn(2, 4, 6, generator=g)
    mask = (torch.arange(6) < torch.tensor([[1], [2], [6], [4]])).long()
    assert bool((turn_kl(lp, rp, mask, "k3") >= 0).all())
    for estimator in ("k1", "k3"):
        noise = torch.where(mask.bool(), lp, torch.nan)
        assert torch.equal(turn_kl(lp, rp, mask, estimator), turn_kl(noise, rp, mask, estimator))


def test_a_missing_attempt_has_no_kl() -> None:
    lp, rp = torch.zeros(2, 3), -torch.ones(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    found = turn_kl(lp, rp, mask, missing=torch.tensor([False, True]))
    assert found.tolist() == [3.0, 0.0]
    with pytest.raises(InputError, match="mask: got no token in row 1, want an attempt a row"):
        turn_kl(lp, rp, mask)


# ── tokens and metrics ──────────────────────────────────────────────────────────────────────────


def test_values_stand_on_their_turns_tokens() -> None:
    turn = torch.tensor([[1, 1, 0, 0, 2], [1, 0, 0, 0, 0]])
    found = turns_to_tokens(torch.tensor([[3.0, -1.0], [2.0, 5.0]]), turn)
    assert found.tolist() == [[3, 3, 0, 0, -1], [2, 0, 0, 0, 0]]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_change_is_what_was_mended_less_what_was_spoiled(
    rows: list[tuple[bool, bool, bool]],
) -> None:
    first, second, gone = (torch.tensor(column) for column in zip(*rows, strict=True))
    m = self_correction_metrics(first, second, gone)
    there = [(a, b and not g) for a, b, g in rows]
    n = len(rows)
    assert m.acc_t1 == pytest.approx(sum(a for a, _ in there) / n)
    assert m.acc_t2 == pytest.approx(sum(b for _, b in there) / n)
    assert m.i2c == pytest.approx(sum(b and not a for a, b in there) / n)
    assert m.c2i == pytest.approx(sum(a and not b for a, b in there) / n)
    assert m.missing == pytest.approx(sum(g for _, _, g in rows) / n)
    assert m.delta == m.i2c - m.c2i
    assert m.delta == pytest.approx(m.acc_t2 - m.acc_t1)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

GOOD = [[0.0, 1.0], [1.0, 1.0]]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rewards": [[0.0, math.nan], [1.0, 1.0]]}, r"rewards: got \[nan\], want numbers from 0 to 1"),
    ({"rewards": [[0.0, 1.5], [1.0, 1.0]]}, r"rewards: got \[1.5\], want numbers from 0 to 1"),
    ({"rewards": [0.0, 1.0]}, r"rewards: got shape \(2,\), want \(B, K\), two attempts or more"),
    ({"rewards": [[0.0], [1.0]]}, r"rewards: got shape \(2, 1\)"),
    ({"rewards": [[None, 1.0], [1.0, 1.0]]}, "rewards: got no table .*, want numbers"),
    ({"rewards": [["a", "b"]] * 2}, "rewards: got no table"),
    ({"rewards": [[0.0, 1.0], [1.0]]}, "rewards: got no table"),
    ({"kl": "none"}, "kl: got no table"),
    ({"missing": [[None, None]] * 2}, "missing: got no table"),
    ({"rewards": torch.zeros(0, 2)}, r"rewards: got shape \(0, 2\)"),
    ({"rewards": [[0.0, 1.0]]}, "group_ids: got a group of one, want two episodes or more"),
    ({"group_ids": [0, 1]}, "group_ids: got a group of one, want two episodes or more for 'loo'"),
    ({"group_ids": [0]}, r"group_ids: got shape \(1,\)"),
    ({"kl": [[0.0, 0.0]]}, r"kl: got \(1, 2\), want \(2, 2\)"),
    ({"kl": [[0.0, math.inf], [0.0, 0.0]]}, "kl: got NaN or infinity, want finite numbers"),
    ({"stage": 3}, "stage: got 3, want 1 or 2"),
    ({"credit": "both"}, "credit: got 'both', want per_turn, total"),
    ({"baseline": "batch"}, "baseline: got 'batch', want loo, mean"),
    ({"beta1": -0.1}, "alpha, beta1, beta2: got .* want finite numbers of at least 0"),
    ({"alpha": math.nan}, "alpha, beta1, beta2: got"),
    ({"reward_range": (1.0, 0.0)}, "reward_range: got .*, want its lower end first"),
    ({"missing": [[True, False]] * 2}, "missing: got an attempt after one that is, want the last"),
    ({"missing": [[True, True]] * 2}, "missing: got an attempt after one that is, want the last"),
    ({"missing": [False, True]}, r"missing: got \(2,\) of torch.bool, want \(2, 2\)"),
    ({"missing": [[0, 1], [0, 0]]}, "missing: got .* of torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_advantages(**{"rewards": GOOD, **change})


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_small_bonus_warns(alpha: float) -> None:
    with pytest.warns(RuntimeWarning, match=r"alpha: .* does not pay for progress"):
        check_shaping(2, alpha, 0.01, 0.1)


def test_other_refusals(recwarn: pytest.WarningsRecorder) -> None:
    check_shaping(1, 0.0, 0.01, 0.1)  # without a bonus there is nothing to warn of
    check_shaping(2, 1.1, 0.01, 0.1)
    assert not recwarn.list
    two, one = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(InputError, match="logp, ref_logp and mask: got"):
        turn_kl(two, torch.zeros(2, 4), one)
    with pytest.raises(InputError, match=r"want \(B, T, V\), \(B, T, V\) and \(B, T\)"):
        turn_kl(two, two, one, "exact")
    with pytest.raises(InputError, match="estimator: got 'k2', want k1, k3 or exact"):
        turn_kl(two, two, one, "k2")
    with pytest.raises(InputError, match=r"missing: got \(3,\)"):
        turn_kl(two, two, one, missing=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"turn: got torch.int64, or numbers outside"):
        turns_to_tokens(two, torch.full((2, 5), 4))
    with pytest.raises(InputError, match="values and turn: got"):
        turns_to_tokens(two, torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"correct2: got \[0.5\], want 0 or 1"):
        self_correction_metrics([0, 1], [0.5, 1])
    with pytest.raises(InputError, match=r"correct1: got \[nan\], want 0 or 1"):
        self_correction_metrics([math.nan], [1])
    with pytest.raises(InputError, match="correct2: got no table"):
        self_correction_metrics([1], [None])
    with pytest.raises(InputError, match="correct1 and correct2: got shapes"):
        self_correction_metrics([], [])
    with pytest.raises(InputError, match="missing: got"):
        self_correction_metrics([0, 1], [0, 1], [0, 1])
