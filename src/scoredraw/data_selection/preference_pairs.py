"""Preference data as text: tokens, hidden states and likelihoods of (prompt, chosen, rejected).

`score_preference_dataset` gives every pair of a data set the scores of `likelihood_displacement`,
`ches_pairs` does so for three lists of texts and a model's name. Pairs become tokens as TRL's
`DPOTrainer` makes them, and batches as its collator does (chosen rows first, then the rejected
ones), so that a score is that of the very tokens that will be trained on; `ches_of_batch` takes
the trainer's own batches. `DisplacementTracker` is the trainer's callback that measures what the
scores foretell: how far the likelihood of the chosen answers moved.

Razin et al., 2025, "Unintentional Unalignment: Likelihood Displacement in Direct Preference
Optimization", arXiv:2410.08847.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoredraw.data_selection.evaluation import evaluating, on_model_device
from scoredraw.data_selection.influence import Array
from scoredraw.data_selection.likelihood_displacement import (
    ches_score,
    edit_distance_score,
    last_hidden_similarity,
    shift_completion_mask,
)
from scoredraw.errors import require
from scoredraw.small_models import load_model

try:
    from transformers import TrainerCallback
except ImportError:  # scores do not need it
    TrainerCallback = object

Progress = Callable[[int, int], Any]
Measure = Literal["ches", "ln_ches", "edit", "last_hidden"]
Batch = Mapping[str, Tensor]

MEASURES = ("ches", "ln_ches", "edit", "last_hidden")
TEXTS = ("prompt", "chosen", "rejected")


# ── From text to tokens ──────────────────────────────────────────────────────────────────────────


def tokenize_pairs(
    tokenizer: Any, dataset: Any, *, include_eos: bool = True, max_length: int | None = None
) -> list[dict[str, Any]]:
    """Each pair as token ids, split where the prompt ends: what TRL's `DPOTrainer` trains on.

    The prompt is what the tokens of the prompt alone and of the prompt with either answer have in
    common, since a token may grow over the seam. Plain texts get the tokenizer's end-of-sequence
    token after each answer; conversations end as the chat template ends them.

    Parameters
    ----------
    dataset : n mappings (a list, a ``datasets.Dataset``) with "prompt", "chosen" and "rejected":
        three texts, or three lists of messages {"role", "content"}.
    include_eos : False leaves the end-of-sequence token, and what a template puts after it, out.
    max_length : of prompt and answer together, in tokens; the end is cut off.

    Returns
    -------
    n dictionaries: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `truncated`, whether an answer
    was cut. Raises InputError, naming the rows, on missing or mixed entries, an empty answer (also
    one that is empty once it is cut), a prompt without a token. Time O(text). Row-local.
    """
    eos = tokenizer.eos_token
    rows = [_texts(dataset[i], i, eos or "") for i in range(len(dataset))]
    require(bool(rows), "dataset", "no pair", "one or more")
    require(max_length is None or max_length > 1, "max_length", max_length, "2 or more")
    chat = [isinstance(row[0], list) for row in rows]
    require(all(chat) or not any(chat), "dataset", "texts and conversations", "one of the two")
    if chat[0]:
        encoded = _encoded_chats(tokenizer, rows)
    else:
        require(eos is not None or not include_eos, "tokenizer", "no eos_token", "one to append")
        ended = [(p, *(_end(y, eos, include_eos) for y in answers)) for p, *answers in rows]
        encoded = _encoded_texts(tokenizer, ended)
    pairs = []
    for i, (prompt, *answers) in enumerate(encoded):
        start = min(_common(prompt, answer) for answer in answers)
        require(start > 0, "prompt", f"no token in row {i}", "one that predicts the first")
        pair: dict[str, Any] = {"prompt_ids": prompt[:start], "truncated": False}
        for name, ids in zip(TEXTS[1:], answers, strict=True):
            if chat[0] and not include_eos:
                ids = _before_last(ids, tokenizer.eos_token_id, start)
            kept = ids[:max_length]
            require(len(kept) > start, name, f"an empty answer in row {i}", "a token or more")
            pair[f"{name}_ids"] = kept[start:]
            pair["truncated"] |= len(kept) < len(ids)
        pairs.append(pair)
    return pairs


def _texts(row: Any, i: int, eos: str) -> tuple[Any, Any, Any]:
    require(isinstance(row, Mapping), "dataset", f"{type(row).__name__} in row {i}", "a mapping")
    for name in TEXTS:
        require(name in row, "dataset", f"row {i} without {name!r}", f"{', '.join(TEXTS)}")
    kinds = {type(row[name]) for name in TEXTS}
    fine = kinds in ({str}, {list})
    came = ", ".join(sorted(kind.__name__ for kind in kinds))
    require(fine, "dataset", f"{came} in row {i}", "three texts or three lists of messages")
    for name in TEXTS[1:]:
        answer = row[name]
        text = answer if isinstance(answer, str) else "".join(str(m["content"]) for m in answer)
        require(text not in ("", eos), name, f"an empty answer in row {i}", "a text")
    return row["prompt"], row["chosen"], row["rejected"]


def _end(answer: str, eos: str | None, include_eos: bool) -> str:
    bare = answer.removesuffix(eos) if eos else answer
    return f"{bare}{eos}" if include_eos else bare


def _encoded_texts(tokenizer: Any, rows: list[Any]) -> Iterator[tuple[list[int], ...]]:
    prompts, chosen, rejected = zip(*rows, strict=True)
    full = (
        [p + y for p, y in zip(prompts, answers, strict=True)] for answers in (chosen, rejected)
    )
    return zip(*(tokenizer(list(t))["input_ids"] for t in (prompts, *full)), strict=True)


def _encoded_chats(tokenizer: Any, rows: list[Any]) -> Iterator[tuple[list[int], ...]]:
    template = getattr(tokenizer, "chat_template", None)
    require(template is not None, "tokenizer", "no chat template", "one, for conversations")

    def encode(conversations: list[Any], begins: bool) -> Any:
        made = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=begins, tokenize=True, return_dict=True
        )
        return made["input_ids"]

    prompts = encode([prompt for prompt, _, _ in rows], True)
    full = (encode([row[0] + row[side] for row in rows], False) for side in (1, 2))
    return zip(prompts, *full, strict=True)


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    unlike = np.flatnonzero(np.array(a[:shorter]) != np.array(b[:shorter]))
    return int(unlike[0]) if len(unlike) else shorter


def _before_last(ids: list[int], token: int | None, start: int) -> list[int]:
    where = start + np.flatnonzero(np.array(ids[start:]) == token)
    return ids[: where[-1]] if len(where) else ids


def pair_batch(pairs: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Pairs of `tokenize_pairs` as one batch, laid out as by TRL's `DataCollatorForPreference`.

    Returns int64 (2B, S) `input_ids`, `attention_mask` and `completion_mask`: the B chosen rows,
    then the B rejected ones, padded on the right.

    >>> pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    >>> batch = pair_batch([pair])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[5, 6, 7, 0], [5, 6, 8, 9]], [[0, 0, 1, 0], [0, 0, 1, 1]])
    """
    rows = [(p["prompt_ids"], p[f"{side}_ids"]) for side in TEXTS[1:] for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = np.full((len(rows), width), pad_token_id, np.int64)
    real, answered = np.zeros((2, len(rows), width), np.int64)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end], real[i, :end], answered[i, len(prompt) : end] = [*prompt, *answer], 1, 1
    named = {"input_ids": ids, "attention_mask": real, "completion_mask": answered}
    return {name: torch.from_numpy(array) for name, array in named.items()}


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def ches_of_batch(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Scores of a batch of TRL's `DPOTrainer`: `ches`, `ln_ches` and `last_hidden`, (B,) each.

    model: a causal language model of transformers, with or without adapters of peft. batch:
    `input_ids`, `attention_mask`, `completion_mask` (2B, S), chosen rows first, padded on either
    side. One forward pass in evaluation mode, up to the states that the unembedding is applied to.
    Scores as in `likelihood_displacement.ches_score`. Raises InputError.
    """
    batch = _checked(model, batch)
    states = _last_states(model, batch)
    mask = shift_completion_mask(batch["completion_mask"], batch["attention_mask"])
    (plus, minus), (plus_mask, minus_mask) = states.chunk(2), mask.chunk(2)
    sides = (plus, minus, plus_mask, minus_mask)
    return {
        "ches": ches_score(*sides),
        "ln_ches": ches_score(*sides, normalize=True),
        "last_hidden": last_hidden_similarity(*sides),
    }


def score_preference_dataset(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    include_eos: bool = True,
    max_length: int | None = None,
    measures: Sequence[Measure] = MEASURES,  # type: ignore[assignment]
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """Score every pair of a preference data set by how far training would displace its answer.

    Parameters
    ----------
    model, tokenizer : of transformers, a causal language model on any device.
    dataset, include_eos, max_length : as in `tokenize_pairs`; by default the model's own window.
    batch_size : pairs a forward pass; scores depend on it by rounding only, on padding not at all.
    measures : "ches", "ln_ches" (divided by length: the one to filter with), and the baselines
        "edit" (minus the edit distance) and "last_hidden". High: more displacement.
    progress : called as (pairs done, pairs in all).

    Returns
    -------
    {measure: (n,) float64}, and `truncated`, (n,) bool: pairs scored without the end of an answer.
    For `likelihood_displacement.filter_by_score`.

    Raises
    ------
    InputError
        as `tokenize_pairs`; an unknown measure; states with NaN.

    Time: one forward pass of 2n sequences, the longest first. Memory: a batch's last states.

    Razin et al., 2025, arXiv:2410.08847.
    """
    unknown = [m for m in measures if m not in MEASURES]
    require(not unknown and len(measures) > 0, "measures", repr(list(measures)), f"of {MEASURES}")
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    if max_length is None:
        max_length = getattr(model.config, "max_position_embeddings", None)
    pairs = tokenize_pairs(tokenizer, dataset, include_eos=include_eos, max_length=max_length)
    scores: dict[str, NDArray[Any]] = {m: np.empty(len(pairs)) for m in measures}
    if "edit" in measures:
        chosen, rejected = ([p[f"{side}_ids"] for p in pairs] for side in TEXTS[1:])
        scores["edit"] = edit_distance_score(chosen, rejected)
    neural = [m for m in measures if m != "edit"]
    done = 0
    for rows, batch in _batches(pairs, batch_size) if neural else ():
        found = ches_of_batch(model, batch)
        for measure in neural:
            scores[measure][rows] = found[measure].double().cpu().numpy()
        done += len(rows)
        if progress is not None:
            progress(done, len(pairs))
    scores["truncated"] = np.array([p["truncated"] for p in pairs])
    return scores


def ches_pairs(
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    model: str = "small",
    measure: Measure = "ln_ches",
    chat: bool = False,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Array:
    """Score preference pairs given as texts, with a model given by name.

    model: as `models.load_model` takes it: "small", or a folder. chat: the texts are messages of
    a user and an assistant, to be written in the model's chat template; otherwise an answer
    follows its prompt as it is. Others, result and errors as of `score_preference_dataset`: (n,)
    float64, high where training would push the chosen answer down. Keep the lowest. Warns where
    answers are longer than the model's window.

    Razin et al., 2025, arXiv:2410.08847.
    """
    n = len(prompts)
    for name, texts in (("chosen", chosen), ("rejected", rejected)):
        require(len(texts) == n, name, f"{len(texts)} texts", f"{n}, one for each prompt")
    require(measure in MEASURES, "measure", repr(measure), f"one of {', '.join(MEASURES)}")
    columns = zip(prompts, chosen, rejected, strict=True)
    pairs: list[dict[str, Any]] = [dict(zip(TEXTS, row, strict=True)) for row in columns]
    if chat:
        roles = dict(zip(TEXTS, ("user", "assistant", "assistant"), strict=True))
        pairs = [
            {name: [{"role": roles[name], "content": row[name]}] for name in TEXTS} for row in pairs
        ]
    scores = score_preference_dataset(
        *load_model(model), pairs, batch_size=batch_size, measures=[measure], progress=progress
    )
    cut = int(scores["truncated"].sum())
    if cut:
        text = f"{cut} of {n} pairs are longer than the model's window: scored without their end"
        warnings.warn(text, UserWarning, stacklevel=2)
    return scores[measure]


def _batches(
    pairs: Sequence[Mapping[str, Any]], size: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Rows and their batch, pairs of like length together, the longest first."""
    sides = [(len(p["prompt_ids"]), len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    prompt, *answers = np.array(sides).T
    order = np.argsort(-(prompt + np.maximum(*answers)), kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, pair_batch([pairs[i] for i in rows])


def _checked(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The batch on the model's device, or what is wrong with it."""
    wanted = ("input_ids", "attention_mask", "completion_mask")
    missing = [name for name in wanted if name not in batch]
    require(not missing, "batch", f"none of {', '.join(missing)}", "a preference collator's batch")
    shapes = {tuple(batch[name].shape) for name in wanted}
    even = len(shapes) == 1 and len(batch["input_ids"]) % 2 == 0 and len(batch["input_ids"]) > 0
    require(even, "batch", f"shapes {sorted(shapes)}", "one shape (2B, S), chosen rows first")
    return dict(on_model_device(model, {name: batch[name] for name in wanted}))


def _arguments(forward: Callable[..., Any], batch: Batch) -> dict[str, Any]:
    """What a forward pass takes; positions are counted from the first real token."""
    mask = batch["attention_mask"]
    given: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": mask}
    takes = inspect.signature(forward).parameters
    if "position_ids" in takes:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def _within_adapters(model: Any) -> Any:
    """The model that peft has wrapped, its adapters in it, or the model itself."""
    prompted = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    require(not prompted, "model", "one with learned prompt tokens", "one without, or with LoRA")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last_states(model: Any, batch: Batch) -> Tensor:
    inner = _within_adapters(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", "") or "model", inner)
    with evaluating(body), torch.no_grad():
        states: Tensor = body(**_arguments(body.forward, batch)).last_hidden_state
    return states


# ── Displacement, measured ───────────────────────────────────────────────────────────────────────


def pair_log_probabilities(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and the rejected responses of a batch, (B,) each, nats.

    Summed over the completion's tokens, in evaluation mode and without a graph; model, batch and
    errors as of `ches_of_batch`. One forward pass; the logits of the answers' columns are held.
    """
    batch = _checked(model, batch)
    mask = shift_completion_mask(batch["completion_mask"], batch["attention_mask"])
    columns = mask.any(0).nonzero()[:, 0]
    inner = _within_adapters(model)
    given = _arguments(inner.forward, batch)
    short = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if short:
        given["logits_to_keep"] = columns
    with evaluating(inner), torch.no_grad():
        logits = inner(**given).logits
        logits = (logits if short else logits[:, columns]).float()
        target = batch["input_ids"][:, columns + 1, None]
        logps = logits.gather(2, target)[..., 0] - logits.logsumexp(2)
    total = torch.where(mask[:, columns], logps, 0).double().sum(1)
    chosen, rejected = total.chunk(2)
    return chosen, rejected


class DisplacementTracker(TrainerCallback):
    """Callback of TRL's `DPOTrainer`: how far the likelihood of each pair's answers moves.

    ``DPOTrainer(..., callbacks=[DisplacementTracker()])`` looks at the training pairs before the
    first update and after the last one; another data set (held-out pairs as of `tokenize_pairs`,
    or a trainer's prepared one) may be given, and a cadence. In a loop of one's own call `look`.

    Parameters
    ----------
    pairs : sized, of mappings with `prompt_ids`, `chosen_ids`, `rejected_ids`; None: the trainer's.
    every : look each so many updates as well. batch_size : pairs a forward pass.

    Attributes: `steps`, the updates done at each look; `chosen` and `rejected`, (looks, n) float64
    log-probabilities in nats, in the order of the pairs. A look costs a forward pass of each pair,
    in the trainer's precision: TRL's default, bfloat16, blurs displacements below a tenth of a nat.

    Razin et al., 2025, arXiv:2410.08847.
    """

    def __init__(self, pairs: Any = None, *, every: int | None = None, batch_size: int = 8) -> None:
        require(every is None or every >= 1, "every", every, "a positive count")
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        self.pairs, self.every, self.batch_size = pairs, every, batch_size
        self.steps: list[int] = []
        self._looks: list[NDArray[np.float64]] = []
        self._collate: Callable[[list[Any]], Batch] = pair_batch

    def look(self, model: Any, step: int) -> None:
        """Measure all pairs, `step` updates after the start."""
        require(self.pairs is not None and len(self.pairs) > 0, "pairs", "none", "one or more")
        last = self.steps[-1] if self.steps else -1
        require(step > last, "step", f"{step} after {last}", "a step after the last look")
        parts = []
        for start in range(0, len(self.pairs), self.batch_size):
            stop = min(start + self.batch_size, len(self.pairs))
            batch = self._collate([self.pairs[i] for i in range(start, stop)])
            parts.append(torch.stack(pair_log_probabilities(model, batch)).cpu().numpy())
        self.steps.append(step)
        self._looks.append(np.concatenate(parts, axis=1))

    @property
    def chosen(self) -> Array:
        return np.stack([look[0] for look in self._looks])

    @property
    def rejected(self) -> Array:
        return np.stack([look[1] for look in self._looks])

    def displacement(self) -> Array:
        """How far each chosen answer's log-probability moved, first to last look, (n,) nats."""
        return np.asarray(self.chosen[-1] - self.chosen[0])

    def margin_gain(self) -> Array:
        """How far each pair's margin ln p(chosen) - ln p(rejected) grew, (n,) nats."""
        return np.asarray(self.displacement() - (self.rejected[-1] - self.rejected[0]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer: the first look."""
        loader = kwargs.get("train_dataloader")
        if loader is not None:
            self.pairs = loader.dataset if self.pairs is None else self.pairs
            self._collate = loader.collate_fn
        self.look(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer: a look where the cadence says so."""
        if self.every is not None and state.global_step % self.every == 0:
            self.look(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer: the last look."""
        if state.global_step > self.steps[-1]:
            self.look(kwargs["model"], state.global_step)
