"""The judge of selections: what arms see, what is paired, and what it refuses."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from scoredraw.data_selection.representatives import k_center
from scoredraw.datasets import flip_labels
from scoredraw.errors import InputError
from scoredraw.metrics import paired_difference
from scoredraw.papers import selection_trials as trials
from scoredraw.papers.sentence_embeddings import PACKAGE
from scoredraw.papers.training import MLPEnsemble

pytestmark = pytest.mark.contract

ENCODER = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the sentence encoder is not installed"
)


def first(features, labels, size, seed):
    return np.arange(size)


@pytest.fixture(scope="module")
def clothes() -> trials.Trial:
    arms = {"k-center": lambda x, y, m, s: k_center(x, m, rng=s).indices, "first": first}
    return trials.clothes_trial(arms, sizes=[20, 60], seeds=3, flip=0.25, pool=400, steps=60)


def test_clothes_smoke(clothes) -> None:
    assert clothes.sizes == [20, 60]
    assert clothes.arms == ["uniform", "uniform by class", "k-center", "first"]
    assert (clothes.pool, clothes.flip, clothes.steps) == (400, 0.25, 60)
    values = np.array([of[arm] for of in clothes.accuracy.values() for arm in clothes.arms])
    assert values.shape == (8, 3)
    assert (values > 0.12).all()  # ten classes: it learns
    assert clothes.everything.mean() > values.mean()
    assert all((took >= 0).all() for of in clothes.seconds.values() for took in of.values())


def test_gain_is_paired_with_the_uniform_draw(clothes) -> None:
    of = clothes.accuracy[60]
    expected = paired_difference(of["k-center"], of["uniform"], comparisons=2)
    assert clothes.gain("k-center", 60, comparisons=2) == expected
    assert clothes.gain("first", 20, over="first").value == 0
    with pytest.raises(InputError, match="arm: got 'none', want one of uniform"):
        clothes.gain("none", 60)
    with pytest.raises(InputError, match="size: got 61"):
        clothes.gain("first", 61)


def test_table_has_every_arm_and_size(clothes) -> None:
    table = clothes.table("Clothes")
    assert table.title == "Clothes"
    assert len(table.rows) == 1 + 2 * 4
    assert table.rows[0][:2] == ["everything", 400]
    assert table.rows[1][0] == "uniform"
    assert table.rows[1][3] is None
    assert table.rows[3][3] == clothes.gain("k-center", 20)
    assert "25% of the pool's labels are wrong" in table.note


def test_equal_choices_end_equal_and_the_seed_decides() -> None:
    """Same rows, flips and initial weights: the same accuracy to the last digit."""
    run = lambda rng: trials.clothes_trial(  # noqa: E731
        {"a": first, "b": first}, sizes=[30], seeds=2, pool=150, steps=25, rng=rng, flip=0.2
    ).accuracy[30]
    one, again, other = run(0), run(0), run(1)
    assert one["a"].tolist() == one["b"].tolist()
    assert all(one[arm].tolist() == again[arm].tolist() for arm in one)
    assert one["a"].tolist() != other["a"].tolist()
    assert one["a"][0] != one["a"][1]


def test_arms_see_the_same_pool_wrong_labels_and_seed() -> None:
    seen = {"a": [], "b": []}

    def arm(name):
        def look(x, y, size, seed):
            seen[name].append((x, y.copy(), seed))
            with pytest.raises(ValueError, match="read-only"):
                x[0, 0] = 1.0
            return np.arange(size)

        return look

    both = {name: arm(name) for name in seen}
    trials.clothes_trial(both, sizes=[30], seeds=2, pool=150, steps=1, flip=0.2)
    for (x, y, seed), (x_b, y_b, seed_b) in zip(seen["a"], seen["b"], strict=True):
        assert (x.shape, x.dtype, seed) == ((150, 50), np.float64, seed_b)
        assert x is x_b
        assert (y == y_b).all()
    wrong = [y for _, y, _ in seen["a"]]
    assert (wrong[0] != wrong[1]).any()
    assert seen["a"][0][2] != seen["a"][1][2]


def test_wrong_labels_are_as_many_as_said_and_even() -> None:
    """10,000 flips over 9 other classes: each within five deviations (99) of 1,111."""
    y = np.zeros(20_000, np.int64)
    wrong, _ = flip_labels(y, 10, 0.5, 3)
    counts = np.bincount(wrong, minlength=10)
    assert counts[0] == 10_000
    assert np.abs(counts[1:] - 10_000 / 9).max() < 5 * np.sqrt(10_000 / 9 * 8 / 9)


def test_the_net_starts_as_its_seed_says_and_takes_every_step() -> None:
    x, y = torch.zeros(8, 1, 28, 28), np.zeros(8, np.int64)
    nets = [trials.train_net(x, y, np.zeros((0, 64), np.int64), s) for s in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert len(weights[0]) == 20_490
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()
    for rows in (np.arange(7), np.arange(64), np.arange(300)):
        table = trials.batches(rows, 12, 0)
        assert table.shape == (12, 64)
        assert set(np.unique(table[table >= 0])) == set(rows)


@ENCODER
def test_intents_smoke(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCOREDRAW_CACHE", str(tmp_path))
    starts: list[list[int]] = []
    initialise = MLPEnsemble.initialise
    monkeypatch.setattr(
        MLPEnsemble,
        "initialise",
        lambda sizes, seeds: starts.append(list(seeds)) or initialise(sizes, seeds),
    )
    trial = trials.intents_trial({"first": first}, sizes=[160], seeds=2, pool=300, steps=60)
    assert trial.arms == ["uniform", "uniform by class", "first"]
    assert trial.accuracy[160]["uniform"].shape == (2,)
    assert trial.accuracy[160]["uniform"].mean() > 0.1  # 150 intents
    assert len(set(starts[0])) == 2
    assert starts[0] == starts[0][:2] * 4  # everything and three arms, paired by seed


BAD = [
    ({"sizes": [401]}, "sizes: got [401], want counts from 10"),
    ({"sizes": [9]}, "sizes: got [9]"),
    ({"sizes": []}, "sizes: got none"),
    ({"sizes": [20, 20]}, "sizes: got [20, 20], want different ones"),
    ({"seeds": 0}, "seeds: got 0"),
    ({"flip": 1.0}, "flip: got 1.0"),
    ({"steps": 0}, "steps: got 0"),
    ({"pool": 10**6}, "pool: got 1000000"),
    ({"arms": {"uniform": first}}, "arms: got uniform"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_mistakes_are_named(change, message) -> None:
    good = {"arms": {}, "sizes": [20], "seeds": 1, "pool": 400, "steps": 1}
    with pytest.raises(InputError) as error:
        trials.clothes_trial(**{**good, **change})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.arange(19), "arm 'x': got shape (19,)"),
        (np.zeros(20, int), "arm 'x': got repeated rows"),
        (np.arange(20) - 1, "arm 'x': got rows outside the pool"),
        (np.arange(20.0), "arm 'x': got float64 values"),
    ],
)
def test_answers_that_are_no_choice_are_refused(answer, message) -> None:
    with pytest.raises(InputError) as error:
        trials.clothes_trial({"x": lambda *_: answer}, sizes=[20], seeds=1, pool=400, steps=1)
    assert str(error.value).startswith(message)
