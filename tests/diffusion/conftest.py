"""Every kind of schedule, for the tests that hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest

from scoredraw.diffusion.schedules import (
    Cosine,
    DiscreteAlphas,
    LinearBeta,
    LinearFlow,
    NoiseSchedule,
    OrnsteinUhlenbeck,
    SubVariancePreserving,
    VarianceExploding,
)

SCHEDULES: list[NoiseSchedule] = [
    LinearBeta(),
    SubVariancePreserving(),
    Cosine(),
    OrnsteinUhlenbeck(),
    DiscreteAlphas.from_betas(np.linspace(1e-4, 0.02, 1000)),
    VarianceExploding(),
    VarianceExploding(0.01, 50.0, time="geometric"),
    LinearFlow(),
]


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return request.param
