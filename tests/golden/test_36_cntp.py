"""Trials by entropy, perplexities, the trial that is kept, and the law of what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.language.cautious_decoding import trial_counts, uncertainty
from scoredraw.language.punctuation import best_segment, segment_law, segment_perplexity

pytestmark = pytest.mark.golden


@pytest.fixture
def data(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    found = golden("36-cntp.json")
    assert set(found["outputs"]) == {
        "entropy", "trials_code", "trials_paper", "perplexity", "best",
        "trials_grid_code", "trials_grid_paper", "segment",
    }  # fmt: skip
    assert found["tolerance"] == {
        "entropy": 1e-6, "trials": "exact", "perplexity": 1e-9, "selection": 1e-12,
    }  # fmt: skip
    return found


def test_trials_of_distributions_and_of_a_grid(data: dict[str, Any]) -> None:
    given, wanted = data["inputs"], data["outputs"]
    with np.errstate(divide="ignore"):
        entropy = uncertainty(np.log(given["probs"]))
    np.testing.assert_allclose(entropy, wanted["entropy"], atol=1e-6, rtol=0)
    bounds = (given["H_min"], given["H_max"], given["N_max"], given["N_min"])
    for rule in ("code", "paper"):
        assert trial_counts(entropy, *bounds, rule=rule).tolist() == wanted[f"trials_{rule}"]
        grid = trial_counts(given["entropy_grid"], *bounds, rule=rule)
        assert grid.tolist() == wanted[f"trials_grid_{rule}"]


def test_perplexities_and_the_trial_kept(data: dict[str, Any]) -> None:
    cases, wanted = data["inputs"]["trial_probs"], data["outputs"]
    assert len(cases) == len(wanted["perplexity"]) == len(wanted["best"]) == 4
    for trials, perplexities, best in zip(cases, wanted["perplexity"], wanted["best"], strict=True):
        found = [segment_perplexity(np.log(trial)) for trial in trials]
        np.testing.assert_allclose(found, perplexities, atol=1e-9, rtol=0)
        assert best_segment(found) == best


def test_the_law_of_what_is_kept(data: dict[str, Any]) -> None:
    given, wanted = data["inputs"]["segment"], data["outputs"]["segment"]
    assert set(wanted) == {"selection"}
    law = segment_law(given["q"], given["ppl"], given["N"])
    np.testing.assert_allclose(law, wanted["selection"], atol=1e-12, rtol=0)
