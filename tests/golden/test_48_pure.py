"""Process credit against the authors' functions: transform, baselines and their verl branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scoredraw.rl.process_advantages import baselined_rewards, process_advantages
from scoredraw.rl.process_credit import min_form_rewards, process_rewards
from scoredraw.rl.token_credit import at_step_ends, returns_to_go

pytestmark = pytest.mark.golden

Golden = Callable[[str], dict[str, Any]]


@pytest.fixture
def data(golden: Golden) -> dict[str, Any]:
    return golden("48-pure-credit.json")


def scores(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor(inputs["step_mask"])
    return process_rewards(inputs["logits"], mask), mask


def batch(inputs: dict[str, Any]) -> dict[str, Any]:
    r, mask = scores(inputs)
    S, T = mask.shape[1], inputs["padded_length"]
    ends = torch.tensor([[*row, *[0] * (S - len(row))] for row in inputs["step_end_index"]])
    length = torch.tensor(inputs["response_length"])
    return {
        "step_rewards": r, "step_mask": mask, "step_end": ends,
        "response_mask": torch.arange(T) < length[:, None],
        "num_generations": inputs["group_size"],
    }  # fmt: skip


def released_strict_min(given: dict[str, Any]) -> Tensor:
    """Their running minimum over tokens, zeros of other tokens and of the padding included."""
    mask = given["response_mask"]
    tokens = at_step_ends(
        given["step_rewards"], given["step_mask"], given["step_end"], mask.shape[1]
    )
    running = tokens.flip(1).cummin(dim=1).values.flip(1)
    K, T = given["num_generations"], mask.shape[1]
    total = running.sum(dim=1).reshape(-1, K)
    others = (total.sum(dim=1, keepdim=True) - total) / ((K - 1) * T)
    return (running - others.reshape(-1, 1)) * mask


def ours(inputs: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Each golden output's name and how it is computed here."""
    r, mask = scores(inputs)
    given = batch(inputs)
    outcome = {"outcome": inputs["solved"], "outcome_coef": inputs["vr_coef"]}
    found: dict[str, Callable[[], Tensor]] = {
        "process_reward": lambda: r,
        "transformed_T0.1": lambda: min_form_rewards(r, mask),
        "transformed_T1.0": lambda: min_form_rewards(r, mask, 1.0),
        "transformed_disabled_uniform": lambda: min_form_rewards(r, mask, credit="mean"),
        "verl_sum_adv_on_transformed": lambda: process_advantages(**given, baseline="verl"),
        "verl_sum_adv_on_raw(gamma=1 summation baseline)": lambda: process_advantages(
            **given, baseline="verl", credit="sum"
        ),
        "verl_strict_min_adv_on_raw": lambda: released_strict_min(given),
        "strict_min_step_returns": lambda: step_returns(r, mask, "strict_min"),
        "argmin_form_step_returns": lambda: step_returns(r, mask, "argmin"),
    }
    for how in ("step", "token"):
        for name, known in (("", {}), ("_plus_vr", outcome)):
            keys = {**given, "baseline": how, **known}
            found[f"{how}_baselined_rewards{name}"] = lambda k=keys: baselined_rewards(**k)
            found[f"{how}_returns{name}"] = lambda k=keys: process_advantages(**k)
    return found


def step_returns(r: Tensor, mask: Tensor, credit: str) -> Tensor:
    return returns_to_go(min_form_rewards(r, mask, credit=credit), mask)


def test_every_number_of_the_released_functions(data: dict[str, Any]) -> None:
    found = ours(data["inputs"])
    assert found.keys() == data["outputs"].keys()
    for name, want in data["outputs"].items():
        got = found[name]().numpy()
        np.testing.assert_allclose(got, want, rtol=0, err_msg=name, **data["tolerance"])


def test_the_strict_minimum_runs_over_steps(data: dict[str, Any]) -> None:
    """Row 6 has only good steps: the released minimum is 0 for it, the right one its worst step."""
    given = batch(data["inputs"])
    r, mask = scores(data["inputs"])
    assert bool((r[6] > 0).all())
    G = step_returns(r, mask, "strict_min")
    assert G[6, 0] == pytest.approx(float(r[6].min()))
    right = process_advantages(**given, baseline="verl", credit="strict_min")
    wrong = released_strict_min(given)
    T = data["inputs"]["response_length"][6]
    assert len(wrong[6, : T - 1].unique()) == 1  # nothing of the steps is left
    assert len(right[6, :T].unique()) == 3  # .405 up to the worst step, then .466, .542
    assert float((right - wrong).abs().max()) > 0.3
