"""The cluster bandit's trace, and inverse-Hessian products of one layer in four ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.bandits import ClusterUCB
from scoredraw.data_selection.kronecker import LayerFactors, exact_fisher, exact_ihvp

pytestmark = pytest.mark.golden

FILE = "40-quad.json"


def trace(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of the file's bandit, under the conventions of the released code."""
    rewards = inputs["reward_if_pulled[round][cluster]"]
    tau, size = inputs["influence_threshold_tau"], inputs["clusters_per_round"]
    policy = ClusterUCB(
        len(rewards[0]), inputs["alpha"], 1.0, plus_one=True, unpulled_first=False, ties="lowest",
        distances=inputs["distance"], radius=inputs["neighbour_threshold"], threshold=tau,
    )  # fmt: skip
    state, rounds = policy.init(), []
    for reward in rewards:
        arms = policy.select(state, size).tolist()
        for arm in arms:
            state = policy.step(state, arm, reward[arm])
        rounds.append(
            {
                "pulled": arms,
                "accepted": [arm for arm in arms if reward[arm] > tau],
                "score_sum": state.sums.tolist(),
                "count": state.counts.tolist(),
                "cluster_score": policy.scores(state).tolist(),
            }
        )
    return rounds


def products(inputs: dict[str, Any], tensor: Callable[[Any], Any]) -> dict[str, Any]:
    """Each golden output's name and its value here, from arrays made by `tensor`."""
    a, delta = tensor(inputs["X"]), tensor(inputs["delta"])
    layer, damping = LayerFactors.of(a, delta), inputs["damping"]
    gradients = delta.mT @ a
    V = gradients.mean(0)
    kfac, ekfac = layer.ihvp(V, damping, "kfac"), layer.ihvp(V, damping)
    exact = exact_ihvp(exact_fisher(a, delta), V, damping)
    by_name = {"kfac": kfac, "ekfac": ekfac, "exact_fisher": exact}
    return {
        "A": layer.A,
        "S": layer.S,
        "mean_grad": V,
        "ihvp_kfac": kfac,
        "ihvp_kfac_factored_damping": layer.ihvp(V, damping, "factored"),
        "ekfac_lambda": layer.Lambda,
        "ihvp_ekfac": ekfac,
        "ihvp_exact_fisher": exact,
        # what the released code computes: times the curvature, in the same eigenbases
        "hvp_if_multiplied_instead_of_divided": layer.Q_S
        @ ((layer.Q_S.mT @ V @ layer.Q_A) * (layer.Lambda + damping))
        @ layer.Q_A.mT,
        "influence_example0": {k: float((P * gradients[0]).sum()) for k, P in by_name.items()},
    }


def as_tensor(values: Any) -> Any:
    return pytest.importorskip("torch").tensor(values, dtype=pytest.importorskip("torch").float64)


@pytest.mark.parametrize("tensor", [np.array, as_tensor])
def test_every_output_of_the_file(
    golden: Callable[[str], dict[str, Any]], tensor: Callable[[Any], Any]
) -> None:
    data = golden(FILE)
    ours = products(data["inputs"], tensor) | {"trace": trace(data["inputs"])}
    assert set(data["outputs"]) == set(ours)
    for name, want in data["outputs"].items():
        compare(ours[name], want, data["tolerance"]["abs"], name)


def compare(got: Any, want: Any, tolerance: float, name: str) -> None:
    if isinstance(want, dict):
        assert set(got) == set(want), name
        for key in want:
            compare(got[key], want[key], tolerance, f"{name} {key}")
    elif want and isinstance(want[0] if isinstance(want, list) else None, dict):
        assert len(got) == len(want), name
        for t, (one, other) in enumerate(zip(got, want, strict=True)):
            compare(one, other, tolerance, f"{name} {t}")
    else:
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, name
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)


def test_the_inverse_divides_by_the_curvature(golden: Callable[[str], dict[str, Any]]) -> None:
    """The released code multiplies by it: the two differ everywhere, in scale and in direction."""
    data = golden(FILE)
    right = np.array(data["outputs"]["ihvp_ekfac"])
    wrong = np.array(data["outputs"]["hvp_if_multiplied_instead_of_divided"])
    ours = products(data["inputs"], np.array)["ihvp_ekfac"]
    assert np.abs(ours - right).max() < data["tolerance"]["abs"]
    assert np.abs(ours - wrong).min() > 0.1
