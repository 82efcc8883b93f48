"""Influence and dot products from activations against gradients that were really formed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from torch import Tensor, nn  # noqa: E402

from scoredraw.data_selection.gradient_influence import (  # noqa: E402
    influence,
    linear_gradient_dots,
    linear_influence,
    mean_gradient,
    rademacher_projection,
)
from scoredraw.data_selection.gradients import gradient_dots  # noqa: E402
from scoredraw.data_selection.kronecker import KFACFactors  # noqa: E402
from scoredraw.data_selection.linear_traces import (  # noqa: E402
    TraceReader,
    document_mean,
    next_token_labels,
    summed_cross_entropy,
    token_chunks,
)
from scoredraw.errors import InputError  # noqa: E402


class Tokens(nn.Module):
    """A position-wise layer that runs twice, and a head: several positions an example."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(x)))).mean(1))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()


def tabular(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)


# ── Dot products ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_dots_at_one_position_are_those_of_the_gradients() -> None:
    model, first, second = mlp(), tabular(7), tabular(5, 1)
    got = linear_gradient_dots(model, first, second)
    torch.testing.assert_close(got, gradient_dots(model, first, second))


@pytest.mark.oracle
@pytest.mark.parametrize(("width", "length"), [(5, 4), (5, 1), (40, 2)])
def test_dots_over_several_positions_and_runs(width: int, length: int) -> None:
    """By pairs of positions (40 wide) and by gradients of a few examples (5 wide)."""
    torch.manual_seed(0)
    model = Tokens(width).double()
    sets = []
    for n in (6, 4):
        sets.append((torch.randn(n, length, width).double(), torch.randint(3, (n,))))
    torch.testing.assert_close(linear_gradient_dots(model, *sets), gradient_dots(model, *sets))


@pytest.mark.oracle
def test_dots_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoredraw.data_selection import gradient_influence

    torch.manual_seed(0)
    for width in (5, 40):
        model = Tokens(width).double()
        z = torch.randn(7, 3, width).double(), torch.randint(3, (7,))
        whole = linear_gradient_dots(model, z, z)
        monkeypatch.setattr(gradient_influence, "_CELLS", 60)
        torch.testing.assert_close(linear_gradient_dots(model, z, z), whole)
        monkeypatch.undo()


@pytest.mark.oracle
def test_chosen_layers_alone() -> None:
    model, z = mlp(), tabular(5)
    got = linear_gradient_dots(model, z, z, layers="2")
    torch.testing.assert_close(got, gradient_dots(model, z, z, parameters="2"))


# ── Influence ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_influence_is_the_product_with_every_gradient() -> None:
    model, train, reference = mlp(), tabular(20), tabular(9, 1)
    reader = TraceReader(model)
    factors = KFACFactors.fit(model, [train])
    P = factors.ihvp(mean_gradient(reader, [reference]), 0.01)
    rows = {name: [] for name in P}
    for i in range(20):
        for name, g in mean_gradient(reader, [(train[0][i : i + 1], train[1][i : i + 1])]).items():
            rows[name].append(g)
    formed = {name: torch.stack(g) for name, g in rows.items()}
    batches = [(train[0][s], train[1][s]) for s in (slice(0, 8), slice(8, 20))]
    for normalize in (False, True):
        got = linear_influence(reader, batches, P, normalize=normalize)
        want = influence(P, formed, normalize=normalize)
        np.testing.assert_allclose(got, want, rtol=1e-8)
    two = {name: torch.stack([value, 2 * value]) for name, value in P.items()}
    plain = linear_influence(reader, batches, P)
    np.testing.assert_allclose(
        linear_influence(reader, batches, two), np.stack([plain, 2 * plain], 1)
    )


@pytest.mark.oracle
def test_influence_is_the_loss_change_of_a_step() -> None:
    """A small step on one example lowers the reference loss by step x gradient product."""
    model, train, reference = mlp(), tabular(10), tabular(30, 1)
    reader = TraceReader(model)
    got = linear_influence(reader, [train], mean_gradient(reader, [reference]))
    step, want = 1e-6, []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = nn.functional.cross_entropy(model(reference[0]), reference[1]).item()
    for i in range(10):
        loss = nn.functional.cross_entropy(model(train[0][i : i + 1]), train[1][i : i + 1])
        g = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, d in zip(model.parameters(), g, strict=True):
                p -= step * d
        after = nn.functional.cross_entropy(model(reference[0]), reference[1]).item()
        want.append((before - after) / step)
        model.load_state_dict(start)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert (got > 0).any()
    assert (got < 0).any()


@pytest.mark.oracle
def test_inverse_curvature_gives_the_loss_change_of_retraining() -> None:
    """A softmax layer trained to its optimum, and again with one example's weight raised by eps.

    With the exact Hessian the reference loss would fall by eps I / n; the layer's sampled Fisher
    is that Hessian, but for its Kronecker form.
    """
    torch.manual_seed(0)
    x, y = tabular(60)
    model = nn.Linear(4, 3).double()
    reference = tabular(40, 2)

    def train(weights: Tensor) -> float:
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        solver = torch.optim.LBFGS(
            model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            solver.zero_grad()
            each = nn.functional.cross_entropy(model(x), y, reduction="none")
            size = model.weight.square().sum() + model.bias.square().sum()
            loss = (weights * each).mean() + 0.005 * size
            loss.backward()
            return loss

        solver.step(closure)
        return nn.functional.cross_entropy(model(reference[0]), reference[1]).item()

    before = train(torch.ones(60).double())
    reader = TraceReader(model)
    g = torch.Generator().manual_seed(0)
    many = [(x, y)] * 50  # labels are drawn anew each time
    factors = KFACFactors.fit(model, many, fisher="sampled", generator=g)
    gradient = mean_gradient(reader, [reference])
    predicted = linear_influence(reader, [(x, y)], factors.ihvp(gradient, 0.01))
    plain = linear_influence(reader, [(x, y)], gradient)
    real = []
    for i in range(60):
        weights = torch.ones(60).double()
        weights[i] += 0.1
        real.append(before - train(weights))
    correlation = np.corrcoef(predicted, real)[0, 1]
    assert correlation > 0.95
    assert correlation > np.corrcoef(plain, real)[0, 1]
    slope = np.polyfit(predicted, np.array(real) * 60 / 0.1, 1)[0]
    assert 0.5 < slope < 2


@pytest.mark.property
def test_every_reference_counts_whatever_the_batches() -> None:
    """Five batches of three and a tail of one: released code drops the last of a loader."""
    model, (x, y) = mlp(), tabular(16)
    reader = TraceReader(model)
    whole = mean_gradient(reader, [(x, y)])
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 16, 3)]
    for name, value in mean_gradient(reader, batches).items():
        torch.testing.assert_close(value, whole[name])
    loss = nn.functional.cross_entropy(model(x), y)
    weight = torch.autograd.grad(loss, model[2].weight)[0]
    torch.testing.assert_close(whole["2"], weight)


@pytest.mark.property
def test_an_example_without_a_gradient_has_influence_zero() -> None:
    model = nn.Linear(2, 2).double()
    z = torch.zeros(2, 1, 2).double(), torch.tensor([[-100], [1]])
    reader = TraceReader(model)
    P = mean_gradient(reader, [z])
    got = linear_influence(reader, [z], P, normalize=True)
    assert got[0] == 0.0
    assert got[1] == pytest.approx(1.0)
    still = {name: 0 * value for name, value in P.items()}
    assert linear_influence(reader, [z], still, normalize=True).tolist() == [0.0, 0.0]


@pytest.mark.property
def test_normalised_influence_is_a_cosine() -> None:
    rng = np.random.default_rng(0)
    rows, reference = rng.normal(size=(8, 20)), rng.normal(size=(3, 20))
    got = influence(reference, rows)
    cosine = (
        rows
        @ reference.T
        / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(reference, axis=1))
    )
    np.testing.assert_allclose(got, cosine.mean(axis=1))
    np.testing.assert_allclose(influence(reference, 7 * rows), got)
    np.testing.assert_allclose(
        influence(reference, rows, normalize=False), (rows @ reference.T).mean(1)
    )


# ── Projections ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0])
def test_projected_dot_products_have_the_variance_of_the_law(cosine: float) -> None:
    """Unit rows of flat entries: mean cos, variance (1 + cos^2) / k minus 2 sum x^2 y^2 / k.

    600 projections: the relative error of a variance is sqrt(2 / 600) = .06; bounds of 5 of those,
    and of 5 standard errors for the mean (false alarm < 1e-5).
    """
    rng, D, k, trials = np.random.default_rng(0), 400, 64, 600
    x, z = rng.normal(size=(2, D))
    x /= np.linalg.norm(x)
    z -= (z @ x) * x
    y = cosine * x + np.sqrt(1 - cosine**2) * z / np.linalg.norm(z)
    pair = np.stack([x, y])
    dots = []
    for seed in range(trials):
        projected = rademacher_projection(pair, k, seed=seed)
        dots.append(projected[0] @ projected[1])
    variance = (1 + cosine**2 - 2 * (x**2 * y**2).sum()) / k
    assert abs(np.mean(dots) - cosine) < 5 * np.sqrt(variance / trials)
    assert np.var(dots) == pytest.approx(variance, rel=5 * np.sqrt(2 / trials))


@pytest.mark.property
def test_projection_is_the_same_for_any_rows_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoredraw.data_selection import gradient_influence

    rows = np.random.default_rng(0).normal(size=(6, 50))
    whole = rademacher_projection(rows, 70, seed=3)
    np.testing.assert_allclose(rademacher_projection(rows[2:4], 70, seed=3), whole[2:4])
    monkeypatch.setattr(gradient_influence, "_CELLS", 7 * 128)
    np.testing.assert_allclose(rademacher_projection(rows, 70, seed=3), whole)
    assert not np.allclose(rademacher_projection(rows, 70, seed=4), whole)
    signs = rademacher_projection(np.eye(50), 70, seed=3) * np.sqrt(70)
    assert set(np.unique(signs.round(9))) == {-1.0, 1.0}


@pytest.mark.property
def test_reference_and_training_gradients_are_projected_alike() -> None:
    """By name of the layer: in any order, and influence of projections tends to influence."""
    rng = np.random.default_rng(0)
    reference = {"a": rng.normal(size=(1, 4, 5)), "b": rng.normal(size=(1, 3, 2))}
    noise = {name: rng.normal(size=(30, *value.shape[1:])) for name, value in reference.items()}
    train = {name: noise[name] + value for name, value in reference.items()}
    other = {"b": train["b"], "a": train["a"]}
    first, second = (rademacher_projection(g, 4096) for g in (train, other))
    np.testing.assert_allclose(first, second)
    projected = influence(rademacher_projection(reference, 4096), first)
    np.testing.assert_allclose(projected, influence(reference, train), atol=6 / np.sqrt(4096))
    with pytest.raises(InputError, match=r"^gradients: got layers \['a'\], want \['a', 'b'\]"):
        influence(reference, {"a": train["a"]})


# ── Long documents ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_chunks_of_a_long_document() -> None:
    lengths = [len(piece) for piece in token_chunks(range(2600))]
    assert lengths == [1024, 1024, 554]  # the rest of 2600 - 2 x 1023
    assert [len(piece) for piece in token_chunks(range(2500))] == [1024, 1024]  # 454 are dropped
    assert [len(piece) for piece in token_chunks(range(100))] == [100]  # the first never is
    assert [piece[0] for piece in token_chunks(range(2600))] == [0, 1023, 2046]
    assert max(piece[-1] for piece in token_chunks(range(50_000))) < 20_480
    np.testing.assert_allclose(document_mean([1, 3, 5, 7.0], [1, 0, 1, 1]), [3, 13 / 3])


@pytest.mark.oracle
def test_next_token_labels_give_the_language_models_loss() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = summed_cross_entropy(logits, next_token_labels(ids, mask))
    want = [
        nn.functional.cross_entropy(logits[i, : n - 1], ids[i, 1:n], reduction="sum")
        for i, n in enumerate((5, 3))
    ]
    torch.testing.assert_close(got, torch.stack(want))


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda r, z: influence(np.ones((1, 3)), np.ones((2, 4))), "gradients"),
        (lambda r, z: influence({"": np.ones((2, 2))}, np.ones((2, 4))), "gradients"),
        (lambda r, z: influence({"": np.ones((2, 2))}, {"": np.ones((2, 2))}), "gradients"),
        (lambda r, z: linear_influence(r, [z], {"x": torch.ones(3, 5)}), "preconditioned"),
        (lambda r, z: linear_influence(r, [], mean_gradient(r, [z])), "batches"),
        (lambda r, z: mean_gradient(r, []), "batches"),
        (lambda r, z: rademacher_projection(np.ones((2, 3)), 0), "width"),
        (lambda r, z: rademacher_projection(np.ones(3)), "gradients"),
        (lambda r, z: rademacher_projection(np.full((2, 3), np.nan)), "gradients"),
        (lambda r, z: document_mean([1.0], [1]), "documents"),
        (lambda r, z: document_mean([1.0], [0, 0]), "documents"),
        (lambda r, z: linear_gradient_dots(r.model, z, z, layers="nothing"), "layers"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, argument: str) -> None:
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
        call(TraceReader(mlp()), tabular(4))
