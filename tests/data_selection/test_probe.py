"""The table probe: closed forms against torch's autograd, determinism, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from scoredraw.data_selection import probe
from scoredraw.data_selection.probe_network import Network, train_probe
from scoredraw.errors import InputError

G = np.random.default_rng(5)


def blobs(n: int = 240, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    y = g.integers(classes, size=n)
    return g.normal(size=(n, 5)) + 2.5 * np.eye(5)[y], y


def as_torch(net: Network) -> torch.nn.Sequential:
    """The same network; a binary probe's single output becomes (-z/2, z/2)."""
    layers: list[torch.nn.Module] = []
    for w, b in zip(net.weights, net.biases, strict=True):
        layer = torch.nn.Linear(*w.shape).double()
        layer.weight.data, layer.bias.data = torch.tensor(w.T), torch.tensor(b)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["mlp", "logistic"])
@pytest.mark.parametrize("classes", [2, 3])
def test_closed_forms_match_autograd(kind: Any, classes: int) -> None:
    x, y = blobs(60, classes)
    run = train_probe(x, y, probe=kind, epochs=2)
    net = run.checkpoints[-1]
    model = as_torch(net)
    logits, hidden = net.logits(x), net.last_hidden(x)
    assert hidden.shape == (60, 64 if kind == "mlp" else 5)
    inputs = net.input_gradients(x, y)
    squares = net.squared_gradient_norms(x, y)
    for i in range(0, 60, 7):
        row = torch.tensor(x[i], requires_grad=True)
        z = model(row)
        if classes == 2:
            z = torch.cat([-z / 2, z / 2])
        np.testing.assert_allclose(logits[i], z.detach(), rtol=1e-9, atol=1e-12)
        (g,) = torch.autograd.grad(z[y[i]], row, retain_graph=True)
        np.testing.assert_allclose(inputs[i], g, rtol=1e-9, atol=1e-12)
        loss = torch.nn.functional.cross_entropy(z, torch.tensor(y[i]))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        want = sum(float(g.square().sum()) for g in grads)
        assert squares[i] == pytest.approx(want, rel=1e-8)


@pytest.mark.oracle
@pytest.mark.parametrize("classes", [2, 3])
def test_the_network_is_scikit_learns(classes: int) -> None:
    from scipy.special import softmax
    from sklearn.neural_network import MLPClassifier

    x, y = blobs(90, classes)
    model = MLPClassifier((7, 6), random_state=0)
    for _ in range(5):
        model.partial_fit(x, y, classes=np.arange(classes))
    net = Network(tuple(model.coefs_), tuple(model.intercepts_))
    np.testing.assert_allclose(softmax(net.logits(x), axis=1), model.predict_proba(x), rtol=1e-9)


@pytest.mark.contract
def test_scores_are_deterministic_and_the_same_alone_or_together() -> None:
    x, y = blobs()
    together = probe.score_all(x, y, seeds=2, epochs=4, rng=7)
    assert set(together) == set(probe.METHODS)
    for name, (scores, seconds) in together.items():
        assert scores.shape == (240,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert seconds > 0
        epochs = probe.EARLY_EPOCH if name in probe.EARLY else 4
        alone = getattr(probe, f"score_{name}")(x, y, seeds=2, epochs=epochs, rng=7)
        np.testing.assert_array_equal(alone, scores)
    other = probe.score_el2n(x, y, seeds=2, rng=8)
    assert not np.array_equal(other, together["el2n"][0])
    named = probe.score_el2n(x, np.array(["c", "a", "b"])[(y + 1) % 3], seeds=2, rng=7)
    # other names in another order: another run, the same kind of score
    assert np.corrcoef(named, together["el2n"][0])[0, 1] > 0.5


@pytest.mark.oracle
def test_scores_find_the_examples_they_should() -> None:
    """Flipped labels stand out for EL2N, GraNd and PVI (AUC of chance: 0.5; deviation 0.04)."""
    x, y = blobs(600, seed=3)
    wrong = np.zeros(600, dtype=bool)
    wrong[G.choice(600, 60, replace=False)] = True
    noisy = np.where(wrong, (y + 1) % 3, y)
    scores = probe.score_all(x, noisy, ["el2n", "grand", "pvi", "forgetting", "tracin"], seeds=2)
    from sklearn.metrics import roc_auc_score

    for name, (values, _) in scores.items():
        hard = -values if name in probe.HIGH_IS_EASY else values
        assert roc_auc_score(wrong, hard) > 0.8, name


@pytest.mark.oracle
def test_pvi_is_the_gain_over_the_class_shares() -> None:
    x, y = blobs(400)
    nothing = np.zeros((400, 2))
    # empty inputs: training tends to the class shares, and nothing is gained
    assert np.abs(probe.score_pvi(nothing, y, seeds=1, epochs=30)).max() < 0.25
    assert probe.score_pvi(x, y, seeds=1, epochs=10).mean() > 0.8


@pytest.mark.oracle
def test_vog_is_normalised_within_classes() -> None:
    x, y = blobs()
    scores = probe.score_vog(x, y, seeds=2, epochs=5)
    for c in range(3):
        assert scores[y == c].mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.contract
def test_progress_counts_epochs() -> None:
    x, y = blobs(60)
    seen: list[tuple[int, int]] = []
    probe.score_vog(
        x, y, seeds=2, epochs=3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.contract
def test_scale_and_constant_columns_do_not_matter() -> None:
    x, y = blobs(120)
    moved = np.column_stack([x * 1e3 + 5e6, np.full(120, 7.0)])
    padded = np.column_stack([x, np.zeros(120)])
    a, b = probe.score_el2n(moved, y, seeds=1), probe.score_el2n(padded, y, seeds=1)
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("features", "labels", "options", "says"),
    [
        (np.ones((4, 2)), [1, 1, 1, 1], {}, "labels: got one class"),
        (np.ones((4, 2)), [1, 2, 3, 4], {}, "labels: got 4 classes in 4 rows"),
        (np.ones((4, 2)), [0.5, 1.5, 2.5, 2.5], {}, "labels: got numbers that are no classes"),
        (np.ones((4, 2)), [0, np.nan, 1, 1], {}, "labels: got numbers that are no classes, or NaN"),
        (np.ones((4, 2)), [0, 1, 1], {}, r"labels: got shape \(3,\)"),
        (np.ones((4, 2)), np.array(["a", None, 1, "a"], dtype=object), {}, "labels: got values"),
        (np.ones(4), [0, 1, 1, 0], {}, "features: got shape"),
        (np.ones((0, 2)), [], {}, "features: got shape"),
        (np.full((4, 2), np.nan), [0, 1, 1, 0], {}, "features: got NaN or infinity in examples 0"),
        (np.array([["a"], ["b"]]), [0, 1], {}, "features: got <U1 values"),
        (np.ones((4, 2)), [0, 1, 1, 0], {"seeds": 0}, "seeds: got 0"),
        (np.ones((4, 2)), [0, 1, 1, 0], {"methods": ["vogue"]}, "methods: got vogue"),
        (np.ones((4, 2)), [0, 1, 1, 0], {"methods": []}, "methods: got none"),
        (np.ones((4, 2)), [0, 1, 1, 0], {"probe": "tree"}, "probe: got 'tree'"),
        (np.ones((4, 2)), [0, 1, 1, 0], {"early": 11}, "early: got 11"),
        (
            np.ones((4, 2)),
            [0, 1, 1, 0],
            {"epochs": 1, "early": 1},
            "epochs: got 1, want at least 2",
        ),
    ],
)
def test_refusals(features: Any, labels: Any, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        probe.score_all(features, labels, **options)


@pytest.mark.contract
def test_vog_of_a_logistic_probe_says_why_not() -> None:
    x, y = blobs(60)
    with pytest.raises(InputError, match="depends on the label alone"):
        probe.score_vog(x, y, probe="logistic")
    assert probe.score_el2n(x, y, probe="logistic", seeds=1).shape == (60,)


@pytest.mark.contract
def test_the_core_install_is_enough() -> None:
    code = (
        "import sys; import scoredraw.data_selection.probe as p\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'pyarrow.dataset'} & set(sys.modules)\n"
        "p.score_all([[0.0], [1.0], [0.1], [0.9]], [0, 1, 0, 1], seeds=1, epochs=2)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
