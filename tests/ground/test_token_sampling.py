"""Sampling token by token against forward passes without batch, padding or cache.

Tiny random models in float64, where the model's own rounding can't turn a draw. The chi-square
tests have fixed seeds and a false-alarm rate of 1e-4 each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from scoredraw.categorical import truncate
from scoredraw.errors import InputError
from scoredraw.token_sampling import Tokens, sample_tokens, token_logprobs

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch", reason="the extra language is not installed")
pytest.importorskip("transformers", reason="the extra language is not installed")

VOCABULARY = 7
PROMPTS = [[1], [2, 3, 4, 5, 6, 1], [3, 3, 3], [6, 5]]  # of four lengths
FAMILIES = ("llama", "gpt2", "sliding window", "learned position offset")


def tiny(family: str = "llama", vocabulary: int = VOCABULARY) -> Any:
    import transformers as t

    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "initializer_range": 0.6, "bos_token_id": None,
             "eos_token_id": 0}  # fmt: skip
    llama = {**shape, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": 64}  # fmt: skip
    if family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**llama))
    elif family == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(**shape, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        )
    elif family == "sliding window":
        model = t.MistralForCausalLM(t.MistralConfig(**llama, sliding_window=4))
    else:
        model = t.OPTForCausalLM(
            t.OPTConfig(**shape, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
                        pad_token_id=0, init_std=0.6)
        )  # fmt: skip
    return model.double().eval()


def forward(model: Any, ids: Sequence[int]) -> Any:
    """The next token's log-probabilities after ids: one row, no padding, no cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits, -1).numpy()


def same(one: Tokens, other: Tokens, rtol: float = 1e-7) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol, atol=1e-9)
    assert one.finished == other.finished


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_single_passes(family: str) -> None:
    """Left padding, the shared cache and rows that leave change nothing."""
    model = tiny(family)
    made = sample_tokens(model, PROMPTS, 3, max_tokens=9, end=[0], rng=1)
    lengths = {len(t.ids) for samples in made for t in samples}
    assert len(lengths) > 1  # some rows did leave
    for prompt, samples in zip(PROMPTS, made, strict=True):
        for sample in samples:
            ids = sample.ids.tolist()
            want = [forward(model, [*prompt, *ids[:t]])[ids[t]] for t in range(len(ids))]
            np.testing.assert_allclose(sample.logprobs, want, atol=1e-9)
            np.testing.assert_allclose(token_logprobs(model, prompt, ids), want, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_changes_nothing(family: str) -> None:
    """Alone, with others, in portions, and with more samples: the same tokens."""
    model = tiny(family)
    how: dict[str, Any] = {"max_tokens": 8, "end": [0], "rng": 5, "temperature": 0.8}
    together = sample_tokens(model, PROMPTS, 4, **how)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = sample_tokens(model, [prompt], 2, first=i, **how)  # the first two of four
        for one, other in zip(together[i][:2], alone, strict=True):
            same(one, other)
    portions = [
        *sample_tokens(model, PROMPTS[:1], 4, **how),
        *sample_tokens(model, PROMPTS[1:], 4, first=1, **how),
    ]
    for samples, others in zip(together, portions, strict=True):
        for one, other in zip(samples, others, strict=True):
            same(one, other)
    assert any(a.ids.tolist() != b.ids.tolist() for a in together[0] for b in together[0])
    fresh = sample_tokens(model, PROMPTS, 4, **{**how, "rng": 6})
    assert any(a.ids.tolist() != b.ids.tolist()
               for s, f in zip(together, fresh, strict=True)
               for a, b in zip(s, f, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.5}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3},
     {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05}],
)  # fmt: skip
def test_pairs_of_tokens_come_as_often_as_they_should(how: dict[str, Any]) -> None:
    """All 49 pairs after a prompt, by chi-square; the log-probabilities stay the model's own."""
    model, prompt, n = tiny(), PROMPTS[1], 6000
    (made,) = sample_tokens(model, [prompt], n, max_tokens=2, rng=0, **how)
    pairs = np.array([t.ids for t in made])
    firsts = np.exp(truncate(forward(model, prompt), **how))
    joint = np.concatenate(
        [p * np.exp(truncate(forward(model, [*prompt, v]), **how)) for v, p in enumerate(firsts)]
    )
    counts = np.bincount(pairs @ [VOCABULARY, 1], minlength=VOCABULARY**2)
    assert counts[joint == 0].sum() == 0
    often = joint * n >= 5
    observed = [*counts[often], counts[~often].sum()]
    expected = [*(joint[often] * n), n * joint[~often].sum()]
    keep = np.array(expected) > 0
    assert chisquare(np.array(observed)[keep], np.array(expected)[keep]).pvalue > 1e-4
    own = forward(model, prompt)[pairs[:, 0]]
    np.testing.assert_allclose([t.logprobs[0] for t in made], own, atol=1e-9)


def test_greedy_follows_the_largest_and_generate() -> None:
    model = tiny()
    made = sample_tokens(model, PROMPTS, 2, max_tokens=7, temperature=0, end=[0])
    for prompt, (one, other) in zip(PROMPTS, made, strict=True):
        same(one, other)
        ids = list(prompt)
        while len(ids) - len(prompt) < 7 and ids[len(prompt) :][-1:] != [0]:
            ids.append(int(forward(model, ids).argmax()))
        assert one.ids.tolist() == ids[len(prompt) :]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=7, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == one.ids.tolist()


def test_rows_end_at_an_end_token_or_where_they_are_told_to() -> None:
    model = tiny()
    ended = sample_tokens(model, PROMPTS, 20, max_tokens=12, end=[0, 3], rng=2)
    free = sample_tokens(model, PROMPTS, 20, max_tokens=12, rng=2)
    for one, whole in zip(sum_of(ended), sum_of(free), strict=True):
        stops = np.flatnonzero(np.isin(whole.ids, [0, 3]))
        length = stops[0] + 1 if len(stops) else 12
        assert one.ids.tolist() == whole.ids[:length].tolist()  # the same up to there
        assert one.finished == bool(len(stops))
        assert not whole.finished
        assert len(whole.ids) == len(whole.logprobs) == 12
    told: list[int] = []

    def twice(rows: Sequence[Sequence[int]]) -> list[bool]:
        told.append(len(rows))
        return [list(row[-2:]) == [5, 5] for row in rows]

    made = sample_tokens(model, PROMPTS, 20, max_tokens=12, ended=twice, rng=2)
    for one, whole in zip(sum_of(made), sum_of(free), strict=True):
        ids = whole.ids
        pairs = np.flatnonzero((ids[1:] == 5) & (ids[:-1] == 5))
        assert one.ids.tolist() == ids[: pairs[0] + 2 if len(pairs) else 12].tolist()
        assert one.finished == bool(len(pairs))
    assert told[0] == 80
    assert told == sorted(told, reverse=True)
    assert told[-1] < 80  # only the rows that go on are asked about


def sum_of(made: list[list[Tokens]]) -> list[Tokens]:
    return [sample for samples in made for sample in samples]


def test_progress_ends_with_all_rows() -> None:
    seen: list[tuple[int, int]] = []
    sample_tokens(tiny(), PROMPTS, 2, max_tokens=5, end=[0], rng=0,
                  progress=lambda done, rows: seen.append((done, rows)))  # fmt: skip
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_half_precision_is_sampled_from_its_own_probabilities() -> None:
    """A bfloat16 model of 5,000 tokens: its log-probabilities still sum to one in float64."""
    model = tiny(vocabulary=5000).bfloat16()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1].double()
    want = torch.log_softmax(logits, -1)
    (made,) = sample_tokens(model, [[1, 2, 3]], 5, max_tokens=1, rng=0)
    for sample in made:
        assert sample.logprobs[0] == pytest.approx(float(want[sample.ids[0]]), abs=1e-9)


def test_edges_and_bad_input() -> None:
    model = tiny()
    assert sample_tokens(model, [], 3, max_tokens=2) == []
    assert token_logprobs(model, [1, 2], []).shape == (0,)
    for options, message in [
        ({"n": 0}, "n: got 0"), ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"prompts": [[1], []]}, "prompts: got an empty one"), ({"top_p": 0}, "top_p: got 0"),
        ({"temperature": -1}, "temperature: got -1"),
    ]:  # fmt: skip
        given: dict[str, Any] = {"prompts": PROMPTS, "n": 1, "max_tokens": 2, **options}
        with pytest.raises(InputError, match=f"^{message}"):
            sample_tokens(model, **given)
    with pytest.raises(InputError, match=r"^prompt: got no tokens"):
        token_logprobs(model, [], [1])
    with torch.no_grad():
        model.lm_head.weight[2] = float("nan")
    with pytest.raises(InputError, match=r"^logits: got NaN"):
        sample_tokens(model, PROMPTS, 1, max_tokens=2)


def test_on_a_gpu_too() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model = tiny()
    want = sample_tokens(model, PROMPTS, 4, max_tokens=8, end=[0], rng=5)
    got = sample_tokens(model.cuda(), PROMPTS, 4, max_tokens=8, end=[0], rng=5)
    for one, other in zip(sum_of(want), sum_of(got), strict=True):
        same(one, other, rtol=1e-4)  # the network's own float32
