"""χ² in closed form, penalties, the tomato garden, and its exact optima under three divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Categorical, Independent, Normal

from scoredraw.rl.divergences import chi2_divergence, divergence
from scoredraw.rl.occupancy import pointwise_divergence
from scoredraw.rl.proxy_rewards import penalty_coefficient, proxy_correlation
from scoredraw.rl.tabular_control import occupancy_measure, soft_policy, solve_regularized
from scoredraw.rl.tomato_world import TomatoModel, TomatoWorld, read_board, tomato_model

pytestmark = pytest.mark.golden

KINDS = {"sqrt_chi2": "sqrt_chi2", "kl_occupancy": "kl", "kl_action": "action_kl"}


@pytest.fixture(scope="module")
def case(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("39-orpo-chi2-tomato.json")


def close(case: dict[str, Any], got: Any, name: str) -> None:
    tolerance = case["tolerance"]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(case["outputs"][name], np.float64),
        rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=name,
    )  # fmt: skip


def test_every_output_is_checked_here(case: dict[str, Any]) -> None:
    chi2 = {f"chi2_{name}" for name in ("categorical", "diag_gaussian", "beta", "trimmed_mean")}
    penalties = {f"penalty_{kind}" for kind in ("kl", "chi2", "sqrt_chi2", "tv")}
    both = {"bits", "true_reward", "proxy_reward"}
    tomato = {f"tomato_{name}" for name in both | {"agent_pos", "all_watered"}}
    correct = {f"tomato_{name}_correct_drying" for name in both}
    assert set(case["outputs"]) == chi2 | penalties | tomato | correct | {"num_accessible"}


def test_chi2_of_distributions(case: dict[str, Any]) -> None:
    inputs = {k: v for k, v in case["inputs"].items() if k in {"cat_p", "cat_q", "gauss", "beta"}}
    g = {k: torch.tensor(v, dtype=torch.float64) for k, v in inputs["gauss"].items()}
    b = {k: torch.tensor(v, dtype=torch.float64) for k, v in inputs["beta"].items()}
    p, q = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("cat_p", "cat_q"))
    close(case, chi2_divergence(Categorical(p), Categorical(q)), "chi2_categorical")
    close(case, divergence(p, q, "chi2"), "chi2_categorical")
    gaussians = (Independent(Normal(g[f"mean_{x}"], g[f"std_{x}"]), 1) for x in "pq")
    close(case, chi2_divergence(*gaussians), "chi2_diag_gaussian")
    betas = (Independent(Beta(b[f"a_{x}"], b[f"b_{x}"]), 1) for x in "pq")
    close(case, chi2_divergence(*betas), "chi2_beta")


def test_penalties(case: dict[str, Any]) -> None:
    logits = torch.tensor(case["inputs"]["discriminator_logits"])
    for kind in ("kl", "chi2", "sqrt_chi2", "tv"):
        close(case, pointwise_divergence(logits, kind), f"penalty_{kind}")
    ratio = pointwise_divergence(logits, "chi2") / pointwise_divergence(logits, "sqrt_chi2")
    close(case, ratio.median() ** 2, "chi2_trimmed_mean")


@pytest.mark.parametrize("official", [True, False])
def test_a_walk_in_the_garden(case: dict[str, Any], official: bool) -> None:
    inputs = case["inputs"]["tomato"]
    world = TomatoWorld(
        inputs["board"], factor=inputs["reward_factor"], dry_distance=inputs["dry_distance"],
        horizon=inputs["horizon"], official_drying=official,
    )  # fmt: skip
    world.reset()
    steps = [world.step(action) for action in inputs["actions"]]
    suffix = "" if official else "_correct_drying"
    close(case, [seen["tomatoes"] for seen, *_ in steps], f"tomato_bits{suffix}")
    close(case, [reward for _, reward, *_ in steps], f"tomato_proxy_reward{suffix}")
    true = [info["true_reward"] for *_, info in steps]
    close(case, true, f"tomato_true_reward{suffix}")
    close(case, [info["position"] for *_, info in steps], "tomato_agent_pos")
    if official:
        close(case, [everything for _, _, everything, *_ in steps], "tomato_all_watered")
    close(case, len(world.garden.cells), "num_accessible")


# ── exact optima ────────────────────────────────────────────────────────────────────────────────


class Setting(NamedTuple):
    golden: dict[str, Any]
    model: TomatoModel
    gamma: float
    mu_ref: Any


@pytest.fixture(scope="module")
def setting(golden: Callable[[str], dict[str, Any]]) -> Setting:
    table = golden("39-orpo-tabular.json")
    inputs = table["inputs"]
    model = tomato_model(
        inputs["board"], factor=inputs["reward_factor"], dry_distance=inputs["dry_distance"],
        random_actions=inputs["random_action_prob"],
    )  # fmt: skip
    gamma, mix = inputs["gamma"], inputs["ref_mix"]
    soft = soft_policy(model.transitions, model.true, gamma, inputs["soft_value_temperature"])
    policy = mix * soft + (1 - mix) / 4
    mu_ref = occupancy_measure(model.transitions, policy, gamma, model.start)
    return Setting(table, model, gamma, mu_ref)


def test_the_reference_and_the_extremes(setting: Setting) -> None:
    table, model, gamma, mu_ref = setting
    r, sigma = proxy_correlation(model.proxy, model.true, mu_ref)
    mean = (mu_ref * model.true).sum()
    got = {
        "num_states": len(model.true),
        "num_tomatoes": model.watered.shape[1],
        "num_accessible": len(read_board(table["inputs"]["board"]).cells),
        "J_true_ref": mean,
        "J_proxy_ref": (mu_ref * model.proxy).sum(),
        "sd_true": np.sqrt((mu_ref * (model.true - mean) ** 2).sum()),
        "sd_proxy": sigma,
        "corr": r,
        "lambda_theory": penalty_coefficient(r, sigma),
    }
    rest = {"true_optimal", "proxy_optimal", "solutions"}
    assert set(table["outputs"]) == set(got) | rest
    for name, value in got.items():
        want = table["outputs"][name]
        assert value == pytest.approx(want, rel=table["tolerance"]["rtol"]), name
    for name, rewards in (("true_optimal", model.true), ("proxy_optimal", model.proxy)):
        best = soft_policy(model.transitions, rewards, gamma)
        mu = occupancy_measure(model.transitions, best, gamma, model.start)
        for key, want in table["outputs"][name].items():
            value = (mu * (model.true if key == "J_true" else model.proxy)).sum()
            assert value == pytest.approx(want, rel=table["tolerance"]["J_rtol"]), (name, key)


@pytest.mark.parametrize("name", KINDS)
def test_regularised_optima(setting: Setting, name: str) -> None:
    table, model, gamma, mu_ref = setting
    tolerance = table["tolerance"]
    for coef, true, proxy, chi2 in table["outputs"]["solutions"][name]:
        found = solve_regularized(
            model.transitions, model.proxy, mu_ref, gamma, model.start, KINDS[name], coef
        )
        J = [(found.mu * rewards).sum() for rewards in (model.true, model.proxy)]
        assert [true, proxy] == pytest.approx(J, rel=tolerance["J_rtol"]), coef
        if chi2 < tolerance["chi2_compare_below"]:
            close = {"rel": tolerance["chi2_rtol"], "abs": tolerance["chi2_atol"]}
            got = divergence(found.mu.ravel(), mu_ref.ravel(), "chi2")
            assert float(got) == pytest.approx(chi2, **close), coef


def test_the_solutions_are_those_asked_for(setting: Setting) -> None:
    assert set(setting.golden["outputs"]["solutions"]) == set(KINDS)
