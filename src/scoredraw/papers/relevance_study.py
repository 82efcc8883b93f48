"""What a language model becomes when relevance, length or both are its reward.

stories15M, which writes children's stories, is taught what instructions and the beginnings of their
answers look like, and trained on other, short ones by R³, by what it is made of (relevance alone,
length, length without repetition), by R³ without its branch for questions with one answer or with
types of question dealt by chance, and by R³ with a KL penalty. The instructions are those of
$SCOREDRAW_ALPACAFARM (`answered_questions`), the retriever is a sentence encoder (cosine). What is
learned is also judged by a retriever that no arm is rewarded by: words that instruction and answer
share, by TF-IDF; and by how surprised the policy before training is at it.

There is no truth to tune by, so each rate is chosen by what a user sees: the arm's own reward, on
spared instructions. What is reported is measured on others again.

`SCOREDRAW_ALPACAFARM=... python -m scoredraw.papers.relevance_study --workers 2` runs what the
journal lacks.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scoredraw.errors import MissingExtraError, require
from scoredraw.metrics import mean_interval
from scoredraw.models import TransformersModel
from scoredraw.papers.answered_questions import VARIABLE, by_words, instructions
from scoredraw.papers.policy_runs import (
    UNTRAINED,
    PolicySettings,
    judge,
    opened,
    policy_plan,
    sampled_texts,
    trained,
    trained_model,
)
from scoredraw.papers.sentence_embeddings import model_folder
from scoredraw.papers.small_policy import Problem, fine_tuned
from scoredraw.papers.studies import (
    Comparison,
    Progress,
    Record,
    Step,
    StudyPlan,
    per_seed,
    study_command,
    study_table,
    tuning_figure,
)
from scoredraw.papers.training import one_thread
from scoredraw.reports import Claim, Report, ReportTable
from scoredraw.rl.policy_training import PolicyMethod
from scoredraw.rl.relevance_reward import (
    ABLATIONS,
    CONSTRAINED,
    OPEN,
    MeanPooledEncoder,
    R3Reward,
)


class Arm(NamedTuple):
    """of: `ABLATIONS`; dealt: types of question by chance; beta: of the KL to the untrained policy.

    TRL's PPO, which the paper trains by, begins at .2 and adapts it by .03 % a batch at most.
    """

    title: str
    of: str = "R3"
    dealt: bool = False
    beta: float = 0.0


ARMS = {
    "R3": Arm("R³"),
    "relevance": Arm("relevance alone", "relevance"),
    "LI": Arm("length alone", "LI"),
    "LI_RP": Arm("length · repetition", "LI_RP"),
    "R_OE": Arm("R³ without its branch", "R_OE"),
    "dealt": Arm("R³, types by chance", dealt=True),
    "KL": Arm("R³ with KL", beta=0.2),
}
OPTIONS = {name: (ABLATIONS[arm.of], arm.dealt, arm.beta) for name, arm in ARMS.items()}
TITLES = {UNTRAINED: UNTRAINED, **{name: arm.title for name, arm in ARMS.items()}}
SPLIT = 0  # the seed that deals instructions out
STORIES = "stories"
SFT: dict[str, Any] = {"steps": 100, "batch": 16, "learning_rate": 2e-4}


@dataclass(frozen=True)
class Settings(PolicySettings):
    """model: "stories": stories15M after SFT.

    data: the file of instructions. taught, spared, tested: of those of up to `asked` letters, to
    train on from rewards, to tune by and to measure by. SFT has the rest of up to `longest`
    letters, and `shown` letters of their answers.
    """

    data: str = ""
    model: str = STORIES
    asked: int = 80
    longest: int = 300
    shown: int = 120
    steps: int = 24
    prompts: int = 4
    max_tokens: int = 40
    taught: int = 100
    spared: int = 40
    tested: int = 80
    samples: int = 4


def settings_of_environment() -> Settings | None:
    """The usual settings; None where no file is named."""
    path = os.environ.get(VARIABLE)
    return Settings(data=path) if path else None


# ── instructions and the retriever ──────────────────────────────────────────────────────────────


def beginning(text: str, letters: int) -> str:
    """As many whole words as fit, or the letters of the first one.

    >>> beginning("Exercise and meditate", 13), beginning("Antidisestablish", 4)
    ('Exercise and', 'Anti')
    """
    cut = text[: letters + 1]
    return (cut if len(cut) <= letters else cut.rpartition(" ")[0]) or text[:letters]


@cache
def instruction_rows(settings: Settings) -> tuple[list[Problem], ...]:
    """Instructions to show in SFT, to train on, to tune by and to test with, none twice."""
    items, rows = instructions(Path(settings.data)), {}
    for question, answer, exact in zip(items.questions, items.answers, items.exact, strict=True):
        asked, said = (" ".join(text.split()) for text in (question, answer))
        if asked and said:
            kind = CONSTRAINED if exact else OPEN
            rows[asked] = {
                "prompt": asked + "\n", "target": beginning(said, settings.shown),
                "reference": said, "qtype": kind, "kind": kind,
            }  # fmt: skip
    short = [row for asked, row in rows.items() if len(asked) <= settings.asked]
    ends = np.cumsum([settings.tested, settings.spared, settings.taught])
    wanted = f"more than {ends[-1]} instructions of {settings.asked} letters"
    require(len(short) > ends[-1], VARIABLE, f"{len(short)} of them", wanted)
    order = np.random.default_rng(SPLIT).permutation(len(short))
    tested, spared, taught, rest = ([short[i] for i in part] for part in np.split(order, ends))
    long = [row for asked, row in rows.items() if settings.asked < len(asked) <= settings.longest]
    return rest + long, taught, spared, tested


@cache
def retriever() -> Callable[[list[str]], Any]:
    """Unit vectors of texts by all-MiniLM-L6-v2."""
    encoder = MeanPooledEncoder.from_pretrained(str(model_folder()))

    def embed(texts: list[str]) -> Any:
        vectors = encoder(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed


@cache
def judge_of_words(settings: Settings) -> R3Reward:
    """The cosine of TF-IDF of words, fitted on all instructions and answers."""
    rows = [row for part in instruction_rows(settings) for row in part]
    embed = by_words([row[key] for key in ("prompt", "reference") for row in rows])
    return R3Reward(embed, off=ABLATIONS["relevance"])


def reward_of(ablation: str, settings: Settings) -> R3Reward:
    off = ABLATIONS[ablation]
    return R3Reward(retriever(), settings.max_tokens, interp_in=(0.0, 1.0), off=off)


def with_dealt_types(rows: Sequence[Problem]) -> list[Problem]:
    """The rows with their own types in another order, always the same."""
    kinds = [row["qtype"] for row in rows]
    dealt = [kinds[i] for i in np.random.default_rng(SPLIT).permutation(len(kinds))]
    return [{**row, "qtype": kind} for row, kind in zip(rows, dealt, strict=True)]


def copied(question: str, answer: str) -> float:
    """The longest run of the question's letters that stands in the answer, as a share of it.

    >>> copied("Name a fruit.", "a fruit is"), copied("Name a fruit.", "Name a fruit. Name")
    (0.5384615384615384, 1.0)
    """
    match = SequenceMatcher(None, question, answer, autojunk=False).find_longest_match()
    return match.size / len(question)


def base_policy(settings: Settings) -> str:
    """The folder of the policy before training from rewards; made once."""
    if settings.model != STORIES:
        return settings.model
    return str(fine_tuned(instruction_rows(settings)[0], source=STORIES, **SFT))


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def run_arm(
    name: str, rate: float, seed: int, tuning: bool = False, tell: Step | None = None, *,
    settings: Settings,
) -> Record:  # fmt: skip
    """Train by an arm and measure: on test instructions, or on spared ones if tuning.

    -> `measured`; of a trained policy also reward, its own, and seconds of processor time.
    """
    require(name in TITLES, "name", repr(name), f"one of {', '.join(TITLES)}")
    _, taught, spared, tested = instruction_rows(settings)
    if name == UNTRAINED:
        with one_thread():
            return measured(settings.model, tested, None, seed, settings)
    begun, arm, method = time.process_time(), ARMS[name], PolicyMethod()
    rows, reward = spared if tuning else tested, reward_of(arm.of, settings)
    if arm.dealt:
        taught, rows = with_dealt_types(taught), with_dealt_types(rows)
    with trained(
        taught, settings, method, name=name, rate=rate, seed=seed, tell=tell, reward=reward,
        beta=arm.beta,
    ) as run:  # fmt: skip
        found = measured(trained_model(run), rows, reward, seed, settings)
    return {**found, "seconds": time.process_time() - begun}


def measured(
    model: str, rows: Sequence[Problem], reward: R3Reward | None, seed: int, settings: Settings
) -> Record:
    """Means over sampled answers of a policy; an empty answer has no relevance.

    words, exact words: of all, and of those to questions with one answer; relevance to the
    question, and of the latter to the reference; shared words; repetition: RP; copied; surprise:
    -log p of a token by the policy before training.
    """
    asked, texts = sampled_texts(model, rows, seed, settings)
    columns = {key: [row[key] for row in asked] for key in ("prompt", "qtype", "reference")}
    prompts = columns.pop("prompt")
    exact = [i for i, row in enumerate(asked) if row["kind"] == CONSTRAINED]
    some = [texts[i] for i in exact]
    by_reference = reward_of("relevance", settings)([asked[i]["reference"] for i in exact], some)
    parts, words = reward_of("R_OE", settings).factors(prompts, texts), judge_of_words(settings)
    pairs = zip(prompts, texts, strict=True)
    found = {
        "words": float(100 * parts.length.mean()),
        "exact words": float(100 * parts.length[exact].mean()),
        "relevance": float(np.nan_to_num(parts.relevance).mean()),
        "to the reference": float(np.array(by_reference, np.float64).mean()),
        "shared words": float(np.array(words(prompts, texts), np.float64).mean()),
        "repetition": float(parts.repetition.mean()),
        "copied": float(np.mean([copied(prompt.strip(), text) for prompt, text in pairs])),
        "surprise": surprise(settings.model, prompts, texts),
    }
    if reward is not None:
        own = np.array(reward(prompts, texts, **columns), np.float64)
        found["reward"] = float(own.mean())
    return found


def surprise(model: str, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """-log p of a token of the texts after their prompts, in nats."""
    scorer = TransformersModel(*opened(model))
    logp = [scorer.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text]
    return -float(np.concatenate([np.zeros(0), *logp]).mean())


# ── the study ───────────────────────────────────────────────────────────────────────────────────

LEFT_OUT = "Left out, a language model trained by R³"
MEASURES: dict[str, Callable[[Record], float]] = {
    "words": itemgetter("words"),
    "exact: words": itemgetter("exact words"),
    "relevance": itemgetter("relevance"),
    "exact: to the reference": itemgetter("to the reference"),
    "shared words": itemgetter("shared words"),
    "RP": itemgetter("repetition"),
    "copied": itemgetter("copied"),
    "surprise": itemgetter("surprise"),
    "its reward": itemgetter("reward"),
}


def plan_of(settings: Settings) -> StudyPlan:
    """The study; makes the policy it begins with."""
    return policy_plan(
        "relevance-study", TITLES, run_arm, settings, base=base_policy(settings),
        options=OPTIONS, quality=itemgetter("reward"), measures=MEASURES,
        data=hashlib.blake2s(Path(settings.data).read_bytes()).hexdigest(),
    )  # fmt: skip


SOUND = "the study itself: a reward is learned"
LONGER = "answers become longer"
RELEVANT = "and stay relevant"
COPIES = "by relevance alone 40 % of answers are copies of the question, by R³ they are not"
PARTS = "the parts belong together: each stops what another lets through"
BRANCH = "what has one answer is measured by it, whatever its length"
NEAR = "the KL keeps the policy near the one it was"

COMPARISONS = [
    Comparison("relevance", UNTRAINED, "relevance", SOUND),
    Comparison("LI", UNTRAINED, "words", SOUND),
    Comparison("R3", UNTRAINED, "words", LONGER),
    Comparison("R3", UNTRAINED, "relevance", RELEVANT),
    Comparison("R3", UNTRAINED, "shared words", RELEVANT),
    Comparison("R3", "LI", "relevance", PARTS),
    Comparison("R3", "LI_RP", "relevance", PARTS),
    Comparison("R3", "relevance", "words", PARTS),
    Comparison("R3", "LI", "RP", PARTS),
    Comparison("LI_RP", "LI", "RP", PARTS),
    Comparison("relevance", "R3", "copied", COPIES),
    *(Comparison("R3", other, "exact: to the reference", BRANCH) for other in ("R_OE", "dealt")),
    *(Comparison("R3", other, "exact: words", BRANCH, more=False) for other in ("R_OE", "dealt")),
    Comparison("KL", "R3", "surprise", NEAR, more=False),
    Comparison("KL", UNTRAINED, "words", LONGER),
    Comparison("KL", UNTRAINED, "relevance", RELEVANT),
]


def add_relevance_study(
    report: Report, rng: int, settings: Settings | None = None, progress: Progress | None = None
) -> None:
    """Run what the journal lacks, and judge; without instructions or stories15M, say so."""
    settings = settings_of_environment() if settings is None else settings
    if settings is None:
        report.notes.append(f"{LEFT_OUT}: {VARIABLE} names no file.")
        return
    try:
        retriever()
        plan = plan_of(settings)
    except MissingExtraError as absent:
        report.notes.append(f"{LEFT_OUT}: {absent}.")
        return
    about = "Language model, instructions"
    records = judge(report, about, plan, COMPARISONS, rng, progress)
    seldom = mean_interval(per_seed(plan, records, "R3", "RP"))
    says, rule = "and hardly repeat themselves", "mean RP over seeds at least .95"
    report.claims.append(Claim.at_least(f"{about}, RP: R³", says, seldom, 0.95, rule))
    copies = mean_interval(per_seed(plan, records, "relevance", "copied"))
    rule = "copied at least .4, as it is where 40 % are whole copies"
    name = f"{about}, copied: relevance alone"
    report.claims.append(Claim.at_least(name, COPIES, copies, 0.4, rule))
    report.tables.append(results(plan, settings, records))
    title = f"{about}: each arm's own reward by learning rate"
    report.figures.append(tuning_figure(title, plan, list(TITLES), records, "reward"))


def results(plan: StudyPlan, settings: Settings, records: Sequence[Record]) -> ReportTable:
    note = (
        f"{settings.tested} test instructions, {settings.samples} answers each, at most "
        f"{settings.max_tokens} tokens; {settings.seeds} seeds. Relevance: cosine with the "
        "instruction by all-MiniLM-L6-v2; shared words: by TF-IDF, which no arm is rewarded by. "
        "RP: different of all trigrams of words. Copied: the longest run of the instruction's "
        "letters, as a share of it. Exact: questions with one answer. Surprise: -log p of a token "
        f"by the untrained policy. KL: β = {ARMS['KL'].beta}, in the loss. Its reward: of each arm "
        "its own, not to be compared."
    )
    return study_table(
        f"Language model and instructions, after {settings.size}, each at its best rate", plan,
        list(TITLES), records, against=UNTRAINED,
        less=("words", "relevance", "shared words", "copied"), note=note,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the study; InputError without instructions."""
    settings = settings_of_environment()
    require(settings is not None, VARIABLE, "nothing", "a file of instructions")
    study_command(plan_of, {"instructions": settings}, arguments)


if __name__ == "__main__":
    main()
