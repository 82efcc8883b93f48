"""EK-FAC influence against kronfluence, and gradient dot products against per-sample gradients.

The network is an MLP of a million weights on Fashion-MNIST, trained for a moment. Both sides of a
contest get one thread.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contest import Contest
from scoredraw.data_selection.gradient_influence import (
    linear_gradient_dots,
    linear_influence,
    mean_gradient,
)
from scoredraw.data_selection.kronecker import KFACFactors
from scoredraw.data_selection.linear_traces import TraceReader
from scoredraw.datasets import load
from scoredraw.papers.training import one_thread

DAMPING, BATCH = 1e-3, 250


def influence(*, tiny: bool = False) -> Iterator[Contest]:
    """Factors and influence of a pool on a reference; dot products of two sets of gradients."""
    x, y = _images()
    model = _network(x, y, (32, 16) if tiny else (800, 450))
    pool, reference = (300, 50) if tiny else (5000, 200)
    train = x[:pool], y[:pool]
    yield _against_kronfluence(model, train, (x[-reference:], y[-reference:]))
    sizes = (8, 6) if tiny else (64, 64)
    first, second = (x[: sizes[0]], y[: sizes[0]]), (x[-sizes[1] :], y[-sizes[1] :])
    yield _against_vmap(model, first, second)


def _against_kronfluence(
    model: nn.Module, train: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]
) -> Contest:
    """The empirical Fisher and the same damping on both sides; the queries are summed up first."""
    batches = [
        tuple(part[at : at + BATCH] for part in train) for at in range(0, len(train[1]), BATCH)
    ]

    def ours() -> np.ndarray:
        factors = KFACFactors.fit(model, batches)
        reader = TraceReader(model)
        P = factors.ihvp(mean_gradient(reader, [reference]), DAMPING)
        return linear_influence(reader, batches, P)

    weights = sum(p.numel() for p in model.parameters())
    what = f"EK-FAC and influence, {weights:,} weights, {len(train[1]):,} examples"
    peer = _kronfluence(model, train, reference)
    return Contest(what, "kronfluence", _alone(ours), _alone(peer), _same_ranks, 1.0, repeats=1)


def _kronfluence(
    model: nn.Module, train: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]
) -> Callable[[], np.ndarray]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample  # the empirical Fisher
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    prepared = prepare_model(deepcopy(model), task)
    factor = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    score = ScoreArguments(damping_factor=DAMPING, aggregate_query_gradients=True)
    sets = TensorDataset(*train), TensorDataset(*reference)

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.cuda.amp, which it still asks for
            analyzer = Analyzer(
                "contest", prepared, task, cpu=True, disable_tqdm=True, log_level=logging.ERROR,
                output_dir=folder,
            )  # fmt: skip
            analyzer.fit_all_factors(
                "factors", sets[0], per_device_batch_size=BATCH, factor_args=factor
            )
            analyzer.compute_pairwise_scores(
                "scores", "factors", sets[1], sets[0], per_device_query_batch_size=BATCH,
                per_device_train_batch_size=BATCH, score_args=score,
            )  # fmt: skip
            return analyzer.load_pairwise_scores("scores")["all_modules"][0].numpy()

    return run


def _against_vmap(
    model: nn.Module, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> Contest:
    """The gradients of each example by torch.func, and one matrix product a parameter."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, weights, (x[None],))
        return nn.functional.cross_entropy(outputs, y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def theirs() -> Tensor:
        left, right = each(weights, *first), each(weights, *second)
        return sum(left[k].flatten(1) @ right[k].flatten(1).T for k in left)

    def ours() -> Tensor:
        return linear_gradient_dots(model, first, second)

    what = f"dot products of {len(first[1])} x {len(second[1])} gradients, linear layers"
    return Contest(what, "torch.func.vmap", _alone(ours), _alone(theirs), _close, 1 / 5)


# ------------------------------------------------------------------ what both sides are given


def _images() -> tuple[Tensor, Tensor]:
    data = load("fashion-mnist")
    return torch.tensor(data.x, dtype=torch.float32) / 255, torch.tensor(data.y)


def _network(x: Tensor, y: Tensor, widths: tuple[int, int]) -> nn.Module:
    """Sixty steps from a fixed start: labels are neither known by heart nor unknown."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, widths[0]),
        nn.ReLU(),
        nn.Linear(*widths),
        nn.ReLU(),
        nn.Linear(widths[1], 10),
    )
    optimiser = torch.optim.Adam(model.parameters())
    for rows in torch.randint(len(y), (60, 128)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    return model


def _alone(function: Callable[[], Any]) -> Callable[[], Any]:
    """On one thread."""

    def run() -> Any:
        with one_thread():
            return function()

    return run


def _same_ranks(ours: np.ndarray, theirs: np.ndarray) -> None:
    from scipy.stats import spearmanr

    assert spearmanr(ours, theirs)[0] >= 0.99


def _close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=1e-5)
