"""Influence scores of table rows, from a small network trained on them for the purpose.

The scores of `influence` and `tracin` need the traces of a training run. Here the run is a probe:
a multilayer perceptron on standardised features, trained from several seeds (`probe_network`),
whose weights after each epoch give every trace in closed form. Several scores share the runs.

Sequential: one ordered process; the same inputs and `rng` give the same scores on one machine.
High means hard, except for PVI. Defaults follow Anand, Tan and Minakova, 2023, arXiv:2311.16298,
with three seeds in place of ten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from scoredraw.data_selection.influence import (
    Array,
    el2n,
    forgetting,
    label_log_probabilities,
    name_rows,
    normalize_scores,
    pvi,
    to_numpy,
    variance_of_gradients,
)
from scoredraw.data_selection.probe_network import (
    LEARNING_RATE,
    Index,
    ProbeKind,
    ProbeRun,
    train_probe,
)
from scoredraw.data_selection.tracin import grand, tracin_self
from scoredraw.errors import InputError, require
from scoredraw.uniforms import Rng, generator

Progress = Callable[[int, int], None]

EARLY_EPOCH = 2
METHODS = ("el2n", "forgetting", "grand", "pvi", "tracin", "vog")
EARLY = frozenset({"el2n", "grand", "pvi"})  # read at an early epoch, the others over the run
HIGH_IS_EASY = frozenset({"pvi"})


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def score_all(
    features: ArrayLike,
    labels: ArrayLike,
    methods: Sequence[str] = METHODS,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = 10,
    early: int = EARLY_EPOCH,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> dict[str, tuple[Array, float]]:
    """Several scores of the same rows from the same training runs.

    Parameters
    ----------
    features : (n, d) finite numbers. labels : (n,) classes of any kind.
    methods : names from `METHODS`: el2n, forgetting, grand, pvi, tracin, vog.
    probe : "mlp" (two hidden layers of 64) or "logistic" (none; VoG is refused).
    seeds : training runs, averaged over.
    epochs : length of the runs that VoG, TracIn and forgetting read.
    early : the epoch at whose end EL2N, GraNd and PVI are read.
    progress : called as (epochs done, epochs in all).

    Returns
    -------
    {method: ((n,) float64 scores, seconds)}; the seconds are what the method would have taken
    alone: its share of the training runs and its own arithmetic.

    Raises
    ------
    InputError
        NaN or infinite features, one class only, as many classes as rows, an unknown method,
        VoG of a logistic probe.

    Time O(seeds epochs n weights): 10,000 rows of 64 features take a few seconds. Memory O(n d).

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> scores = score_all(x, (x[:, 0] > 0).astype(int), ["el2n", "vog"], seeds=1)
    >>> {name: values.shape for name, (values, _) in scores.items()}
    {'el2n': (60,), 'vog': (60,)}
    """
    wanted = list(dict.fromkeys([methods] if isinstance(methods, str) else methods))
    _check_settings(wanted, probe, seeds, epochs, early)
    x, y = standardised_rows(features, labels)
    length = early if EARLY.issuperset(wanted) else epochs
    looks = "forgetting" in wanted
    total, done = seeds * length, 0

    def after_epoch() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    from threadpoolctl import threadpool_limits

    results = {}
    with threadpool_limits(1):  # these products are too small to share out
        runs = [
            train_probe(
                x,
                y,
                probe=probe,
                epochs=length,
                looks=looks,
                seed=int(seed),
                after_epoch=after_epoch,
            )
            for seed in generator(rng).integers(2**31, size=seeds)
        ]
        for name in wanted:
            started = time.perf_counter()
            scores = _SCORES[name](runs, x, y, early)
            own = time.perf_counter() - started
            shared = sum(run.seconds[(early if name in EARLY else epochs) - 1] for run in runs)
            shared += sum(run.look_seconds for run in runs) if name == "forgetting" else 0.0
            results[name] = (scores, shared + own)
    return results


def score_el2n(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = EARLY_EPOCH,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """EL2N of table rows, read early: after `epochs` epochs (`influence.el2n`), (n,) float64.

    Arguments, errors and cost as `score_all`. Paul et al., 2021, arXiv:2107.07075.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> bool((score_el2n(x, x[:, 0] > 0, seeds=1) < 2**0.5).all())
    True
    """
    return score_all(
        features,
        labels,
        ["el2n"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=epochs,
        rng=rng,
        progress=progress,
    )["el2n"][0]


def score_grand(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = EARLY_EPOCH,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """Length of each row's gradient over all weights, early (`tracin.grand`), (n,) float64.

    Arguments, errors and cost as `score_all`. Paul et al., 2021, arXiv:2107.07075.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> bool((score_grand(x, x[:, 0] > 0, seeds=1) > 0).all())
    True
    """
    return score_all(
        features,
        labels,
        ["grand"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=epochs,
        rng=rng,
        progress=progress,
    )["grand"][0]


def score_pvi(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = EARLY_EPOCH,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """Bits a row's features give about its label (`influence.pvi`), (n,) float64. High is easy.

    The null model is the one that training on empty inputs tends to: the class shares.
    Arguments, errors and cost as `score_all`. Ethayarajh et al., 2022, arXiv:2110.08420.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> bool(score_pvi(x, x[:, 0] > 0, seeds=1).max() <= 2)
    True
    """
    return score_all(
        features,
        labels,
        ["pvi"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=epochs,
        rng=rng,
        progress=progress,
    )["pvi"][0]


def score_forgetting(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = 10,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """How often a row is learned and lost again (`influence.forgetting`), (n,) float64.

    Four looks an epoch at all rows; those never right count as most forgotten; the mean over
    seeds. Arguments, errors and cost as `score_all`. Toneva et al., 2019, arXiv:1812.05159.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> bool((score_forgetting(x, x[:, 0] > 0, seeds=1) >= 0).all())
    True
    """
    return score_all(
        features,
        labels,
        ["forgetting"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=1,
        rng=rng,
        progress=progress,
    )["forgetting"][0]


def score_vog(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = 10,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """Variance of gradients of table rows, normalised by class, (n,) float64.

    `influence.variance_of_gradients` (spread "std") over ten evenly spaced checkpoints of a run,
    standardised within classes, averaged over runs. Arguments, errors and cost as `score_all`.
    Agarwal et al., 2022, arXiv:2008.11600.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> abs(float(score_vog(x, x[:, 0] > 0, seeds=1).mean())) < 1e-9
    True
    """
    return score_all(
        features,
        labels,
        ["vog"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=1,
        rng=rng,
        progress=progress,
    )["vog"][0]


def score_tracin(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    probe: ProbeKind = "mlp",
    seeds: int = 3,
    epochs: int = 10,
    rng: Rng = 0,
    progress: Progress | None = None,
) -> Array:
    """TracIn self-influence over ten checkpoints and all weights (`tracin.tracin_self`), (n,).

    Arguments, errors and cost as `score_all`. Pruthi et al., 2020, arXiv:2002.08484.

    >>> x = np.random.default_rng(0).normal(size=(60, 3))
    >>> bool((score_tracin(x, x[:, 0] > 0, seeds=1) > 0).all())
    True
    """
    return score_all(
        features,
        labels,
        ["tracin"],
        probe=probe,
        seeds=seeds,
        epochs=epochs,
        early=1,
        rng=rng,
        progress=progress,
    )["tracin"][0]


def _el2n(runs: list[ProbeRun], x: Array, y: Index, early: int) -> Array:
    return el2n(np.stack([run.checkpoints[early - 1].logits(x) for run in runs]), y)


def _grand(runs: list[ProbeRun], x: Array, y: Index, early: int) -> Array:
    squares = [run.checkpoints[early - 1].squared_gradient_norms(x, y) for run in runs]
    return grand(np.sqrt(squares))


def _pvi(runs: list[ProbeRun], x: Array, y: Index, early: int) -> Array:
    logits = np.stack([run.checkpoints[early - 1].logits(x) for run in runs])
    prior = np.log(np.bincount(y) / len(y))
    return pvi(label_log_probabilities(logits, y), prior[y])


def _forgetting(runs: list[ProbeRun], _x: Array, _y: Index, _early: int) -> Array:
    counts = [forgetting(run.correct, never_learned="max")[0] for run in runs]
    return np.asarray(np.mean(counts, axis=0))


def _vog(runs: list[ProbeRun], x: Array, y: Index, _early: int) -> Array:
    scores = []
    for run in runs:
        raw = variance_of_gradients(net.input_gradients(x, y) for net in run.evenly())
        scores.append(normalize_scores(raw, y))
    return np.asarray(np.mean(scores, axis=0))


def _tracin(runs: list[ProbeRun], x: Array, y: Index, _early: int) -> Array:
    lengths = ([net.squared_gradient_norms(x, y) for net in run.evenly()] for run in runs)
    return np.asarray(np.mean([tracin_self(k, LEARNING_RATE) for k in lengths], axis=0))


_SCORES: dict[str, Callable[[list[ProbeRun], Array, Index, int], Array]] = {
    "el2n": _el2n,
    "grand": _grand,
    "pvi": _pvi,
    "forgetting": _forgetting,
    "vog": _vog,
    "tracin": _tracin,
}


def _check_settings(methods: list[str], probe: str, seeds: int, epochs: int, early: int) -> None:
    require(probe in ("mlp", "logistic"), "probe", repr(probe), "'mlp' or 'logistic'")
    unknown = [name for name in methods if name not in METHODS]
    require(bool(methods), "methods", "none", f"some of {', '.join(METHODS)}")
    require(not unknown, "methods", ", ".join(unknown), f"some of {', '.join(METHODS)}")
    require(seeds >= 1, "seeds", seeds, "at least 1")
    require(epochs >= 1, "epochs", epochs, "at least 1")
    require(1 <= early <= epochs, "early", early, f"an epoch from 1 to {epochs}")
    if "vog" in methods:
        linear = "'logistic' for vog, whose input gradient depends on the label alone"
        require(probe == "mlp", "probe", linear, "'mlp'")
        require(epochs >= 2, "epochs", epochs, "at least 2 for vog, one checkpoint an epoch")


def standardised_rows(features: ArrayLike, labels: ArrayLike) -> tuple[Array, Index]:
    """Columns of mean 0 and deviation 1 (constant ones 0), labels as 0..C-1."""
    given = to_numpy(features)
    shape_ok = given.ndim == 2 and given.size > 0
    require(shape_ok, "features", f"shape {given.shape}", "(n, d), not empty")
    require(given.dtype.kind in "fiub", "features", f"{given.dtype} values", "numbers")
    bad = np.flatnonzero(~np.isfinite(given).all(axis=1))
    if bad.size:
        raise InputError(f"features: got NaN or infinity in {name_rows(bad)}, want finite numbers")
    classes, y = _classes(labels, len(given))
    few = f"{classes} classes in {len(given)} rows"
    require(classes >= 2, "labels", "one class", "two or more")
    require(classes < len(given), "labels", few, "class labels, fewer classes than rows")
    x = given.astype(np.float64)
    x -= x.mean(axis=0)
    deviation = x.std(axis=0)
    flat = deviation <= 1e-12 * np.abs(given).max(axis=0, initial=0.0)
    x /= np.where(flat, 1.0, deviation)
    x[:, flat] = 0.0
    return x, y


def _classes(labels: ArrayLike, n: int) -> tuple[int, Index]:
    given = to_numpy(labels)
    require(given.shape == (n,), "labels", f"shape {given.shape}", f"({n},), one a row")
    if given.dtype.kind == "f":
        whole = bool((np.isfinite(given) & (given == np.floor(given))).all())
        require(whole, "labels", "numbers that are no classes, or NaN", "whole numbers or names")
    try:
        names, index = np.unique(given, return_inverse=True)
    except TypeError:
        raise InputError("labels: got values of several kinds, want one kind of label") from None
    return len(names), np.asarray(index.reshape(n), dtype=np.int64)
