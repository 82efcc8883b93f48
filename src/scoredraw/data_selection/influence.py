"""Influence scores: what training itself says about each example.

A model that was trained once has already told which examples were easy. Four kinds of trace are
enough: how the gradient at the input moves from checkpoint to checkpoint (variance of gradients),
how far the early prediction is from the label (EL2N), when an example was learned and lost again
(forgetting), and how many bits the input adds to the label (PVI); a fifth, the gradient of the
loss at the weights, is in `tracin`. The functions take those traces as arrays and return one
float64 a row; `gradients` computes the traces of a torch model, `recorder` collects them while it
trains, `probe` makes them for a table, `selection` turns scores into subsets.

Unless a docstring says otherwise a high score means a hard example; PVI is the other way round.

Anand, Tan and Minakova, 2023, "Influence Scores at Scale for Efficient Language Data Sampling",
arXiv:2311.16298.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, softmax

from scoredraw.errors import InputError, require

Array = NDArray[np.float64]
Spread = Literal["std", "var", "eq3"]

_BLOCK_ELEMENTS = 1 << 20  # gradients become float64 this many at a time, not a checkpoint at once


# ── Variance of gradients ────────────────────────────────────────────────────────────────────────


def variance_of_gradients(
    gradients: ArrayLike | Iterable[ArrayLike],
    *,
    spread: Spread = "std",
    mask: ArrayLike | None = None,
) -> Array:
    r"""Score examples by how much the gradient at the input moves during training (VoG).

    With :math:`G_i^{(c)}` the gradient of the true label's pre-softmax logit of example i with
    respect to the embedding output (or the pixels, averaged over channels) at checkpoint c of K,
    the score is the mean over the elements of G of a spread over checkpoints:

    - ``"std"``: :math:`\sqrt{\frac1K\sum_c (G^{(c)}-\mu)^2}`, what the code published with VoG
      computes and what its score files hold;
    - ``"var"``: the same without the root (Algorithm 1 of arXiv:2311.16298);
    - ``"eq3"``: :math:`\frac1{\sqrt K}\sum_c (G^{(c)}-\mu)^2=\sqrt K\,\mathrm{var}`, the equation
      as both papers print it.

    ``"var"`` and ``"eq3"`` rank alike. ``"std"`` ranks differently, because the mean over
    elements is taken after the root. One script published with VoG differentiates the
    probability in place of the logit; both papers mean the logit, and what G is, is the caller's
    choice. The papers average over padding too, so that short texts score low; give `mask` to
    average over real tokens alone.

    Parameters
    ----------
    gradients : (K, n, ...) array, or an iterable of K arrays (n, ...) in one example order
        An iterable is consumed one checkpoint at a time (Welford's update).
    spread : one of the three conventions above.
    mask : (n, L) or any leading part of an example's shape; non-zero elements are averaged.

    Returns
    -------
    (n,) float64, non-negative: the unit of the gradient for ``"std"``, squared otherwise.

    Raises
    ------
    InputError
        fewer than two checkpoints, shapes that differ between checkpoints, a NaN or an infinity
        (the rows are named), a mask that keeps nothing of a row.

    Time O(K n m) and memory O(n m) for m elements an example; an iterator is never held whole.

    Agarwal, D'souza and Hooker, 2022, "Estimating Example Difficulty using Variance of
    Gradients", arXiv:2008.11600; Anand et al., 2023, arXiv:2311.16298.

    >>> moving, still = [[1.0, -1.0], [3.0, -1.0]], [[2.0, 2.0], [2.0, 2.0]]
    >>> variance_of_gradients(np.stack([moving, still], axis=1)).tolist()
    [0.5, 0.0]
    """
    running = GradientSpread()
    for gradient in checkpoints(gradients):
        running.update(gradient)
    return running.score(spread, mask)


class GradientSpread:
    """`variance_of_gradients` while training runs: update it at each checkpoint, then score.

    Welford's running mean and sum of squared deviations, so nothing but those two arrays of an
    example's gradient is kept. `first_row` is what error messages count the examples from.

    >>> running = GradientSpread()
    >>> for gradient in ([[1.0, 0.0]], [[3.0, 0.0]]):
    ...     running.update(gradient)
    >>> running.score("var").tolist()
    [0.5]
    """

    def __init__(self, first_row: int = 0) -> None:
        self.count = 0
        self._first_row = first_row
        self._mean = self._square = np.empty(0)

    def update(self, gradient: ArrayLike) -> None:
        """Add one checkpoint's gradients, (n, ...); InputError on another shape or a NaN."""
        given = to_numpy(gradient)
        if self.count == 0:
            require(given.ndim >= 1, "gradients", "numbers", "arrays (n, ...), one a checkpoint")
            self._mean, self._square = np.zeros(given.shape), np.zeros(given.shape)
        shape = self._mean.shape
        came = f"shape {given.shape} at checkpoint {self.count}"
        require(given.shape == shape, "gradients", came, f"{shape} as at the first")
        self.count += 1
        rows = max(1, _BLOCK_ELEMENTS // max(1, given[:1].size))
        for start in range(0, len(given), rows):
            self._fold(given, slice(start, min(start + rows, len(given))))

    def _fold(self, gradient: NDArray[Any], block: slice) -> None:
        new = gradient[block].astype(np.float64)
        if not np.isfinite(new).all():
            bad = np.flatnonzero(~np.isfinite(new).reshape(len(new), -1).all(axis=1))
            where = f"checkpoint {self.count - 1}, {name_rows(self._first_row + block.start + bad)}"
            raise InputError(f"gradients: got NaN or infinity at {where}, want finite numbers")
        delta = new - self._mean[block]
        self._mean[block] += delta / self.count
        self._square[block] += delta * (new - self._mean[block])

    def score(self, spread: Spread = "std", mask: ArrayLike | None = None) -> Array:
        """The scores of `variance_of_gradients` over the checkpoints so far, (n,)."""
        require(spread in ("std", "var", "eq3"), "spread", repr(spread), "'std', 'var' or 'eq3'")
        require(self.count >= 2, "gradients", f"{self.count} checkpoints", "at least 2")
        variance = self._square / self.count
        elements = np.sqrt(variance, out=variance) if spread == "std" else variance
        score = _mean_over_elements(elements, mask)
        return score * np.sqrt(self.count) if spread == "eq3" else score


def checkpoints(gradients: Any) -> Iterator[NDArray[Any]]:
    """One array a checkpoint, whatever was given."""
    iterable = gradients if hasattr(gradients, "__iter__") else ()
    for gradient in iterable:
        array = to_numpy(gradient)
        require(array.dtype.kind in "fiub", "gradients", f"dtype {array.dtype}", "real numbers")
        yield array


def _mean_over_elements(values: Array, mask: ArrayLike | None) -> Array:
    n = values.shape[0]
    if mask is None:
        return np.asarray(values.reshape(n, -1).mean(axis=1))
    keep = to_numpy(mask).astype(bool)
    require(
        keep.ndim >= 2 and keep.shape == values.shape[: keep.ndim],
        "mask",
        f"shape {keep.shape}",
        f"a leading part of {values.shape} with at least two axes",
    )
    counted = keep.reshape(n, -1).sum(axis=1)
    empty = np.flatnonzero(counted == 0)
    require(empty.size == 0, "mask", f"nothing kept in {name_rows(empty)}", "one element a row")
    per_kept = values.reshape(*keep.shape, -1).mean(axis=-1)
    return np.asarray(np.where(keep, per_kept, 0.0).reshape(n, -1).sum(axis=1) / counted)


# ── Early loss: EL2N ─────────────────────────────────────────────────────────────────────────────


def el2n(
    logits: ArrayLike, labels: ArrayLike, *, of: Literal["logits", "probabilities"] = "logits"
) -> Array:
    r"""Length of the prediction error vector, averaged over runs (EL2N).

    :math:`\mathrm{EL2N}_i=\lVert \mathrm{softmax}\,f(x_i)-\mathrm{onehot}(y_i)\rVert_2` lies in
    :math:`[0,\sqrt2]` and equals the length of the loss gradient at the logits. Take the logits
    early (epoch 2 for BERT): late in training the scores of all learned examples collapse to
    zero and many more runs are needed. About ten runs.

    Parameters
    ----------
    logits : (..., n, C); every leading axis (runs, epochs) is averaged over.
    labels : (n,) integers below C.
    of : ``"probabilities"`` where the rows of `logits` already sum to one.

    Returns
    -------
    (n,) float64.

    Raises
    ------
    InputError
        one column (use two for a binary model), labels out of range, NaN or infinity.

    Time and memory O(runs n C).

    Paul, Ganguli and Dziugaite, 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> el2n([[100.0, 0.0], [100.0, 0.0], [0.0, 0.0]], [0, 1, 0]).round(4).tolist()
    [0.0, 1.4142, 0.7071]
    """
    length = np.linalg.norm(prediction_errors(logits, labels, of=of), axis=-1)
    return mean_over_runs(length)


def prediction_errors(
    logits: ArrayLike, labels: ArrayLike, *, of: Literal["logits", "probabilities"] = "logits"
) -> Array:
    r"""Probabilities minus one-hot labels, the gradient of cross-entropy at the logits.

    :math:`r_i=\mathrm{softmax}(f(x_i))-\mathrm{onehot}(y_i)`, shape (..., n, C) as `logits`.
    The same input rules as `el2n`. Time and memory O(size of `logits`).

    >>> prediction_errors([[0.0, 0.0]], [1]).tolist()
    [[0.5, -0.5]]
    """
    require(of in ("logits", "probabilities"), "of", repr(of), "'logits' or 'probabilities'")
    values = to_numpy(logits).astype(np.float64)
    require(
        values.ndim >= 2 and values.shape[-1] >= 2,
        "logits",
        f"shape {values.shape}",
        "(..., n, C) with two columns or more",
    )
    n, classes = values.shape[-2:]
    require_finite("logits", np.moveaxis(values, -2, 0))
    index = class_index(labels, n, classes)
    if of == "probabilities":
        near_one = np.abs(values.sum(axis=-1) - 1.0) < 1e-3
        require(
            bool((values >= 0).all() and near_one.all()),
            "logits",
            "rows that are no distribution",
            "non-negative rows that sum to 1, as of='probabilities' says",
        )
        errors: Array = values
    else:
        errors = softmax(values, axis=-1)
    errors[..., np.arange(n), index] -= 1.0
    return errors


# ── Forgetting ───────────────────────────────────────────────────────────────────────────────────


def forgetting(
    correct: ArrayLike, *, never_learned: Literal["count", "max"] = "count"
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    r"""Count how often an example was right and then wrong at the next look.

    :math:`\#\{t: c_t=1,\ c_{t+1}=0\}`, at most :math:`\lfloor T/2\rfloor`. An example that was
    never right is never forgotten by this count, though it is the hardest there is. Released
    code (DeepCore) starts from "was wrong" and leaves such examples at 0, in the class
    "unforgettable"; Toneva et al. rank them above everything. So a mask is returned beside the
    counts, and ``never_learned="max"`` gives them :math:`\lfloor T/2\rfloor+1`.

    Look at the whole training set every so many steps (50, over the first two epochs, the mean
    of three seeds in arXiv:2311.16298): looking only when an example is in the batch leaves far
    more zeros.

    Parameters
    ----------
    correct : (T, n) of 0 and 1, T looks in order of time.

    Returns
    -------
    counts : (n,) int64; never_learned : (n,) bool. Raises InputError on fewer than two looks or
    values that are neither 0 nor 1. Time and memory O(T n).

    Toneva, Sordoni, des Combes, Trischler, Bengio and Gordon, 2019, "An Empirical Study of
    Example Forgetting during Deep Neural Network Learning", arXiv:1812.05159.

    >>> counts, never = forgetting([[1, 0], [0, 0], [1, 0], [0, 0]], never_learned="max")
    >>> counts.tolist(), never.tolist()
    ([2, 3], [False, True])
    """
    require(
        never_learned in ("count", "max"), "never_learned", repr(never_learned), "'count' or 'max'"
    )
    looks = to_numpy(correct)
    require(
        looks.ndim == 2 and looks.shape[0] >= 2,
        "correct",
        f"shape {looks.shape}",
        "(T, n) with two looks or more",
    )
    right = looks == 1
    require(bool((right | (looks == 0)).all()), "correct", "other values", "only 0 and 1")
    counts = (right[:-1] & ~right[1:]).sum(axis=0).astype(np.int64)
    never = ~right.any(axis=0)
    if never_learned == "max":
        counts[never] = looks.shape[0] // 2 + 1
    return counts, never


# ── Pointwise usable information ─────────────────────────────────────────────────────────────────


def pvi(
    log_p: ArrayLike,
    log_p_null: ArrayLike,
    *,
    of: Literal["log", "probabilities"] = "log",
    eps: float = 1e-12,
) -> Array:
    r"""Bits about the label that a model gets from the input (pointwise V-information).

    :math:`\mathrm{PVI}(x\to y)=-\log_2 g[\varnothing](y)+\log_2 g'[x](y)`: the null model g was
    trained on empty inputs, g' on the inputs, both as long. High is easy, negative means the
    input misleads (often a wrong label). The best null model is the class prior. Averaged over
    examples it is the gain in log2-likelihood. Two epochs and ten seeds in arXiv:2311.16298.

    Parameters
    ----------
    log_p : (..., n) natural logarithms of the probability of each true label; leading axes
        (seeds) are averaged over.
    log_p_null : the same of the null model, any shape that broadcasts to `log_p`.
    of : ``"probabilities"`` where both hold probabilities.
    eps : smaller probabilities are raised to it, with a warning.

    Returns
    -------
    (n,) float64, bits. Raises InputError on values above one (log: zero) or NaN. Time O(size).

    Ethayarajh, Choi and Swayamdipta, 2022, "Understanding Dataset Difficulty with V-Usable
    Information", arXiv:2110.08420.

    >>> pvi([1.0, 0.25, 0.5], 0.5, of="probabilities").tolist()
    [1.0, -1.0, 0.0]
    """
    require(of in ("log", "probabilities"), "of", repr(of), "'log' or 'probabilities'")
    require(0.0 < eps < 1.0, "eps", eps, "a number between 0 and 1")
    with_input = _log_probabilities("log_p", log_p, of, eps)
    without = _log_probabilities("log_p_null", log_p_null, of, eps)
    require(with_input.ndim >= 1, "log_p", "one number", "(..., n)")
    try:
        without = np.broadcast_to(without, with_input.shape)
    except ValueError:
        raise InputError(
            f"log_p_null: got shape {without.shape}, want one that fits {with_input.shape}"
        ) from None
    return mean_over_runs((with_input - without) / np.log(2.0))


def label_log_probabilities(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Natural logarithm of each true label's softmax probability, (..., n), for `pvi`.

    The same input rules as `el2n`; computed without leaving log-space. Time O(size).

    >>> label_log_probabilities([[0.0, 0.0]], [1]).round(4).tolist()
    [-0.6931]
    """
    values = to_numpy(logits).astype(np.float64)
    require(
        values.ndim >= 2 and values.shape[-1] >= 2,
        "logits",
        f"shape {values.shape}",
        "(..., n, C) with two columns or more",
    )
    n, classes = values.shape[-2:]
    require_finite("logits", np.moveaxis(values, -2, 0))
    index = class_index(labels, n, classes)
    return np.asarray(values[..., np.arange(n), index] - logsumexp(values, axis=-1))


def _log_probabilities(name: str, values: ArrayLike, of: str, eps: float) -> Array:
    given = to_numpy(values).astype(np.float64)
    if of == "log":
        # -inf is a probability of zero: allowed, and clipped below
        good = bool((given <= 1e-9).all())
        require(good, name, "NaN or positive log-probabilities", "logarithms of numbers in [0, 1]")
        floor, logs = np.log(eps), np.minimum(given, 0.0)
    else:
        good = bool(((given >= 0) & (given <= 1 + 1e-9)).all())
        require(good, name, "values outside [0, 1]", "probabilities")
        floor = np.log(eps)
        logs = np.log(np.clip(given, np.finfo(np.float64).tiny, 1.0))
    low = int((logs < floor).sum())
    if low:
        message = f"{name}: {low} probabilities below eps={eps:g} were raised to it"
        warnings.warn(message, UserWarning, stacklevel=3)
    return np.asarray(np.maximum(logs, floor))


# ── Normalisation ────────────────────────────────────────────────────────────────────────────────


def normalize_scores(
    scores: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    by: Literal["class", "dataset"] = "class",
) -> Array:
    r"""Standardise scores within each class, or over the whole set.

    :math:`(v-\mu)/\sigma` with population mean and standard deviation; where σ is 0 the result
    is 0. Gradients of different labels have different scales (for a linear model VoG is a
    function of the label alone), so a cut on scores normalised over the data set empties some
    classes; normalising by class is what makes VoG usable.

    Parameters
    ----------
    scores : (n,) finite. labels : (n,) of any kind, needed for ``by="class"``.

    Returns
    -------
    (n,) float64. Warns of classes with one example (they get 0). Raises InputError on missing
    labels or lengths that differ. Time O(n log n).

    Agarwal et al., 2022, arXiv:2008.11600; Anand et al., 2023, arXiv:2311.16298.

    >>> normalize_scores([1.0, 3.0, 10.0, 30.0], ["a", "a", "b", "b"]).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    require(by in ("class", "dataset"), "by", repr(by), "'class' or 'dataset'")
    values = to_numpy(scores).astype(np.float64)
    require(values.ndim == 1, "scores", f"shape {values.shape}", "(n,)")
    require_finite("scores", values)
    n = len(values)
    if by == "dataset":
        group = np.zeros(n, dtype=np.int64)
    else:
        require(labels is not None, "labels", None, "(n,) labels for by='class'")
        given = to_numpy(labels)
        require(given.shape == (n,), "labels", f"shape {given.shape}", f"({n},)")
        group = np.unique(given, return_inverse=True)[1].reshape(n)
    if n == 0:
        return values
    size = np.bincount(group)
    if by == "class" and (size == 1).any():
        message = f"labels: {int((size == 1).sum())} classes have one example, scored 0"
        warnings.warn(message, UserWarning, stacklevel=2)
    centred = values - (np.bincount(group, values) / size)[group]
    deviation = np.sqrt(np.bincount(group, centred**2) / size)
    low, high = np.full(len(size), np.inf), np.full(len(size), -np.inf)
    np.minimum.at(low, group, values)
    np.maximum.at(high, group, values)
    flat = (low == high) | (deviation == 0)  # equal values may leave a rounding error in σ
    divisor = np.where(flat, 1.0, deviation)
    return np.where(flat[group], 0.0, centred / divisor[group])


# ── What comes in ────────────────────────────────────────────────────────────────────────────────


def class_index(labels: ArrayLike, n: int, classes: int) -> NDArray[np.int64]:
    """Labels as integers in [0, classes), or an error that names the first bad row.

    >>> class_index([0, 2], 2, 3).tolist()
    [0, 2]
    """
    given = to_numpy(labels)
    require(given.shape == (n,), "labels", f"shape {given.shape}", f"({n},)")
    whole = given.dtype.kind in "iub" or (
        given.dtype.kind == "f" and bool((given == np.floor(given)).all())
    )
    require(whole, "labels", f"{given.dtype} values", "whole numbers, one class a row")
    index = given.astype(np.int64)
    bad = np.flatnonzero((index < 0) | (index >= classes))
    if bad.size:
        came = f"{index[bad[0]]} in {name_rows(bad)}"
        raise InputError(f"labels: got {came}, want 0 to {classes - 1}")
    return index


def to_numpy(values: Any) -> NDArray[Any]:
    """Any array-like; torch tensors of any device and half precision come along."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


def require_finite(name: str, values: NDArray[Any]) -> None:
    """The first axis is the rows to name."""
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        raise InputError(f"{name}: got NaN or infinity in {name_rows(bad)}, want finite numbers")


def name_rows(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(str(int(row)) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"example{'s' if len(rows) > 1 else ''} {shown}{more}"


def mean_over_runs(values: Array) -> Array:
    """Average every axis but the last."""
    return np.asarray(values.reshape(-1, values.shape[-1]).mean(axis=0))
