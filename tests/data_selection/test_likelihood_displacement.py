"""CHES and its company against closed forms, automatic differentiation and what must not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scoredraw.data_selection.likelihood_displacement import (
    ches_score,
    dpo_loss,
    edit_distance_score,
    filter_by_score,
    ipo_loss,
    last_hidden_similarity,
    likelihood_derivative,
    predicting_mask,
    shift_completion_mask,
)
from scoredraw.errors import InputError

seeds = st.integers(0, 2**32 - 1)
SCORES = (
    ches_score,
    lambda *pair: ches_score(*pair, normalize=True),
    last_hidden_similarity,
)


def pair_of(seed: int, rows: int = 3, width: int = 9, dim: int = 4) -> tuple[Tensor, ...]:
    """Random states of two responses and their masks, one run of marks a row."""
    random = torch.Generator().manual_seed(seed)
    states = [
        torch.randn(rows, w, dim, generator=random, dtype=torch.float64) for w in (width, width - 2)
    ]
    masks = []
    for h in states:
        w = h.shape[1]
        start = torch.randint(0, w, (rows, 1), generator=random)
        stop = start + 1 + (torch.rand(rows, 1, generator=random) * (w - start)).long()
        column = torch.arange(w)
        masks.append((column >= start) & (column < stop))
    return states[0], states[1], masks[0], masks[1]


# ── The scores ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=40)
@given(seeds)
def test_scores_are_their_formulas(seed: int) -> None:
    h, g, a, b = pair_of(seed)
    for i in range(len(h)):
        x, y = h[i][a[i]], g[i][b[i]]
        plus, minus = x.sum(0), y.sum(0)
        want = float(plus @ minus - plus @ plus)
        mean = float(plus @ minus / (len(x) * len(y)) - plus @ plus / len(x) ** 2)
        row = (h[i : i + 1], g[i : i + 1], a[i : i + 1], b[i : i + 1])  # so a batch is its loop
        assert ches_score(h, g, a, b)[i].item() == pytest.approx(want, abs=1e-12)
        assert ches_score(*row).item() == pytest.approx(want, abs=1e-12)
        assert ches_score(*row, normalize=True).item() == pytest.approx(mean, abs=1e-12)
        assert last_hidden_similarity(h, g, a, b)[i].item() == pytest.approx(float(x[-1] @ y[-1]))
        bound = plus.norm() * (minus.norm() - plus.norm())  # Cauchy and Schwarz
        assert ches_score(*row).item() <= bound.item() + 1e-12


@pytest.mark.property
@settings(max_examples=40)
@given(seeds, st.floats(0.1, 10))
def test_laws(seed: int, scale: float) -> None:
    h, g, a, b = pair_of(seed)
    for normalize in (False, True):
        score = ches_score(h, g, a, b, normalize=normalize)
        scaled = ches_score(scale * h, scale * g, a, b, normalize=normalize)
        torch.testing.assert_close(scaled, scale**2 * score)
        assert ches_score(h, h, a, a, normalize=normalize).tolist() == [0.0] * len(h)
        shuffled = h.clone()
        for i, mask in enumerate(a):
            where = mask.nonzero()[:, 0]
            shuffled[i, where] = h[i, where.flip(0)]
        torch.testing.assert_close(ches_score(shuffled, g, a, b, normalize=normalize), score)


@pytest.mark.property
@settings(max_examples=40)
@given(seeds, st.integers(0, 3), st.integers(0, 3))
def test_what_is_not_marked_does_not_matter(seed: int, left: int, right: int) -> None:
    """Padding on either side, more prompt, garbage: the same sums, to the last bit but order."""
    h, g, a, b = pair_of(seed)
    wide = torch.full((len(h), left + h.shape[1] + right, h.shape[2]), torch.nan).double()
    mask = torch.zeros(wide.shape[:2], dtype=torch.bool)
    inside = slice(left, left + h.shape[1])
    wide[:, inside] = torch.where(a[..., None], h, torch.inf)
    mask[:, inside] = a
    for score in SCORES:
        torch.testing.assert_close(score(wide, g, mask, b), score(h, g, a, b))  # type: ignore[operator]


@pytest.mark.oracle
def test_the_two_responses_do_not_play_the_same_part() -> None:
    h, g, a, b = pair_of(0)
    assert not torch.allclose(ches_score(h, g, a, b), ches_score(g, h, b, a))


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a running sum of ones stands still at 256."""
    h = torch.ones(1, 3000, 2, dtype=dtype)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    short = mask & (torch.arange(3000) < 1000)
    score = ches_score(h, h, mask, short)
    assert score.dtype == torch.float32
    assert score.item() == 2 * (3000 * 1000 - 3000**2)


# ── Masks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(st.data())
def test_masks_by_hand(data: st.DataObject) -> None:
    prompt, response = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    has, counted = data.draw(st.booleans()), data.draw(st.booleans())
    real = [0] * left + [1] * (prompt + response + has) + [0] * right
    first = left + prompt - 1
    want = [first <= k < first + response + counted for k in range(len(real))]
    mask = predicting_mask(torch.tensor([real]), [prompt], has_eos=has, include_eos=counted)
    assert mask[0].tolist() == want


@pytest.mark.oracle
def test_both_released_programs_pick_the_same_states_on_either_side() -> None:
    """With the end token in the sequence or only predicted; a row each, flags of its own too."""
    ends = predicting_mask(torch.tensor([[0, 0, 1, 1, 1, 1]]), [2], padding_side="left")
    without = predicting_mask(torch.tensor([[0, 0, 1, 1, 1, 0]]), [2], has_eos=False)
    assert ends.tolist() == without.tolist()
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    mask = predicting_mask(right, [2, 2], padding_side="right", has_eos=torch.tensor([True, False]))
    assert mask.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]


@pytest.mark.oracle
def test_right_padding_gives_what_left_padding_gives() -> None:
    """The released batch function drops the last column and sums everything after the prompt."""
    random = torch.Generator().manual_seed(0)
    lengths, prompts, states = (7, 5, 6), torch.tensor([3, 1, 4]), []
    for length in lengths:
        states.append(torch.randn(length, 4, generator=random))
    scores = []
    for side in ("left", "right"):
        h, real = torch.full((3, 7, 4), 1e3), torch.zeros(3, 7)
        for i, (row, n) in enumerate(zip(states, lengths, strict=True)):
            where = slice(7 - n, 7) if side == "left" else slice(0, n)
            h[i, where], real[i, where] = row, 1
        mask = predicting_mask(real, prompts, padding_side=side)  # type: ignore[arg-type]
        scores.append(ches_score(h, h.flip(2), mask, mask, normalize=True))
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.oracle
def test_completion_masks_move_left_by_one() -> None:
    real = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    tokens = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    want = predicting_mask(real, [2, 1])
    assert shift_completion_mask(tokens, real).tolist() == want.tolist()


# ── The baseline that compares tokens ────────────────────────────────────────────────────────────


def plain_levenshtein(a: Sequence[int], b: Sequence[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        above, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


ids = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@pytest.mark.property
@settings(max_examples=60)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.sampled_from([1, 30, 10**6]))
def test_edit_distance(pairs: list[tuple[list[int], list[int]]], cells: int) -> None:
    chosen, rejected = zip(*pairs, strict=True)
    want = [-plain_levenshtein(a, b) / max(len(a), len(b)) for a, b in pairs]
    with pytest.MonkeyPatch.context() as patch:
        name = "scoredraw.data_selection.likelihood_displacement._BLOCK_CELLS"
        patch.setattr(name, cells)  # blocks of one pair, of a few, of all
        assert edit_distance_score(chosen, rejected).tolist() == want
        assert edit_distance_score(rejected, chosen).tolist() == want


@pytest.mark.oracle
def test_edit_distance_of_nothing_is_empty() -> None:
    assert edit_distance_score([], []).shape == (0,)


# ── The law ──────────────────────────────────────────────────────────────────────────────────────


def features(seed: int, shared: int, plus: int = 4, minus: int = 5) -> tuple[Tensor, ...]:
    """W, states and tokens of two responses that agree on their first `shared - 1` tokens."""
    random = torch.Generator().manual_seed(seed)
    draw = {"generator": random, "dtype": torch.float64}
    unembedding = torch.randn(7, 3, **draw)  # type: ignore[call-overload]
    h, g = torch.randn(plus, 3, **draw), torch.randn(minus, 3, **draw)  # type: ignore[call-overload]
    y, z = (torch.randint(0, 7, (n,), generator=random) for n in (plus, minus))
    g[:shared] = h[:shared]
    z[: shared - 1] = y[: shared - 1]
    if shared <= min(plus, minus):
        z[shared - 1] = (y[shared - 1] + 1) % 7
    return unembedding, h, g, y, z


def log_likelihood(unembedding: Tensor, h: Tensor, tokens: Tensor) -> Tensor:
    logps = (h @ unembedding.T).log_softmax(-1)
    return logps[torch.arange(len(tokens)), tokens].sum()


def flow(law: tuple[Tensor, ...], shared: int, beta: float, margin: float, move: bool) -> float:
    """d ln pi(y+) / dt by automatic differentiation; a shared context is one variable."""
    unembedding, h, g, y, z = (t.clone() for t in law)
    weights = [unembedding.requires_grad_(), h.requires_grad_(), g[shared:].requires_grad_()]
    plus = log_likelihood(weights[0], weights[1], y)
    other = torch.cat([weights[1][:shared], weights[2]])
    minus = log_likelihood(weights[0], other, z)
    loss = dpo_loss(plus, minus, (plus - minus).detach() - margin, beta=beta)
    used = weights if move else weights[:1]
    down = torch.autograd.grad(loss, used, retain_graph=True)
    up = torch.autograd.grad(plus, used, allow_unused=True)
    moved = [-(a * b).sum() for a, b in zip(down, up, strict=True) if b is not None]
    return float(sum(moved))


@pytest.mark.oracle
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("beta", "margin"), [(0.1, 0.0), (0.5, 1.5)])
@pytest.mark.parametrize("move", [True, False])
def test_the_law_is_the_gradient_flow(shared: int, beta: float, margin: float, move: bool) -> None:
    for seed in range(5):
        law = features(seed, shared)
        ours = likelihood_derivative(*law, beta=beta, margin=margin, train_hidden=move)
        assert ours.rate.item() == pytest.approx(flow(law, shared, beta, margin, move), rel=1e-9)


@pytest.mark.oracle
def test_a_small_step_moves_as_far_as_the_law_says() -> None:
    unembedding, h, g, y, z = features(3, 1)
    before, step = log_likelihood(unembedding, h, y), 1e-6
    weight = unembedding.clone().requires_grad_()
    loss = dpo_loss(log_likelihood(weight, h, y), log_likelihood(weight, g, z), 0.0)
    (slope,) = torch.autograd.grad(loss, weight)
    after = log_likelihood(unembedding - step * slope, h, y)
    margin = float(before - log_likelihood(unembedding, g, z))
    law = likelihood_derivative(unembedding, h, g, y, z, margin=margin, train_hidden=False)
    assert float(after - before) / step == pytest.approx(law.rate.item(), rel=1e-4)


@pytest.mark.oracle
def test_one_token_responses_have_a_closed_form() -> None:
    """hid = <W+ - E W, W+ - W->; and token z gains logit in proportion to <W_z, W+ - W->."""
    unembedding, h, g, y, z = features(1, 1, 1, 1)
    plus, minus = unembedding[y[0]], unembedding[z[0]]
    mean = (h[0] @ unembedding.T).softmax(0) @ unembedding
    law = likelihood_derivative(unembedding, h, g, y, z)
    assert law.hidden_term.item() == pytest.approx(float((plus - mean) @ (plus - minus)), rel=1e-12)
    context = h[0].clone().requires_grad_()
    logps = (context @ unembedding.T).log_softmax(0)
    (slope,) = torch.autograd.grad(dpo_loss(logps[y[0]], logps[z[0]], 0.0), context)
    drift = -(unembedding @ slope)
    gain = unembedding @ (plus - minus)
    assert np.corrcoef(drift.detach(), gain)[0, 1] == pytest.approx(1)


@pytest.mark.oracle
def test_with_all_products_one_the_law_is_minus_ches() -> None:
    _, h, g, _, _ = features(2, 1)
    masks = [torch.ones(1, len(x), dtype=torch.bool) for x in (h, g)]
    bracket = (h @ h.T).sum() - (h @ g.T).sum()
    assert ches_score(h[None], g[None], masks[0], masks[1]).item() == pytest.approx(-bracket.item())


@pytest.mark.oracle
def test_a_batch_of_laws_is_the_laws_of_its_rows() -> None:
    unembedding = features(0, 1)[0]
    rows = [features(seed, shared)[1:] for seed, shared in ((1, 1), (2, 3), (3, 4))]
    batch = likelihood_derivative(unembedding, *(torch.stack(part) for part in zip(*rows)))  # noqa: B905
    for i, row in enumerate(rows):
        for ours, want in zip(batch, likelihood_derivative(unembedding, *row), strict=True):
            torch.testing.assert_close(ours[i], want)


# ── Losses ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_losses() -> None:
    chosen, rejected = torch.tensor([-2.0, -1.0]), torch.tensor([-2.5, -4.0])
    r = (chosen - rejected).numpy()
    want = np.log1p(np.exp(-0.1 * (r - 0.25)))
    np.testing.assert_allclose(dpo_loss(chosen, rejected, 0.25).numpy(), want, rtol=1e-6)
    want = (r - 0.25 - 5) ** 2
    np.testing.assert_allclose(ipo_loss(chosen, rejected, 0.25).numpy(), want, rtol=1e-6)


# ── Filtering ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=100)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_a_window_has_exactly_as_many_as_asked(scores: list[int], data: st.DataObject) -> None:
    n = len(scores)
    k, q = data.draw(st.integers(1, n)), data.draw(st.floats(0, 1))
    order = sorted(range(n), key=lambda i: scores[i])  # Python's sort is stable
    for which, want in (("lowest", order[:k]), ("highest", order[n - k :])):
        draw = filter_by_score(scores, k, which=which)  # type: ignore[arg-type]
        assert draw.indices.tolist() == sorted(want)
        assert draw.scores is not None
        assert draw.scores.tolist() == [scores[i] for i in sorted(want)]
    window = filter_by_score(scores, k, which=q).indices.tolist()
    start = min(max(round(q * (n - 1)) - k // 2, 0), n - k)
    assert window == sorted(order[start : start + k])
    assert len(window) == k


@pytest.mark.oracle
def test_the_papers_share() -> None:
    """5 % of 385 pairs are 19; a share of one is all, a count of one is one."""
    scores = np.random.default_rng(0).normal(size=385)
    assert len(filter_by_score(scores)) == 19
    assert len(filter_by_score(scores, 1.0)) == 385
    assert filter_by_score(scores, 1).indices.tolist() == [scores.argmin()]


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────

H, M = torch.zeros(2, 4, 3), torch.tensor([[False, True, True, False]] * 2)
BROKEN, NONE = torch.tensor([[True, False, True, False]] * 2), torch.zeros(2, 4, dtype=torch.bool)
NAN = H.clone()
NAN[1, 2, 0] = torch.nan
META = torch.zeros(2, 4, 3, device="meta")


@pytest.mark.contract
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((H, H, M, NONE), "rejected_mask: got nothing marked in examples 0, 1"),
        ((H, H, BROKEN, M), "chosen_mask: got marks that are not contiguous in examples 0, 1"),
        ((NAN, H, M, M), "chosen_hidden: got NaN or infinity at a marked position in example 1"),
        ((H, H[:1], M, M[:1]), "rejected_hidden: got shape"),
        ((H, H[..., :2], M, M), "rejected_hidden: got shape"),
        ((H, H, M[:, :3], M), "chosen_mask: got a torch.bool tensor"),
        ((H, H, M.int(), M), "chosen_mask: got a torch.int32 tensor"),
        ((H.long(), H, M, M), "chosen_hidden: got a torch.int64 tensor"),
        ((H[0], H, M, M), "chosen_hidden: got a torch.float32 tensor"),
        ((H, META, M, M), "rejected: got .*, want one device"),
    ],
)
def test_bad_states(score: Any, pair: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(*pair)


ONES = torch.ones(2, 4)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES, [2, 0]), {}, "prompt_lengths: got no prompt token in example 1"),
        ((ONES, [2, 4]), {}, "prompt_lengths: got an empty response in example 1"),
        ((ONES, [3, 1]), {"include_eos": False}, "an empty response in example 0"),
        ((ONES, [4, 1]), {"has_eos": False}, "an empty response in example 0"),
        ((ONES, [1]), {}, "prompt_lengths: got shape"),
        ((ONES[0], [1]), {}, "attention_mask: got 1 axes"),
        ((2 * ONES, [1, 1]), {}, "attention_mask: got other values"),
        ((torch.tensor([[1, 0, 1, 1]]), [1]), {}, "attention_mask: got marks that are not"),
        ((torch.tensor([[0, 1, 1, 1]]), [1]), {"padding_side": "right"}, "on the other side than"),
        ((torch.tensor([[1, 1, 1, 0]]), [1]), {"padding_side": "left"}, "on the other side than"),
        ((ONES, [1, 1]), {"padding_side": "up"}, "padding_side: got 'up'"),
    ],
)
def test_bad_masks(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predicting_mask(*arguments, **options)


@pytest.mark.contract
def test_bad_completions() -> None:
    for mask, message in (
        ([[0, 0, 0]], "nothing marked"),
        ([[1, 1, 0]], "no prompt token"),
        ([[0, 1, 0, 1]], "not contiguous"),
    ):
        with pytest.raises(InputError, match=message):
            shift_completion_mask(torch.tensor(mask))
    with pytest.raises(InputError, match="no prompt token"):  # only padding comes before
        shift_completion_mask(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 1]]))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filter_by_score([1.0, np.nan]), "scores: got NaN"),
        (lambda: filter_by_score([]), "scores: got shape"),
        (lambda: filter_by_score([1.0], 2), "keep: got 2: 2 of 1 pairs"),
        (lambda: filter_by_score([1.0], 0), "keep: got 0"),
        (lambda: filter_by_score([1.0] * 9, 0.05), "keep: got 0.05: 0 of 9"),
        (lambda: filter_by_score([1.0], 1.5), "keep: got 1.5"),
        (lambda: filter_by_score([1.0], True), "keep: got True"),
        (lambda: filter_by_score([1.0], 1, which=1.5), "which: got 1.5"),
        (lambda: filter_by_score([1.0], 1, which="middle"), "which: got 'middle'"),  # type: ignore[arg-type]
        (lambda: edit_distance_score([[1], []], [[1], [2]]), "chosen_ids: got an empty .* 1"),
        (lambda: edit_distance_score([[1]], []), "rejected_ids: got 0 sequences"),
        (lambda: dpo_loss(H, H, 0.0, beta=0.0), "beta: got 0.0"),
        (lambda: ipo_loss(H, H, 0.0, beta=-1.0), "beta: got -1.0"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.contract
def test_bad_laws() -> None:
    unembedding, h, g, y, z = features(0, 2)
    for arguments, message in (
        ((unembedding, h, g, y + 7, z), "chosen_tokens: got ids out of range"),
        ((unembedding, h[:3], g, y, z), "chosen_hidden: got shape"),
        ((unembedding, h, g[None], y, z[None]), "rejected_tokens: got other batch axes"),
        ((unembedding, h, g + 1, y, z), "rejected_hidden: got another vector"),
    ):
        with pytest.raises(InputError, match=message):
            likelihood_derivative(*arguments)
    with pytest.raises(InputError, match="beta: got 0"):
        likelihood_derivative(unembedding, h, g, y, z, beta=0)
