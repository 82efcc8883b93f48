"""Small language models that train one another: how many groups of a batch others should write.

A few nodes of one process each train the small policy by `SAPORunner`, from a seed of their own, on
three families of problems in turn. They begin with the policy that `filler_study` spoils, as the
one that ships learns slowly: it has much to win back in sums and words spelt backwards, and nothing
in least common multiples, whose groups teach nothing. A batch has eight groups of eight answers in
every arm, some written by the node itself and the rest drawn from what the others published since
its last turn: 8/0 (each alone, which is GRPO on its own answers), 6/2, 4/4 and 2/6, all by the
paper's draw among groups whose rewards differ, and 4/4 by a uniform draw without that filter. Where
fewer groups have come than are asked for, as 2/6 has to expect, a batch is smaller.

Each arm has its own learning rate (Adam), by the mean reward on spared training problems; reported
are the nodes' mean reward on test problems at the end and, as in the paper, on their own answers
over all rounds; paired by seed, which decides what all nodes draw. The policies are all the same to
begin with, and what a swarm has to give is mostly which groups teach. On a GPU where there is one.

Finished runs are in a journal in the cache; changed code is not noticed, after that delete it.
`python -m scoredraw.papers.swarm_study --workers 2` runs what it lacks. Amico et al. 2025 (SAPO),
arXiv 2509.08721.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from scoredraw.errors import require
from scoredraw.papers.filler_study import Settings as Spoiling
from scoredraw.papers.filler_study import base_policy
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    opened,
    policy_plan,
)
from scoredraw.papers.small_policy import Problem, right_answer
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    part_of,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Figure, Report, Series
from scoredraw.rl import policy_training
from scoredraw.rl.rollout_groups import RolloutGroup
from scoredraw.rl.swarm_buffer import SwarmBuffer
from scoredraw.rl.swarm_training import CausalPolicy, RoundRecord, SAPORunner
from scoredraw.rl.swarm_transports import InMemory, MemoryHub


class Arm(NamedTuple):
    """Groups of one's own in a batch, the others being others', and how these are drawn."""

    title: str
    local: int
    selection: str = "nonzero_uniform"


ALONE, FEW, EVEN, MOST = "8/0", "6/2", "4/4", "2/6"
UNIFORM = "4/4-uniform"
ARMS = {
    ALONE: Arm("8/0, each alone", 8),
    FEW: Arm(FEW, 6),
    EVEN: Arm(EVEN, 4),
    MOST: Arm(MOST, 2),
    UNIFORM: Arm("4/4, drawn without a filter", 4, "uniform"),
}
OPTIONS = {name: arm[1:] for name, arm in ARMS.items()}
TITLES = {UNTRAINED: UNTRAINED, **{name: arm.title for name, arm in ARMS.items()}}


@dataclass(frozen=True)
class Settings(PolicySettings):
    """steps: rounds of every node, a batch of `prompts` groups each, own and others', in optimizer
    steps of `minibatch` answers. samples: answers of each node. rates: of Adam."""

    families: tuple[str, ...] = ("chain_sum", "spell_backward", "lcm")
    nodes: int = 4
    steps: int = 12
    minibatch: int = 64
    max_tokens: int = 64
    spared: int = 20
    tested: int = 50
    samples: int = 4
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    seeds: int = 5


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train a swarm by an arm and measure each node: on test problems, or spared ones if tuning.

    -> reward: of each node, the mean over families. Of the trained also curve: a round's mean
    reward of all nodes' own answers; used: groups of others a node and round; silent: the share of
    rounds without a step; seconds of processor time. InputError for an unknown arm.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    taught, spared, tested = study_problems(settings)
    rows = spared if tuning else tested
    with one_thread(), torch.random.fork_rng(devices=[]):
        if name == UNTRAINED:
            net, tokenizer = opened(settings.model)
            return {"reward": [measured(net, tokenizer, rows, seed, settings)]}
        nets, rounds = swarm(ARMS[name], rate, seed, taught, settings, tell)
        _, tokenizer = opened(settings.model)
        found = [measured(net, tokenizer, rows, seed, settings) for net in nets]
    own = np.array([[record.reward for record in each] for each in rounds])
    return {
        "reward": found,
        "curve": own.mean(axis=1).tolist(),
        "used": float(np.mean([record.external for each in rounds for record in each])),
        "silent": float(np.mean([not record.stepped for each in rounds for record in each])),
        "seconds": time.process_time() - begun,
    }


def study_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    return dealt_problems(settings.families, settings.spared, settings.tested)


def swarm(
    arm: Arm, rate: float, seed: int, taught: Sequence[Problem], settings: Settings,
    tell: Step | None = None,
) -> tuple[list[Any], list[list[RoundRecord]]]:  # fmt: skip
    """The nodes' models in the end, and the records of each round, one a node.

    The nodes take turns; the clock counts rounds and a group lives for one, so that each sees what
    the others published since its last turn.
    """
    hub, now = MemoryHub(), [0.0]
    nets, runners = [], []
    for k, rng in enumerate(np.random.default_rng([seed, 30]).spawn(settings.nodes)):
        net, tokenizer = opened(settings.model)
        net.to("cuda" if torch.cuda.is_available() else "cpu")
        policy = CausalPolicy(
            net, tokenizer, torch.optim.Adam(net.parameters(), rate),
            max_new_tokens=settings.max_tokens, minibatch=settings.minibatch,
        )  # fmt: skip
        buffer = SwarmBuffer(InMemory(hub), f"node{k}", ttl=1.0, clock=lambda: now[0])
        generate = partial(written, policy, taught, settings.generations, rng)
        nets.append(net)
        runners.append(SAPORunner(policy, generate, right_answer, buffer, arm.local,
                                  settings.prompts - arm.local,
                                  selection=arm.selection, rng=rng))  # fmt: skip
    rounds = []
    for t in range(settings.steps):
        records = []
        for k, runner in enumerate(runners):
            now[0] = t + k / settings.nodes
            records.append(runner.round())
        rounds.append(records)
        if tell is not None:
            tell(t + 1, settings.steps)
    return nets, rounds


def written(
    policy: CausalPolicy, taught: Sequence[Problem], k: int, rng: np.random.Generator, n: int
) -> list[RolloutGroup]:
    """k answers to each of n different problems, of all families in turn; from the node's rng."""
    mixed = [taught[i] for i in rng.permutation(len(taught))]
    families = list(dict.fromkeys(row["family"] for row in mixed))  # in any order
    own = [[row for row in mixed if row["family"] == family] for family in families]
    rows = [own[i % len(own)][i // len(own)] for i in range(n)]
    torch.manual_seed(int(rng.integers(2**31)))
    texts = policy.answers([row["prompt"] for row in rows], k)
    return [
        RolloutGroup(row["prompt"], some, row["answer"])
        for row, some in zip(rows, texts, strict=True)
    ]


def measured(
    net: Any, tokenizer: Any, rows: Sequence[Problem], seed: int, settings: Settings
) -> float:
    """The share of right ones among sampled answers to as many problems of each family."""
    rewards = policy_training.rewards_of_samples(
        net, tokenizer, rows, policy_training.find_reward("exact"), n=settings.samples,
        max_tokens=settings.max_tokens, seed=seed,
    )  # fmt: skip
    return float(rewards.mean())


# ── the study ───────────────────────────────────────────────────────────────────────────────────


def mean_reward(record: Record) -> float:
    return float(np.mean(record["reward"]))


def oscillation(record: Record) -> float:
    """Deviation of a round's mean reward about its trend, from first differences."""
    return float(np.sqrt((np.diff(record["curve"]) ** 2).mean() / 2))


MEASURES: dict[str, Callable[[Record], float]] = {
    "reward": mean_reward,
    "worst node": lambda record: min(record["reward"]),
    "reward over rounds": lambda record: float(np.mean(record["curve"])),
    "oscillation": oscillation,
    "others' groups": itemgetter("used"),
    "rounds without a step": itemgetter("silent"),
}
SAYS = (
    "cumulative reward of 8 Qwen2.5-0.5B on ReasoningGYM: 562 for 8/0, 854 for 6/2, 1093 for 4/4 "
    "(+94 %), 946 for 2/6 (from memory)"
)
FILTER = "groups without advantages are dropped, and the rest drawn uniformly"
BOTH = ("reward", "reward over rounds")
COMPARISONS = [
    Comparison(ALONE, UNTRAINED, "reward", "training from rewards helps"),
    *(Comparison(EVEN, other, m, SAYS) for other in (ALONE, FEW) for m in BOTH),
    *(Comparison(MOST, EVEN, m, SAYS, more=False) for m in BOTH),
    *(Comparison(some, ALONE, m, SAYS) for some in (FEW, MOST) for m in BOTH),
    *(Comparison(EVEN, UNIFORM, m, FILTER) for m in BOTH),
    Comparison(UNIFORM, ALONE, "reward", "sharing helps"),
    Comparison(EVEN, ALONE, "worst node", "sharing helps"),
]
ABOUT = "Language models"


def plan_of(settings: Settings) -> StudyPlan:
    spoilt = base_policy(Spoiling(model=settings.model))
    return policy_plan(
        "swarm-study", TITLES, run_arm, settings, base=spoilt, options=OPTIONS,
        quality=mean_reward, measures=MEASURES,
    )  # fmt: skip


def add_swarm_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    settings = settings or Settings()
    plan = plan_of(settings)
    records = judge(report, ABOUT, plan, COMPARISONS, rng, progress)
    size = f"{settings.steps} rounds of {settings.nodes} nodes, 8 x {settings.generations} answers"
    note = (
        f"{settings.tested} problems of each of {', '.join(settings.families)}; {settings.seeds} "
        "seeds. Reward: of test problems, the mean of the nodes; over rounds, of their own answers "
        "in training. Oscillation: also of there being fewer of them. Others' groups: used by a "
        "node in a round."
    )
    title = f"{ABOUT}, own/others' groups, {size}, each at its best rate"
    report.tables.append(study_table(
        title, plan, list(TITLES), records, against=ALONE, less=("reward",), note=note
    ))  # fmt: skip
    title = f"{ABOUT}: reward on spared problems by learning rate"
    report.figures.append(tuning_figure(title, plan, list(ARMS), records, "reward", ALONE))
    report.figures.append(curves(settings, records))


def curves(settings: Settings, records: Sequence[Record]) -> Figure:
    lines = []
    for arm, title in list(TITLES.items())[1:]:
        mean = np.mean([record["curve"] for record in part_of(records, arm, "best")], axis=0)
        rounds = [*range(1, settings.steps + 1)]
        lines.append(Series(title, rounds, mean.tolist(), baseline=arm == ALONE))
    return Figure("line", f"{ABOUT}: reward of the nodes' own answers", "round", "reward", lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"swarm": Settings()}, arguments)


if __name__ == "__main__":
    main()
