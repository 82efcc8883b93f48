"""Schedules of masking, and the samplers that step along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

torch = pytest.importorskip("torch")

from scoredraw.diffusion.first_hitting import (  # noqa: E402
    FirstHittingSampler,
    ancestral_law,
    first_hitting_law,
)
from scoredraw.diffusion.mask_schedules import (  # noqa: E402
    SCHEDULES,
    CustomMasking,
    LinearMasking,
    mask_schedule,
)
from scoredraw.diffusion.masked_diffusion import (  # noqa: E402
    AncestralSampler,
    ConfidenceSampler,
    MaskedSampler,
    OrderedSampler,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

MASK, V, L = 3, 4, 3
TABLE = torch.from_numpy(2 * np.random.default_rng(0).normal(size=(V,) * L + (L, V)))
SAMPLERS: dict[str, MaskedSampler] = {
    "ancestral": AncestralSampler(40),
    "ancestral, no cache": AncestralSampler(40, cache=False),
    "ancestral race": AncestralSampler(40, noise="float64"),
    "confidence": ConfidenceSampler(5),
    "random": OrderedSampler(),
    "left-to-right": OrderedSampler("left-to-right"),
    "first-hitting": FirstHittingSampler(),
    "first-hitting, 5 calls": FirstHittingSampler("cosine", 5),
    "first-hitting, order 2": FirstHittingSampler(steps=5, order=2),
    "first-hitting, order 2 by count": FirstHittingSampler(steps=5, order=2, clock="count"),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def network(x: Any) -> Any:
    """Three tokens and a mask; every state has laws of its own."""
    return TABLE[tuple(x.T)]


def masks(rows: int, length: int = L) -> Any:
    return torch.full((rows, length), MASK)


def smooth(x: Any) -> Any:
    """A network of any length whose laws depend on the neighbours."""
    around = torch.nn.functional.pad(x, (1, 1), value=0)
    near = (around[:, :-2] + 2 * around[:, 2:])[..., None]
    return torch.sin(near * torch.arange(1.0, V + 1) + torch.arange(V))


def counts(tokens: Any) -> np.ndarray:
    found = np.zeros((V,) * L)
    np.add.at(found, tuple(tokens.numpy().T), 1)
    return found


# ── schedules ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*SCHEDULES, "mdlm", "custom"])
def test_inverse_and_slope(name: str) -> None:
    own = {"mdlm": LinearMasking(1e-3), "custom": CustomMasking(lambda t: np.cos(np.pi / 2 * t))}
    schedule = own[name] if name in own else mask_schedule(name)
    assert mask_schedule(schedule) is schedule
    t = np.linspace(0.02, 0.98, 97)
    np.testing.assert_allclose(schedule.time_of_masked(schedule.masked(t)), t, rtol=0, atol=1e-7)
    np.testing.assert_allclose(schedule.alpha(t), 1 - schedule.masked(t), atol=0)
    step = (schedule.masked(t + 1e-5) - schedule.masked(t - 1e-5)) / 2e-5
    np.testing.assert_allclose(schedule.slope(t), step, rtol=1e-6)
    assert schedule.time_of_masked([-1.0, 0.0, 1.0, 2.0]).tolist() == [0, 0, 1, 1]
    stays = schedule.masked(0.25) / schedule.masked(0.5)
    assert float(schedule.unmasking(0.5, 0.25)) == pytest.approx(1 - float(stays))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("quadratic", "schedule: got 'quadratic', want one of linear, cosine"),
        (lambda t: 1 - t + 0.2 * np.sin(9 * t), "alpha rising"),
        (lambda t: np.where(t < 0.5, 1 - t, 0.5 - np.maximum(t - 0.7, 0) / 0.6), "alpha constant"),
        (lambda t: 0.9 - 0.9 * t, r"alpha\(0\) = 0.9"),
        (lambda t: 1 - 0.99 * t, r"alpha\(1\) = 0.01, want 0 within 0.002"),
        (lambda t: np.where(t > 0.5, np.nan, 1 - t), "NaN"),
        (lambda t: 1.0, "want .1025,., as the times"),
    ],
)
def test_schedules_that_cannot_be_sampled_along(schedule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AncestralSampler(4, schedule)


@pytest.mark.parametrize(("kind", "wrong"), [
    (LinearMasking, {"eps": 1.0}), (SCHEDULES["polynomial"], {"power": 0.0}),
    (SCHEDULES["geometric"], {"sigma_min": 0.0}), (SCHEDULES["geometric"], {"sigma_max": 1e-4}),
])  # fmt: skip
def test_parameters_of_schedules(kind: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        kind(**wrong)


# ── laws: χ² with 27 classes and p > 1e-3, so one false alarm in 1,000 a line ────────────────────


@pytest.mark.parametrize(
    ("sampler", "law"),
    [
        (AncestralSampler(4), ancestral_law(network, L, MASK, 4)),
        (AncestralSampler(4, cache=False), ancestral_law(network, L, MASK, 4)),
        (AncestralSampler(4, noise="float64"), ancestral_law(network, L, MASK, 4)),
        (AncestralSampler(4, noise=53, cache=False), ancestral_law(network, L, MASK, 4)),
        (AncestralSampler(3, "cosine"), ancestral_law(network, L, MASK, 3, "cosine")),
        (AncestralSampler(1), ancestral_law(network, L, MASK, 1)),
        (OrderedSampler("random"), first_hitting_law(network, L, MASK)),
    ],
)
def test_samples_have_the_enumerated_law(sampler: MaskedSampler, law: np.ndarray) -> None:
    made = sampler.sample(network, masks(50_000), MASK, rng=1)
    found = counts(made.tokens)
    assert found[law == 0].sum() == 0
    assert chisquare(found[law > 0], 50_000 * law[law > 0]).pvalue > 1e-3


def test_left_to_right_is_the_chain_of_conditionals() -> None:
    law = np.zeros((V,) * L)
    p = TABLE.clone()
    p[..., MASK] = -torch.inf
    p = p.softmax(-1).numpy()
    for a, b, c in np.ndindex(3, 3, 3):
        law[a, b, c] = p[MASK, MASK, MASK, 0, a] * p[a, MASK, MASK, 1, b] * p[a, b, MASK, 2, c]
    made = OrderedSampler("left-to-right").sample(network, masks(50_000), MASK, rng=1)
    assert chisquare(counts(made.tokens)[law > 0], 50_000 * law[law > 0]).pvalue > 1e-3
    assert (made.order == [0, 1, 2]).all()


def test_the_step_in_which_a_token_is_shown_follows_the_schedule() -> None:
    """By the race as by one level a token; false alarm 1e-3 each."""
    for noise in (None, "float64"):
        made = AncestralSampler(8, "cosine", noise=noise).sample(smooth, masks(500, 16), MASK, 0)
        edges = mask_schedule("cosine").masked(1 - np.arange(9) / 8)
        steps = np.bincount(made.order.ravel(), minlength=8)
        assert chisquare(steps, 8000 * -np.diff(edges)).pvalue > 1e-3
        np.testing.assert_allclose(made.times, 1 - (made.order + 1) / 8)


def test_what_alpha_of_zero_leaves_masked_is_drawn_last() -> None:
    for noise in (None, 53):
        sampler = AncestralSampler(2, "geometric", noise=noise)
        made = sampler.sample(smooth, masks(400, 16), MASK, 0)
        assert (made.tokens != MASK).all()
        assert made.times.min() == 0


# ── calls ───────────────────────────────────────────────────────────────────────────────────────


class Counted:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, x: Any) -> Any:
        self.seen.append(x.clone())
        return smooth(x)


def test_the_cache_leaves_out_the_calls_that_change_nothing() -> None:
    for noise in (None, 53):
        runs = {}
        for cache in (True, False):
            counted = Counted()
            sampler = AncestralSampler(200, cache=cache, noise=noise)
            runs[cache] = sampler.sample(counted, masks(1, 12), MASK, rng=3)
            assert runs[cache].nfe == len(counted.seen)
        assert torch.equal(runs[True].tokens, runs[False].tokens)
        assert runs[True].nfe <= 12
        assert runs[True].nfe == len(np.unique(runs[True].order))
        assert runs[False].nfe >= (200 if noise is None else runs[True].order.max() + 1)


@each_sampler
def test_calls_and_draws_are_counted_and_the_states_are_rising(sampler: MaskedSampler) -> None:
    counted = Counted()
    made = sampler.sample(counted, masks(3, 9), MASK, rng=0)
    assert made.nfe == len(counted.seen) > 0
    assert made.draws >= 27
    if not isinstance(sampler, ConfidenceSampler) and not getattr(sampler, "bits", None):
        assert made.draws == 27
    for before, after in zip(counted.seen, [*counted.seen[1:], made.tokens], strict=True):
        assert (after[before != MASK] == before[before != MASK]).all()
    assert (made.tokens != MASK).all()
    assert ((made.times >= 0) & (made.times < 1)).all()


@each_sampler
def test_init_and_step_are_sample(sampler: MaskedSampler) -> None:
    state = sampler.init(masks(2, 8), MASK, rng=5)
    while state.index < state.steps:
        state = sampler.step(state, smooth)
    made = sampler.sample(smooth, masks(2, 8), MASK, rng=5)
    assert torch.equal(state.tokens, made.tokens)
    assert state.calls == made.nfe
    with pytest.raises(InputError, match="after the last step"):
        sampler.step(state, smooth)


# ── what is given, ragged rows, split batches ───────────────────────────────────────────────────


@each_sampler
def test_given_tokens_stay_and_rows_without_masks_idle(sampler: MaskedSampler) -> None:
    x = masks(3, 8)
    x[0, 2:5] = torch.tensor([0, 2, 1])
    x[1] = torch.arange(8) % 3
    before = x.clone()
    made = sampler.sample(smooth, x, MASK, rng=0)
    given = before != MASK
    assert torch.equal(x, before)
    assert (made.tokens[given] == before[given]).all()
    assert (made.tokens != MASK).all()
    assert (made.order[given.numpy()] == -1).all()
    assert (np.isnan(made.times) == given.numpy()).all()


@each_sampler
def test_nothing_masked_no_call(sampler: MaskedSampler) -> None:
    x = torch.arange(8)[None] % 3
    made = sampler.sample(lambda x: pytest.fail("called"), x, MASK, rng=0)
    assert torch.equal(made.tokens, x)
    assert (made.nfe, made.draws) == (0, 0)


@each_sampler
def test_a_split_batch_gives_the_same(sampler: MaskedSampler) -> None:
    x = masks(7, 6)
    x[2, :3] = 0
    whole = sampler.sample(smooth, x, MASK, rng=11)
    parts = [sampler.sample(smooth, x[a:b], MASK, 11, first=a) for a, b in ((0, 2), (2, 3), (3, 7))]
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
    other = sampler.sample(smooth, x, MASK, rng=12)
    assert not torch.equal(whole.tokens, other.tokens)


@pytest.mark.parametrize("size", [0, 8])
@each_sampler
def test_rows_of_a_split_batch_have_their_own_number_of_steps(
    sampler: MaskedSampler, size: int
) -> None:
    """Fewer masks than steps in some rows, more in others; times too. And no rows at all."""
    x = masks(size, 12)
    for row in range(size):
        x[row, : 3 * (row % 4)] = 0
    whole = sampler.sample(smooth, x, MASK, rng=3)
    parts = [sampler.sample(smooth, x[i : i + 1], MASK, 3, first=i) for i in range(size)]
    assert whole.tokens.shape == (size, 12)
    for part, tokens, times in zip(parts, whole.tokens, whole.times, strict=True):
        assert torch.equal(part.tokens[0], tokens)
        np.testing.assert_array_equal(part.times[0], times)


def test_a_broken_answer_names_its_step() -> None:
    def breaks(x: Any) -> Any:
        return smooth(x) + (torch.nan if int((x == MASK).sum()) == 3 else 0.0)

    for sampler in (FirstHittingSampler(), OrderedSampler(), ConfidenceSampler(6)):
        with pytest.raises(InputError, match=r"step [345]: logits: got NaN"):
            sampler.sample(breaks, masks(1, 6), MASK, rng=0)


# ── temperature and the shares ──────────────────────────────────────────────────────────────────


def test_temperature_zero_is_the_likeliest_and_top_p_cuts() -> None:
    greedy = OrderedSampler("left-to-right", temperature=0.0)
    runs = [greedy.sample(network, masks(1), MASK, rng=r).tokens for r in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    logits = torch.log(torch.tensor([0.5, 0.3, 0.1, 0.1]))
    for sampler, want in (
        (OrderedSampler(steps=1, temperature=0.5), [25 / 35, 9 / 35, 1 / 35]),
        (AncestralSampler(9, noise=53, temperature=0.5), [25 / 35, 9 / 35, 1 / 35]),
        (AncestralSampler(9, top_p=0.7), [5 / 8, 3 / 8, 0]),
        (ConfidenceSampler(1, top_p=0.7), [5 / 8, 3 / 8, 0]),
    ):
        made = sampler.sample(lambda x: logits.expand(*x.shape, 4), masks(200, 50), MASK, 2)
        found = np.bincount(made.tokens.ravel(), minlength=4)[:3]
        p = np.array(want)
        assert found[p == 0].sum() == 0
        assert chisquare(found[p > 0], 10_000 * p[p > 0]).pvalue > 1e-3


def test_the_mask_is_never_drawn_and_half_precision_is_enough() -> None:
    def certain(x: Any) -> Any:
        return torch.tensor([0.0, 0.0, 0.0, 60.0]).half().expand(*x.shape, 4)

    for sampler in SAMPLERS.values():
        made = sampler.sample(certain, masks(20, 10), MASK, rng=0)
        assert (made.tokens < MASK).all()
        assert made.tokens.unique().tolist() == [0, 1, 2]


def test_confidence_takes_what_is_surest_first() -> None:
    """Position i has a law that is surer the larger i; without noise they come in that order."""
    sure = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0]) * 4
    sampler = ConfidenceSampler(6, "linear", choice_temperature=0.0, temperature=0.0)
    made = sampler.sample(lambda x: sure.expand(len(x), 6, 4), masks(1, 6), MASK, rng=0)
    assert made.order.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert made.draws == 6 + 5 + 4 + 3 + 2 + 1
    noisy = ConfidenceSampler(6, "linear", choice_temperature=1e9)
    made = noisy.sample(lambda x: sure.expand(len(x), 6, 4), masks(4000, 6), MASK, rng=0)
    first = np.bincount((made.order == 0).argmax(axis=1), minlength=6)
    assert chisquare(first).pvalue > 1e-3  # by the noise alone


def test_random_order_is_uniform() -> None:
    made = OrderedSampler().sample(smooth, masks(6000), MASK, rng=0)
    orders = np.bincount(made.order @ [9, 3, 1], minlength=27)
    assert chisquare(orders[orders > 0]).pvalue > 1e-3
    assert (orders > 0).sum() == 6


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AncestralSampler(0), "steps: got 0, want an integer >= 1"),
        (lambda: FirstHittingSampler(steps=0), "steps: got 0"),
        (lambda: ConfidenceSampler(2.5), "steps: got 2.5"),
        (lambda: OrderedSampler("middle-out"), "order: got 'middle-out'"),
        (lambda: OrderedSampler(temperature=-1.0), "temperature: got -1.0"),
        (lambda: OrderedSampler(top_p=0.0), "top_p: got 0.0"),
        (lambda: AncestralSampler(4, noise="float8"), "noise: got 'float8'"),
        (lambda: ConfidenceSampler(4, choice_temperature=-1), "choice_temperature: got -1"),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "mask_id", "message"),
    [
        (torch.zeros(2, 3), 3, "x_init: got .2, 3. torch.float32"),
        (torch.zeros(3, dtype=torch.long), 3, "x_init"),
        (np.zeros((2, 3), int), 3, "x_init: got ndarray, want a tensor"),
        (torch.full((2, 3), -1), 3, "x_init: got -1, want tokens >= 0"),
        (masks(2), None, "mask_id: got None"),
        (masks(2), -1, "mask_id: got -1"),
        (torch.full((2, 3), 9), 9, "mask_id: got 9, want a token of the vocabulary, below 4"),
    ],
)
@each_sampler
def test_inputs_that_cannot_be(sampler: Any, x: Any, mask_id: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler.sample(smooth, x, mask_id, rng=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: torch.zeros(len(x), V), "logits: got .2, 4., want .2, 6. and"),
        (lambda x: torch.zeros(len(x), 5, V), "logits: got .2, 5, 4., want .2, 6. and"),
        (lambda x: torch.zeros(*x.shape, V, dtype=torch.long), "floating dtype"),
        (lambda x: x.numpy(), "logits: got ndarray"),
        (lambda x: torch.full((*x.shape, V), torch.nan), "logits: got NaN"),
        (
            lambda x: torch.full((*x.shape, V), -torch.inf),
            "logits: got NaN, .inf, or a row of -inf",
        ),
        (lambda x: torch.tensor([-torch.inf] * 3 + [0.0]).expand(*x.shape, V), "row of -inf"),
    ],
)
@each_sampler
def test_networks_that_are_broken(sampler: Any, broken: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler.sample(broken, masks(2, 6), MASK, rng=0)
