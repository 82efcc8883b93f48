"""Rows of a matrix: leverage, Lewis weights, lp sensitivities, and samples that keep ‖Ax‖_p.

The functions are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "leverage": ("leverage_scores", "ridge_leverage_scores", "whitening"),
    "sketching": ("countsketch", "sketched_leverage"),
    "lewis": ("lewis_weights",),
    "sensitivities": ("approximate_sensitivities", "lp_sensitivities", "total_sensitivity"),
    "combined": (
        "leverage_bounds",
        "lewis_bounds",
        "root_leverage",
        "root_leverage_scores",
        "sample_size",
        "sensitivity_plus_leverage",
        "sensitivity_upper_bounds",
        "split_copies",
        "split_rows",
        "split_scores",
        "total_bounds",
    ),
    "streaming": ("ChunkBlocks", "MergeReduce", "score_stream"),
    "distortion": ("embedding_distortion", "embedding_distortions"),
    "estimator": ("LpRowSampler",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
