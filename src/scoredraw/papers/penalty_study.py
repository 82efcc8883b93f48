"""A language model trained on a reward that can be fooled, under each penalty for leaving its base.

The small policy works sums out, a line a step, and samples the right answer nearly nine times of
ten. The proxy pays 1 for the right answer and `bonus` for each digit beyond those of the worked
solution, as a judge would that takes long numbers for thorough work; who follows it writes larger
numbers, and wrong ones. Arms: the policy as it came; GRPO on the proxy without a penalty; with
TRL's own KL of tokens (`beta`); with a penalty of whole answers by `SequencePenaltyReward` (KL, χ²,
√χ²); √χ² at the theory's strength, from the correlation on spared problems; GRPO on the true
reward, the ceiling. Equally many samples everywhere.

What is tuned ("rate" in tables) is the coefficient λ of a penalty. The learning rate is the same
for all, one at which the proxy alone hacks; arms without a coefficient have nothing to tune.
Rewards are centred in their group, not divided by its deviation: λ would mean nothing after that.
λ is chosen as by somebody who can check a few answers: by the share of true ones on spared
problems, for every penalty alike. What is reported is measured on test problems, paired by seed,
with each λ at its best and one for all. χ² of the policy's own samples is mostly too small.

Finished runs are in a journal in the cache; changed code is not noticed, after that delete it.
`python -m scoredraw.papers.penalty_study --workers 2` runs what it lacks. Laidlaw, Singhal and
Dragan 2024, arXiv 2403.03185.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.errors import require
from scoredraw.metrics import mean_interval
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    dealt_problems,
    judge,
    opened,
    policy_plan,
    trained,
    trained_model,
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
from scoredraw.reports import Claim, Figure, Report, Series
from scoredraw.rl import policy_methods, policy_training
from scoredraw.rl.divergences import chi2_from_log_ratios
from scoredraw.rl.occupancy import SequencePenaltyReward
from scoredraw.rl.policy_training import PolicyMethod
from scoredraw.rl.proxy_rewards import hacking_bound, penalty_coefficient, proxy_correlation

Float = NDArray[np.float64]

FAMILY = "basic_arithmetic"
CLIP = 25.0  # of a penalty: more than the proxy pays for any answer
TOGETHER = 64  # answers a forward pass of the penalty


class Arm(NamedTuple):
    title: str
    penalty: str = ""  # a kind of `SequencePenaltyReward`, "beta" for TRL's own, or none
    proxy: bool = True


NONE, TOKENS, ROOT, THEORY = "proxy", "trl_kl", "sqrt_chi2", "theory"
TRUE, SEQUENCE, CHI2 = "true", "kl", "chi2"
ARMS = {
    NONE: Arm("proxy, no penalty"),
    TOKENS: Arm("proxy, KL of tokens (TRL's beta)", "beta"),
    SEQUENCE: Arm("proxy, KL of answers", "kl"),
    CHI2: Arm("proxy, χ² of answers", "chi2"),
    ROOT: Arm("proxy, √χ² of answers", "sqrt_chi2"),
    THEORY: Arm("proxy, √χ² at the theory's λ", "sqrt_chi2"),
    TRUE: Arm("true reward", proxy=False),
}
OPTIONS = {name: (name, *arm[1:], CLIP) for name, arm in ARMS.items()}
TITLES = {UNTRAINED: "untrained", **{name: arm.title for name, arm in ARMS.items()}}
TUNED = (TOKENS, SEQUENCE, CHI2, ROOT)


@dataclass(frozen=True)
class Settings(PolicySettings):
    """bonus: what the proxy pays for a digit too many. learning_rate: of every run.

    rates, shared: of λ.
    """

    bonus: float = 0.5
    learning_rate: float = 2e-4
    max_tokens: int = 40
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    shared: float | None = 0.1


# ── rewards ─────────────────────────────────────────────────────────────────────────────────────


class ProxyReward:
    """1 for the right answer, and `bonus` for each digit more than the worked solution has.

    >>> ProxyReward(0.5)(["?"] * 2, ["4-1=3\\n#3", "4-1=13\\n#13"], ["3"] * 2, ["4-1=3\\n#3"] * 2)
    [1.0, 1.0]
    """

    def __init__(self, bonus: float) -> None:
        self.bonus, self.__name__ = bonus, "proxy"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str],
        target: Sequence[str], **_: Any,
    ) -> list[float | None]:  # fmt: skip
        right = right_answer(completions, answer)
        written, wanted = ([sum(map(str.isdigit, t)) for t in s] for s in (completions, target))
        rows = zip(right, written, wanted, strict=True)
        return [one + self.bonus * (here - there) for one, here, there in rows]


def method_of(name: str, coef: float) -> PolicyMethod:
    kind, options = ARMS[name].penalty, {"scale_rewards": "none"}
    if kind in {"", "beta"}:
        return PolicyMethod(options=options)
    made = policy_methods.chi2_penalty(coef, kind=kind, clip=CLIP, batch_size=TOGETHER)
    return replace(made, options=options)


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm at λ = rate and measure: on test problems, or on spared ones if tuning.

    -> as `measured`; of the trained also coefficient, their λ, and seconds of processor time.
    InputError for an unknown arm, and a proxy that does not correlate with the true reward.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    begun = time.process_time()
    taught, spared, tested = study_problems(settings)
    rows = spared if tuning else tested
    if name == UNTRAINED:
        with one_thread():
            return measured(settings.model, rows, seed, settings)
    arm, coef = ARMS[name], rate
    if name == THEORY:
        with one_thread():
            true, proxy, _ = sampled(*opened(settings.model), spared, seed, settings)
        coef = penalty_coefficient(*proxy_correlation(proxy, true))
    with trained(
        taught, settings, method_of(name, coef), name=name, rate=settings.learning_rate, seed=seed,
        tell=tell, reward=ProxyReward(settings.bonus if arm.proxy else 0.0),
        beta=coef if arm.penalty == "beta" else 0.0,
    ) as run:  # fmt: skip
        found = measured(trained_model(run), rows, seed, settings)
    return {**found, "coefficient": coef, "seconds": time.process_time() - begun}


def study_problems(settings: Settings) -> tuple[list[Problem], list[Problem], list[Problem]]:
    return dealt_problems([FAMILY], settings.spared, settings.tested)


def sampled(
    net: Any, tokenizer: Any, rows: Sequence[Problem], seed: int, settings: Settings
) -> tuple[Float, Float, list[str]]:
    """True reward and proxy of sampled answers, (rows x samples,), and the answers."""
    texts: list[str] = []

    def keep(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
        texts.extend(completions)
        return [0.0] * len(completions)

    policy_training.rewards_of_samples(
        net, tokenizer, rows, keep, n=settings.samples, max_tokens=settings.max_tokens, seed=seed
    )
    asked = [row for row in rows for _ in range(settings.samples)]
    prompts, gold, solved = ([row[k] for row in asked] for k in ("prompt", "answer", "target"))
    proxy = np.array(ProxyReward(settings.bonus)(prompts, texts, gold, solved), np.float64)
    return np.array(right_answer(texts, gold)), proxy, texts


def measured(source: str, rows: Sequence[Problem], seed: int, settings: Settings) -> Record:
    """Means of sampled answers: true reward, proxy, length; and how far the policy went.

    kl, log_chi2: the mean of d = log π/π_base of whole answers, and the log of the mean of e^d. Of
    the base itself in place of these: r and the deviations of proxy and true reward.
    """
    net, tokenizer = opened(source)
    true, proxy, texts = sampled(net, tokenizer, rows, seed, settings)
    found: Record = {
        "true": float(true.mean()), "proxy": float(proxy.mean()),
        "length": float(np.mean([len(text) for text in texts])),
    }  # fmt: skip
    if source == settings.model:
        r, sigma = proxy_correlation(proxy, true)
        return {**found, "r": r, "proxy_sd": sigma, "true_sd": float(true.std())}
    end = tokenizer.eos_token_id
    ids = [[*one, end][: settings.max_tokens] for one in tokenizer(texts)["input_ids"]]
    base, _ = opened(settings.model)
    away = SequencePenaltyReward(net, base, tokenizer, kind="kl", batch_size=TOGETHER)  # -d
    prompts = [row["prompt"] for row in rows for _ in range(settings.samples)]
    d = -np.array(away(prompts, texts, completion_ids=ids), np.float64)
    chi2 = float(chi2_from_log_ratios(torch.from_numpy(d)))
    return {**found, "kl": float(d.mean()), "log_chi2": math.log1p(chi2)}


# ── the study ───────────────────────────────────────────────────────────────────────────────────

MEASURES: dict[str, Callable[[Record], float]] = {
    "true reward": itemgetter("true"),
    "proxy reward": itemgetter("proxy"),
    "KL": itemgetter("kl"),
    "log(1 + χ²)": itemgetter("log_chi2"),
    "length": itemgetter("length"),
    "r": itemgetter("r"),
    "λ": itemgetter("coefficient"),
}
HACKS = "unregularised optimisation hacks: far below the reference"
HELPS = "KL of action distributions helps in part"
BEST = "√χ² on occupancies gives the best true reward in every setting"
SAFE = "at λ = σ̃ √(1/r² - 1) the true reward cannot fall below the reference's"
WEAK = "as λ falls, action distributions hack first, then KL, then √χ²"
SAME = "χ² keeps the true reward where KL does not, at the same gain by the proxy"
ABOUT = "Language model"
BOUND = "the bound holds for every policy"
COMPARISONS = [
    Comparison(NONE, UNTRAINED, "proxy reward", "the proxy is learned"),
    Comparison(NONE, UNTRAINED, "true reward", HACKS, more=False),
    Comparison(TRUE, UNTRAINED, "true reward", "there is something to learn"),
    Comparison(TOKENS, NONE, "true reward", HELPS),
    *(Comparison(ROOT, other, "true reward", BEST) for other in (TOKENS, SEQUENCE, CHI2, NONE)),
    Comparison(ROOT, UNTRAINED, "true reward", "the proxy, penalised, is of use"),
    Comparison(THEORY, UNTRAINED, "true reward", SAFE),
    Comparison(CHI2, SEQUENCE, "true reward", SAME),
    *(
        Comparison(ROOT, other, "true reward", WEAK, part="shared")
        for other in (SEQUENCE, TOKENS, UNTRAINED)
    ),
    Comparison(SEQUENCE, TOKENS, "true reward", WEAK, part="shared"),
]


def plan_of(settings: Settings) -> StudyPlan:
    return policy_plan(
        "penalty-study", TITLES, run_arm, settings, base=settings.model, options=OPTIONS,
        quality=itemgetter("true"), measures=MEASURES,
        fixed=[name for name in TITLES if name not in TUNED],
    )  # fmt: skip


def add_penalty_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge."""
    settings = settings or Settings()
    plan = plan_of(settings)
    records = judge(report, ABOUT, plan, COMPARISONS, rng, progress)
    report.claims.extend(
        same_gain(plan, records, arm, other, part)
        for arm, other in ((ROOT, SEQUENCE), (ROOT, TOKENS), (CHI2, SEQUENCE))
        for part in ("best", "shared")
    )
    report.claims.append(bound(plan, records))
    note = (
        f"{settings.tested} problems, {settings.samples} answers to each; {settings.seeds} seeds."
    )
    note += " r: of proxy and true reward. KL and χ²: of whole answers, from samples."
    for part, at in (("best", "each at its best λ"), ("shared", "all at one λ")):
        report.tables.append(study_table(
            f"{ABOUT}, a proxy that can be fooled, after {settings.size}, {at}", plan,
            list(TITLES), records, part=part, against=UNTRAINED,
            less=("true reward", "proxy reward"), note=note,
        ))  # fmt: skip
    title = f"{ABOUT}: spared problems by λ"
    tuned = tuning_figure(title, plan, TUNED, records, "true reward", SEQUENCE)
    report.figures.extend((tuned, trade(plan, records)))


def same_gain(plan: StudyPlan, records: Sequence[Record], arm: str, other: str, part: str) -> Claim:
    """The arm's true reward less the other's where it earns as much by the proxy.

    Straight lines between the other's runs of a seed, the untrained and the unpenalised policy.
    """
    found = []
    for own in part_of(records, arm, part):
        places = [(other, "best"), (other, "shared"), (UNTRAINED, "best"), (NONE, "best")]
        runs = [r for where in places for r in part_of(records, *where) if r["seed"] == own["seed"]]
        line = np.array(sorted((r["proxy"], r["true"]) for r in runs))
        found.append(own["true"] - float(np.interp(own["proxy"], line[:, 0], line[:, 1])))
    name = f"true reward: {plan.titles[arm]} - {plan.titles[other]}, {part} λ, equal proxy"
    return Claim.at_least(f"{ABOUT}, {name}", SAME, mean_interval(found), 0.0)


def bound(plan: StudyPlan, records: Sequence[Record]) -> Claim:
    """True gain less its bound, of the arm for which that is least on the mean over seeds."""
    bases = {record["seed"]: record for record in part_of(records, UNTRAINED, "best")}

    def slack(record: Record) -> float:
        base = bases[record["seed"]]
        gain, own = ((record[k] - base[k]) / base[f"{k}_sd"] for k in ("proxy", "true"))
        chi2 = max(math.expm1(record["log_chi2"]), 0.0)  # of samples, it may fall below 0
        return own - float(hacking_bound(base["r"], gain, chi2, sharp=False))

    each = {
        (arm, part): mean_interval([slack(record) for record in part_of(records, arm, part)])
        for arm in ARMS for part in ("best", "shared") if part_of(records, arm, part)
    }  # fmt: skip
    (arm, part), least = min(each.items(), key=lambda pair: pair[1].value)
    name = f"{ABOUT}, true gain - its bound in deviations, least: {plan.titles[arm]}, {part} λ"
    return Claim.at_least(name, BOUND, least, 0.0)


def trade(plan: StudyPlan, records: Sequence[Record]) -> Figure:
    points = []
    for arm, name in plan.titles.items():
        own = [r for r in records if r["arm"] == arm and r["part"] != "tuning"]
        x, y = ([r[key] for r in own] for key in ("proxy", "true"))
        points.append(Series(name, x, y, baseline=arm == UNTRAINED))
    title = f"{ABOUT}, test problems: what the proxy pays and what that is worth"
    return Figure("scatter", title, "proxy reward", "true reward", points)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study."""
    study_command(plan_of, {"penalties": Settings()}, arguments)


if __name__ == "__main__":
    main()
