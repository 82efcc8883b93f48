"""Two attempts with a hint: shares, gradients and credits of the experiment by other means."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

torch = pytest.importorskip("torch")

from scoredraw.papers import p61_score as two  # noqa: E402
from scoredraw.papers.p61_score import ALPHA, ARMS, BASE, BETA1, BETA2, Arm, Batch  # noqa: E402

pytestmark = pytest.mark.oracle

THETA = np.array([[0.3, 7.0, 0.0], [0.8, -0.5, 1.5], [1.2, 0.3, -0.7]])


def episodes(theta: np.ndarray, size: int, seed: int = 0) -> Batch:
    first = np.tile(theta[:, None], (1, size, 1))
    return two.sample(theta, first, np.random.default_rng(seed), size)


def loo(x: np.ndarray) -> np.ndarray:
    """Less the mean of the others in a row, spelled out."""
    n = x.shape[1]
    return np.stack([x[:, i] - np.delete(x, i, axis=1).mean(axis=1) for i in range(n)], axis=1)


def test_shares_are_integrals_over_the_evidence() -> None:
    """By adaptive quadrature over ε, a branch of the episode at a time; the base repeats itself."""
    found = two.evaluate(THETA)
    for s, (w, k, v) in enumerate(THETA):

        def branch(eps: float, first: int, second: int, w=w, k=k, v=v) -> float:
            e = 1 + 2 * eps
            p = expit(first * w * e)
            total = 0.0
            for hint, chance in ((first, 0.85), (-first, 0.15)):
                total += chance * expit(second * (w * e + k * first + v * hint * first))
            return float(norm.pdf(eps) * p * total)

        share = {
            (a, b): quad(branch, -9, 9, args=(a, b), epsabs=1e-11)[0]
            for a in (1, -1) for b in (1, -1)
        }  # fmt: skip
        assert found.t1[s] == pytest.approx(share[1, 1] + share[1, -1], abs=1e-8)
        assert found.t2[s] == pytest.approx(share[1, 1] + share[-1, 1], abs=1e-8)
        assert found.i2c[s] == pytest.approx(share[-1, 1], abs=1e-8)
        assert found.c2i[s] == pytest.approx(share[1, -1], abs=1e-8)
    np.testing.assert_allclose(found.delta, found.i2c - found.c2i, atol=1e-12)
    assert found.t1[0].round(3) == found.t2[0].round(3) == 0.569
    assert found.collapsed == int((found.delta < 0.05).sum()) >= 1


def test_episodes_have_those_shares() -> None:
    """20,000 a policy, 12 shares within 4.5 s.e.: false alarm 1e-4. A hint is wrong in .15."""
    n = 20_000
    b = episodes(THETA, n)
    exact = two.evaluate(THETA)
    right1, right2 = b.a1 == b.y, b.a2 == b.y
    measured = (right1, right2, ~right1 & right2, right1 & ~right2)
    for share, want in zip(measured, exact, strict=True):
        error = np.sqrt(want * (1 - want) / n)
        assert (np.abs(share.mean(axis=1) - want) < 4.5 * error).all()
    lies = (right1 != (b.hint > 0)).mean()
    assert abs(lies - 0.15) < 4.5 * np.sqrt(0.15 * 0.85 / (3 * n))


def test_the_gradient_is_that_of_the_weighted_likelihood() -> None:
    b = episodes(THETA, 50)
    first, second = np.random.default_rng(1).standard_normal((2, *b.y.shape))
    theta = torch.from_numpy(THETA.copy()).requires_grad_()
    w, k, v = theta.T[:, :, None]
    e, a1, hint, a2 = map(torch.from_numpy, (b.e, b.a1, b.hint, b.a2))
    log = torch.nn.functional.logsigmoid
    own, again = log(a1 * w * e), log(a2 * (w * e + k * a1 + v * hint * a1))
    total = torch.from_numpy(first) * own + torch.from_numpy(second) * again
    total.mean(dim=1).sum().backward()
    assert theta.grad is not None
    np.testing.assert_allclose(two.gradient(THETA, b, first, second), theta.grad, atol=1e-12)


@pytest.mark.filterwarnings("ignore:alpha")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", [two.SCORE, two.NAIVE, two.TOTAL, two.WEIGHT])
def test_who_is_paid_what(name: str, stage: int) -> None:
    """Each arm's credit less that of the other episodes, from rewards and log-ratios by hand."""
    arm = ARMS[name]
    b = episodes(THETA, 40)
    r1, r2 = (b.a1 == b.y) * 1.0, (b.a2 == b.y) * 1.0
    kl = []
    for k, a in enumerate((b.a1, b.a2)):
        now, then = (np.log(expit(a * two.logits(p, b)[k])) for p in (THETA, BASE))
        kl.append(now - then)
    bonus = (arm.alpha * r2) if arm.weight else arm.alpha * (r2 - r1)
    if stage == 1:
        paid = -BETA2 * kl[0], r2 - BETA1 * kl[1]
    else:
        paid = r1 - BETA1 * kl[0], r2 + bonus - BETA1 * kl[1]
    if arm.credit == "total":
        paid = (sum(paid), sum(paid))
    found = two.advantages(arm, stage, THETA, b, np.ones(40))
    for mine, want in zip(found, paid, strict=True):
        np.testing.assert_allclose(mine, loo(want), atol=1e-9)


def test_base_attempts_are_compared_among_themselves() -> None:
    b = episodes(THETA, 40)
    own = np.repeat([1.0, 0.0], 20)
    found = two.advantages(ARMS[two.BASE_HALF], 2, THETA, b, own)
    for half in (slice(0, 20), slice(20, 40)):
        part = Batch(*(x[:, half] for x in b))
        alone = two.advantages(ARMS[two.BASE_HALF], 2, THETA, part, np.ones(20))
        for mine, want in zip(found, alone, strict=True):
            np.testing.assert_allclose(mine[:, half], want, atol=1e-12)


def test_imitation_follows_what_ended_right() -> None:
    """The mean log-likelihood of good episodes; of pairs the second attempt only."""
    able = THETA[1:]  # the base never mends, so has nothing to imitate
    b = episodes(able, 200)
    for arm in (ARMS[two.PAIRS], ARMS[two.STAR], ARMS[two.STAR_SAME]):
        found = two.imitation(arm, able, b)
        for s in range(len(able)):
            good = (b.a2[s] == b.y[s]) & (arm.same | (b.a1[s] != b.y[s]))
            one = Batch(*(x[s : s + 1, good] for x in b))
            ones = np.ones_like(one.y)
            want = two.gradient(able[s : s + 1], one, ones * (arm.learn == "episodes"), ones)
            np.testing.assert_allclose(found[s], want[0], atol=1e-12)
    wrong = b._replace(a2=-b.y)
    assert not two.imitation(ARMS[two.STAR_SAME], able, wrong).any()


def test_runs_are_by_seed_and_end_where_their_course_does() -> None:
    one, again = (two.train(ARMS[two.SCORE], 3, [4], every=50) for _ in range(2))
    assert np.array_equal(one.theta, again.theta)
    assert one.steps == [0, 50, 100, 150]
    np.testing.assert_array_equal(one.t2[-1], one.outcome.t2)
    np.testing.assert_allclose(one.t1[0], two.evaluate(BASE[None]).t1[0])
    assert len(np.unique(one.theta[:, 0])) == 3


def test_the_first_stage_holds_the_first_attempt() -> None:
    """After it w is nearer to the base's than in a run that has no such stage."""
    held, free = (
        two.train(Arm(alpha=ALPHA, first_stage=stage), 8, [5], every=50) for stage in (True, False)
    )
    start = held.t1[0]
    assert (np.abs(held.t1[1] - start) < np.abs(free.t1[1] - start)).mean() > 0.7
