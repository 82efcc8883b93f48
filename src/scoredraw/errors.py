"""Errors a user meets: one line that names the argument, what came and what was wanted.

Everything that a person can get wrong raises `InputError`, a `ValueError`, before any work is
done; the command line prints its message and leaves with exit code 2.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class InputError(ValueError):
    """An argument, a file or a value in it is not usable; the message is one line."""


class StoppedError(RuntimeError):
    """Long work could not go on (a server is gone, a judge talks nonsense); what was done is kept.

    The message is one line; the command line prints it and leaves with exit code 1.
    """


class InterruptedWorkError(Exception):
    """Somebody stopped long work; the message is one line that says what was kept.

    The command line prints it and leaves with exit code 130, as for a Ctrl-C without a message.
    """


class MissingExtraError(ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""


def require(ok: bool, argument: str, came: Any, wanted: str) -> None:
    """Raise an `InputError` that names `argument` unless `ok`.

    >>> require(False, "size", 0, "a positive count")
    Traceback (most recent call last):
    scoredraw.errors.InputError: size: got 0, want a positive count
    """
    if not ok:
        raise InputError(f"{argument}: got {came}, want {wanted}")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    >>> import_extra("a_module_nobody_has", "torch")
    Traceback (most recent call last):
    scoredraw.errors.MissingExtraError: a_module_nobody_has is not installed: pip install 'scoredraw[torch]'
    """  # noqa: E501
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        hint = f"{module} is not installed: pip install 'scoredraw[{extra}]'"
        raise MissingExtraError(hint) from None
