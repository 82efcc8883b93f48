"""Systematic resampling against the released code's, with and without its clip."""

from __future__ import annotations

import pytest

from scoredraw import smc

pytestmark = pytest.mark.golden


def test_systematic_ids_of_the_released_code(golden) -> None:
    file = golden("24-fkc-drift-weights.json")
    given_, want = file["inputs"], file["outputs"]
    case, ids = given_["clip_case"], want["clip_case"]
    p, revived = smc.probabilities(given_["resample_logits"]), smc.probabilities(case["logits"])
    u = given_["resample_u0"]
    assert smc.systematic_ids(p, u).tolist() == want["systematic_ids_noclip"]
    assert smc.systematic_ids(p, u, least=1e-6).tolist() == want["systematic_ids_official_clip"]
    assert smc.systematic_ids(revived, case["u0"]).tolist() == ids["ids_noclip"]
    assert smc.systematic_ids(revived, case["u0"], least=1e-6).tolist() == ids["ids_official_clip"]
