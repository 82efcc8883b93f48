"""The maths of influence scores: closed forms, invariances, and what bad input says."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare

from scoredraw.data_selection import influence, selection, tracin
from scoredraw.errors import InputError

RNG = np.random.default_rng(2)
FINITE = st.floats(-50, 50, allow_nan=False, width=32)


# ── Variance of gradients ────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
@pytest.mark.parametrize("spread", ["std", "var", "eq3"])
def test_vog_is_the_mean_of_the_elementwise_spread(spread: Any) -> None:
    g = RNG.normal(size=(7, 5, 4, 3))
    spreads = {"std": g.std(0), "var": g.var(0), "eq3": ((g - g.mean(0)) ** 2).sum(0) / 7**0.5}
    want = spreads[spread].mean(axis=(1, 2))
    for form in (g, list(g), (x for x in g), torch.tensor(g)):
        np.testing.assert_allclose(
            influence.variance_of_gradients(form, spread=spread), want, rtol=1e-12
        )


@pytest.mark.oracle
def test_vog_mask_averages_over_real_tokens_only() -> None:
    g = RNG.normal(size=(3, 2, 5, 4))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = influence.variance_of_gradients(g, mask=mask)
    np.testing.assert_allclose(got[0], g[:, 0, :3].std(0).mean())
    np.testing.assert_allclose(got[1], g[:, 1].std(0).mean())


@pytest.mark.oracle
def test_vog_of_a_linear_model_depends_on_the_label_alone() -> None:
    weights = RNG.normal(size=(4, 3, 6))  # (checkpoint, class, feature): the gradient is w_y
    labels = RNG.integers(3, size=20)
    got = influence.variance_of_gradients(weights[:, labels])
    want = weights.std(axis=0).mean(axis=1)[labels]
    np.testing.assert_allclose(got, want)
    assert np.all(influence.normalize_scores(got, labels) == 0)


@pytest.mark.oracle
def test_vog_in_blocks_and_with_a_large_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    g = RNG.normal(size=(5, 40, 9)) + 1e6  # a sum of squares would lose everything here
    monkeypatch.setattr(influence, "_BLOCK_ELEMENTS", 64)
    np.testing.assert_allclose(influence.variance_of_gradients(g), g.std(0).mean(1), rtol=1e-7)


@pytest.mark.property
@settings(max_examples=40)
@given(arrays(np.float32, (3, 4, 2), elements=FINITE), st.floats(-4, 4))
def test_vog_scales_with_the_logits(g: Any, a: float) -> None:
    g = g.astype(np.float64)
    std, var = (influence.variance_of_gradients(g, spread=s) for s in ("std", "var"))  # type: ignore[arg-type]
    scaled = influence.variance_of_gradients(a * g)
    np.testing.assert_allclose(scaled, abs(a) * std, rtol=1e-6, atol=1e-9)
    scaled = influence.variance_of_gradients(a * g, spread="var")
    np.testing.assert_allclose(scaled, a * a * var, rtol=1e-6, atol=1e-9)


@pytest.mark.property
@settings(max_examples=40)
@given(arrays(np.float32, (4, 3), elements=FINITE), st.integers(2, 6))
def test_identical_checkpoints_score_exactly_zero(g: Any, k: int) -> None:
    assert np.all(influence.variance_of_gradients([g] * k) == 0)


@pytest.mark.contract
def test_vog_reads_an_iterator_one_checkpoint_at_a_time() -> None:
    alive: list[int] = []

    class Checkpoint(np.ndarray):
        def __del__(self) -> None:
            alive.pop()

    def stream() -> Any:
        for _ in range(6):
            alive.append(1)
            yield RNG.normal(size=(3, 2)).view(Checkpoint)
            assert len(alive) <= 2, "earlier checkpoints are still held"

    influence.variance_of_gradients(stream())


@pytest.mark.contract
@pytest.mark.parametrize(
    ("gradients", "options", "says"),
    [
        (np.ones((1, 3, 2)), {}, "gradients: got 1 checkpoints, want at least 2"),
        ([], {}, "gradients: got 0 checkpoints"),
        ([np.ones((3, 2)), np.ones((2, 3))], {}, r"shape \(2, 3\) at checkpoint 1"),
        (np.where(np.eye(3) > 0, np.nan, 1)[None].repeat(2, 0), {}, "examples 0, 1, 2"),
        (np.ones((2, 3, 2)), {"spread": "range"}, "spread: got 'range'"),
        (np.ones((2, 3, 2)), {"mask": np.ones((3, 3))}, "mask: got shape"),
        (np.ones((2, 2, 2)), {"mask": [[1, 1], [0, 0]]}, "mask: got nothing kept in example 1"),
        (np.array([["a", "b"], ["c", "d"]]), {}, "gradients: got dtype"),
    ],
)
def test_vog_refuses(gradients: Any, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        influence.variance_of_gradients(gradients, **options)


@pytest.mark.contract
def test_nan_is_named_by_example_and_checkpoint() -> None:
    g = np.ones((3, 20, 2))
    g[2, [4, 7, 8, 9, 11, 13, 15], 0] = np.inf
    with pytest.raises(InputError, match="checkpoint 2, examples 4, 7, 8, 9, 11 and 2 more"):
        influence.variance_of_gradients(g)


# ── EL2N, GraNd, TracIn ──────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_el2n_is_the_gradient_at_the_logits() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    want = logits.grad.norm(dim=1).numpy()
    np.testing.assert_allclose(influence.el2n(logits, labels), want, rtol=1e-12)
    probabilities = logits.softmax(-1)
    got = influence.el2n(probabilities, labels, of="probabilities")
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.oracle
def test_el2n_ends_and_average() -> None:
    sure = np.array([[1e4, 0.0, 0.0]])
    np.testing.assert_array_equal(influence.el2n(sure, [0]), 0)
    np.testing.assert_allclose(influence.el2n(sure, [2]), np.sqrt(2))
    runs = RNG.normal(size=(2, 3, 5, 4))
    labels = RNG.integers(4, size=5)
    each = [influence.el2n(run, labels) for run in runs.reshape(6, 5, 4)]
    np.testing.assert_allclose(influence.el2n(runs, labels), np.mean(each, axis=0))
    with np.errstate(over="raise", invalid="raise"):
        assert influence.el2n([[-2000.0, 2000.0]], [0])[0] == pytest.approx(2**0.5)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (np.ones((3, 1)), [0, 0, 0], "logits: got shape"),
        (np.ones(3), [0, 0, 0], "logits: got shape"),
        (np.ones((3, 2)), [0, 2, 1], "labels: got 2 in example 1, want 0 to 1"),
        (np.ones((3, 2)), [0, -1, 1], "labels: got -1"),
        (np.ones((3, 2)), [0, 1], "labels: got shape"),
        (np.ones((3, 2)), [0.5, 1, 1], "labels: got float64"),
        ([[1.0, np.nan], [0, 0]], [0, 1], "logits: got NaN or infinity in example 0"),
    ],
)
def test_el2n_and_label_log_probabilities_refuse(logits: Any, labels: Any, says: str) -> None:
    for function in (influence.el2n, influence.label_log_probabilities):
        with pytest.raises(InputError, match=says):
            function(logits, labels)
    with pytest.raises(InputError, match="no distribution"):
        influence.el2n([[0.7, 0.7]], [0], of="probabilities")


@pytest.mark.oracle
def test_last_layer_closed_forms_match_autograd() -> None:
    checkpoints, n, m, rates = 3, 5, 4, [0.3, 0.2, 0.1]
    hidden, other = RNG.normal(size=(checkpoints, n, 6)), RNG.normal(size=(checkpoints, m, 6))
    y, z = RNG.integers(3, size=n), RNG.integers(3, size=m)
    weights, biases = RNG.normal(size=(checkpoints, 3, 6)), RNG.normal(size=(checkpoints, 3))

    def grads(k: int, h: Any, labels: Any) -> np.ndarray:
        rows = []
        for x, label in zip(h, labels, strict=True):
            w = torch.tensor(weights[k], requires_grad=True)
            b = torch.tensor(biases[k], requires_grad=True)
            loss = torch.nn.functional.cross_entropy(w @ torch.tensor(x) + b, torch.tensor(label))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (w, b))]))
        return torch.stack(rows).numpy()

    a = [grads(k, hidden[k], y) for k in range(checkpoints)]
    b = [grads(k, other[k], z) for k in range(checkpoints)]
    logits = np.einsum("kch,knh->knc", weights, hidden) + biases[:, None]
    other_logits = np.einsum("kch,knh->knc", weights, other) + biases[:, None]
    norms = tracin.last_layer_gradient_norms(logits, y, hidden)
    np.testing.assert_allclose(norms, np.linalg.norm(a, axis=-1), rtol=1e-10)
    np.testing.assert_allclose(tracin.grand(norms), np.linalg.norm(a, axis=-1).mean(0))
    pairs = tracin.tracin_pairwise(a, iter(b), rates)
    np.testing.assert_allclose(
        pairs, sum(r * x @ w.T for r, x, w in zip(rates, a, b, strict=True)), rtol=1e-10
    )
    closed = tracin.last_layer_tracin(
        influence.prediction_errors(logits, y), hidden,
        influence.prediction_errors(other_logits, z), other, rates,
    )  # fmt: skip
    np.testing.assert_allclose(closed, pairs, rtol=1e-9, atol=1e-12)
    itself = tracin.tracin_pairwise(a, a, rates)
    np.testing.assert_allclose(itself, itself.T)
    np.testing.assert_allclose(np.diag(itself), tracin.tracin_self(norms**2, rates), rtol=1e-10)


@pytest.mark.contract
def test_tracin_and_grand_refuse() -> None:
    ok = np.ones((2, 3))
    for call, says in (
        (lambda: tracin.tracin_self(ok, [0.1]), "learning_rates"),
        (lambda: tracin.tracin_self(ok, [0.1, -1]), "learning_rates"),
        (lambda: tracin.tracin_self(-ok, 0.1), "squared_norms: got negative"),
        (lambda: tracin.tracin_self(ok[0], 0.1), "squared_norms: got shape"),
        (lambda: tracin.grand([[np.nan, 1.0]]), "gradient_norms: got NaN or infinity in example 0"),
        (lambda: tracin.tracin_pairwise([ok], [ok, ok], 1), "other: got more checkpoints"),
        (lambda: tracin.tracin_pairwise([ok, ok], [ok], 1), "other: got 1 checkpoints"),
        (lambda: tracin.tracin_pairwise([ok], [np.ones((3, 2))], 1), "other: got 2 weights"),
        (lambda: tracin.tracin_pairwise([], [], 1), "gradients: got no checkpoint"),
        (lambda: tracin.last_layer_gradient_norms(ok, [0, 1], np.ones((3, 2))), "hidden"),
    ):
        with pytest.raises(InputError, match=says):
            call()


# ── Forgetting, PVI ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_forgetting_by_hand() -> None:
    looks = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 1, 0]])
    counts, never = influence.forgetting(looks)
    assert counts.tolist() == [2, 0, 0, 1]
    assert never.tolist() == [False, True, False, False]
    assert influence.forgetting(looks, never_learned="max")[0].tolist() == [2, 3, 0, 1]


@pytest.mark.property
@given(arrays(np.bool_, st.tuples(st.integers(2, 9), st.integers(1, 5))))
def test_forgetting_is_bounded_and_never_learned_are_on_top(looks: Any) -> None:
    counts, never = influence.forgetting(looks)
    assert counts.max() <= looks.shape[0] // 2
    assert np.all(counts[never] == 0)
    ranked, _ = influence.forgetting(looks, never_learned="max")
    assert np.all(ranked[~never] == counts[~never])
    if never.any():
        assert ranked[never].min() > counts.max()


@pytest.mark.contract
@pytest.mark.parametrize("looks", [[[1, 0]], [[1, 2], [0, 1]], [1, 0], [[0.5, 1], [1, 1]]])
def test_forgetting_refuses(looks: Any) -> None:
    with pytest.raises(InputError, match="correct"):
        influence.forgetting(looks)


@pytest.mark.oracle
def test_pvi_averages_to_the_gain_in_log2_likelihood() -> None:
    p, q = RNG.dirichlet(np.ones(3), size=50), np.array([0.5, 0.3, 0.2])
    y = RNG.integers(3, size=50)
    got = influence.pvi(p[np.arange(50), y], q[y], of="probabilities")
    want = np.log2(p[np.arange(50), y]).mean() - np.log2(q[y]).mean()
    assert got.mean() == pytest.approx(want)
    by_log = influence.pvi(np.log(p[np.arange(50), y]), np.log(q[y]))
    np.testing.assert_allclose(by_log, got)
    assert np.all(influence.pvi(np.log(q[y]), np.log(q[y])) == 0)
    seeds = RNG.uniform(0.1, 1, size=(4, 6))
    np.testing.assert_allclose(
        influence.pvi(seeds, 0.5, of="probabilities"), 1 + np.log2(seeds).mean(0)
    )


@pytest.mark.contract
def test_pvi_clips_with_a_warning_and_refuses() -> None:
    with pytest.warns(UserWarning, match="1 probabilities below eps=1e-12"):
        got = influence.pvi([0.0, 1.0], 1.0, of="probabilities")
    assert got[0] == pytest.approx(np.log2(1e-12))
    with pytest.warns(UserWarning, match="log_p: 1 prob"):
        assert np.isfinite(influence.pvi([-np.inf], 0.0)).all()
    for p, null, of in (
        ([1.5], 0.5, "probabilities"),
        ([np.nan], 0.5, "probabilities"),
        ([0.5], -1.0, "log"),
        ([-1.0], np.nan, "log"),
        ([-1.0, -2.0], [-1.0, -1.0, -1.0], "log"),
    ):
        with pytest.raises(InputError, match="log_p"):
            influence.pvi(p, null, of=of)  # type: ignore[arg-type]


@pytest.mark.oracle
def test_label_log_probabilities_stay_in_log_space() -> None:
    logits = np.array([[0.0, 5000.0], [1.0, 1.0]])
    np.testing.assert_allclose(
        influence.label_log_probabilities(logits, [0, 1]), [-5000, -np.log(2)]
    )


# ── Normalisation ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.property
@settings(max_examples=60)
@given(
    arrays(np.float64, 30, elements=st.floats(-1e3, 1e3)),
    arrays(np.int64, 30, elements=st.integers(0, 3)),
)
def test_normalised_classes_have_mean_zero_and_deviation_one(v: Any, y: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        z = influence.normalize_scores(v, y)
    for c in np.unique(y):
        own = z[y == c]
        spread = np.ptp(v[y == c])
        if spread > 1e-6:
            assert abs(own.mean()) < 1e-6
            assert own.std() == pytest.approx(1, abs=1e-6)
        elif spread == 0:
            assert np.all(own == 0)


@pytest.mark.contract
def test_normalisation_edges() -> None:
    with pytest.warns(UserWarning, match="1 classes have one example"):
        got = influence.normalize_scores([5.0, 1.0, 3.0], ["solo", "b", "b"])
    assert got.tolist() == [0, -1, 1]
    assert influence.normalize_scores([0.1] * 7, by="dataset").tolist() == [0] * 7
    assert influence.normalize_scores([], by="dataset").shape == (0,)
    for scores, labels, by in (
        ([1.0], None, "class"),
        ([1.0, 2.0], [0], "class"),
        ([1.0, np.nan], [0, 0], "class"),
        ([[1.0]], None, "dataset"),
        ([1.0], None, "row"),
    ):
        with pytest.raises(InputError):
            influence.normalize_scores(scores, labels, by=by)  # type: ignore[arg-type]


# ── Selection ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.oracle
def test_pruning_keeps_the_right_end() -> None:
    scores = RNG.permutation(100).astype(float)
    order = np.argsort(scores)
    easy = selection.prune(scores, 0.45, rng=0)
    assert set(easy.indices) == set(order[-55:])
    hard = selection.prune(scores, 0.45, side="hard", rng=0)
    assert set(hard.indices) == set(order[:55])
    flipped = selection.prune(-scores, 0.45, easy="high", rng=0)
    assert set(flipped.indices) == set(easy.indices)
    assert np.all(easy.weights == 1)
    assert easy.n == 100
    np.testing.assert_array_equal(easy.scores, scores[easy.indices])
    assert len(selection.prune(scores, 0.0, rng=0)) == 100


@pytest.mark.property
def test_ties_are_broken_at_random_and_by_seed() -> None:
    """Of 40 equal scores half are kept; a row's count over 400 seeds is Binomial(400, 1/2).

    The chi-square over rows rejects at 1e-4: one false alarm in ten thousand sets of seeds (the
    seeds are fixed, so it either always passes or never does)."""
    for mode in ("cutoff", "softmax", "linear"):
        kept = [selection.prune(np.zeros(40), 0.5, mode=mode, rng=s).indices for s in range(400)]  # type: ignore[arg-type]
        counts = np.bincount(np.concatenate(kept), minlength=40)
        # the size is fixed: the statistic has n - 1 degrees of freedom after this scaling
        statistic = ((counts - 200) ** 2 / 100).sum() * 39 / 40
        from scipy.stats import chi2

        assert chi2.sf(statistic, 39) > 1e-4, mode
        again = selection.prune(np.zeros(40), 0.5, mode=mode, rng=3)  # type: ignore[arg-type]
        assert again.indices.tolist() == kept[3].tolist()


@pytest.mark.property
@pytest.mark.parametrize("mode", ["softmax", "linear"])
def test_the_first_draw_has_the_stated_probabilities(mode: Any) -> None:
    """Chi-square at 1e-4 over 20,000 fixed seeds' single draws."""
    scores = np.array([0.0, 0.5, 1.0, 2.0])
    p = selection.draw_probabilities(scores, mode=mode, eps=0.1)
    seeds = range(4000)
    first = [selection.prune(scores, 0.75, mode=mode, eps=0.1, rng=s).indices[0] for s in seeds]
    assert chisquare(np.bincount(first, minlength=4), len(first) * p).pvalue > 1e-4


@pytest.mark.contract
def test_softmax_draws_do_not_underflow() -> None:
    scores = np.array([0.0, -5000.0, -6000.0, 10.0])
    assert len(selection.prune(scores, 0.25, mode="softmax", rng=0)) == 3


@pytest.mark.contract
@pytest.mark.parametrize(
    ("scores", "fraction", "options", "says"),
    [
        ([1.0, 2.0], 1.0, {}, "fraction: got 1.0"),
        ([1.0, 2.0], -0.1, {}, "fraction"),
        ([1.0, 2.0], 0.9, {}, "fraction: got 0.9 of 2 examples"),
        ([1.0, np.nan], 0.5, {}, "scores: got NaN or infinity in example 1"),
        ([], 0.5, {}, "scores: got shape"),
        ([1.0, 2.0], 0.5, {"side": "left"}, "side"),
        ([1.0, 2.0], 0.5, {"mode": "sort"}, "mode"),
        ([1.0, 2.0], 0.5, {"easy": "mid"}, "easy"),
        ([1.0, 2.0], 0.5, {"mode": "softmax", "temperature": 0}, "temperature"),
        ([1.0, 2.0], 0.5, {"mode": "linear", "eps": 2}, "eps"),
    ],
)
def test_prune_refuses(scores: Any, fraction: float, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        selection.prune(scores, fraction, rng=0, **options)


@pytest.mark.oracle
def test_strata_keep_their_shares() -> None:
    groups = np.repeat([0, 1, 2], [60, 30, 10])
    drawn = selection.stratified(groups, 0.5, rng=1)
    assert np.bincount(groups[drawn.indices]).tolist() == [30, 15, 5]
    kept = selection.prune(RNG.normal(size=100), 0.5, by=groups, rng=1)
    assert np.bincount(groups[kept.indices]).tolist() == [30, 15, 5]


@pytest.mark.oracle
def test_similarity_efficiency_and_entropy() -> None:
    assert selection.similarity_index([1, 2, 3], [3, 4, 5]) == pytest.approx(1 / 3)
    a, b = (selection.stratified(np.zeros(20000), 0.89, rng=s).indices for s in (0, 1))
    # the overlap of two random 11 % subsets is hypergeometric: .11, deviation .0063
    assert selection.similarity_index(a, b) == pytest.approx(0.11, abs=0.032)
    with pytest.raises(InputError, match="repeated"):
        selection.similarity_index([1, 1], [1])
    with pytest.raises(InputError, match="first"):
        selection.similarity_index([], [1])
    assert selection.relative_efficiency(0.15, 0.1, 55, 100) == pytest.approx(0.5 / -0.45)
    for arguments in ((0.1, 0.0, 5, 10), (0.1, 0.1, 10, 10), (0.1, 0.1, 0, 10)):
        with pytest.raises(InputError):
            selection.relative_efficiency(*arguments)
    trails = ["ab", "ab", "c", "d", "x", "x"]
    entropy = selection.trail_entropy(trails, [0, 0, 0, 0, 1, 1])
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(entropy, [-(p * np.log(p)).sum()] * 4 + [0, 0])
    np.testing.assert_allclose(selection.entropy_average(np.ones(6), entropy), (1 + entropy) / 2)
    with pytest.raises(InputError, match="intents"):
        selection.trail_entropy(trails, [0])
