"""Score, then draw: published methods of scoring, sampling and selection as one library.

    import scoredraw as sd

    scores = sd.score("rows", A, method="leverage")             # one number a row
    draw = sd.draw("rows", A, method="leverage", size="1%")     # rows, with weights
    table = sd.compare(X, target=y)                             # what is worth it on my data
    sd.methods("rows"); sd.papers(); sd.cite(draw)              # what there is, and whose it is

Every method is also a plain function of its room: `sd.coresets.lewis_weights(A, p=1)`,
`sd.data_selection.variance_of_gradients(...)`, `sd.sampling.poisson(scores, 100)`.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "score": "verbs:score",
    "draw": "verbs:draw",
    "compare": "bakeoff.rows:compare_rows",
    "methods": "registry:methods",
    "papers": "registry:papers",
    "search": "registry:search",
    "cite": "registry:cite",
    "Draw": "draws:Draw",
    "Engine": "execution:Engine",
    "InputError": "errors:InputError",
    "run_paper": "reports:run_paper",
    "load": "datasets:load",
    "open_table": "tables:open_table",
}
_MODULES = ("coresets", "data_selection", "datasets", "metrics", "registry", "sampling", "tables")

__all__ = ["coresets", "data_selection", "datasets", "metrics", "registry", "sampling", "tables"]
__all__ += [*_PLACES]


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used, so that `import scoredraw` is instant."""
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        value = getattr(importlib.import_module(f"scoredraw.{module}"), attribute)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"scoredraw.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("scoredraw")
    raise AttributeError(f"module 'scoredraw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
