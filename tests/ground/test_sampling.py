"""The laws of the schemes: unbiased, with the promised chances, variances and joint laws.

Statistical tests compare means with five standard errors: false alarm 6e-7 a comparison, and
under 1e-3 for the whole file. Seeds are fixed, so that a pass is a pass for good.
"""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import stats

from scoredraw import sampling
from scoredraw.sampling import calibrate_inclusion

pytestmark = pytest.mark.oracle

S = np.array([0.3, 1.0, 0.0, 2.0, 0.7, 9.0, 1.0, 0.2, 3.0, 0.0, 1.5, 0.4])
F = np.array([2.0, -1.0, 0.0, 4.0, 0.5, 3.0, 7.0, 1.0, -2.0, 0.0, 1.0, 5.0])
SIZE, DRAWS = 5, 2000
POSITIVE = S > 0
BY = np.array([0, 1] * 6)


def logs(s, size, **options):
    """exponential_keys(log=True) over the positive rows, so that it meets the others' tests."""
    with np.errstate(divide="ignore"):
        return sampling.exponential_keys(
            np.where(s > 0, np.log(s), -1e9), size, log=True, **options
        )


def shuffled(s, size, **options):
    return sampling.systematic(s, size, order="random", **options)


def equal(s, size, **options):
    return sampling.uniform(len(s), size, **options)


SCHEMES = {
    **{name: scheme for name, scheme in sampling.SCHEMES.items() if name != "top_k"},
    "log keys": logs,
    "systematic, random order": shuffled,
    "uniform": equal,
}
EXACT = ("systematic", "systematic, random order", "pivotal", "uniform")


def draws_of(scheme, s=S, size=SIZE, count=DRAWS, **options):
    return [scheme(s, size, rng=seed, **options) for seed in range(count)]


def assert_mean(samples, want, deviations=5.0) -> None:
    """The mean of each column is `want` within five of its standard errors."""
    samples = np.asarray(samples, float)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    off = np.abs(samples.mean(0) - want)
    assert (off <= deviations * error + 1e-12).all(), (off / error, samples.mean(0), want)


@pytest.mark.parametrize("by", [None, BY], ids=["whole", "strata"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_total_is_unbiased(name: str, by) -> None:
    """E[weight of row i] = 1 for every row that can be drawn: all totals at once."""
    s = np.maximum(S, 0.1) if name in ("uniform", "log keys") else S
    made = draws_of(SCHEMES[name], s, count=DRAWS if by is None else 800, by=by)
    weights = np.array([np.bincount(d.indices, d.weights, minlength=12) for d in made])
    assert_mean(weights, (s > 0).astype(float))
    assert all(d.unbiased for d in made[:3])
    assert_mean([d.total(F).value for d in made], F.sum())


@pytest.mark.parametrize("name", ["poisson", *EXACT])
def test_rows_are_included_with_their_probabilities(name: str) -> None:
    """Binomial frequencies: two-sided exact tests at 6e-7 a row."""
    made = draws_of(SCHEMES[name])
    q = np.full(12, SIZE / 12) if name == "uniform" else calibrate_inclusion(S, SIZE)[0]
    hits = np.bincount(np.concatenate([d.indices for d in made]), minlength=12)
    for row in range(12):
        assert stats.binomtest(int(hits[row]), DRAWS, q[row]).pvalue > 6e-7, row
    for d in made[:20]:
        np.testing.assert_allclose(d.inclusion, q[d.indices])
        np.testing.assert_allclose(d.weights, 1 / q[d.indices])


@pytest.mark.parametrize("name", ["multinomial", "residual"])
def test_counts_with_replacement(name: str) -> None:
    made = draws_of(SCHEMES[name])
    counts = np.array([np.bincount(d.indices, minlength=12) for d in made])
    expected = SIZE * S / S.sum()
    assert_mean(counts, expected)
    assert (counts.sum(1) == SIZE).all()
    if name == "residual":
        assert (counts >= np.floor(expected)).all()
        assert counts.max() > np.ceil(expected).max() - 2
    for d in made[:20]:
        np.testing.assert_allclose(d.inclusion, expected[d.indices])


@pytest.mark.parametrize("by", [None, BY], ids=["whole", "strata"])
@pytest.mark.parametrize("name", ["poisson", "priority", "exponential_keys", "log keys", "uniform",
                                  "multinomial", "residual"])  # fmt: skip
def test_the_squared_standard_error_is_unbiased(name: str, by) -> None:
    """E[error^2] = E[(estimate - total)^2] exactly for these designs."""
    s, size = np.maximum(S, 0.3), 6
    made = draws_of(SCHEMES[name], s, size, DRAWS if by is None else 800, by=by)
    errors = [d.total(F) for d in made]
    if name == "residual" and by is not None:  # no formula for these: it says so
        assert all(np.isnan(m.standard_error) for m in errors)
        return
    known = [m for m in errors if not np.isnan(m.standard_error)]
    assert len(known) == len(errors)
    assert_mean([m.standard_error**2 - (m.value - F.sum()) ** 2 for m in errors], 0.0)


def test_poissons_variance_is_the_formula() -> None:
    q, _ = calibrate_inclusion(S, SIZE)
    variance = ((1 / q[POSITIVE] - 1) * F[POSITIVE] ** 2).sum()
    made = draws_of(sampling.poisson)
    assert_mean([(d.total(F).value - F.sum()) ** 2 for d in made], variance)
    sizes = np.array([len(d) for d in made])
    assert_mean(sizes, SIZE)
    assert_mean((sizes - SIZE) ** 2, (q * (1 - q)).sum())


@pytest.mark.parametrize("name", ["systematic, random order", "pivotal"])
def test_hajeks_standard_error_is_close(name: str) -> None:
    """An approximation: within a quarter of the variance for 24 of 80 rows in no special order.

    Over 2,000 draws the variances themselves are known to 3.2 %, eight such deviations."""
    rng = np.random.default_rng(3)
    s = rng.uniform(0.5, 2.0, 80)
    f = s * rng.uniform(0.0, 2.0, 80)
    made = [d.total(f) for d in draws_of(SCHEMES[name], s, 24)]
    measured = np.var([m.value for m in made])
    claimed = np.mean([m.standard_error**2 for m in made])
    assert 0.75 < claimed / measured < 1.33


def test_the_mean_has_an_honest_error() -> None:
    """Hajek's ratio is only approximately unbiased: coverage of two errors within 0.93 to 0.975.

    2,000 trials put the coverage of a perfect interval (0.954) within 0.024 (5 deviations)."""
    rng = np.random.default_rng(4)
    s, f = rng.uniform(0.5, 2.0, 400), rng.standard_normal(400) + 3
    made = [d.mean(f) for d in draws_of(sampling.poisson, s, 100)]
    inside = np.mean([abs(m.value - f.mean()) < 2 * m.standard_error for m in made])
    assert 0.93 < inside < 0.975


def successive(p: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """The chance of every set under drawing one by one without replacement, exactly."""
    chances = {}
    for rows in combinations(range(len(p)), k):
        total = 0.0
        for order in permutations(rows):
            left, chance = p.sum(), 1.0
            for row in order:
                chance *= p[row] / left
                left -= p[row]
            total += chance
        chances[rows] = total
    return chances


@pytest.mark.parametrize("log", [False, True])
def test_exponential_keys_follow_successive_sampling(log: bool) -> None:
    """Chi-square of all 20 sets of 3 from 6 against their exact chances; false alarm 1e-6."""
    p = np.array([0.05, 0.1, 0.1, 0.2, 0.25, 0.3])
    chances = successive(p, 3)
    assert sum(chances.values()) == pytest.approx(1.0)
    measure = np.log(p) + 1000.0 if log else 7 * p
    seen = dict.fromkeys(chances, 0)
    for seed in range(8000):
        draw = sampling.exponential_keys(measure, 3, rng=seed, log=log)
        seen[tuple(draw.indices.tolist())] += 1
    expected = np.array(list(chances.values())) * 8000
    assert stats.chisquare(list(seen.values()), expected).pvalue > 1e-6


def test_exponential_keys_follow_numpys_choice() -> None:
    """Two-sample chi-square over sets; false alarm 1e-6."""
    p = np.array([0.05, 0.1, 0.15, 0.2, 0.5])
    rng, sets = np.random.default_rng(0), list(combinations(range(5), 2))
    table = np.zeros((2, len(sets)))
    for seed in range(4000):
        ours = sampling.exponential_keys(p, 2, rng=seed).indices
        theirs = rng.choice(5, 2, replace=False, p=p)
        table[0, sets.index(tuple(ours.tolist()))] += 1
        table[1, sets.index(tuple(sorted(theirs.tolist())))] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-6


def test_log_keys_do_not_underflow() -> None:
    """log s = -1e5 is as good as 0: the same rows and weights as without the shift."""
    log_s = np.random.default_rng(0).standard_normal(50) * 3
    low = sampling.exponential_keys(log_s - 1e5, 10, log=True, rng=1)
    high = sampling.exponential_keys(log_s, 10, log=True, rng=1)
    assert low.indices.tolist() == high.indices.tolist()
    np.testing.assert_allclose(low.weights, high.weights, rtol=1e-9)
    plain = sampling.exponential_keys(np.exp(log_s), 10, rng=1)
    assert plain.indices.tolist() == high.indices.tolist()  # the same uniforms: the same race
    np.testing.assert_allclose(plain.weights, high.weights, rtol=1e-9)


def test_priority_is_its_definition() -> None:
    from scoredraw.uniforms import RowUniforms

    s = np.random.default_rng(0).pareto(1.0, 3000)
    u = RowUniforms(8).block(0, 3000, stream="priority")
    keys = u / s
    for k in (1, 10, 2999):
        order = np.argsort(keys)
        draw = sampling.priority(s, k, rng=8)
        assert draw.indices.tolist() == sorted(order[:k].tolist())
        tau = keys[order[k]]
        np.testing.assert_allclose(draw.weights, np.maximum(1, 1 / (s[draw.indices] * tau)))


def test_races_with_a_misleading_subsample() -> None:
    """The level that filters candidates comes from every tenth row; here those say nothing."""
    n = 700_000
    s = np.ones(n)
    s[:: n // 65536] = 1e-9
    giants = np.r_[np.full(n - 5, 1e-12), np.full(5, 1.0)]
    for measure in (s, s[::-1].copy(), giants):
        draw = sampling.priority(measure, 20, rng=0)
        assert len(draw) == 20
        assert len(set(draw.indices.tolist())) == 20
    assert set(range(n - 5, n)) <= set(sampling.exponential_keys(giants, 20, rng=0).indices)


def test_systematic_is_a_comb() -> None:
    from scoredraw.uniforms import RowUniforms

    s = np.random.default_rng(1).uniform(0.1, 1.0, 300)
    s[::7] = 20.0  # some are certain
    q, _ = calibrate_inclusion(s, 90)
    offset = RowUniforms(3).block(0, 1, stream="systematic")[0]
    open_ = np.flatnonzero(q < 1)
    ends = np.cumsum(q[open_])
    points = np.arange(round(ends[-1])) + offset
    want = np.r_[np.flatnonzero(q == 1), open_[np.searchsorted(ends, points, side="right")]]
    assert sampling.systematic(s, 90, rng=3).indices.tolist() == sorted(want.tolist())


def test_neighbours_repel_each_other() -> None:
    """Pivotal: of two rows with q = 1/2 exactly one; with q = 1/4 never both."""
    for seed in range(200):
        kept = np.zeros(16)
        kept[sampling.pivotal(np.ones(16), 8, rng=seed).indices] = 1
        assert (kept[::2] + kept[1::2] == 1).all()
        kept = np.zeros(16)
        kept[sampling.pivotal(np.ones(16), 4, rng=seed).indices] = 1
        assert (kept[::2] + kept[1::2] <= 1).all()
    f = np.sin(np.arange(256) / 40)
    smooth = [sampling.pivotal(np.ones(256), 32, rng=seed).total(f).value for seed in range(400)]
    srs = [sampling.uniform(256, 32, rng=seed).total(f).value for seed in range(400)]
    assert np.var(smooth) < np.var(srs) / 3  # really about a fifteenth


def test_residual_varies_less_than_multinomial() -> None:
    s = np.array([3.0, 2.2, 1.4, 1.1, 0.9, 0.4])
    f = np.array([1.0, 5.0, 2.0, 2.0, 1.0, 3.0])
    by = {
        scheme: np.var([scheme(s, 9, rng=seed).total(f).value for seed in range(1500)])
        for scheme in (sampling.residual, sampling.multinomial)
    }
    assert by[sampling.residual] < by[sampling.multinomial]


def test_ties_are_drawn_by_lot() -> None:
    """Two of five tied rows after one better: binomial frequencies 2/5, 6e-7 each."""
    scores = [1.0, 5.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    hits = np.zeros(7, int)
    for seed in range(4000):
        rows = sampling.top_k(scores, 3, rng=seed).indices
        assert 1 in rows
        assert 4 not in rows
        hits[rows] += 1
    for row in (0, 2, 3, 5, 6):
        assert stats.binomtest(int(hits[row]), 4000, 0.4).pvalue > 6e-7


def test_expected_costs_are_the_budget() -> None:
    costs = np.random.default_rng(0).uniform(1, 9, 12)
    made = draws_of(sampling.poisson, S, 20.0, costs=costs)
    spent = [costs[d.indices].sum() for d in made]
    assert_mean(spent, 20.0)
    assert_mean([d.total(F).value for d in made], F.sum())


def test_a_floor_keeps_weights_in_bounds() -> None:
    made = draws_of(sampling.poisson, S, SIZE, floor=0.1)
    assert max(d.weights.max() for d in made) <= 10 + 1e-9
    assert_mean([d.total(F).value for d in made], F.sum())
    assert not any((~POSITIVE)[d.indices].any() for d in made)
