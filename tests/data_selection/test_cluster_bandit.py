"""The cluster bandit's selection: what it takes, when it ends, what it never does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.data_selection.cluster_bandit import QuadResult, quad_select, top_influence
from scoredraw.data_selection.tabular_influence import SoftmaxInfluence, quad_examples
from scoredraw.errors import InputError
from scoredraw.journal import Journal

pytestmark = pytest.mark.property

IDS = np.repeat(np.arange(8), 30)


def worths(spread: float = 0.3, seed: int = 0) -> np.ndarray:
    """Clusters 0 .. 3 help, 4 .. 7 harm; rows differ by `spread` within a cluster."""
    means = np.array([0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4])
    return means[IDS] + spread * np.random.default_rng(seed).normal(size=len(IDS))


def select(budget: float = 60, worth: np.ndarray | None = None, **options: Any) -> QuadResult:
    values = worths() if worth is None else worth
    given = {"samples_per_pull": 5, "block": 6, "B": 3, "rng": 0, **options}
    return quad_select(IDS, lambda rows: values[rows], budget, **given)


# ── What it never does ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), budget=st.integers(1, 260), samples=st.integers(1, 12),
    block=st.integers(1, 40), B=st.integers(1, 12), alpha=st.sampled_from([0.0, 0.3, 1.0, np.inf]),
    within=st.sampled_from(["block", "threshold", "top"]), tau=st.sampled_from([-np.inf, 0.0, 0.2]),
    neighbours=st.booleans(),
)  # fmt: skip
def test_budget_duplicates_and_exhausted_clusters(
    seed: int, budget: int, samples: int, block: int, B: int, alpha: float, within: Any,
    tau: float, neighbours: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rng.integers(1, 15), size=240)
    labels, codes = np.unique(ids, return_inverse=True)
    worth = rng.normal(size=len(labels))[codes] + rng.normal(size=240)
    seen: list[int] = []

    def influence(rows: np.ndarray) -> np.ndarray:
        seen.extend(rows.tolist())
        return worth[rows]

    options: dict[str, Any] = {}
    if neighbours:
        options = {"centres": rng.normal(size=(len(labels), 2)), "gamma": 1.0}
    found = quad_select(
        ids, influence, budget, samples_per_pull=samples, block=block, B=B, alpha=alpha,
        within=within, tau=tau, rng=seed, **options,
    )  # fmt: skip
    assert len(found.indices) <= budget
    assert len(set(found.indices.tolist())) == len(found.indices)
    assert len(set(seen)) == len(seen) == found.n_evaluated  # no row is computed twice
    np.testing.assert_array_equal(found.evaluated, seen)
    np.testing.assert_array_equal(found.influence, worth[seen])
    left = dict(zip(*np.unique(ids, return_counts=True), strict=True))
    for pull in found.trace:
        assert left[pull.cluster] > 0, "a cluster that had nothing left was pulled"
        left[pull.cluster] -= pull.taken
        assert (pull.taken > 0) <= (pull.reward > tau)
    if budget >= 240:
        assert found.reason == "whole pool"
        assert len(found.indices) == 240
    elif found.reason == "budget":
        assert len(found.indices) == budget
    if tau == -np.inf:
        assert len(found.indices) == min(budget, 240)


def test_what_was_accepted_is_what_is_kept() -> None:
    """Released code keeps as many blocks from the head of the cluster: other rows."""
    worth = worths()
    found = select(worth=worth, rng=1)
    expected = []
    for pull in found.trace:
        before = len(expected)
        expected.extend(found.indices[before : before + pull.taken].tolist())
        block = found.indices[before : before + pull.taken]
        if pull.taken:
            assert set(IDS[block]) == {pull.cluster}
            looked = worth[block[: min(5, len(block))]]
            if len(block) == 6:
                assert looked.mean() == pytest.approx(pull.reward)  # the rows that were judged
    assert expected == found.indices.tolist()
    helped = [pull.cluster for pull in found.trace if pull.taken]
    heads = np.concatenate([np.flatnonzero(c == IDS)[:6] for c in set(helped)])
    assert not set(heads.tolist()) <= set(found.indices.tolist())


def test_the_first_round_is_random() -> None:
    """40 seeds: clusters 0, 1, 2 in order have a chance of 1 in 336 each time."""
    first = [tuple(p.cluster for p in select(rng=s).trace if p.round == 0) for s in range(40)]
    assert len(set(first)) > 20


# ── What it is for ───────────────────────────────────────────────────────────────────────────────


def test_good_clusters_are_pulled_and_bad_ones_left() -> None:
    found = select(90)
    assert found.reason == "budget"
    assert worths()[found.indices].mean() > 0.2
    assert found.clusters["taken"][4:].sum() <= 12
    assert found.n_evaluated < 140
    mean = [np.mean([p.reward for p in found.trace if p.cluster == c]) for c in range(8)]
    np.testing.assert_allclose(found.clusters["mean"], mean)
    assert found.clusters["pulls"].sum() == len(found.trace)
    assert np.isfinite(found.clusters["score"]).all()
    assert found.draw.method == "quad"
    assert len(found.draw) == 90


def test_alpha_goes_from_the_best_cluster_to_all_in_turn() -> None:
    """With rewards without noise: greedy stays with the best, infinity spreads evenly."""
    worth = worths(spread=0.0)
    shares = {}
    for alpha in (0.0, 0.5, np.inf):
        found = select(80, worth, alpha=alpha, tau=-np.inf, block=2, B=1)
        shares[alpha] = found.clusters["taken"]
    assert shares[0.0].argmax() == 0
    assert shares[0.0][0] == 30  # all of it
    assert np.ptp(shares[np.inf]) <= 2
    entropy = [-(p := (x + 1e-9) / x.sum()) @ np.log(p) for x in shares.values()]
    assert entropy[0] < entropy[1] < entropy[2]


def test_thresholds_and_best_rows_within_a_block() -> None:
    worth = worths()
    whole, above, top = (select(60, worth, within=w) for w in ("block", "threshold", "top"))
    assert (worth[whole.indices] <= 0).any()
    assert (worth[above.indices] > 0).all()
    assert above.n_evaluated > whole.n_evaluated
    for pull in top.trace[:1]:
        block = top.indices[: pull.taken]
        rows = np.flatnonzero(pull.cluster == IDS)
        if pull.taken:
            np.testing.assert_allclose(worth[block], np.sort(worth[rows])[::-1][: pull.taken])
    assert worth[top.indices].mean() > worth[whole.indices].mean()


def test_neighbours_spare_pulls() -> None:
    """Ten copies of four places: what is learned of one copy counts for the others."""
    ids = np.repeat(np.arange(40), 20)
    worth = np.where(ids % 4 < 2, 1.0, -1.0)
    places = (np.arange(40) % 4)[:, None].astype(float)
    wasted = []
    for option in ({}, {"centres": places, "gamma": 0.5}):
        found = quad_select(
            ids, lambda rows: worth[rows], 200, block=5, B=2, alpha=0.2, rng=0, **option
        )
        wasted.append(sum(not pull.taken for pull in found.trace))
    assert wasted[1] < wasted[0] / 2
    matrix = np.abs(places - places.T)
    same = quad_select(
        ids, lambda rows: worth[rows], 200, block=5, B=2, alpha=0.2, rng=0,
        distances=matrix, gamma=0.5,
    )  # fmt: skip
    assert same.trace == found.trace


def test_token_costs() -> None:
    costs = np.random.default_rng(0).integers(1, 50, size=len(IDS))
    found = select(700, costs=costs)
    assert costs[found.indices].sum() <= 700
    assert costs[found.indices].sum() > 700 - 50
    assert select(10**6, costs=costs).reason == "whole pool"


# ── How it ends ──────────────────────────────────────────────────────────────────────────────────


def test_no_cluster_above_tau_ends_after_a_sweep() -> None:
    found = select(60, -np.abs(worths()))
    assert found.reason == "no cluster above tau"
    assert len(found.indices) == 0
    assert len(found.trace) <= 8 + 2  # a sweep of 8, in rounds of 3


def test_clusters_of_any_label_and_more_pulls_than_clusters() -> None:
    worth = worths(0.0)
    names = np.array([f"c{9 - i}" for i in IDS])
    found = quad_select(names, lambda rows: worth[rows], 60, B=99, block=5, rng=0)
    assert {pull.cluster for pull in found.trace if pull.round == 0} == set(names.tolist())
    assert found.clusters["label"].tolist() == sorted(set(names.tolist()))
    gaps = quad_select(IDS * 1000 - 7, lambda rows: worth[rows], 60, block=5, rng=0)
    assert set(gaps.clusters["label"]) == set((IDS * 1000 - 7).tolist())


def test_an_influence_that_is_not_finite_disables_its_cluster() -> None:
    worth = worths()
    worth[IDS == 0] = np.nan
    with pytest.warns(UserWarning, match=r"cluster 0 is not finite"):
        found = select(60, worth)
    assert not (IDS[found.indices] == 0).any()
    assert len(found.indices) == 60
    with pytest.warns(UserWarning, match="not finite"):
        nothing = select(60, worth * np.nan)
    assert len(nothing.indices) == 0
    assert nothing.reason == "clusters exhausted"


def test_rows_looked_at_in_vain_do_not_loop_for_ever() -> None:
    """One cluster's last reward was good, so that a sweep never ends it; greedy, no exploration."""
    worth = np.where(IDS == 0, -5.0, -0.1)
    worth[np.flatnonzero(IDS == 0)[:6]] = 40.0
    for seed in range(20):
        found = select(60, worth, alpha=0.0, rng=seed)
        assert found.reason in ("no cluster above tau", "budget")


def test_max_rounds() -> None:
    found = select(200, max_rounds=2)
    assert found.reason == "max_rounds"
    assert {pull.round for pull in found.trace} == {0, 1}


# ── Killed runs ──────────────────────────────────────────────────────────────────────────────────


def test_a_killed_run_goes_on_without_computing_again(tmp_path: Path) -> None:
    worth, calls = worths(), []

    class Killed(Exception):
        pass

    def influence(rows: np.ndarray) -> np.ndarray:
        calls.extend(rows.tolist())
        if len(calls) == 35:
            raise Killed
        return worth[rows]

    log = Journal(tmp_path / "pulls.jsonl")
    options: dict[str, Any] = {"samples_per_pull": 5, "block": 6, "B": 3, "rng": 4}
    whole = quad_select(IDS, lambda rows: worth[rows], 60, **options)
    with pytest.raises(Killed):
        quad_select(IDS, influence, 60, log=log, **options)
    again = quad_select(IDS, influence, 60, log=log, **options)
    assert again.indices.tolist() == whole.indices.tolist()
    assert again.trace == whole.trace
    assert len(calls) == whole.n_evaluated + 5  # the pull that was cut off, twice
    with pytest.raises(InputError, match=r"^log: got records of other rows"):
        quad_select(IDS, influence, 60, log=log, **{**options, "rng": 5})


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────


def blobs(n: int = 400, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return 3 * rng.normal(size=(classes, 6))[y] + rng.normal(size=(n, 6)), y


def test_a_tables_draw_has_its_size_whatever_is_asked() -> None:
    x, y = blobs()
    for size in (1, 37, 399, 400):
        draw = quad_examples(x, y, size=size)
        assert len(set(draw.indices.tolist())) == size
        assert draw.n == 400
    assert draw.info["filled"] == 40  # the part that was set aside
    first, again = (quad_examples(x, y, size=50, rng=3).indices for _ in range(2))
    np.testing.assert_array_equal(first, again)
    aside = set(range(400)) - set(quad_examples(x, y, size=360, rng=3).indices.tolist())
    assert len(aside) == 40
    assert not aside & set(first.tolist())


def test_classes_of_one_row_and_tiny_tables() -> None:
    x, y = blobs(120)
    y = np.concatenate([y[:110], np.arange(10) + 50])  # ten classes with a row each
    for seed in range(5):
        assert len(set(quad_examples(x, y, size=60, rng=seed).indices.tolist())) == 60
    assert len(quad_examples(x[:5], y[:5] % 2, size=3, clusters=5)) == 3


def test_a_region_of_wrong_labels_is_avoided() -> None:
    x, y = blobs(1400)
    clean, x, y = (x[1200:], y[1200:]), x[:1200], y[:1200]
    region = x[:, 0] > np.quantile(x[:, 0], 0.7)
    labels = np.where(region, (y + 1) % 3, y)
    draw = quad_examples(x, labels, size=120, reference=clean)
    assert region[draw.indices].mean() < 0.1
    assert draw.info["n_evaluated"] < 1200 / 2
    assert draw.info["reference"] == 200


def test_the_closed_form_is_the_models() -> None:
    """The same numbers from a torch layer with the regression's weights."""
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    from scoredraw.data_selection.gradient_influence import linear_influence, mean_gradient
    from scoredraw.data_selection.kronecker import KFACFactors
    from scoredraw.data_selection.linear_traces import TraceReader

    x, y = blobs()
    fit, reference = np.arange(100, 250), (x[:100], y[:100])
    ours = SoftmaxInfluence(x, y, fit, reference)
    model = torch.nn.Linear(6, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(ours.model.coef_))
        model.bias.copy_(torch.tensor(ours.model.intercept_))
    sets = [(torch.tensor(x[rows]), torch.tensor(y[rows])) for rows in (fit, slice(0, 100))]
    reader = TraceReader(model)
    P = KFACFactors.fit(model, sets[:1]).ihvp(mean_gradient(reader, sets[1:]))
    want = linear_influence(reader, [(torch.tensor(x), torch.tensor(y))], P)
    np.testing.assert_allclose(ours(np.arange(400)), want, rtol=1e-8)


def test_top_influence_is_the_largest() -> None:
    worth = worths()
    calls: list[int] = []

    def influence(rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        return worth[rows]

    draw = top_influence(influence, len(IDS), 10, batch=100)
    np.testing.assert_array_equal(np.sort(draw.indices), np.sort(np.argsort(-worth)[:10]))
    assert calls == [100, 100, 40]


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────

DISTANCES = np.abs(np.subtract.outer(np.arange(8.0), np.arange(8.0)))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": np.nan}, "budget"),
        ({"samples_per_pull": 0}, "samples_per_pull"),
        ({"block": 0}, "block"),
        ({"B": 0}, "B"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"within": "best"}, "within"),
        ({"tau": np.nan}, "tau"),
        ({"alpha": -1.0}, "alpha"),
        ({"scale": -1.0}, "scale"),
        ({"gamma": 0.0, "distances": DISTANCES}, "gamma"),
        ({"gamma": -1.0, "distances": DISTANCES}, "gamma"),
        ({"gamma": 1.0}, "distances"),
        ({"distances": DISTANCES}, "gamma"),
        ({"neighbours": True}, "distances"),
        ({"neighbours": True, "distances": DISTANCES}, "gamma"),
        ({"gamma": 1.0, "distances": DISTANCES, "centres": DISTANCES}, "centres"),
        ({"gamma": 1.0, "centres": DISTANCES[:5]}, "centres"),
        ({"gamma": 1.0, "distances": np.triu(DISTANCES)}, "distances"),
        ({"gamma": 1.0, "distances": DISTANCES[:5, :5]}, "distances"),
        ({"costs": np.zeros(240)}, "costs"),
        ({"costs": np.ones(3)}, "costs"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], argument: str) -> None:
    def never(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("work before the arguments were checked")

    given = {"budget": 60.0, "rng": 0, **options}
    budget = given.pop("budget")
    with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
        quad_select(IDS, never, budget, **given)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x, y: quad_select([], lambda r: r, 1), "cluster_ids"),
        (lambda x, y: quad_select([0.0, np.nan], lambda r: r, 1), "cluster_ids"),
        (lambda x, y: quad_select(IDS, lambda r: 0.5, 5), "influence_fn"),
        (lambda x, y: quad_select(IDS, lambda r: np.ones((len(r), 2)), 5), "influence_fn"),
        (lambda x, y: top_influence(lambda r: r, 10, 11), "size"),
        (lambda x, y: top_influence(lambda r: r * np.nan, 10, 2), "scores"),
        (lambda x, y: top_influence(lambda r: r, 10, 2, batch=0), "batch"),
        (lambda x, y: quad_examples(x, y, size=0), "size"),
        (lambda x, y: quad_examples(x, y, size=401), "size"),
        (lambda x, y: quad_examples(x * np.nan, y, size=5), "features"),
        (lambda x, y: quad_examples(x, 0 * y, size=5), "labels"),
        (lambda x, y: quad_examples(x, y, size=5, clusters=0), "clusters"),
        (lambda x, y: quad_examples(x, y, size=5, alpha=-1.0), "alpha"),
        (lambda x, y: quad_examples(x, y, size=5, damping=0.0), "damping"),
        (lambda x, y: quad_examples(x, y, size=5, reference=(x[:, :2], y)), "reference"),
        (lambda x, y: quad_examples(x, y, size=5, reference=(x, y + 9)), "reference"),
    ],
)
def test_bad_calls_are_refused_by_name(call: Any, argument: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"^{argument}: got .*, want "):
            call(*blobs())
