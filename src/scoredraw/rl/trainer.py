"""TRL's GRPO trainer with another way to credit answers.

    trainer = AdvantageGRPOTrainer(model=..., reward_funcs=..., advantage_fn=...)

TRL samples, rewards and takes the step; `advantage_fn` is called between with all that was sampled
and returns an advantage an answer, (B,), or a token, (B, T). Nothing else of TRL changes, so that
its own options (loss_type, epsilon, epsilon_high, beta, rollout_func, tools, ...) hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from trl import GRPOTrainer

from scoredraw.errors import require
from scoredraw.rl.dynamic_sampling import Answers, joined

EXTRA = "log_extra: "  # before the names of what rewards log, among columns


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What one generation batch holds, over all processes; B answers of at most T tokens.

    reward: (B,) the weighted sum of the reward functions, NaN where none gave a number;
    rewards: (B, F) of each; group_ids: (B,) int64, the same for the answers to one prompt;
    completion_ids: (B, T) int64, padded on the right; mask: (B, T) bool, the tokens that the policy
    wrote (not padding, nor what a tool said); prompts, completions: (B,) as TRL hands them to
    rewards; columns: the data set's, a list of B values each; step: of the optimizer;
    num_generations: answers a prompt.
    """

    reward: Tensor
    rewards: Tensor
    group_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    prompts: list[Any]
    completions: list[Any]
    columns: Mapping[str, list[Any]]
    step: int
    num_generations: int


# An advantage an answer (B,) or a token (B, T); beside it, which answers to train on, (B,) bool.
AdvantageFunction = Callable[[Rollouts], Tensor | tuple[Tensor, Tensor]]


class AdvantageGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose advantages come from advantage_fn; without one it is TRL's own.

    advantage_fn: called once a generation batch with `Rollouts`; returns (B,) or (B, T), or a pair
    with a mask (B,) of the answers to train on (the others' tokens count nowhere). An answer
    without a reward gets 0 whatever comes, unless advantage_fn has an attribute `needs_reward`
    that is false. Raises InputError for another shape and for NaN.
    max_batches: where groups have no advantage, other prompts are sampled in their place, a batch
    at a time, up to so many (DAPO's dynamic sampling, 10 there); dead groups stay in what is still
    not full. advantage_fn sees each of these batches, and the full one. Needs a data set with rows
    by number, texts, and whole groups in a process; which prompts come, seed and step decide.
    Logged besides TRL's metrics: `frac_dead_groups`, the share of groups without any advantage,
    with max_batches also `generation_batches`, how many it took, and the numbers by name in an
    attribute `statistics` of advantage_fn, if it has one.
    """

    _tag_names = ("trl", "grpo", "scoredraw")

    def __init__(
        self, *args: Any, advantage_fn: AdvantageFunction | None = None, max_batches: int = 1,
        **options: Any,
    ) -> None:  # fmt: skip
        require(max_batches >= 1, "max_batches", max_batches, "1 or more")
        known = max_batches == 1 or advantage_fn is not None
        require(known, "max_batches", max_batches, "1 without an advantage_fn")
        self.advantage_fn, self.max_batches = advantage_fn, max_batches
        self._rewards: Tensor | None = None
        self._rewarded: dict[str, list[Any]] = {}
        self._extra: dict[str, list[Any]] = {}
        super().__init__(*args, **options)
        listed = max_batches == 1 or hasattr(self.train_dataset, "__len__")
        require(listed, "train_dataset", "a stream", "rows by number, to sample again")

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], ids: list[Any]
    ) -> Tensor:
        found = cast(Tensor, super()._calculate_rewards(inputs, prompts, completions, ids))
        columns = {key: [row.get(key) for row in inputs] for key in inputs[0]}
        told = self._pending_extra_logs.items()
        self._extra = {EXTRA + name: list(v) for name, v in told if len(v) == len(prompts)}
        self._rewards = found
        self._rewarded = {**columns, "prompt": prompts, "completion": completions}
        return found

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        output = cast(dict[str, Any], super()._generate_and_score_completions(inputs))
        mode = "train" if self.model.training else "eval"
        if self.advantage_fn is None:
            groups = self._reward().reshape(-1, self._group_size)
            best, worst = (groups.nan_to_num(nan=x) for x in (-math.inf, math.inf))
            dead = best.amax(dim=1) <= worst.amin(dim=1)  # also where there is no reward at all
            self._metrics[mode]["frac_dead_groups"].append(float(dead.float().mean()))
            return output
        if self.max_batches > 1 and mode == "train":
            output = self._refilled(inputs, output)
        rollouts = self._rollouts(output)
        advantages, keep = self._advantages(rollouts)
        dead = 1 - float(_living(advantages, keep, rollouts).mean(dtype=torch.float64))
        told = getattr(self.advantage_fn, "statistics", {})
        for name, value in {"frac_dead_groups": dead, **told}.items():
            self._metrics[mode][name].append(value)
        each = advantages if advantages.ndim == 1 else _token_mean(advantages, rollouts.mask)
        self._logs["advantages"].extend(each.tolist())  # TRL's own fall out of the bounded log
        mine = self._own(len(output["completion_ids"]))
        if advantages.ndim == 2:
            advantages = advantages[:, : output["completion_ids"].shape[1]]
        output["advantages"] = advantages[mine].contiguous()
        if keep is not None:
            output["completion_mask"] = output["completion_mask"] * keep[mine, None].to(
                output["completion_mask"].dtype
            )
        tokens = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = gather(tokens.sum()).sum()
        return output

    def _refilled(self, inputs: list[Any], output: dict[str, Any]) -> dict[str, Any]:
        """The batch with other prompts in place of groups without any advantage."""
        B, G = len(inputs), self.num_generations
        require(B % G == 0, "max_batches", f"{B} answers a process", f"whole groups of {G}")
        parts: list[Answers] = []
        for turn in range(self.max_batches):
            if turn:
                others = self._other_prompts(B // G, turn)
                output = super()._generate_and_score_completions(others)
            rewards = cast(Tensor, self._rewards)[self._own(B)]
            found = Answers.of_batch(output, rewards, self._rewarded | self._extra)
            rollouts = self._rollouts(output)
            alive = _living(*self._advantages(rollouts), rollouts).repeat_interleave(G)
            alive = alive[self._own(B)]
            if not turn:
                dead = found.rows((~alive).nonzero()[:, 0])
            parts.append(found.rows(alive.nonzero()[:, 0]))
            lacking = torch.tensor(B - sum(map(len, parts)), device=alive.device)
            if int(gather(lacking).max()) <= 0:
                break
        full = joined([*parts, dead], self.generation_config.pad_token_id)
        full = full.rows(torch.arange(B, device=alive.device))
        self._rewards = gather(full.rewards)
        self._rewarded, extra = dict[str, Any](), dict[str, Any]()
        for name, values in full.columns.items():
            (extra if name.startswith(EXTRA) else self._rewarded)[name] = values
        self._metrics["train"]["generation_batches"].append(turn + 1)
        self._log_answers(extra)
        return dict(full.tensors)

    def _other_prompts(self, count: int, turn: int) -> list[Any]:
        """Rows for the answers to `count` prompts of this process, some perhaps of the batch."""
        random = np.random.default_rng([self.args.seed, self.state.global_step])
        order = random.permutation(len(self.train_dataset))
        here, together = self.accelerator.process_index, count * self.accelerator.num_processes
        places = (turn - 1) * together + here * count + np.arange(count)
        rows = order[places % len(order)].repeat(self.num_generations)
        return [self.train_dataset[int(i)] for i in rows]

    def _log_answers(self, extra: Mapping[str, list[Any]]) -> None:
        """In TRL's table of completions: the full batch, in place of the last one sampled.

        extra: what rewards gave to `log_extra`.
        """
        rewards = cast(Tensor, self._rewards)
        for name in ("prompt", "completion"):
            self._logs[name].extend(gather_object(self._rewarded[name]))
        for i, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards[:, i].tolist())
        self._logs["extra"].clear()
        for name in sorted(set(gather_object(list(extra)))):
            told = extra.get(name, [None] * len(self._rewarded["prompt"]))
            self._logs["extra"][name.removeprefix(EXTRA)].extend(gather_object(told))

    def _own(self, rows: int) -> slice:
        """This process's rows of what is there for all."""
        here = self.accelerator.process_index
        return slice(here * rows, (here + 1) * rows)

    @property
    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _reward(self) -> Tensor:
        """(B,) the weighted sum of the reward functions, NaN where none gave a number."""
        rewards = cast(Tensor, self._rewards)
        reward = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return reward.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _rollouts(self, output: dict[str, Any]) -> Rollouts:
        reward, G = self._reward(), self._group_size
        tokens = output["completion_mask"] * output.get("tool_mask", 1)

        def everywhere(x: Tensor, fill: int) -> Tensor:
            return cast(
                Tensor, gather(self.accelerator.pad_across_processes(x, dim=1, pad_index=fill))
            )

        rows = {key: gather_object(values) for key, values in self._rewarded.items()}
        pad = self.generation_config.pad_token_id
        return Rollouts(
            reward=reward, rewards=cast(Tensor, self._rewards),
            group_ids=torch.arange(len(reward), device=reward.device) // G,
            completion_ids=everywhere(output["completion_ids"], pad),
            mask=everywhere(tokens, 0).bool(),
            prompts=rows.pop("prompt"), completions=rows.pop("completion"), columns=rows,
            step=self.state.global_step, num_generations=G,
        )  # fmt: skip

    def _advantages(self, rollouts: Rollouts) -> tuple[Tensor, Tensor | None]:
        assert self.advantage_fn is not None
        found = self.advantage_fn(rollouts)
        advantages, keep = found if isinstance(found, tuple) else (found, None)
        B, T = rollouts.mask.shape
        fits = tuple(advantages.shape) in {(B,), (B, T)}
        require(fits, "advantage_fn", f"shape {tuple(advantages.shape)}", f"({B},) or ({B}, {T})")
        require(not bool(advantages.isnan().any()), "advantage_fn", "NaN", "numbers")
        if getattr(self.advantage_fn, "needs_reward", True):
            scored = ~rollouts.reward.isnan()
            scored = scored if advantages.ndim == 1 else scored[:, None]
            advantages = torch.where(scored, advantages, 0.0)
        advantages = advantages.to(rollouts.reward.dtype)
        if keep is not None:
            require(keep.shape == (B,), "advantage_fn", tuple(keep.shape), f"a mask ({B},)")
        return advantages, keep


def _token_mean(advantages: Tensor, mask: Tensor) -> Tensor:
    return (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _living(advantages: Tensor, keep: Tensor | None, rollouts: Rollouts) -> Tensor:
    """(P,) bool: the groups in which some answer has an advantage and is trained on."""
    alive = (advantages != 0).reshape(len(advantages), -1).any(dim=1)
    alive = alive if keep is None else alive & keep.to(alive.device)
    return alive.reshape(-1, rollouts.num_generations).any(dim=1)
