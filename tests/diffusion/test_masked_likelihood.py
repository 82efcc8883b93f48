"""The bound of a masked model: unbiased however it is drawn, free of time, and right by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scoredraw.diffusion.first_hitting import first_hitting_law  # noqa: E402
from scoredraw.diffusion.masked_likelihood import exact_nelbo, masked_nelbo  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

MASK, V, L = 3, 4, 3
TABLE = torch.from_numpy(2 * np.random.default_rng(0).normal(size=(V,) * L + (L, V)))
ROWS = torch.cartesian_prod(*[torch.arange(3)] * L)


def network(x: Any) -> Any:
    """Three tokens and a mask; every state has laws of its own."""
    return TABLE[tuple(x.T)]


def test_it_bounds_the_law_of_the_sampler() -> None:
    bound = exact_nelbo(network, ROWS, MASK)
    truth = -np.log(first_hitting_law(network, L, MASK)[tuple(ROWS.numpy().T)])
    assert (bound >= truth).all()
    assert (bound > truth + 0.01).any()
    assert np.exp(-bound).sum() <= 1


@pytest.mark.parametrize("spread", ["independent", "stratified", "antithetic"])
@pytest.mark.parametrize("schedule", [None, "linear", "cosine", "polynomial"])
def test_every_estimator_has_the_same_mean(spread: str, schedule: Any) -> None:
    """40 seeds of 200 terms for 27 rows, each within 4.5 standard errors: false alarm 2e-4."""
    rows = ROWS.repeat(100, 1)
    runs = np.stack([
        masked_nelbo(network, rows, MASK, 2, rng, spread=spread, schedule=schedule).nelbo
        for rng in range(40)
    ]).reshape(40, 100, 27).mean(axis=1)  # fmt: skip
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    assert (abs(runs.mean(axis=0) - exact_nelbo(network, ROWS, MASK)) < 4.5 * error).all()


def surer(x: Any) -> Any:
    """Token 0 is the surer the fewer masks there are: the terms depend on n alone."""
    share = (x == MASK).double().mean(dim=1)[:, None, None]
    return torch.cat([4 - 4 * share, 0 * share, 0 * share, share], -1).expand(-1, x.shape[1], V)


def test_spreading_the_numbers_and_leaving_out_time_are_steadier() -> None:
    """Spread of the mean over rows in 200 runs; factors of 1.5 are far outside its noise of 7 %."""
    rows = torch.zeros(20, 12, dtype=torch.long)

    def deviation(spread: str, schedule: Any = None) -> float:
        runs = [
            masked_nelbo(surer, rows, MASK, 2, rng, spread=spread, schedule=schedule)
            for rng in range(200)
        ]
        return float(np.std([run.nelbo.mean() for run in runs]))

    independent = deviation("independent")
    assert independent > 5 * deviation("stratified")
    assert independent > 1.5 * deviation("antithetic")
    assert deviation("stratified", "linear") > 2 * deviation("stratified")  # n is random given t


def test_what_is_given_is_never_masked_nor_scored() -> None:
    seen: list[Any] = []

    def watched(x: Any) -> Any:
        seen.append(x.clone())
        return network(x)

    given = torch.tensor([True, False, True])
    made = masked_nelbo(watched, ROWS, MASK, 4, 0, given=given)
    assert all((x[:, [0, 2]] == ROWS[:, [0, 2]]).all() and (x[:, 1] == MASK).all() for x in seen)
    p = TABLE[ROWS[:, 0], MASK, ROWS[:, 2], 1].clone()
    p[:, MASK] = -torch.inf
    want = -p.log_softmax(-1).gather(-1, ROWS[:, 1:2])[:, 0].numpy()
    np.testing.assert_allclose(made.nelbo, want, atol=1e-12)
    assert (made.length == 1).all()
    np.testing.assert_allclose(made.per_token.value, want.mean(), atol=1e-12)


def test_perplexity_by_hand() -> None:
    uniform = masked_nelbo(lambda x: torch.zeros(*x.shape, 11), ROWS, 10, 2, 0)
    assert uniform.perplexity.value == pytest.approx(10)
    assert uniform.perplexity.low == pytest.approx(10)
    half = masked_nelbo(lambda x: torch.zeros(*x.shape, 11).half(), ROWS, 10, 2, 0)
    assert half.perplexity.value == pytest.approx(10)
    made = masked_nelbo(network, ROWS, MASK, 2, 0)
    assert made.perplexity.value == pytest.approx(np.exp(made.nelbo.sum() / 81))
    assert made.per_token.low < made.per_token.value < made.per_token.high
    assert made.per_token.n == 27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 0}, "n_samples: got 0"),
        ({"spread": "wide"}, "spread: got 'wide'"),
        ({"tokens": torch.full((2, 3), MASK)}, "tokens: got 6 masks, want none"),
        ({"tokens": torch.zeros(2, 3)}, "tokens"),
        ({"tokens": torch.zeros(0, 3).long()}, "tokens"),
        ({"tokens": torch.full((2, 3), 9), "logits_fn": surer}, "tokens: got .9., want from 0 to"),
        ({"tokens": torch.full((2, 3), -1), "logits_fn": surer}, "tokens: got .-1., want from 0"),
        ({"given": [True] * 3}, "given: got a whole row"),
        ({"given": [True] * 4}, "given: got .4,."),
        (
            {"mask_id": 7, "logits_fn": surer},
            "mask_id: got 7, want a token of the vocabulary, below 4",
        ),
        ({"schedule": "step"}, "schedule: got 'step'"),
        ({"logits_fn": lambda x: torch.zeros(2, 3)}, "logits: got .2, 3."),
        ({"logits_fn": lambda x: torch.full((*x.shape, V), torch.nan)}, "logits: got NaN"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    how: dict[str, Any] = {"logits_fn": network, "tokens": ROWS[:2], "mask_id": MASK}
    with pytest.raises(InputError, match=message):
        masked_nelbo(**{**how, **change})


def test_rows_too_long_to_enumerate() -> None:
    with pytest.raises(InputError, match="tokens: got 13 a row"):
        exact_nelbo(network, torch.zeros(1, 13).long(), MASK)
