"""Influence on the risk against definitions and retraining; effort against a plain loop."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scoredraw.data_selection.influence_on_risk import (
    effort_scores,
    influence_on_risk,
    lora_last,
    mean_gradient_ratio,
)
from scoredraw.data_selection.softmax_surrogate import fit_softmax, softmax_influence
from scoredraw.errors import InputError

pytestmark = pytest.mark.oracle

RANDOM = np.random.default_rng(0)
G = RANDOM.normal(size=(40, 5))
ROOT = RANDOM.normal(size=(5, 5))
H = ROOT @ ROOT.T + np.eye(5)


# ── Influence ────────────────────────────────────────────────────────────────────────────────────


def test_the_definition_from_gradients() -> None:
    v = G.mean(axis=0)
    want = [g @ np.linalg.solve(H, v) / 40 for g in G]
    for solver in ("cg", "exact"):
        got = influence_on_risk(G, hessian=H, damping=0.0, solver=solver)
        np.testing.assert_allclose(got, want, atol=1e-12)
    # v is the mean gradient, so that the influences add up to v' H^-1 v, which is not negative
    assert sum(want) == pytest.approx(v @ np.linalg.solve(H, v))


def test_a_validation_set_takes_the_place_of_the_risk() -> None:
    other = RANDOM.normal(size=(7, 5))
    want = G @ np.linalg.solve(H, other.mean(axis=0)) / 40
    for target in (other, other.mean(axis=0), torch.tensor(other)):
        got = influence_on_risk(G, hessian=H, damping=0.0, target=target)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_model_gives_what_its_gradients_and_hessian_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    model.train()
    x, y = torch.randn(150, 3).double(), torch.randint(3, (150,))
    later = (torch.randn(20, 3).double(), torch.randint(3, (20,)))
    last = dict(model[3].named_parameters())
    flat = torch.cat([p.detach().flatten() for p in last.values()])

    def risk(vector: torch.Tensor) -> torch.Tensor:
        w, b = vector[:12].view(3, 4), vector[12:]
        hidden = torch.tanh(model[0](x)).detach()
        return nn.functional.cross_entropy(hidden @ w.T + b, y) + 0.05 * vector.square().sum()

    hessian = np.asarray(torch.autograd.functional.hessian(risk, flat))
    hidden = torch.tanh(model[0](x)).detach()

    def gradients(h: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        logits = h @ last["weight"].detach().T + last["bias"].detach()
        error = logits.softmax(dim=1) - nn.functional.one_hot(labels, 3)
        return np.concatenate([(error[:, :, None] * h[:, None]).flatten(1), error], axis=1)

    g = gradients(hidden, y)
    options: dict[str, Any] = {"parameters": "3", "penalty": 0.1, "damping": 0.02}
    for solver in ("cg", "exact"):
        got = influence_on_risk((model, (x, y)), solver=solver, **options)
        want = influence_on_risk(g, hessian=hessian, damping=0.02)
        np.testing.assert_allclose(got, want, atol=1e-9)
    theirs = gradients(torch.tanh(model[0](later[0])).detach(), later[1])
    got = influence_on_risk((model, (x, y)), target=later, **options)
    want = influence_on_risk(g, hessian=hessian, damping=0.02, target=theirs)
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_all_parameters_and_a_loss_of_ones_own() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    x, y = torch.randn(30, 2).double(), torch.randn(30).double()

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - labels).square().mean() / 2

    weight = model.weight.detach()[0]
    g = ((x @ weight - y)[:, None] * x).numpy()
    h = (x.T @ x / 30).numpy()
    got = influence_on_risk((model, (x, y)), loss=loss, damping=0.0)
    want = g @ np.linalg.solve(h, g.mean(axis=0)) / 30
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_a_risk_at_its_minimum_is_noticed() -> None:
    """At the minimiser the mean gradient vanishes, and so does every influence."""
    x = np.column_stack([RANDOM.normal(size=(60, 2)), np.ones(60)])
    theta = np.linalg.lstsq(x, y := RANDOM.normal(size=60), rcond=None)[0]
    g, h = x * (x @ theta - y)[:, None], x.T @ x / 60
    assert mean_gradient_ratio(g) < 1e-12
    with pytest.warns(UserWarning, match="target: the mean gradient is .* noise"):
        scores = influence_on_risk(g, hessian=h, damping=0.0)
    assert abs(scores).max() < 1e-12
    away = x * (x @ (theta + 0.1) - y)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence_on_risk(away, hessian=h, damping=0.0)
        influence_on_risk(g, hessian=h, damping=0.0, target=away)  # a validation set has a gradient
    assert mean_gradient_ratio(away) > 1e-3
    assert mean_gradient_ratio(np.zeros((3, 2))) == 0.0


def test_a_models_risk_at_its_minimum_is_noticed() -> None:
    x = torch.tensor([[1.0], [1.0]]).double()
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    with pytest.warns(UserWarning, match="target: the mean gradient"):
        influence_on_risk((model, (x, torch.tensor([0, 1]))))


# ── Softmax regression ───────────────────────────────────────────────────────────────────────────


def softmax_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.column_stack([RANDOM.normal(size=(50, 3)), np.ones(50)])
    y = RANDOM.integers(4, size=50)
    return x, y, fit_softmax(x, y, penalty=0.05, steps=3)


def test_softmax_regression_in_closed_form_is_the_models_influence() -> None:
    x, y, weights = softmax_problem()
    model = nn.Linear(4, 4, bias=False).double()
    model.weight = nn.Parameter(torch.tensor(weights.T))
    data = (torch.tensor(x), torch.tensor(y))
    want = influence_on_risk((model, data), penalty=0.05, damping=0.01)
    got, ratio = softmax_influence(x, y, weights, penalty=0.05, damping=0.01, tolerance=1e-12)
    np.testing.assert_allclose(got, want, atol=1e-12)
    p = np.exp(x @ weights)
    r = p / p.sum(axis=1, keepdims=True) - np.eye(4)[y]
    g = (x[:, :, None] * r[:, None]).reshape(50, -1)
    assert ratio == pytest.approx(mean_gradient_ratio(g))


def test_the_fit_reaches_the_minimiser_if_it_may() -> None:
    x, y, early = softmax_problem()
    w = fit_softmax(x, y, penalty=0.05, steps=500)
    p = np.exp(x @ w)
    r = p / p.sum(axis=1, keepdims=True) - np.eye(4)[y]
    assert abs(x.T @ r / 50 + 0.05 * w).max() < 1e-6
    assert np.linalg.norm(early - w) > 1e-3  # three steps have stopped early


def test_a_softmax_regression_at_its_minimum_is_noticed() -> None:
    x, y, _ = softmax_problem()
    with pytest.warns(UserWarning, match="target: the mean gradient"):
        softmax_influence(np.ones((4, 1)), np.arange(4), np.zeros((1, 4)), penalty=0.1)
    weights = fit_softmax(x, y, penalty=0.05, steps=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the penalty keeps the data loss from its minimum
        softmax_influence(x, y, weights, penalty=0.05)


# ── Effort ───────────────────────────────────────────────────────────────────────────────────────


def loop(model: nn.Module, batches: list[Any], loss: Any, wanted: Any) -> np.ndarray:
    """One example at a time: the length of the gradient over the chosen parameters."""
    model.eval()
    lengths = []
    for x, y in batches:
        for i in range(len(y)):
            alone = slice(i, i + 1)
            words = {k: v[alone] for k, v in x.items()} if isinstance(x, dict) else None
            out = model(x[alone]) if words is None else model(**words)
            value = loss(getattr(out, "logits", out), y[alone])
            chosen = [p for k, p in model.named_parameters() if wanted(k)]
            g = torch.autograd.grad(value, chosen)
            lengths.append(float(torch.cat([part.flatten() for part in g]).norm()))
    return np.array(lengths)


def classifier() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4)).double()
    batches = [(torch.randn(n, 3).double(), torch.randint(4, (n,))) for n in (6, 3)]
    return model, batches


@pytest.mark.parametrize("params", [None, "3", "3.weight", ["1", "3"], ["0", "3"]])
def test_effort_is_the_loops(params: Any) -> None:
    """By whichever way: linear layers without forming gradients, the others under vmap."""
    model, batches = classifier()
    prefixes = [params] if isinstance(params, str) else params

    def chosen(name: str) -> bool:
        return prefixes is None or any(name == p or name.startswith(f"{p}.") for p in prefixes)

    want = loop(model, batches, nn.functional.cross_entropy, chosen)
    np.testing.assert_allclose(effort_scores(model, batches, params=params), want, rtol=1e-10)


def test_a_scaled_loss_scales_effort() -> None:
    model, batches = classifier()
    plain = effort_scores(model, batches)

    def scaled(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 3.5 * nn.functional.cross_entropy(outputs, labels)

    np.testing.assert_allclose(effort_scores(model, batches, loss=scaled), 3.5 * plain, rtol=1e-10)


@pytest.fixture(scope="module")
def language_model() -> Any:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).double()
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    return get_peft_model(base, lora)


def test_the_last_layers_lora_matrices_of_a_language_model(language_model: Any) -> None:
    names = lora_last(language_model)
    assert len(names) == 4
    assert all(".layers.2." in name for name in names)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (4, 7), generator=random)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 5:], labels[1, 5:], labels[2, :3] = 0, -100, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    got = effort_scores(language_model, [batch], params="lora_last")

    def token_mean(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits[0, :-1], y[0, 1:])  # -100 is left out

    inputs = {"input_ids": ids, "attention_mask": mask}
    want = loop(language_model, [(inputs, labels)], token_mean, names.__contains__)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (got > 0).all()
    b_alone = [name for name in names if "lora_B" in name]  # A's gradient is 0 while B is
    alone = effort_scores(language_model, [batch], params=b_alone)
    np.testing.assert_allclose(alone, got, rtol=1e-12)


def test_which_lora_layer_is_the_last() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.ModuleDict({"lora_A": nn.Linear(1, 1, bias=False)})})

    eleven = nn.ModuleDict({"h": nn.ModuleList([block() for _ in range(11)])})
    assert lora_last(eleven) == ["h.10.q.lora_A.weight"]
    assert lora_last(block()) == ["q.lora_A.weight"]
    pair = nn.ModuleDict(
        {"encoder": nn.ModuleList([block(), block()]), "decoder": nn.ModuleList([block()])}
    )
    assert lora_last(pair) == ["decoder.0.q.lora_A.weight"]


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (G, {}, "hessian: got None"),
        (G, {"hessian": np.eye(3)}, r"hessian: got shape \(3, 3\)"),
        (np.where(G > 2, np.nan, G), {"hessian": H}, "source: got NaN or infinity in example"),
        (np.where(G > 2, np.inf, G), {"hessian": H}, "source: got NaN or infinity in example"),
        (G[0], {"hessian": H}, "source: got shape"),
        (G[:0], {"hessian": H}, "source: got shape"),
        (G, {"hessian": H, "target": "test"}, "target: got 'test'"),
        (G, {"hessian": H, "target": np.ones((2, 3))}, "target: got shape"),
        (G, {"hessian": H, "target": np.full(5, np.nan)}, "target: got NaN"),
        ((1, 2, 3), {}, "source: got 3 parts"),
    ],
)
def test_bad_influence(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        influence_on_risk(source, **options)


def test_bad_models() -> None:
    model, batches = classifier()
    x, y = batches[0]
    for options, message in (
        ({"hessian": H}, "hessian: got one beside a model"),
        ({"penalty": -1.0}, "penalty: got -1"),
        ({"parameters": "encoder"}, "parameters: got 'encoder'"),
        ({"target": "test"}, "target: got 'test'"),
        ({"target": np.ones(3)}, "target: got ndarray"),
    ):
        with pytest.raises(InputError, match=message):
            influence_on_risk((model, (x, y)), **options)
    with pytest.raises(InputError, match="source: got no examples"):
        influence_on_risk((model, (x[:0], y[:0])))
    with pytest.raises(InputError, match="source: got NaN or infinity in example 2"):
        influence_on_risk((model, (x.index_fill(0, torch.tensor([2]), torch.nan), y)))
    with pytest.raises(InputError, match="params: got 'encoder', want names among 0"):
        effort_scores(model, batches, params="encoder")
    with pytest.raises(InputError, match="params: got 'lora_last' of a model without LoRA"):
        effort_scores(model, batches, params="lora_last")
    with pytest.raises(InputError, match="batches: got none"):
        effort_scores(model, [])
    bad = [(x.index_fill(0, torch.tensor([1]), torch.nan), y)]
    with pytest.raises(InputError, match="effort: got NaN or infinity in example"):
        effort_scores(model, bad)


def test_an_example_without_a_labelled_token(language_model: Any) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    labels = ids.clone()
    labels[1] = -100
    batch = {"input_ids": ids, "labels": labels}
    with pytest.raises(InputError, match="labels: got no labelled token in example 1"):
        effort_scores(language_model, [batch], params="lora_last")
    with pytest.raises(InputError, match="labels: got"):
        effort_scores(nn.Linear(2, 3), [(torch.ones(2, 2), torch.ones(2, 2).long())])
