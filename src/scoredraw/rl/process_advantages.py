"""Advantages of tokens from scores of steps, for several answers to each prompt.

What a step is worth (`process_credit`) is put on its last token, less what the other answers to
the prompt got; a 0/1 outcome v, where one is known, joins at the last token of the response; and a
token's advantage is the sum of what is still to come,

    A_t = Σ_{s >= t} (r*_s - b_s + c (v - mean of the others' v) [s last] - β kl_s).

Three baselines b. "token": the reward a token of the others, for each token of the step. "step":
their reward a step, averaged, for each step; it pays for few and long steps wherever it is
positive. "verl": their mean return a token, padding included, taken from every A_t.

Cheng, Xiong, Qiao, Li, Guo, Wang, Lv and Wang, "Stop summation: min-form credit assignment is all
process reward model needs for reasoning", NeurIPS 2025, arXiv 2504.15275. An answer without scores
or without an outcome stays out of what the others are compared with; in the released code one
without an outcome counts as solved. There a whitening that skips separators still counts them in
its variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scoredraw.errors import require
from scoredraw.rl.process_credit import (
    Steps,
    check_credit,
    check_scores,
    credited,
    find_steps,
    padded_steps,
    process_rewards,
    separator_tokens,
)
from scoredraw.rl.reward_groups import group_rewards, reward_vector
from scoredraw.rl.token_credit import (
    at_step_ends,
    check_steps,
    leading_tokens,
    returns_to_go,
    runs,
    step_tokens,
    whiten,
)

if TYPE_CHECKING:
    from scoredraw.rl.trainer import Rollouts

BASELINES = ("token", "step", "verl")

# Scores of steps: (prompts, a list of texts an answer, **columns) -> a list of scores an answer.
StepScorer = Callable[..., Sequence[Sequence[float | None]]]


# ── advantages ──────────────────────────────────────────────────────────────────────────────────


def process_advantages(
    step_rewards: Any,
    step_mask: Any,
    step_end: Any,
    response_mask: Any,
    num_generations: int | None = None,
    *,
    group_ids: Any = None,
    credit: str = "softmin",
    baseline: str = "token",
    temperature: float = 0.1,
    gamma: float = 1.0,
    outcome: Any = None,
    outcome_coef: float = 1.0,
    kl: Any = None,
    kl_coef: float = 0.001,
    separators: Any = None,
    whitened: bool = False,
) -> Tensor:
    """(N, T) advantages of the tokens of N answers, groups of num_generations or by group_ids.

    step_rewards: (N, S) scores; step_mask: (N, S) bool; step_end: (N, S) int64, the token that ends
    each step, from 0; response_mask: (N, T), true for what the policy wrote. credit, temperature,
    gamma: of `min_form_rewards`. baseline: "token", "step" or "verl" (above).
    outcome: (N,) 1 for a right answer and 0 for a wrong one, None or NaN where nobody knows.
    With every step masked only the outcome counts; an answer with neither gets 0, and so does a
    part in which no other answer of its group can be compared. The outcome under "verl" is v
    itself, part of the return; else its distance to the others' mean, at the last token.
    kl: (N, T) divergence from the reference, of which kl_coef times is taken from the rewards.
    separators: (N, T) bool, tokens to leave at 0. whitened: mean 0 and variance 1 over the others.

    Raises InputError as `min_form_rewards` does, for a group of one, steps that end outside the
    response, and shapes that do not fit. Prefix-sum along tokens, a group at a time. Time and
    memory O(N (S + T)).

    >>> process_advantages([[0.5, -0.5], [0.5, 0.5]], [[True, True]] * 2, [[0, 1]] * 2,
    ...                    [[1, 1]] * 2, 2, temperature=1e-9)
    tensor([[-1.0000, -0.7500],
            [ 1.0000,  0.5000]])
    """
    require(baseline in BASELINES, "baseline", repr(baseline), ", ".join(BASELINES))
    batch = _batch(
        step_rewards, step_mask, step_end, response_mask, num_generations, group_ids,
        (credit, temperature, gamma),
    )  # fmt: skip
    mask = batch.mask
    v, penalty = _outcomes(outcome, outcome_coef, batch), _penalty(kl, kl_coef, batch)
    if baseline == "verl":
        A = _less_returns(batch, v, penalty)
    else:
        A = batch.spread(_less_steps(batch, baseline), _less_outcomes(batch, v))
        A = A if penalty is None else A - returns_to_go(penalty, mask)
    counts = mask
    if separators is not None:
        quiet = torch.as_tensor(separators, device=mask.device)
        fits = quiet.dtype == torch.bool and quiet.shape == mask.shape
        came = f"{quiet.dtype} {tuple(quiet.shape)}"
        require(fits, "separators", came, f"bool {tuple(mask.shape)}")
        counts = mask & ~quiet
        A = A.masked_fill(quiet, 0.0)
    return whiten(A, counts) if whitened else A


def baselined_rewards(
    step_rewards: Any,
    step_mask: Any,
    step_end: Any,
    response_mask: Any,
    num_generations: int | None = None,
    *,
    group_ids: Any = None,
    credit: str = "softmin",
    baseline: str = "token",
    temperature: float = 0.1,
    gamma: float = 1.0,
    outcome: Any = None,
    outcome_coef: float = 1.0,
) -> Tensor:
    """(N, T) what `process_advantages` sums up: rewards less baselines, each where it is earned.

    "step": b_i = mean over k != i of Σ_j r*_kj / n_k, from each of the n_i steps. The sums of the
    answers, each over its number of steps, then add up to 0 in a group.
    "token": b_i = Σ_{k != i} Σ_j r*_kj / Σ_{k != i} length_k, times the tokens of the step.

    >>> baselined_rewards([[0.5, 0.5], [0.0, 0.0]], [[True, True]] * 2, [[1, 2]] * 2,
    ...                   [[1, 1, 1]] * 2, 2, credit="sum", baseline="token")
    tensor([[ 0.0000,  0.5000,  0.5000],
            [ 0.0000, -0.6667, -0.3333]])
    """
    require(baseline in BASELINES[:2], "baseline", repr(baseline), "token or step")
    batch = _batch(
        step_rewards, step_mask, step_end, response_mask, num_generations, group_ids,
        (credit, temperature, gamma),
    )  # fmt: skip
    rewards = batch.at_ends(_less_steps(batch, baseline))
    v = _outcomes(outcome, outcome_coef, batch)
    return rewards if v is None else rewards + batch.at_last(_less_outcomes(batch, v))


# ── parts ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Batch:
    """x: (N, S) float64 what each step earns; real, end: (N, S); mask: (N, T); group: (N,).

    upto: (N, S) response tokens up to the end of each step, 0 for masked ones; length: (N,) all of
    them; unbroken: whether nothing else comes before or between them.
    """

    x: Tensor
    real: Tensor
    end: Tensor
    mask: Tensor
    group: Tensor
    upto: Tensor
    length: Tensor
    unbroken: bool
    dtype: torch.dtype

    @cached_property
    def tokens(self) -> Tensor:
        """(N, S) response tokens of each step."""
        return step_tokens(self.upto)

    @property
    def scored(self) -> Tensor:
        return self.real.any(dim=1)

    def at_ends(self, x: Tensor) -> Tensor:
        return at_step_ends(x.to(self.dtype), self.real, self.end, self.mask.shape[1])

    def at_last(self, values: Tensor) -> Tensor:
        """(N, T): values (N,) at the last token of each response, 0 elsewhere."""
        last = (self.mask * torch.arange(self.mask.shape[1], device=self.mask.device)).amax(dim=1)
        spread = torch.zeros(self.mask.shape, dtype=self.dtype, device=self.mask.device)
        values = (values * (self.length > 0)).to(self.dtype)
        return spread.scatter(1, last[:, None], values[:, None])

    def spread(self, x: Tensor, constant: Tensor | float) -> Tensor:
        """(N, T): a token's Σ of the x of its own and later steps, plus constant (N,)."""
        T = self.mask.shape[1]
        steps = self.tokens if self.unbroken else step_tokens((self.end + 1) * self.real)
        last = steps.sum(dim=1, keepdim=True)
        stop = self.length.long()[:, None] if self.unbroken else torch.full_like(last, T)
        rest = (x.new_zeros(len(x)) + constant)[:, None]  # after the steps
        values = torch.cat([x.flip(1).cumsum(1).flip(1) + rest, rest, torch.zeros_like(rest)], 1)
        counts = torch.cat([steps, stop - last, T - stop], 1)
        found = runs(values.to(self.dtype), counts, T)
        return found if self.unbroken else found.masked_fill_(~self.mask, 0.0)


def _batch(
    step_rewards: Any, step_mask: Any, step_end: Any, response_mask: Any,
    num_generations: int | None, group_ids: Any, credit: tuple[str, float, float],
) -> _Batch:  # fmt: skip
    how, temperature, gamma = credit
    check_credit(how, temperature, gamma)
    r, real, dtype = check_scores(step_rewards, step_mask)
    end = torch.as_tensor(step_end, device=r.device)
    mask = torch.as_tensor(response_mask, device=r.device).bool()
    table = mask.ndim == 2 and len(mask) == len(r) and mask.shape[1] > 0
    require(table, "response_mask", f"shape {tuple(mask.shape)}", f"({len(r)}, T), T >= 1")
    check_steps(r, real, end, mask.shape[1])
    length, unbroken = leading_tokens(mask)
    upto = (end + 1) * real
    if unbroken:
        beyond = upto.amax(dim=1) > length
    else:
        beyond = (real & ~mask.gather(1, torch.where(real, end, 0))).any(dim=1)
    rows = beyond.nonzero()[:1, 0].tolist()
    require(not rows, "step_end", f"a step beyond the response in row {rows}", "tokens of it")
    groups = group_rewards(torch.zeros(len(r), device=r.device), group_ids, num_generations)
    single = bool((groups.size < 2).any())
    name = "num_generations" if group_ids is None else "group_ids"
    require(not single, name, "a group of one answer", "two or more, to compare with the others")
    x = credited(r, real, temperature, how, gamma)
    if not unbroken:
        tokens = mask.cumsum(dim=1, dtype=torch.int16 if mask.shape[1] < 2**15 else torch.int32)
        upto, length = tokens.gather(1, torch.where(real, end, 0)) * real, tokens[:, -1]
    return _Batch(x, real, end, mask, groups.groups(), upto, length.double(), unbroken, dtype)


def _less_steps(batch: _Batch, baseline: str) -> Tensor:
    """(N, S) what steps earn less baseline "token" or "step"; 0 without others to compare with."""
    x, real, group, scored = batch.x, batch.real, batch.group, batch.scored
    total, rivals = x.sum(dim=1), _others(scored.double(), group)
    if baseline == "step":
        b = (_others(total / real.sum(dim=1).clamp(min=1), group) / rivals)[:, None]
    else:
        alone = (scored & (_others(batch.length, group) == 0)).nonzero()[:1, 0].tolist()
        came = f"no token in the others of the group of row {alone}"
        require(not alone, "response_mask", came, "others with tokens for baseline 'token'")
        a_token = _others(total, group) / _others(batch.length * scored, group)
        b = a_token[:, None] * batch.tokens
    return torch.where(real & (rivals > 0)[:, None], x - b, 0.0)


def _less_outcomes(batch: _Batch, v: Tensor | None) -> Tensor | float:
    """(N,) outcomes less the mean of the others', 0 where unknown or alone."""
    if v is None:
        return 0.0
    known, filled = ~v.isnan(), v.nan_to_num(0.0)
    rivals = _others(known.double(), batch.group)
    return torch.where(known & (rivals > 0), filled - _others(filled, batch.group) / rivals, 0.0)


def _less_returns(batch: _Batch, v: Tensor | None, penalty: Tensor | None) -> Tensor:
    """Baseline "verl": linear in the rewards, so that each part is compared where it is known."""
    T = batch.mask.shape[1]

    def less(summed: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The others' mean return a token (unknown ones are 0), and where there is one."""
        rivals = _others(known.double(), batch.group)
        stands = known & (rivals > 0)
        return torch.where(stands, _others(summed, batch.group) / (rivals * T), 0.0), stands

    # a reward counts in the return of every token up to it
    b, stands = less((batch.x * batch.upto).sum(dim=1), batch.scored)
    x, constant = batch.x * stands[:, None], -b
    if v is not None:
        known, v = ~v.isnan(), v.nan_to_num(0.0)
        b, stands = less(v * batch.length, known)
        constant = constant + v * stands - b
    if penalty is None:
        return batch.spread(x, constant)
    cost = returns_to_go(penalty, batch.mask)
    b, _ = less(cost.double().sum(dim=1), batch.length > 0)
    return batch.spread(x, constant + b) - cost


def _others(x: Tensor, group: Tensor) -> Tensor:
    """(N,): the sum of x over the other rows of the group."""
    size = int(group.max()) + 1 if len(group) else 0
    return x.new_zeros(size).index_add(0, group, x)[group] - x


def _outcomes(outcome: Any, coef: float, batch: _Batch) -> Tensor | None:
    """coef times the outcomes, NaN where there is none."""
    if outcome is None:
        return None
    v, N = reward_vector(outcome).to(batch.mask.device).double(), len(batch.mask)
    require(len(v) == N, "outcome", f"{len(v)} values", f"{N}, one an answer")
    require(math.isfinite(coef), "outcome_coef", coef, "a finite number")
    return coef * v


def _penalty(kl: Any, coef: float, batch: _Batch) -> Tensor | None:
    if kl is None:
        return None
    mask = batch.mask
    x = torch.as_tensor(kl, device=mask.device).to(batch.dtype)
    require(x.shape == mask.shape, "kl", f"shape {tuple(x.shape)}", f"{tuple(mask.shape)}")
    require(bool(x[mask].isfinite().all()), "kl", "NaN or infinity", "finite numbers")
    require(math.isfinite(coef), "kl_coef", coef, "a finite number")
    return torch.where(mask, coef * x, 0.0)


# ── in a trainer ────────────────────────────────────────────────────────────────────────────────


class ProcessAdvantage:
    """`process_advantages` as the advantage_fn of `AdvantageGRPOTrainer`.

    score_steps: (prompts, steps, **columns) -> scores; steps and scores are a list an answer, None
    for a step without a score. `TokenClassifierScorer` is one. tokenizer: the policy's; steps end
    with its tokens that end in separator, which get advantage 0 with quiet_separators.
    outcome: which reward function of the trainer (its place) says whether an answer is right; its
    None is "nobody knows", and the steps still count. Without outcome rewards are not read.
    options: of `process_advantages`.

    Every process scores the whole generation batch. Raises InputError for options that cannot work.
    """

    needs_reward = False

    def __init__(
        self,
        score_steps: StepScorer,
        tokenizer: Any,
        separator: str = "\n\n",
        outcome: int | None = None,
        quiet_separators: bool = True,
        whitened: bool = True,
        **options: Any,
    ) -> None:
        require(callable(score_steps), "score_steps", type(score_steps).__name__, "a function")
        known = {"credit", "baseline", "temperature", "gamma", "outcome_coef"}
        unknown = sorted(set(options) - known)
        require(not unknown, "options", ", ".join(unknown), f"some of {', '.join(sorted(known))}")
        given = {"credit": "softmin", **options}
        check_credit(given["credit"], given.get("temperature", 0.1), given.get("gamma", 1.0))
        baseline = options.get("baseline", "token")
        require(baseline in BASELINES, "baseline", repr(baseline), ", ".join(BASELINES))
        self.score_steps, self.tokenizer = score_steps, tokenizer
        self.separators = separator_tokens(tokenizer, separator)
        self.outcome, self.quiet, self.whitened = outcome, quiet_separators, whitened
        self.options = options

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """(B, T) advantages; 0 for an answer in whose group no other has a token."""
        mask = rollouts.mask
        steps = find_steps(
            rollouts.completion_ids, mask, self.separators, self.tokenizer.all_special_ids
        )
        quiet = steps.separators & self.quiet
        if int((mask & ~quiet).sum()) < 2:
            return torch.zeros(mask.shape, device=mask.device)
        texts = step_texts(rollouts.completion_ids, mask, steps, self.tokenizer)
        scores = self.score_steps(rollouts.prompts, texts, **rollouts.columns)
        counts = [len(row) for row in scores]
        want = steps.mask.sum(dim=1).tolist()
        require(counts == want, "score_steps", f"{counts} scores", f"{want}, one a step")
        values, scored = (part.to(mask.device) for part in padded_steps(scores))
        written = mask.any(dim=1).double()
        scored = scored & (_others(written, rollouts.group_ids) > 0)[:, None]
        F = rollouts.rewards.shape[1]
        fits = self.outcome is None or -F <= self.outcome < F
        require(fits, "outcome", self.outcome, f"the place of one of {F} reward functions")
        return process_advantages(
            values, scored, steps.end, mask, group_ids=rollouts.group_ids,
            outcome=None if self.outcome is None else rollouts.rewards[:, self.outcome],
            separators=quiet, whitened=self.whitened, **self.options,
        )  # fmt: skip


def step_texts(ids: Tensor, mask: Tensor, steps: Steps, tokenizer: Any) -> list[list[str]]:
    """The text of each step of each answer, as the tokenizer writes it, without special tokens."""
    upto = mask.cumsum(dim=1).gather(1, steps.end) * steps.mask
    tokens = step_tokens(upto)[steps.mask].tolist()
    pieces = [piece.tolist() for piece in ids[mask].split(tokens)]
    texts = tokenizer.batch_decode(pieces, skip_special_tokens=True)
    found = iter(texts)
    return [[next(found) for _ in range(n)] for n in steps.mask.sum(dim=1).tolist()]


class TokenClassifierScorer:
    """Scores of steps by a process reward model of transformers: a token classifier of two classes.

    The prompt, and each step followed by separator, are read as one text; the logits at each
    separator give the score of the step before it, p(good) - p(bad). Messages go through the
    tokenizer's chat template. model: in evaluation mode. good: the class of good steps. A forward
    pass for each batch_size answers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, separator: str = "\n", good: int = 1, batch_size: int = 8
    ) -> None:
        self.model, self.tokenizer, self.good, self.batch = model, tokenizer, good, batch_size
        self.separator = tokenizer.encode(separator, add_special_tokens=False)
        require(bool(self.separator), "separator", repr(separator), "text with a token")

    def __call__(
        self, prompts: Sequence[Any], steps: Sequence[Sequence[str]], **_: Any
    ) -> list[list[float]]:
        """A score a step."""
        rows = [self._read(prompt, texts) for prompt, texts in zip(prompts, steps, strict=True)]
        scores = []
        for start in range(0, len(rows), self.batch):
            scores.extend(self._score(rows[start : start + self.batch]))
        return scores

    def _read(self, prompt: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and its steps, and where the separators are."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode(
                self.tokenizer.apply_chat_template(
                    prompt, tokenize=False, add_generation_prompt=True
                ),
                add_special_tokens=False,
            )
        places = []
        for text in texts:
            ids = [*ids, *self.tokenizer.encode(text, add_special_tokens=False), *self.separator]
            places.append(len(ids) - 1)
        return ids, places

    def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        device = next(self.model.parameters()).device
        ids = [torch.tensor(row) for row, _ in rows]
        table = pad_sequence(ids, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
        with torch.no_grad():
            logits = self.model(input_ids=table, attention_mask=mask).logits
        r = process_rewards(logits, good=self.good)
        return [r[i, places].tolist() for i, (_, places) in enumerate(rows)]
