"""Steering without a tree: on a Gaussian, where the tilted law and log Z are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scoredraw import smc  # noqa: E402
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore  # noqa: E402
from scoredraw.diffusion.schedules import LinearBeta  # noqa: E402
from scoredraw.diffusion.steering_baselines import (  # noqa: E402
    Steered,
    best_of_n,
    guided_rollouts,
    particle_steering,
    twisted_steering,
    weighted_rollouts,
)
from scoredraw.diffusion.tree_proposals import (  # noqa: E402
    MarkovChain,
    diffusion_chain,
    finite_chain,
)
from scoredraw.errors import InputError  # noqa: E402

pytestmark = pytest.mark.oracle

T, LAM, N = 12, 1.5, 4000
DATA = GaussianMixtureScore([1.0], [[0.5]], [[[0.64]]], LinearBeta())


def chain(tensors: bool = False) -> MarkovChain:
    return diffusion_chain(LinearBeta(), DATA.eps, (1,), T, branch_at=(12, 8, 4), tensors=tensors)


def reward(x: Any) -> Any:
    return x[:, 0]


def slope(x: Any, i: int) -> Any:
    """∇_x x̂_0(x) by differences, exact as x̂_0 is linear."""
    predict = chain().predict
    assert predict is not None
    return predict(x + 0.5, i) - predict(x - 0.5, i)


class Fixed(np.random.Generator):
    """The same noise every time."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def standard_normal(self, size: Any = None, *_: Any, **__: Any) -> Any:
        return np.full(size, self.value)


def law() -> tuple[float, float]:
    """Mean and variance of the chain's x_0: every step is x' = a x + b + c z."""
    mean, variance, one = 0.0, 1.0, chain()
    for i in range(T):
        still = one.step(np.array([[0.0], [1.0]]), i, Fixed(0.0))[:, 0]
        a, b = still[1] - still[0], still[0]
        c = one.step(np.array([[0.0]]), i, Fixed(1.0))[0, 0] - b
        mean, variance = a * mean + b, a * a * variance + c * c
    return mean, variance


MEAN, VARIANCE = law()
LOG_Z = LAM * MEAN + LAM**2 * VARIANCE / 2

METHODS: dict[str, Any] = {
    "rollouts": lambda g: weighted_rollouts(chain(), reward, N, lam=LAM, generator=g),
    "SMC": lambda g: particle_steering(chain(), reward, N, lam=LAM, generator=g),
    "SMC, always": lambda g: particle_steering(chain(), reward, N, lam=LAM, ess_threshold=1.0,
                                               scheme="multinomial", generator=g),
    "max": lambda g: particle_steering(chain(), reward, N, lam=LAM, potential="max", generator=g,
                                       weigh_at=(8, 4)),
    "rollout values": lambda g: particle_steering(chain(), reward, N, lam=LAM, value="rollout",
                                                  generator=g),
    "TDS, own gradient": lambda g: twisted_steering(chain(), reward, N, lam=LAM, gradient=slope,
                                                    generator=g),
    "TDS": lambda g: twisted_steering(chain(True), reward, N, lam=LAM, generator=g),
    "DAS": lambda g: twisted_steering(chain(True), reward, N, lam=LAM, tempered=True, generator=g),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_weighted_particles_have_the_tilted_mean_and_log_z(name: str) -> None:
    """The mean moves by λ variance, and log Z is known; within 0.15 (5 errors of the worst)."""
    assert LAM * VARIANCE > 0.5
    found: Steered = METHODS[name](0)
    x = np.asarray(found.x)[:, 0]
    mean = float(smc.self_normalized(found.log_weights, x))
    assert mean == pytest.approx(MEAN + LAM * VARIANCE, abs=0.15)
    assert found.log_z == pytest.approx(LOG_Z, abs=0.15)
    assert found.best()[1] == pytest.approx(x.max())
    drawn = np.asarray(found.sample(500, 0))[:, 0]
    assert drawn.mean() == pytest.approx(mean, abs=0.1)


def test_a_twist_saves_weights() -> None:
    """With means that lean, particles need not be resampled as often: their size stays larger."""
    alone = particle_steering(chain(), reward, N, lam=LAM, ess_threshold=0.0, generator=0)
    leaning = twisted_steering(chain(), reward, N, lam=LAM, ess_threshold=0.0, gradient=slope,
                               generator=0)  # fmt: skip
    sizes = [smc.effective_size(found.log_weights) for found in (alone, leaning)]
    assert sizes[1] > 2 * sizes[0]


def test_guidance_without_weights_leans_but_is_not_the_tilted_law() -> None:
    found = guided_rollouts(chain(True), reward, N, lam=LAM, generator=0)
    mean = float(found.x.mean())
    assert mean > MEAN + 0.3 * LAM * VARIANCE
    assert (found.log_weights == 0).all()
    stronger = guided_rollouts(chain(), reward, N, lam=LAM, strength=2.0, gradient=slope,
                               generator=0)  # fmt: skip
    assert float(stronger.x.mean()) > mean + 0.2


def test_calls_are_counted() -> None:
    seen = [0]

    def eps(x: Any, t: float) -> Any:
        seen[0] += len(x)
        return DATA.eps(x, t)

    counting = diffusion_chain(LinearBeta(), eps, (1,), T, branch_at=(12, 8, 4))
    for run in (
        lambda: weighted_rollouts(counting, reward, 7, generator=0),
        lambda: particle_steering(counting, reward, 7, generator=0),
        lambda: particle_steering(counting, reward, 7, value="rollout", generator=0),
        lambda: guided_rollouts(counting, reward, 7, gradient=lambda x, i: 0 * x, generator=0),
    ):
        seen[0] = 0
        assert run().nfe == seen[0]
    assert particle_steering(counting, reward, 7, value="rollout").nfe == 7 * (12 + 12 + 8 + 4)
    assert best_of_n(chain(), reward, 50, generator=1)[1] > best_of_n(
        chain(), reward, 2, generator=1)[1]  # fmt: skip


def test_a_particle_that_promises_nothing_is_given_up() -> None:
    cut = lambda x: np.where(x[:, 0] > MEAN, 0.0, -np.inf)  # noqa: E731
    for potential in ("diff", "max"):
        found = particle_steering(chain(), cut, 500, potential=potential, generator=0)
        p = smc.probabilities(found.log_weights)
        assert np.isfinite(p).all()
        assert (np.asarray(found.x)[p > 0, 0] > MEAN).all()


def test_what_is_refused() -> None:
    finite = finite_chain([0.5, 0.5], [[[1.0, 0.0], [0.0, 1.0]]])
    cases: list[tuple[Any, str]] = [
        (lambda: particle_steering(finite, lambda x: x, 5), "chain: got one without"),
        (lambda: particle_steering(chain(), reward, 0), "n: got 0"),
        (lambda: particle_steering(chain(), reward, 5, lam=0.0), "lam: got"),
        (lambda: weighted_rollouts(chain(), reward, 5, lam=np.inf), "lam: got inf"),
        (lambda: particle_steering(chain(), reward, 5, potential="sum"), "potential: got 'sum'"),
        (lambda: particle_steering(chain(), reward, 5, value="best"), "value: got 'best'"),
        (lambda: particle_steering(chain(), reward, 5, ess_threshold=2.0), "ess_threshold"),
        (lambda: particle_steering(chain(), reward, 5, scheme="x"), "scheme: got 'x'"),
        (lambda: twisted_steering(chain(), reward, 5), "gradient: got 'autograd' of a ndarray"),
        (lambda: twisted_steering(chain(), reward, 5, gradient="auto"), "gradient: got 'auto'"),
        (lambda: particle_steering(chain(), lambda x: x[:, 0] * np.nan, 5), "reward: got nan at 0"),
        (lambda: best_of_n(chain(), lambda x: x, 5), "reward: got shape"),
    ]
    for run, said in cases:
        with pytest.raises(InputError, match=said):
            run()
