"""MBR and X-MBR from matrices and from real texts, equality MBR, hope and risk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.answers import AnswerPool
from scoredraw.language.hedged_sampling import hope_and_risk
from scoredraw.language.minimum_bayes_risk import (
    expected_utility,
    mbr_choice,
    minimum_bayes_risk,
    pick,
)
from scoredraw.language.selection import majority_vote
from scoredraw.language.text_utilities import chrf_matrix, equality

pytestmark = pytest.mark.golden

Golden = Callable[[str], dict[str, Any]]


def test_matrices(golden: Golden) -> None:
    data = golden("43-xmbr.json")
    given, want = data["inputs"], data["outputs"]
    u, x, votes = given["U"], given["X"], given["votes"]
    same = equality()(votes, votes)
    scores = {
        "mbr_excl_self": expected_utility(u),
        "mbr_incl_self": expected_utility(u, include_self=True),
        "xmbr": expected_utility(u, x),
        "xmbr_weighted": expected_utility(u, x, cross_weight=given["cross_weight"]),
        "mbr_equality": expected_utility(same),
    }
    assert set(want) == {*scores, "pick", "hope_risk"}
    for name, found in scores.items():
        np.testing.assert_allclose(found, want[name], rtol=0, atol=data["tolerance"]["score"])
    picked = {
        "mbr": "mbr_excl_self", "mbr_incl": "mbr_incl_self", "xmbr": "xmbr",
        "xmbr_weighted": "xmbr_weighted", "equality": "mbr_equality",
    }  # fmt: skip
    assert {name: int(pick(scores[of])) for name, of in picked.items()} == want["pick"]
    pool = AnswerPool.of(votes)
    np.testing.assert_array_equal(mbr_choice(pool, utility="equality"), majority_vote(pool))
    found = hope_and_risk(given["hope_risk"]["scores"], given["hope_risk"]["greedy"])
    tolerance = data["tolerance"]["hope_risk"]
    assert found.hope == pytest.approx(want["hope_risk"]["hope"], rel=0, abs=tolerance)
    assert found.risk == pytest.approx(want["hope_risk"]["risk"], rel=0, abs=tolerance)


def test_pools_of_a_language_model(golden: Golden) -> None:
    data = golden("43-pools.json")
    given, want, tolerance = data["inputs"], data["outputs"], data["tolerance"]["score"]
    clean, greedy, evidence = given["reference"], given["greedy"], given["evidence"]

    def score(texts: list[str]) -> float:
        return float(np.diagonal(chrf_matrix(texts, clean)).mean())

    assert score(greedy) == pytest.approx(want["score_greedy"], rel=0, abs=tolerance)
    assert score(given["noisy"]) == pytest.approx(want["score_noisy_input"], rel=0, abs=tolerance)
    assert set(want) == {*given["samples"], "score_greedy", "score_noisy_input"}
    for temperature, plain in given["samples"].items():
        expected = dict(want[temperature])
        hedged = [[best, *pool[:4]] for best, pool in zip(greedy, plain, strict=True)]
        every = np.mean([chrf_matrix(pool, [c]) for pool, c in zip(plain, clean, strict=True)])
        assert every == pytest.approx(expected.pop("score_random"), rel=0, abs=tolerance)
        for kind, pools in (("", plain), ("hedged_", hedged)):
            for method in ("mbr", "xmbr"):
                more = evidence if method == "xmbr" else [()] * len(pools)
                picks = [
                    minimum_bayes_risk(pool, evidence=other, allow_surface_cross=True).index
                    for pool, other in zip(pools, more, strict=True)
                ]
                assert picks == expected.pop(f"pick_{kind}{method}"), (temperature, kind, method)
                found = score([pool[i] for pool, i in zip(pools, picks, strict=True)])
                known = expected.pop(f"score_{kind}{method}")
                assert found == pytest.approx(known, rel=0, abs=tolerance)
        assert not expected, "an output this test does not know"
