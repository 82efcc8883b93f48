"""Deepening schedules, their cost, plans, the choice among responses, and the Markov law."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.language.iterative_deepening import (
    DeepeningPlan,
    SelfCorrection,
    Trace,
    as_triggers,
    deepening_schedule,
    last_answer,
    select_trace,
    token_account,
    trigger_count,
)
from scoredraw.language.selection import majority_vote

SCHEDULES = st.sampled_from(["total", "segment"])
FACTORS = st.sampled_from([Fraction(5, 4), Fraction(3, 2), Fraction(2), Fraction(3), Fraction(4)])
SHARES = st.floats(0, 1).map(lambda x: round(x, 3))


def exact_cuts(b0: int, gamma: Fraction, total: int, schedule: str) -> list[Fraction]:
    """The real positions below B in rational arithmetic, a segment at a time."""
    found: list[Fraction] = []
    segment = position = Fraction(b0)
    while position < total:
        found.append(position)
        segment *= gamma
        position = segment if schedule == "total" else position + segment
    return found


# ── when ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.integers(1, 300), FACTORS, st.integers(1, 5000), SCHEDULES)
def test_the_schedule_is_the_exact_one_and_the_count_its_length(
    b0: int, gamma: Fraction, total: int, schedule: str
) -> None:
    exact = exact_cuts(b0, gamma, total, schedule)
    assert trigger_count(b0, float(gamma), total, schedule) == len(exact)
    rounded = [round(cut) for cut in exact]  # Python rounds half to even
    wanted = [c for c, before in zip(rounded, [0, *rounded], strict=False) if before < c < total]
    assert deepening_schedule(b0, float(gamma), total, schedule) == wanted


@pytest.mark.oracle
@pytest.mark.parametrize("gamma", [2, 3, 4, 10])
def test_no_trigger_at_the_total_budget_itself(gamma: int) -> None:
    for steps in range(1, 15):  # where B is a cut, logarithms alone err on either side
        assert trigger_count(7, gamma, 7 * gamma**steps) == steps
        total = 7 * (gamma**steps - 1) // (gamma - 1)
        assert trigger_count(7, gamma, total, "segment") == steps - 1


@pytest.mark.oracle
def test_fixed_intervals_are_segments_that_do_not_grow() -> None:
    assert deepening_schedule(8, 1, 64, "segment") == [8, 16, 24, 32, 40, 48, 56]
    assert trigger_count(8, 1, 64, "segment") == math.ceil(64 / 8) - 1
    assert DeepeningPlan.every(16, 64, [1]).cuts == (16, 32, 48)
    assert deepening_schedule(8, 1e200, 64, "segment") == [8]
    for b0, total in ((300, 256), (256, 256)):
        assert deepening_schedule(b0, 2, total) == []
        assert trigger_count(b0, 2, total, "segment") == 0


BAD_SCHEDULES = [
    ({"b0": 0}, "^b0: got 0"), ({"b0": math.nan}, "^b0: "), ({"gamma": 0.5}, "^gamma: got 0.5"),
    ({"gamma": 1}, "^gamma: got 1, want a growth factor above 1"), ({"total": 0}, "^total: got 0"),
    ({"total": 1.5}, "^total: "), ({"schedule": "linear"}, "^schedule: got 'linear'"),
    ({"gamma": 1 + 1e-9}, "^gamma: got .* in at most 1,000,000 steps"),
    ({"gamma": 0.9, "schedule": "segment"}, "^gamma: got 0.9, want a growth factor at least 1"),
]  # fmt: skip


@pytest.mark.contract
@pytest.mark.parametrize(("change", "message"), BAD_SCHEDULES)
def test_schedules_that_are_refused(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"b0": 10, "gamma": 2.0, "total": 100, **change}
    with pytest.raises(InputError, match=message):
        deepening_schedule(**given_)
    with pytest.raises(InputError, match=message):
        trigger_count(**given_)


# ── what it costs ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.integers(1, 64), FACTORS, st.integers(1, 3000), SCHEDULES, st.integers(0, 20),
       st.integers(0, 99))  # fmt: skip
def test_the_account_is_what_the_calls_add_up_to(
    b0: int, gamma: Fraction, total: int, schedule: str, trigger: int, prompt: int
) -> None:
    cuts = deepening_schedule(b0, float(gamma), total, schedule)
    account = token_account(cuts, total, trigger, prompt)
    calls = [prompt + cut + j * trigger for j, cut in enumerate([0, *cuts])]
    assert account.reread == sum(calls)
    assert account.read == prompt + len(cuts) * trigger
    assert (account.generated, account.inserted) == (total, len(cuts) * trigger)
    own = sum(cuts)  # of the response: a constant factor of the budget
    assert own <= float(gamma / (gamma - 1)) * total + len(cuts) / 2  # rounding: ½ a cut


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("gamma", "triggers", "reread"), [(1.25, 10, 2127), (1.5, 6, 1330), (2, 3, 224), (4, 2, 160)]
)
def test_the_account_of_each_growth_factor(gamma: float, triggers: int, reread: int) -> None:
    """b0 = 32, B = 256; the cuts added up by hand. γ = 2: 32 + 64 + 128."""
    cuts = deepening_schedule(32, gamma, 256)
    by_hand = {
        1.25: [32, 40, 50, 62, 78, 98, 122, 153, 191, 238],
        1.5: [32, 48, 72, 108, 162, 243],
        2: [32, 64, 128],
        4: [32, 128],
    }[gamma]
    assert cuts == by_hand
    assert len(cuts) == triggers
    assert token_account(cuts, 256, 0).reread == sum(by_hand)
    assert token_account(cuts, 256, [3] * triggers, 5).read == 5 + 3 * triggers


@pytest.mark.oracle
def test_fixed_intervals_reread_quadratically() -> None:
    small, large = (
        token_account(deepening_schedule(16, 1, total, "segment"), total, 0).reread
        for total in (1024, 4096)
    )
    assert small == 16 * 63 * 64 // 2
    assert large / small > 15.9  # four times the budget, sixteen times the reading
    deep = [token_account(deepening_schedule(16, 2, t), t, 0).reread for t in (1024, 4096)]
    assert deep[1] / deep[0] < 4.1


# ── plans ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_what_the_usual_plans_are() -> None:
    plan = DeepeningPlan.geometric(8, 2, 64, [[5], [6, 7]], boundary="newline", pick="draw")
    assert (plan.cuts, plan.triggers) == ((8, 16, 32), ((5,), (6, 7)))
    assert plan.most_triggers == 3
    assert plan.longest == 64 + 3 * 2
    both = DeepeningPlan.geometric(8, 2, 64, [5], on_finish="reflect", max_reflections=2)
    assert both.most_triggers == 5
    forced = DeepeningPlan.forced(32, 64, [5], max_reflections=4)
    assert (forced.minimum, forced.on_finish, forced.cuts) == (32, "reflect", ())
    assert DeepeningPlan.at_the_end(64, [5]).most_triggers == 1
    assert DeepeningPlan.plain(64).longest == 64
    assert as_triggers(np.array([3, 4])) == ((3, 4),)


BAD_PLANS = [
    ({"triggers": ()}, "^trigger: got no tokens"), ({"triggers": ((),)}, "^trigger: got no tokens"),
    ({"total": 0, "cuts": ()}, "^total: got 0"), ({"cuts": (8, 8)}, "^cuts: "),
    ({"cuts": (64,)}, "^cuts: "), ({"on_finish": "go"}, "^on_finish: got 'go'"),
    ({"boundary": "word"}, "^boundary: "), ({"pick": "best"}, "^pick: "),
    ({"max_reflections": 0}, "^max_reflections: "),
]  # fmt: skip


@pytest.mark.contract
@pytest.mark.parametrize(("change", "message"), BAD_PLANS)
def test_plans_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeepeningPlan(**{"total": 64, "triggers": ((1,),), "cuts": (8, 16), **change})
    with pytest.raises(InputError, match=r"^trigger: got no tokens"):
        DeepeningPlan.geometric(8, 2, 64, [])
    for minimum in (0, 65):
        with pytest.raises(InputError, match=r"^minimum: "):
            DeepeningPlan.forced(minimum, 64, [1])
    with pytest.raises(InputError, match=r"^trigger: got 'Wait', want token ids"):
        DeepeningPlan.geometric(8, 2, 64, "Wait")


@pytest.mark.contract
def test_a_warning_where_more_than_64_triggers_are_due() -> None:
    with pytest.warns(UserWarning, match=r"^127 triggers are due, more than 64"):
        DeepeningPlan.every(1, 128, [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepeningPlan.every(2, 130, [1])


# ── traces, and which to submit ─────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_trace_knows_its_triggers() -> None:
    trace = Trace(np.array([1, 1, 9, 9, 1, 8, 8, 8, 9, 1]), ((2, 4), (5, 8), (8, 9)))
    assert trace.generated_mask.astype(int).tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    assert trace.cut_positions.tolist() == [2, 3, 3]
    assert trace.n_generated == 4
    account = trace.account(prompt=10)
    assert (account.generated, account.inserted, account.read) == (4, 6, 16)
    assert account.reread == 10 + (10 + 2 + 2) + (10 + 3 + 5) + (10 + 3 + 6)
    assert Trace(np.array([1, 1])).account(3) == (2, 0, 3, 3)


@pytest.mark.oracle
def test_the_last_answer_counts() -> None:
    text = "The answer is 5. Wait! Let me see. The answer is 7. Wait! I give up."
    assert last_answer(text, r"answer is (\d+)") == "7"
    assert last_answer("no idea", r"answer is (\d+)") is None


def scored(ids: list[int], logprob: float) -> Trace:
    return Trace(np.array(ids), logprobs=np.full(len(ids), logprob))


@pytest.mark.oracle
def test_the_selectors() -> None:
    traces = [scored([3], -2.0), scored([4], -0.5), scored([3], -3.0), scored([0], -0.1)]

    def answer(trace: Trace) -> int | None:
        return int(trace.ids[-1]) or None

    rewards = [0.2, 0.9, 0.1, 5.0]
    for method, wanted in (
        ("majority", 3), ("bon", 4), ("weighted", 4), ("likeliest", 4), ("probability", 4),
        (majority_vote, 3),
    ):  # fmt: skip
        assert select_trace(traces, answer, method, rewards).answer == wanted, method
    nothing = select_trace([scored([0], -1.0)], answer)
    assert (nothing.index, nothing.answer) == (None, None)
    tie = select_trace(traces[:2], answer)
    assert tie.choice.tolist() == [0.5, 0.5]


@pytest.mark.contract
def test_choices_that_are_refused() -> None:
    def answer(trace: Trace) -> int:
        return 1

    with pytest.raises(InputError, match=r"^method: got 'best'"):
        select_trace([scored([1], -1.0)], answer, "best")
    with pytest.raises(InputError, match=r"^traces: got none"):
        select_trace([], answer)
    with pytest.raises(InputError, match=r"^rewards: got None"):
        select_trace([scored([1], -1.0)], answer, "bon")
    with pytest.raises(InputError, match=r"^logprobs: got None"):
        select_trace([scored([1], -1.0), Trace(np.array([1]))], answer, "likeliest")


# ── the law ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(SHARES, SHARES, SHARES, st.integers(0, 12))
def test_the_law_is_that_of_the_chain(p0: float, u: float, v: float, m: int) -> None:
    chain = np.linalg.matrix_power(np.array([[1 - v, v], [u, 1 - u]]), m)
    law = SelfCorrection(p0, u, v)
    assert law.after(m) == pytest.approx(([p0, 1 - p0] @ chain)[0], abs=1e-12)
    assert 0 <= law.stationary <= 1


@pytest.mark.property
@given(SHARES, SHARES, SHARES)
def test_the_best_number_of_triggers(p0: float, u: float, v: float) -> None:
    law = SelfCorrection(p0, u, v)
    assume(abs(p0 * (u + v) - u) > 1e-6 or u + v == 0)
    values = law.after(np.arange(40))
    if law.best_count == math.inf:
        assert (np.diff(values) >= -1e-12).all()  # ever better
        assert values[0] < law.stationary
    else:
        assert values[int(law.best_count)] == pytest.approx(values.max(), abs=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("p0", "u", "v", "best"),
    [(0.3, 0.4, 0.1, math.inf), (0.9, 0.4, 0.1, 0), (0.3, 0.9, 0.5, 1), (0.9, 0.9, 0.5, 0),
     (0.3, 0.7, 0.3, 1), (0.5, 0, 0, 0), (0.2, 1, 1, 1), (1, 0.5, 0, 0), (0.2, 0, 0.5, 0)],
)  # fmt: skip
def test_where_triggers_help_hurt_or_alternate(p0: float, u: float, v: float, best: float) -> None:
    assert SelfCorrection(p0, u, v).best_count == best


@pytest.mark.oracle
def test_the_law_from_paired_responses() -> None:
    before = np.repeat([True, False], [60, 40])
    after = np.concatenate([np.arange(60) >= 6, np.arange(40) < 30])
    law = SelfCorrection.of(before, after)
    assert (law.p0, law.u, law.v) == pytest.approx((0.6, 0.75, 0.1))
    assert law.after(1) == pytest.approx(after.mean())
    assert law.standard_error(0) == pytest.approx(math.sqrt(0.6 * 0.4 / 100))


@pytest.mark.oracle
def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    """4,000 repetitions: a standard deviation to within 4 % (3.6 of its own standard errors)."""
    truth, rng, size = SelfCorrection(0.4, 0.6, 0.15), np.random.default_rng(0), 3000
    m = np.arange(5)
    estimates, errors = [], []
    for _ in range(4000):
        before = rng.random(size) < truth.p0
        after = rng.random(size) < np.where(before, 1 - truth.v, truth.u)
        law = SelfCorrection.of(before, after)
        estimates.append(law.after(m))
        errors.append(law.standard_error(m))
    np.testing.assert_allclose(np.mean(errors, 0), np.std(estimates, 0), rtol=0.04)
    assert not SelfCorrection(0.4, 0.6, 0.15).standard_error(m).any()


@pytest.mark.contract
def test_laws_that_are_refused() -> None:
    with pytest.raises(InputError, match=r"^u: got 1\.2, want a probability"):
        SelfCorrection(0.5, 1.2, 0)
    with pytest.raises(InputError, match=r"^before: got only one kind"):
        SelfCorrection.of([True, True], [True, False])
    with pytest.raises(InputError, match=r"^after: "):
        SelfCorrection.of([True, False], [True])
    with pytest.raises(InputError, match=r"^m: "):
        SelfCorrection(0.5, 0.5, 0.1).after([-1])
    with pytest.raises(InputError, match=r"^m: got 0.5"):
        SelfCorrection(0.5, 0.5, 0.1).after(0.5)
