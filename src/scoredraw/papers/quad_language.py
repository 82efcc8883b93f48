"""A small language model of Python's documentation: does influence foretell what training does?

Part of paper 40's experiment. A Llama of 0.2 million weights learns the docstrings of the standard
library, byte by byte. One module's docstrings are the reference. Every other module with enough
text is a group: the model is trained on it for a few steps, from the same checkpoint, and the fall
of the reference loss is what the group was worth. The groups' mean influence, at attention and
MLP layers, at either alone, and without curvature, is compared with that by rank.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.metrics import mean_interval, paired_difference
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series

Float = NDArray[np.float64]

LENGTH, BATCH, GROUP = 128, 16, 16  # bytes a chunk, chunks a batch, chunks of a group
REFERENCE = "statistics"
REFERENCE_CHUNKS = 64
TUNING_STEPS, TUNING_RATE = 2, 3e-4
LAYERS = {
    "attention and MLP": ("self_attn", "mlp"),
    "MLP only": ("mlp",),
    "attention only": ("self_attn",),
}
PLAIN = "no curvature, attention and MLP"


@dataclass(frozen=True)
class Plan:
    """Models trained from scratch, the steps of each, the modules compared."""

    seeds: int
    steps: int
    groups: int = 40
    factor_chunks: int = 320


def add_to(report: Report, plan: Plan, rng: int) -> None:
    """Train, measure, and add claims, a table and a figure to the report."""
    modules = docstrings()
    found: dict[str, list[float]] = {}
    shown: tuple[Float, Float] | None = None
    for number in range(plan.seeds):
        seed = int(np.random.SeedSequence([rng, 40, number]).generate_state(1)[0] % 2**31)
        predicted, real = trial(modules, plan, seed)
        for name, values in predicted.items():
            found.setdefault(name, []).append(rank_correlation(values, real))
        shown = shown or (predicted["attention and MLP"], real)
    assert shown is not None
    everything, mlp = np.array(found["attention and MLP"]), np.array(found["MLP only"])
    report.claims.extend(
        [
            Claim.at_least(
                "documentation: influence at attention and MLP is no worse than at MLP alone",
                "attention and MLP layers together give more accurate influence",
                paired_difference(everything, mlp),
                0.0,
                "difference of rank correlations with the real fall of the loss, at least 0",
            ),
            Claim.at_least(
                "documentation: influence foretells what training on a module is worth",
                "influence estimates the change of the reference loss",
                mean_interval(everything),
                0.3,
                "rank correlation at least .3",
            ),
        ]
    )
    rows: list[list[Cell]] = [[name, mean_interval(values)] for name, values in found.items()]
    title = f"Influence on the docstrings of `{REFERENCE}` and the real fall of its loss"
    note = f"{plan.groups} modules of {GROUP} chunks; {plan.seeds} models; Adam for {TUNING_STEPS} "
    note += "steps from one checkpoint. EK-FAC but for the last line."
    report.tables.append(ReportTable(title, ["layers", "rank correlation"], rows, note))
    points = Series("modules", list(shown[0]), list(shown[1]))
    x_label, y_label = "mean influence of a module (EK-FAC)", "fall of the reference loss"
    report.figures.append(Figure("scatter", title, x_label, y_label, [points]))


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────


def docstrings() -> dict[str, NDArray[np.int64]]:
    """Module -> its docstrings in chunks of bytes, (k, LENGTH), of the standard library."""
    found = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = "\n".join(texts(path))
        data = np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8).astype(np.int64)
        chunks = len(data) // LENGTH
        if chunks >= 4:
            found[path.stem] = data[: chunks * LENGTH].reshape(chunks, LENGTH)
    return found


def texts(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text:
                yield text


# ── One model ────────────────────────────────────────────────────────────────────────────────────


def trial(
    modules: dict[str, NDArray[np.int64]], plan: Plan, seed: int
) -> tuple[dict[str, Float], Float]:
    """Mean influence of every group by kind of layers, and what the groups were really worth."""
    import torch

    random = np.random.default_rng(seed)
    large = [name for name, chunks in modules.items() if len(chunks) >= GROUP and name != REFERENCE]
    names = [large[i] for i in np.sort(random.permutation(len(large))[: plan.groups])]
    groups = [modules[name][random.permutation(len(modules[name]))[:GROUP]] for name in names]
    pool = np.concatenate([chunks for name, chunks in modules.items() if name != REFERENCE])
    model = trained(torch.as_tensor(pool), plan.steps, seed)
    reference = torch.as_tensor(modules[REFERENCE][:REFERENCE_CHUNKS])
    factor_rows = torch.as_tensor(pool[random.permutation(len(pool))[: plan.factor_chunks]])
    members = torch.as_tensor(np.stack(groups))
    predicted = influences(model, factor_rows, reference, members)
    before = mean_loss(model, reference)
    worth = [before - mean_loss(tuned(model, group), reference) for group in members]
    return predicted, np.array(worth)


def trained(pool: Any, steps: int, seed: int) -> Any:
    """A Llama of two layers after `steps` batches."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        rows = torch.randint(len(pool), (BATCH,))
        train_step(model, optimiser, pool[rows])
        schedule.step()
    return model.eval()


def train_step(model: Any, optimiser: Any, chunks: Any) -> None:
    optimiser.zero_grad()
    model(input_ids=chunks, labels=chunks).loss.backward()
    optimiser.step()


def tuned(model: Any, group: Any) -> Any:
    """A copy of the model after a few steps on one group."""
    import torch

    copy = deepcopy(model)
    optimiser = torch.optim.Adam(copy.parameters(), lr=TUNING_RATE)
    for _ in range(TUNING_STEPS):
        train_step(copy, optimiser, group)
    return copy


def mean_loss(model: Any, chunks: Any) -> float:
    import torch

    with torch.no_grad():
        losses = [model(input_ids=c, labels=c).loss.item() * len(c) for c in chunks.split(64)]
    return sum(losses) / len(chunks)


def influences(model: Any, factor_rows: Any, reference: Any, groups: Any) -> dict[str, Float]:
    """Mean influence of the groups (g, GROUP, LENGTH) at each choice of layers, (g,) each."""
    from scoredraw.data_selection.gradient_influence import linear_influence, mean_gradient
    from scoredraw.data_selection.kronecker import KFACFactors
    from scoredraw.data_selection.linear_traces import TraceReader, next_token_labels

    def batches(chunks: Any) -> list[Any]:
        return [
            {"input_ids": part, "attention_mask": (part >= 0).long(),
             "labels": next_token_labels(part)}
            for part in chunks.split(BATCH)
        ]  # fmt: skip

    names = [
        f"model.layers.{i}.{part}"
        for i in range(model.config.num_hidden_layers)
        for part in LAYERS["attention and MLP"]
    ]
    factors = KFACFactors.fit(model, batches(factor_rows), layers=names)
    reader = TraceReader(model, names)
    gradient = mean_gradient(reader, batches(reference))
    found = {}
    preconditioned = factors.ihvp(gradient, damping_for(factors))
    for kind, parts in [*LAYERS.items(), (PLAIN, LAYERS["attention and MLP"])]:
        chosen = gradient if kind == PLAIN else preconditioned
        zeroed = {k: v * any(part in k for part in parts) for k, v in chosen.items()}
        values = linear_influence(reader, batches(groups.flatten(0, 1)), zeroed)
        found[kind] = values.reshape(len(groups), -1).mean(axis=1)
    return found


def damping_for(factors: Any) -> float:
    """A tenth of the mean eigenvalue, over all layers: the usual choice where units are unknown."""
    total = sum(float(layer.Lambda.sum()) for layer in factors.layers.values())
    count = sum(layer.Lambda.numel() for layer in factors.layers.values())
    return 0.1 * total / count


def rank_correlation(a: Float, b: Float) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b)[0])
