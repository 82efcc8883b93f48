"""Responses by a deepening plan: fakes of every kind, and a small model against one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.language.deepening_generation import (
    EXTENSION,
    Request,
    Stop,
    deepening_sample,
    deepening_texts,
    deepening_tokens,
    deepening_traces,
    trigger_tokens,
)
from scoredraw.language.iterative_deepening import (
    DeepeningPlan,
    SelfCorrection,
    Trace,
    deepening_schedule,
    trigger_count,
)
from scoredraw.small_models import stories_model
from scoredraw.token_sampling import sample_tokens, token_logprobs
from scoredraw.uniforms import RowUniforms

END, TRIGGER = 0, [901, 902, 903]
Fake = Callable[[Sequence[int], int, Stop | None], list[int]]


def fake(length: float = math.inf, period: int = 97) -> Fake:
    """Counts 1, 2, ... (modulo `period`) since the prompt and ends at token `length`."""

    def generate(ids: Sequence[int], room: int, stop: Stop | None) -> list[int]:
        done = sum(token < 900 for token in ids) - 1  # one token of prompt
        new: list[int] = []
        while len(new) < room:
            done += 1
            new.append(END if done == length else 1 + done % period)
            if new[-1] == END or (stop is not None and stop(new)):
                break
        return new

    return generate


def each(generate: Fake) -> Callable[[list[Request]], list[list[int]]]:
    return lambda requests: [generate(r.ids, r.room, r.stop) for r in requests]


def one(generate: Fake, plan: DeepeningPlan, **options: Any) -> Trace:
    (trace,) = deepening_traces(each(generate), [[5]], plan, end=[END], **options)
    return trace


# ── any generator ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@given(st.integers(1, 40), st.sampled_from([1.25, 1.5, 2.0, 4.0]), st.integers(1, 400),
       st.sampled_from(["total", "segment"]))  # fmt: skip
def test_a_response_that_never_ends(b0: int, gamma: float, total: int, schedule: str) -> None:
    (trace,) = deepening_sample(
        fake(), [5], b0=b0, gamma=gamma, total=total, trigger=TRIGGER, schedule=schedule
    )
    cuts = deepening_schedule(b0, gamma, total, schedule)
    assert trace.cut_positions.tolist() == cuts
    assert len(cuts) <= trigger_count(b0, gamma, total, schedule)
    assert trace.n_generated == total
    assert not trace.finished
    assert trace.ids[trace.generated_mask].tolist() == fake()([5], total, None)
    assert trace.ids[~trace.generated_mask].tolist() == TRIGGER * len(cuts)


@pytest.mark.oracle
@pytest.mark.parametrize("gamma", [1.5, 2, 4])
def test_as_many_triggers_as_the_closed_form_says(gamma: float) -> None:
    for schedule in ("total", "segment"):
        plan = DeepeningPlan.geometric(16, gamma, 1000, TRIGGER, schedule)
        trace = one(fake(), plan)
        assert len(trace.cut_positions) == trigger_count(16, gamma, 1000, schedule)
        assert trace.account(1).inserted == 3 * len(trace.cut_positions)


@pytest.mark.property
@given(st.integers(1, 80))
def test_a_response_that_ends(length: int) -> None:
    trace = one(fake(length), DeepeningPlan.geometric(8, 2, 64, TRIGGER))
    assert trace.n_generated == min(length, 64)
    assert len(trace.cut_positions) == sum(cut < length for cut in (8, 16, 32))
    assert trace.finished == (length <= 64)
    # what comes after the end is ignored: batched generators pad
    plan = DeepeningPlan.geometric(8, 2, 64, TRIGGER)
    padded = one(lambda ids, room, stop: [*fake(length)(ids, room, stop), 7, 7][:room], plan)
    assert padded.ids.tolist() == trace.ids.tolist()


@pytest.mark.oracle
def test_no_more_budget_than_the_first_is_plain_sampling() -> None:
    calls: list[tuple[list[int], int, Any]] = []
    rng = np.random.default_rng(3)

    def generate(ids: Sequence[int], room: int, stop: Any) -> list[int]:
        calls.append((list(ids), room, stop))
        return rng.integers(1, 900, room).tolist()

    traces = deepening_sample(generate, [5, 6], b0=64, total=64, trigger=TRIGGER, n=3)
    assert calls == [([5, 6], 64, None)] * 3
    plain = np.random.default_rng(3).integers(1, 900, (3, 64))
    assert [trace.ids.tolist() for trace in traces] == plain.tolist()
    assert all(not trace.trigger_spans for trace in traces)


@pytest.mark.oracle
def test_reflection_strips_the_end_and_goes_on() -> None:
    def generate(ids: Sequence[int], room: int, stop: Any) -> list[int]:
        return [1, 1, END][:room]

    trace = one(generate, DeepeningPlan.at_the_end(64, TRIGGER, times=2))
    assert trace.ids.tolist() == [1, 1, *TRIGGER, 1, 1, *TRIGGER, 1, 1, END]
    assert (trace.stripped, trace.finished, trace.n_generated) == (2, True, 7)
    assert trace.account(5).generated == 9  # what was stripped had to be sampled
    # an end that comes where a trigger is due is interrupted once
    plan = DeepeningPlan.geometric(3, 4, 48, TRIGGER, on_finish="reflect", max_reflections=1)
    assert one(generate, plan).cut_positions.tolist() == [2]
    # without a token of its own (a stop string): nothing to strip
    short = one(lambda ids, room, stop: [1, 2], DeepeningPlan.at_the_end(64, TRIGGER))
    assert (short.ids.tolist(), short.stripped) == ([1, 2, *TRIGGER, 1, 2], 0)
    silent = one(lambda ids, room, stop: [], DeepeningPlan.at_the_end(64, TRIGGER))
    assert (silent.ids.tolist(), silent.finished) == (TRIGGER, True)


@pytest.mark.oracle
def test_budget_forcing_replaces_the_end_of_thinking() -> None:
    thought = 50

    def generate(ids: Sequence[int], room: int, stop: Any) -> list[int]:
        """Thinks three tokens at a time, and answers two once it may stop thinking."""
        if ids[-1] == thought:
            return [7, END][:room]
        return [1, 1, 1, thought][:room]

    plan = DeepeningPlan.forced(8, 64, TRIGGER, thinking_end=(thought,))
    trace = one(generate, plan)
    assert trace.ids.tolist() == [*[1, 1, 1, *TRIGGER] * 2, 1, 1, 1, thought, 7, END]
    assert (trace.stripped, trace.finished) == (2, True)
    # and an end of the response before the minimum is one of thinking
    forced = one(fake(6), DeepeningPlan.forced(8, 64, TRIGGER))
    assert forced.cut_positions.tolist() == [5] * 16  # the fake ends again at once
    few = DeepeningPlan.forced(60, 64, TRIGGER, max_reflections=1, thinking_end=(thought,))
    assert len(one(generate, few).cut_positions) == 1


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def writes(text: str) -> Fake:
    """Writes a text, a token a character, whatever the triggers (tokens from 900) say."""

    def generate(ids: Sequence[int], room: int, stop: Stop | None) -> list[int]:
        done = sum(token < 900 for token in ids) - 1
        new: list[int] = []
        for letter in text[done : done + room]:
            new.append(ord(letter))
            if stop is not None and stop(new):
                break
        return new

    return generate


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("text", "boundary", "cut"),
    [
        ("It is so. Then we go on", "sentence", 9),
        ("It is so. Then we go on", None, 4),
        ('He said "no!" and left us', "sentence", 12),
        ("pi is 3.14159 or so. We see", "sentence", 20),  # not after "3."
        ("one\ntwo three\nfour", "newline", 4),
        ("one two three\nfour five", "sentence", 14),  # a line's end ends a sentence
        (r"so \boxed{x! \frac{1}{2}!}! ok", "sentence", 27),
        ("x" * 200, "sentence", 4 + EXTENSION),
        ("x" * 30, "newline", None),  # the budget runs out first
    ],
)
def test_where_a_boundary_is_waited_for(text: str, boundary: str | None, cut: int | None) -> None:
    total = 30 if cut is None else 150
    plan = DeepeningPlan(total, (tuple(TRIGGER),), (4,), boundary=boundary)
    trace = one(writes(text), plan, decode=letters)
    assert trace.cut_positions.tolist() == ([] if cut is None else [cut])
    assert letters(trace.ids[trace.generated_mask]) == text[:total]


@pytest.mark.oracle
def test_an_extension_passes_over_the_cuts_in_it() -> None:
    text = "a" * 20 + ". " + "b" * 20 + ". c"
    plan = DeepeningPlan(60, (tuple(TRIGGER),), (4, 8, 16, 32), boundary="sentence")
    assert one(writes(text), plan, decode=letters).cut_positions.tolist() == [21, 43]


@pytest.mark.oracle
def test_several_triggers_in_turn_or_drawn() -> None:
    both = [[901], [902, 903]]
    turn = one(fake(), DeepeningPlan.geometric(2, 2, 64, both))
    assert turn.trigger_lengths.tolist() == [1, 2, 1, 2, 1]

    def drawn(seed: int) -> list[int]:
        plan = DeepeningPlan.every(1, 60, both, pick="draw")
        return one(fake(), plan, rng=seed).trigger_lengths.tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    # 59 fair draws: fewer than 15 or more than 44 of one kind has probability 1e-4
    assert 15 <= drawn(1).count(2) <= 44


@pytest.mark.oracle
def test_simulated_responses_follow_the_markov_law() -> None:
    """20,000 responses, six means within 4.5 standard errors: false alarm 4e-5."""
    law, size = SelfCorrection(0.3, 0.5, 0.2), 20_000
    uniforms = RowUniforms(11)

    def generate(requests: list[Request]) -> list[list[int]]:
        """Four tokens, all 1 while right and 2 while wrong; a trigger may turn it over."""
        rows = [request.row for request in requests]
        u = uniforms.at(rows, stream="state", round=requests[0].sampled)
        if not requests[0].sampled:
            return [[1 if x < law.p0 else 2] * 4 for x in u]
        right = np.array([request.ids[-len(TRIGGER) - 1] == 1 for request in requests])
        right = np.where(right, u >= law.v, u < law.u)
        return [[1 if state else 2] * r.room for state, r in zip(right, requests, strict=True)]

    plan = DeepeningPlan.every(4, 24, TRIGGER)
    traces = deepening_traces(generate, [[5]] * size, plan)
    states = np.stack([trace.ids[trace.generated_mask] for trace in traces])[:, ::4] == 1
    wanted = law.after(np.arange(6))
    error = np.sqrt(wanted * (1 - wanted) / size)
    assert (np.abs(states.mean(0) - wanted) < 4.5 * error).all()
    found = SelfCorrection.of(states[:, 0], states[:, 1])
    assert (found.u, found.v) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.2, abs=0.03))


@pytest.mark.contract
def test_what_is_refused_before_anything_is_generated() -> None:
    def never(ids: Sequence[int], room: int, stop: Any) -> list[int]:
        raise AssertionError("called")

    def refused(message: str, **change: Any) -> None:
        given_: dict[str, Any] = {"b0": 8, "gamma": 2, "total": 64, "trigger": TRIGGER, **change}
        with pytest.raises(InputError, match=message):
            deepening_sample(never, [5], **given_)

    refused("^n: got 0", n=0)
    refused("^b0: ", b0=0)
    refused("^trigger: got no tokens", trigger=[])
    refused("^trigger: got no tokens", trigger=[], total=4)  # also where none would be due
    refused(r"^trigger: got the token \[902\] that ends a text", end=[902])
    refused("^decode: got None", boundary="newline")
    # 1 of prompt, 64 generated, 3 triggers of 3
    refused("^prompts: got 74 tokens with 64 generated and 3 triggers, want at most 73", window=73)
    assert deepening_sample(fake(), [5], b0=8, total=64, trigger=TRIGGER, window=74)


@pytest.mark.contract
def test_generators_that_break_their_word() -> None:
    plan = DeepeningPlan.geometric(8, 2, 64, TRIGGER)
    with pytest.raises(InputError, match=r"^generate: got 9 tokens, want at most 8"):
        one(lambda ids, room, stop: [1] * (room + 1), plan)
    with pytest.raises(InputError, match=r"^generate: got 0 results, want 1"):
        deepening_traces(lambda requests: [], [[5]], plan)


# ── a model of transformers ─────────────────────────────────────────────────────────────────────

EOS = 256
PROMPTS = [list(b"Two and two"), list(b"What?"), list(b"A longer prompt than the others are")]


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny_model)


def flat(rows: list[list[Any]]) -> list[Any]:
    return [item for row in rows for item in row]


TRIGGERED = DeepeningPlan.geometric(6, 2, 40, list(b" Wait!"))


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_without_a_trigger_it_is_plain_sampling_bit_for_bit(
    tiny: tuple[Any, Any], temperature: float
) -> None:
    how: dict[str, Any] = {"temperature": temperature, "top_p": 0.95, "end": [EOS, 10, 35]}
    plain = sample_tokens(tiny[0], PROMPTS, 3, max_tokens=16, rng=7, **how)
    plan = DeepeningPlan.geometric(16, 2, 16, list(b" Wait!"))
    ours = deepening_tokens(tiny[0], PROMPTS, plan, 3, rng=7, **how)
    for wanted, trace in zip(flat(plain), flat(ours), strict=True):
        assert trace.ids.tolist() == wanted.ids.tolist()
        assert trace.logprobs.tolist() == wanted.logprobs.tolist()
        assert trace.finished == wanted.finished


@pytest.mark.oracle
@pytest.mark.parametrize(
    "plan",
    [
        TRIGGERED,
        DeepeningPlan.geometric(6, 2, 40, [list(b" Wait!"), list(b" No")], pick="draw"),
        DeepeningPlan.forced(30, 40, list(b" Wait!")),  # rows are interrupted at different times
        DeepeningPlan.geometric(
            6, 1.5, 40, list(b" Wait!"), on_finish="reflect", max_reflections=3, boundary="newline"
        ),
    ],
)
def test_log_probabilities_are_those_of_one_pass_over_all_ids(
    tiny: tuple[Any, Any], plan: DeepeningPlan
) -> None:
    model, tokenizer = tiny
    ends = [EOS, *range(50, 78)]  # so that rows end, at different times
    found = deepening_tokens(model, PROMPTS, plan, 8, end=ends, decode=tokenizer.decode, rng=1)
    lengths = {trace.n_generated for trace in flat(found)}
    cuts = {tuple(trace.cut_positions.tolist()) for trace in flat(found)}
    assert len(lengths) > 3, "rows that end at different times"
    assert len(cuts) > 2, "rows with different triggers"
    for prompt, traces in zip(PROMPTS, found, strict=True):
        for trace in traces:
            whole = token_logprobs(model, prompt, trace.ids.tolist())
            np.testing.assert_allclose(trace.logprobs, whole[trace.generated_mask], atol=1e-9)
            assert trace.finished == (trace.ids[-1] in ends)
            if trace.finished and plan.on_finish == "stop":  # no trigger after the end
                assert all(cut < trace.n_generated for cut in trace.cut_positions)


@pytest.mark.oracle
def test_a_row_does_not_depend_on_its_batch(tiny: tuple[Any, Any]) -> None:
    plan = DeepeningPlan.forced(30, 40, list(b" Wait!"))
    ends = list(range(50, 78))
    batch = deepening_tokens(tiny[0], PROMPTS, plan, 4, end=ends, rng=2)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = deepening_tokens(tiny[0], [prompt], plan, 4, end=ends, rng=2, first=i)
        for one_, other in zip(batch[i], alone, strict=True):
            assert one_.ids.tolist() == other.ids.tolist()


@pytest.mark.oracle
def test_the_cache_changes_nothing(tiny: tuple[Any, Any]) -> None:
    """Greedy, against the other driver with a model that reads everything afresh."""
    import torch

    def generate(ids: Sequence[int], room: int, stop: Stop | None) -> list[int]:
        new: list[int] = []
        while len(new) < room and (not new or not (new[-1] in ends or (stop and stop(new)))):
            with torch.no_grad():
                logits = tiny[0](torch.tensor([[*ids, *new]])).logits[0, -1]
            new.append(int(logits.argmax()))
        return new

    for plan, ends in (
        (TRIGGERED, [EOS]),
        (DeepeningPlan.forced(20, 30, [187, 197]), [*range(99)]),
    ):
        cached = deepening_tokens(tiny[0], PROMPTS, plan, temperature=0, end=ends)
        afresh = deepening_traces(each(generate), PROMPTS, plan, end=ends)
        for (ours,), other in zip(cached, afresh, strict=True):
            assert ours.ids.tolist() == other.ids.tolist()
            assert ours.trigger_spans == other.trigger_spans


@pytest.mark.oracle
def test_a_trigger_takes_one_pass_where_all_are_interrupted(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    forward = type(tiny[0]).forward

    def counted(self: Any, input_ids: Any, **options: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(tiny[0]), "forward", counted)
    deepening_tokens(tiny[0], PROMPTS, TRIGGERED, 2, rng=0)
    trigger = len(b" Wait!")
    assert widths == [max(map(len, PROMPTS)), *(
        1 + trigger * (step in TRIGGERED.cuts) for step in range(1, 40)
    )]  # fmt: skip


@pytest.mark.oracle
def test_texts_hold_the_triggers_and_log_probabilities_do_not(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "max_tokens": 24, "first_budget": 5, "growth": 2, "trigger": "Wait!", "seed": 4,
        "schedule": "total", "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    prompts = ["Two and two", [{"role": "user", "content": "Hm?"}]]
    found = deepening_texts(
        model, tokenizer, prompts, 2, progress=lambda *a: told.append(a), **options
    )
    assert [len(samples) for samples in found] == [2, 2]
    assert told[-1] == (4, 4)
    for completion in flat(found):
        assert len(completion.tokens) == len(completion.logprobs) <= 24
        assert completion.text.count(" Wait!") == sum(
            c < len(completion.tokens) for c in (5, 10, 20)
        )
    again = deepening_texts(model, tokenizer, prompts, 2, **options)
    assert [c.text for c in flat(again)] == [c.text for c in flat(found)]


@pytest.mark.oracle
def test_a_trigger_stands_within_the_assistants_turn(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    options: dict[str, Any] = {"max_tokens": 16, "first_budget": 5, "trigger": "Wait!", "seed": 4}
    chat, text = (
        deepening_texts(model, tokenizer, [prompt], 3, **options)[0]
        for prompt in ([{"role": "user", "content": "Hm?"}], "<user>Hm?<eos><assistant>")
    )
    assert [c.tokens for c in chat] == [c.tokens for c in text]  # no new turn is opened
    assert all(" Wait!" in c.text for c in chat if len(c.tokens) > 5)
    # a reply that ends early is not ended: its end is taken out, and it goes on
    end = chat[0].tokens[2]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    (more,) = deepening_texts(
        model, tokenizer, [[{"role": "user", "content": "Hm?"}]], on_finish="reflect", **options
    )[0]
    assert more.tokens[:2] == chat[0].tokens[:2]
    assert end not in more.tokens[:-1]


@pytest.mark.oracle
def test_a_stop_string_in_the_trigger_stops_nothing(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    options: dict[str, Any] = {"max_tokens": 24, "first_budget": 5, "trigger": "Q: \n", "seed": 4}
    free, stopped = (
        deepening_texts(model, tokenizer, ["Two"], 6, stop=stop, **options)[0]
        for stop in ((), ("Q:", "\x01"))
    )
    for one_, other in zip(free, stopped, strict=True):
        due = sum(cut < len(other.tokens) for cut in (5, 10, 20))
        assert other.text.count("Q: ") == due
        assert other.text == one_.text.partition("\x01")[0]
    assert max(len(other.tokens) for other in stopped) > 20


@pytest.mark.contract
def test_triggers_have_no_special_tokens(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    assert trigger_tokens(tokenizer, "Wait") == tokenizer(" Wait")["input_ids"]
    assert trigger_tokens(tokenizer, "\nWait") == tokenizer("\nWait")["input_ids"]
    with pytest.raises(InputError, match=r"^trigger: got ' ', want a text with tokens"):
        trigger_tokens(tokenizer, " ")
    with pytest.raises(InputError, match=r"^trigger: got ''"):
        deepening_texts(model, tokenizer, ["Two"], trigger="", max_tokens=8)
    with pytest.raises(InputError, match=r"^prompts: got 4202 tokens .*at most 4096, the model's"):
        deepening_texts(model, tokenizer, ["x" * 34], max_tokens=4096, trigger="a" * 15 + "bc")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"n": 0}, "^n: "), ({"top_p": 0}, "^top_p: "), ({"stop": [""]}, "^stop: "),
        ({"stop": "Q:"}, "^stop: "), ({"growth": 1}, "^gamma: "), ({"first_budget": 0}, "^b0: "),
    ]  # fmt: skip
    for change, message in refused:
        with pytest.raises(InputError, match=message):
            deepening_texts(model, tokenizer, ["Two"], max_tokens=8, **change)
    assert deepening_texts(model, tokenizer, [], max_tokens=8) == []


@pytest.mark.oracle
def test_a_real_model_of_stories() -> None:
    try:
        model, tokenizer = stories_model()
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    assert trigger_tokens(tokenizer, "Wait!")[0] != tokenizer.bos_token_id
    plan = DeepeningPlan.geometric(8, 2, 40, trigger_tokens(tokenizer, "Wait! Oh no!"))
    prompt = tokenizer("Once upon a time")["input_ids"]
    for trace in deepening_tokens(model, [prompt], plan, 3, end=[tokenizer.eos_token_id], rng=0)[0]:
        assert trace.cut_positions.tolist() == [8, 16, 32]
        assert tokenizer.decode(trace.ids).count("Wait! Oh no!") == 3
        whole = token_logprobs(model, prompt, trace.ids.tolist())
        np.testing.assert_allclose(trace.logprobs, whole[trace.generated_mask], atol=1e-3)
