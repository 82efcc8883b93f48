"""The docstrings of installed packages: real English prose of several kinds, in every environment.

Read from source files with `ast`; nothing is imported. Which texts come depends on the versions
that are installed, their order does not depend on anything else.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("python", "numpy", "scipy", "sklearn", "pandas", "torch")
NOT_READ = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "__pycache__"}
LEAST_WORDS = 20


class TextPool(NamedTuple):
    """texts: n. labels: int64 (n,), which index `names`."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]


def docstring_pool(per_package: int) -> TextPool:
    """At most `per_package` docstrings of 20 words or more from each package that is installed.

    Taken evenly over a package's files in the order of their names; a text that stands in several
    places comes once.
    """
    texts: dict[str, int] = {}
    names = [name for name in PACKAGES if folder(name) is not None]
    for label, name in enumerate(names):
        for text in docstrings(name, per_package):
            texts.setdefault(text, label)
    return TextPool(tuple(texts), np.array(list(texts.values()), np.int64), tuple(names))


def folder(package: str) -> Path | None:
    """Where the package's source lies; "python" is the standard library."""
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else None


def docstrings(package: str, at_most: int) -> list[str]:
    """The package's docstrings, from evenly spaced files, as many as are needed."""
    root = folder(package)
    files = source_files(root) if root is not None else []
    step = max(1, round(len(files) / max(1, at_most // 4)))  # a file has several
    found: dict[str, None] = {}
    for start in range(step):
        for path in files[start::step]:
            found.update(dict.fromkeys(docstrings_of(path)))
            if len(found) >= at_most:
                return list(found)[:at_most]
    return list(found)


def source_files(root: Path) -> list[Path]:
    found = []
    for where, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_READ]
        found += [Path(where) / name for name in names if name.endswith(".py")]
    return sorted(found)


def docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text.split()) >= LEAST_WORDS:
                yield text
