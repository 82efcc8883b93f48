"""DEALRec's score, groups and budgets by the released program; influence in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from scoredraw.data_selection.coverage_selection import combined_score, coverage_select
from scoredraw.data_selection.influence_on_risk import influence_on_risk
from scoredraw.data_selection.inverse_hessian import inverse_hessian_product
from scoredraw.papers import sequence_recommenders as recommenders

pytestmark = pytest.mark.golden

FILE = "10-dealrec.json"
SEQUENCES = Path(__file__).parents[3] / "shared" / "data" / "10-dealrec-games-sequences"


class Logistic:
    """Ridge logistic regression: the mean log loss plus l2/2 |theta|^2, no intercept."""

    def __init__(self, x: np.ndarray, y: np.ndarray, l2: float) -> None:
        self.x, self.y, self.l2 = x, y, l2

    def fit(self, keep: np.ndarray) -> np.ndarray:
        """The minimiser without the rows left out, still over n; Newton steps to the end."""
        x, y, n = self.x[keep], self.y[keep], len(self.x)

        def objective(theta: np.ndarray) -> float:
            signs = (1 - 2 * y) * (x @ theta)
            return float(np.logaddexp(0, signs).sum() / n + self.l2 / 2 * theta @ theta)

        theta = minimize(objective, np.zeros(x.shape[1])).x
        for _ in range(20):
            p = expit(x @ theta)
            gradient = x.T @ (p - y) / n + self.l2 * theta
            hessian = (x.T * (p * (1 - p))) @ x / n + self.l2 * np.eye(len(theta))
            theta = theta - np.linalg.solve(hessian, gradient)
        return np.asarray(theta)

    def risk(self, theta: np.ndarray) -> float:
        return float(np.logaddexp(0, (1 - 2 * self.y) * (self.x @ theta)).mean())

    def gradients(self, theta: np.ndarray) -> np.ndarray:
        return np.asarray(self.x * (expit(self.x @ theta) - self.y)[:, None])

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        p = expit(self.x @ theta)
        eye = np.eye(self.x.shape[1])
        return np.asarray((self.x.T * (p * (1 - p))) @ self.x / len(p) + self.l2 * eye)


def computed(inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each golden output's name and how it is computed here."""
    score = combined_score(inputs["influence"], inputs["effort"], effort_weight=inputs["lambda"])
    chosen = coverage_select(
        score, inputs["budget"], n_groups=inputs["groups"], hard_prune=inputs["hard_prune"], rng=0
    )
    kept = np.flatnonzero(chosen.groups >= 0)
    model = Logistic(np.array(inputs["X"]), np.array(inputs["y"]), inputs["l2"])
    everyone = np.ones(len(model.y), bool)
    theta = model.fit(everyone)
    gradients, hessian = model.gradients(theta), model.hessian(theta)
    v = gradients.mean(axis=0)

    def leave_one_out() -> list[float]:
        alone = [model.fit(np.arange(len(model.y)) != i) for i in range(len(model.y))]
        return [model.risk(one) - model.risk(theta) for one in alone]

    def recursion() -> Any:
        return inverse_hessian_product(
            hessian, v, solver="lissa", released=True, damping=inputs["damp"],
            scale=inputs["scale"], depth=5000,
        )  # fmt: skip

    ridge = inputs["damp"] * inputs["scale"]
    return {
        "overall_score": lambda: score,
        "kept_after_hard_prune_sorted_desc": lambda: kept[np.argsort(-score[kept])],
        "group_sizes_low_to_high": lambda: chosen.sizes,
        "group_budgets_low_to_high": lambda: chosen.budgets,
        "official_group_counts": lambda: np.bincount(chosen.groups[chosen.indices]),
        "official_total_selected": lambda: len(chosen.indices),
        "theta": lambda: theta,
        "hinv_meangrad": lambda: inverse_hessian_product(hessian, v, damping=0.0),
        "influence_linear_loo_loss_change": lambda: influence_on_risk(
            gradients, hessian=hessian, solver="exact", damping=0.0
        ),
        "exact_loo_loss_change": leave_one_out,
        "recursion_after_5000_full_hessian_steps": recursion,
        "recursion_fixed_point": lambda: inputs["scale"] * inverse_hessian_product(
            hessian, v, damping=ridge
        ),
    }  # fmt: skip


TOLERANCES = {
    "overall_score": "score_abs",
    "theta": "theta_abs",
    "hinv_meangrad": "theta_abs",
    "exact_loo_loss_change": "loo_abs",
    "recursion_after_5000_full_hessian_steps": "recursion_abs",
    "recursion_fixed_point": "recursion_abs",
}


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    ours = computed(data["inputs"])
    assert data["outputs"], "a golden file without outputs"
    assert set(data["outputs"]) <= set(ours), "an output this test does not know"
    tolerance = data["tolerance"]
    for name, want in data["outputs"].items():
        got = np.asarray(ours[name]())
        if name == "influence_linear_loo_loss_change":
            np.testing.assert_allclose(got, want, rtol=tolerance["influence_rel"], err_msg=name)
        elif name in TOLERANCES:
            bound = tolerance[TOLERANCES[name]]
            np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


def test_the_linear_score_follows_retraining(golden: Callable[[str], dict[str, Any]]) -> None:
    ours = computed(golden(FILE)["inputs"])
    pair = [ours[f"{kind}_loo_loss_change"]() for kind in ("influence_linear", "exact")]
    assert np.corrcoef(*pair)[0, 1] == pytest.approx(0.97, abs=0.01)


def test_a_small_recommender_on_real_sequences() -> None:
    if not SEQUENCES.is_dir():
        pytest.skip("the sequences may not be shipped: they lie beside a checkout only")
    data = recommenders.load_sequences(SEQUENCES / "sequences.tsv")
    assert (data.n_users, data.n_items) == (4805, 1200)
    assert sum(len(later) > 0 for later in data.later) == 649
    assert len(data.pool) == 2403
    assert len(data.evaluated) == 318
    outcome = recommenders.sequence_seed(data, 0, recommenders.SMALL)
    assert set(outcome.ndcg) == set(recommenders.ARMS)
    assert all(0 <= value < 0.2 for value in outcome.ndcg.values())
    non_empty = outcome.bins["non-empty"]
    assert outcome.bins["DEALRec"] == non_empty
    assert outcome.bins["greedy top-score"] < non_empty
