"""First-hitting times, laws of truncated noise, and samplers and bounds of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scoredraw.diffusion.first_hitting import (  # noqa: E402
    ancestral_law,
    first_hitting_law,
    hitting_times,
)
from scoredraw.diffusion.low_precision import truncated_categorical_probs  # noqa: E402
from scoredraw.diffusion.masked_likelihood import exact_nelbo  # noqa: E402

pytestmark = pytest.mark.golden

NAME = "28-fhs.json"


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


@pytest.fixture(scope="module")
def network(case: dict[str, Any]) -> Callable[[Any], Any]:
    """The table as a network; the mask, which is never drawn, gets a logit that must not matter."""
    inputs = case["inputs"]
    L, V = inputs["L"], inputs["V"]
    table = torch.full((V + 1,) * L + (L, V + 1), 7.0, dtype=torch.float64)
    for key, rows in inputs["table"].items():
        table[tuple(map(int, key.split(",")))][:, :V] = torch.tensor(
            rows, dtype=torch.float64
        ).log()
    return lambda x: table[tuple(x.T)]


def as_array(law: dict[str, float], V: int, L: int) -> np.ndarray:
    found = np.zeros((V + 1,) * L)
    for key, p in law.items():
        found[tuple(map(int, key.split(",")))] = p
    return found


def test_hitting_times(case: dict[str, Any]) -> None:
    u, close = case["inputs"]["uniforms"], case["tolerance"]["times_abs"]
    for name in ("linear", "cosine"):
        want = case["outputs"][f"times_{name}"]
        np.testing.assert_allclose(hitting_times(u, name), want, rtol=0, atol=close, err_msg=name)


def test_laws_of_truncated_noise(case: dict[str, Any]) -> None:
    assert len(case["outputs"]["trunc_probs"]) == len(case["inputs"]["deltas"]) == 5
    for key, want in case["outputs"]["trunc_probs"].items():
        got = truncated_categorical_probs(case["inputs"]["pi"], delta=float(key))
        np.testing.assert_allclose(got, want, rtol=0, atol=case["tolerance"]["abs"], err_msg=key)


def test_laws_of_the_samplers_and_their_distance(case: dict[str, Any], network: Any) -> None:
    inputs, outputs, close = case["inputs"], case["outputs"], case["tolerance"]["abs"]
    L, V, mask = inputs["L"], inputs["V"], inputs["mask_id"]
    limit = first_hitting_law(network, L, mask)
    want = as_array(outputs["fhs_distribution"], V, L)
    np.testing.assert_allclose(limit, want, rtol=0, atol=close)
    for key, distance in outputs["tv_ancestral_vs_fhs"].items():
        law = ancestral_law(network, L, mask, int(key))
        assert abs(law - limit).sum() / 2 == pytest.approx(distance, abs=close)
        if key in outputs["ancestral_distribution"]:
            want = as_array(outputs["ancestral_distribution"][key], V, L)
            np.testing.assert_allclose(law, want, rtol=0, atol=close, err_msg=key)
    assert [str(n) for n in inputs["ancestral_steps"]] == list(outputs["ancestral_distribution"])


def test_bounds(case: dict[str, Any], network: Any) -> None:
    want = case["outputs"]["nelbo"]
    assert len(want) == 27
    x = torch.tensor([list(map(int, key.split(","))) for key in want])
    got = exact_nelbo(network, x, case["inputs"]["mask_id"])
    np.testing.assert_allclose(got, list(want.values()), rtol=0, atol=case["tolerance"]["abs"])
    assert np.exp(-got).sum() <= 1
