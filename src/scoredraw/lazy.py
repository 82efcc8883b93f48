"""Names of a package that are imported when first used, so that importing it is instant."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(
    package: str, places: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose public names lie in submodules.

    places: module -> names, separated by spaces; a name is looked up as `package.module:name`.
    A module whose names are empty is itself the export (PEP 562).

    >>> find, listing, names = exports("scoredraw", {"errors": "InputError require", "draws": ""})
    >>> find("InputError").__name__, find("draws").__name__, names
    ('InputError', 'scoredraw.draws', ['InputError', 'draws', 'require'])
    """
    where = {name: module for module, names in places.items() for name in names.split()}
    names = sorted([*where, *(module for module, text in places.items() if not text)])

    def __getattr__(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, lambda: names, names
