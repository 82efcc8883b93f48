"""Kronecker-factored curvature against the Fisher matrix it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from torch import Tensor, nn  # noqa: E402

from scoredraw.data_selection.gradient_influence import mean_gradient  # noqa: E402
from scoredraw.data_selection.kronecker import (  # noqa: E402
    KFACFactors,
    LayerFactors,
    exact_fisher,
    exact_ihvp,
)
from scoredraw.data_selection.linear_traces import (  # noqa: E402
    TraceReader,
    linear_sites,
    next_token_labels,
    sampled_labels,
    token_chunks,
)
from scoredraw.errors import InputError  # noqa: E402

V = torch.ones(2, 4)


def traces(n: int = 40, T: int = 1, p: int = 3, q: int = 2, seed: int = 0) -> Any:
    """Inputs and output gradients that depend on one another."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, T, p))
    return a, rng.normal(size=(n, T, q)) * (1 + a[..., :1] ** 2)


class Attention(nn.Module):
    """One head with separate projections, under names that released code leaves out."""

    def __init__(self, names: str = "qkv", shared: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        parts = {f"w{x}": nn.Linear(6, 6, bias=bias) for x in names}
        self.attn = nn.ModuleDict(parts | {"wo": nn.Linear(6, 5)})
        self.shared = shared

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        other = h if self.shared else h.roll(1, dims=1)
        q, k, v = self.attn["wq"](h), self.attn["wk"](other), self.attn["wv"](other)
        hidden = attention_mask[:, None] == 0
        weights = (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1)
        return self.attn["wo"](weights @ v)


def token_batches(lengths: tuple[int, ...] = (7, 4, 7, 3), seed: int = 0) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 13, (len(lengths), max(lengths)), generator=g)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(0, 5, ids.shape, generator=g)
    labels[mask == 0] = -100
    whole = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 2), slice(2, None))]


# ── One layer ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_kfac_is_the_fisher_on_a_product_grid() -> None:
    """Every input with every output gradient: x and delta are independent in the sample."""
    rng = np.random.default_rng(0)
    x, d = rng.normal(size=(6, 3)), rng.normal(size=(5, 2))
    a, delta = np.repeat(x, 5, axis=0)[:, None], np.tile(d, (6, 1))[:, None]
    layer, fisher = LayerFactors.of(a, delta), exact_fisher(a, delta)
    np.testing.assert_allclose(layer.dense("kfac"), fisher, atol=1e-12)
    np.testing.assert_allclose(layer.dense("ekfac"), fisher, atol=1e-12)
    V = rng.normal(size=(2, 3))
    for form in ("kfac", "ekfac"):
        np.testing.assert_allclose(
            layer.ihvp(V, 0.01, form), exact_ihvp(fisher, V, 0.01), atol=1e-10
        )


@pytest.mark.oracle
def test_kfac_tends_to_the_fisher_of_independent_inputs_and_gradients() -> None:
    """The relative error falls as 1 / sqrt(n): a hundred times the examples, a tenth of it."""
    errors = []
    for n in (300, 30_000):
        rng = np.random.default_rng(n)
        a, delta = rng.normal(size=(n, 1, 3)), rng.exponential(size=(n, 1, 2))
        fisher = exact_fisher(a, delta)
        gap = LayerFactors.of(a, delta).dense("kfac") - fisher
        errors.append(np.linalg.norm(gap) / np.linalg.norm(fisher))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 3


@pytest.mark.oracle
@pytest.mark.parametrize(("T", "seed"), [(1, 0), (1, 1), (4, 2), (9, 3)])
def test_ekfac_is_never_farther_from_the_fisher_than_kfac(T: int, seed: int) -> None:
    """George et al. 2018: the measured diagonal is the nearest in Frobenius norm."""
    a, delta = traces(T=T, seed=seed)
    fisher = exact_fisher(a, delta)
    for scaled in (False, True):
        layer = LayerFactors.of(a, delta, token_scale=scaled)
        error = {form: np.linalg.norm(layer.dense(form) - fisher) for form in ("ekfac", "kfac")}
        assert error["ekfac"] < error["kfac"]
        other = layer.with_lambda(layer.Lambda * 1.01)
        assert np.linalg.norm(other.dense() - fisher) > error["ekfac"]


@pytest.mark.oracle
def test_large_damping_leaves_the_gradient() -> None:
    layer = LayerFactors.of(*traces())
    V = np.random.default_rng(1).normal(size=(2, 3))
    for form in ("kfac", "ekfac", "factored"):
        np.testing.assert_allclose(1e12 * layer.ihvp(V, 1e12, form), V, rtol=1e-4)


@pytest.mark.oracle
def test_every_form_is_the_inverse_it_says() -> None:
    layer = LayerFactors.of(*traces(T=3))
    V, damping = np.random.default_rng(1).normal(size=(2, 3)), 0.03
    for form in ("kfac", "ekfac"):
        dense = np.linalg.solve(layer.dense(form) + damping * np.eye(6), V.reshape(-1))
        np.testing.assert_allclose(layer.ihvp(V, damping, form).reshape(-1), dense)
    pi = np.sqrt((np.trace(layer.A) / 3) / (np.trace(layer.S) / 2))
    left = layer.S + np.sqrt(damping) / pi * np.eye(2)
    right = layer.A + pi * np.sqrt(damping) * np.eye(3)
    want = np.linalg.solve(left, V) @ np.linalg.inv(right)
    np.testing.assert_allclose(layer.ihvp(V, damping, "factored"), want)


@pytest.mark.oracle
def test_token_scale_is_the_fisher_of_sums_of_independent_tokens() -> None:
    """Example gradients are sums over T tokens: K-FAC needs the factor T, EK-FAC measures it."""
    rng = np.random.default_rng(0)
    n, T = 20_000, 6
    a, delta = rng.normal(size=(n, T, 3)), rng.normal(size=(n, T, 2))
    fisher = exact_fisher(a, delta)
    gap = {
        scaled: np.linalg.norm(LayerFactors.of(a, delta, token_scale=scaled).dense("kfac") - fisher)
        for scaled in (False, True)
    }
    size = np.linalg.norm(fisher)
    assert gap[True] < 0.05 * size
    assert gap[False] > 0.8 * size


@pytest.mark.oracle
def test_rank_deficient_factors_are_no_trouble_once_damped() -> None:
    a, delta = traces(n=2, p=5, q=4)
    delta[..., 0] = 0.0
    layer = LayerFactors.of(a, delta)
    V = np.random.default_rng(0).normal(size=(4, 5))
    fisher = layer.dense("ekfac") + 1e-3 * np.eye(20)
    np.testing.assert_allclose(
        layer.ihvp(V).reshape(-1), np.linalg.solve(fisher, V.reshape(-1)), rtol=1e-6
    )
    nothing = LayerFactors.of(a, 0 * delta)
    for form in ("kfac", "ekfac", "factored"):
        assert np.isfinite(nothing.ihvp(V, 0.1, form)).all()


@pytest.mark.property
def test_padding_counts_for_nothing() -> None:
    a, delta = traces(n=10, T=4)
    mask = np.arange(4) < np.random.default_rng(0).integers(1, 5, size=(10, 1))
    padded = LayerFactors.of(a, delta, mask=mask)
    real_a, real_delta = a[mask][:, None], delta[mask][:, None]
    alone = LayerFactors.of(real_a, real_delta, ekfac=False)
    np.testing.assert_allclose(padded.A, alone.A)
    np.testing.assert_allclose(padded.S, alone.S)


# ── A model ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_models_factors_are_those_of_autograd() -> None:
    """A, S and Lambda of an MLP from gradients taken one example at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(30, 4).double(), torch.randint(3, (30,))
    factors = KFACFactors.fit(model, [(x[:13], y[:13]), (x[13:], y[13:])])
    assert factors.examples == 30
    for name, layer in factors.layers.items():
        linear = model[int(name)]
        rows = []
        for i in range(30):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            g, b = torch.autograd.grad(loss, [linear.weight, linear.bias])
            rows.append(torch.cat([g, b[:, None]], dim=1))
        G = torch.stack(rows)
        squares = (layer.Q_S.mT @ G @ layer.Q_A).square().mean(0)
        torch.testing.assert_close(layer.Lambda, squares)
        torch.testing.assert_close(layer.Q_A.mT @ layer.A @ layer.Q_A, torch.diag(layer.a))


@pytest.mark.oracle
def test_fused_queries_keys_and_values_hold_the_separate_blocks() -> None:
    torch.manual_seed(0)
    model, data = Attention().double(), token_batches()
    fused = KFACFactors.fit(model, data)
    apart = KFACFactors.fit(model, data, fuse_qkv=False)
    assert list(fused.layers) == ["attn.qkv", "attn.wo"]
    assert list(apart.layers) == ["attn.wq", "attn.wk", "attn.wv", "attn.wo"]
    S = fused.layers["attn.qkv"].S
    for at, name in enumerate("qkv"):
        block = slice(6 * at, 6 * at + 6)
        torch.testing.assert_close(S[block, block], apart.layers[f"attn.w{name}"].S)
        torch.testing.assert_close(fused.layers["attn.qkv"].A, apart.layers[f"attn.w{name}"].A)
    assert S[:6, 6:].abs().max() > 0  # the cross terms are what fusing adds
    assert (S[:6, 6:] / S.diagonal().max()).abs().max() > 1e-3


@pytest.mark.oracle
def test_transformers_conv1d_is_a_linear_layer_turned_over() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=6, n_layer=1, n_head=2, attn_pdrop=0.5
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 13, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"labels": next_token_labels(ids)}
    factors = KFACFactors.fit(model, [batch], layers="transformer.h.0")
    shapes = {name.rpartition("0.")[2]: layer.shape for name, layer in factors.layers.items()}
    assert shapes["attn.c_attn"] == (18, 7)
    assert shapes["mlp.c_fc"] == (24, 7)
    reader = TraceReader(model, "transformer.h.0")
    gradient = mean_gradient(reader, [batch])["transformer.h.0.attn.c_attn"]
    model.eval()
    logits = model(input_ids=ids).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (loss / 4).backward()
    conv = model.transformer.h[0].attn.c_attn
    torch.testing.assert_close(gradient[:, :-1], conv.weight.grad.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[:, -1], conv.bias.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"^layers: got lm_head, whose weight is tied to"):
        KFACFactors.fit(model, [batch])


@pytest.mark.property
def test_modules_are_not_left_out_for_their_names() -> None:
    names = [site.name for site in linear_sites(Attention(), fuse_qkv=False)]
    assert {"attn.wq", "attn.wk", "attn.wv", "attn.wo"} == set(names)
    renamed = nn.ModuleDict({"x_wqkv": nn.Linear(2, 6), "x_wo": nn.Linear(2, 2)})
    assert [site.name for site in linear_sites(renamed)] == ["x_wqkv", "x_wo"]


@pytest.mark.property
def test_padding_of_a_batch_changes_nothing() -> None:
    torch.manual_seed(0)
    model, data = Attention().double(), token_batches((7, 4, 7, 3))
    longer = []
    for batch in data:
        filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        longer.append({k: nn.functional.pad(v, (0, 5), value=filled[k]) for k, v in batch.items()})
    first, second = KFACFactors.fit(model, data), KFACFactors.fit(model, longer)
    for name, layer in first.layers.items():
        torch.testing.assert_close(layer.A, second.layers[name].A)
        torch.testing.assert_close(layer.S, second.layers[name].S)
        torch.testing.assert_close(layer.Lambda.sum(), second.layers[name].Lambda.sum())
        assert float(layer.A[-1, -1]) == pytest.approx(1.0)  # the 1 of every real position


@pytest.mark.oracle
def test_the_sampled_fisher_is_the_models_own() -> None:
    """S of sampled labels tends to E[p] diag - p p'; that of given labels need not.

    20,000 examples of one input: entries within 5 deviations, about .02 (false alarm < 1e-4).
    """
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0], [-1.0]]))
    x, y = torch.ones(20_000, 1), torch.zeros(20_000, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    sampled = KFACFactors.fit(model, [(x, y)], fisher="sampled", generator=g)
    p = torch.tensor([0.0, 1.0, -1.0]).softmax(0).double()
    own = torch.diag(p) - torch.outer(p, p)
    assert (sampled.layers[""].S - own).abs().max() < 0.02
    empirical = KFACFactors.fit(model, [(x, y)])
    assert (empirical.layers[""].S - own).abs().max() > 0.1
    again = KFACFactors.fit(
        model, [(x, y)], fisher="sampled", generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again.layers[""].Lambda, sampled.layers[""].Lambda)
    kept = sampled_labels(torch.zeros(1, 2, 3), torch.tensor([[-100, 0]]))
    assert kept[0, 0] == -100


@pytest.mark.property
def test_fitting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    KFACFactors.fit(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))])
    assert [m.training for m in model] == [True, False, True]
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.property
def test_the_state_comes_back_whole(tmp_path: Any) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(20, 3), torch.randint(2, (20,)))]
    factors = KFACFactors.fit(nn.Linear(3, 2), data)
    torch.save(factors.state_dict(), tmp_path / "factors.pt")
    other = KFACFactors()
    other.load_state_dict(torch.load(tmp_path / "factors.pt"))
    V = {"": torch.randn(7, 2, 4)}
    assert torch.equal(other.ihvp(V)[""], factors.ihvp(V)[""])
    assert other.ihvp(V)[""].dtype == torch.float32
    one = factors.ihvp({"": V[""][3]})[""]
    torch.testing.assert_close(one, other.ihvp(V)[""][3])
    with pytest.raises(InputError, match=r"^state: got no layers"):
        other.load_state_dict({})


@pytest.mark.property
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m, d: KFACFactors.fit(m, []), "loader"),
        (lambda m, d: KFACFactors.fit(m, iter(d)), "loader"),
        (lambda m, d: KFACFactors.fit(m, d, layers="convolution"), "layers"),
        (lambda m, d: KFACFactors.fit(m, d, fisher="true"), "fisher"),
        (lambda m, d: KFACFactors.fit(nn.ReLU(), d), "layers"),
        (lambda m, d: KFACFactors.fit(m, [(d[0][0] * np.nan, d[0][1])]), "model"),
        (lambda m, d: KFACFactors.fit(m, [(d[0][0], d[0][1][None])]), "labels"),
        (lambda m, d: KFACFactors.fit(m, d).ihvp({"other": torch.ones(2, 4)}), "gradients"),
        (lambda m, d: KFACFactors.fit(m, d).ihvp({"": torch.ones(2, 3)}), "gradients"),
        (lambda m, d: KFACFactors.fit(m, d).ihvp({"": torch.ones(2, 4)}, 0.0), "damping"),
        (lambda m, d: KFACFactors.fit(m, d).ihvp({"": torch.ones(2, 4)}, -1.0), "damping"),
        (lambda m, d: KFACFactors.fit(m, d).ihvp({"": torch.ones(2, 4)}, 1.0, "svd"), "form"),
        (
            lambda m, d: KFACFactors.fit(m, d, ekfac=False).ihvp(
                {"": torch.ones(2, 4)}, 1, "ekfac"
            ),
            "form",
        ),
        (lambda m, d: KFACFactors().ihvp({}), "factors"),
        (lambda m, d: exact_ihvp(np.eye(2), np.ones((1, 2)), 0.0), "damping"),
        (lambda m, d: exact_fisher(np.ones((1, 1, 100)), np.ones((1, 1, 100))), "inputs, deltas"),
        (lambda m, d: LayerFactors.of(np.ones((2, 1, 2)), np.ones((3, 1, 2))), "deltas"),
        (lambda m, d: LayerFactors.of(np.ones((2, 1, 2)), np.ones((2, 1, 2)) * np.inf), "inputs"),
        (lambda m, d: LayerFactors.of(*traces(), mask=np.zeros((40, 1))), "mask"),
        (lambda m, d: LayerFactors.of(*traces(), mask=np.zeros((4, 1))), "mask"),
        (lambda m, d: token_chunks([1, 2], 2, overlap=2), "overlap"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, argument: str) -> None:
    data = [(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))]
    with pytest.raises(InputError, match=rf"^{argument}.*: got .*, want "):
        call(nn.Linear(3, 2), data)


@pytest.mark.property
def test_what_cannot_be_fused_is_refused() -> None:
    torch.manual_seed(0)
    crossed, data = Attention(shared=False), token_batches()
    with pytest.raises(InputError, match=r"^fuse_qkv: got attn.qkv, whose parts read different"):
        KFACFactors.fit(crossed, data)
    assert len(KFACFactors.fit(crossed, data, fuse_qkv=False).layers) == 4
    mixed = Attention()
    mixed.attn["wk"] = nn.Linear(6, 6, bias=False)
    with pytest.raises(InputError, match=r"^fuse_qkv: got attn.qkv, of which only some"):
        linear_sites(mixed)


@pytest.mark.property
def test_a_loader_that_changes_its_mind_is_noticed() -> None:
    class Shrinking:
        reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            n = 6 if self.reads == 1 else 4
            yield torch.randn(n, 3), torch.zeros(n, dtype=torch.long)

    with pytest.raises(InputError, match=r"^loader: got 4 examples at the second reading"):
        KFACFactors.fit(nn.Linear(3, 2), Shrinking())
