"""Many small classifiers trained at once: the kit of the data-selection experiments.

Comparing ways to choose training examples needs the same little network trained again and again:
ten seeds, several subsets. Each training alone is all overhead and no arithmetic. Here S members
with the same layer sizes are trained together: every layer is one (S, in, out) tensor, a step is
one batched matrix product a layer,

    h_l = relu(h_{l-1} W_l + b_l),      logits = h_L W + b,

and because the loss is a *sum* over members, no member's gradient touches another's. A member is
initialised as `torch.nn.Linear` is, from its own seed, and updated by torch's Adam, so it ends up
where it would have ended alone, up to the rounding of the matrix products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scoredraw.errors import require

IntArray = NDArray[np.int64]


class DigitsSplit(NamedTuple):
    """The 8x8 digits, pixels scaled to [0, 1]: 1078 to train on and 719 to test on."""

    train_x: NDArray[np.float32]
    train_y: IntArray
    test_x: NDArray[np.float32]
    test_y: IntArray


def digits_split() -> DigitsSplit:
    """Scikit-learn's digits, pixels / 16, split 60 : 40 with the class shares kept.

    >>> [part.shape for part in digits_split()]
    [(1078, 64), (1078,), (719, 64), (719,)]
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), train_size=0.6, stratify=y, random_state=0
    )
    return DigitsSplit(train_x, train_y, test_x, test_y)


def minibatches(
    subsets: Sequence[ArrayLike],
    batch_size: int,
    rng: int | np.random.Generator | None = None,
    *,
    shuffle: bool = True,
) -> IntArray:
    """The rounds' subsets cut into batches: an int64 (steps, batch_size) table of row numbers.

    A round of m rows gives ceil(m / batch_size) batches, the last filled up with -1; no batch
    mixes two rounds. Each round's order is shuffled with `rng` unless `shuffle=False`.
    Stack one table a member (`np.stack`) for `train_ensemble`.

    >>> minibatches([[4, 5, 6], [7, 8]], 2, shuffle=False).tolist()
    [[4, 5], [6, -1], [7, 8]]
    """
    require(batch_size >= 1, "batch_size", batch_size, "a positive count")
    random = np.random.default_rng(rng)
    tables = []
    for subset in subsets:
        rows = np.asarray(subset, dtype=np.int64)
        require(rows.ndim == 1 and len(rows) > 0, "subsets", rows.shape, "one or more rows a round")
        table = np.full(-(-len(rows) // batch_size) * batch_size, -1, dtype=np.int64)
        table[: len(rows)] = random.permutation(rows) if shuffle else rows
        tables.append(table.reshape(-1, batch_size))
    require(len(tables) > 0, "subsets", "no round", "one or more rounds")
    return np.concatenate(tables)


@dataclass
class MLPEnsemble:
    """S multilayer perceptrons with ReLUs: `weights[l]` (S, in, out) and `biases[l]` (S, 1, out).

    Inputs are (N, D), the same for every member, or (S, N, D); what comes back are NumPy arrays
    with the member as the first axis.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]

    @classmethod
    def initialise(cls, sizes: Sequence[int], seeds: Sequence[int]) -> MLPEnsemble:
        """U(-1/sqrt(in), 1/sqrt(in)) for weights and biases, as `torch.nn.Linear` draws them."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        weights, biases = [], []
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(fan_in)
            w, b = [], []
            for g in generators:
                # torch stores a layer as (out, in); draw in that order, then turn it over
                w.append(torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=g).T)
                b.append(torch.empty(1, fan_out).uniform_(-bound, bound, generator=g))
            weights.append(torch.stack(w).contiguous().requires_grad_())
            biases.append(torch.stack(b).requires_grad_())
        return cls(weights, biases)

    @property
    def members(self) -> int:
        """How many networks there are."""
        return len(self.weights[0])

    def layers(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What every layer puts out, (S, N, width) each; the last are the logits."""
        h = x if x.ndim == 3 else x.expand(self.members, *x.shape)
        outputs = []
        for level, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b, h, w)
            if level < len(self.weights) - 1:
                h = torch.relu(h)
            outputs.append(h)
        return outputs

    def logits(self, x: ArrayLike) -> NDArray[np.float32]:
        """Class scores before the softmax: (S, N, C)."""
        return self._layer(x, -1)

    def hidden(self, x: ArrayLike) -> NDArray[np.float32]:
        """The last hidden layer, after its ReLU: (S, N, H)."""
        return self._layer(x, -2)

    def _layer(self, x: ArrayLike, level: int) -> NDArray[np.float32]:
        with one_thread(), torch.no_grad():
            output: NDArray[np.float32] = self.layers(_inputs(x))[level].numpy()
        return output

    def accuracy(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """The share of examples whose label has the largest logit: (S,)."""
        hits = self.logits(x).argmax(axis=-1) == np.asarray(y)
        share: NDArray[np.float64] = hits.mean(axis=-1, dtype=np.float64)
        return share

    def input_gradients(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float32]:
        """Gradient of the label's logit with respect to the input: (S, N, D).

        g_L = W[:, y], g_{l-1} = (g_l * [h_l > 0]) W_l'; the labels are (N,) or (S, N).
        """
        with one_thread(), torch.no_grad():
            inputs = _inputs(x)
            labels = torch.as_tensor(np.asarray(y, dtype=np.int64))
            labels = labels.expand(self.members, inputs.shape[-2])
            member = torch.arange(self.members)[:, None]
            g = self.weights[-1].transpose(1, 2)[member, labels]
            hidden = self.layers(inputs)[:-1]
            for w, h in zip(reversed(self.weights[:-1]), reversed(hidden), strict=True):
                g = torch.bmm(g * (h > 0), w.transpose(1, 2))
            gradient: NDArray[np.float32] = g.numpy()
        return gradient


def train_ensemble(
    x: ArrayLike,
    y: ArrayLike,
    batches: IntArray,
    *,
    n_classes: int,
    hidden: Sequence[int] = (64, 64),
    learning_rate: float = 3e-3,
    schedule: str = "cosine",
    weights: ArrayLike | None = None,
    seed: int | Sequence[int] = 0,
    checkpoint_steps: Sequence[int] = (),
    on_checkpoint: Callable[[int, MLPEnsemble], None] | None = None,
) -> MLPEnsemble:
    """Train S classifiers together with Adam (betas .9, .999) on the batches given.

    Step t of member s minimises the mean over its batch of w_i * crossentropy(logits_i, y_i) with
    learning rate  lr/2 (1 + cos(pi t / steps))  (`schedule="cosine"`, to 0 over exactly the steps
    of `batches`) or lr (`"constant"`).

    Shapes: `x` (N, D) or (S, N, D); `y` and `weights` (N,) or (S, N); `batches` int64
    (S, steps, B), row numbers, -1 where a batch is short. Member s is initialised from `seed[s]`,
    or from `seed + s` when `seed` is one number. `on_checkpoint(t, ensemble)` is called once t
    updates are done, for t in `checkpoint_steps` (0: before the first); the ensemble it gets is
    the live one, to be read and not kept.

    Raises `InputError` on row numbers or labels out of range, an empty batch, or shapes that
    disagree. Time O(steps * S * B * weights a member); memory that of S members and one batch.

    >>> data = digits_split()
    >>> batches = np.stack([minibatches([np.arange(256)] * 10, 32, rng=s) for s in range(2)])
    >>> members = train_ensemble(data.train_x, data.train_y, batches, n_classes=10, seed=0)
    >>> bool(members.accuracy(data.test_x, data.test_y).min() > 0.8)
    True
    """
    batches = np.asarray(batches)
    inputs, labels = _inputs(x), np.asarray(y)
    _check(inputs, labels, batches, n_classes, schedule)
    S, steps, _ = batches.shape
    seeds = [seed + s for s in range(S)] if isinstance(seed, int) else list(seed)
    require(len(seeds) == S, "seed", f"{len(seeds)} seeds", f"one a member, {S}")
    ensemble = MLPEnsemble.initialise([inputs.shape[-1], *hidden, n_classes], seeds)
    optimiser = torch.optim.Adam(
        [*ensemble.weights, *ensemble.biases], lr=learning_rate, fused=True
    )
    wanted = set(checkpoint_steps) if on_checkpoint is not None else set()
    with one_thread():
        for t, (bx, by, bw) in enumerate(_gather(inputs, labels, weights, batches)):
            if t in wanted and on_checkpoint is not None:
                on_checkpoint(t, ensemble)
            if schedule == "cosine":
                optimiser.param_groups[0]["lr"] = rate(learning_rate, t, steps)
            logits = ensemble.layers(bx)[-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), by, reduction="none")
            optimiser.zero_grad()
            torch.dot(loss, bw).backward()
            optimiser.step()
        if steps in wanted and on_checkpoint is not None:
            on_checkpoint(steps, ensemble)
    return ensemble


def rate(learning_rate: float, step: int, steps: int) -> float:
    """The cosine schedule's rate at a step: lr/2 (1 + cos(pi step / steps)).

    >>> rate(2.0, 0, 10), round(rate(2.0, 5, 10), 12), rate(2.0, 10, 10)
    (2.0, 1.0, 0.0)
    """
    return learning_rate / 2 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: these products are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inputs(x: ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _gather(
    inputs: torch.Tensor, labels: NDArray[Any], weights: ArrayLike | None, batches: IntArray
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A step's inputs (S, B, D), labels (S*B,) and loss weights (S*B,): 0 for a filled-up place."""
    S, steps, B = batches.shape
    n = inputs.shape[-2]
    real = batches >= 0
    rows = np.where(real, batches, 0)
    member = np.arange(S)[:, None, None]
    w = np.ones(1) if weights is None else np.asarray(weights, dtype=np.float64)
    w = np.broadcast_to(w, (S, n))[member, rows] * real / real.sum(axis=-1, keepdims=True)
    y = np.broadcast_to(labels, (S, n))[member, rows]
    w_step = torch.from_numpy(w.astype(np.float32).transpose(1, 0, 2).reshape(steps, S * B))
    y_step = torch.from_numpy(y.astype(np.int64).transpose(1, 0, 2).reshape(steps, S * B))
    # one flat pool: member s reads rows s*n .. s*n+n of it, or all share the same n rows
    offset = member * n if inputs.ndim == 3 else 0
    x_step = torch.from_numpy((rows + offset).transpose(1, 0, 2).reshape(steps, S * B))
    pool = inputs.reshape(-1, inputs.shape[-1])
    for t in range(steps):
        yield pool[x_step[t]].view(S, B, -1), y_step[t], w_step[t]


def _check(
    inputs: torch.Tensor, labels: NDArray[Any], batches: IntArray, n_classes: int, schedule: str
) -> None:
    require(batches.ndim == 3, "batches", batches.shape, "shape (members, steps, batch size)")
    require(batches.dtype.kind in "iu", "batches", batches.dtype, "row numbers")
    S, n = len(batches), inputs.shape[-2]
    require(inputs.ndim in (2, 3), "x", tuple(inputs.shape), "shape (N, D) or (S, N, D)")
    if inputs.ndim == 3:
        require(len(inputs) == S, "x", f"{len(inputs)} members", f"{S}, as in batches")
    require(labels.shape in ((n,), (S, n)), "y", labels.shape, f"shape ({n},) or ({S}, {n})")
    require(
        labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < n_classes,
        "y", f"{labels.dtype} from {labels.min()} to {labels.max()}", f"0 .. {n_classes - 1}",
    )  # fmt: skip
    require(
        bool(batches.min() >= -1 and batches.max() < n),
        "batches", f"{batches.min()} .. {batches.max()}", f"rows 0 .. {n - 1}, or -1 for none",
    )  # fmt: skip
    require(bool((batches >= 0).any(axis=-1).all()), "batches", "an empty batch", "a row in each")
    require(schedule in ("cosine", "constant"), "schedule", schedule, "cosine or constant")
