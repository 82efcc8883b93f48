"""Diffusion: the score is the gradient of log p; schedules, exact scores and samplers."""

from scoredraw.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "schedules": "NoiseSchedule VariancePreserving LinearBeta SubVariancePreserving Cosine "
        "OrnsteinUhlenbeck DiscreteAlphas VarianceExploding LinearFlow EndPoints",
        "time_grids": "time_grid checked_times",
        "parameterisations": "to_eps to_x0",
        "gaussian_mixtures": "GaussianMixtureScore",
        "integrator_coefficients": "deis_coefficients runge_kutta_coefficients Tableau TABLEAUX "
        "VARIANTS",
        "deis": "DEISSolver DEISState",
        "deis_scheduler": "DEISScheduler",
    },
)
