r"""What a model's linear layers receive and send back: all that their weight gradients are made of.

With inputs :math:`a_t` and output gradients :math:`\delta_t` at the positions t of an example,
the gradient of its loss at a linear layer's weight is :math:`\sum_t\delta_ta_t^\top` (out x in);
a bias is one more input that is always 1. `TraceReader` reads both for every layer, whatever the
layers are called, from one forward and one backward pass a batch. Projections of one input to
queries, keys and values can be read as one layer, as fused ones are. Padding is set to zero and
not counted.

Batches and models are as in `evaluation`; the model's state is left as it was.

Zhang et al., 2025, arXiv:2409.16986, whose released code skips modules called wqkv and wo.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from scoredraw.data_selection.evaluation import (
    Forward,
    evaluating,
    model_outputs,
    on_model_device,
    split_batch,
)
from scoredraw.data_selection.gradients import (
    by_position,
    matches,
    requiring_grad,
    zero_if_none,
)
from scoredraw.errors import require

Float = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]

IGNORED = -100  # labels of positions without a loss
QKV = re.compile(r"^(?:(q|k|v)|w(q|k|v)|to_(q|k|v)|(q|k|v)_(?:proj|lin)|(query|key|value))$")


# ── Looking into a model ─────────────────────────────────────────────────────────────────────────


class Site(NamedTuple):
    """A linear layer, or several that read one input and count as one."""

    name: str
    modules: tuple[Any, ...]
    bias: bool


class Trace(NamedTuple):
    """What a layer received, (n, T, in), and sent back, (n, T, out); both zero at padding.

    With a bias the inputs end in a 1. positions: how many are no padding.
    """

    inputs: Tensor
    deltas: Tensor
    positions: int


def linear_sites(
    model: nn.Module, layers: str | Sequence[str] = "linear", *, fuse_qkv: bool = True
) -> list[Site]:
    """The linear layers of a model, (query, key, value) projections fused where asked.

    layers: "linear" for every `nn.Linear` and transformers `Conv1D`, or names and prefixes of
    modules. Raises InputError where nothing is chosen, a weight is shared with another module, or
    projections to be fused differ in having a bias.

    >>> attention = nn.ModuleDict({f"{x}_proj": nn.Linear(4, 4) for x in "qkvo"})
    >>> [site.name for site in linear_sites(attention)]
    ['qkv', 'o_proj']
    """
    everything = layers == "linear"
    linear = {k: m for k, m in model.named_modules() if is_linear(m)}
    chosen = {k: m for k, m in linear.items() if everything or k == layers or matches(k, layers)}
    require(bool(chosen), "layers", repr(layers), f"linear layers among {', '.join(linear)}"[:300])
    _refuse_tied(model, chosen)
    triples = _qkv_triples(chosen) if fuse_qkv else {}
    sites, done = [], set()
    for name, module in chosen.items():
        parent = name.rpartition(".")[0]
        triple = triples.get(parent, ())
        if name not in triple:
            sites.append(Site(name, (module,), module.bias is not None))
        elif parent not in done:
            done.add(parent)
            parts = tuple(chosen[part] for part in triple)
            biases = {part.bias is not None for part in parts}
            fused = f"{parent}.qkv" if parent else "qkv"
            came = f"{fused}, of which only some have a bias"
            require(len(biases) == 1, "fuse_qkv", came, "fuse_qkv=False")
            sites.append(Site(fused, parts, biases.pop()))
    return sites


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear`, or the `Conv1D` of transformers: the same with its weight turned over."""
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")
    return isinstance(module, nn.Linear) or conv1d


def _qkv_triples(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """parent -> names of its query, key and value projections, where it has all three."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        match = QKV.match(last)
        if match:
            letter = next(group for group in match.groups() if group)[0]
            found.setdefault(parent, {})[letter] = name
    return {p: tuple(parts[x] for x in "qkv") for p, parts in found.items() if len(parts) == 3}


def _refuse_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    weights = {id(m.weight): name for name, m in chosen.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owner = weights.get(id(parameter))
            tied = owner is not None and chosen[owner] is not module
            came = f"{owner}, whose weight is tied to {name}"
            require(not tied, "layers", came, "layers with weights of their own, by name")


class TraceReader:
    """Reads `Trace`s of a model's linear layers batch by batch; arguments as `KFACFactors.fit`.

    >>> reader = TraceReader(nn.Linear(2, 3))
    >>> size, traces = next(reader.read([(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))]))
    >>> size, tuple(traces[""].inputs.shape), tuple(traces[""].deltas.shape)
    (4, (4, 1, 3), (4, 1, 3))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "linear",
        *,
        fuse_qkv: bool = True,
        loss: Loss | None = None,
        forward: Forward | None = None,
        mask_key: str | None = "attention_mask",
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.loss, self.forward = model, loss or summed_cross_entropy, forward
        self.mask_key, self.sample, self.generator = mask_key, sample, generator
        self.sites = linear_sites(model, layers, fuse_qkv=fuse_qkv)
        self.modules = [module for site in self.sites for module in site.modules]

    def read(self, batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Trace]]]:
        """(examples, layer name -> trace) of every batch."""
        for batch in batches:
            inputs, labels = split_batch(batch)
            yield len(labels), self.traces(inputs, labels)

    def traces(self, inputs: Any, labels: Tensor) -> dict[str, Trace]:
        """The traces of one batch; one forward and one backward pass."""
        inputs = on_model_device(self.model, inputs)
        labels = on_model_device(self.model, labels)
        mask = inputs.get(self.mask_key) if isinstance(inputs, Mapping) else None
        with evaluating(self.model), requiring_grad(self.modules), torch.enable_grad():
            with _recorded(self.modules) as runs:
                outputs = model_outputs(self.model, inputs, self.forward)
            if self.sample:
                labels = sampled_labels(outputs.detach(), labels, self.generator)
            losses = self.loss(outputs, labels)
            flat = [output for calls in runs.values() for _, output in calls]
            silent = [site.name for site in self.sites if not all(runs[m] for m in site.modules)]
            require(not silent, "layers", f"{', '.join(silent)}, not run", "layers that are used")
            deltas = iter(torch.autograd.grad(losses.sum(), flat, allow_unused=True))
        sent = {
            module: [zero_if_none(next(deltas), output) for _, output in calls]
            for module, calls in runs.items()
        }
        return {site.name: _trace(site, runs, sent, len(labels), mask) for site in self.sites}


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[dict[Any, list[tuple[Tensor, Tensor]]]]:
    """Every run's input and output of these modules, in the order of the runs."""
    runs: dict[Any, list[tuple[Tensor, Tensor]]] = {module: [] for module in modules}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        runs[module].append((args[0], output))

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def _trace(site: Site, runs: Any, sent: Any, n: int, mask: Tensor | None) -> Trace:
    first = [received for received, _ in runs[site.modules[0]]]
    for module in site.modules[1:]:
        others = [received for received, _ in runs[module]]
        same = len(others) == len(first) and all(a is b for a, b in zip(first, others, strict=True))
        came = f"{site.name}, whose parts read different inputs"
        require(same, "fuse_qkv", came, "fuse_qkv=False")
    a = torch.cat([by_position(received.detach(), n) for received in first], dim=1)
    parts = [torch.cat([by_position(d, n) for d in sent[m]], dim=1) for m in site.modules]
    delta = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    if site.bias:
        a = torch.cat([a, a.new_ones(n, a.shape[1], 1)], dim=2)
    if mask is None or a.shape[1] == len(first):  # one position a run: after the pooling
        return Trace(a, delta, n * a.shape[1])
    width = len(first) * mask.shape[1]
    came = f"{a.shape[1]} positions at {site.name or 'the layer'}"
    require(a.shape[1] == width, "mask_key", came, f"the mask's {mask.shape[1]} a run, or None")
    real = (mask != 0).repeat(1, len(first))[..., None]
    return Trace(a * real, delta * real, int(real.sum()))


# ── Losses and labels ────────────────────────────────────────────────────────────────────────────


def summed_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (n, ..., C) at labels (n, ...), summed over positions: (n,).

    Label -100 is left out. Labels stand at the positions that predict them: see
    `next_token_labels`.

    >>> summed_cross_entropy(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]])).round(decimals=4)
    tensor([1.3863])
    """
    shape = tuple(outputs.shape[:-1])
    require(tuple(labels.shape) == shape, "labels", f"shape {tuple(labels.shape)}", f"{shape}")
    losses = nn.functional.cross_entropy(
        outputs.flatten(0, -2), labels.long().flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.reshape(len(labels), -1).sum(1)


def sampled_labels(
    outputs: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Labels drawn from the model's softmax, -100 where there is none; shape of `labels`.

    >>> sampled_labels(torch.tensor([[0.0, 99.0]]), torch.tensor([0])).tolist()
    [1]
    """
    shape = tuple(outputs.shape[:-1])
    require(tuple(labels.shape) == shape, "labels", f"shape {tuple(labels.shape)}", f"{shape}")
    chances = outputs.flatten(0, -2).softmax(dim=-1)
    drawn = torch.multinomial(chances, 1, generator=generator).reshape(labels.shape)
    return torch.where(labels == IGNORED, labels, drawn)


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Each position's next token, -100 at the end and where that is padding: (n, T).

    >>> next_token_labels(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])).tolist()
    [[6, -100, -100]]
    """
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        labels[:, :-1][attention_mask[:, 1:] == 0] = IGNORED
    return labels


def token_chunks(
    tokens: ArrayLike,
    size: int = 1024,
    *,
    overlap: int = 1,
    shortest: int = 512,
    longest: int = 20_480,
) -> list[NDArray[Any]]:
    """A long document's pieces of at most `size` tokens, neighbours sharing `overlap`.

    Tokens after `longest` and pieces shorter than `shortest` are dropped, but never the first.
    `document_mean` averages what the pieces get.

    >>> [piece.tolist() for piece in token_chunks(range(7), 3, shortest=2)]
    [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    """
    require(0 <= overlap < size, "overlap", overlap, f"a count below the size of {size}")
    ids = np.asarray(tokens)[:longest]
    starts = range(0, max(len(ids) - overlap, 1), size - overlap)
    pieces = [ids[start : start + size] for start in starts]
    return pieces[:1] + [piece for piece in pieces[1:] if len(piece) >= shortest]


def document_mean(values: ArrayLike, documents: ArrayLike) -> Float:
    """Mean of the chunks' values by document, (D,): documents holds 0 .. D - 1, each at least once.

    >>> document_mean([1.0, 3.0, 5.0], [0, 0, 1]).tolist()
    [2.0, 5.0]
    """
    x, which = np.asarray(values, dtype=np.float64), np.asarray(documents)
    require(which.shape == x.shape, "documents", f"shape {which.shape}", f"{x.shape}")
    counts = np.bincount(which)
    require(bool((counts > 0).all()), "documents", "a number without a chunk", "0 .. D - 1")
    return np.asarray(np.bincount(which, x) / counts)
