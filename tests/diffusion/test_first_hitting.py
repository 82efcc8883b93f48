"""First-hitting sampling: its times, its law, fewer calls, higher order, and models of others."""

from __future__ import annotations

from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

torch = pytest.importorskip("torch")

from scoredraw.diffusion.first_hitting import (  # noqa: E402
    METHODS,
    FirstHittingSampler,
    ancestral_law,
    first_hitting_law,
    generate_tokens,
    hitting_times,
    masked_sampler,
)
from scoredraw.diffusion.mask_schedules import LinearMasking, mask_schedule  # noqa: E402
from scoredraw.diffusion.masked_diffusion import (  # noqa: E402
    AncestralSampler,
    masked_language_model,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

MASK, V, L = 3, 4, 3
TABLE = torch.from_numpy(2 * np.random.default_rng(0).normal(size=(V,) * L + (L, V)))


def network(x: Any) -> Any:
    """Three tokens and a mask; every state has laws of its own."""
    return TABLE[tuple(x.T)]


def masks(rows: int, length: int = L) -> Any:
    return torch.full((rows, length), MASK)


def counts(tokens: Any) -> np.ndarray:
    found = np.zeros((V,) * L)
    np.add.at(found, tuple(tokens.numpy().T), 1)
    return found


# ── times ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", LinearMasking(1e-3)])
def test_masked_shares_at_the_hits_are_sorted_uniforms(schedule: Any) -> None:
    """KS of 20,000 hits, E[m] = (n + 1)/(L + 1) within 4.5 errors: false alarm 1e-3 each."""
    clock = mask_schedule(schedule)
    made = FirstHittingSampler(schedule).sample(
        lambda x: torch.zeros(*x.shape, V), masks(2000, 10), MASK, rng=0
    )
    top = clock.masked(1.0)
    levels = clock.masked(made.times) / top
    assert kstest(levels.ravel(), "uniform").pvalue > 1e-3
    assert kstest(levels[:, 0], "uniform").pvalue > 1e-3  # of one position too
    ordered = -np.sort(-levels, axis=1)
    want = np.arange(10, 0, -1) / 11
    error = ordered.std(axis=0, ddof=1) / np.sqrt(2000)
    assert (abs(ordered.mean(axis=0) - want) < 4.5 * error).all()


def test_ancestral_steps_hit_when_first_hitting_does() -> None:
    """The step of an ancestral run that a hitting time falls in: the same counts, χ², 1e-3."""
    hits = FirstHittingSampler("cosine").sample(network, masks(20_000), MASK, rng=0).times
    steps = AncestralSampler(16, "cosine").sample(network, masks(20_000), MASK, rng=1).order
    found = [np.bincount(x.ravel(), minlength=16) for x in ((16 * (1 - hits)).astype(int), steps)]
    both = np.array(found)
    assert chisquare(both[0], both.mean(axis=0) * 1.0).statistic * 2 < 45.0  # χ²(15) at 1e-4


def test_hitting_times_of_ragged_rows_and_of_zero() -> None:
    u = np.random.default_rng(0).random((2, 4))
    some = hitting_times(u, masked=[4, 2])
    np.testing.assert_allclose(some[0], hitting_times(u[0]))
    np.testing.assert_allclose(some[1, :2], hitting_times(u[1, :2]))
    assert (some[1, 2:] == 0).all()
    zero = hitting_times([0.0, 0.5], "cosine")
    assert np.isfinite(zero).all()
    assert (np.diff(zero) <= 0).all()
    assert hitting_times([0.5], start=0.5).tolist() == [0.25]
    late = hitting_times(np.full(3, 1e-9), "geometric")  # below m(0) there is no time but 0
    assert late.min() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hitting_times([1.0]), "uniforms: got numbers outside"),
        (lambda: hitting_times([np.nan]), "uniforms"),
        (lambda: hitting_times([0.5], start=0.0), "start: got 0.0"),
        (lambda: hitting_times([0.5], masked=2), "masked: got 2, want <= 1"),
        (lambda: FirstHittingSampler(order=3), "order: got 3"),
        (lambda: FirstHittingSampler(clock="sun"), "clock: got 'sun'"),
        (lambda: FirstHittingSampler(corrector=True), "corrector: got True, want order 2"),
        (lambda: FirstHittingSampler(temperature=-0.1), "temperature: got -0.1"),
        (lambda: masked_sampler("euler"), "method: got 'euler'"),
        (lambda: masked_sampler("ancestral", 4, order=2), "order: got 2, want 1 for ancestral"),
        (lambda: masked_sampler("random-order", corrector=True), "corrector: got True, want False"),
        (lambda: masked_sampler("ancestral"), "steps: got None, want a count, for ancestral"),
        (lambda: first_hitting_law(lambda x: torch.zeros(*x.shape, V), L, 9), "mask_id: got 9"),
        (lambda: first_hitting_law(lambda x: torch.zeros(*x.shape, 9), 4, 3), "6561|9.4 states"),
        (lambda: ancestral_law(network, L, MASK, 0), "steps: got 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ── law: χ² of 50,000 draws in 27 classes, p > 1e-3 ─────────────────────────────────────────────


@pytest.mark.parametrize(
    "sampler",
    [
        FirstHittingSampler(),
        FirstHittingSampler("cosine", L),
        FirstHittingSampler(steps=100),  # more than there are masks
        FirstHittingSampler(order=2),  # of either clock
        FirstHittingSampler(steps=L, order=2, clock="count"),
    ],
)
def test_one_call_a_token_is_exact(sampler: FirstHittingSampler) -> None:
    law = first_hitting_law(network, L, MASK)
    made = sampler.sample(network, masks(50_000), MASK, rng=4)
    found = counts(made.tokens)
    assert found[law == 0].sum() == 0
    assert chisquare(found[law > 0], 50_000 * law[law > 0]).pvalue > 1e-3
    assert made.nfe == L


def test_it_is_the_limit_of_ancestral_sampling_at_rate_one_over_n() -> None:
    limit = first_hitting_law(network, L, MASK)
    assert limit.sum() == pytest.approx(1)
    steps = np.array([16, 32, 64, 128])
    distance = [abs(ancestral_law(network, L, MASK, n) - limit).sum() / 2 for n in steps]
    slope = np.polyfit(np.log(steps[1:]), np.log(distance[1:]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.03)
    cosine = ancestral_law(network, L, MASK, 128, "cosine")
    assert abs(cosine - limit).sum() / 2 < 0.01  # whatever the schedule


def test_one_call_for_all_is_the_product_of_its_marginals() -> None:
    p = TABLE[MASK, MASK, MASK].clone()
    p[:, MASK] = -torch.inf
    a, b, c = p.softmax(-1).numpy()
    law = a[:, None, None] * b[:, None] * c
    for sampler in (FirstHittingSampler(steps=1), FirstHittingSampler(steps=1, order=2)):
        made = sampler.sample(network, masks(50_000), MASK, rng=4)
        assert made.nfe == 1
        assert chisquare(counts(made.tokens)[law > 0], 50_000 * law[law > 0]).pvalue > 1e-3


def test_groups_are_even_and_places_uniform() -> None:
    x = masks(3000, 10)
    x[:, 9] = 0
    x[0, :7] = 1
    made = FirstHittingSampler(steps=4).sample(lambda x: torch.zeros(*x.shape, V), x, MASK, rng=0)
    sizes = (made.order[1:, :, None] == np.arange(4)).sum(axis=1)
    assert ((sizes == 2) | (sizes == 3)).all()
    assert sorted(made.order[0][7:].tolist()) == [-1, 0, 1]  # two masks, two of the four calls
    first = np.bincount(np.nanargmax(made.times[1:], axis=1), minlength=9)
    assert chisquare(first).pvalue > 1e-3
    assert made.nfe == 4
    for row in range(1, 50):  # the times fall from group to group
        shown = made.order[row] >= 0
        times = made.times[row][shown][np.argsort(made.order[row][shown], kind="stable")]
        groups = np.sort(made.order[row][shown])
        assert all(times[groups == g].min() > times[groups == g + 1].max() for g in range(3))


# ── order 2 ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("clock", ["time", "count"])
def test_order_two_is_order_one_where_the_predictions_do_not_change(clock: str) -> None:
    same = torch.randn(12, V, generator=torch.Generator().manual_seed(0))
    runs = [
        FirstHittingSampler(steps=4, order=order, clock=clock).sample(
            lambda x: same.expand(len(x), 12, V), masks(50, 12), MASK, rng=0
        )
        for order in (1, 2)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    np.testing.assert_array_equal(runs[0].times, runs[1].times)


@pytest.mark.parametrize("clock", ["time", "count"])
def test_order_two_draws_from_the_line_through_the_last_two_predictions(clock: str) -> None:
    """A network whose p is linear in the clock, p_0 = 0.1 + 0.8 (masked share): met without error.

    The time of a call is that of the last hit, so a network that reads the clock off the masks
    stands for both clocks here; token 0 is counted at its place in the order, χ² at 1e-3.
    """
    size, rows = 6, 40_000

    def linear(x: Any) -> Any:
        share = (x == MASK).double().mean(dim=1)[:, None, None]
        p = torch.cat([0.1 + 0.8 * share, 0.9 - 0.8 * share, 0 * share, 0 * share], dim=-1)
        return p.log().expand(-1, size, V)

    sampler = FirstHittingSampler(steps=2, order=2, clock=clock)
    made = sampler.sample(linear, masks(rows, size), MASK, rng=0)
    rank = np.argsort(np.argsort(-made.times, axis=1), axis=1)
    second = rank >= 3
    start = np.ones((rows, 1)), -np.sort(-made.times, axis=1)[:, 2:3]
    if clock == "count":
        masked = size - rank
        want = 0.1 + 0.8 * masked / size
    else:
        share = (made.times - start[1]) / (start[1] - start[0])
        want = np.clip(0.5 + share * (0.5 - 0.9), 0.0, 1.0)
    hit = (made.tokens.numpy() == 0)[second]
    p = want[second]
    z = (hit.sum() - p.sum()) / np.sqrt((p * (1 - p)).sum())
    assert abs(z) < 3.3
    for low, high in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6)):
        part = (p >= low) & (p < high)
        if part.any() and (spread := np.sqrt((p[part] * (1 - p[part])).sum())) > 0:
            assert abs(hit[part].sum() - p[part].sum()) < 3.5 * spread


def test_the_corrector_draws_a_group_again_from_both_predictions() -> None:
    """Two groups of two, all states enumerated: χ² of 50,000 draws in 81 classes, p > 1e-3.

    Groups are {i, j} and the rest, as likely each. Those drawn first are drawn again from the mean
    of the predictions before and after them; the others come from the call after, which saw the
    first draws, and are corrected by one more.
    """
    size, T = 4, MASK
    table = np.random.default_rng(3).dirichlet(np.ones(T), (V,) * size + (size,))

    def predicts(x: Any) -> Any:
        p = torch.from_numpy(table)[tuple(x.T)]
        return torch.cat([p, torch.zeros_like(p[..., :1])], dim=-1).log()

    want = np.zeros((T,) * size)
    for pair in combinations(range(size), 2):
        rest = [i for i in range(size) if i not in pair]
        first = table[(T,) * size]
        for drawn in product(range(T), repeat=2):  # before the first correction
            x = np.full(size, T)
            x[list(pair)] = drawn
            seen = table[tuple(x)]
            chance = np.prod([first[i, a] for i, a in zip(pair, drawn, strict=True)]) / 6
            for kept in product(range(T), repeat=2):
                mean = [(first[i, a] + seen[i, a]) / 2 for i, a in zip(pair, kept, strict=True)]
                for others in product(range(T), repeat=2):
                    x[list(pair)], x[rest] = kept, others
                    last = table[tuple(x)]
                    p = chance * np.prod(mean)
                    p *= np.prod([seen[i, a] for i, a in zip(rest, others, strict=True)])
                    for end in product(range(T), repeat=2):
                        x[rest] = end
                        both = [
                            (seen[i, a] + last[i, a]) / 2 for i, a in zip(rest, end, strict=True)
                        ]
                        want[tuple(x)] += p * np.prod(both)
    assert want.sum() == pytest.approx(1)
    sampler = FirstHittingSampler(steps=2, order=2, corrector=True)
    made = sampler.sample(predicts, masks(50_000, size), MASK, rng=0)
    assert (made.nfe, made.draws) == (3, 50_000 * 2 * size)
    found = np.zeros_like(want)
    np.add.at(found, tuple(made.tokens.numpy().T), 1)
    assert chisquare(found.ravel(), 50_000 * want.ravel()).pvalue > 1e-3


def test_the_corrector_leaves_rows_alone_that_have_a_call_for_each_mask() -> None:
    x = masks(40, L)
    x[::2, 0] = 1  # two masks, two calls: exact
    plain = FirstHittingSampler(steps=2).sample(network, x, MASK, rng=0)
    made = FirstHittingSampler(steps=2, order=2, corrector=True).sample(network, x, MASK, rng=0)
    assert torch.equal(made.tokens[::2], plain.tokens[::2])
    assert not torch.equal(made.tokens, plain.tokens)
    exact = FirstHittingSampler(order=2, corrector=True).sample(network, masks(40), MASK, rng=0)
    assert torch.equal(
        exact.tokens, FirstHittingSampler().sample(network, masks(40), MASK, rng=0).tokens
    )
    assert exact.nfe == L


# ── models of transformers ──────────────────────────────────────────────────────────────────────


def tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "bert":
        config = transformers.BertConfig(**sizes, initializer_range=0.5)
    else:
        special = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id"), 1)
        config = transformers.ModernBertConfig(**sizes, **special, eos_token_id=1)
    return transformers.AutoModelForMaskedLM.from_config(config).eval()


@pytest.mark.contract
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_masked_models_of_transformers(kind: str) -> None:
    model = tiny(kind)
    prompts = [[5, 6, 7], [8, 39, 9, 10, 11], [12]]
    for method in METHODS:
        found = generate_tokens(
            model, prompts, 6, n=2, mask_id=39, method=method, steps=4, batch_size=4, rng=0
        )
        assert [len(texts) for texts in found] == [2, 2, 2]
        for prompt, texts in zip(prompts, found, strict=True):
            for ids in texts:
                assert len(ids) == len(prompt) + 6
                assert 39 not in ids
                given = np.array(prompt) != 39
                assert (ids[: len(prompt)][given] == np.array(prompt)[given]).all()
        again = generate_tokens(
            model, prompts, 6, n=2, mask_id=39, method=method, steps=4, batch_size=64, rng=0
        )
        for one, other in zip(chain(*found), chain(*again), strict=True):
            np.testing.assert_array_equal(one, other)  # whatever batch it came in


@pytest.mark.contract
def test_padding_is_hidden_and_draws_are_the_models() -> None:
    """One mask: the law of the token is the model's own, whatever stands beside it; χ² at 1e-3."""
    model = tiny("bert")
    text = [5, 39, 7, 9]
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, 1].double()
    logits[39] = -torch.inf
    p = logits.softmax(-1).numpy()
    found = generate_tokens(model, [text, [1] * 9 + [39]], n=5000, mask_id=39, rng=0)
    seen = np.bincount([ids[1] for ids in found[0]], minlength=40)
    often = 5000 * p > 5
    both = [np.append(x[often], x[~often].sum()) for x in (seen, 5000 * p)]
    assert chisquare(*both).pvalue > 1e-3
    assert all(len(ids) == 4 for ids in found[0])


@pytest.mark.contract
def test_mistakes_with_models() -> None:
    model = tiny("bert")
    with pytest.raises(InputError, match="prompts: got one without a mask"):
        generate_tokens(model, [[1, 2]], mask_id=39)
    with pytest.raises(InputError, match="pad_id: got 39"):
        generate_tokens(model, [[1, 2]], 3, mask_id=39, pad_id=39)
    with pytest.raises(InputError, match="mask_id: got 40, want a token of the model, below 40"):
        generate_tokens(model, [[1, 2]], 3, mask_id=40)
    with pytest.raises(InputError, match="model: got one in training mode"):
        masked_language_model(model.train())
    for token in (40, -1):
        with pytest.raises(InputError, match=f"prompts: got {token}, want tokens of the model"):
            generate_tokens(model.eval(), [[1, token]], 3, mask_id=39)
    assert generate_tokens(model.eval(), [], 3, mask_id=39) == []
    seen: list[tuple[int, int]] = []
    generate_tokens(
        model, [[1]], 2, n=3, mask_id=39, batch_size=2, progress=lambda *x: seen.append(x)
    )
    assert seen == [(2, 3), (3, 3)]
