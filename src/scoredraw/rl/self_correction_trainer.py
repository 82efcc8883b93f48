"""TRL's GRPO trainer on episodes of several attempts (`self_correction`).

    trainer = SCoReTrainer(model=..., reward_funcs=right, args=GRPOConfig(max_steps=3000, ...),
                           train_dataset=..., correction_prompt=REVISE, stage_steps=(1500, 1500))

A row of a batch is an episode: the prompt, and as its completion

    y_1  instruction  y_2            with the policy's y_k trained and the instruction masked.

TRL samples and takes the step; between, each attempt is rewarded by itself, the KL of each from
the model as it was at the start is taken, and the tokens of an attempt get its advantage.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from scoredraw.errors import require
from scoredraw.rl.self_correction import (
    BASELINES,
    ESTIMATORS,
    UNIT,
    check_shaping,
    score_advantages,
    self_correction_metrics,
    turn_kl,
    turns_to_tokens,
)
from scoredraw.rl.trainer import AdvantageGRPOTrainer, Rollouts

REVISE = (
    "There might be an error in the solution above because of lack of understanding of the "
    "question. Please correct the error, if any, and rewrite the solution."
)
Ids = list[int]


@dataclass
class Episode:
    """The attempts at one prompt and the completion they make: ids, and the turn of each (0 none).

    given: the first attempt came with the data, not from the policy; open: the last attempt ended
    by itself, so that another may follow.
    """

    prompt: Ids
    given: bool = False
    open: bool = True
    attempts: list[Ids] = field(default_factory=list)
    ids: Ids = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def insert(self, ids: Ids) -> None:
        """Tokens that the policy did not write."""
        self._add(ids, 0, [0.0] * len(ids))

    def attempt(self, ids: Ids, logprobs: list[float] | None, ends: set[int]) -> None:
        """An attempt; one that stopped without an end of sequence closes the episode."""
        written = 0 if self.given and not self.attempts else len(self.attempts) + 1
        self.attempts.append(ids)
        self._add(ids, written, logprobs or [0.0] * len(ids))
        self.open = bool(ids) and ids[-1] in ends

    def _add(self, ids: Ids, turn: int, logprobs: list[float]) -> None:
        self.ids += ids
        self.turn += [turn] * len(ids)
        self.logprobs += logprobs


def check_steps(stage_steps: tuple[int, int], config: Any) -> None:
    """InputError for stages that don't fill the run, and for a KL that TRL would add."""
    whole = len(stage_steps) == 2 and all(isinstance(n, int) and n >= 0 for n in stage_steps)
    require(whole, "stage_steps", stage_steps, "two counts of steps")
    require(config is not None, "args", "none", "a GRPOConfig with max_steps")
    total = config.max_steps
    require(
        sum(stage_steps) == total, "stage_steps", stage_steps, f"args.max_steps = {total} in all"
    )
    require(config.beta == 0, "args.beta", config.beta, "0: the KL is in the return, by beta1")


class SCoReTrainer(AdvantageGRPOTrainer):
    """Two-stage training to correct oneself: SCoRe on `trl.GRPOTrainer`.

    correction_prompt: the instruction after an attempt, a text, or a user's message where prompts
    are conversations. stage_steps: (n1, n2) optimizer steps in stage I and II, with
    args.max_steps = n1 + n2; a generation batch has the stage of the step it is made at.
    alpha, beta1, beta2, credit, baseline, reward_range: as `score_advantages`, whose groups are the
    answers to one prompt. kl: "k1" or "k3", estimated at sampling time, inside the return.
    attempts: K >= 2.

    reward_funcs are called once an attempt, with that attempt alone as the completion. An attempt
    that hits args.max_completion_length, which holds for each by itself, ends its episode: what
    would follow is missing, has no tokens and the lowest reward (the functions see an empty text,
    and what they say of it is not used). An episode with an attempt that no reward function can
    score (None) is left out. A row with a text in its column
    `first_attempt` starts from it (the paper's option of base-model first attempts as prompts):
    only later attempts are trained.

    The reference is a copy of the model made here, so memory holds it twice, a run that resumes
    has to start from the same model, and one sharded by FSDP or DeepSpeed is refused. TRL's own KL
    (args.beta) stays 0, since the turns have different coefficients. With args.num_iterations = 1
    and loss_type "dapo", "bnpo" or "dr_grpo" a step is REINFORCE with the baseline. The
    end-of-sequence token of an attempt stays in the context of the next, as in a chat template; it
    is the policy's choice to stop.

    Logged, as means over the batch: `self_correction/` acc_t1, acc_t2, delta, i2c, c2i, missing (of
    the last two attempts, right at the top of reward_range), kl_t1 to kl_tK, stage. `rewards/` are
    of the last attempt.

    Raises InputError for images, tools, rollout and advantage functions, an empty
    correction_prompt, steps that differ from args.max_steps, args.beta other than 0, rewards
    outside reward_range, and what `score_returns` refuses. K rounds of sampling and two forward
    passes a generation batch. Kumar et al. 2024, arXiv 2409.12917.
    """

    def __init__(
        self,
        *args: Any,
        correction_prompt: str = REVISE,
        stage_steps: tuple[int, int],
        alpha: float = 10.0,
        beta1: float = 0.01,
        beta2: float = 0.1,
        credit: str = "per_turn",
        baseline: str = "loo",
        kl: str = "k1",
        attempts: int = 2,
        reward_range: tuple[float, float] = UNIT,
        **options: Any,
    ) -> None:
        text = isinstance(correction_prompt, str) and bool(correction_prompt)
        require(text, "correction_prompt", repr(correction_prompt), "a text")
        require(attempts >= 2, "attempts", attempts, "2 or more")
        require(kl in ESTIMATORS, "kl", repr(kl), " or ".join(ESTIMATORS))
        require(baseline in BASELINES, "baseline", repr(baseline), " or ".join(BASELINES))
        check_shaping(2, alpha, beta1, beta2, credit)
        for name in ("advantage_fn", "rollout_func", "tools", "environment_factory"):
            require(not options.get(name), name, "one", "none: the trainer has its own")
        config = options.get("args", args[2] if len(args) > 2 else None)
        check_steps(stage_steps, config)
        self.correction_prompt, self.stage_steps = correction_prompt, stage_steps
        self.attempts, self.estimator = attempts, kl
        self.shaping: dict[str, Any] = {
            "alpha": alpha, "beta1": beta1, "beta2": beta2, "credit": credit,
            "baseline": baseline, "reward_range": reward_range,
        }  # fmt: skip
        super().__init__(*args, advantage_fn=self._credit, **options)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        require(whole, "args", "a sharded model", "one that can be copied")
        self.rollout_func = self._attempt_all
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._episodes: list[Episode] = []
        self._given: list[str | None] = []
        self._attempt_rewards = self._kl = self._turn = self._missing = torch.empty(0)

    @property
    def stage(self) -> int:
        """1 or 2, at the step that the trainer is at."""
        return 1 if self.state.global_step < self.stage_steps[0] else 2

    # ── sampling ────────────────────────────────────────────────────────────────────────────────

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        require("images" not in inputs[0] and "image" not in inputs[0], "images", "some", "none")
        self._given = [row.get("first_attempt") for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _attempt_all(self, prompts: list[Any], _: Any) -> dict[str, Any]:
        """The episodes of these prompts, in the form of a rollout function of TRL's."""
        prompt_ids, images, fields = self._tokenize_prompts(prompts)
        again = self._instruction(isinstance(prompts[0], list))
        ends = set(self.eos_token_ids)
        pairs = zip(prompt_ids, self._given, strict=True)
        episodes = [Episode(list(ids), given=bool(text)) for ids, text in pairs]
        for episode, text in zip(episodes, self._given, strict=True):
            if text:
                episode.attempt([*self._encode(text), self._tokenizer.eos_token_id], None, ends)
        for turn in range(self.attempts):
            live = [e for e in episodes if e.open and len(e.attempts) == turn]
            if not live:
                continue
            for episode in live if turn else []:
                episode.insert(again)
            alike = turn == 0 and len(live) == len(episodes)  # a group has the same context
            each = self._generations if alike else 1
            context = [episode.prompt + episode.ids for episode in live]
            found, logprobs = self._generate_single_turn(context, images, fields, each)
            for i, episode in enumerate(live):
                episode.attempt(list(found[i]), logprobs and list(logprobs[i]), ends)
        self._episodes = episodes
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [episode.ids for episode in episodes],
            "logprobs": [episode.logprobs for episode in episodes] if self.use_vllm else None,
            "env_mask": [[int(turn > 0) for turn in episode.turn] for episode in episodes],
        }

    @property
    def _generations(self) -> int:
        train = self.model.training
        return int(self.num_generations if train else self.num_generations_eval)

    def _encode(self, text: str) -> Ids:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _instruction(self, conversation: bool) -> Ids:
        """What stands between two attempts: in a conversation, a user's turn by its template."""
        if not conversation:
            return self._encode(self.correction_prompt)
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        asked = [*said, {"role": "user", "content": self.correction_prompt}]
        before, after = (
            list(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=more, tokenize=True, return_dict=False,
                    chat_template=self.chat_template, **self.chat_template_kwargs,
                )
            )
            for messages, more in ((said, False), (asked, True))
        )  # fmt: skip
        ends = [i for i, token in enumerate(before) if token in self.eos_token_ids]
        before = before[: ends[-1] + 1] if ends else before  # the policy wrote its end itself
        fits = after[: len(before)] == before
        require(fits, "chat_template", "a turn that changes those before", "one that adds to them")
        return after[len(before) :]

    # ── rewards ─────────────────────────────────────────────────────────────────────────────────

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], ids: list[Any]
    ) -> Tensor:
        """Of the last attempt, for TRL; of all, as `_attempt_rewards` (B, K)."""
        device = self.accelerator.device
        made = torch.tensor([len(e.attempts) for e in self._episodes], device=device)
        counts = self.accelerator.gather(made)[:, None]
        self._missing = counts <= torch.arange(self.attempts, device=device)
        lowest = self.shaping["reward_range"][0]
        found = torch.empty(0)
        each = []
        for turn in range(self.attempts):
            tried = [e.attempts[turn] if turn < len(e.attempts) else [] for e in self._episodes]
            said = self._said(tried, isinstance(prompts[0], list))
            if turn:
                self._pending_extra_logs.clear()  # a column has room for the last attempt only
            found = super()._calculate_rewards(inputs, prompts, said, tried)
            reward = (found * self.reward_weights.to(found.device)).nansum(dim=1)
            reward[found.isnan().all(dim=1)] = torch.nan
            each.append(reward.masked_fill(self._missing[:, turn], lowest))
        found[self._missing[:, -1]] = lowest
        self._attempt_rewards = torch.stack(each, dim=1)
        return found

    def _said(self, ids: Sequence[Ids], conversation: bool) -> list[Any]:
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        if not conversation:
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    # ── credit ──────────────────────────────────────────────────────────────────────────────────

    def _rollouts(self, output: dict[str, Any]) -> Rollouts:
        mask = output["completion_mask"] * output["tool_mask"]
        turn = pad_sequence([torch.tensor(e.turn) for e in self._episodes], batch_first=True)
        turn = pad(turn, (0, mask.shape[1] - turn.shape[1])).to(mask.device) * mask
        logp, ref_logp = self._log_probabilities(output)
        each = [turn == k + 1 for k in range(self.attempts)]
        kl = [turn_kl(logp, ref_logp, m, self.estimator, ~m.any(dim=1)) for m in each]
        self._kl = self.accelerator.gather(torch.stack(kl, dim=1))
        self._turn = self.accelerator.gather(self.accelerator.pad_across_processes(turn, dim=1))
        return super()._rollouts(output)

    def _log_probabilities(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B, T) each: of the policy that sampled, and of the reference."""
        from trl.models.utils import disable_gradient_checkpointing

        ids, mask = (
            torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], dim=1)
            for x in ("ids", "mask")
        )
        T, at_once = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        quiet = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), quiet:
            logp, ref_logp = (
                self._get_per_token_logps_and_entropies(model, ids, mask, T, batch_size=at_once)[0]
                for model in (self.model, self.reference)
            )
        return cast(Tensor, logp), cast(Tensor, ref_logp)

    def _credit(self, rollouts: Rollouts) -> Tensor:
        """(B, T) advantages; 0 for episodes that can't be scored or have no other to compare to."""
        rewards, ids = self._attempt_rewards, rollouts.group_ids
        scored = ~rewards.isnan().any(dim=1)
        others = torch.bincount(ids[scored], minlength=int(ids.max()) + 1)[ids]
        used = scored & (others > 1)
        self._log(scored)
        found = torch.zeros_like(rewards)
        if used.any():
            found[used] = score_advantages(
                rewards[used], self._kl[used], self.stage, group_ids=ids[used],
                missing=self._missing[used], **self.shaping,
            )  # fmt: skip
        return turns_to_tokens(found, self._turn)

    def _log(self, scored: Tensor) -> None:
        log = self._metrics["train" if self.model.training else "eval"]
        log["self_correction/stage"].append(float(self.stage))
        for k, kl in enumerate(self._kl.mean(dim=0).tolist()):
            log[f"self_correction/kl_t{k + 1}"].append(kl)
        if scored.any():
            right = self._attempt_rewards[scored] >= self.shaping["reward_range"][1]
            found = self_correction_metrics(right[:, -2], right[:, -1], self._missing[scored, -1])
            for name, share in found._asdict().items():
                log[f"self_correction/{name}"].append(share)
