"""Components, picks and overlaps against an independent evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.orthogonal_scores import ODiSSelector

pytestmark = pytest.mark.golden


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden("15-odis.json")
    given, want, tol = data["inputs"], data["outputs"], data["tolerance"]["abs"]
    assert data["tolerance"]["selection"] == "exact"
    S, tokens = np.array(given["scores"]), np.array(given["tokens"])
    selector = ODiSSelector(
        given["n_components"], size=given["token_budget_total"], refill=False
    ).fit(S, tokens=tokens)
    fit, chosen = selector.components_, selector.selection_
    ours = {
        "mean": fit.mean,
        "std": fit.scale,
        "explained_variance_ratio": selector.explained_variance_ratio_,
        "loadings": selector.loadings_,
        "component_scores": selector.component_scores(S),
        "selected_per_component": [one.tolist() for one in chosen.lists],
        "union": chosen.indices.tolist(),
        "overlap_over_smaller": chosen.overlap,
    }
    assert set(want) == set(ours), "an output this test does not know"
    for name in ("selected_per_component", "union"):
        assert ours[name] == want[name], name
    for name in set(want) - {"selected_per_component", "union"}:
        got = np.asarray(ours[name])
        assert got.shape == np.shape(want[name]), name
        np.testing.assert_allclose(got, want[name], rtol=0, atol=tol, err_msg=name)
    # each list is above its share by less than its last document
    share = given["token_budget_total"] / given["n_components"]
    for one in chosen.lists:
        assert tokens[one[:-1]].sum() < share <= tokens[one].sum()
