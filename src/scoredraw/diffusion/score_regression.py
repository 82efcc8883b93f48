"""The score of tabular data by regression: a wide network, or its kernel limit, stopped in time.

With  x_t = alpha x_0 + sigma eps  the score is known once the mean of x_0 given x_t is,

    ∇log p_t(x) = (alpha E[x_0 | x_t = x] - x) / sigma²,

and that mean is a regression: of data x_0 on their own noisy versions (x_t, t), t uniform on
[t_min, t_max]. It is denoising score matching with weight sigma⁴/alpha². What x_t leaves open about
x_0 is noise in the regression's targets; a wide ReLU network trained by gradient descent first
learns the mean and then this noise, so the estimator decides at which step to stop
(`kernel_regression` has the kernel, the steps and the rules). Beside it stand the denoisers to
compare with: kernel ridge, a Gaussian, a multilayer perceptron.

Columns are standardised. The diffusion is that of the standardised data z, and a point x = mean +
scale z of it in the data's own units, where scores are divided by scale.

Han, Razaviyayn and Xu, "Neural network-based score estimation in diffusion models: optimization
and generalization", ICLR 2024, arXiv 2401.15604.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from scoredraw.diffusion.deis import DEISSolver
from scoredraw.diffusion.gaussian_mixtures import GaussianMixtureScore
from scoredraw.diffusion.kernel_regression import (
    EXACT_LIMIT,
    LAYERS,
    NEVER,
    RiskPath,
    SpectralRegression,
    WideNetwork,
    discrepancy_step,
    ntk_relu,
    rwy_stopping_step,
    step_grid,
)
from scoredraw.diffusion.parameterisations import as_times, to_eps
from scoredraw.diffusion.schedules import NoiseSchedule, OrnsteinUhlenbeck
from scoredraw.errors import require
from scoredraw.uniforms import generator

Float = NDArray[np.float64]

STOPPING = ("holdout", "rwy", "discrepancy", "never", "ridge")
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, 3))  # of kernel ridge, 1e-5 to 10
BACKENDS = ("kernel", "network")
FIT, SAMPLE, START = range(3)  # streams of random numbers that share none
HELD_REPEATS = 4  # noises a held-out row of the perceptron
SPECTRUM_LANDMARKS = 1000  # for the step size of a network on more inputs than EXACT_LIMIT


@dataclass(frozen=True, eq=False)
class NoisyPairs:
    """Noisy rows x (N, d) at times t (N,), the clean rows x0 they come from, and which, row (N,).

    >>> pairs = NoisyPairs.draw(np.eye(3), OrnsteinUhlenbeck(), repeats=2, rng=0)
    >>> pairs.x.shape, pairs.row.tolist(), bool((pairs.x0 == np.eye(3)[pairs.row]).all())
    ((6, 3), [0, 0, 1, 1, 2, 2], True)
    """

    x: Float
    t: Float
    x0: Float
    row: NDArray[np.int64]

    @classmethod
    def draw(
        cls,
        data: Float,
        schedule: NoiseSchedule,
        repeats: int = 1,
        rng: int | np.random.Generator | None = None,
    ) -> NoisyPairs:
        """Every row `repeats` times, t uniform between the schedule's ends."""
        draw, row = generator(rng), np.repeat(np.arange(len(data)), repeats)
        x0 = data[row]
        t = draw.uniform(schedule.ends.t_end, schedule.ends.t_start, len(row))
        return cls(schedule.perturb(x0, t, draw.standard_normal(x0.shape)), t, x0, row)

    def __getitem__(self, kept: NDArray[Any]) -> NoisyPairs:
        return NoisyPairs(self.x[kept], self.t[kept], self.x0[kept], self.row[kept])

    def split(self, share: float, rng: np.random.Generator) -> tuple[NoisyPairs, NoisyPairs]:
        """Pairs to train on, and those of a share of the rows, at least one, held out."""
        rows = np.unique(self.row)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held = np.isin(self.row, rng.permutation(rows)[:count])
        return self[~held], self[held]


# ── what all estimators share ───────────────────────────────────────────────────────────────────


class ScoreRegressor(BaseEstimator):
    """A denoiser E[x_0 | x_t] learned from rows, and the score, noise and samples it implies.

    A subclass gives `_regress`, to learn from standardised rows z, and `_predict`, E[z_0 | z_t].
    All have t_min, t_max, schedule, random_state; after `fit` mean_, scale_, schedule_ with the
    ends t_min and t_max, and risk_path_ (None where nothing is held out).
    """

    t_min: float
    t_max: float
    schedule: NoiseSchedule | None
    random_state: Any

    @abstractmethod
    def _regress(self, z: Float, rng: np.random.Generator) -> None: ...

    @abstractmethod
    def _predict(self, z: Float, t: Float) -> Float: ...

    def _check(self) -> None:
        """What can be wrong with the parameters."""

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from X (n, d), n >= 2. y is ignored. A constant column keeps its scale: a warning.

        Raises InputError for parameters out of range, ValueError for NaN, infinity, X that is not
        (n, d) and fewer than two rows.
        """
        require(self.t_min > 0, "t_min", self.t_min, "a time above 0: the score needs noise")
        wanted = f"a finite time above t_min = {self.t_min:g}"
        require(self.t_min < self.t_max < np.inf, "t_max", self.t_max, wanted)
        ends = {"t_start": float(self.t_max), "t_end": float(self.t_min), "last": "denoise"}
        base = OrnsteinUhlenbeck() if self.schedule is None else self.schedule
        low, high = base.domain
        inside = low <= self.t_min and self.t_max <= high
        require(inside, "t_min, t_max", (self.t_min, self.t_max), f"times of {base!r}")
        self._check()
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.schedule_: NoiseSchedule = base.with_ends(**ends)
        self.mean_, spread = X.mean(axis=0), X.std(axis=0)
        flat = spread <= 1e-12 * np.abs(X).max(axis=0)
        if flat.any():
            said = f"X: got constant columns {np.flatnonzero(flat).tolist()}, their scale is left"
            warnings.warn(said, stacklevel=2)
        self.scale_: Float = np.where(flat, 1.0, spread)
        self.seed_ = self._seed(self.random_state)
        self.risk_path_: RiskPath | None = None
        self._regress((X - self.mean_) / self.scale_, np.random.default_rng([self.seed_, FIT]))
        return self

    def denoise(self, x: Any, t: Any) -> Float:
        """E[x_0 | x_t = x]: (B, d), for x (B, d) and one time or (B,). Warns below t_min."""
        z, times = self._given(x, t)
        return self.mean_ + self.scale_ * self._predict(z, times)

    def score_function(self, x: Any, t: Any) -> Float:
        """∇log p_t(x) = (alpha E[z_0 | z_t] - z) / (sigma² scale): (B, d), as `denoise`."""
        z, times = self._given(x, t)
        alpha = self.schedule_.alpha(times)[:, None]
        power = np.square(self.schedule_.sigma(times))[:, None]
        return (alpha * self._predict(z, times) - z) / (power * self.scale_)

    def eps(self, z: Any, t: Any) -> Float:
        """The noise in standardised states z (B, d), as a solver asks for it."""
        states = np.asarray(z, np.float64)
        times = np.broadcast_to(as_times(t), len(states))
        alpha = self.schedule_.alpha(times)[:, None]
        sigma = self.schedule_.sigma(times)[:, None]
        return np.asarray(to_eps(self._predict(states, times), states, alpha, sigma, "sample"))

    def sample(
        self, n: int, *, solver: Any = None, num_steps: int = 25, random_state: Any = None
    ) -> Float:
        """n new rows (n, d): noise carried from t_max to t_min, and denoised there.

        solver: anything with `sample(eps_fn, x_T)`, such as a `DEISSolver(self.schedule_, ...)`;
        by default `num_steps` Heun steps on the times of EDM. random_state: that of `fit` if None.
        """
        check_is_fitted(self)
        require(n >= 0, "n", n, "a count >= 0")
        seed = self.seed_ if random_state is None else self._seed(random_state)
        draw = np.random.default_rng([seed, SAMPLE])
        x_T = self.schedule_.draw_prior((n, self.n_features_in_), draw)
        if solver is None:
            solver = DEISSolver(
                self.schedule_, num_steps, variant="rhork", tableau="2heun", grid="rho"
            )
        return self.mean_ + self.scale_ * np.asarray(solver.sample(self.eps, x_T))

    def _given(self, x: Any, t: Any) -> tuple[Float, Float]:
        """Standardised states and a time each."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False)
        times = as_times(t)
        require(times.shape in ((), (len(x),)), "t", times.shape, f"one time or ({len(x)},)")
        good = bool((np.isfinite(times) & (times > 0)).all())
        require(good, "t", t if times.ndim == 0 else "others", "finite times above 0")
        if times.min() < self.t_min:
            said = f"t: got {times.min():g}, below t_min = {self.t_min:g}, where nothing was"
            warnings.warn(f"{said} learned and errors grow as 1/sigma²", stacklevel=3)
        return (x - self.mean_) / self.scale_, np.broadcast_to(times, len(x))

    def _seed(self, state: Any) -> int:
        if isinstance(state, int | np.integer):
            return int(state)
        return int(check_random_state(state).randint(2**31 - 1))


def _mean_square(residuals: Float) -> float:
    return float(np.square(residuals).mean())


# ── the wide network and its kernel ─────────────────────────────────────────────────────────────


class NTKScoreEstimator(ScoreRegressor):
    """The score by gradient descent on a wide ReLU network, or its kernel limit, stopped early.

    Parameters
    ----------
    t_min, t_max : times to learn at, 0 < t_min < t_max. schedule : Ornstein-Uhlenbeck by default.
    repeats : noises a row, each at its own time; several are much better than one.
    backend : "kernel", gradient descent in the limit of infinite width, all steps at once, or
        "network" of `width` units, step by step, on batches of `batch_size` pairs if given.
    layers : trained, the "hidden" one or "both".
    constant : whether inputs are (z, t - t_min, 1) and not (z, t - t_min): units with an offset.
    landmarks : a Nyström approximation of the kernel by so many pairs (all, where there are fewer),
        needed beyond 8,000 pairs; a network takes 1,000 there, for its step size alone.
    lr : step size η of z-standardised regression, below 2/λ_max(K/N); "auto" is 1/λ_max.
    stopping : "holdout", the step with the least error on `holdout` of the rows, then all rows are
        used; "rwy", by noise and spectrum (at least one step); "discrepancy", by the training
        error; "never", the limit of kernel descent, or `max_steps` of the network; a number; or
        "ridge", kernel ridge regression instead, with the penalty of least held-out error.
    noise_std : of x_0 given x_t, for "rwy" and "discrepancy"; by default from the held-out error.
        c : a factor on the bound of either, above 1 to stop "rwy" later and "discrepancy" earlier.
    max_steps : the last step held-out errors are computed at, and the most that a rule lets a
        network take; it stops looking before, at four times its best step.
    clip_outputs : project predictions on the range of the data's columns. clip_inputs : shrink
        standardised points beyond this distance from the mean to it.
    random_state : int, RandomState or None.

    Attributes
    ----------
    stop_step_ : steps taken. penalty_ : of ridge, or None. risk_path_ : the `RiskPath` over them,
    of all but the rows held out.
    regression_ : the `SpectralRegression`. network_ : the `WideNetwork`, or None. eta_ : η.
    noise_std_ : as used or estimated, and rwy_step_ : what "rwy" says (0: not to train); both None
        without held-out rows or noise_std.

    Raises InputError for parameters out of range, lr not below 2/λ_max, and too many pairs without
    landmarks; ValueError for NaN and fewer than two rows. Kernel: time O(N³), memory O(N²), for N =
    n repeats pairs, O(N) a denoised row. Network: O(N width d) a step. Sequential.
    Han, Razaviyayn and Xu 2024, arXiv 2401.15604.

    >>> X = np.random.default_rng(0).standard_normal((100, 2)) @ [[2.0, 1.0], [0.0, 1.0]]
    >>> estimator = NTKScoreEstimator(random_state=0).fit(X)
    >>> estimator.denoise([[0.0, 0.0], [4.0, 2.0]], 0.3).shape, estimator.sample(5).shape
    ((2, 2), (5, 2))
    """

    def __init__(
        self, t_min: float = 0.05, t_max: float = 2.0, *, schedule: NoiseSchedule | None = None,
        repeats: int = 4, backend: str = "kernel", layers: str = "hidden", constant: bool = True,
        landmarks: int | None = None, width: int = 4096, batch_size: int | None = None,
        lr: float | str = "auto", stopping: str | int = "holdout", holdout: float = 0.15,
        noise_std: float | None = None, c: float = 1.0, max_steps: int = 10_000,
        clip_outputs: bool = False, clip_inputs: float | None = None, random_state: Any = None,
    ) -> None:  # fmt: skip
        self.t_min, self.t_max, self.schedule, self.repeats = t_min, t_max, schedule, repeats
        self.backend, self.layers, self.constant = backend, layers, constant
        self.width, self.batch_size, self.lr, self.stopping = width, batch_size, lr, stopping
        self.holdout, self.noise_std, self.c, self.max_steps = holdout, noise_std, c, max_steps
        self.clip_outputs, self.random_state = clip_outputs, random_state
        self.clip_inputs, self.landmarks = clip_inputs, landmarks

    def _check(self) -> None:
        rules = f"one of {', '.join(STOPPING)}, or a number of steps >= 0"
        counted = isinstance(self.stopping, int | np.integer) and self.stopping >= 0
        known = counted or self.stopping in STOPPING
        require(known, "stopping", repr(self.stopping), rules)
        require(self.backend in BACKENDS, "backend", repr(self.backend), "'kernel' or 'network'")
        exact = self.backend == "kernel" or self.stopping != "ridge"
        require(exact, "stopping", "'ridge' with a network", "it with backend='kernel'")
        require(self.layers in LAYERS, "layers", repr(self.layers), "'hidden' or 'both'")
        require(0 < self.holdout < 1, "holdout", self.holdout, "a share between 0 and 1")
        automatic = self.lr == "auto" or not isinstance(self.lr, str)
        require(automatic, "lr", repr(self.lr), "a number or 'auto'")
        for name in ("repeats", "max_steps", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("noise_std", "c", "clip_inputs"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number")

    def _regress(self, z: Float, rng: np.random.Generator) -> None:
        pairs = NoisyPairs.draw(z, self.schedule_, self.repeats, rng)
        self._low, self._high = z.min(axis=0), z.max(axis=0)
        self.noise_std_, self.rwy_step_, self.network_ = self.noise_std, None, None
        by_noise = self.stopping in ("rwy", "discrepancy") and self.noise_std is None
        if self.stopping in ("holdout", "ridge") or by_noise:
            kept, held = pairs.split(self.holdout, rng)
            kernel = self.backend == "kernel"
            risks = self._kernel_risks if kernel else self._network_risks
            self.risk_path_ = risks(kept, held, rng)
            if self.noise_std is None:
                self.noise_std_ = float(np.sqrt(self.risk_path_.held_out.min()))
        self.regression_: SpectralRegression = self._spectral(pairs, rng)
        self.eta_ = self._eta(self.regression_)
        if self.noise_std_:
            spectrum, n = self.regression_.eigenvalues, len(pairs.t)
            self.rwy_step_ = rwy_stopping_step(spectrum, self.noise_std_, self.eta_, self.c, n=n)
        self.stop_step_, self.penalty_ = self._choose()
        if self.backend == "network":
            if self.stopping in STOPPING:
                self.stop_step_ = min(self.stop_step_, self.max_steps)
            networks = self._descent(pairs, self.eta_, rng)
            self.network_ = next(islice(networks, int(self.stop_step_), None))
        elif self.penalty_ is not None:
            self._filter = self.regression_.ridge(self.penalty_)
        else:
            self._filter = self.regression_.descent(self.stop_step_, self.eta_)

    def _choose(self) -> tuple[float, float | None]:
        """Steps of descent, and the penalty where ridge takes their place."""
        if self.stopping in ("holdout", "ridge"):
            assert self.risk_path_ is not None
            best = self.risk_path_.at[self.risk_path_.best]
            return (int(best), None) if self.stopping == "holdout" else (NEVER, float(best))
        if self.stopping == "never" or (self.stopping in STOPPING and not self.noise_std_):
            return NEVER, None  # targets without noise may be fitted
        if self.stopping == "rwy":
            assert self.rwy_step_ is not None
            return max(1, self.rwy_step_), None  # the raw rule may refuse to train
        if self.stopping == "discrepancy":
            assert self.noise_std_ is not None
            fit = self.regression_
            return discrepancy_step(fit, self.noise_std_, self.eta_, self.c), None
        return int(self.stopping), None

    def _kernel_risks(
        self, kept: NoisyPairs, held: NoisyPairs, rng: np.random.Generator
    ) -> RiskPath:
        """Errors at `held` of descent, or of ridge, on `kept`."""
        fit, asked = self._spectral(kept, rng), self._features(held.x, held.t)
        if self.stopping == "ridge":
            filters = [fit.ridge(penalty) for penalty in PENALTIES]
            errors = [_mean_square(one - held.x0) for one in fit.path(asked, filters)]
            return RiskPath(np.array(PENALTIES), np.array(errors))
        steps, eta = step_grid(self.max_steps), self._eta(fit)
        found = fit.path(asked, [fit.descent(k, eta) for k in steps])
        errors = [_mean_square(one - held.x0) for one in found]
        training = [fit.training_error(k, eta) for k in steps]
        return RiskPath(np.array(steps), np.array(errors), np.array(training))

    def _network_risks(
        self, kept: NoisyPairs, held: NoisyPairs, rng: np.random.Generator
    ) -> RiskPath:
        """The same of the network, until the least error is far behind."""
        inputs, asked = self._features(kept.x, kept.t), self._features(held.x, held.t)
        grid, path = set(step_grid(self.max_steps)), []
        eta = self._eta(self._spectral(kept, rng))
        for k, network in enumerate(self._descent(kept, eta, rng)):
            if k in grid:
                error = _mean_square(network(asked) - held.x0)
                path.append((error, k, _mean_square(network(inputs) - kept.x0)))
            if k >= min(self.max_steps, max(20, 4 * min(path)[1])):
                break
        errors, steps, training = (np.array(column) for column in zip(*path, strict=True))
        return RiskPath(steps, errors, training)

    def _descent(
        self, pairs: NoisyPairs, eta: float, rng: np.random.Generator
    ) -> Iterator[WideNetwork]:
        """The network after 0, 1, 2, ... steps, from the same start every time."""
        Z, draw = self._features(pairs.x, pairs.t), np.random.default_rng([self.seed_, START])
        sizes = self.width, Z.shape[1], pairs.x0.shape[1]
        start = WideNetwork.init(*sizes, layers=self.layers, rng=draw)
        return start.descend(Z, pairs.x0, eta, self.batch_size, rng)

    def _spectral(self, pairs: NoisyPairs, rng: np.random.Generator) -> SpectralRegression:
        landmarks, n = self.landmarks, len(pairs.t)
        if self.backend == "network" and landmarks is None and n > EXACT_LIMIT:
            landmarks = SPECTRUM_LANDMARKS
        kernel = partial(ntk_relu, layers=self.layers)
        landmarks = None if landmarks is None else min(landmarks, n)
        Z = self._features(pairs.x, pairs.t)
        return SpectralRegression.fit(Z, pairs.x0, kernel, landmarks=landmarks, rng=rng)

    def _eta(self, fit: SpectralRegression) -> float:
        eta = 1 / fit.largest if isinstance(self.lr, str) else float(self.lr)
        wanted = f"a step in (0, 2/λ_max) = (0, {2 / fit.largest:g})"
        require(0 < eta < 2 / fit.largest, "lr", self.lr, wanted)
        return eta

    def _features(self, z: Float, t: Float) -> Float:
        if self.clip_inputs is not None:
            length = np.linalg.norm(z, axis=1, keepdims=True)
            z = z * np.minimum(1, self.clip_inputs / np.maximum(length, 1e-300))
        parts = [z, (t - self.t_min)[:, None]]
        return np.concatenate([*parts, np.ones((len(z), 1))] if self.constant else parts, axis=1)

    def _predict(self, z: Float, t: Float) -> Float:
        Z = self._features(z, t)
        if self.network_ is None:
            found = self.regression_.predict(Z, self._filter)
        else:
            found = self.network_(Z)
        return np.clip(found, self._low, self._high) if self.clip_outputs else found


# ── denoisers to compare with ───────────────────────────────────────────────────────────────────


class GaussianScoreEstimator(ScoreRegressor):
    """The score of a Gaussian with the rows' mean and covariance: the best linear denoiser.

    Parameters as in `NTKScoreEstimator`. Nothing is random but `sample`. O(n d² + d³).

    >>> X = np.random.default_rng(0).standard_normal((500, 2)) * [1.0, 3.0]
    >>> estimator = GaussianScoreEstimator(random_state=0).fit(X)
    >>> bool(np.abs(estimator.score_function(X, 0.1) + X / [1, 9]).max() < 0.5)
    True
    """

    def __init__(
        self, t_min: float = 0.05, t_max: float = 2.0, *, schedule: NoiseSchedule | None = None,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.t_min, self.t_max = t_min, t_max
        self.schedule, self.random_state = schedule, random_state

    def _regress(self, z: Float, rng: np.random.Generator) -> None:
        covariance = np.atleast_2d(np.cov(z.T, bias=True))
        mean = np.zeros((1, z.shape[1]))
        self.gaussian_ = GaussianMixtureScore([1.0], mean, covariance[None], self.schedule_)

    def _predict(self, z: Float, t: Float) -> Float:
        return np.asarray(self.gaussian_.denoise(z, t))


class MLPScoreEstimator(ScoreRegressor):
    """Denoising score matching as it is usually done: a multilayer perceptron, Adam, fresh noise.

    Parameters as in `NTKScoreEstimator`, and hidden, alpha, learning_rate, batch_size of
    scikit-learn's `MLPRegressor`. An epoch goes once over all rows, each with a new noise and
    time; epochs_, up to max_epochs, are those with the least error on `holdout` of the rows.

    >>> X = np.random.default_rng(0).standard_normal((60, 2))
    >>> MLPScoreEstimator(hidden=(16,), max_epochs=5, random_state=0).fit(X).epochs_ <= 5
    True
    """

    def __init__(
        self, t_min: float = 0.05, t_max: float = 2.0, *, schedule: NoiseSchedule | None = None,
        hidden: tuple[int, ...] = (128, 128), alpha: float = 1e-4, learning_rate: float = 1e-3,
        batch_size: int = 32, max_epochs: int = 200, holdout: float = 0.15,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.t_min, self.t_max, self.schedule, self.hidden = t_min, t_max, schedule, hidden
        self.alpha, self.learning_rate = alpha, learning_rate
        self.batch_size, self.max_epochs = batch_size, max_epochs
        self.holdout, self.random_state = holdout, random_state

    def _check(self) -> None:
        require(0 < self.holdout < 1, "holdout", self.holdout, "a share between 0 and 1")
        require(self.max_epochs >= 1, "max_epochs", self.max_epochs, "at least 1")

    def _regress(self, z: Float, rng: np.random.Generator) -> None:
        kept, held = NoisyPairs.draw(z, self.schedule_, HELD_REPEATS, rng).split(self.holdout, rng)
        errors = []
        for network in self._epochs(z[np.unique(kept.row)], rng):
            self.network_ = network
            errors.append(_mean_square(self._predict(held.x, held.t) - held.x0))
        self.risk_path_ = RiskPath(np.arange(1, self.max_epochs + 1), np.array(errors))
        self.epochs_ = int(self.risk_path_.at[self.risk_path_.best])
        self.network_ = next(islice(self._epochs(z, rng), self.epochs_ - 1, None))

    def _epochs(self, z: Float, rng: np.random.Generator) -> Iterator[Any]:
        """The network after 1, 2, ... max_epochs epochs."""
        from sklearn.neural_network import MLPRegressor

        network = MLPRegressor(
            hidden_layer_sizes=self.hidden, alpha=self.alpha, random_state=self.seed_,
            learning_rate_init=self.learning_rate, batch_size=min(self.batch_size, len(z)),
        )  # fmt: skip
        for _ in range(self.max_epochs):
            pairs = NoisyPairs.draw(z, self.schedule_, 1, rng)
            targets = pairs.x0 if pairs.x0.shape[1] > 1 else pairs.x0[:, 0]
            yield network.partial_fit(np.column_stack([pairs.x, pairs.t - self.t_min]), targets)

    def _predict(self, z: Float, t: Float) -> Float:
        found = self.network_.predict(np.column_stack([z, t - self.t_min]))
        return np.asarray(found, np.float64).reshape(z.shape)
