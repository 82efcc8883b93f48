"""A language model that calls tools, rolled out as a tree, and its advantages on its tokens.

A step is what the model writes until it closes a call or an answer; what the tool says is put
after it and is never trained on. Malformed steps are told what was wrong and go on; only an answer
ends a trajectory. For TRL:

    rollout = ToolTreeRollout(sandbox, max_fork=2, max_depth=4)
    trainer = AdvantageGRPOTrainer(..., reward_funcs=OutcomeReward("answer"),
                                   rollout_func=rollout, advantage_fn=PORToolAdvantage())

Wu et al., "PORTool: tool-use LLM training with rewarded tree", 2025, arXiv 2510.26020.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scoredraw.errors import require
from scoredraw.rl.reward_functions import completion_text
from scoredraw.rl.rollout_tree import Proposals, RolloutTree, portool_advantages, tree_rollout
from scoredraw.rl.token_credit import over_steps
from scoredraw.rl.tool_calls import (
    ToolResult,
    ToolSandbox,
    ToolStep,
    format_limit,
    format_reward,
    parse_step,
)
from scoredraw.token_sampling import sample_tokens

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

CLOSING = ("</tool_call>", "</answer>")
TAIL = max(map(len, CLOSING))  # a closing tag is in the last so many tokens, if it is there
CANNOT = re.compile(r"\b(cannot|can.t|can not) answer\b|\bunanswerable\b", re.IGNORECASE)


def answer_outcome(answer: str | None, truth: Any) -> float:
    """+1 right, -1 wrong, 0 for "cannot answer" and for no answer.

    Numbers are compared to 1e-6 of their size, texts without case and outer blanks. truth None is a
    question without an answer, to which any other answer is wrong.

    >>> [answer_outcome(said, 1200) for said in ("1,200.0", "12", "I cannot answer", None)]
    [1.0, -1.0, 0.0, 0.0]
    """
    if answer is None or CANNOT.search(answer):
        return 0.0
    if truth is None:
        return -1.0
    said, want = (str(x).strip().casefold() for x in (answer, truth))
    try:
        numbers = [float(x.replace(",", "")) for x in (said, want)]
    except ValueError:
        return 1.0 if said == want else -1.0
    return 1.0 if math.isclose(*numbers, rel_tol=1e-6) else -1.0


class OutcomeReward:
    """`answer_outcome` as a reward of TRL; column: where the data set has the truth.

    >>> OutcomeReward("truth")([""] * 2, ["<answer>4</answer>", "4"], truth=[4, 4])
    [1.0, 0.0]
    """

    def __init__(self, column: str = "answer") -> None:
        self.column, self.__name__ = column, "outcome"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The outcome of each row, of what `ToolTreeRollout` read or of the last answer there."""
        require(self.column in columns, "column", repr(self.column), "a column of the data set")
        said = columns.get("said")
        if said is None:
            said = [_last_answer(completion_text(text)) for text in completions]
        return [answer_outcome(x, y) for x, y in zip(said, columns[self.column], strict=True)]


def _last_answer(text: str) -> str | None:
    _, opened, rest = text.rpartition("</answer>")[0].rpartition("<answer>")
    return rest.partition("</answer>")[0].strip() if opened else None


# ── rolling out ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Turn:
    """A step: the model's tokens with their log-probabilities, and the tokens of the tool."""

    ids: list[int]
    logprobs: list[float]
    told: list[int]
    step: ToolStep
    result: ToolResult | None


@dataclass
class ToolPolicy:
    """A model, its tokenizer and its tools, ready to be rolled out step by step.

    max_tokens: of a step; max_length: of a whole context, after which a trajectory ends (None: as
    long as it gets); gamma and graded: of the format reward; response: how a tool is quoted.
    """

    model: Any
    tokenizer: Any
    sandbox: ToolSandbox
    max_tokens: int = 128
    max_length: int | None = None
    temperature: float = 1.0
    gamma: float = 0.95
    graded: bool = False
    response: str = "\n<tool_response>{}</tool_response>\n"

    def rollout(
        self, prompts: Sequence[Sequence[int]], n: int, max_fork: int = 2, max_depth: int = 6,
        rng: int | np.random.Generator | None = None, truths: Sequence[Any] | None = None,
        **options: Any,
    ) -> RolloutTree:  # fmt: skip
        """A tree with n trajectories a prompt (token ids), whose `tokens` are a `Turn` a step.

        truths: (Q,) right answers, else outcomes are unknown; options: of `tree_rollout`. At most
        max_depth rounds of generation, each of all steps together; a call runs once a step.
        Raises InputError for an empty prompt, truths of another length, and as `tree_rollout`.
        """
        require(len(prompts) > 0, "prompts", "none", "at least one")
        fits = truths is None or len(truths) == len(prompts)
        require(fits, "truths", truths if fits else len(truths or ()), f"{len(prompts)} of them")
        limit = format_limit(self.gamma, max_depth)
        contexts: list[list[int]] = []  # by step, as its query is
        query: list[int] = []

        def step_fn(parents: NDArray[np.int64], random: np.random.Generator) -> Proposals:
            before = [list(prompts[-1 - p]) if p < 0 else contexts[p] for p in parents]
            queries = [-1 - p if p < 0 else query[p] for p in parents]
            turns = self._turns(before, random)
            contexts.extend(b + t.ids + t.told for b, t in zip(before, turns, strict=True))
            query.extend(queries)
            full = [not self._has_room(context) for context in contexts[-len(turns) :]]
            outcomes = [
                np.nan if truths is None else answer_outcome(t.step.answer, truths[q])
                for t, q in zip(turns, queries, strict=True)
            ]
            done = [t.step.answer is not None or f for t, f in zip(turns, full, strict=True)]
            form = [
                format_reward(t.step, limit, t.result is None or t.result.ok, self.graded)
                for t in turns
            ]
            return Proposals(done, outcomes, form, [tuple(t.ids) for t in turns], turns)

        return tree_rollout(step_fn, n, max_fork, max_depth, rng, queries=len(prompts), **options)

    def _has_room(self, context: list[int]) -> bool:
        return self.max_length is None or len(context) + self.max_tokens <= self.max_length

    def _turns(self, contexts: list[list[int]], rng: np.random.Generator) -> list[Turn]:
        sampled = sample_tokens(
            self.model, contexts, max_tokens=self.max_tokens, temperature=self.temperature,
            end=[self.tokenizer.eos_token_id], ended=self._closed, rng=rng,
        )  # fmt: skip
        return [self._turn(one) for (one,) in sampled]

    def _closed(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        texts = self.tokenizer.batch_decode([row[-TAIL:] for row in rows])
        return [any(tag in text for tag in CLOSING) for text in texts]

    def _turn(self, sampled: Any) -> Turn:
        """Read a step, run its call, and quote what comes of it."""
        ids = sampled.ids.tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        step = parse_step(text, self.sandbox.tools)
        result, told = None, ""
        if step.answer is None:
            told = f"error: {step.problem}"
            if step.name is not None and step.passed[-1]:
                result = self.sandbox.call(step.name, step.arguments or {})
                told = result.text if result.ok else f"error: {result.text}"
            told = self.response.format(told)
        quoted = self.tokenizer(told, add_special_tokens=False)["input_ids"] if told else []
        return Turn(ids, sampled.logprobs.tolist(), list(quoted), step, result)


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────


class TokenRows(NamedTuple):
    """Trajectories as rows of tokens, padded on the right.

    ids: (B, T) int64; mask: (B, T) bool, the model's own tokens; step_mask, ends: (B, D) the steps
    of a row and their last tokens, the tool's among them; logprobs: (B, T), 0 outside the mask.
    """

    ids: Tensor
    mask: Tensor
    step_mask: Tensor
    ends: Tensor
    logprobs: Tensor

    def spread(self, values: Any) -> Tensor:
        """(B, T): what a step has, (B, D), on each of its own tokens; 0 on those of tools."""
        steps = torch.as_tensor(values, dtype=self.logprobs.dtype)
        return over_steps(steps, self.step_mask, self.ends, self.ids.shape[1]) * self.mask


def token_rows(tree: RolloutTree, pad: int = 0) -> TokenRows:
    """The rows of a tree whose tokens are `Turn`s. O(B T)."""
    turns = [[tree.tokens[s] for s in path if s >= 0] for path in tree.paths]
    fits = all(isinstance(turn, Turn) for row in turns for turn in row)
    require(fits, "tree", "steps that are no turns", "a tree of ToolPolicy.rollout")
    ids, mask, logprobs, ends = [], [], [], torch.zeros(tree.paths.shape, dtype=torch.int64)
    for k, row in enumerate(turns):
        ids.append(torch.tensor([i for turn in row for i in turn.ids + turn.told]))
        own = [[True] * len(turn.ids) + [False] * len(turn.told) for turn in row]
        mask.append(torch.tensor([flag for part in own for flag in part]))
        said = [turn.logprobs + [0.0] * len(turn.told) for turn in row]
        logprobs.append(torch.tensor([value for part in said for value in part]))
        lengths = torch.tensor([len(part) for part in own])
        ends[k, : len(row)] = lengths.cumsum(0) - 1
    return TokenRows(
        pad_sequence(ids, batch_first=True, padding_value=pad),
        pad_sequence(mask, batch_first=True), torch.as_tensor(tree.paths >= 0), ends,
        pad_sequence(logprobs, batch_first=True),
    )  # fmt: skip


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


class ToolTreeRollout:
    """`rollout_func` of TRL: the num_generations answers to a prompt are the leaves of a tree.

    policy: options of `ToolPolicy`. What merging leaves out is filled up with rows whose tokens
    count nowhere. Each row gets the columns said (the answer), step_path, step_ends and
    step_formats, which `OutcomeReward` and `PORToolAdvantage` read.
    """

    def __init__(
        self, sandbox: ToolSandbox, max_fork: int = 2, max_depth: int = 6,
        rng: int | np.random.Generator | None = None, merge: bool = True, **policy: Any,
    ) -> None:  # fmt: skip
        self.sandbox, self.max_fork, self.max_depth = sandbox, max_fork, max_depth
        self.rng, self.merge, self.policy = np.random.default_rng(rng), merge, policy
        self.tree: RolloutTree | None = None

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Rows for the prompts, which come num_generations times each, one after the other."""
        train = trainer.model.training
        n = trainer.num_generations if train else trainer.num_generations_eval
        whole = len(prompts) % n == 0 and all(
            prompts[i] == prompts[i - i % n] for i in range(len(prompts))
        )
        require(whole, "prompts", f"{len(prompts)} on this process", f"whole groups of {n}")
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        policy = ToolPolicy(
            model, tokenizer, self.sandbox, temperature=trainer.temperature, **self.policy
        )
        ids = [self._prompt_ids(prompt, tokenizer) for prompt in prompts[::n]]
        model.eval()  # without dropout or checkpointing, which would do without a cache
        try:
            self.tree = policy.rollout(
                ids, n, self.max_fork, self.max_depth, self.rng, merge=self.merge
            )
        finally:
            model.train(train)
        return self._rows(self.tree, ids, n)

    def _prompt_ids(self, prompt: Any, tokenizer: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        schemas = [tool.schema for tool in self.sandbox.tools.values()]
        return list(tokenizer.apply_chat_template(
            prompt, tools=schemas, add_generation_prompt=True, tokenize=True, return_dict=True,
        )["input_ids"])  # fmt: skip

    def _rows(self, tree: RolloutTree, ids: list[list[int]], n: int) -> dict[str, Any]:
        t, rows = tree.table, token_rows(tree)
        query = t.query[t.paths[:, 0]]
        out: dict[str, list[Any]] = {key: [] for key in (
            "prompt_ids", "completion_ids", "logprobs", "env_mask", "said", "step_path",
            "step_ends", "step_formats")}  # fmt: skip
        for q in range(len(ids)):
            mine = np.flatnonzero(query == q)
            for j in range(n):
                k, real = mine[min(j, len(mine) - 1)], j < len(mine)
                path = t.paths[k, : t.length[k]]
                length = int(rows.ends[k, len(path) - 1]) + 1
                mask = rows.mask[k, :length].int()
                for key, value in (
                    ("prompt_ids", ids[q]), ("completion_ids", rows.ids[k, :length].tolist()),
                    ("logprobs", rows.logprobs[k, :length].tolist()),
                    ("env_mask", (mask * real).tolist()),
                    ("said", tree.tokens[path[-1]].step.answer),
                    ("step_path", path.tolist() if real else []),
                    ("step_ends", rows.ends[k, : len(path)].tolist()),
                    ("step_formats", t.format_reward[path].tolist()),
                ):  # fmt: skip
                    out[key].append(value)
        return out


class PORToolAdvantage:
    """`advantage_fn` of `AdvantageGRPOTrainer` for what `ToolTreeRollout` rolled out: (B, T).

    options: those of `portool_advantages`, with the gamma of the rollout (0.95 in both). The reward
    of a row is its outcome. Raises InputError for rows that no `ToolTreeRollout` made.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """Each step's advantage on the tokens that the model wrote in it, 0 elsewhere."""
        wanted = ("step_path", "step_ends", "step_formats")
        missing = [key for key in wanted if key not in rollouts.columns]
        require(not missing, "rollouts", f"no column {missing}", "rows of ToolTreeRollout")
        paths, ends, forms = (rollouts.columns[key] for key in wanted)
        rows = [i for i, path in enumerate(paths) if path]
        group = rollouts.group_ids.tolist()
        names = [[(group[i], step) for step in paths[i]] for i in rows]
        formats = {
            name: form
            for i, path in zip(rows, names, strict=True)
            for name, form in zip(path, forms[i], strict=True)
        }
        outcomes = rollouts.reward[rows].double().cpu().numpy()
        tree = RolloutTree.from_paths(names, outcomes, formats, [group[i] for i in rows])
        device, T = rollouts.mask.device, rollouts.mask.shape[1]
        steps = torch.as_tensor(
            portool_advantages(tree, **self.options), dtype=rollouts.reward.dtype, device=device
        )
        step_mask = torch.as_tensor(tree.paths >= 0, device=device)
        last = pad_sequence([torch.tensor(ends[i]) for i in rows], batch_first=True).to(device)
        out = rollouts.reward.new_zeros(rollouts.mask.shape)
        out[rows] = over_steps(steps, step_mask, last, T)
        return out * rollouts.mask
