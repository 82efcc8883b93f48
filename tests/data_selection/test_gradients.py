"""Per-example gradients of torch models against autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoredraw.data_selection import gradients
from scoredraw.data_selection.evaluation import evaluating, model_logits, split_batch
from scoredraw.data_selection.influence import variance_of_gradients
from scoredraw.errors import InputError


class TextModel(nn.Module):
    """Embeddings, a position-wise layer used twice, masked mean, a head; dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.mix(self.drop(self.embed(input_ids))))))
        weight = attention_mask[..., None].to(h.dtype)
        return self.head(self.norm((h * weight).sum(1) / weight.sum(1)))


@pytest.fixture
def text() -> tuple[TextModel, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = TextModel().double()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr]
    ids = torch.randint(11, (7, 5))
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 2, 5, 1, 3])[:, None]).long()
    return model, {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 2, 0, 1, 2, 0])


def one_by_one(model: nn.Module, batch: Any, labels: Tensor) -> list[dict[str, Tensor]]:
    """Every example's gradients by plain autograd, alone in its batch."""
    result = []
    with evaluating(model):
        for i, label in enumerate(labels):
            x = {k: v[i : i + 1] for k, v in batch.items()} if isinstance(batch, dict) else None
            logits = model(**x) if x is not None else model(batch[i : i + 1])
            loss = nn.functional.cross_entropy(logits, label[None])
            names, weights = zip(*model.named_parameters(), strict=True)
            grads = torch.autograd.grad(loss, weights)
            result.append(dict(zip(names, grads, strict=True)))
    return result


@pytest.mark.oracle
def test_weight_gradients_match_autograd(text: Any) -> None:
    model, batch, labels = text
    want = one_by_one(model, batch, labels)
    got = gradients.per_sample_gradients(model, batch, labels)
    for name in want[0]:
        torch.testing.assert_close(got[name], torch.stack([w[name] for w in want]))
    part = gradients.per_sample_gradients(model, batch, labels, parameters=["mix", "head.bias"])
    assert list(part) == ["mix.weight", "mix.bias", "head.bias"]
    squares = torch.stack([sum(g.square().sum() for g in w.values()) for w in want])  # type: ignore[arg-type]
    for chunk in (None, 3):
        torch.testing.assert_close(
            gradients.squared_gradient_norms(model, batch, labels, chunk_size=chunk), squares
        )
    flat = torch.stack([torch.cat([g.flatten() for g in w.values()]) for w in want])
    second = ({k: v[:3] for k, v in batch.items()}, labels[:3])
    dots = gradients.gradient_dots(model, (batch, labels), second)
    torch.testing.assert_close(dots, flat @ flat[:3].T)


@pytest.mark.oracle
@pytest.mark.parametrize("width", [4, 40])  # either way of multiplying out
def test_linear_lengths_match_autograd(text: Any, width: int) -> None:
    model, batch, labels = text
    want = one_by_one(model, batch, labels)
    for layers in (None, "mix", ["head"]):
        names = [k for k in want[0] if k.split(".")[0] in (layers or ("mix", "head"))]
        squares = torch.stack([sum(w[k].square().sum() for k in names) for w in want])  # type: ignore[arg-type]
        got = gradients.squared_linear_norms(model, batch, labels, layers=layers)
        torch.testing.assert_close(got, squares)
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, 3))
    wide = wide.double()
    x = torch.randn(4, 6, width, dtype=torch.float64)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wide

        def forward(self, value: Tensor) -> Tensor:
            return self.inner(value).mean(1)

    mean = Mean()
    squares = [sum(g.square().sum() for g in w.values()) for w in one_by_one(mean, x, labels[:4])]
    got = gradients.squared_linear_norms(mean, x, labels[:4])
    torch.testing.assert_close(got, torch.stack(squares))  # type: ignore[arg-type]


@pytest.mark.oracle
def test_input_gradients_match_autograd_at_a_layer_and_at_the_input(text: Any) -> None:
    model, batch, labels = text
    got = gradients.input_gradients(model, batch, labels, layer="embed")
    assert got.shape == (7, 5, 6)
    with evaluating(model):
        for i, label in enumerate(labels):
            e = model.embed(batch["input_ids"][i : i + 1]).detach().requires_grad_()
            h = torch.tanh(model.mix(torch.tanh(model.mix(e))))
            w = batch["attention_mask"][i : i + 1, :, None].double()
            logit = model.head(model.norm((h * w).sum(1) / w.sum(1)))[0, label]
            torch.testing.assert_close(got[i], torch.autograd.grad(logit, e)[0][0])
    assert got[5, 1:].abs().max() == 0  # nothing flows into padding
    dense = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    for target in ("logit", "probability", lambda out, y: out[:, 0] * y):
        got = gradients.input_gradients(dense, x, labels[:6], target=target)  # type: ignore[arg-type]
        for i in range(6):

            def chosen(row: Tensor, i: int = i, target: Any = target) -> Tensor:
                out = dense(row[None])
                if callable(target):
                    return target(out, labels[i : i + 1])[0]
                return (out.softmax(-1) if target == "probability" else out)[0, labels[i]]

            want = torch.autograd.functional.jacobian(chosen, x[i])
            torch.testing.assert_close(got[i], want)


@pytest.mark.oracle
def test_checkpoint_variance_is_the_same_either_way_round(text: Any) -> None:
    model, batch, labels = text
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(TextModel().double().state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [
        ({k: v[:4] for k, v in batch.items()}, labels[:4]),
        # the second batch is padded to another length
        {"labels": labels[4:], **{k: nn.functional.pad(v[4:], (0, 2)) for k, v in batch.items()}},
    ]
    models = []
    for state in states:
        models.append(TextModel().double())
        models[-1].load_state_dict(state)
    want = []
    for inputs, y in map(split_batch, batches):
        g = [gradients.input_gradients(m, inputs, y, layer="embed") for m in models]
        want.append(variance_of_gradients(g, mask=inputs["attention_mask"]))
    options: dict[str, Any] = {"layer": "embed"}
    by_batch = gradients.checkpoint_variance(models, batches, **options)
    streamed = gradients.checkpoint_variance(
        gradients.load_states(model, states), iter(batches), **options
    )
    np.testing.assert_allclose(by_batch, np.concatenate(want), rtol=1e-12)
    np.testing.assert_allclose(streamed, by_batch, rtol=1e-12)
    unmasked = gradients.checkpoint_variance(models, batches, mask_key=None, **options)
    assert np.all(unmasked[[1, 2, 3]] < by_batch[[1, 2, 3]])  # padding dilutes the mean
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.oracle
def test_image_gradients_are_averaged_over_channels_first() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)) for _ in range(3)]
    x, y = torch.randn(5, 3, 6, 6), torch.tensor([0, 1, 0, 1, 1])
    got = gradients.checkpoint_variance(models, [(x, y)], channel_axis=1)
    g = [gradients.input_gradients(m, x, y).mean(1) for m in models]
    np.testing.assert_allclose(got, variance_of_gradients(g), rtol=1e-6)


@pytest.mark.contract
@pytest.mark.parametrize(
    "look",
    [
        lambda m, b, y: gradients.input_gradients(m, b, y, layer="embed"),
        lambda m, b, y: gradients.per_sample_gradients(m, b, y),
        lambda m, b, y: gradients.squared_gradient_norms(m, b, y),
        lambda m, b, y: gradients.squared_linear_norms(m, b, y),
        lambda m, b, y: model_logits(m, b),
        lambda m, b, y: gradients.input_gradients(m, b, y + 7, layer="embed"),  # raises
    ],
)
def test_the_model_is_left_as_it_was(text: Any, look: Callable[..., Any]) -> None:
    model, batch, labels = text
    model.train()
    model.norm.eval()
    for p in model.mix.parameters():
        p.requires_grad_(False)
    model(**batch).sum().backward()
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    try:
        look(model, batch, labels)
    except InputError:
        assert labels.max() + 7 > 2
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("mix"))
        assert (p.grad is None) == (grads[name] is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


@pytest.mark.contract
def test_frozen_models_can_be_looked_at(text: Any) -> None:
    model, batch, labels = text
    want = gradients.squared_linear_norms(model, batch, labels)
    for p in model.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(gradients.squared_linear_norms(model, batch, labels), want)
    assert gradients.input_gradients(model, batch, labels, layer="embed").abs().sum() > 0
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.contract
def test_refusals(text: Any) -> None:
    model, batch, labels = text
    pair = (batch, labels)
    for call, says in (
        (lambda: gradients.input_gradients(model, batch, labels), "inputs: got dict"),
        (lambda: gradients.input_gradients(model, *pair, layer="emb"), "layer: got 'emb'"),
        (lambda: gradients.input_gradients(model, *pair, layer="mix"), "layer: got one that ran 2"),
        (lambda: gradients.input_gradients(model, batch, labels + 1, layer="embed"), "labels: got"),
        (lambda: gradients.per_sample_gradients(model, *pair, parameters="hea"), "parameters"),
        (lambda: gradients.squared_linear_norms(model, *pair, layers="embed"), "layers: got"),
        (lambda: gradients.checkpoint_variance([model], [pair], layer="embed"), "1 checkpoints"),
        (lambda: gradients.checkpoint_variance([], [pair], layer="embed"), "checkpoints: got no"),
        (lambda: gradients.checkpoint_variance([model] * 2, [batch], layer="embed"), "batches"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    orders = iter([[(batch, labels)], [(batch, labels.flip(0))]])

    class Shuffled:
        def __iter__(self) -> Any:
            return iter(next(orders))

    with pytest.raises(InputError, match="batches: got another order"):
        gradients.checkpoint_variance(iter([model, model]), Shuffled(), layer="embed")


@pytest.mark.contract
def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="tied to 0"):
        gradients.squared_linear_norms(model, torch.tensor([[1], [2]]), torch.tensor([0, 1]))


@pytest.mark.contract
def test_nan_gradients_are_named_by_their_row_in_the_data() -> None:
    model = nn.Linear(2, 2)
    first = (torch.ones(3, 2), torch.tensor([0, 1, 0]))
    x = torch.ones(3, 2)
    x[1] = float("nan")
    broken = nn.Sequential(nn.Tanh(), model)
    with pytest.raises(InputError, match="example 4"):
        gradients.checkpoint_variance([broken] * 2, [first, (x, first[1])])


@pytest.mark.contract
def test_a_transformers_model() -> None:
    """BERT: embeddings by name, `.logits`, lengths at its linear layers against autograd."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double().eval()
    ids = torch.randint(50, (4, 7))
    mask = (torch.arange(7) < torch.tensor([7, 5, 3, 6])[:, None]).long()
    batch, labels = {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 2, 0])
    g = gradients.input_gradients(model, batch, labels, layer="bert.embeddings")
    assert g.shape == (4, 7, 16)
    layer = "bert.encoder.layer.1"
    got = gradients.squared_linear_norms(model, batch, labels, layers=layer)
    for i, label in enumerate(labels):
        length = int(mask[i].sum())
        logits = model(input_ids=ids[i : i + 1, :length]).logits
        loss = nn.functional.cross_entropy(logits, label[None])
        weights = [
            p for k, p in model.named_parameters() if k.startswith(layer) and "LayerNorm" not in k
        ]
        want = sum(w.square().sum() for w in torch.autograd.grad(loss, weights))
        torch.testing.assert_close(got[i], want)
