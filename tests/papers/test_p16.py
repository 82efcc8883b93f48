"""The training kit against torch's own loop, the compared subsets, and the experiment itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

from scoredraw.errors import InputError  # noqa: E402
from scoredraw.papers import p16_rs2  # noqa: E402
from scoredraw.papers.training import (  # noqa: E402
    MLPEnsemble,
    digits_split,
    minibatches,
    train_ensemble,
)
from scoredraw.reports import Report, run_paper  # noqa: E402

DATA = digits_split()
SMALL = {"n_classes": 10, "hidden": (16, 12)}


def batches_of(seeds: range, rows: int = 70, rounds: int = 3) -> np.ndarray:
    return np.stack([minibatches([np.arange(rows)] * rounds, 16, rng=s) for s in seeds])


def parameters(ensemble: MLPEnsemble, member: int) -> list[np.ndarray]:
    return [p[member].detach().numpy() for p in [*ensemble.weights, *ensemble.biases]]


# ── the training kit ────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_training_is_torchs_own_loop() -> None:
    """Linear layers, Adam, CosineAnnealingLR and CrossEntropyLoss of torch give the same logits."""
    batches = batches_of(range(1))[0]
    torch.manual_seed(21)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise([64, 16, 12, 10])]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=len(batches))
    x, y = torch.tensor(DATA.train_x), torch.tensor(DATA.train_y)
    for batch in batches:
        rows = torch.tensor(batch[batch >= 0])
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
    ours = train_ensemble(DATA.train_x, DATA.train_y, batches[None], seed=[21], **SMALL)
    want = model(torch.tensor(DATA.test_x)).detach().numpy()
    np.testing.assert_allclose(ours.logits(DATA.test_x)[0], want, atol=2e-5)


@pytest.mark.property
def test_a_member_ends_where_it_would_have_ended_alone() -> None:
    batches = batches_of(range(4))
    rng = np.random.default_rng(0)
    labels = np.stack([rng.permutation(DATA.train_y) for _ in range(4)])
    inputs = np.stack([DATA.train_x * (1 + s) for s in range(4)])
    weights = rng.uniform(0.5, 2, size=labels.shape)
    together = train_ensemble(inputs, labels, batches, weights=weights, seed=5, **SMALL)
    for s in range(4):
        alone = train_ensemble(
            inputs[s], labels[s], batches[s : s + 1], weights=weights[s], seed=5 + s, **SMALL
        )
        for p, q in zip(parameters(together, s), parameters(alone, 0), strict=True):
            np.testing.assert_allclose(p, q, atol=1e-5)


@pytest.mark.oracle
def test_loss_weights_count_examples() -> None:
    """Weight 2 on one row of a batch of three is the mean over it twice and the others, times 4/3.

    Adam does not see a constant factor of the gradient (beyond its epsilon).
    """
    weights = np.ones(len(DATA.train_y))
    weights[7] = 2.0
    once = np.array([[[7, 8, 9, -1]]] * 1).repeat(5, axis=1)
    twice = np.array([[[7, 7, 8, 9]]] * 1).repeat(5, axis=1)
    a = train_ensemble(DATA.train_x, DATA.train_y, once, weights=weights, **SMALL)
    b = train_ensemble(DATA.train_x, DATA.train_y, twice, **SMALL)
    for p, q in zip(parameters(a, 0), parameters(b, 0), strict=True):
        np.testing.assert_allclose(p, q, atol=2e-4)


@pytest.mark.oracle
def test_input_gradients_are_autograds() -> None:
    ensemble = train_ensemble(DATA.train_x, DATA.train_y, batches_of(range(3)), **SMALL)
    x = torch.tensor(DATA.train_x[:50]).expand(3, -1, -1).clone().requires_grad_()
    logits = ensemble.layers(x)[-1]
    logits[:, torch.arange(50), torch.tensor(DATA.train_y[:50])].sum().backward()
    got = ensemble.input_gradients(DATA.train_x[:50], DATA.train_y[:50])
    assert np.abs(got).max() > 0.01  # not all dead
    np.testing.assert_allclose(got, x.grad.numpy(), atol=1e-6)


@pytest.mark.property
def test_checkpoints_see_the_ensemble_at_their_steps() -> None:
    batches = batches_of(range(2))
    seen: dict[int, Any] = {}
    last = train_ensemble(
        DATA.train_x, DATA.train_y, batches, schedule="constant",
        checkpoint_steps=[0, 5, batches.shape[1]],
        on_checkpoint=lambda t, e: seen.update({t: e.logits(DATA.test_x).copy()}), **SMALL,
    )  # fmt: skip
    assert sorted(seen) == [0, 5, batches.shape[1]]
    start = MLPEnsemble.initialise([64, 16, 12, 10], [0, 1]).logits(DATA.test_x)
    np.testing.assert_allclose(seen[0], start, atol=1e-6)
    five = train_ensemble(DATA.train_x, DATA.train_y, batches[:, :5], schedule="constant", **SMALL)
    np.testing.assert_allclose(seen[5], five.logits(DATA.test_x), atol=1e-6)
    np.testing.assert_array_equal(seen[batches.shape[1]], last.logits(DATA.test_x))
    assert last.hidden(DATA.test_x).shape == (2, len(DATA.test_y), 12)


@pytest.mark.property
def test_minibatches_cut_each_round_without_losing_a_row() -> None:
    rounds = [np.arange(10), np.arange(20, 27), np.array([3])]
    table = minibatches(rounds, 4, rng=1)
    assert table.shape == (3 + 2 + 1, 4)
    for want, got in zip(rounds, np.split(table, [3, 5]), strict=True):
        assert sorted(got[got >= 0].tolist()) == want.tolist()
    assert (table[:2] >= 0).all()


@pytest.mark.property
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"batches": np.full((1, 2, 3), -1)}, "batches"),
        ({"batches": np.full((1, 2, 3), 5000)}, "batches"),
        ({"batches": np.zeros((2, 3), dtype=int)}, "batches"),
        ({"y": np.full(1078, 10)}, "y"),
        ({"y": np.zeros(3, dtype=int)}, "y"),
        ({"schedule": "linear"}, "schedule"),
        ({"seed": [1, 2]}, "seed"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], argument: str) -> None:
    arguments: dict[str, Any] = {
        "x": DATA.train_x, "y": DATA.train_y, "batches": batches_of(range(1)), **SMALL, **change
    }  # fmt: skip
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
        train_ensemble(**arguments)
    with pytest.raises(InputError, match=r"^subsets: got"):
        minibatches([[]], 4)


# ── the subsets RS2 is compared with ────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_herding_keeps_the_mean_of_each_class_better_than_chance() -> None:
    """Worse than a random subset of the same class in none of 10 classes."""
    features, labels = DATA.train_x, DATA.train_y
    order = p16_rs2.herding(features, labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    picked = p16_rs2.chosen(order, labels, 100, "herding")
    counts = np.bincount(labels[picked])
    assert counts.sum() == 100
    assert counts.min() >= 9
    random = np.random.default_rng(0)
    for c in range(10):
        rows = np.flatnonzero(labels == c)
        mine = picked[labels[picked] == c]
        centre = features[rows].mean(axis=0)
        chance = [
            np.linalg.norm(features[random.permutation(rows)[: len(mine)]].mean(axis=0) - centre)
            for _ in range(50)
        ]
        assert np.linalg.norm(features[mine].mean(axis=0) - centre) < min(chance)


@pytest.mark.oracle
def test_k_centres_is_a_two_approximation() -> None:
    """Its radius is at most the distance between any two of k + 1 of its own picks."""
    picks = p16_rs2.k_centres(DATA.train_x, 31)
    assert len(set(picks.tolist())) == 31
    centres = DATA.train_x[picks[:30]].astype(np.float64)
    distance = np.linalg.norm(DATA.train_x[:, None] - centres, axis=2).min(axis=1)
    assert distance.argmax() == picks[30]
    among = np.linalg.norm(DATA.train_x[picks][:, None] - DATA.train_x[picks], axis=2)
    assert distance.max() <= among[np.triu_indices(31, 1)].min() + 1e-6


@pytest.mark.property
def test_wrong_labels_move_exactly_their_share_to_other_classes() -> None:
    noisy = p16_rs2.wrong_labels(DATA.train_y, 0.2, seed=3)
    assert (noisy != DATA.train_y).sum() == round(0.2 * len(noisy))
    assert set(noisy.tolist()) == set(range(10))
    np.testing.assert_array_equal(p16_rs2.wrong_labels(DATA.train_y, 0.0, 3), DATA.train_y)


@pytest.mark.oracle
def test_share_seen_counts_distinct_examples() -> None:
    subsets = [np.array([0, 1]), np.array([1, 2]), np.array([0, 2]), np.array([3, 4])]
    got = p16_rs2.share_seen(subsets, 10)
    np.testing.assert_allclose(got, [0.2, 0.3, 0.3, 0.5])


# ── the experiment ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_a_fresh_subset_beats_a_fixed_one_on_twelve_paired_seeds() -> None:
    """Means of 12 seeds: the bounds lie 2.5 (5 %) and 3 (10 %) standard errors off: < 1e-2."""
    plan = p16_rs2.Plan(seeds=12, ratios=(0.05, 0.1), long=False)
    results = p16_rs2.Trial(plan, DATA, rng=1).uniform()
    gain = {r: p16_rs2.difference(results, p16_rs2.WITHOUT, p16_rs2.STATIC, r) for r in plan.ratios}
    assert gain[0.05].value >= 0.10
    assert gain[0.1].value >= 0.02
    for ratio in plan.ratios:
        alike = p16_rs2.difference(results, p16_rs2.WITHOUT, p16_rs2.WITH, ratio)
        assert alike.low >= -0.05
        assert alike.high <= 0.05
    assert results[p16_rs2.FULL, 1.0].accuracy.mean() > 0.96


@pytest.mark.contract
def test_smoke_runs_to_its_end_without_verdicts() -> None:
    report = run_paper(16, "smoke", 0)
    assert report.paper == 16
    assert report.claims
    assert all(claim.verdict is None for claim in report.claims)
    assert Report.from_json(report.to_json()).tables == report.tables
    again = run_paper(16, "smoke", 0)
    assert [c.measured for c in again.claims] == [c.measured for c in report.claims]


@pytest.mark.contract
def test_every_part_of_the_full_run_works(monkeypatch: pytest.MonkeyPatch) -> None:
    small = p16_rs2.Plan(seeds=2, rounds=3, ratios=(0.05, 0.1, 0.3), selections=True)
    monkeypatch.setitem(p16_rs2.PLANS, "full", small)
    report = p16_rs2.run("full", 0)
    assert len(report.tables) == 3
    assert len(report.figures) == 3
    names = [row[0] for row in report.tables[0].rows]
    assert {"EL2N, hardest", "VoG, easiest", "herding", "k-centres"} <= set(names)
    accuracies = {str(row[1:]) for row in report.tables[0].rows}
    assert len(accuracies) == len(names)
    seconds = {row[0]: row[2:] for row in report.tables[2].rows}
    assert seconds[p16_rs2.WITHOUT][0] == 0.0
    assert all(seconds[name][0] > 0 for name in ("EL2N, hardest", "VoG, easiest", "herding"))
    assert all(claim.verdict in ("holds", "fails", "undecided") for claim in report.claims)
    assert Report.from_json(report.to_json()).claims is not None
