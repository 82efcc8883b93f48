"""Training in a swarm: a round of one's own rollouts, mixed with some of the others'.

Round t of a node:
 1. answer n_local questions K times each, with its own policy;
 2. publish the groups (or the chosen ones);
 3. draw n_external groups of the others, scored again with its own reward;
 4. A = (r - mean) / (std + 1e-8) in each group by itself; one policy step on both kinds.
Nobody waits for anybody: a node uses what has arrived, and with nothing there, or n_external = 0, a
round is ordinary local training. The loss of a token is clipped with two bounds, then clamped, and
averaged over all tokens:

    loss_t = clamp(-min(rho_t A, clip(rho_t, 1 - 0.2, 1 + 0.28) A), -10, 10).

rho_t compares the policy in the making with the same policy before the update, for foreign answers
too; nothing corrects for who wrote them, unless asked for: external_weight, or truncated importance
weights from the senders' log-probabilities.

(In the released code, where epsilon_high is not given, a slip of precedence clips from above at 0.2
instead of 1.2.) Amico et al. 2025 (SAPO), arXiv 2509.08721. Not `loss_type="sapo"` of TRL, which is
another method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoredraw.errors import require
from scoredraw.rl.policy_loss import PolicyLoss, clipped_token_loss
from scoredraw.rl.reward_functions import GuardedReward
from scoredraw.rl.rollout_groups import RolloutGroup
from scoredraw.rl.swarm_buffer import (
    Float,
    SwarmBuffer,
    check_selection,
    score_groups,
    swarm_advantages,
)
from scoredraw.uniforms import Rng, generator

if TYPE_CHECKING:
    from scoredraw.rl.trainer import AdvantageGRPOTrainer as _Trainer
else:
    _Trainer = object  # `swarm_grpo_trainer` puts the real one behind, once TRL is wanted

CLAMP = 10.0


def swarm_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    clamp: float = CLAMP,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """The clipped loss with each token's part in [-clamp, clamp], averaged over all tokens.

    loss = Σ w m (clamp(l, ±clamp) + beta k) / Σ w m,  l = -min(rho A, clip(rho) A),
    k = exp(ref - logp) - (ref - logp) - 1.

    logp, old_logp, mask, ref_logp: (B, T); advantages: (B,) or (B, T); weights: (B,) >= 0, one each
    if None: with weight 0 an answer is as if absent. 0 where no token counts. Raises InputError as
    `clipped_token_loss`, and for weights of another shape or below 0, clamp <= 0, and beta without
    ref_logp. Memory O(B T).

    >>> new, old = torch.tensor([[9.0, 0.0]]), torch.zeros(1, 2)
    >>> swarm_policy_loss(new, old, -torch.ones(1), torch.ones(1, 2)).loss  # (10 + 1) / 2
    tensor(5.5000)
    """
    require(clamp > 0, "clamp", clamp, "more than 0")
    require(mask.shape == logp.shape, "mask", tuple(mask.shape), f"{tuple(logp.shape)}, as logp")
    known = beta == 0 or (beta > 0 and ref_logp is not None)
    require(known, "beta", beta, "0, or more than 0 with ref_logp")
    token, clipped = clipped_token_loss(logp, old_logp, advantages, eps_low, eps_high)
    token = token.clamp(-clamp, clamp)
    if beta > 0 and ref_logp is not None:
        away = ref_logp - logp
        token = token + beta * (away.exp() - away - 1)
    m = mask.to(token.dtype)
    if weights is not None:
        fits = weights.shape == logp.shape[:1] and bool((weights >= 0).all())
        require(fits, "weights", tuple(weights.shape), f"{tuple(logp.shape[:1])}, 0 or more each")
        m = m * weights.to(token.dtype)[:, None]
    total = m.sum()
    total = total + (total == 0)
    return PolicyLoss((token * m).sum() / total, (clipped * m).sum() / total)


def truncated_importance_weights(logp: Tensor, sender_logp: Tensor, cap: float = 1.0) -> Tensor:
    """(B,) min(cap, exp(logp - sender_logp)); 1 where the sender told nothing (NaN).

    logp, sender_logp: (B,) log-probabilities of whole answers here and under who wrote them. Texts
    compare, tokens of two tokenizers do not. No gradient. Raises InputError for cap <= 0 and
    shapes that differ. Ionides 2008 for the truncation.

    >>> truncated_importance_weights(torch.tensor([-3.0, -2.0]), torch.tensor([-2.0, -3.0]))
    tensor([0.3679, 1.0000])
    """
    require(cap > 0, "cap", cap, "more than 0")
    shapes = f"{tuple(logp.shape)} and {tuple(sender_logp.shape)}"
    fits = logp.ndim == 1 and logp.shape == sender_logp.shape
    require(fits, "logp and sender_logp", shapes, "both (B,)")
    ratio = (logp.detach() - sender_logp).clamp(max=math.log(cap)).exp()
    return torch.where(sender_logp.isnan(), torch.ones_like(ratio), ratio)


# ── the round ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class SwarmBatch:
    """What one policy step trains on: B answers, those of a group one after the other, ours first.

    rewards: (B,), NaN for none; advantages: (B,), 0 for none; group_ids: (B,) int64; external: (B,)
    bool; weights: (B,) 1 for ours, external_weight for the others', 0 without a reward;
    sender_logp: (B,) log-probabilities under the sender, NaN where it told nothing, and for ours.
    """

    prompts: list[str]
    completions: list[str]
    rewards: Tensor
    advantages: Tensor
    group_ids: Tensor
    external: Tensor
    weights: Tensor
    sender_logp: Tensor

    @classmethod
    def of(
        cls,
        local: Sequence[tuple[RolloutGroup, Float]],
        external: Sequence[tuple[RolloutGroup, Float]] = (),
        external_weight: float = 1.0,
    ) -> SwarmBatch:
        """From groups and their rewards (K,). A group's advantages depend on that group alone."""
        pairs = [*local, *external]
        require(len(pairs) > 0, "local", "no groups", "at least one group")
        sizes = torch.tensor([len(group.completions) for group, _ in pairs])
        ids = torch.arange(len(pairs)).repeat_interleave(sizes)
        rewards = torch.from_numpy(np.concatenate([values for _, values in pairs]))
        foreign = ids >= len(local)
        weights = torch.where(foreign, external_weight, 1.0).double() * ~rewards.isnan()
        told = [
            value
            for k, (group, _) in enumerate(pairs)
            for value in (
                group.logprobs if k >= len(local) and group.logprobs
                else [math.nan] * len(group.completions)
            )
        ]  # fmt: skip
        return cls(
            [group.prompt for group, _ in pairs for _ in group.completions],
            [text for group, _ in pairs for text in group.completions],
            rewards, swarm_advantages(rewards, ids), ids, foreign, weights,
            torch.tensor(told, dtype=torch.float64),
        )  # fmt: skip


@dataclass(frozen=True)
class RoundRecord:
    """What a round did: mean reward of our own answers, groups of either kind, what was missing.

    eligible: groups that could be drawn; missing: asked for and not there; stepped: whether there
    was anything to learn; metrics: what the policy step returned.
    """

    round: int
    reward: float
    local: int
    external: int
    eligible: int
    missing: int
    stepped: bool
    metrics: Mapping[str, Any] = field(default_factory=dict)


PolicyStep = Callable[[SwarmBatch], Mapping[str, Any] | None]
Generate = Callable[[int], Sequence[RolloutGroup]]


class SAPORunner:
    """A node of a swarm: rounds of n_local groups of its own and n_external of others.

    policy_step: takes a `SwarmBatch` and updates the policy; generate: n -> n groups of its own;
    reward_fn: as TRL calls them (see `score_groups`), for both kinds; buffer: None for training
    alone. external_weight: of a foreign answer's tokens, ours being 1; 0 trains alone. choose:
    which of its own groups to publish (all). reuse: groups may be drawn in several rounds. rng: of
    the draws. Where no foreign group that was drawn has a signal, none is used; a round in which no
    advantage differs from 0 makes no step. Raises InputError for n_local < 1, n_external < 0,
    external groups without a buffer, and an unknown selection.

    >>> def answer(n): return [RolloutGroup("1+1=", ["2", "3"], answer="2")] * n
    >>> def equal(completions, answer, **_):
    ...     return [float(c == a) for c, a in zip(completions, answer, strict=True)]
    >>> runner = SAPORunner(lambda batch: {"B": len(batch.prompts)}, answer, equal, n_external=0)
    >>> runner.round().metrics
    {'B': 8}
    """

    def __init__(
        self,
        policy_step: PolicyStep,
        generate: Generate,
        reward_fn: Callable[..., Any],
        buffer: SwarmBuffer | None = None,
        n_local: int = 4,
        n_external: int = 4,
        *,
        selection: str = "nonzero_uniform",
        external_weight: float = 1.0,
        choose: Callable[[Sequence[RolloutGroup]], Sequence[RolloutGroup]] | None = None,
        reuse: bool = False,
        rng: Rng = None,
    ) -> None:
        for name, given in (
            ("policy_step", policy_step), ("generate", generate), ("reward_fn", reward_fn)
        ):  # fmt: skip
            require(callable(given), name, type(given).__name__, "a function")
        require(n_local >= 1, "n_local", n_local, "at least 1 group of one's own")
        check_selection(n_external, selection)
        alone = n_external == 0 or buffer is not None
        require(alone, "buffer", None, f"a SwarmBuffer, to draw {n_external} groups from")
        fits = 0 <= external_weight < math.inf
        require(fits, "external_weight", external_weight, "0 or more")
        self.policy_step, self.generate, self.buffer = policy_step, generate, buffer
        self.reward_fn, self._reward = reward_fn, GuardedReward(reward_fn)
        self.n_local, self.n_external, self.selection = n_local, n_external, selection
        self.external_weight, self.choose, self.reuse = external_weight, choose, reuse
        self._rng = generator(rng)
        self.rounds = 0

    def round(self) -> RoundRecord:
        """One round; a swarm that is gone or lies is no error."""
        groups = list(self.generate(self.n_local))
        local = list(zip(groups, score_groups(groups, self._reward), strict=True))
        if self.buffer is not None:
            self.buffer.publish(groups if self.choose is None else self.choose(groups))
        external, eligible, missing = self._external()
        batch = SwarmBatch.of(local, external, self.external_weight)
        stepped = bool((batch.advantages * batch.weights != 0).any())
        metrics = (self.policy_step(batch) or {}) if stepped else {}
        own = batch.rewards[~batch.external]
        self.rounds += 1
        return RoundRecord(
            self.rounds, float(own.nanmean()), len(local), len(external), eligible, missing,
            stepped, metrics,
        )  # fmt: skip

    def run(self, rounds: int) -> list[RoundRecord]:
        """So many rounds after one another."""
        return [self.round() for _ in range(rounds)]

    def _external(self) -> tuple[list[tuple[RolloutGroup, Float]], int, int]:
        if self.buffer is None or self.n_external == 0:
            return [], 0, 0
        found = self.buffer.sample(
            self.n_external, self.selection, self.reward_fn, self._rng, reuse=self.reuse
        )
        pairs = list(zip(found.groups, found.rewards, strict=True))
        if not any(values.max() > values.min() for values in found.rewards):
            pairs = []
        return pairs, found.eligible, found.missing


# ── a language model as the policy ──────────────────────────────────────────────────────────────


class CausalPolicy:
    """A causal language model of transformers and its optimizer, as a node's policy.

    `answers` samples texts; calling it with a `SwarmBatch` makes the update: texts are tokenized
    here whoever wrote them (those without a token are left out, and an end is put after those
    shorter than max_new_tokens), the old log-probabilities are the model's own before the first of
    `epochs`, and answers come in minibatches of `minibatch` (None: all at once). importance_cap:
    of truncated importance weights, None for none. The gradient is clipped to norm max_norm; there
    is no dropout, with which the ratios would not start at 1. Returns loss, clip_fraction, answers
    and no_tokens. Memory O(minibatch · T · vocabulary).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        epochs: int = 1,
        minibatch: int | None = 2,
        importance_cap: float | None = None,
        eps_low: float = 0.2,
        eps_high: float = 0.28,
        clamp: float = CLAMP,
        max_norm: float = 1.0,
    ) -> None:
        for name, count in (("max_new_tokens", max_new_tokens), ("epochs", epochs)):
            require(count >= 1, name, count, "at least 1")
        require(minibatch is None or minibatch >= 1, "minibatch", minibatch, "None, or at least 1")
        require(temperature > 0, "temperature", temperature, "more than 0")
        cap = importance_cap is None or importance_cap > 0
        require(cap, "importance_cap", importance_cap, "None, or more than 0")
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.epochs, self.minibatch, self.importance_cap = epochs, minibatch, importance_cap
        self.bounds: dict[str, float] = {"eps_low": eps_low, "eps_high": eps_high, "clamp": clamp}
        self.max_norm = max_norm

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], k: int) -> list[list[str]]:
        """k sampled answers to each prompt."""
        require(k >= 2, "k", k, "two answers or more a prompt")
        left = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
        left = {name: left[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        self.model.eval()
        ids = self.model.generate(
            **left, do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0,
            num_return_sequences=k, max_new_tokens=self.max_new_tokens,
            pad_token_id=self._pad, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        written = ids[:, left["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def __call__(self, batch: SwarmBatch) -> dict[str, float]:
        """One update of the model."""
        ids, attention, mask, kept = self._tokens(batch)
        if not len(kept):
            return {"answers": 0.0, "no_tokens": float(len(batch.prompts))}
        advantages, weights = (
            x[kept].to(mask.device, torch.float32) for x in (batch.advantages, batch.weights)
        )
        rows = torch.arange(len(kept)).split(self.minibatch or len(kept))
        self.model.eval()
        with torch.no_grad():
            old = torch.cat([self._logp(ids[part], attention[part]) for part in rows])
        if self.importance_cap is not None:
            sender = batch.sender_logp[kept].to(old)
            whole = (old * mask).sum(dim=1)
            weights = weights * truncated_importance_weights(whole, sender, self.importance_cap)
        losses = [
            self._update(part, ids, attention, mask, old, advantages, weights)
            for _ in range(self.epochs)
            for part in rows
            if bool(weights[part].sum() > 0)
        ]
        mean = [sum(values) / len(losses) for values in zip(*losses, strict=True)] or [0.0, 0.0]
        return {
            "loss": mean[0], "clip_fraction": mean[1], "answers": float(len(kept)),
            "no_tokens": float(len(batch.prompts) - len(kept)),
        }  # fmt: skip

    def _update(
        self, part: Tensor, ids: Tensor, attention: Tensor, mask: Tensor, old: Tensor,
        advantages: Tensor, weights: Tensor,
    ) -> tuple[float, float]:  # fmt: skip
        logp = self._logp(ids[part], attention[part])
        loss, clipped = swarm_policy_loss(
            logp, old[part], advantages[part], mask[part], weights[part], **self.bounds
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return float(loss.detach()), float(clipped)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _tokens(self, batch: SwarmBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and attention (N, L), the mask of answer tokens (N, L - 1), and which rows are kept.

        Prompts are cut from the left and answers from the right at the room that the model has.
        """
        end = self.tokenizer.eos_token_id
        prompts = self.tokenizer(batch.prompts)["input_ids"]
        texts = self.tokenizer(batch.completions, add_special_tokens=False)["input_ids"]
        kept = [i for i, (p, t) in enumerate(zip(prompts, texts, strict=True)) if len(p) and len(t)]
        most = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        rows = []
        for i in kept:
            answer = texts[i][: self.max_new_tokens]
            if len(answer) < self.max_new_tokens and end is not None:
                answer = [*answer, end]
            answer = answer[: most - 1]
            rows.append((prompts[i][-(most - len(answer)) :], answer))
        L = max((len(p) + len(a) for p, a in rows), default=0)
        ids = torch.full((len(rows), L), self._pad)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(rows), L, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):  # lists of tokens, of any length
            start, stop = len(prompt), len(prompt) + len(answer)
            ids[row, :stop] = torch.tensor([*prompt, *answer])
            attention[row, :stop] = 1
            mask[row, start:stop] = True
        device = self.model.device
        return ids.to(device), attention.to(device), mask[:, 1:].to(device), torch.tensor(kept)

    def _logp(self, ids: Tensor, attention: Tensor) -> Tensor:
        """(N, L - 1): log-probabilities of the tokens after the first, at this temperature."""
        logits = self.model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        logits = logits / self.temperature
        chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
        return chosen - logits.logsumexp(dim=-1)


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


def swarm_grpo_trainer(
    *args: Any,
    buffer: SwarmBuffer,
    reward_fn: Callable[..., Any],
    n_external: int = 4,
    selection: str = "nonzero_uniform",
    answer_column: str = "answer",
    rng: Rng = None,
    **options: Any,
) -> Any:
    """A GRPO trainer of TRL in whose batches the last n_external groups are others'.

    They take the places of as many of its own, which are not generated; with fewer there, more are
    its own. All rewards of the trainer score all rows: a foreign row has the sender's prompt, its
    answer in answer_column, and its meta where a column has that name. reward_fn: what the draw
    looks at, as in `SwarmBuffer.sample`. Foreign groups need num_generations completions, each of a
    token or more. Own groups are published. For text prompts and one process a node. The other
    arguments are TRL's: epsilon=0.2, epsilon_high=0.28 and loss_type="bnpo" are the paper's loss,
    without its clamp. Raises InputError for chats and several processes.
    """
    from scoredraw.rl.trainer import AdvantageGRPOTrainer

    check_selection(n_external, selection)
    options.setdefault("advantage_fn", lambda r: swarm_advantages(r.reward, r.group_ids))
    kind = type("SwarmGRPOTrainer", (_SwarmRows, AdvantageGRPOTrainer), {})
    trainer: Any = kind(*args, **options)
    alone = trainer.accelerator.num_processes == 1
    require(alone, "num_processes", trainer.accelerator.num_processes, "1 a node of the swarm")
    source = generator(rng)
    trainer.draw_groups = lambda n: buffer.sample(n, selection, reward_fn, source).groups
    trainer.publish, trainer.n_external = buffer.publish, n_external
    trainer.answer_column = answer_column
    return trainer


class _SwarmRows(_Trainer):
    """Before a `GRPOTrainer` in the order of bases: some rows come from elsewhere."""

    _foreign: Sequence[tuple[list[int], str]] = ()

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> Any:
        texts = all(isinstance(row["prompt"], str) for row in inputs)
        require(texts, "prompt", "a list of messages", "text, in a swarm")
        inputs, self._foreign = self._mixed(inputs) if self.model.training else (inputs, ())
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _mixed(self: Any, inputs: list[dict[str, Any]]) -> Any:
        G, rows, foreign = self.num_generations, [], []
        for group in self.draw_groups(min(self.n_external, len(inputs) // G - 1)):
            texts = group.completions[:G]
            ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            if len(texts) < G or not all(ids):
                continue
            columns = {name: group.meta.get(name) for name in inputs[0]}
            row = {**columns, "prompt": group.prompt, self.answer_column: group.answer}
            rows += [dict(row) for _ in texts]
            end, most = self._tokenizer.eos_token_id, self.max_completion_length
            foreign += [([*one, end][:most], text) for one, text in zip(ids, texts, strict=True)]
        return [*inputs[: len(inputs) - len(rows)], *rows], foreign

    def _generate(self: Any, prompts: list[Any]) -> Any:
        cut = len(prompts) - len(self._foreign)
        ids, written, tools, texts, logps, *rest = super()._generate(prompts[:cut])
        if self.model.training:
            G = self.num_generations
            answers = [str(row.get(self.answer_column, "")) for row in self._rows]
            own = [(prompts[i], texts[i : i + G], answers[i]) for i in range(0, cut, G)]
            self.publish([RolloutGroup(*one) for one in own])
        if self._foreign:
            others = [tokens for tokens, _ in self._foreign]
            ids = [*ids, *self._tokenize_prompts(prompts[cut:])[0]]
            written = [*written, *others]
            texts = [*texts, *(text for _, text in self._foreign)]
            tools = tools and [*tools, *([1] * len(tokens) for tokens in others)]
            logps = logps and [*logps, *([math.nan] * len(tokens) for tokens in others)]
        return ids, written, tools, texts, logps, *rest
