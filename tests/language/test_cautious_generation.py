"""Cautious decoding of transformers models: the shared cache, generate's hook, texts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, wraps
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest

from scoredraw.errors import InputError, MissingExtraError
from scoredraw.language.cautious_decoding import CautiousPlan, CautiousTokens, cautious_decode
from scoredraw.language.cautious_generation import (
    HOLES,
    SharedCache,
    cautious_generate,
    cautious_texts,
    cautious_tokens,
)
from scoredraw.language.punctuation import MARKS, punctuation_ids
from scoredraw.models import TransformersModel
from scoredraw.small_models import stories_model
from scoredraw.token_sampling import sample_tokens, token_logprobs

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12]]
PLAN = CautiousPlan([3, 4, 5])


@pytest.fixture(scope="module")
def model() -> Any:
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, eos_token_id=6,
        max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny_model)


def afresh(model: Any) -> Any:
    """The logits of texts, each read alone and from its start."""
    import torch

    def next_logits(texts: list[list[int]]) -> Any:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])

    return next_logits


def same(a: CautiousTokens, b: CautiousTokens) -> bool:
    assert a.ids.tolist() == b.ids.tolist()
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert [d.lengths for d in a.decisions] == [d.lengths for d in b.decisions]
    # which of two equal texts is kept is a matter of rounding
    return (a.forward_rows, a.finished) == (b.forward_rows, b.finished)


# ── the shared cache ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [{}, {"end": [6]}, {"top_p": 0.8, "temperature": 0.4, "end": [6]}, {"temperature": 0.0}],
)
def test_one_batch_with_a_cache_as_texts_read_afresh(model: Any, options: dict[str, Any]) -> None:
    """Rows of different lengths, branching at different places, rows leaving the batch."""
    apart = cautious_decode(afresh(model), PROMPTS, PLAN, max_new_tokens=40, rng=3, **options)
    for at_once in (1, 2, 16):
        found = cautious_tokens(
            model, PROMPTS, PLAN, max_tokens=40, rng=3, rows_at_once=at_once, **options
        )
        assert all(same(one[0], other) for one, other in zip(found, apart, strict=True))
    if options.get("temperature") == 0:
        assert {d.lengths for one in apart for d in one.decisions} == {(1,)}


def test_the_cache_is_closed_up(model: Any) -> None:
    """Marks are rare: trials are long, most of what was read is dropped, and the cache stays small.

    The log-probabilities are those of one pass over the text."""
    plan = CautiousPlan([3], n_min=6, max_trial_tokens=40)
    widths: list[int] = []
    close = SharedCache._close_up

    def watched(self: SharedCache) -> None:
        close(self)
        widths.append(self.mask.shape[1] - int(self.mask.sum(1).max()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedCache, "_close_up", watched)
        found = cautious_tokens(model, PROMPTS, plan, 2, max_tokens=100, rng=2)
    assert max(widths) <= HOLES
    for prompt, samples in zip(PROMPTS, found, strict=True):
        for one in samples:
            whole = token_logprobs(model, prompt, one.ids.tolist())
            np.testing.assert_allclose(one.logprobs, whole, atol=1e-4)


def test_one_trial_is_the_ordinary_sampler(model: Any) -> None:
    for options in ({}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}):
        plain = sample_tokens(model, PROMPTS, 3, max_tokens=30, end=[6], rng=4, first=2, **options)
        for plan in (CautiousPlan([3], n_max=1), CautiousPlan([3], h_max=1e9)):
            found = cautious_tokens(
                model, PROMPTS, plan, 3, max_tokens=30, end=[6], rng=4, first=2, **options
            )
            for one, other in zip(chain(*found), chain(*plain), strict=True):
                assert one.ids.tolist() == other.ids.tolist()
                assert one.finished == other.finished
                assert one.forward_rows == len(one.ids)


def test_passes_and_rows_are_as_accounted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    forward = type(model).forward

    @wraps(forward)
    def counted(self: Any, input_ids: Any, **options: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    found = cautious_tokens(model, PROMPTS, PLAN, 2, max_tokens=25, rng=0)
    prompts, *steps = shapes
    assert prompts == (3, 6)
    assert {width for _, width in steps} == {1}
    rows = sum(one.forward_rows - 1 for samples in found for one in samples)
    assert sum(count for count, _ in steps) == rows


def test_progress_ends_with_all(model: Any) -> None:
    told: list[tuple[int, int]] = []
    cautious_tokens(
        model, PROMPTS, PLAN, 2, max_tokens=9, rng=0, rows_at_once=4,
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    assert told[-1] == (6, 6)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert cautious_tokens(model, [], PLAN, max_tokens=4) == []


@pytest.mark.contract
def test_bad_input(model: Any) -> None:
    for change, message in (
        ({"n": 0}, r"^n: "), ({"max_tokens": 0}, r"^max_tokens: "), ({"top_p": 0}, r"^top_p: "),
        ({"rows_at_once": 0}, r"^rows_at_once: "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cautious_tokens(model, PROMPTS, PLAN, **{"max_tokens": 5, **change})
    with pytest.raises(InputError, match=r"^prompts: got an empty one"):
        cautious_tokens(model, [[]], PLAN, max_tokens=5)
    windowed = transformers.MistralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, sliding_window=4,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    sliding = transformers.MistralForCausalLM(windowed)
    with pytest.raises(InputError, match=r"^model: got layers of DynamicSlidingWindowLayer, want"):
        cautious_tokens(sliding, [[1]], PLAN, max_tokens=5)


# ── generate's hook ─────────────────────────────────────────────────────────────────────────────


def generate(model: Any, ids: Any, **options: Any) -> Any:
    import torch

    ids = torch.tensor(ids)
    how = {
        "custom_generate": cautious_generate, "plan": PLAN, "rng": 5, "do_sample": True,
        "top_k": 0, "max_new_tokens": 30, "pad_token_id": 0, **options,
    }  # fmt: skip
    return model.generate(ids, **how)


def unpadded(row: Any) -> list[int]:
    found: list[int] = row.tolist()
    return found[: found.index(6) + 1] if 6 in found else found


def test_generate_gives_what_the_tokens_are(model: Any) -> None:
    """Padded prompts of two lengths; rows are independent; with and without a cache."""
    import torch

    ids, mask = [[0, 0, 1, 2], [1, 2, 3, 4]], torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for options in ({}, {"temperature": 0.4, "top_p": 0.8}):
        trace: list[CautiousTokens] = []
        out = generate(model, ids, attention_mask=mask, trace=trace, **options)
        wanted = cautious_tokens(
            model, [[1, 2], [1, 2, 3, 4]], PLAN, max_tokens=30, end=[6], rng=5, **options
        )
        for row, (other,), seen in zip(out, wanted, trace, strict=True):
            assert unpadded(row[4:]) == other.ids.tolist()
            assert same(seen, other) or not options  # float32 processors
            assert set(row[4 + len(other.ids) :].tolist()) <= {0}
        again = generate(model, ids, attention_mask=mask, use_cache=False, **options)
        assert again.tolist() == out.tolist()
    whole = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    assert whole.sequences.shape[0] == 2


def test_torch_seeds_decide_without_a_seed(model: Any) -> None:
    import torch

    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(generate(model, [[1, 2]], rng=None).tolist())
    assert made[0] == made[1] != made[2]


def test_processors_and_criteria_are_honoured(model: Any) -> None:
    out = generate(model, [[1, 2], [8, 9]], suppress_tokens=[6, 7, 11], min_new_tokens=30)
    assert out.shape == (2, 32)
    assert not np.isin(out[:, 2:], [6, 7, 11]).any()

    class Stop(transformers.StoppingCriteria):  # type: ignore[misc, name-defined]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return (input_ids[:, -1] == 9) | (input_ids[:, -1] == 10)

    trace: list[CautiousTokens] = []
    generate(
        model, [[1, 2], [8, 9], [3, 3]], suppress_tokens=[6], trace=trace,
        stopping_criteria=transformers.StoppingCriteriaList([Stop()]),
    )  # fmt: skip
    assert any(one.finished for one in trace)
    for one in trace:
        assert one.finished == (one.ids[-1] in (9, 10))
        assert not np.isin(one.ids[:-1], [9, 10]).any()
    pairs = list(pairwise(generate(model, [[1, 2]], no_repeat_ngram_size=2)[0].tolist()))
    assert len(pairs) == len(set(pairs))


class Counting:
    """A processor with a state: bars the token that it counts up to, a call a step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        assert len(ids) == 1
        assert self.calls == ids.shape[1] - 2  # as many as tokens of this very text
        self.calls += 1
        scores[:, 7 + self.calls % 20] = -np.inf
        return scores


def test_a_state_belongs_to_a_trial(model: Any) -> None:
    first = Counting()
    out = generate(
        model, [[1, 2], [8, 9], [4, 4]], suppress_tokens=[6], max_new_tokens=40,
        logits_processor=transformers.LogitsProcessorList([first]),
    )  # fmt: skip
    assert first.calls == 0  # copies
    for row in out[:, 2:].tolist():
        assert all(token != 7 + (step + 1) % 20 for step, token in enumerate(row))


def test_a_streamer_gets_the_text_in_order(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = 0

        def put(self, value: Any) -> None:
            self.parts.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    hook = partial(cautious_generate, streamer=streamer)  # generate itself streams the prompt
    out = generate(model, [[1, 2]], streamer=streamer, suppress_tokens=[6], custom_generate=hook)
    assert [*chain(*streamer.parts)] == out[0].tolist()
    assert len(streamer.parts) > 3
    assert streamer.ended == 1


def test_a_prompt_at_its_longest_is_returned(model: Any) -> None:
    import torch
    from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

    ids = torch.tensor([[1, 2, 3]])
    found = cautious_generate(
        model, ids, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(3)]), plan=PLAN
    )
    assert found.tolist() == ids.tolist()


def test_likeliest_tokens_where_there_is_one_trial(model: Any) -> None:
    import torch

    plain = model.generate(
        torch.tensor([[1, 2]]), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    once = generate(
        model, [[1, 2]], do_sample=False, top_k=None, max_new_tokens=20,
        plan=CautiousPlan([3], n_max=1),
    )  # fmt: skip
    assert once.tolist() == plain.tolist()


@pytest.mark.contract
def test_what_generate_cannot_follow(model: Any) -> None:
    for change, message in (
        ({"num_beams": 2}, r"^num_beams: got 2"),
        ({"guidance_scale": 2.0}, r"^logits_processor: got UnbatchedClassifierFree"),
        ({"plan": None}, r"^plan: got None, want one, or a tokenizer"),
        ({"cache_implementation": "static"}, r"^past_key_values: got a StaticCache"),
        ({"return_dict_in_generate": True, "output_scores": True}, r"^output_scores: "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            generate(model, [[1, 2]], **change)
    with pytest.raises(InputError, match=r"^streamer: got one for 2 rows"):
        cautious_generate(model, np.zeros((2, 2)), streamer=print, plan=PLAN)
    with pytest.raises(InputError, match=r"^logits_processor: got a prefix_allowed_tokens_fn"):
        generate(model, [[1], [2]], prefix_allowed_tokens_fn=lambda row, ids: [1])
    ids = generate(model, [[1]], prefix_allowed_tokens_fn=lambda row, ids: [8, 9 + 0 * row])
    assert set(ids[0, 1:].tolist()) <= {8, 9}
    with pytest.raises(InputError, match=r"^stopping_criteria: got no maximal length"):
        cautious_generate(model, np.zeros((1, 2)), plan=PLAN)
    with pytest.raises(InputError, match=r"^model_kwargs: got pixel_values"):
        cautious_generate(model, np.zeros((1, 2)), plan=PLAN, pixel_values=np.zeros(3))


# ── punctuation, and texts ──────────────────────────────────────────────────────────────────────


def test_punctuation_of_bytes(tiny: tuple[Any, Any]) -> None:
    for which in ("vocabulary", "official"):
        ids = punctuation_ids(tiny[1], which=which)
        assert {tiny[1].decode([i]) for i in ids} == set(MARKS)
    assert len(punctuation_ids(tiny[1], ".")) == 1
    for bad, message in (({"marks": ""}, r"^marks: got none"), ({"which": "x"}, r"^which: ")):
        with pytest.raises(InputError, match=message):
            punctuation_ids(tiny[1], **bad)
    with pytest.raises(InputError, match=r"^marks: got 'Ω'"):
        punctuation_ids(tiny[1], "Ω")


def test_texts_and_messages(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    told: list[tuple[int, int]] = []
    trace: list[CautiousTokens] = []
    prompts: list[Any] = ["Two and two", [{"role": "user", "content": "Hm?"}]]
    options: dict[str, Any] = {"max_tokens": 12, "seed": 4, "n_max": 4, "stop": ["Q"]}
    found = cautious_texts(
        model, tokenizer, prompts, 2, trace=trace, progress=lambda *a: told.append(a), **options
    )
    assert [len(samples) for samples in found] == [2, 2]
    assert told[-1] == (4, 4)
    flat = [one for samples in found for one in samples]
    for completion, seen in zip(flat, trace, strict=True):
        assert completion.tokens == tuple(seen.ids.tolist())
        assert "Q" not in completion.text
        assert seen.forward_rows >= len(seen.ids)
    assert trace[0].branch_rate > 0
    whole = TransformersModel(model, tokenizer)
    plain = whole.sample_all(prompts, 2, max_tokens=12, seed=4, stop=["Q"])
    alone = cautious_texts(model, tokenizer, prompts, 2, **{**options, "n_max": 1})
    assert [c.text for s in alone for c in s] == [c.text for s in plain for c in s]
    for change, message in (
        ({"stop": "Q"}, r"^stop: "), ({"punctuation": "x"}, r"^which: "),
        ({"max_tokens": 5000}, r"^prompt: "), ({"rule": "x"}, r"^rule: "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cautious_texts(model, tokenizer, prompts, **{**options, **change})


@pytest.fixture(scope="module")
def stories() -> Iterator[tuple[Any, Any]]:
    try:
        yield stories_model()
    except MissingExtraError as missing:
        pytest.skip(str(missing))


def test_the_released_set_misses_the_mark_after_a_word(stories: tuple[Any, Any]) -> None:
    """Llama's tokenizer sets a blank before a text: its "." alone is not that of a sentence."""
    tokenizer = stories[1]
    official, ours = (punctuation_ids(tokenizer, which=w) for w in ("official", "vocabulary"))
    full_stop = tokenizer("end.", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.decode([full_stop]) == "."
    assert full_stop not in official
    assert full_stop in ours
    assert len(official) == 10 < len(ours)
    assert not set(tokenizer.all_special_ids) & {*official, *ours}


def test_a_real_model_of_stories(stories: tuple[Any, Any]) -> None:
    """Segments end in a mark; the text is surer than a sampled one; the accounts are right."""
    model, tokenizer = stories
    ids = punctuation_ids(tokenizer)
    found = cautious_tokens(
        model, [[tokenizer.bos_token_id]], CautiousPlan(ids), 4, max_tokens=40, rng=0,
        end=[tokenizer.eos_token_id],
    )[0]  # fmt: skip
    plain = sample_tokens(model, [[1]], 4, max_tokens=40, rng=0, end=[2])[0]
    for one in found:
        for d in one.decisions:
            last = one.ids[d.step + d.lengths[d.kept] - 1]
            assert len(d.lengths) == 1 or last in ids or d.step + d.lengths[d.kept] == 40
        whole = token_logprobs(model, [tokenizer.bos_token_id], one.ids.tolist())
        np.testing.assert_allclose(one.logprobs, whole, atol=1e-3)
    nll = [-np.mean([one.logprobs.mean() for one in texts]) for texts in (found, plain)]
    assert nll[0] < nll[1] - 0.2
