"""Drift, noise and weight rate of every weighted SDE on mixtures, and systematic resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from scoredraw import smc
from scoredraw.diffusion.feynman_kac import Target, rates
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.schedules import LinearBeta

pytestmark = pytest.mark.golden

NAME = "24-fkc-drift-weights.json"
SCHEDULE = LinearBeta(0.1, 20.0)
DT = 0.01


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(NAME)


def mixture(parts: dict[str, Any]) -> GaussianMixtureScore:
    covariances = np.square(parts["stds"])[:, None, None] * np.eye(2)
    return GaussianMixtureScore(parts["weights"], parts["means"], covariances, SCHEDULE)


def states(case: dict[str, Any]) -> tuple[NDArray[np.float64], float, list[NDArray[np.float64]]]:
    """x, t and the two experts' scores."""
    inputs = case["inputs"]
    x, t = np.array(inputs["x"]), inputs["t"]
    return x, t, [mixture(inputs[name]).score(x, t) for name in ("gmm1", "gmm2")]


def close(case: dict[str, Any], got: Any, want: Any, name: str) -> None:
    tolerance = case["tolerance"]
    np.testing.assert_allclose(
        got, want, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=name
    )


def test_every_output_is_checked_here(case: dict[str, Any]) -> None:
    sdes = {
        "anneal_target_score", "anneal_tempered_noise", "product", "geometric_cfg",
        "weighted_product", "reward_tilt",
    }  # fmt: skip
    densities = {"logq1", "logq2", "score1", "score2"}
    ids = {"systematic_ids_official_clip", "systematic_ids_noclip", "clip_case"}
    assert set(case["outputs"]) == sdes | densities | ids


def test_densities_and_scores(case: dict[str, Any]) -> None:
    x, t, scores = states(case)
    for k, score in enumerate(scores, 1):
        close(case, score, case["outputs"][f"score{k}"], f"score{k}")
        density = mixture(case["inputs"][f"gmm{k}"]).log_density(x, t)
        close(case, density, case["outputs"][f"logq{k}"], f"logq{k}")


def test_weighted_sdes(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    x, t, (first, second) = states(case)
    beta = inputs["beta_anneal"]
    experts = {
        "anneal_target_score": (Target.anneal(beta), [first]),
        "anneal_tempered_noise": (Target.anneal(beta, "tempered"), [first]),
        "product": (Target.product(1, 1), [first, second]),
        "geometric_cfg": (Target.guidance(inputs["beta_geometric"]), [first, second]),
        "weighted_product": (Target.product(*inputs["betas_weighted"]), [first, second]),
    }
    for name, (target, scores) in experts.items():
        got = rates(target, SCHEDULE, x, scores, t, t - DT)
        want = case["outputs"][name]
        close(case, got.drift, want["drift"], name)
        close(case, got.noise, want["noise_std"], name)
        close(case, got.growth, want["dw"], name)


def test_reward_tilt(case: dict[str, Any]) -> None:
    """b is linear in time, so that its difference over any step is its derivative."""
    inputs = case["inputs"]
    x, t, (first, _) = states(case)
    target = Target.product(1.0).tilted(
        lambda x, t: -0.5 * np.square(x - 1).sum(axis=1),
        lambda x, t: 1 - x,
        lambda at: inputs["beta_t"] + inputs["dbeta_dtau"] * (t - at),
    )
    assert target.reward is not None
    assert callable(target.gradient)
    got = rates(
        target, SCHEDULE, x, [first], t, t - DT,
        reward=target.reward(x, t), gradient=target.gradient(x, t),
    )  # fmt: skip
    want = case["outputs"]["reward_tilt"]
    close(case, got.drift, want["drift"], "drift")
    close(case, got.noise, want["noise_std"], "noise")
    close(case, got.growth, want["dw"], "growth")


def test_systematic_resampling(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    clip = inputs["clip_case"]
    for logits, offset, want in (
        (inputs["resample_logits"], inputs["resample_u0"],
         {"ids_official_clip": outputs["systematic_ids_official_clip"],
          "ids_noclip": outputs["systematic_ids_noclip"]}),
        (clip["logits"], clip["u0"], outputs["clip_case"]),
    ):  # fmt: skip
        p = softmax(logits)
        assert smc.systematic_ids(p, offset).tolist() == want["ids_noclip"]
        clipped = smc.systematic_ids(p, offset, least=1e-6).tolist()
        assert clipped == want["ids_official_clip"]


def test_the_clip_of_released_code_brings_a_dead_particle_back(case: dict[str, Any]) -> None:
    """Which is why it is off: particle 5 has a weight of 1e-12 and is drawn."""
    clip = case["inputs"]["clip_case"]
    p = softmax(clip["logits"])
    revived = set(case["outputs"]["clip_case"]["ids_official_clip"])
    assert p[list(revived)].min() < 1e-10
    assert p[smc.systematic_ids(p, clip["u0"])].min() > 1e-3
