"""What every sampler does with its state and with what a network answers, arrays or tensors.

A state keeps the kind, device and dtype it came in; where that is half precision, steps add up in
float32, and the network sees its own dtype.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.arrays import is_tensor
from scoredraw.errors import InputError, require

EpsFunction = Callable[[Any, float], Any]


def checked_start(x_T: Any, *, finite: bool = True) -> Any:
    """x_T as an array or tensor of a floating dtype, finite where asked, or an InputError."""
    x: Any = x_T if is_tensor(x_T) else np.asarray(x_T)
    floating = x.is_floating_point() if is_tensor(x) else np.issubdtype(x.dtype, np.floating)
    require(floating, "x_T", x.dtype, "a floating dtype")
    require(not finite or is_finite(x), "x_T", "NaN or infinity", "finite values")
    return x


def check_answer(
    answer: Any, x: Any, where: str, name: str = "eps_fn", *, finite: bool = True
) -> None:
    """InputError, saying where, unless a function's answer is an array like x, finite where asked.

    >>> check_answer(np.zeros(3), np.zeros((2, 3)), "at step 4")
    Traceback (most recent call last):
    scoredraw.errors.InputError: eps_fn: got shape (3,) at step 4, want the shape of x, (2, 3)
    """
    kind = f"a {type(answer).__name__} {where}"
    require(is_tensor(answer) == is_tensor(x), name, kind, f"a {type(x).__name__} like x")
    shape = tuple(getattr(answer, "shape", ()))
    wanted = f"the shape of x, {tuple(x.shape)}"
    require(shape == tuple(x.shape), name, f"shape {shape} {where}", wanted)
    if is_tensor(x):
        wanted = f"the device of x, {x.device}"
        require(answer.device == x.device, name, f"{answer.device} {where}", wanted)
    if finite and not is_finite(answer):
        raise InputError(f"{name}: got NaN or infinity {where}, want finite values")


def combine(x: Any, psi: float, weights: Sequence[float] | NDArray[Any], eps: Sequence[Any]) -> Any:
    """psi x + Σ_j weights[j] eps[j], in x's dtype; one new array, added to in place."""
    result = x * float(psi)
    for weight, value in zip(weights, eps, strict=False):
        if weight == 0:
            continue
        if is_tensor(x):
            result.add_(value, alpha=float(weight))
        else:
            result += np.multiply(value, float(weight), dtype=x.dtype, casting="same_kind")
    return result


def accumulator(x: Any) -> Any:
    """x in at least float32, in which steps add up."""
    if is_tensor(x):
        return x.float() if x.dtype.itemsize < 4 else x
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def cast(x: Any, dtype: Any) -> Any:
    """x in a dtype, itself where it has that."""
    if x.dtype == dtype:
        return x
    return x.to(dtype) if is_tensor(x) else x.astype(dtype)


def copied(x: Any) -> Any:
    """A copy."""
    return x.clone() if is_tensor(x) else x.copy()


def is_finite(x: Any) -> bool:
    """Whether all of x is finite: a finite sum says so with one cheap pass."""
    if is_tensor(x):
        torch = sys.modules["torch"]
        total = x.detach().sum(dtype=torch.float32 if x.dtype.itemsize < 4 else None)
        return math.isfinite(float(total)) or bool(torch.isfinite(x).all())
    with np.errstate(over="ignore", invalid="ignore"):
        total = x.sum(dtype=np.float32 if x.dtype.itemsize < 4 else None)
    return math.isfinite(float(total)) or bool(np.isfinite(x).all())
