"""CHES against the authors' own function, and the law behind it against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scoredraw.data_selection.likelihood_displacement import (
    ches_score,
    last_hidden_similarity,
    likelihood_derivative,
    predicting_mask,
)

pytestmark = pytest.mark.golden

Golden = Callable[[str], dict[str, Any]]
FILE = "25-ches.json"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, as the file says


def sides(given: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and predicting masks; what the prompt's end comes after does not matter."""
    hidden, masks = [], []
    for side in ("preferred", "dispreferred"):
        states = torch.tensor(given[f"{side}_hidden"], dtype=dtype)
        prompts = torch.tensor(given[f"{side}_last_prompt_index"]) + 1
        mask = predicting_mask(torch.ones(states.shape[:2]), prompts, padding_side="left")
        assert mask.sum(1).tolist() == given[f"{side}_lengths"]
        hidden.append(states)
        masks.append(mask)
    return hidden[0], hidden[1], masks[0], masks[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores(golden: Golden, dtype: torch.dtype) -> None:
    data = golden(FILE)
    pair = sides(data["inputs"]["ches"], dtype)
    ours = {
        "ches": ches_score(*pair),
        "ln_ches": ches_score(*pair, normalize=True),
        "last_hidden_inner": last_hidden_similarity(*pair),
    }
    want = data["outputs"]["ches"]
    assert set(want) == set(ours)
    for name, values in want.items():
        assert ours[name].dtype == dtype
        assert ours[name].tolist() == pytest.approx(values, rel=TOLERANCE[dtype]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_law_behind_the_score(golden: Golden, dtype: torch.dtype) -> None:
    data = golden(FILE)
    given, want = data["inputs"]["gradient_identity"], data["outputs"]["gradient_identity"]
    unembedding, plus, minus = (
        torch.tensor(given[name], dtype=dtype) for name in ("W", "H_preferred", "H_dispreferred")
    )
    chosen, rejected = (torch.tensor(given[f"y_{s}"]) for s in ("preferred", "dispreferred"))
    law = (unembedding, plus, minus, chosen, rejected)
    moved = likelihood_derivative(*law, beta=given["beta"])
    frozen = likelihood_derivative(*law, beta=given["beta"], train_hidden=False)
    all_of = [torch.ones(1, len(h), dtype=torch.bool) for h in (plus, minus)]
    ours = {
        "alpha_plus_plus": moved.alpha_chosen,
        "alpha_plus_minus": moved.alpha_rejected,
        "unembedding_term": moved.unembedding_term,
        "hidden_vector_term": moved.hidden_term,
        "dlogp_dt_at_reference": frozen.rate,
        "dlogp_dt_at_reference_all": moved.rate,
        "ches": ches_score(plus[None], minus[None], all_of[0], all_of[1])[0],
    }
    assert set(want) == set(ours)
    assert frozen.hidden_term == 0
    for name, value in want.items():
        expected = torch.tensor(value, dtype=dtype)
        torch.testing.assert_close(ours[name], expected, rtol=TOLERANCE[dtype], atol=0.0, msg=name)
