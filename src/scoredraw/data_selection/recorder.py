"""Record, while a model trains, what influence scores are made of.

Every so many updates the recorder looks at the whole training set in its own order, in evaluation
mode, and keeps the logits; if asked, also the gradients at a layer's output (running mean and
spread, so nothing of a checkpoint is stored) and the squared length of each example's gradient at
linear layers. It is a transformers ``TrainerCallback``; a plain torch loop calls `after_update`.
Afterwards its methods give the scores, in the order of the training set, ready for
`selection.prune` and with that for ``torch.utils.data.Subset``, ``WeightedRandomSampler`` or
``datasets.Dataset.select``.

Toneva et al., 2019, arXiv:1812.05159; Anand et al., 2023, arXiv:2311.16298 (every 50 updates over
the first two epochs; ten gradient checkpoints).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scoredraw.data_selection import gradients, influence, tracin
from scoredraw.data_selection.evaluation import Forward, model_logits, split_batch
from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path

try:
    from transformers import TrainerCallback
except ImportError:  # a plain torch loop does not need it
    TrainerCallback = object

Steps = int | Collection[int]


class TrainingDynamicsRecorder(TrainerCallback):
    """Logits, correctness and gradients of every training example, at a cadence.

    Parameters
    ----------
    dataset : the training set, indexed and sized; an item is a mapping with `label_key`, or a
        pair (inputs, label). Rows of the scores are its positions.
    every : look each so many updates, or at a set of update counts (0: before the first).
    until : no looks after this many updates (the end of epoch 2, for forgetting).
    gradients_at : name of the layer (the embeddings) at whose output to follow the gradient of
        the label's logit, or "input" for the model's own float input. None: not followed.
    linear_layers : names or prefixes of linear layers whose gradient lengths to record.
    gradient_every : cadence of the last two, as `every`; by default the same looks.
    collate : makes a batch of items, as of ``DataLoader``; the Trainer's own where it is None.
    keep_logits : False keeps predictions alone (no EL2N, no PVI): n bytes a look, not 4 n C.

    A look costs a forward pass over the training set, a gradient look two or three. Memory
    O(looks n C), and two float64 copies of all gradients at the layer where they are followed.

    >>> data = [(torch.tensor([float(i)]), i % 2) for i in range(4)]
    >>> recorder = TrainingDynamicsRecorder(data, every=1)
    >>> model = nn.Linear(1, 2)
    >>> for step in (1, 2, 3):
    ...     recorder.after_update(model, step, learning_rate=0.1)
    >>> recorder.logits.shape, recorder.steps
    ((3, 4, 2), [1, 2, 3])
    """

    def __init__(
        self,
        dataset: Any,
        *,
        every: Steps = 50,
        until: int | None = None,
        gradients_at: str | None = None,
        linear_layers: str | Sequence[str] | None = None,
        gradient_every: Steps | None = None,
        batch_size: int = 64,
        collate: Callable[[list[Any]], Any] | None = None,
        label_key: str = "labels",
        mask_key: str | None = "attention_mask",
        forward: Forward | None = None,
        keep_logits: bool = True,
    ) -> None:
        super().__init__()
        require(len(dataset) > 0, "dataset", "no example", "a sized training set")
        for name, cadence in (("every", every), ("gradient_every", gradient_every)):
            good = not isinstance(cadence, int) or cadence >= 1
            require(good, name, cadence, "a positive count, or a set of update counts")
        self.dataset = dataset
        self.steps: list[int] = []
        self.gradient_steps: list[int] = []
        self.learning_rates: list[float] = []
        self.labels: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._every, self._until = every, until
        self._gradient_every = every if gradient_every is None else gradient_every
        self._gradients_at, self._linear_layers = gradients_at, linear_layers
        self._batch_size, self._collate = batch_size, collate
        self._label_key, self._mask_key = label_key, mask_key
        self._forward, self._keep_logits = forward, keep_logits
        self._logits: list[NDArray[np.float32]] = []
        self._predictions: list[NDArray[np.int64]] = []
        self._squared: list[NDArray[np.float64]] = []
        self._spread: list[influence.GradientSpread] = []
        self._masks: list[Any] = []

    # ── While training ───────────────────────────────────────────────────────────────────────

    def after_update(self, model: nn.Module, step: int, *, learning_rate: float = 1.0) -> None:
        """Call after every update (and once with step 0 before the first, if wanted).

        Raises InputError for a step that was already passed: one recorder records one run.
        """
        looking = (self._until is None or step <= self._until) and due(step, self._every)
        following = self._gradients_at is not None or self._linear_layers is not None
        following = following and due(step, self._gradient_every)
        if not (looking or following):
            return
        last = max([-1, *self.steps[-1:], *self.gradient_steps[-1:]])
        require(step > last, "step", f"{step} after {last}", "a step after the last look")
        if looking:
            self._look(model, step)
        if following:
            self._follow(model, step, learning_rate)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer: look at step 0 where the cadence names it."""
        self._from_trainer(args, state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer: look where the cadence says so."""
        self._from_trainer(args, state, kwargs)

    def _from_trainer(self, args: Any, state: Any, kwargs: dict[str, Any]) -> None:
        if self._collate is None:  # the Trainer's own collator pads as its training batches are
            loader = kwargs.get("train_dataloader")
            self._collate = getattr(loader, "collate_fn", None)
        optimizer = kwargs.get("optimizer")
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else args.learning_rate
        self.after_update(kwargs["model"], state.global_step, learning_rate=float(rate))

    def _look(self, model: nn.Module, step: int) -> None:
        parts, labels = [], []
        for inputs, y in self._batches():
            logits = model_logits(model, inputs, forward=self._forward)
            parts.append(logits.float().cpu().numpy())
            labels.append(y.cpu().numpy())
        logits = np.concatenate(parts)
        self._set_labels(np.concatenate(labels))
        self.steps.append(step)
        self._predictions.append(logits.argmax(axis=-1))
        if self._keep_logits:
            self._logits.append(logits)

    def _follow(self, model: nn.Module, step: int, learning_rate: float) -> None:
        layer = None if self._gradients_at == "input" else self._gradients_at
        squared, labels, row = [], [], 0
        for number, (inputs, y) in enumerate(self._batches()):
            if self._gradients_at is not None:
                if number == len(self._spread):
                    self._spread.append(influence.GradientSpread(first_row=row))
                    with_mask = layer is not None and hasattr(inputs, "keys")
                    self._masks.append(inputs.get(self._mask_key) if with_mask else None)
                gradient = gradients.input_gradients(
                    model, inputs, y, layer=layer, forward=self._forward
                )
                self._spread[number].update(gradient)
            if self._linear_layers is not None:
                square = gradients.squared_linear_norms(
                    model, inputs, y, layers=self._linear_layers, forward=self._forward
                )
                squared.append(square.double().cpu().numpy())
            labels.append(y.cpu().numpy())
            row += len(y)
        self._set_labels(np.concatenate(labels))
        self.gradient_steps.append(step)
        self.learning_rates.append(learning_rate)
        if squared:
            self._squared.append(np.concatenate(squared))

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        loader: Iterable[Any] = torch.utils.data.DataLoader(
            self.dataset,
            batch_size=self._batch_size,
            shuffle=False,
            collate_fn=self._collate,
            generator=torch.Generator(),  # a loader draws a seed: not from the training's own
        )
        for batch in loader:
            if hasattr(batch, "keys"):
                key = self._label_key if self._label_key in batch else "labels"
                inputs = {name: batch[name] for name in batch if name != key}
                require(key in batch, "label_key", repr(key), f"one of {', '.join(batch)}")
                yield inputs, batch[key]
            else:
                yield split_batch(batch)

    def _set_labels(self, labels: NDArray[Any]) -> None:
        if len(self.labels) == 0:
            self.labels = labels.astype(np.int64)
        same = np.array_equal(self.labels, labels)
        require(same, "dataset", "labels that changed since the last look", "one fixed order")

    # ── Afterwards ───────────────────────────────────────────────────────────────────────────

    @property
    def logits(self) -> NDArray[np.float32]:
        """(T, n, C), one look after another."""
        require(bool(self._logits), "logits", "none kept", "a look with keep_logits=True")
        return np.stack(self._logits)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(T, n): whether each example was classified rightly at each look."""
        require(bool(self._predictions), "correct", "no look", "training with the recorder")
        return np.stack(self._predictions) == self.labels

    @property
    def squared_norms(self) -> NDArray[np.float64]:
        """(K, n): squared gradient lengths at `linear_layers`, one gradient look after another."""
        require(bool(self._squared), "squared_norms", "none", "linear_layers, and a gradient look")
        return np.stack(self._squared)

    def el2n(self, step: int | None = None) -> NDArray[np.float64]:
        """`influence.el2n` at the look of this step; by default the first look."""
        return influence.el2n(self._at(step), self.labels)

    def pvi(self, step: int | None = None) -> NDArray[np.float64]:
        """`influence.pvi` at that look, against the class shares. High is easy."""
        prior = np.log(np.bincount(self.labels) / len(self.labels))
        log_p = influence.label_log_probabilities(self._at(step), self.labels)
        return influence.pvi(log_p, prior[self.labels])

    def forgetting(
        self, *, never_learned: Literal["count", "max"] = "count"
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """`influence.forgetting` over all looks."""
        return influence.forgetting(self.correct, never_learned=never_learned)

    def variance_of_gradients(self, spread: influence.Spread = "std") -> NDArray[np.float64]:
        """`influence.variance_of_gradients` over the gradient looks, padding left out."""
        require(bool(self._spread), "gradients_at", "nothing recorded", "a layer, and two looks")
        parts = zip(self._spread, self._masks, strict=True)
        return np.concatenate([part.score(spread, mask) for part, mask in parts])

    def tracin(self) -> NDArray[np.float64]:
        """`tracin.tracin_self` of the squared lengths with the learning rates that were in use."""
        return tracin.tracin_self(self.squared_norms, self.learning_rates)

    def save(self, path: str | Path) -> None:
        """Write what was recorded as one .npz, whole or not at all (gradient spreads as scores)."""
        arrays: dict[str, NDArray[Any]] = {"steps": np.array(self.steps), "labels": self.labels}
        if self._predictions:
            arrays["correct"] = self.correct
        if self._logits:
            arrays["logits"] = self.logits
        if self._squared:
            arrays |= {"squared_norms": self.squared_norms}
            arrays |= {"learning_rates": np.array(self.learning_rates)}
        if self._spread and self._spread[0].count > 1:
            arrays["variance_of_gradients"] = self.variance_of_gradients()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def _at(self, step: int | None) -> NDArray[np.float32]:
        require(bool(self._logits), "logits", "none kept", "a look with keep_logits=True")
        if step is None:
            return self._logits[0]
        if step not in self.steps:
            raise InputError(f"step: got {step}, want one of {self.steps}")
        return self._logits[self.steps.index(step)]


def due(step: int, cadence: Steps) -> bool:
    """Whether to look after this many updates.

    >>> [step for step in range(7) if due(step, 3)], due(0, 3), due(0, {0, 5})
    ([3, 6], False, True)
    """
    if isinstance(cadence, int):
        return step > 0 and step % cadence == 0
    return step in cadence
