"""Transport, its gradient by source, the fitted forms and the projection against other code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scoredraw.data_selection.mixture_performance import MixturePerformanceModel, project_size
from scoredraw.data_selection.source_transport import ot_with_source_gradient, otdd_cost

pytestmark = pytest.mark.golden

FILE = "46-projektor.json"
# name in the file -> form here, and where each of its coefficients stands among the file's
FITS = {
    "paper_form_reduced": ("pq-ot", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "official_notebook_form": ("pq-ot-code", [0, 1, 2, 3, 4, 6, 5]),
}


@pytest.fixture(scope="module")
def data(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden(FILE)


@pytest.fixture(scope="module")
def cost(data: dict[str, Any]) -> np.ndarray:
    points = np.concatenate([np.array(source) for source in data["inputs"]["sources"]])
    return otdd_cost(points, None, data["inputs"]["validation"], None)


@pytest.fixture(scope="module")
def sizes(data: dict[str, Any]) -> list[int]:
    return [len(source) for source in data["inputs"]["sources"]]


def test_no_output_is_left_out(data: dict[str, Any]) -> None:
    assert set(data["outputs"]) == {
        "ot_sqeuclidean", "calibrated_gradient", "finite_difference_forward",
        "finite_difference_backward", "fits", "projection", "feature_order",
    }  # fmt: skip
    assert set(data["outputs"]["fits"]) == set(FITS)


def test_value(data: dict[str, Any], cost: np.ndarray, sizes: list[int]) -> None:
    value, _, _ = ot_with_source_gradient(cost, sizes)
    assert value == pytest.approx(
        data["outputs"]["ot_sqeuclidean"], rel=data["tolerance"]["ot_rel"]
    )


def test_gradient_lies_between_the_difference_quotients(
    data: dict[str, Any], cost: np.ndarray, sizes: list[int]
) -> None:
    out, slack = data["outputs"], data["tolerance"]["gradient_slack_abs"]
    gradient = ot_with_source_gradient(cost, sizes).gradient
    forward = np.array(out["finite_difference_forward"])
    backward = np.array(out["finite_difference_backward"])
    for each in (gradient, np.array(out["calibrated_gradient"])):
        assert (backward - slack <= each).all()
        assert (each <= forward + slack).all()


def test_difference_quotients(data: dict[str, Any], cost: np.ndarray, sizes: list[int]) -> None:
    """Ours, by moving mass to a source in proportion from the others."""
    p, step = np.array(sizes) / sum(sizes), 1e-5
    at_p = ot_with_source_gradient(cost, sizes).value
    for i in range(len(sizes)):
        direction = -p / (1 - p[i])
        direction[i] = 1
        ahead, behind = (
            ot_with_source_gradient(cost, sizes, p + s * step * direction).value for s in (1, -1)
        )
        got = ((ahead - at_p) / step, (at_p - behind) / step)
        want = [data["outputs"][f"finite_difference_{side}"][i] for side in ("forward", "backward")]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FITS)
def test_fit(data: dict[str, Any], name: str) -> None:
    form, place = FITS[name]
    given, want = data["inputs"], data["outputs"]["fits"][name]
    model = MixturePerformanceModel(form)
    model.fit(given["mixtures"], given["ot"], given["performance"])
    near = {"rtol": 0, "atol": data["tolerance"]["fit_abs"]}
    np.testing.assert_allclose(model.coef_, np.array(want["coef"])[place], **near)
    np.testing.assert_allclose(model.intercept_, want["intercept"], **near)
    np.testing.assert_allclose(model.predict(given["mixtures"], given["ot"]), want["pred"], **near)
    named = data["outputs"]["feature_order"][name].split("]")[0].strip("[").split(",")
    ours = [
        term.replace("OT p1^2", "p1^2*OT").replace("OT p2^2", "p2^2*OT") for term in model.terms_
    ]
    ours = ["*".join(reversed(term.split(" "))) for term in model.terms_]  # they write p1*OT
    assert ours == [named[i] for i in place]


def test_projection(data: dict[str, Any]) -> None:
    given = data["inputs"]
    points = (given["perf_N0"], given["perf_N1"], given["N0"], given["N1"])
    assert data["outputs"]["projection"]
    for n, want in data["outputs"]["projection"].items():
        if int(n) > 5000:
            with pytest.warns(UserWarning, match="by 7.4"):
                got = project_size(*points, int(n))
        else:
            got = project_size(*points, int(n))
        assert got == pytest.approx(want, abs=data["tolerance"]["projection_abs"])
