"""Score, then draw: published methods of scoring, sampling and selection as one library.

    import scoredraw as sd

    scores = sd.score("rows", A, method="leverage")             # one number a row
    draw = sd.draw("rows", A, method="leverage", size="1%")     # rows, with weights
    table = sd.compare(X, y)                                    # what is worth it on my data
    table = sd.compare_answers("samples.jsonl")                 # which sampled answer to submit
    sd.methods("rows"); sd.cite(draw)                           # what there is, and whose it is

Every method is also a plain function of its room: `sd.coresets.lewis_weights(A, p=1)`,
`sd.data_selection.variance_of_gradients(...)`, `sd.sampling.poisson(scores, 100)`.
"""

from __future__ import annotations

from typing import Any

from scoredraw.lazy import exports

_find, __dir__, __all__ = exports(
    __name__,
    {
        "verbs": "score draw",
        "registry": "methods cite",
        "draws": "Draw",
        "execution": "Engine",
        "errors": "InputError",
        "reports": "run_paper",
        "tables": "open_table",
        "coresets": "",
        "data_selection": "",
        "diffusion": "",
        "language": "",
        "rl": "",
        "datasets": "",
        "metrics": "",
        "sampling": "",
    },
)


def __getattr__(name: str) -> Any:
    if name == "compare":
        from scoredraw.bakeoff.rows import compare_rows

        return compare_rows
    if name == "compare_answers":
        from scoredraw.bakeoff.answers import compare_answers

        return compare_answers
    if name == "__version__":
        from importlib.metadata import version

        return version("scoredraw")
    return _find(name)


__all__ += ["compare", "compare_answers"]
