"""Looking at a torch model without disturbing it: modes, batches, outputs.

A batch is a pair (inputs, labels) or a mapping that holds "labels"; inputs are a tensor, a tuple
(positional) or a mapping (keywords). A model returns logits (n, C), or something with `.logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scoredraw.errors import InputError, require

Forward = Callable[[nn.Module, Any], Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it each module has the mode it had.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     inside = model.training
    >>> inside, [m.training for m in model]
    (False, [True, False])
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """(inputs, labels) of a batch: a pair, or a mapping with "labels".

    >>> split_batch({"x": torch.ones(1), "labels": torch.tensor([3])})[1].tolist()
    [3]
    """
    if isinstance(batch, Mapping):
        require("labels" in batch, "batches", f"keys {', '.join(batch)}", "one named 'labels'")
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    require(pair, "batches", describe(batch), "(inputs, labels) or a mapping with 'labels'")
    return batch[0], batch[1]


def model_logits(model: nn.Module, inputs: Any, *, forward: Forward | None = None) -> Tensor:
    """The model's logits (n, C) in evaluation mode, without a graph.

    >>> tuple(model_logits(nn.Linear(2, 3), torch.ones(4, 2)).shape)
    (4, 3)
    """
    with evaluating(model), torch.no_grad():
        return model_outputs(model, on_model_device(model, inputs), forward)


def model_outputs(model: nn.Module, inputs: Any, forward: Forward | None) -> Tensor:
    if forward is not None:
        result = forward(model, inputs)
    elif isinstance(inputs, Mapping):
        result = model(**inputs)
    elif isinstance(inputs, tuple | list):
        result = model(*inputs)
    else:
        result = model(inputs)
    if not isinstance(result, Tensor):
        result = getattr(result, "logits", result)
    if isinstance(result, tuple):
        result = result[0]
    require(isinstance(result, Tensor), "model", describe(result), "logits, or .logits")
    return result


def check_labels(outputs: Tensor, labels: Tensor) -> None:
    fits = outputs.ndim == 2 and outputs.shape[1] >= 2
    require(
        fits, "model", f"outputs {tuple(outputs.shape)}", "logits (n, C) of two classes or more"
    )
    require(labels.shape == outputs.shape[:1], "labels", tuple(labels.shape), f"({len(outputs)},)")
    bad = (labels < 0) | (labels >= outputs.shape[1])
    if bool(bad.any()):
        came = labels[bad][0].item()
        raise InputError(f"labels: got {came}, want 0 to {outputs.shape[1] - 1}")


def find_layer(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    names = dict(model.named_modules())
    require(
        layer in names and layer != "", "layer", repr(layer), f"one of {', '.join(names)[:300]}"
    )
    return names[layer]


def on_model_device(model: nn.Module, value: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return map_tensors(value, lambda t: t.to(device))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map_tensors(item, change) for item in value)
    return value


def describe(value: Any) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
