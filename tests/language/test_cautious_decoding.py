"""Cautious decoding without a model: the rule, the law of what is kept, the rows' bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from scoredraw import categorical
from scoredraw.errors import InputError
from scoredraw.language.cautious_decoding import (
    MOST_TRIALS,
    CautiousPlan,
    CautiousTokens,
    cautious_decode,
    trial_counts,
    uncertainty,
)
from scoredraw.language.punctuation import best_segment, segment_law, segment_perplexity
from scoredraw.token_sampling import SAMPLES_OF_A_PROMPT
from scoredraw.uniforms import RowUniforms

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]

A, B, STOP, END = range(4)
MARKOV = np.log([[0.5, 0.2, 0.2, 0.1], [0.3, 0.4, 0.3, 1e-300], [0.25, 0.45, 0.2, 0.1], [0.25] * 4])
PLAN = CautiousPlan([STOP])


def markov(texts: list[list[int]]) -> Float:
    """The next token depends on the last alone."""
    return MARKOV[[text[-1] for text in texts]]


def decode(plan: CautiousPlan = PLAN, prompts: int = 40, **options: Any) -> list[CautiousTokens]:
    how: dict[str, Any] = {"max_new_tokens": 30, "end": [END], "rng": 1, **options}
    return cautious_decode(how.pop("model", markov), [[STOP]] * prompts, plan, **how)


# ── how many trials ─────────────────────────────────────────────────────────────────────────────


def test_where_the_rules_differ() -> None:
    h = 0.01 + 1.49 * np.array([0.15, 0.25, 0.5 + 1e-12])
    assert trial_counts(h).tolist() == [2, 3, 5]
    assert trial_counts(h, rule="paper").tolist() == [1, 2, 5]
    # one trial up to f < 1/9, or f < 1/5
    assert trial_counts([0.1755, 0.1756]).tolist() == [1, 2]
    assert trial_counts([0.307, 0.3081], rule="paper").tolist() == [1, 2]


def test_inverse_and_fixed() -> None:
    h = [0.0, 0.755, 2.0]
    assert trial_counts(h, trials="inverse").tolist() == [10, 5, 1]
    assert trial_counts(h, trials="inverse", rule="paper").tolist() == [10, 5, 1]
    assert trial_counts(h, trials="fixed").tolist() == [6, 6, 6]
    assert trial_counts(h, n_min=3, rule="paper").tolist() == [3, 5, 10]
    assert trial_counts(h, n_min=3).tolist() == [3, 6, 10]


@pytest.mark.property
@given(
    st.lists(st.floats(0, 5), min_size=2, max_size=20), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(["code", "paper"]),
)  # fmt: skip
def test_more_trials_where_it_is_less_sure(
    h: list[float], n_max: int, n_min: int, rule: str
) -> None:
    n_min = min(n_min, n_max)
    counts = trial_counts(np.sort(h), n_max=n_max, n_min=n_min, rule=rule)
    assert (np.diff(counts) >= 0).all()
    assert n_min <= counts.min() <= counts.max() <= n_max
    opposite = trial_counts(np.sort(h), n_max=n_max, n_min=n_min, rule=rule, trials="inverse")
    assert (np.diff(opposite) <= 0).all()


def test_uncertainty_of_arrays_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    p = np.array([[0.7, 0.1, 0.2, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        logs = np.log(p)
    wanted = {
        "entropy": [0.8018, 1.3863, 0.0], "max_prob": [0.3, 0.75, 0.0], "margin": [0.5, 1.0, 0.0],
    }  # fmt: skip
    for measure, values in wanted.items():
        found = uncertainty(logs, measure)
        np.testing.assert_allclose(found, values, atol=5e-5)
        np.testing.assert_allclose(uncertainty(torch.tensor(logs), measure), found, atol=1e-12)
    assert CautiousPlan([0], measure="margin").counts(np.array([0.0, 0.5, 1.0])).tolist() == [
        1, 5, 10,
    ]  # fmt: skip
    assert CautiousPlan([0], measure="margin", h_max=0.5).bounds == (0.0, 0.5)


# ── the law ─────────────────────────────────────────────────────────────────────────────────────


def segments(first: int, room: int) -> dict[tuple[int, ...], Float]:
    """Every segment from a token on within `room` tokens, with its tokens' log-probabilities."""
    found: dict[tuple[int, ...], Float] = {}
    open_ends: list[tuple[tuple[int, ...], list[float]]] = [((), [])]
    while open_ends:
        tokens, logs = open_ends.pop()
        last = tokens[-1] if tokens else first
        for token in range(4):
            longer, more = (*tokens, token), [*logs, float(MARKOV[last, token])]
            if token in (STOP, END) or len(longer) == room:
                found[longer] = np.array(more)
            else:
                open_ends.append((longer, more))
    return found


@pytest.mark.parametrize(("n", "cap"), [(2, None), (6, 3)])
def test_the_first_segment_follows_the_law(n: int, cap: int | None) -> None:
    """20,000 runs; segments expected fewer than 5 times are put together; false alarms 1e-4."""
    runs, room = 20_000, 4
    plan = CautiousPlan([STOP], n_max=n, n_min=n, max_trial_tokens=cap)
    found = decode(plan, runs, max_new_tokens=cap or room, end=[STOP, END], rng=3)
    possible = segments(STOP, cap or room)
    q = np.array([np.exp(logs.sum()) for logs in possible.values()])
    law = segment_law(q, [segment_perplexity(logs) for logs in possible.values()], n)
    place = {tokens: i for i, tokens in enumerate(possible)}
    kept = [place[tuple(one.ids.tolist())] for one in found]
    assert {len(one.decisions) for one in found} == {1}
    counts, expected = np.bincount(kept, minlength=len(place)), law * runs
    group = np.where(expected < 5, 0, np.arange(1, len(place) + 1))
    assert len(set(group)) > 12
    kinds = [group == g for g in np.unique(group) if expected[group == g].sum() > 1e-6]
    counts, expected = (np.array([x[kind].sum() for kind in kinds]) for x in (counts, expected))
    assert counts.sum() == runs
    assert chisquare(counts, expected).pvalue > 1e-4
    # the law of one more trial is told apart
    other = segment_law(q, [segment_perplexity(logs) for logs in possible.values()], n + 1) * runs
    assert chisquare(counts, [other[kind].sum() for kind in kinds], sum_check=False).pvalue < 1e-6


def test_of_two_the_likelier_loses_only_when_it_is_never_drawn() -> None:
    for n in (1, 2, 5):
        np.testing.assert_allclose(segment_law([0.8, 0.2], [1.2, 3.0], n)[1], 0.2**n)


def test_a_tie_is_shared_by_probability() -> None:
    law = segment_law([0.6, 0.2, 0.2], [2.0, 2.0, 1.0], [1, 2])
    np.testing.assert_allclose(law, [[0.6, 0.2, 0.2], [0.48, 0.16, 0.36]])


@pytest.mark.property
@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 5)), min_size=1, max_size=8))
def test_more_trials_never_raise_the_expected_perplexity(pairs: list[tuple[float, int]]) -> None:
    q, v = np.array(pairs).T
    law = segment_law(q / q.sum(), v, np.arange(1, 12))
    np.testing.assert_allclose(law.sum(1), 1)
    np.testing.assert_allclose(law[0], q / q.sum(), atol=1e-12)
    assert (np.diff(law @ v) <= 1e-12).all()


def test_a_segment_that_is_less_probable_in_all_can_win() -> None:
    one, three = np.log([0.6]), np.log([0.7, 0.7, 0.7])
    assert three.sum() < one.sum()
    assert best_segment([segment_perplexity(one), segment_perplexity(three)]) == 1
    assert best_segment([np.inf, np.inf]) == 0
    assert segment_perplexity([-1.0, -np.inf]) == np.inf


def test_an_end_of_text_has_an_advantage() -> None:
    """It wins whenever it is drawn: 1 - (1 - p)^n. 4,000 decisions, four standard errors: 6e-5."""
    found = decode(
        CautiousPlan([STOP], n_min=10), 4000, end=[STOP, END], max_new_tokens=20,
        model=lambda texts: np.log([[0.25, 0.25, 0.2, 0.3]]).repeat(len(texts), axis=0),
    )  # fmt: skip
    ended = np.mean([one.ids.tolist() == [END] for one in found])
    law = 1 - 0.7**10
    assert abs(ended - law) < 4 * np.sqrt(law * (1 - law) / 4000)


# ── the rows ────────────────────────────────────────────────────────────────────────────────────


def literally(
    prompt: int,
    plan: CautiousPlan,
    room: int,
    seed: int,
    step: Callable[[list[int]], Float],
    score: Callable[[list[int]], Float] | None = None,
) -> list[int]:
    """The method as one would write it down: one trial after the other, nothing shared."""
    uniforms, row, text = RowUniforms(seed), prompt * SAMPLES_OF_A_PROMPT, [STOP]

    def token(trial: int | None, so_far: list[int]) -> int:
        place = len(so_far) - 1
        if trial is None:
            u = uniforms.at([row], stream="tokens", round=place)
        else:
            u = uniforms.at([place * MOST_TRIALS + trial], stream="trials", round=row)
        return int(categorical.invert(step(so_far)[None], u)[0])

    while len(text) <= room and text[-1] != END:
        n = int(plan.counts(uncertainty(step(text)[None]))[0])
        if n == 1:
            text.append(token(None, text))
            continue
        trials = []
        for trial in range(n):
            longer = list(text)
            while len(longer) == len(text) or (
                longer[-1] not in (STOP, END)
                and len(longer) <= room
                and len(longer) - len(text) < (plan.max_trial_tokens or room)
            ):
                longer.append(token(trial, longer))
            trials.append(longer)
        judge = score or step
        text = trials[best_segment([
            segment_perplexity([judge(t[:i])[t[i]] for i in range(len(text), len(t))])
            for t in trials
        ])]  # fmt: skip
    return text[1:]


def sharp(text: list[int]) -> Float:
    """A log-distribution that is sure of some tokens and unsure of others."""
    rng = np.random.default_rng([7, len(text), *text[-2:]])
    logits = rng.normal(size=4) * rng.choice([0.5, 1.5, 6.0]) - [0, 0, 0, 3]
    found: Float = categorical.normalize(logits)
    return found


def sharply(texts: list[list[int]]) -> Float:
    return np.stack([sharp(text) for text in texts])


@pytest.mark.parametrize("options", [{}, {"rule": "paper"}, {"trials": "inverse"},
                                     {"trials": "fixed"}, {"max_trial_tokens": 3}])  # fmt: skip
def test_together_as_one_by_one(options: dict[str, Any]) -> None:
    plan = CautiousPlan([STOP], **options)
    found = decode(plan, 25, model=sharply, rng=5)
    for i, one in enumerate(found):
        assert one.ids.tolist() == literally(i, plan, 30, 5, sharp)
        assert one.finished == (one.ids[-1] == END)
        # the same row on its own
        alone = decode(plan, 1, model=sharply, rng=5, first=i)[0]
        assert alone.ids.tolist() == one.ids.tolist()
        assert alone.decisions == one.decisions
        assert alone.forward_rows == one.forward_rows
    branched = [len(d.lengths) > 1 for one in found for d in one.decisions]
    assert 0.1 < np.mean(branched) <= (1 if options else 0.9)


def test_scores_of_the_raw_model() -> None:
    def hot(text: list[int]) -> Float:
        found: Float = categorical.truncate(sharp(text), temperature=2.0, top_p=0.9)
        return found

    plan = CautiousPlan([STOP], score="raw")
    differ = 0
    for i, (raw, processed) in enumerate(zip(
        decode(plan, 20, model=sharply, temperature=2.0, top_p=0.9),
        decode(PLAN, 20, model=sharply, temperature=2.0, top_p=0.9), strict=True,
    )):  # fmt: skip
        assert raw.ids.tolist() == literally(i, plan, 30, 1, hot, score=sharp)
        assert processed.ids.tolist() == literally(i, PLAN, 30, 1, hot)
        differ += raw.ids.tolist() != processed.ids.tolist()
        said = [sharp([STOP, *raw.ids[:t]])[raw.ids[t]] for t in range(len(raw.ids))]
        np.testing.assert_allclose(raw.logprobs, said)
    assert differ > 0


def test_a_sure_model_is_followed_token_by_token() -> None:
    calls = []

    def sure(texts: list[list[int]]) -> Float:
        calls.append(len(texts))
        return np.where(np.arange(4) == (texts[0][-1] + 1) % 3, 0.0, -np.inf)[None]

    (found,) = decode(prompts=1, model=sure, max_new_tokens=12)
    assert found.ids.tolist() == [A, B, STOP] * 4
    assert calls == [1] * 12
    assert found.forward_rows == 12
    assert {d.lengths for d in found.decisions} == {(1,)}
    assert found.branch_rate == 0


def test_one_trial_is_ordinary_sampling() -> None:
    plain = decode(CautiousPlan([STOP], n_max=1), model=sharply)
    for sure in (CautiousPlan([STOP], h_max=1e9), CautiousPlan([STOP], h_min=9.0, h_max=10.0)):
        for one, other in zip(plain, decode(sure, model=sharply), strict=True):
            assert one.ids.tolist() == other.ids.tolist()
    uniforms, text = RowUniforms(1), [STOP]
    for step in range(len(plain[0].ids)):
        u = uniforms.at([0], stream="tokens", round=step)
        text.append(int(categorical.invert(sharp(text)[None], u)[0]))
    assert plain[0].ids.tolist() == text[1:]


def test_likeliest_where_there_is_one_trial_but_trials_are_drawn() -> None:
    greedy = decode(CautiousPlan([STOP], n_max=1), 2, model=sharply, sample=False)[0]
    text = [STOP]
    for _ in greedy.ids:
        text.append(int(sharp(text).argmax()))
    assert greedy.ids.tolist() == text[1:]
    many = decode(PLAN, 30, sample=False)
    assert len({tuple(one.ids) for one in many}) > 1


def test_decisions_tell_the_text_and_the_rows() -> None:
    for one in decode(CautiousPlan([STOP], n_min=2), 40):
        rows, place = 1, 0
        for d in one.decisions:
            assert d.step == place
            assert d.perplexities[d.kept] == min(d.perplexities)
            assert len(d.perplexities) == len(d.lengths) >= 2
            segment = one.ids[place : place + d.lengths[d.kept]]
            assert not np.isin(segment[:-1], [STOP, END]).any()
            assert segment[-1] in (STOP, END) or place + len(segment) == 30
            own = segment_perplexity(one.logprobs[place : place + len(segment)])
            assert own == pytest.approx(d.perplexities[d.kept])
            rows += sum(d.lengths) - len(d.lengths) + 1
            place += len(segment)
        assert place == len(one.ids) <= 30
        assert one.forward_rows == rows - 1  # what ended the text was not read


def test_an_end_of_text_is_a_trial_of_one_token_and_the_last() -> None:
    logits = np.log([0.05, 0.05, 0.05, 0.85])
    found = decode(
        CautiousPlan([STOP], n_min=10), 20, model=lambda texts: np.tile(logits, (len(texts), 1))
    )
    assert all(one.ids.tolist() == [END] and one.finished for one in found)


def test_no_room_leaves_the_text_as_it_is() -> None:
    found = decode(prompts=2, max_new_tokens=0)
    assert [one.ids.tolist() for one in found] == [[], []]
    assert not found[0].finished
    assert decode(prompts=0) == []


@pytest.mark.contract
def test_bad_input() -> None:
    for change, message in (
        ({"h_min": 1.5}, "^h_min: got 1.5 with h_max 1.5, want a number below h_max"),
        ({"n_max": 0}, "^n_max: got 0"), ({"n_max": MOST_TRIALS + 1}, "^n_max: "),
        ({"n_min": 0}, "^n_min: "), ({"n_min": 11}, "^n_min: got 11, want .* 10"),
        ({"fixed": 0}, "^fixed: "), ({"rule": "x"}, "^rule: got 'x', want one of code, paper"),
        ({"trials": "x"}, "^trials: "), ({"measure": "x"}, "^measure: "), ({"score": "x"}, "^scor"),
        ({"max_trial_tokens": 0}, "^max_trial_tokens: "), ({"punctuation": []}, "^punctuation: "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            CautiousPlan(**{"punctuation": [1], **change})
    with pytest.raises(InputError, match=r"^uncertainties: got NaN"):
        trial_counts([np.nan])
    with pytest.raises(InputError, match=r"^q: got a sum of 0.5"):
        segment_law([0.5], [1.0], 2)
    with pytest.raises(InputError, match=r"^n: "):
        segment_law([1.0], [1.0], 0)
    with pytest.raises(InputError, match=r"^logprobs: got none"):
        segment_perplexity([])
    with pytest.raises(InputError, match=r"^max_new_tokens: got -1"):
        decode(max_new_tokens=-1)
    with pytest.raises(InputError, match=r"^top_p: "):
        decode(top_p=0.0)


@pytest.mark.contract
def test_logits_that_are_no_numbers_name_the_step() -> None:
    def broken(texts: list[list[int]]) -> Float:
        found = sharply(texts)
        found[[len(text) == 4 for text in texts]] = np.nan
        return found

    plan = CautiousPlan([STOP], n_max=1)
    with pytest.raises(InputError, match=r"^logits: got NaN.*\(row 0, step 3\)$"):
        decode(plan, 1, model=broken, rng=11)
