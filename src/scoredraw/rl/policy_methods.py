"""The methods of `train policy`: each a function of its own options that says what it changes.

PolicyMethod = ngrpo(num_virtual=2)
train_policy(problems, out, method=ngrpo(num_virtual=2), about="ngrpo")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scoredraw.errors import require
from scoredraw.rl.policy_training import PolicyMethod
from scoredraw.rl.reward_functions import load_reward

if TYPE_CHECKING:
    from torch import Tensor

    from scoredraw.rl.trainer import Rollouts


def grpo() -> PolicyMethod:
    """TRL's own GRPO, as its defaults have it."""
    return PolicyMethod()


def estimator(name: str, **options: Any) -> PolicyMethod:
    """An estimator of `group_advantages` with its clip, its loss and its filter.

    A clip acts only on a batch that is gone over again, so that those with bounds of their own
    take two steps a batch.

    >>> estimator("ngrpo", num_virtual=2).options["epsilon_high"]
    0.24
    """
    from scoredraw.rl.group_advantages import GROUP_METHODS, GroupAdvantage

    credit = GroupAdvantage(name, **options)
    settings = GROUP_METHODS[name].trl_options()
    if settings["epsilon"] != 0.2 or settings["epsilon_high"] != 0.2:
        settings["num_iterations"] = 2
    return PolicyMethod(lambda _: credit, settings)


def dr_grpo(**options: Any) -> PolicyMethod:
    """Without a deviation, which favours problems that are nearly always or never solved."""
    return estimator("dr_grpo", **options)


def rloo(**options: Any) -> PolicyMethod:
    """Against the mean of the other answers."""
    return estimator("rloo", **options)


def dapo(**options: Any) -> PolicyMethod:
    """A higher clip for good answers; groups of one mind are left out."""
    return estimator("dapo", **options)


def ngrpo(**options: Any) -> PolicyMethod:
    """As if one more answer with the highest reward had been sampled; see `group_advantages`."""
    return estimator("ngrpo", **options)


def psr(**options: Any) -> PolicyMethod:
    """From right answers alone."""
    return estimator("psr", **options)


def nsr(**options: Any) -> PolicyMethod:
    """From wrong answers alone."""
    return estimator("nsr", **options)


def w_reinforce(**options: Any) -> PolicyMethod:
    """From wrong answers, and a little from right ones."""
    return estimator("w_reinforce", **options)


def reinforce_pp(**options: Any) -> PolicyMethod:
    """Standardised over the batch in place of the group."""
    return estimator("reinforce_pp", **options)


def tempo(**options: Any) -> PolicyMethod:
    """Credit for the tokens at which the answers of a group part; options of `TempoAdvantage`."""
    from scoredraw.rl.tempo import TempoAdvantage

    credit = TempoAdvantage(**options)
    return PolicyMethod(lambda _: credit, {"loss_type": "dapo"})


def pure(
    scorer: str | Callable[..., Any] = "scoredraw.papers.small_policy:score_lines",
    separator: str = "\n",
    outcome: bool = True,
    **options: Any,
) -> PolicyMethod:
    """The minimum of process rewards; options of `ProcessAdvantage`.

    scorer: a function (prompts, steps, **columns) -> scores, or where it is; the default reads the
    sums that the embedded model works out. outcome: the run's reward counts as well.
    """
    from scoredraw.rl.process_advantages import ProcessAdvantage

    score: Callable[..., Any] = load_reward(scorer) if isinstance(scorer, str) else scorer
    place = 0 if outcome else None
    return PolicyMethod(
        lambda tokenizer: ProcessAdvantage(score, tokenizer, separator, place, **options),
        {"loss_type": "dapo"},
    )


def rlcr(**options: Any) -> PolicyMethod:
    """Correctness and a proper score of the stated confidence; options of `RLCRReward`.

    Reads the column answer by its own verifier ("exact", "math"); the run's reward is not used.
    """
    from scoredraw.rl.calibrated_reward import RLCRReward

    reward = RLCRReward(**options)
    return PolicyMethod(options={"scale_rewards": "none"}, rewards=lambda _: [reward])


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
