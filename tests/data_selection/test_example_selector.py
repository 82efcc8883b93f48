"""The scikit-learn selector of examples: its checks, every method, its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks

from scoredraw import registry
from scoredraw.data_selection.example_selector import ExampleSelector
from scoredraw.data_selection.probe import score_pvi
from scoredraw.errors import InputError

pytestmark = pytest.mark.contract

X, Y = load_iris(return_X_y=True)
METHODS = [m.name for m in registry.methods("examples") if not m.takes]


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [ExampleSelector("uniform", size=5), ExampleSelector("el2n", size=5, options={"seeds": 1})]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    selector = ExampleSelector(method, size=0.2, random_state=3)
    x, y = selector.fit_resample(X, Y)
    assert (x == X[selector.sample_indices_]).all()
    assert (y == Y[selector.sample_indices_]).all()
    assert len(np.unique(selector.sample_indices_)) == len(y) == 30
    assert selector.sample_weight_.mean() == pytest.approx(1)
    assert selector.get_support(indices=True).tolist() == sorted(selector.sample_indices_)
    again = ExampleSelector(method, size=0.2, random_state=3).fit(X, Y)
    assert (again.sample_indices_ == selector.sample_indices_).all()


def test_a_score_whose_high_end_is_easy_keeps_the_low_end() -> None:
    selector = ExampleSelector("pvi", size=15, random_state=0).fit(X, Y)
    bits = score_pvi(X, Y, rng=0)
    assert set(selector.sample_indices_) == set(np.argsort(bits)[:15])


def test_names_of_classes_and_other_schemes() -> None:
    names = np.array(["a", "b", "c"])[Y]
    chosen = ExampleSelector("el2n", size=30, scheme="pivotal", random_state=0).fit(X, names)
    assert chosen.classes_.tolist() == ["a", "b", "c"]
    assert chosen.draw_.unbiased
    with_options = ExampleSelector("el2n", size=30, options={"epochs": 1}, random_state=0)
    assert not np.array_equal(with_options.fit(X, Y).scores_, chosen.scores_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "el3n"}, "^method: got 'el3n'"),
        ({"method": "ches"}, "^method: got 'ches', want one of uniform"),
        ({"size": 151}, "^size: got 151, want 1 to 150"),
        ({"size": 0}, "^size: got 0"),
        ({"scheme": "dice"}, "^scheme: got 'dice'"),
        (
            {"method": "quad", "scheme": "poisson"},
            "^scheme: got 'poisson', want none: quad makes the whole",
        ),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        ExampleSelector(**arguments).fit(X, Y)
    assert "\n" not in str(error.value)
