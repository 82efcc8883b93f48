"""The experiment of paper 33: it runs, its lessons are what they say, its claims can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra language is not installed")

from scoredraw.language.deepening_generation import Request, deepening_traces  # noqa: E402
from scoredraw.language.iterative_deepening import (  # noqa: E402
    DeepeningPlan,
    SelfCorrection,
    Trace,
)
from scoredraw.papers import digit_sum_solver as sums  # noqa: E402
from scoredraw.papers import p33_id_sampling as p33  # noqa: E402
from scoredraw.papers.digit_sum_solver import (  # noqa: E402
    DEEP,
    END,
    EQUALS,
    IGNORED,
    NEUTRAL,
    PLACEBO,
    PLAIN,
    WAIT,
    Outcome,
    Solver,
)
from scoredraw.reports import Report, run_paper  # noqa: E402
from scoredraw.uniforms import RowUniforms  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def small() -> Report:
    return run_paper(33, "smoke", 0)


@pytest.fixture(scope="module")
def solver() -> Solver:
    return sums.train(3, 20, 16, 0)


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_smoke_runs_without_verdicts(small: Report) -> None:
    assert all(claim.verdict is None for claim in small.claims)
    assert len(small.claims) == 11
    assert [len(table.rows) for table in small.tables] == [9, 6, 10, 14, 10]
    assert [len(figure.series) for figure in small.figures] == [3, 11, 4]
    text = small.to_json()
    assert Report.from_json(text).claims == small.claims
    assert len(text) < 100_000


def test_the_accounts_by_hand(small: Report) -> None:
    """γ = 2 from 256: cuts 256, 512, 1024, 2048; four triggers of 17 after a prompt of 100."""
    rows = {row[0]: row[1:] for row in small.tables[0].rows}
    own = 256 + 512 + 1024 + 2048
    reread = 5 * 100 + own + 17 * (1 + 2 + 3 + 4)
    assert rows["total, γ = 2"] == [4, 4096, 68, 168, reread, 4264, reread + 4096, own, 8192]
    assert rows["every 256"][-2:] == [256 * 15 * 16 // 2, None]


def outcome(deep: float, **change: object) -> Outcome:
    """A made-up solver: everything is right 40 times in 100, interrupted `deep`."""
    law = SelfCorrection(0.4, 0.9, 0.1, 1000)
    names = [*sums.arms(3, 24)]
    plain = dict.fromkeys(names, 0.4)
    fields = {
        "accuracy": {**plain, DEEP: deep},
        "generated": {name: 6.0 if name in (PLAIN, PLACEBO) else 13.0 for name in names},
        "read": dict.fromkeys(names, (4.0, 8.0)),
        "law": law, "after": law.after(np.arange(5)), "vote": np.full(10, 0.5),
        "best": np.full(10, 0.5), "deep_vote": np.full(4, deep), "deep_best": np.full(4, deep),
        "kept": True,
    }  # fmt: skip
    return Outcome(**{**fields, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(("deep", "verdict"), [(0.8, "holds"), (0.3, "fails")])
def test_claims_of_the_solver_can_hold_and_fail(deep: float, verdict: str) -> None:
    plan = replace(p33.PLANS["smoke"], prompts=1000)
    made = [outcome(deep + 0.001 * seed) for seed in range(3)]
    law, *gains, kept = p33.solver_claims(plan, made)
    assert [claim.verdict for claim in gains] == [verdict] * 6
    assert (law.verdict, kept.verdict) == ("holds", "holds")
    after = made[0].after + 0.1
    off = [outcome(deep, after=after, kept=False), *made]
    law, *_, kept = p33.solver_claims(plan, off)
    assert (law.verdict, kept.verdict) == ("fails", "fails")


def test_a_vote_gets_the_tokens_that_interruptions_took() -> None:
    found = outcome(0.8)
    assert [found.affordable(n) for n in (1, 2, 3, 4)] == [2, 4, 6, 8]  # 13 tokens against 6


def test_word_problems_and_their_numbers() -> None:
    problems = p33.word_problems(5)
    assert problems[0][0].startswith("Janet")
    assert [answer for _, answer in problems[:2]] == ["18", "3"]
    assert p33.number_of("16 - 7 = 9. So $1,018.00") == "1018"
    assert p33.number_of("I do not know.") is None


# ── the solver ──────────────────────────────────────────────────────────────────────────────────


def test_lessons_are_clean_or_wait_and_start_again() -> None:
    rng = np.random.default_rng(0)
    prompts = sums.questions(4000, 5, rng)
    lessons = sums.lesson(prompts, rng)
    right = sums.solutions(prompts)
    assert lessons.shape == (4000, 3 * 5 + 8)
    waits = neutral = at_the_end = cut_before = errors = 0
    for row, clean in zip(lessons, right, strict=True):
        response = [int(token) for token in row[6:]]
        response = response[: response.index(END) + 1]
        neutral += NEUTRAL in response
        bare = [token for token in response if token != NEUTRAL]
        assert len(response) - len(bare) <= 1
        assert bare[-8:] == clean.tolist()  # the end is always clean
        if len(bare) == 8:
            continue
        waits += 1
        assert bare[-9] == WAIT
        spoilt = np.array(bare[:-9])
        assert 1 <= len(spoilt) <= 5 or len(spoilt) == 7
        at_the_end += len(spoilt) == 7
        cut_before += len(spoilt) < 5
        if len(spoilt) == 7:
            assert spoilt[5] == EQUALS
            assert spoilt[6] == spoilt[4]
        difference = (spoilt[:5] - clean[: min(len(spoilt), 5)]) % 10
        wrong = np.flatnonzero(difference)
        errors += wrong.size > 0
        if wrong.size:  # from the error on, all sums are off by the same
            assert (difference[wrong[0] :] == difference[wrong[0]]).all()
    # shares of 4,000: a half, a half, nine in ten; 4 standard errors are 0.03
    assert waits / 4000 == pytest.approx(0.5, abs=0.032)
    assert neutral / 4000 == pytest.approx(0.5, abs=0.032)
    assert errors / waits == pytest.approx(0.9, abs=0.028)
    assert min(at_the_end, cut_before) > 200


def test_only_what_is_to_be_produced_is_a_target() -> None:
    sequence = np.array([[3, 4, sums.COLON, 3, NEUTRAL, 9, WAIT, 3, 7, EQUALS, 7, END, END]])
    wanted = [IGNORED, IGNORED, 3, IGNORED, 9, IGNORED, 3, 7, EQUALS, 7, END, IGNORED]
    assert sums.targets(sequence).tolist() == [wanted]
    assert sums.solutions(np.array([[3, 4, sums.COLON]])).tolist() == [[3, 7, EQUALS, 7, END]]


def test_answers_of_segments() -> None:
    trace = Trace(
        np.array([1, EQUALS, NEUTRAL, 4, WAIT, 2, EQUALS, WAIT, 2, EQUALS, 5, END]),
        ((2, 3), (4, 5), (7, 8)),
    )
    assert sums.segment_answers([trace], 4).tolist() == [[4, 4, 5, 5]]
    assert sums.final_answers([trace, Trace(np.array([1, 2]))]).tolist() == [5, -1]
    assert sums.final_answers([Trace(np.array([EQUALS]))]).tolist() == [-1]


def test_the_sampler_is_the_net_step_by_step(solver: Solver) -> None:
    """Greedy by a uniform of zero would not do: the tokens are compared by their uniforms."""
    from scoredraw import categorical
    from scoredraw.language.deepening_generation import token_uniforms

    prompts = sums.questions(6, 3, np.random.default_rng(1)).tolist()
    uniforms = RowUniforms(5)
    contexts = [[*prompt, *range(row)] for row, prompt in enumerate(prompts)]  # ragged
    made = sums.sampler(solver, uniforms)(
        [Request(ids, 4 + row, None, row, row) for row, ids in enumerate(contexts)]
    )
    for row, (ids, new) in enumerate(zip(contexts, made, strict=True)):
        assert 1 <= len(new) <= 4 + row
        assert END not in new[:-1]
        assert not set(new) & set(sums.INPUT_ONLY)
        for step, token in enumerate(new):
            with torch.no_grad():
                logits = solver(torch.tensor([[*ids, *new[:step]]]))[0, -1]
            logits[sums.INPUT_ONLY] = -torch.inf
            u = token_uniforms(uniforms, [row], [row + step])
            assert int(categorical.invert(categorical.normalize(logits), u[0])) == token


def test_rewards_are_log_probabilities_of_the_last_segment(solver: Solver) -> None:
    prompts = sums.questions(5, 3, np.random.default_rng(1))
    plan = DeepeningPlan.geometric(3, 2, 24, [WAIT])
    generate = sums.sampler(solver, RowUniforms(0))
    traces = deepening_traces(generate, prompts.tolist(), plan, end=[END])
    found = sums.response_logprobs(solver, prompts, traces)
    for prompt, trace, value in zip(prompts, traces, found, strict=True):
        whole = [*prompt.tolist(), *trace.ids.tolist()]
        start = 4 + (trace.trigger_spans[-1][1] if trace.trigger_spans else 0)
        with torch.no_grad():
            logits = solver(torch.tensor([whole[:-1]]))[0].double()
        logits[:, sums.INPUT_ONLY] = -torch.inf
        said = torch.log_softmax(logits, -1)
        wanted = sum(float(said[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert value == pytest.approx(wanted, abs=1e-4)


def test_training_is_reproducible_and_digits_grow(solver: Solver) -> None:
    again = sums.train(3, 20, 16, 0)
    assert torch.equal(again.read.weight, solver.read.weight)
    counts = [sums.digits_at(share, 12) for share in np.linspace(0, 1, 101)]
    assert counts[0] == 3
    assert counts[80:] == [12] * 21
    assert sorted(counts) == counts
    assert sums.digits_at(0, 2) == 2


def test_trained_solvers_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sums, "cache_directory", lambda: tmp_path / "cache")
    first = sums.trained(3, 2, 4, 0)
    monkeypatch.setattr(sums, "train", None)
    second = sums.trained(3, 2, 4, 0)
    assert torch.equal(first.read.weight, second.read.weight)
    assert len(list((tmp_path / "cache").iterdir())) == 1
