"""Add-One-In for a column of texts: a language model names what adds most to the set.

Li et al., "Add-One-In: Incremental sample selection for large language models via a choice-based
greedy paradigm", EMNLP 2025, arXiv 2503.02359.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from scoredraw.choosers import Chooser
from scoredraw.data_selection.add_one_in import LLMChooser, LogprobChooser
from scoredraw.draws import Draw
from scoredraw.errors import require
from scoredraw.model_servers import ServerModel
from scoredraw.set_selection import add_one_in
from scoredraw.small_models import load_model
from scoredraw.uniforms import Rng


def add_one_in_texts(
    texts: Sequence[str],
    *,
    size: int,
    model: str = "small",
    context_window: int = 10,
    candidate_window: int = 10,
    n_seed: int | None = None,
    n_orders: int = 1,
    max_chars: int = 500,
    max_retries: int = 5,
    log: str | Path | None = None,
    rng: Rng = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Draw:
    """Grow a set of texts to `size`, one choice of a language model at a time.

    texts: n strings; repeated ones are offered as often as they occur, empty ones as "(empty)".
    model: "small" or a folder, asked for the most probable letter in one forward pass
    (`LogprobChooser`); or ``URL#NAME``, the model of that name behind an OpenAI-compatible server
    (`LLMChooser`). n_seed: texts to start from, drawn uniformly, by default `context_window` but
    at most half of the size. n_orders: 2 shows each window in two orders, against the pull of a
    letter. max_chars: of one text. log: a file of every choice; the same call goes on from it.
    Others, errors and cost as `set_selection.add_one_in`: size - n_seed answers, whatever n.

    Returns a Draw of `size` rows in the order of choice, weights one. Sequential.

    Li et al., 2025, arXiv 2503.02359.
    """
    n = len(texts)
    require(n > 0, "texts", "none", "at least one")
    require(1 <= size <= n, "size", size, f"a count from 1 to {n}")
    seeds = min(context_window, size // 2) if n_seed is None else n_seed
    return add_one_in(
        list(texts), size, chooser_by_name(model, max_chars), context_window=context_window,
        candidate_window=candidate_window, n_seed=seeds, n_orders=n_orders,
        max_retries=max_retries, rng=rng, log=log, progress=progress,
    ).draw  # fmt: skip


def chooser_by_name(model: str, max_chars: int = 500) -> Chooser:
    """The chooser that `add_one_in_texts` means by a model's name."""
    url, hash_, name = model.partition("#")
    if url.startswith(("http://", "https://")):
        require(bool(hash_ and name), "model", repr(model), "URL#NAME, the model the server has")
        return LLMChooser(ServerModel(name, base_url=url).ask, max_chars=max_chars)
    return LogprobChooser(*load_model(model), max_chars=max_chars)
