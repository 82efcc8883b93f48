"""Performance as a function of the mixture of sources: fit it on small runs, follow it uphill.

At one training size a few mixtures p are trained and measured, and a regression on p and on the
transport distance OT(p) to the validation data says what the others would give. Two sizes N0 < N1
say what another size would give, as performance is taken to be affine in log N:

    L(p, N) = w1 L(p, N1) + w0 L(p, N0),   w1 = log(N/N0) / log(N1/N0),   w0 = 1 - w1

The gradient of the fitted L, with the transport potentials for ∂OT/∂p, leads to the best mixture.

Forms, with r = m - 1 free shares (the last source is one minus the others):

    ot               c + b OT
    linear-ot        c + b OT + Σ (c_i p_i + b_i p_i OT)
    pq-ot            linear-ot + Σ (d_i p_i² + e_i p_i² OT)       the paper's pseudo-quadratic form
    pq-ot-code       pq-ot without the d_i, what the released notebook fits
    linear           c + Σ c_i p_i
    pseudo-quadratic linear + Σ d_i p_i²
    quadratic        linear + Σ_{i≤j} d_ij p_i p_j
    rational         c ± Σ_i 1 / Σ_j λ_ij p_j, λ > 0              Hashimoto (2021), without OT
    auto             the linear form and ridge strength of least BIC (the default)

The paper's full form has 4m - 3 coefficients and over-fits a small grid, badly so where it has to
extrapolate; hence the default.

Kang, Just, Sahu and Jia, 2023, arXiv:2307.02460; Hashimoto, 2021, "Model Performance Scaling with
Multiple Data Sources".
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.data_selection.simplex import (
    Trace,
    mixture_grid,
    optimise_mixture,
    project_simplex,
)
from scoredraw.data_selection.size_projection import (
    error_amplification,
    project_size,
    projection_weights,
)
from scoredraw.data_selection.source_transport import check_mixtures
from scoredraw.errors import InputError, require

Array = NDArray[np.float64]

__all__ = [
    "MixturePerformanceModel",
    "Trace",
    "error_amplification",
    "mixture_grid",
    "optimise_mixture",
    "project_simplex",
    "project_size",
    "projection_weights",
]

LINEAR_FORMS: tuple[str, ...] = (
    "ot", "linear", "linear-ot", "pseudo-quadratic", "quadratic", "pq-ot-code", "pq-ot",
)  # fmt: skip
FORMS = (*LINEAR_FORMS, "rational", "auto")
STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


# ── The regression ───────────────────────────────────────────────────────────────────────────────


class MixturePerformanceModel:
    """Performance at one size (or several at once) as a function of mixture and transport cost.

    Least squares on the terms of `form` (see the module), with ridge strength α ≥ 0 on the
    standardised terms: min ‖y - c - Zβ‖² + α g ‖β‖². Several columns of performance share form
    and strength.

    Parameters
    ----------
    form : a name from `FORMS`. "auto" takes the form and strength of least BIC, corrected for
        small samples (McQuarrie, 1999): Σ_columns g log(RSS/g) + g df log g / (g - df - 2), with
        df the trace of the smoother. Uncorrected it takes the largest form of a small grid.
    ridge : α; None is least squares for a named form and a choice by BIC for "auto"; "bic" chooses
        for a named form too.

    Attributes
    ----------
    form_, ridge_ : what was used. terms_ : names of the terms. coef_ (s, k) or (k,), intercept_.
    bic_ : {(form, ridge): BIC} of what "auto" or "bic" compared. df_ : coefficients spent.
    residual_covariance_ : (s, s), residual sums of products over g - df.

    Raises `InputError` on shares off the simplex (tolerance 1e-6), NaN or infinity, no OT values
    for a form that needs them, and mixtures too few or too alike for least squares.

    Time O(g k²) a form, memory O(g k).

    >>> P = mixture_grid(3, parts=4)
    >>> ot = 2 + P[:, 0] ** 2
    >>> model = MixturePerformanceModel("linear-ot").fit(P, ot, 0.9 - 0.1 * ot + 0.05 * P[:, 1])
    >>> [round(float(c), 6) + 0.0 for c in model.coef_]
    [-0.1, 0.0, 0.05, 0.0, 0.0]
    """

    def __init__(self, form: str = "auto", ridge: float | str | None = None) -> None:
        self.form = form
        self.ridge = ridge

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, as scikit-learn's `clone` asks for them."""
        return {"form": self.form, "ridge": self.ridge}

    def set_params(self, **params: Any) -> MixturePerformanceModel:
        """Set the constructor's arguments by name."""
        for name, value in params.items():
            require(name in self.get_params(), "params", repr(name), "'form' or 'ridge'")
            setattr(self, name, value)
        return self

    def fit(self, P: ArrayLike, ot: ArrayLike | None, perf: ArrayLike) -> MixturePerformanceModel:
        """Fit g mixtures P (g, m), their OT (g,) (None if unused), performance (g,) or (g, s)."""
        require(self.form in FORMS, "form", repr(self.form), f"one of {', '.join(FORMS)}")
        P = np.asarray(P, dtype=np.float64)
        require(P.ndim == 2 and P.shape[1] >= 2, "P", f"shape {P.shape}", "(mixtures, sources ≥ 2)")
        self.m_ = P.shape[1]
        y = np.asarray(perf, dtype=np.float64)
        fits = y.ndim in (1, 2) and len(y) == len(P)
        require(fits, "perf", f"shape {y.shape}", f"({len(P)},) or ({len(P)}, sizes)")
        bad = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(axis=1))
        came = f"NaN or infinity at mixture {bad[0]}" if len(bad) else ""
        require(not len(bad), "perf", came, "finite numbers")
        self._flat = y.ndim == 1
        Y = y.reshape(len(y), -1)
        if self.form == "rational":
            self._fit_rational(check_mixtures(P, self.m_, "P"), Y)
        else:
            self._fit_linear(P, ot, Y)
        self._finish(Y)
        return self

    def _fit_linear(self, P: Array, ot: ArrayLike | None, Y: Array) -> None:
        forms = LINEAR_FORMS if self.form == "auto" else (self.form,)
        if self.form == "auto" and ot is None:
            forms = tuple(f for f in forms if not _exponents(f, self.m_)[:, 0].any())
        choose = self.ridge == "bic" or (self.form == "auto" and self.ridge is None)
        if choose:
            strengths: tuple[float, ...] = STRENGTHS
        else:
            alpha = 0.0 if self.ridge is None else self.ridge
            ok = isinstance(alpha, int | float) and np.isfinite(alpha) and alpha >= 0
            require(ok, "ridge", repr(self.ridge), "a number ≥ 0, 'bic' or None")
            strengths = (float(alpha),)
        fits = []
        for form in forms:
            self._set_form(form)
            Z = self._terms(P, ot)
            fits += [(form, alpha, _Ridge(Z, Y, alpha)) for alpha in strengths]
        possible = [
            fit for fit in fits if fit[2].solvable and (np.isfinite(fit[2].bic) or not choose)
        ]
        if not possible:
            k, rank = fits[0][2].k, fits[0][2].rank
            came = f"{len(P)} mixtures, which determine {rank + 1} of {k + 1} coefficients"
            raise InputError(f"P: got {came}, want more, a ridge, or form 'auto'")
        self.bic_ = {(form, alpha): fit.bic for form, alpha, fit in possible}
        form, self.ridge_, self._ridge = min(possible, key=lambda fit: fit[2].bic)
        self._set_form(form)
        self._coef, self._intercept = self._ridge.coefficients(Y)
        self.df_, self._smoother = self._ridge.df, self._ridge.weights(self._terms(P, ot))
        self._fitted = self._terms(P, ot) @ self._coef.T + self._intercept

    def _fit_rational(self, P: Array, Y: Array) -> None:
        self._set_form("rational")
        self.ridge_, self.bic_ = 0.0, {}
        q = self.m_**2 + 1
        require(len(P) > q, "P", f"{len(P)} mixtures", f"more than the form's {q} coefficients")
        self._rational = [_Rational(P, y) for y in Y.T]
        self._coef = np.stack([each.rates.ravel() for each in self._rational])
        self._intercept = np.array([each.level for each in self._rational])
        self.df_ = float(q)
        self._smoother = self._rational[0].weights(P)
        self._fitted = np.stack([each.predict(P) for each in self._rational], axis=1)

    def _finish(self, Y: Array) -> None:
        self._residuals = Y - self._fitted
        left = max(len(Y) - self.df_, 1.0)
        self.residual_covariance_: Array = self._residuals.T @ self._residuals / left
        self.degrees_ = left
        self.coef_ = self._coef[0] if self._flat else self._coef
        self.intercept_ = float(self._intercept[0]) if self._flat else self._intercept

    def _set_form(self, form: str) -> None:
        self.form_ = form
        self._powers = _exponents(form, self.m_)
        self.terms_ = [_name(row) for row in self._powers]

    def _terms(self, P: ArrayLike, ot: ArrayLike | None) -> Array:
        x = self._variables(P, ot)
        terms: Array = np.prod(x[:, None, :] ** self._powers, axis=2)
        return terms

    def _variables(self, P: ArrayLike, ot: ArrayLike | None) -> Array:
        """OT and the shares side by side, (g, 1 + m)."""
        P = np.atleast_2d(check_mixtures(P, self.m_, "P"))
        if ot is None:
            require(not self._powers[:, 0].any(), "ot", None, f"OT(p), which {self.form_} needs")
            ot = np.zeros(len(P))
        values = np.atleast_1d(np.asarray(ot, dtype=np.float64))
        require(values.shape == (len(P),), "ot", f"shape {values.shape}", f"({len(P)},)")
        require(bool(np.isfinite(values).all()), "ot", "NaN or infinity", "finite numbers")
        return np.column_stack([values, P])

    def predict(self, P: ArrayLike, ot: ArrayLike | None = None) -> Any:
        """Performance of mixtures P (g, m) -> (g,) or (g, s); a single mixture (m,) loses g."""
        self._fitted_or_raise()
        x = self._variables(P, ot)
        if self.form_ == "rational":
            out = np.stack([each.predict(x[:, 1:]) for each in self._rational], axis=1)
        else:
            out = self._terms(P, ot) @ self._coef.T + self._intercept
        out = out[:, 0] if self._flat else out
        return out[0] if np.ndim(P) == 1 else out

    def weights(self, P: ArrayLike, ot: ArrayLike | None = None) -> Array:
        """Weights h (g,), or one row a mixture, of the performances in a prediction, ŷ(p) = h · y.

        With residual covariance Σ the prediction's variance is ‖h‖² Σ. To first order for
        "rational".
        """
        self._fitted_or_raise()
        x = self._variables(P, ot)
        if self.form_ == "rational":
            weights = self._rational[0].weights(x[:, 1:])
        else:
            weights = self._ridge.weights(self._terms(P, ot))
        return np.asarray(weights[0] if np.ndim(P) == 1 else weights)

    def leave_one_out(self) -> Array:
        """What each fitted mixture would have been predicted without it: y - e / (1 - h_ii).

        Exact for the linear forms at fixed form and strength, to first order for "rational".
        A mixture without which nothing is determined (h_ii = 1) gives NaN.
        """
        self._fitted_or_raise()
        own = np.diag(self._smoother)[:, None]
        free = own < 1 - 1e-9
        out = self._fitted + self._residuals * (1 - 1 / np.where(free, 1 - own, np.nan))
        return out[:, 0] if self._flat else out

    def grad(self, p: ArrayLike, ot: float | None, source_means: ArrayLike | None) -> Array:
        r"""Gradient of the fitted performance along the simplex, (m,) or (s, m), summing to 0.

        :math:`g_i=\frac{\partial L}{\partial OT}\bar f_i+\frac{\partial L}{\partial p_i}`, less
        its mean, with :math:`\bar f` (m,) the source means of the transport potentials (any
        constant added to them drops out), so that :math:`g_i-g_j` is the derivative as mass moves
        from source j to source i. The calibrated ∂OT/∂p_i, which the released notebook puts in
        place of f̄_i, would mix derivatives along different directions.
        """
        self._fitted_or_raise()
        require(np.ndim(p) == 1, "p", f"{np.ndim(p)} dimensions", "one mixture")
        x = self._variables(p, None if ot is None else [ot])[0]
        if self.form_ == "rational":
            rows = np.stack([each.gradient(x[1:]) for each in self._rational])
        else:
            slopes = self._coef @ _derivatives(x, self._powers)
            rows = slopes[:, 1:]
            if self._powers[:, 0].any():
                require(source_means is not None, "source_means", None, f"({self.m_},)")
                means = np.asarray(source_means, dtype=np.float64)
                fits = means.shape == (self.m_,) and bool(np.isfinite(means).all())
                require(fits, "source_means", f"shape {means.shape}", f"finite ({self.m_},)")
                rows = rows + slopes[:, :1] * means
        rows = rows - rows.mean(axis=1, keepdims=True)
        return np.asarray(rows[0] if self._flat else rows)

    def _fitted_or_raise(self) -> None:
        require(hasattr(self, "degrees_"), "model", "one that was not fitted", "fit(P, ot, perf)")


def _exponents(form: str, m: int) -> NDArray[np.int64]:
    """The terms of a form as powers of (OT, p_1, ..., p_m), (k, 1 + m), without the constant."""
    none = (0,) * (m + 1)

    def term(*variables: int) -> tuple[int, ...]:
        return tuple(variables.count(v) for v in range(m + 1))

    shares = range(1, m)  # the last source is implied
    ot, linear = [term(0)], [term(i) for i in shares]
    square, linear_ot = [term(i, i) for i in shares], [term(i, 0) for i in shares]
    square_ot = [term(i, i, 0) for i in shares]
    crossed = [term(*pair) for pair in combinations_with_replacement(shares, 2)]
    terms = {
        "ot": ot,
        "linear-ot": ot + linear + linear_ot,
        "pq-ot": ot + linear + square + linear_ot + square_ot,
        "pq-ot-code": ot + linear + linear_ot + square_ot,
        "linear": linear,
        "pseudo-quadratic": linear + square,
        "quadratic": linear + crossed,
        "rational": [none],
    }[form]
    return np.array(terms, dtype=np.int64)


def _derivatives(x: Array, powers: NDArray[np.int64]) -> Array:
    """Of every term in every variable, (k, 1 + m)."""
    lowered = powers[:, None, :] - np.eye(powers.shape[1], dtype=np.int64)
    out: Array = powers * np.prod(x ** np.maximum(lowered, 0), axis=2)
    return out


def _name(powers: NDArray[np.int64]) -> str:
    names = ["OT", *(f"p{i}" for i in range(1, len(powers)))]
    return " ".join(n if e == 1 else f"{n}^{e}" for n, e in zip(names, powers, strict=True) if e)


class _Ridge:
    """One form at one strength; every prediction is a fixed combination of the performances."""

    def __init__(self, Z: Array, Y: Array, alpha: float) -> None:
        g, self.k = Z.shape
        self.centre, scale = Z.mean(axis=0), Z.std(axis=0)
        self.scale = np.where(scale > 1e-12 * np.abs(Z).max(), scale, 1.0)
        standard = (Z - self.centre) / self.scale
        u, s, vt = np.linalg.svd(standard, full_matrices=False)
        self.rank = int((s > 1e-9 * np.sqrt(g)).sum())
        kept = s > 1e-9 * np.sqrt(g)
        shrunk = np.where(kept, s / np.where(kept, s**2 + alpha * g, 1.0), 0.0)
        self.operator = (vt.T * shrunk) @ u.T  # standardised coefficients = operator @ y
        self.df = 1 + float((s * shrunk).sum())
        self.solvable = alpha > 0 or self.rank == self.k
        rss = ((Y - Y.mean(axis=0) - standard @ self.operator @ Y) ** 2).sum(axis=0)
        least = 1e-24 * np.maximum((Y**2).sum(axis=0), np.finfo(float).tiny)
        left = g - self.df - 2
        penalty = g * self.df * np.log(g) / left if left > 0 else np.inf
        self.bic = float((g * np.log(np.maximum(rss, least) / g) + penalty).sum())

    def coefficients(self, Y: Array) -> tuple[Array, Array]:
        coef = (self.operator @ Y / self.scale[:, None]).T
        return coef, Y.mean(axis=0) - coef @ self.centre

    def weights(self, Z: Array) -> Array:
        g = self.operator.shape[1]
        out: Array = 1 / g + (Z - self.centre) / self.scale @ self.operator
        return out


class _Rational:
    """level + sign Σ_i 1 / Σ_j rates_ij p_j, rates > 0: a few starts of nonlinear least squares.

    In units of the performances' spread, with the logarithms of the rates as coefficients.
    """

    def __init__(self, P: Array, y: Array) -> None:
        from scipy.optimize import least_squares

        m, self.spread = P.shape[1], max(float(y.std()), 1e-12)
        scaled, fits = y / self.spread, []
        lowest = np.append(np.full(m * m, -3.0), -np.inf)  # a term at a corner: 20 spreads at most
        for self.sign in (-1.0, 1.0):
            for start in range(2):  # each term falls, more or less, as its own source grows
                rates = m * start * np.eye(m)
                level = float(scaled.mean()) - self.sign * m
                found = least_squares(
                    lambda v: self._value(P, v) - scaled,
                    np.append(rates.ravel(), level),
                    lambda v: self._jacobian(P, v),
                    bounds=(lowest, np.append(np.full(m * m, 20.0), np.inf)),
                    max_nfev=100,
                )
                fits.append((float(found.cost), self.sign, found.x))
        _, self.sign, self._vector = min(fits, key=lambda fit: fit[0])
        self._inverse = np.linalg.pinv(self._jacobian(P, self._vector), rcond=1e-8)
        self.rates = np.exp(self._vector[:-1]).reshape(m, m) / self.spread
        self.level = float(self._vector[-1] * self.spread)

    def _value(self, P: Array, vector: Array) -> Array:
        rates = np.exp(vector[:-1]).reshape(P.shape[1], -1)
        out: Array = vector[-1] + self.sign * (1 / (P @ rates.T)).sum(axis=1)
        return out

    def _jacobian(self, P: Array, vector: Array) -> Array:
        rates = np.exp(vector[:-1]).reshape(P.shape[1], -1)
        slopes = -self.sign * P[:, None, :] * rates / (P @ rates.T)[:, :, None] ** 2
        return np.column_stack([slopes.reshape(len(P), -1), np.ones(len(P))])

    def predict(self, P: Array) -> Array:
        return self.level + self.sign * (1 / (P @ self.rates.T)).sum(axis=1)

    def gradient(self, p: Array) -> Array:
        out: Array = -self.sign * (1 / (self.rates @ p) ** 2) @ self.rates
        return out

    def weights(self, P: Array) -> Array:
        """First-order weights of the performances in a prediction, from the Jacobian at the fit."""
        return self._jacobian(P, self._vector) @ self._inverse
