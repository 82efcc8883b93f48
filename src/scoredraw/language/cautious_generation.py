"""Cautious decoding of transformers models: all trials in one batch, over one shared cache.

The trials of all rows go through the model together, a token a pass. Where a row branches, its
cache is repeated for its trials, whose first tokens come from the logits that showed the doubt. A
trial that ends leaves the batch; what it has read waits beside it, and if it is the one kept, is
written over what the row's last trial has read. Places that are left empty so are masked, and
closed up where there are many.

    cautious_generate   for model.generate(..., custom_generate=cautious_generate)
    cautious_tokens     token ids to token ids
    cautious_texts      texts or messages to completions

The method, and its paper, are those of `cautious_decoding`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

from scoredraw.errors import require
from scoredraw.language.cautious_decoding import (
    CautiousPlan,
    CautiousTokens,
    Move,
    Rows,
    truncation,
)
from scoredraw.language.punctuation import punctuation_ids
from scoredraw.models import Completion, Prompt, TransformersModel
from scoredraw.token_sampling import SAMPLES_OF_A_PROMPT, Ended, Tokens
from scoredraw.uniforms import Rng

HOLES = 16  # empty places that no lane fills, before they are closed up
# processors of transformers that keep a state, or read a row's number: a copy for every trial
COPIED = ("SynthIDTextWatermarkLogitsProcessor", "PrefixConstrainedLogitsProcessor")
# those with a model, or another layout of the batch, in them
REFUSED = (
    "ClassifierFreeGuidanceLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor",
)  # fmt: skip
THEIRS = "transformers.generation"
TAKEN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


# ── the batch ───────────────────────────────────────────────────────────────────────────────────


class SharedCache:
    """The model's side of `Rows`: each lane's cache and which of its places hold something.

    Raises `InputError` for models whose cache is not one of full attention with positions as an
    input: an empty place would count as a distance there.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self.model, self.device = model, next(model.parameters()).device
        self.cache = DynamicCache(config=model.config)
        kinds = {type(layer).__name__ for layer in self.cache.layers}
        full = kinds == {DynamicLayer.__name__}
        positions = "position_ids" in inspect.signature(model.forward).parameters
        wanted = "full attention in all, and position_ids as an input; or use_cache=False"
        require(full and positions, "model", f"layers of {', '.join(sorted(kinds))}", wanted)
        self.mask: Any = None

    def read_prompts(self, ids: Any, mask: Any) -> Any:
        """Logits after prompts (B, L), padded on the left."""
        self.mask = mask
        return self._read(ids, (mask.cumsum(-1) - 1).clamp_min(0))

    def select(self, lanes: Any) -> None:
        """Go on with these lanes of the last batch, in any number each."""
        self.cache.batch_select_indices(lanes)
        self.mask = self.mask[lanes]

    def follow(self, rows: Rows, move: Move) -> Any:
        """The logits (K, V) of the lanes after a move."""
        import torch

        for trial, lane in move.waiting:
            start = self.mask.shape[1] - (len(trial.tokens) - 1)
            trial.memory = [
                (layer.keys[lane, :, start:].clone(), layer.values[lane, :, start:].clone())
                for layer in self.cache.layers
            ]
        if move.parents != list(range(len(self.mask))):
            self.select(torch.as_tensor(move.parents, device=self.device))
        for lane, read, trial in move.adopted:
            start = self.mask.shape[1] - read
            stop = start + len(trial.tokens) - 1
            for layer, (keys, values) in zip(self.cache.layers, trial.memory, strict=True):
                layer.keys[lane, :, start:stop], layer.values[lane, :, start:stop] = keys, values
            self.mask[lane, stop:] = 0
        if move.adopted:
            self._close_up()
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        tokens = torch.as_tensor(move.tokens, device=self.device)[:, None]
        return self._read(tokens, self.mask.sum(-1, keepdim=True) - 1)

    def _read(self, ids: Any, positions: Any) -> Any:
        out = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]

    def _close_up(self) -> None:
        """Move what lanes have read to the right end, and drop the places that none fills."""
        places = self.mask.shape[1]
        most = int(self.mask.sum(-1).max())
        if places - most <= HOLES:
            return
        order = self.mask.argsort(dim=-1, stable=True)[:, places - most :]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                index = order[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
                setattr(layer, name, old.gather(2, index))
        self.mask = self.mask.gather(1, order)


class NoCache:
    """The same for any causal model: every pass reads all of every lane's text."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read_prompts(self, ids: Any, mask: Any) -> Any:
        self.ids, self.mask = ids, mask
        return self._read(ids, mask)

    def follow(self, rows: Rows, move: Move) -> Any:
        import torch

        logits = []
        for row, ids in texts(rows, self.ids):
            mask = self.mask[row].expand(len(ids), -1)
            more = ids.shape[1] - mask.shape[1]
            logits.append(self._read(ids, torch.nn.functional.pad(mask, (0, more), value=1)))
        return torch.cat(logits)

    def _read(self, ids: Any, mask: Any) -> Any:
        where = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        out = self.model(
            input_ids=ids, attention_mask=mask, use_cache=False, **(where if takes else {})
        )
        return out.logits[:, -1]


def texts(rows: Rows, prompts: Any) -> Iterator[tuple[int, Any]]:
    """Each row under way, and the ids (k, L) of its lanes, the prompt's (B, L) included."""
    import torch

    for row, lanes in groupby(rows.lanes, key=lambda lane: lane.row):
        new = torch.tensor([rows.text(lane) for lane in lanes], dtype=torch.long)
        new = new.to(prompts.device)
        yield row, torch.cat([prompts[row].expand(len(new), -1), new], dim=-1)


def decode(
    rows: Rows, batch: SharedCache | NoCache, logits: Any, tell: Callable[[], Any] | None = None
) -> None:
    """Decode rows to their ends, from the logits after their prompts."""
    while rows.lanes:
        move = rows.advance(logits)
        if tell is not None:
            tell()
        if rows.lanes:
            logits = batch.follow(rows, move)


# ── token ids ───────────────────────────────────────────────────────────────────────────────────


def cautious_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    plan: CautiousPlan,
    n: int = 1,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    end: Collection[int] = (),
    ended: Ended | None = None,
    sample: bool = True,
    rng: Rng = None,
    first: int = 0,
    rows_at_once: int = 16,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[CautiousTokens]]:
    """n continuations of each prompt by cautious decoding -> a list of n `CautiousTokens` each.

    The arguments are those of `token_sampling.sample_tokens`, whose tokens come out where the plan
    never gives more than one trial. sample: False for the likeliest token wherever there is a
    single trial. rows_at_once: texts that are decoded together, with up to n_max lanes each; the
    result does not depend on it beyond the rounding of the model's arithmetic.

    Raises `InputError` for an empty prompt, n, max_tokens or rows_at_once below 1, a cache that
    can't be shared (see `SharedCache`), and as `cautious_decode`. Wang et al. 2025, arXiv
    2507.03038. Sequential. A pass a token of the longest trial at each decision; memory: the cache
    of rows_at_once · n_max lanes, and their V logits in float64.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    require(n >= 1, "n", n, "at least one sample")
    require(max_tokens >= 1, "max_tokens", max_tokens, "a positive count")
    require(rows_at_once >= 1, "rows_at_once", rows_at_once, "at least one")
    require(all(len(p) > 0 for p in prompts), "prompts", "an empty one", "at least one token each")
    process = truncation(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found: list[CautiousTokens] = []
    total = len(prompts) * n
    for start in range(0, total, rows_at_once):
        numbers = range(start, min(start + rows_at_once, total))
        own = range(numbers[0] // n, numbers[-1] // n + 1)  # the prompts of this portion
        rows = Rows(
            plan, [(k // n + first) * SAMPLES_OF_A_PROMPT + k % n for k in numbers], max_tokens,
            end=end, ended=ended and (lambda rows: ended([rows.text(t) for t in rows.lanes])),
            process=process, sample=sample, rng=rng,
        )  # fmt: skip

        def tell(rows: Rows = rows, done: int = start + len(numbers)) -> None:
            if progress is not None:
                progress(done - len({lane.row for lane in rows.lanes}), total)

        batch = SharedCache(model)
        parts = [torch.as_tensor(list(prompts[i])) for i in own]
        ids, mask = (
            pad_sequence(each, batch_first=True, padding_side="left").to(batch.device)
            for each in (parts, [torch.ones_like(part) for part in parts])
        )
        with torch.no_grad():
            logits = batch.read_prompts(ids, mask)
            lanes = torch.tensor([k // n - own[0] for k in numbers], device=batch.device)
            batch.select(lanes)
            decode(rows, batch, logits[lanes], tell)
        found += [row.result() for row in rows.rows]
    return [found[i * n : (i + 1) * n] for i in range(len(prompts))]


def cautious_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n: int = 1,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    punctuation: str = "vocabulary",
    trace: list[CautiousTokens] | None = None,
    first: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> list[list[Completion]]:
    """n texts after each prompt by cautious decoding -> a list of n `Completion` a prompt.

    prompts: texts, or messages for the tokenizer's chat template. punctuation: "vocabulary" or
    "official", as `punctuation_ids`. options: the other fields of `CautiousPlan`. trace: a list
    that gets the `CautiousTokens` of each completion in order: its decisions and `forward_rows`.

    Raises `InputError`, before generating, for a prompt without room in the model's window, and as
    `cautious_tokens`, which says what it takes.
    """
    whole = TransformersModel(model, tokenizer)
    fine = not isinstance(stop, str) and all(stop)
    require(fine, "stop", repr(stop), "a list of strings to stop at")
    plan = CautiousPlan(punctuation_ids(tokenizer, which=punctuation), **options)
    ids = [whole.fitting_tokens(prompt, max_tokens) for prompt in prompts]
    made = cautious_tokens(
        model, ids, plan, n, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
        end=whole.end_tokens, ended=whole.stop_watch(stop), rng=seed, first=first,
        progress=progress,
    )  # fmt: skip
    if trace is not None:
        trace.extend(one for samples in made for one in samples)
    return [
        [
            whole.completed(before, Tokens(one.ids, one.logprobs, one.finished), stop)
            for one in samples
        ]
        for before, samples in zip(ids, made, strict=True)
    ]


# ── transformers' generate ──────────────────────────────────────────────────────────────────────


def cautious_generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    tokenizer: Any = None,
    plan: CautiousPlan | None = None,
    rng: Rng = None,
    trace: list[CautiousTokens] | None = None,
    **model_kwargs: Any,
) -> Any:
    """`model.generate(..., custom_generate=cautious_generate)`: ids (B, L) -> ids (B, L + new).

    Its settings are generate's own: temperature, top_p and all other processors decide what is
    uncertain and what is drawn; do_sample=False takes the likeliest token where there is a single
    trial. plan, rng and trace go to generate like its own arguments. plan: or else a tokenizer, to
    find the punctuation. rng: a seed; by default torch's generator gives one, so torch.manual_seed
    decides. trace: a list that gets the `CautiousTokens` of each row. use_cache=False works with
    any causal model. generate keeps tokenizer and streamer to itself (transformers 5.23): bind them
    with functools.partial.

    Rows are independent of each other. Processors are called for one row at a time, and those not
    of transformers, which may keep a state, are copied for each trial and called for it alone.
    A streamer (one row) gets each segment as it is kept. Rows that ended are filled with
    pad_token_id. A prompt at the maximal length is returned as it is.

    Raises `InputError`, before any work, for what can't be followed: beams, encoders, guidance,
    scores and hidden states among the outputs, a cache that is filled, inputs that are not text.

    >>> from functools import partial
    >>> hook = partial(cautious_generate, tokenizer=tokenizer)  # doctest: +SKIP
    >>> out = model.generate(ids, do_sample=True, max_new_tokens=40,
    ...                      custom_generate=hook)  # doctest: +SKIP
    """
    import torch

    processors, criteria = list(logits_processor or ()), stopping_criteria
    _check_hook(model, input_ids, processors, generation_config, streamer, model_kwargs)
    require(not synced_gpus, "synced_gpus", True, "a model on one process")
    require(plan is not None or tokenizer is not None, "plan", None, "one, or a tokenizer")
    plan = plan or CautiousPlan(punctuation_ids(tokenizer))
    longest = getattr(criteria, "max_length", None)
    require(longest is not None, "stopping_criteria", "no maximal length", "one")
    batch = SharedCache(model) if model_kwargs.get("use_cache", True) else NoCache(model)
    mask = model_kwargs.get("attention_mask")
    rows = Rows(
        plan, [i * SAMPLES_OF_A_PROMPT for i in range(len(input_ids))],
        longest - input_ids.shape[1], ended=_stopping(criteria, input_ids),
        process=_processing(processors, input_ids),
        sample=bool(getattr(generation_config, "do_sample", True)),
        rng=int(torch.randint(2**62, ())) if rng is None else rng,
    )  # fmt: skip
    if not all(type(each).__module__.startswith(THEIRS) for each in processors) or any(
        type(each).__name__ in COPIED for each in processors
    ):
        for lane in rows.lanes:
            lane.state = copy.deepcopy(processors)
    sent = 0

    def stream() -> None:
        nonlocal sent
        new = rows.rows[0].tokens[sent:]
        sent += len(new)
        if streamer is not None and new:
            streamer.put(torch.tensor(new))

    if rows.lanes:
        mask = torch.ones_like(input_ids) if mask is None else mask.long()
        with torch.no_grad():
            decode(rows, batch, batch.read_prompts(input_ids, mask), stream)
    if streamer is not None:
        streamer.end()
    found = [row.result() for row in rows.rows]
    if trace is not None:
        trace.extend(found)
    return _output(input_ids, found, generation_config)


def _check_hook(
    model: Any, input_ids: Any, processors: list[Any], config: Any, streamer: Any,
    model_kwargs: dict[str, Any],
) -> None:  # fmt: skip
    import torch

    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    require(not encoder, "model", "an encoder and a decoder", "a decoder alone")
    beams = getattr(config, "num_beams", None) or 1
    require(beams == 1, "num_beams", beams, "1: trials are not beams")
    for name in OUTPUTS:
        require(not getattr(config, name, False), name, True, "False, see `trace`")
    known = {type(each).__name__ for each in processors}
    refused = sorted(known.intersection(REFUSED))
    require(not refused, "logits_processor", ", ".join(refused), "those that see one row at a time")
    alone = len(input_ids) == 1
    which = "a prefix_allowed_tokens_fn, which is told rows by number, for several rows"
    require(alone or COPIED[1] not in known, "logits_processor", which, "one row")
    require(alone or streamer is None, "streamer", f"one for {len(input_ids)} rows", "one row")
    given = {name for name, value in model_kwargs.items() if value is not None}
    unknown = ", ".join(sorted(given - TAKEN))
    require(not unknown, "model_kwargs", unknown, "text alone, as input_ids and attention_mask")
    past = model_kwargs.get("past_key_values")
    fresh = past is None or (type(past).__name__ == "DynamicCache" and not past.get_seq_length())
    require(fresh, "past_key_values", f"a {type(past).__name__}", "an empty DynamicCache, or none")
    if (positions := model_kwargs.get("position_ids")) is not None:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        usual = bool((positions == mask.cumsum(-1) - 1)[mask.bool()].all())
        require(usual, "position_ids", "others", "those of the tokens, from 0")


def _processing(processors: list[Any], prompts: Any) -> Callable[[Rows, Any], Any] | None:
    """`Rows`' process: transformers' processors, a row at a time or, with a state, a lane."""
    import torch

    from scoredraw import categorical

    if not processors:
        return None

    def apply(chain: list[Any], ids: Any, scores: Any) -> Any:
        for processor in chain:
            scores = processor(ids, scores)
        return scores

    def process(rows: Rows, logits: Any) -> Any:
        scores, at = logits.to(torch.float32, copy=True), 0
        for _, ids in texts(rows, prompts.to(scores.device)):
            for start, stop in (
                [(i, i + 1) for i in range(len(ids))]
                if rows.lanes[at].state is not None
                else [(0, len(ids))]
            ):
                chain = rows.lanes[at + start].state or processors
                part = slice(at + start, at + stop)
                scores[part] = apply(chain, ids[start:stop], scores[part])
            at += len(ids)
        return categorical.normalize(scores)

    return process


def _stopping(criteria: Any, prompts: Any) -> Callable[[Rows], list[bool]]:
    """`Rows`' ended: transformers' criteria, the maximal length aside, a row at a time."""
    others = [each for each in criteria or () if type(each).__name__ != "MaxLengthCriteria"]

    def ended(rows: Rows) -> list[bool]:
        found: list[bool] = []
        for _, ids in texts(rows, prompts):
            said = [False] * len(ids)
            for each in others:
                one = each(ids, None)
                one = one.tolist() if hasattr(one, "tolist") else [one] * len(ids)
                said = [a or bool(b) for a, b in zip(said, one, strict=True)]
            found += said
        return found

    return ended


def _output(input_ids: Any, found: list[CautiousTokens], config: Any) -> Any:
    """The prompts and what came after them, filled with the padding token on the right."""
    import torch

    width = max((len(one.ids) for one in found), default=0)
    padding = getattr(config, "_pad_token_tensor", None)
    padding = getattr(config, "pad_token_id", None) if padding is None else padding
    uneven = any(len(one.ids) < width for one in found)
    wanted = "one, as the rows end at different places"
    require(padding is not None or not uneven, "pad_token_id", None, wanted)
    new = torch.full((len(found), width), 0 if padding is None else int(padding), dtype=torch.long)
    for row, one in enumerate(found):
        new[row, : len(one.ids)] = torch.from_numpy(one.ids)
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=-1)
    if not getattr(config, "return_dict_in_generate", False):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
