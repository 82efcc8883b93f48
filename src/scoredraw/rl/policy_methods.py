"""The methods of `train policy`: each a function of its own options that says what it changes.

    train_policy(problems, out, method=ngrpo(num_virtual=2), about="ngrpo")

All of them raise InputError for an option that they do not have, and for a value of another kind
than the option's.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from scoredraw import registry
from scoredraw.errors import require
from scoredraw.rl.policy_training import PolicyMethod
from scoredraw.rl.reward_functions import RewardFunction, load_reward

if TYPE_CHECKING:
    from torch import Tensor

    from scoredraw.rl.trainer import Rollouts

Maker = Callable[..., PolicyMethod]


def checked(taker: str = "", but: str = "") -> Callable[[Maker], Maker]:
    """Look at the options of a method before it is made.

    taker: where its **options go, "module:function"; but: names there that are no options of it.
    """

    def decorate(make: Maker) -> Maker:
        @wraps(make)
        def made(*given: Any, **options: Any) -> PolicyMethod:
            takers = [registry.resolve(taker), make] if taker else [make]
            listed = [p for function in takers for p in signature(function).parameters.values()]
            usual = {p.name: p.default for p in listed if p.default is not Parameter.empty}
            known = {name: usual[name] for name in usual if name not in but.split()}
            for name, value in options.items():
                require(name in known, "options", name, f"some of {', '.join(known) or 'none'}")
                require(alike(value, known[name]), name, repr(value), f"such as {known[name]!r}")
            return make(*given, **options)

        return made

    return decorate


def alike(value: Any, usual: Any) -> bool:
    """Whether a value is a truth value, a whole number or a number where the usual one is."""
    if isinstance(usual, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(usual) if isinstance(usual, int) else True


group_method = checked("scoredraw.rl.group_advantages:GroupAdvantage", but="estimator")


@checked()
def grpo(passes: int = 1) -> PolicyMethod:
    """TRL's own GRPO, as its defaults have it. passes: optimizer steps that a batch is used for."""
    require(passes >= 1, "passes", passes, "1 or more")
    return PolicyMethod(options={} if passes == 1 else {"num_iterations": passes})


def estimator(name: str, max_batches: int = 1, **options: Any) -> PolicyMethod:
    """An estimator of `group_advantages` with its clip, its loss and its filter.

    A clip acts only on a batch that is gone over again, so that those with bounds of their own
    take two steps a batch. max_batches: sampled for one, as `AdvantageGRPOTrainer` does it.

    >>> estimator("ngrpo", num_virtual=2).options["epsilon_high"]
    0.24
    """
    from scoredraw.rl.group_advantages import GROUP_METHODS, GroupAdvantage

    credit = GroupAdvantage(name, **options)
    require(max_batches >= 1, "max_batches", max_batches, "1 or more")
    settings = GROUP_METHODS[name].trl_options()
    if settings["epsilon"] != 0.2 or settings["epsilon_high"] != 0.2:
        settings["num_iterations"] = 2
    sampling = {"max_batches": max_batches} if max_batches > 1 else {}
    return PolicyMethod(lambda _: credit, settings, trainer_options=lambda _: sampling)


@group_method
def dr_grpo(**options: Any) -> PolicyMethod:
    """Without a deviation, which favours problems that are nearly always or never solved."""
    return estimator("dr_grpo", **options)


@group_method
def rloo(**options: Any) -> PolicyMethod:
    """Against the mean of the other answers."""
    return estimator("rloo", **options)


@group_method
def dapo(max_batches: int = 10, **options: Any) -> PolicyMethod:
    """A higher clip for good answers; other problems in place of groups of one mind.

    max_batches: sampled at most for a full one; with 1 such groups are left out.
    """
    return estimator("dapo", max_batches, **options)


@group_method
def ngrpo(max_batches: int = 1, **options: Any) -> PolicyMethod:
    """As if one more answer with the highest reward had been sampled; see `group_advantages`.

    max_batches: sampled at most where groups are all right, as in "dapo".
    """
    return estimator("ngrpo", max_batches, **options)


@group_method
def psr(**options: Any) -> PolicyMethod:
    """From right answers alone."""
    return estimator("psr", **options)


@group_method
def nsr(**options: Any) -> PolicyMethod:
    """From wrong answers alone."""
    return estimator("nsr", **options)


@group_method
def w_reinforce(**options: Any) -> PolicyMethod:
    """From wrong answers, and a little from right ones."""
    return estimator("w_reinforce", **options)


@group_method
def reinforce_pp(**options: Any) -> PolicyMethod:
    """Standardised over the batch in place of the group."""
    return estimator("reinforce_pp", **options)


@checked("scoredraw.rl.tempo:TempoAdvantage")
def tempo(**options: Any) -> PolicyMethod:
    """Credit for the tokens at which the answers of a group part; options of `TempoAdvantage`."""
    from scoredraw.rl.tempo import TempoAdvantage

    credit = TempoAdvantage(**options)
    return PolicyMethod(lambda _: credit, {"loss_type": "dapo"})


@checked(
    "scoredraw.rl.process_advantages:process_advantages",
    but="num_generations group_ids kl kl_coef separators",
)
def pure(
    scorer: str | Callable[..., Any] = "scoredraw.papers.small_policy:score_lines",
    separator: str = "\n",
    outcome: bool = True,
    quiet_separators: bool = True,
    whitened: bool = True,
    **options: Any,
) -> PolicyMethod:
    """The minimum of process rewards; options of `ProcessAdvantage`.

    scorer: a function (prompts, steps, **columns) -> scores, or where it is; the default reads the
    sums that the embedded model works out. outcome: the run's reward counts as well.
    """
    from scoredraw.rl.process_advantages import ProcessAdvantage

    score: Callable[..., Any] = load_reward(scorer) if isinstance(scorer, str) else scorer
    place = 0 if outcome else None

    def credit(tokenizer: Any) -> ProcessAdvantage:
        return ProcessAdvantage(
            score, tokenizer, separator, place, quiet_separators, whitened, **options
        )

    return PolicyMethod(credit, {"loss_type": "dapo"})


@checked("scoredraw.rl.calibrated_reward:RLCRReward")
def rlcr(**options: Any) -> PolicyMethod:
    """Correctness and a proper score of the stated confidence; options of `RLCRReward`.

    Reads the column answer by its own verifier ("exact", words only: 1.2 is 12 to it; "math", for
    numbers); the run's reward is not used.
    """
    from scoredraw.rl.calibrated_reward import RLCRReward

    reward = RLCRReward(**options)
    return PolicyMethod(options={"scale_rewards": "none"}, rewards=lambda _: [reward])


@checked("scoredraw.rl.relevance_reward:R3Reward")
def r3(encoder: str = "facebook/contriever", **options: Any) -> PolicyMethod:
    """Relevance, length and no repetition, without a reward model; options of `R3Reward`.

    Reads the columns qtype and reference; the run's reward is not used. encoder: a model of
    transformers, by name or folder, whose last states are averaged.
    """
    from scoredraw.rl.relevance_reward import MeanPooledEncoder, R3Reward

    R3Reward(list, **options)  # refuses bad options now
    return PolicyMethod(
        rewards=lambda _: [R3Reward(MeanPooledEncoder.from_pretrained(encoder), **options)]
    )


@checked("scoredraw.rl.occupancy:SequencePenaltyReward")
def chi2_penalty(coef: float = 0.05, **options: Any) -> PolicyMethod:
    """Less √χ² to the policy as it came, against hacked rewards; of `SequencePenaltyReward`.

    coef: of the penalty. kind: "chi2", "kl" and others, too.
    """
    from scoredraw.rl.occupancy import SequencePenaltyReward

    SequencePenaltyReward(None, None, None, coef=coef, **options)  # refuses bad options now

    def penalty(net: Any, tokenizer: Any) -> RewardFunction:
        reference = deepcopy(net).requires_grad_(False)
        return SequencePenaltyReward(net, reference, tokenizer, coef=coef, **options)

    return PolicyMethod(penalty=penalty)


@checked("scoredraw.rl.self_correction_trainer:SCoReTrainer")
def score(first: float = 0.5, correction_prompt: str | None = None, **options: Any) -> PolicyMethod:
    """Two attempts, the second credited for progress; options of `SCoReTrainer`.

    first: the share of the steps that stage I has.
    """
    require(0 <= first <= 1, "first", first, "a share of the steps")

    def stages(total: int) -> dict[str, Any]:
        said = {} if correction_prompt is None else {"correction_prompt": correction_prompt}
        one = round(first * total)
        return {"stage_steps": (one, total - one), **said, **options}

    where = "scoredraw.rl.self_correction_trainer:SCoReTrainer"
    return PolicyMethod(trainer=where, trainer_options=stages)


@checked()
def win_rate(margin: float = 0.0, clamp: float = 5.0) -> PolicyMethod:
    """The share of the other answers that an answer beats, rewards closer than margin being a tie.

    For a judge that compares two answers itself give `WinRateReward` of `pairwise_judge` as the
    reward of "grpo".
    """
    from scoredraw.rl.pairwise_rewards import normalised_advantages, score_win_rate

    require(margin >= 0, "margin", margin, "0 or more")

    def credit(rollouts: Rollouts) -> Tensor:
        wins = score_win_rate(rollouts.reward, rollouts.group_ids, margin=margin)
        return normalised_advantages(wins, rollouts.group_ids).clamp(-clamp, clamp)

    return PolicyMethod(lambda _: credit)


@checked("scoredraw.rl.rollout_tree:portool_advantages")
def portool(max_fork: int = 2, max_depth: int = 6, **options: Any) -> PolicyMethod:
    """Roll-outs as a tree of tool calls, credited a step; options of `PORToolAdvantage`.

    The tools are a calculator and dates; for your own build the parts of `tool_policy`.
    """
    from scoredraw.rl.tool_calls import CALCULATOR, DATE_DIFFERENCE, DATE_SHIFT, ToolSandbox
    from scoredraw.rl.tool_policy import PORToolAdvantage, ToolTreeRollout

    rollout = ToolTreeRollout(
        ToolSandbox([CALCULATOR, DATE_DIFFERENCE, DATE_SHIFT]), max_fork, max_depth
    )
    credit = PORToolAdvantage(**options)
    return PolicyMethod(lambda _: credit, trainer_options=lambda _: {"rollout_func": rollout})
