"""The learners of a bake-off: scikit-learn's, fitted with the weights of a draw."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.errors import InputError, require

Float = NDArray[np.float64]

MODELS = {
    "classification": ("logistic", "ridge", "mlp", "boosting"),
    "regression": ("ridge", "mlp", "boosting"),
}
METRIC = {"classification": "accuracy", "regression": "R²"}
LOSS = {"classification": "log-loss", "regression": "RMSE"}
FLOOR = 1e-4  # least probability in the log-loss: a class that was not drawn has none


def choose(model: str | None, task: str) -> str:
    """The model's name, the task's first by default; `InputError` where it can't do the task."""
    if model is None:
        return MODELS[task][0]
    require(model in MODELS[task], "model", repr(model), f"one of {', '.join(MODELS[task])}")
    if "sample_weight" not in signature(build(model, task, 0).fit).parameters:
        raise InputError(f"model: got {model!r} without weights, want scikit-learn 1.7 or newer")
    return model


def build(model: str, task: str, seed: int) -> Any:
    """An unfitted scikit-learn estimator."""
    from sklearn import ensemble, linear_model, neural_network

    classify = task == "classification"
    if model == "logistic":
        return linear_model.LogisticRegression()
    if model == "ridge":
        return linear_model.RidgeClassifier() if classify else linear_model.Ridge()
    if model == "mlp":
        kind = neural_network.MLPClassifier if classify else neural_network.MLPRegressor
        return kind(hidden_layer_sizes=(64,), max_iter=200, random_state=seed)
    kind = (
        ensemble.HistGradientBoostingClassifier
        if classify
        else ensemble.HistGradientBoostingRegressor
    )
    return kind(random_state=seed)


def fit_and_judge(
    model: str,
    task: str,
    train: tuple[Float, NDArray[Any], Float],
    test: tuple[Float, NDArray[Any]],
    *,
    classes: int,
    seed: int,
) -> tuple[float, float | None]:
    """Fit on (x, y, weights), then metric and loss on (x, y).

    -> (accuracy, log-loss or None) or (R², root mean squared error). A draw of one class predicts
    that class; log-loss counts probabilities under 1e-4 as 1e-4.
    """
    x, y, weights = train
    test_x, test_y = test
    if task == "regression" and len(y) == 0:  # a scheme of random size may keep nothing
        return regression_quality(np.zeros(len(test_y)), test_y)
    if task == "regression":
        return regression_quality(fitted(model, task, x, y, weights, seed).predict(test_x), test_y)
    seen = np.unique(y)
    probability = np.zeros((len(test_y), classes))
    if len(seen) < 2:
        probability[:, seen] = 1.0
    else:
        learner = fitted(model, task, x, y, weights, seed)
        if not hasattr(learner, "predict_proba"):
            return float(np.mean(learner.predict(test_x) == test_y)), None
        probability[:, learner.classes_] = learner.predict_proba(test_x)
    accuracy = float(np.mean(probability.argmax(axis=1) == test_y))
    probability = np.maximum(probability, FLOOR)
    probability /= probability.sum(axis=1, keepdims=True)
    loss = -np.log(probability[np.arange(len(test_y)), test_y]).mean()
    return accuracy, float(loss)


def fitted(model: str, task: str, x: Float, y: NDArray[Any], weights: Float, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # a fit that stops early is still the model that would be used; small draws often do
        warnings.simplefilter("ignore", ConvergenceWarning)
        return build(model, task, seed).fit(x, y, sample_weight=weights)


def regression_quality(predicted: Float, y: Float) -> tuple[float, float]:
    """R² and root mean squared error."""
    squares = float(np.mean((predicted - y) ** 2))
    return 1 - squares / float(np.var(y)), float(np.sqrt(squares))
