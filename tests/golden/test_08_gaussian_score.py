"""The Gaussian score against the authors' numbers: paths, scores, and the CIFAR-10 tables."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.gaussian_score import GaussianScore, edm_schedule
from scoredraw.diffusion.schedules import LinearBeta
from scoredraw.diffusion.score_models import EmpiricalScore, LowRankMixtureScore, isotropic_score
from scoredraw.diffusion.teleportation import ExplainedVariance, explained_variance

pytestmark = pytest.mark.golden

FILE = "08-gaussian-score.json"
REAL = Path(__file__).parents[3] / "shared" / "data" / "08-gaussian-score"


def arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(v) if isinstance(v, list) else v for name, v in given.items()}


def scores(given: dict[str, Any], sigma: float) -> dict[str, Any]:
    """The scores of models of X_data at X_query, under the names of the file."""
    X, x = given["X_data"], given["X_query"]
    models = {
        "gaussian_score": GaussianScore.fit(X),
        "mean_isotropic_score": isotropic_score(X, given["sigma0_isotropic"]),
        "delta_mixture_score": EmpiricalScore(X),
    }
    found: dict[str, Any] = {name: model.score(x, sigma) for name, model in models.items()}
    share = explained_variance(found["delta_mixture_score"], found["gaussian_score"])
    return {**found, "explained_var_gauss_vs_delta": share}


def paths(given: dict[str, Any]) -> dict[str, Any]:
    low = GaussianScore(given["mu"], given["eigvals"], given["eigvecs_U"])
    vp = low.with_schedule(LinearBeta(given["vp_beta0"], given["vp_beta1"]))
    gmm = arrays(given["gmm"])
    S = np.einsum("kde,ke,kfe->kdf", gmm["eigvecs"], gmm["eigvals"], gmm["eigvecs"])
    mixture = GaussianMixtureScore(gmm["weights"], gmm["means"], S, edm_schedule())
    return {
        "edm_trajectory": low.trajectory(given["xT"], given["sigma_T"], given["sigmas"]),
        "vp_trajectory": vp.trajectory(given["vp_xT"], 1.0, given["vp_times"]),
        "gmm_score": mixture.score(given["X_query"], gmm["sigma"]),
    }


def test_every_output_of_the_file(golden: Callable[[str], dict[str, Any]]) -> None:
    data = golden(FILE)
    given, outputs = arrays(data["inputs"]), data["outputs"]
    close = {"atol": data["tolerance"]["abs"], "rtol": data["tolerance"]["rel"]}
    ours = paths(given)
    assert set(outputs) == {*ours, "scores"}
    for name, want in ours.items():
        np.testing.assert_allclose(want, outputs[name], err_msg=name, **close)
    assert len(outputs["scores"]) == len(given["score_sigmas"])
    for sigma, wanted in outputs["scores"].items():
        found = scores(given, float(sigma))
        assert set(wanted) == set(found)
        for name, want in wanted.items():
            np.testing.assert_allclose(found[name], want, err_msg=f"{name} {sigma}", **close)


def test_a_mixture_of_full_rank_in_low_rank_form_has_the_same_score(
    golden: Callable[[str], dict[str, Any]],
) -> None:
    data = golden(FILE)
    given = arrays(data["inputs"])
    gmm = arrays(given["gmm"])
    low = LowRankMixtureScore(gmm["weights"], gmm["means"], gmm["eigvals"], gmm["eigvecs"])
    found = low.score(given["X_query"], gmm["sigma"])
    np.testing.assert_allclose(found, data["outputs"]["gmm_score"], rtol=1e-8, atol=1e-8)


def test_far_away_the_training_set_of_the_file_is_its_gaussian(
    golden: Callable[[str], dict[str, Any]],
) -> None:
    given = arrays(golden(FILE)["inputs"])
    sigmas = (0.3, 1.0, 3.0, 10.0)
    shares = [scores(given, s)["explained_var_gauss_vs_delta"] for s in sigmas]
    assert (np.diff(shares) > 0).all()
    assert shares[2] > 0.9995


# ------------------------------------------------------------------ the authors' CIFAR-10 tables


@pytest.fixture(scope="module")
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("the CIFAR-10 tables may not be shipped: they lie beside a checkout only")
    return REAL


def table(file: Path) -> dict[str, Any]:
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    text = {"name", "model"}
    return {
        key: np.array([row[key] if key in text else float(row[key]) for row in rows])
        for key in rows[0]
    }


def shares_of(real: Path, name: str, column: str = "St_EV") -> ExplainedVariance:
    """A model's row of the table by noise level, as our own measurements are held."""
    found = table(real / "cifar10_edm_score_explained_variance.csv")
    mine = found["name"] == name
    order = np.argsort(found["sigma"][mine])
    sigmas, values = found["sigma"][mine][order], found[column][mine][order]
    nothing, each = np.full(len(sigmas), np.nan), np.zeros((len(sigmas), 0))
    return ExplainedVariance(sigmas, values, nothing, nothing, nothing, each, each)


def at(ev: ExplainedVariance, sigma: float) -> float:
    (index,) = np.flatnonzero(np.isclose(ev.sigmas, sigma))
    return float(ev.score[index])


def test_the_gaussian_explains_the_more_the_higher_the_noise(real: Path) -> None:
    gaussian, delta = shares_of(real, "gaussian"), shares_of(real, "gmm delta")
    isotropic = shares_of(real, "mean isotropic")
    assert len(gaussian.sigmas) == 16
    upper = gaussian.sigmas >= 0.05
    assert (np.diff(gaussian.score[upper]) > 0).all()
    assert (gaussian.score[gaussian.sigmas >= 2] >= 0.9957 - 5e-5).all()
    low = gaussian.sigmas <= 5
    assert (gaussian.score[low] > delta.score[low]).all()
    assert (gaussian.score > isotropic.score).all()
    expected = {
        (0.1, "gaussian"): 0.8183, (1.0, "gaussian"): 0.9843, (2.0, "gaussian"): 0.9957,
        (5.0, "gaussian"): 0.9996, (1.0, "gmm delta"): 0.9722, (0.1, "gmm delta"): 0.7862,
        (0.01, "gmm delta"): -0.2367,
    }  # fmt: skip
    for (sigma, name), value in expected.items():
        assert at(shares_of(real, name), sigma) == pytest.approx(value, abs=6e-5)


def test_how_far_the_tables_allow_to_skip(real: Path) -> None:
    gaussian, isotropic = shares_of(real, "gaussian"), shares_of(real, "mean isotropic")
    assert gaussian.skip(0.999) == 5.0
    assert gaussian.skip(0.995) == 2.0
    assert gaussian.skip(0.999) < (isotropic.skip(0.999) or np.inf)
    assert gaussian.skip(2.0) is None


def test_mixtures_of_low_rank_collapse_at_low_noise(real: Path) -> None:
    full, delta = shares_of(real, "gmm_100_mode_3072_rank"), shares_of(real, "gmm delta")
    low = (full.sigmas >= 0.05) & (full.sigmas <= 0.5)
    assert low.sum() >= 3
    assert (full.score[low] >= delta.score[low]).all()
    assert at(shares_of(real, "gmm_100_mode_8_rank"), 0.1) < -5
    assert at(shares_of(real, "gmm_100_mode_512_rank"), 0.05) < at(delta, 0.05)


def test_which_path_ends_nearest_to_the_networks_sample(real: Path) -> None:
    found = table(real / "cifar10_edm_sample_vs_analytic.csv")
    mean = {m: found["MSE"][found["model"] == m].mean() for m in ("GMM", "Gaussian", "Delta")}
    assert (found["model"] == "GMM").sum() == 512
    rounded = {model: round(float(value), 4) for model, value in mean.items()}
    assert rounded == {"GMM": 0.0118, "Gaussian": 0.0130, "Delta": 0.0473}
