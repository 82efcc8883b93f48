"""A small network trained on table rows, and what its weights say about each row in closed form.

A scikit-learn multilayer perceptron (or multinomial logistic regression, the same without a
hidden layer), driven by `partial_fit`. Its weights at a checkpoint give logits, the gradient of
each label's logit at the features, and the length of each row's loss gradient, exactly and for all
rows at once:

    h_l = relu(h_{l-1} W_l + b_l),   delta_L = p - onehot(y),
    delta_l = [h_l > 0] (delta_{l+1} W_{l+1}'),
    |gradient|^2 = sum_l |delta_l|^2 (|h_{l-1}|^2 + 1).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.influence import Array

ProbeKind = Literal["mlp", "logistic"]
Index = NDArray[np.int64]

HIDDEN = (64, 64)
LEARNING_RATE = 1e-3
CHECKPOINTS = 10
LOOKS_PER_EPOCH = 4

_ROWS = 8192  # what a closed form holds at a time: this many rows of every layer


# ── One network, as its weights ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Network:
    """A probe's weights at one moment: `weights[l]` (in, out), `biases[l]` (out,).

    A binary probe has a single output z; its two logits are -z/2 and z/2.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    def layers(self, x: Array) -> list[Array]:
        """Input, hidden layers after their ReLU, raw output: (n, width) each."""
        values = [x]
        for w, b in zip(self.weights, self.biases, strict=True):
            values.append(values[-1] @ w + b)
            if len(values) <= len(self.weights):  # not the output
                np.maximum(values[-1], 0.0, out=values[-1])
        return values

    def logits(self, x: Array) -> Array:
        """Class scores, (n, C)."""
        return _in_blocks(lambda block: _two_columns(self.layers(block)[-1]), x)

    def last_hidden(self, x: Array) -> Array:
        """What the output layer sees, (n, H): the features themselves without hidden layers."""
        return _in_blocks(lambda block: self.layers(block)[-2], x)

    def input_gradients(self, x: Array, y: Index) -> Array:
        """Gradient of each label's logit with respect to the (standardised) features, (n, d)."""

        def gradient(block: Array, labels: Index) -> Array:
            hidden = self.layers(block)[1:-1]
            g = _two_columns(self.weights[-1]).T[labels]
            for w, h in zip(self.weights[-2::-1], hidden[::-1], strict=True):
                g = (g * (h > 0)) @ w.T
            return g

        return _in_blocks(gradient, x, y)

    def squared_gradient_norms(self, x: Array, y: Index) -> Array:
        """Squared length of each row's cross-entropy gradient over all weights and biases, (n,)."""

        def square(block: Array, labels: Index) -> Array:
            *hidden, output = self.layers(block)
            delta = _output_error(output, labels)
            total = np.zeros(len(block))
            for w, h in zip(self.weights[::-1], hidden[::-1], strict=True):
                total += np.square(delta).sum(axis=1) * (np.square(h).sum(axis=1) + 1.0)
                delta = (delta @ w.T) * (h > 0)
            return total

        return _in_blocks(square, x, y)


def _two_columns(output: Array) -> Array:
    return output if output.shape[-1] > 1 else np.concatenate([-output / 2, output / 2], axis=-1)


def _output_error(output: Array, labels: Index) -> Array:
    """Gradient of cross-entropy at the raw outputs: p - onehot(y), or p - y for a single one."""
    from scipy.special import expit, softmax

    if output.shape[1] == 1:
        return np.asarray(expit(output) - labels[:, None])
    error = np.asarray(softmax(output, axis=1))
    error[np.arange(len(labels)), labels] -= 1.0
    return error


def _in_blocks(function: Callable[..., Array], *arrays: Any) -> Array:
    starts = range(0, len(arrays[0]), _ROWS)
    parts = [function(*(array[start : start + _ROWS] for array in arrays)) for start in starts]
    return np.concatenate(parts)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProbeRun:
    """What one seed's training leaves: weights after each epoch, looks at the whole set.

    checkpoints: one `Network` an epoch. correct: (T, n) bool, a few times an epoch, or (0, n).
    seconds: training time up to the end of each epoch; look_seconds: spent on `correct`.
    """

    checkpoints: tuple[Network, ...]
    correct: NDArray[np.bool_]
    seconds: tuple[float, ...]
    look_seconds: float

    def evenly(self, count: int = CHECKPOINTS) -> list[Network]:
        """At most `count` checkpoints, evenly spaced, the last among them."""
        total = len(self.checkpoints)
        places = np.unique(np.linspace(total, 0, min(count, total), endpoint=False).round())
        return [self.checkpoints[int(place) - 1] for place in places]


def train_probe(
    x: Array,
    y: Index,
    *,
    probe: ProbeKind = "mlp",
    epochs: int = 10,
    looks: bool = False,
    seed: int = 0,
    after_epoch: Callable[[], None] | None = None,
) -> ProbeRun:
    """Train one probe on standardised features (n, d) and labels 0..C-1, keeping its traces.

    Adam, 1e-3, batches of n/30 rows between 16 and 128, no weight decay. With `looks` the
    whole set is classified four times an epoch, for `correct`. Epoch e ends in the same weights
    whether or not anybody looks and however many epochs follow. Time O(epochs n weights).
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    order = np.random.default_rng([seed, 1])
    batch = int(np.clip(len(x) // 30, min(16, len(x)), 128))
    network = MLPClassifier(
        hidden_layer_sizes=HIDDEN if probe == "mlp" else (),
        learning_rate_init=LEARNING_RATE,
        batch_size=batch,
        alpha=0.0,
        shuffle=False,
        random_state=np.random.RandomState(seed),
    )
    classes = np.arange(int(y.max()) + 1)
    pieces = max(1, min(LOOKS_PER_EPOCH, len(x) // batch))
    checkpoints: list[Network] = []
    correct: list[NDArray[np.bool_]] = []
    ended: list[float] = []
    look_seconds = 0.0
    started = time.perf_counter()
    # one BLAS thread: these products are too small to share out, and rounding stays the same
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of every short last batch
        for _ in range(epochs):
            for rows in np.array_split(order.permutation(len(x)), pieces):
                network.partial_fit(x[rows], y[rows], classes=classes)
                if looks:
                    before = time.perf_counter()
                    correct.append(_snapshot(network).logits(x).argmax(axis=1) == y)
                    look_seconds += time.perf_counter() - before
            checkpoints.append(_snapshot(network))
            ended.append(time.perf_counter() - started - look_seconds)
            if after_epoch is not None:
                after_epoch()
    seen = np.array(correct) if correct else np.zeros((0, len(x)), dtype=bool)
    return ProbeRun(tuple(checkpoints), seen, tuple(ended), look_seconds)


def _snapshot(network: Any) -> Network:
    return Network(
        tuple(np.array(w, dtype=np.float64) for w in network.coefs_),
        tuple(np.array(b, dtype=np.float64) for b in network.intercepts_),
    )
