"""Groups of rewards against loops, TRL's own formulas, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.reward_groups import (
    centre,
    chain,
    deviation,
    group_rewards,
    keep_single,
    reward_vector,
    scale,
    to_tokens,
    virtual_sample,
)

pytestmark = pytest.mark.oracle

REWARD = st.one_of(st.none(), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0]))
BATCH = st.lists(st.tuples(REWARD, st.integers(-2, 3)), min_size=1, max_size=24)


def looped(rewards: list[float | None], ids: list[int], n_virtual: int, top: float) -> list[float]:
    """Advantages group by group, in float64."""
    found = [0.0] * len(rewards)
    for group in set(ids):
        rows = [i for i, g in enumerate(ids) if g == group and rewards[i] is not None]
        if len(rows) < 2:
            continue
        values = [float(rewards[i]) for i in rows] + [top] * n_virtual  # type: ignore[arg-type]
        mean, spread = np.mean(values), np.std(values, ddof=1)
        for i in rows:
            found[i] = (float(rewards[i]) - mean) / (spread + 1e-6)  # type: ignore[arg-type]
    return found


@pytest.mark.property
@given(BATCH, st.integers(0, 3))
def test_the_chain_is_the_loop(batch: list[tuple[float | None, int]], n: int) -> None:
    rewards, ids = [r for r, _ in batch], [i for _, i in batch]
    values = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
    got = chain(virtual_sample(3.0, n), centre(), scale())(group_rewards(values, ids))
    want = looped(rewards, ids, n, 3.0)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.property
@given(BATCH, st.randoms())
def test_the_order_of_the_rows_does_not_matter(
    batch: list[tuple[float | None, int]], random: object
) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]

    def advantages(rows: list[tuple[float | None, int]]) -> torch.Tensor:
        values = reward_vector([r for r, _ in rows]).double()
        return chain(centre("others"))(group_rewards(values, [i for _, i in rows]))

    got = advantages([batch[i] for i in order])
    torch.testing.assert_close(got, advantages(batch)[order], atol=1e-12, rtol=0)


def test_others_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.25, 5.0, torch.nan, 2.0])
    got = chain(centre("others"))(group_rewards(rewards, num_generations=3))
    want = [1 - 0.125, -0.625, 0.25 - 0.5, 5 - 2, 0.0, 2 - 5]
    torch.testing.assert_close(got, torch.tensor(want))


def test_over_the_batch() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 4.0])
    groups = group_rewards(rewards, num_generations=2)
    torch.testing.assert_close(chain(centre("batch"))(groups), rewards - 2)
    spread = rewards.std()
    centred = torch.tensor([0.5, -0.5, -0.5, 0.5])
    torch.testing.assert_close(chain(centre(), scale("batch", eps=0.0))(groups), centred / spread)
    own = chain(centre(), scale("batch", eps=0.0, of="values"))(groups)
    torch.testing.assert_close(own, centred / centred.std())


def test_deviation_is_numpys() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2, :4] = torch.nan
    for ddof in (0, 1):
        full = x[[0, 1, 3, 4, 5, 6]].numpy()
        got = deviation(x, ddof, dim=1).numpy()
        want = np.nanstd(full, axis=1, ddof=ddof, keepdims=True)
        np.testing.assert_allclose(got[[0, 1, 3, 4, 5, 6]], want)
        assert math.isnan(got[2, 0]) == (ddof == 1)


def test_a_single_reward() -> None:
    """Nothing to compare with: 0; as the released trainers have it, the reward itself."""
    groups = group_rewards([1.0, None, 0.0, 1.0], num_generations=2)
    steps = (virtual_sample(1.0), centre(), scale())
    assert chain(*steps)(groups)[:2].tolist() == [0.0, 0.0]
    done = groups
    for step in steps:
        done = step(done)
    raw = keep_single(groups, done).values()
    torch.testing.assert_close(raw, torch.tensor([1 / (1 + 1e-6), 0.0, *done.values()[2:]]))


def test_a_virtual_answer_of_each_group() -> None:
    groups = group_rewards(torch.tensor([0.0, 0.0, 2.0, 2.0]), num_generations=2)
    got = chain(virtual_sample(torch.tensor([1.0, 2.0])), centre())(groups)
    torch.testing.assert_close(got, torch.tensor([-1 / 3, -1 / 3, 0.0, 0.0]))


def test_half_precision_is_raised_and_float64_kept() -> None:
    assert reward_vector(torch.ones(2, dtype=torch.float16)).dtype == torch.float32
    assert reward_vector(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert reward_vector(np.ones(2)).dtype == torch.float64
    assert reward_vector([True, 2]).dtype == torch.float32


@pytest.mark.contract
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_rewards([1.0, math.inf], num_generations=2), "rewards: got an infinite one"),
        (lambda: group_rewards([1.0, "x"], num_generations=2), "rewards: got 'x'"),
        (lambda: group_rewards([[1.0]], num_generations=1), r"rewards: got shape \(1, 1\)"),
        (lambda: group_rewards([1.0] * 3, num_generations=2), "rewards: got 3 rows"),
        (lambda: group_rewards([1.0]), "num_generations: got None"),
        (lambda: group_rewards([1.0], [1, 2]), r"group_ids: got shape \(2,\)"),
        (lambda: group_rewards([1.0], [0.5]), "group_ids: got torch.float32"),
        (lambda: virtual_sample(1.0, -1), "num_virtual: got -1"),
        (
            lambda: virtual_sample(1.0)(group_rewards([1.5, 0.0], num_generations=2)),
            r"rewards: got \[1.5\] above max_reward",
        ),
        (
            lambda: virtual_sample([1.0, 1.0])(group_rewards([1.0, 0.0], num_generations=2)),
            r"max_reward: got shape \(2,\)",
        ),
        (lambda: centre("all"), "over: got 'all'"),
        (lambda: scale("all"), "over: got 'all'"),
        (lambda: scale(of="all"), "of: got 'all'"),
        (lambda: scale(ddof=2), "ddof: got 2"),
        (lambda: to_tokens(torch.ones(2), torch.ones(3, 4)), "advantages and mask: got"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_nothing_is_nothing() -> None:
    assert chain(virtual_sample(), centre(), scale())(
        group_rewards([], num_generations=4)
    ).shape == (0,)


def test_no_spread_and_no_rows() -> None:
    groups = group_rewards([1.0, 0.0, 0.0, 0.0], num_generations=2)
    apart = replace(groups, rewards=torch.zeros(2, 2))
    assert scale(eps=0.0)(apart).values().tolist() == [0.0] * 4
    assert group_rewards([], group_ids=[]).values().tolist() == []
