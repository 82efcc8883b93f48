"""Process credit: the laws of the minimum, plain loops beside it, steps in texts, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.errors import InputError
from scoredraw.rl.process_credit import (
    AGGREGATES,
    CREDITS,
    aggregate_steps,
    find_steps,
    min_form_rewards,
    padded_steps,
    process_rewards,
    separator_tokens,
    split_steps,
)
from scoredraw.rl.token_credit import returns_to_go

pytestmark = pytest.mark.oracle

# in units of 1/64, so that sums of a few are exact
score = st.integers(-64, 64).map(lambda i: i / 64)
answers = st.lists(score, min_size=1, max_size=8)
temperatures = st.sampled_from([1e-3, 0.03, 0.1, 1.0, 30.0])


def row(scores: list[float]) -> Tensor:
    return torch.tensor([scores], dtype=torch.float64)


def returns(scores: list[float], **how: Any) -> list[float]:
    return returns_to_go(min_form_rewards(row(scores), **how))[0].tolist()


# ── the minimum and what is near it ─────────────────────────────────────────────────────────────


@given(answers, temperatures)
def test_softmin_lies_between_the_minimum_and_the_mean(r: list[float], T: float) -> None:
    total = float(min_form_rewards(row(r), temperature=T).sum())
    assert min(r) - 1e-12 <= total <= sum(r) / len(r) + 1e-12
    gap = np.diff(sorted(r)[:2]).sum()
    bound = (len(r) - 1) * (max(r) - min(r)) * math.exp(-gap / T)
    assert total - min(r) <= bound + 1e-12
    assert total == pytest.approx(float(aggregate_steps(row(r), how="softmin", temperature=T)))


@given(answers)
def test_the_limits_of_the_temperature(r: list[float]) -> None:
    """T -> 0 is the lowest steps alone (argmin where there is one); T -> ∞ is the mean."""
    cold = min_form_rewards(row(r), temperature=1e-300)[0]
    ties = r.count(min(r))
    assert cold.tolist() == pytest.approx([x / ties if x == min(r) else 0.0 for x in r])
    if ties == 1:
        assert cold.tolist() == min_form_rewards(row(r), credit="argmin")[0].tolist()
    hot = min_form_rewards(row(r), temperature=math.inf)
    assert hot[0].tolist() == pytest.approx([x / len(r) for x in r])
    assert torch.allclose(hot, min_form_rewards(row(r), credit="mean"))


@given(answers)
def test_the_two_strict_forms(r: list[float]) -> None:
    strict, first = returns(r, credit="strict_min"), returns(r, credit="argmin")
    worst = r.index(min(r))
    assert strict == pytest.approx([min(r[i:]) for i in range(len(r))])
    assert first == pytest.approx([min(r)] * (worst + 1) + [0.0] * (len(r) - worst - 1))
    assert strict[: worst + 1] == pytest.approx(first[: worst + 1])


def test_all_good_steps_keep_their_worth() -> None:
    """A minimum over tokens, with 0 between the step ends, would call this answer worthless."""
    assert returns([0.5, 0.25, 0.75], credit="strict_min") == [0.25, 0.25, 0.75]


@given(answers, score)
def test_a_further_step_cannot_raise_the_minimum(r: list[float], more: float) -> None:
    """The hack that sums pay for: one more step that is no worse than the worst."""
    before, after = (returns(x, credit="strict_min")[0] for x in (r, [*r, more]))
    assert after <= before + 1e-12
    if more >= min(r):
        assert after == pytest.approx(before, abs=1e-12)
    gain = returns([*r, more], credit="sum")[0] - returns(r, credit="sum")[0]
    assert gain == pytest.approx(more)


@given(answers, temperatures, st.randoms())
def test_the_order_of_the_steps(r: list[float], T: float, random: Any) -> None:
    order = list(range(len(r)))
    random.shuffle(order)
    for how in ({"temperature": T}, {"credit": "mean"}, {"credit": "sum"}):
        plain = min_form_rewards(row(r), **how)[0]
        moved = min_form_rewards(row([r[i] for i in order]), **how)[0]
        torch.testing.assert_close(moved, plain[order])


@given(st.lists(st.one_of(score, st.none()), min_size=1, max_size=7), st.sampled_from(CREDITS))
def test_masked_steps_are_as_if_absent(r: list[float | None], credit: str) -> None:
    real = [x for x in r if x is not None]
    mask = torch.tensor([[x is not None for x in r]])
    holes = row([math.nan if x is None else x for x in r])
    found = min_form_rewards(holes, mask, credit=credit)
    assert (found[~mask] == 0).all()
    if real:
        torch.testing.assert_close(found[mask], min_form_rewards(row(real), credit=credit)[0])


@given(answers, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_discounted_sum(r: list[float], gamma: float) -> None:
    n = len(r)
    want = [sum(gamma ** (j - i) * r[j] for j in range(i, n)) for i in range(n)]
    assert returns(r, credit="sum", gamma=gamma) == pytest.approx(want, abs=1e-12)
    mask = torch.tensor([[True, False] * n])
    holes = row([x for y in r for x in (y, 9.0)])
    with_holes = returns_to_go(min_form_rewards(holes, mask, credit="sum", gamma=gamma))
    assert with_holes[mask].tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("credit", CREDITS)
def test_one_step_keeps_its_score(credit: str) -> None:
    assert min_form_rewards([[0.3]], credit=credit).item() == pytest.approx(0.3)


def test_types() -> None:
    half = torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)
    assert min_form_rewards(half).dtype == torch.float32
    assert process_rewards(torch.zeros(1, 2, 2, dtype=torch.float16)).dtype == torch.float32
    assert min_form_rewards(half.double()).dtype == torch.float64
    assert min_form_rewards([[1, 0]], credit="sum").tolist() == [[1.0, 0.0]]


# ── scores ──────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_differences_of_probabilities() -> None:
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(dim=-1)
    torch.testing.assert_close(process_rewards(logits), p[..., 1] - p[..., 0])
    torch.testing.assert_close(process_rewards(logits, good=0), p[..., 0] - p[..., 1])
    shifted = process_rewards(logits + torch.randn(3, 4, 1, dtype=torch.float64))
    torch.testing.assert_close(shifted, process_rewards(logits))
    sure = process_rewards([[[-1e4, 1e4], [1e4, -1e4]]])
    assert sure.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_against_plain_python(how: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.random(n).round(3).tolist() for n in (1, 3, 6)]
    soft = [np.exp(-np.array(r) / 0.1) for r in rows]
    want = {
        "min": [min(r) for r in rows], "mean": [sum(r) / len(r) for r in rows],
        "last": [r[-1] for r in rows], "sum": [sum(r) for r in rows],
        "prod": [math.prod(r) for r in rows],
        "softmin": [float(w @ r / w.sum()) for w, r in zip(soft, rows, strict=True)],
    }[how]  # fmt: skip
    assert aggregate_steps(rows, how=how).tolist() == pytest.approx(want, rel=1e-6)
    values, mask = padded_steps([[None, *r, None] for r in rows])
    assert aggregate_steps(values, mask, how=how).tolist() == pytest.approx(want, rel=1e-6)
    assert aggregate_steps([[], [0.5]], how=how).isnan().tolist() == [True, False]


def test_a_product_with_a_zero() -> None:
    assert aggregate_steps([[0.0, 0.5], [0.5, 0.5]], how="prod").tolist() == [0.0, 0.25]


# ── steps ───────────────────────────────────────────────────────────────────────────────────────


def plain_steps(ids: list[int], mask: list[bool], cuts: set[int], blank: set[int]) -> list[int]:
    """The last token of each step, one token at a time."""
    ends: list[int] = []
    spoke = cut = False
    last = -1
    for t, (token, real) in enumerate(zip(ids, mask, strict=True)):
        if not real:
            continue
        if token in cuts:
            cut = spoke
        elif token not in blank:
            if cut:
                ends.append(last)
            spoke, cut = True, False
        last = t
    return ends if last < 0 else [*ends, last]


def test_steps_against_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (300, 12), generator=g)
    mask = torch.rand(300, 12, generator=g) < 0.8
    mask[:3] = False
    found = find_steps(ids, mask, separators={0, 1}, blank={2})
    got = [end[real].tolist() for end, real in zip(found.end, found.mask, strict=True)]
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    want = [plain_steps(*pair, {0, 1}, {2}) for pair in rows]
    assert got == want
    assert torch.equal(found.separators, mask & (ids < 2))
    assert got[:3] == [[], [], []]


def test_texts_and_tokens_give_the_same_steps(letters: Any) -> None:
    text = "ab  c   de "  # a token a letter; the steps are parted by spaces
    ids = torch.tensor([letters.encode(text)])
    cuts = separator_tokens(letters, " ")
    assert [letters.decode([i]) for i in cuts] == [" "]
    found = find_steps(ids, torch.ones_like(ids), cuts)
    assert found.end.tolist() == [[3, 7, 10]]
    assert split_steps(text, " ") == ["ab", "c", "de"]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[dict[str, Any], str]] = [
    ({"step_rewards": torch.zeros(2, 0)}, r"step_rewards: got shape \(2, 0\), want \(N, S\), S >="),
    ({"step_rewards": [0.5]}, r"step_rewards: got shape \(1,\)"),
    ({"step_rewards": [[0.1], [math.nan]]}, "step_rewards: got nan in row 1, step 0, want finite"),
    ({"step_rewards": [[0.1], [math.inf]]}, "step_rewards: got inf in row 1, step 0"),
    ({"step_mask": torch.ones(1, 2)}, "step_mask: got torch.float32, want torch.bool"),
    ({"step_mask": [[True]]}, r"step_mask: got \(1, 1\), want \(1, 2\)"),
    ({"temperature": 0.0}, 'temperature: got 0.0, want a number above 0; credit="argmin"'),
    ({"temperature": -1.0}, "temperature: got -1.0"),
    ({"temperature": math.nan}, "temperature: got nan"),
    ({"credit": "softmax"}, "credit: got 'softmax', want softmin, strict_min, argmin, mean, sum"),
    ({"credit": "sum", "gamma": 1.5}, r"gamma: got 1.5, want a number in \[0, 1\]"),
    ({"gamma": 0.9}, "gamma: got 0.9 with 'softmin', want credit 'sum'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_scores(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        min_form_rewards(**{"step_rewards": [[0.5, 0.2]], **change})


def test_other_refusals(letters: Any) -> None:
    with pytest.raises(InputError, match="how: got 'median'"):
        aggregate_steps([[0.1]], how="median")
    with pytest.raises(InputError, match="step_rewards: got 2 answers without a step"):
        aggregate_steps([[], []])
    with pytest.raises(InputError, match=r"step_rewards: got .*, want scores >= 0 to multiply"):
        aggregate_steps([[0.5, -0.5]], how="prod")
    with pytest.raises(InputError, match=r"logits: got \(1, 2, 3\)"):
        process_rewards(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="good: got 2"):
        process_rewards(torch.zeros(1, 2, 2), good=2)
    with pytest.raises(InputError, match=r"step_mask: got torch\.float32"):
        process_rewards(torch.zeros(1, 2, 2), torch.ones(1, 2))
    with pytest.raises(InputError, match="separator: got ''"):
        split_steps("a", "")
    with pytest.raises(InputError, match="separator: got 'no such', want text that some token"):
        separator_tokens(letters, "no such")
    with pytest.raises(InputError, match="separators: got none"):
        find_steps([[1]], [[True]], [])
    with pytest.raises(InputError, match="completion_ids and response_mask"):
        find_steps([[1]], [[True, True]], [0])
