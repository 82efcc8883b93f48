"""Train a language model from rewards: problems in, a better model out, by TRL's GRPO.

    problems -> sample answers -> reward -> advantages of the method -> clipped step -> again

The method says how answers are credited (`PolicyMethod`); TRL does the rest. A run lives in a
folder: checkpoints while it goes on, so that the same call resumes it, the model at its end, and
`run.json` with what was measured on held-out problems before and after.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.answers import miss_probabilities
from scoredraw.errors import InputError, require
from scoredraw.journal import atomic_path
from scoredraw.math_answers import equality
from scoredraw.metrics import Estimate, paired_difference
from scoredraw.reports import plain as plain_values
from scoredraw.rl.reward_functions import (
    GuardedReward,
    RewardFunction,
    completion_text,
    load_reward,
    number_or_none,
)
from scoredraw.small_models import load_model

EMBEDDED = "embedded"
FOLDER = Path(__file__).parents[1] / "data" / "small-policy"
PROMPTS = ("prompt", "problem", "question")
RIGHT = 0.5  # a larger reward counts as right in pass@k

Row = dict[str, float]


@dataclass(frozen=True)
class PolicyMethod:
    """What a method changes of TRL's GRPO.

    advantage: makes what `AdvantageGRPOTrainer` takes out of the tokenizer, None for TRL's own;
    options: of GRPOConfig; rewards: makes the reward functions of the run out of the user's;
    penalty: makes one that is added to them out of the policy and its tokenizer; trainer:
    "module:class" of another trainer; trainer_options: what it takes besides, from the number of
    optimizer steps.
    """

    advantage: Callable[[Any], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rewards: Callable[[RewardFunction], Sequence[RewardFunction]] | None = None
    penalty: Callable[[Any, Any], RewardFunction] | None = None
    trainer: str = "scoredraw.rl.trainer:AdvantageGRPOTrainer"
    trainer_options: Callable[[int], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class PolicyRun:
    """A finished run: log has a row a batch; before and after: pass@k of held-out problems by k.

    gain: what pass@1 gained, with its interval over the problems; None where none was held out.
    """

    folder: Path
    log: list[Row]
    before: dict[int, float]
    after: dict[int, float]
    gain: Estimate | None
    seconds: float


# ── problems and rewards ────────────────────────────────────────────────────────────────────────


def read_problems(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a column "prompt" (from "prompt", "problem" or "question"), others kept.

    Raises InputError for no rows, rows without a prompt, and columns that some rows lack.

    >>> read_problems([{"question": "1+1=", "answer": "2"}])
    [{'prompt': '1+1=', 'answer': '2'}]
    """
    require(len(rows) > 0, "problems", "none", "one or more")
    name = next((p for p in PROMPTS if p in rows[0]), None)
    require(name is not None, "problems", f"columns {sorted(rows[0])}", " or ".join(PROMPTS))
    assert name is not None
    for i, row in enumerate(rows):
        same = set(row) == set(rows[0])
        require(same, f"problems, row {i}", f"columns {sorted(row)}", f"{sorted(rows[0])}")
        fine = bool(row[name]) and isinstance(row[name], (str, list))
        require(fine, f"problems, row {i}", repr(row[name]), f"a {name}: text or messages")
    return [{"prompt": row[name], **{k: v for k, v in row.items() if k != name}} for row in rows]


def conversations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, a prompt that is a text being what a user says.

    >>> conversations([{"prompt": "1+1=", "answer": "2"}])
    [{'prompt': [{'role': 'user', 'content': '1+1='}], 'answer': '2'}]
    """

    def messages(prompt: Any) -> Any:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    return [{**row, "prompt": messages(row["prompt"])} for row in rows]


def final_answer(text: str) -> str:
    r"""What a text gives as its answer: in its last <answer> or \boxed{}, or after its last `#`.

    The text itself, without surrounding blanks, where none of these is.

    >>> final_answer("so <answer> 7 </answer>"), final_answer("3+4=7 #7"), final_answer(" 7 ")
    ('7', '7', '7')
    >>> final_answer(r"hence \boxed{x^{2}}.")
    'x^{2}'
    """
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if "\\boxed{" in text:
        return _braced(text.rpartition("\\boxed{")[2]).strip()
    if "#" in text:
        return text.rpartition("#")[2].partition("\n")[0].strip()
    return text.strip()


def _braced(text: str) -> str:
    """What comes before the brace that closes one that is open already."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return text


class AnswerReward:
    """1 where the final answer is the column `answer`, else 0; None where there is no such answer.

    equal: "exact", or "math" for mathematics by math-verify (1/2 is 0.5).

    >>> AnswerReward()(prompts=["1+1="], completions=["#2"], answer=["2"])
    [1.0]
    """

    def __init__(self, equal: str = "exact") -> None:
        self.equal = None if equal == "exact" else equality(equal)
        self.__name__ = f"{equal}_answer"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any
    ) -> list[float | None]:
        said = [final_answer(completion_text(completion)) for completion in completions]
        return [
            None if gold is None else float(bool(self._same(text, str(gold))))
            for text, gold in zip(said, answer, strict=True)
        ]

    def _same(self, text: str, gold: str) -> bool:
        return text == gold if self.equal is None else self.equal(text, gold)


def find_reward(name: str) -> RewardFunction:
    """ "exact" or "math" (needs a column answer), or the function at "module:function"; guarded."""
    if ":" in name:
        return GuardedReward(load_reward(name))
    require(name in {"exact", "math"}, "reward", repr(name), "exact, math or module:function")
    return GuardedReward(AnswerReward(name))


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


def rewards_of_samples(
    model: Any, tokenizer: Any, problems: Sequence[Mapping[str, Any]], reward: RewardFunction, *,
    n: int = 8, max_tokens: int = 256, seed: int = 0, batch: int = 256,
) -> NDArray[np.float64]:  # fmt: skip
    """(P, n) rewards of n sampled answers a problem at temperature 1; NaN where there is none."""
    rows = [problem for problem in problems for _ in range(n)]
    found: list[float | None] = []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            texts = _sampled(model, tokenizer, [row["prompt"] for row in some], max_tokens)
            columns = {key: [row[key] for row in some] for key in some[0] if key != "prompt"}
            found += reward(prompts=[row["prompt"] for row in some], completions=texts, **columns)
    model.train(training)
    return np.array([np.nan if r is None else r for r in found]).reshape(len(problems), n)


def _sampled(model: Any, tokenizer: Any, prompts: Sequence[Any], max_tokens: int) -> list[str]:
    plain = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    inputs = tokenizer(plain, return_tensors="pt", padding=True, padding_side="left").to(
        model.device
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new = out[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def pass_at(rewards: NDArray[np.float64]) -> dict[int, float]:
    """Unbiased pass@k, k = 1, 2, 4 .. n, of rewards (P, n); right is a reward above RIGHT.

    >>> pass_at(np.array([[1.0, 0.0], [0.0, 0.0]]))
    {1: 0.25, 2: 0.5}
    """
    n = rewards.shape[1]
    if not rewards.size:
        return {}
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    right = (rewards > RIGHT).sum(axis=1)
    return {
        k: float(1 - miss)
        for k, miss in zip(ks, miss_probabilities(n, right, ks).mean(axis=0), strict=True)
    }


# ── the run ─────────────────────────────────────────────────────────────────────────────────────


def train_policy(
    problems: Sequence[Mapping[str, Any]], out: Path, *, model: str = EMBEDDED,
    reward: str | RewardFunction = "exact", method: PolicyMethod | None = None, about: str = "grpo",
    steps: int = 100, prompts: int = 8, generations: int = 8, learning_rate: float | None = None,
    max_tokens: int | None = None, beta: float = 0.0, held_out: int = 32, samples: int = 8,
    save_every: int = 10, plain: bool = False, seed: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
) -> PolicyRun:  # fmt: skip
    """Train `model` on problems from a reward and leave it in the folder `out`.

    problems: as `read_problems`; the last `held_out` (at most a quarter) only measure; none where a
    method has a reward of its own and the problems lack answers for `reward`. model: what
    `load_model` takes, or "embedded". reward: as `find_reward`, or a function under TRL's contract.
    about: the method's name. steps: batches of `prompts` problems with `generations` answers each;
    a method may make two optimizer steps of a batch. learning_rate: 1e-6, of the embedded model
    5e-5. max_tokens: of an answer, 256 (embedded 48). beta: KL to the model as it came. samples:
    answers a held-out problem. plain: a text is a prompt to go on from, also for a model with a
    chat template, where it is else what the user says. progress: called with the batch, all batches
    and TRL's numbers at the first step of each.

    The same call resumes an interrupted run from its last checkpoint (every save_every batches).
    Raises InputError, before anything is written, for problems and rewards as those functions and
    problems without what the rewards read, fewer than two generations, and a folder that holds
    something else or a run with other settings.
    """
    rows = read_problems(problems)
    method = method or PolicyMethod()
    require(generations >= 2, "generations", generations, "2 or more answers a problem")
    for name, count in (("steps", steps), ("prompts", prompts), ("save_every", save_every)):
        require(count >= 1, name, count, "a positive count")
    small = model == EMBEDDED
    learning_rate = (5e-5 if small else 1e-6) if learning_rate is None else learning_rate
    max_tokens = (48 if small else 256) if max_tokens is None else max_tokens
    scorer = find_reward(reward) if isinstance(reward, str) else GuardedReward(reward)
    rewards = _rewards_of(method, scorer, rows)
    readable = reads_answers(reward, rows, needed=method.rewards is None)
    spared = min(held_out, len(rows) // 4) if readable else 0
    said = json.dumps(rows, default=str).encode()
    rows, measured = rows[: len(rows) - spared], rows[len(rows) - spared :]
    settings = {
        "model": model, "method": about, "reward": scorer.__name__, "steps": steps,
        "prompts": prompts, "generations": generations, "learning_rate": learning_rate,
        "max_tokens": max_tokens, "beta": beta, "seed": seed, "problems": len(rows),
        "problems_crc32": zlib.crc32(said), "held_out": spared, "samples": samples, "plain": plain,
        "options": dict(method.options),
    }  # fmt: skip
    begun = time.perf_counter()
    net, tokenizer = open_policy(str(FOLDER) if small else model)
    claim_folder(out, settings)
    if tokenizer.chat_template and not plain:
        rows, measured = conversations(rows), conversations(measured)

    def quality() -> NDArray[np.float64]:
        rows = measured if samples else []
        found = rewards_of_samples(
            net, tokenizer, rows, scorer, n=samples, max_tokens=max_tokens, seed=seed
        )
        return np.nan_to_num(found, nan=0.0)

    before = quality()
    trainer = _trainer(net, tokenizer, rows, rewards, method, settings, out, save_every, progress)
    trainer.train(resume_from_checkpoint=_last_checkpoint(out))
    log = [_numbers(row) for row in trainer.state.log_history if "reward" in row]
    after = quality()
    right = [(rewards > RIGHT).mean(axis=1) for rewards in (after, before)] if before.size else None
    gain = None if right is None else paired_difference(*right)
    seconds = time.perf_counter() - begun
    run = PolicyRun(out, log, pass_at(before), pass_at(after), gain, seconds)
    net.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    facts = {
        **settings, "before": run.before, "after": run.after, "gain": gain, "seconds": seconds,
        "log": log,
    }  # fmt: skip
    with atomic_path(out / "run.json") as path:
        path.write_text(json.dumps(plain_values(facts), indent=1))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return run


def _rewards_of(
    method: PolicyMethod, scorer: RewardFunction, rows: Sequence[Mapping[str, Any]]
) -> list[RewardFunction]:
    """The reward functions of a run; InputError where a method's own lack what they read."""
    rewards = [scorer] if method.rewards is None else list(method.rewards(scorer))
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    for own in rewards:
        if own is not scorer:  # which never raises
            own(prompts=prompts, completions=[""] * len(rows), **columns)
    return rewards


def reads_answers(
    reward: str | RewardFunction, rows: Sequence[Mapping[str, Any]], *, needed: bool = True
) -> bool:
    """Whether "exact" and "math" find their column answer; InputError where it is needed."""
    fine = not isinstance(reward, str) or ":" in reward or "answer" in rows[0]
    came, wanted = f"columns {', '.join(rows[0])}", f"answer, for the reward {reward}"
    require(fine or not needed, "problems", came, wanted)
    return fine


def _trainer(
    net: Any, tokenizer: Any, rows: list[dict[str, Any]], rewards: list[RewardFunction],
    method: PolicyMethod, settings: Mapping[str, Any], out: Path, save_every: int,
    progress: Callable[[int, int, Row], None] | None,
) -> Any:  # fmt: skip
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig

    batches = int(method.options.get("num_iterations", 1))
    total = settings["steps"] * batches
    config = GRPOConfig(
        output_dir=str(out / "checkpoints"), max_steps=total,
        per_device_train_batch_size=settings["prompts"] * settings["generations"],
        num_generations=settings["generations"], max_completion_length=settings["max_tokens"],
        learning_rate=settings["learning_rate"], beta=settings["beta"], seed=settings["seed"],
        save_strategy="steps", save_steps=save_every * batches, save_total_limit=1,
        logging_steps=1, report_to=[], disable_tqdm=True, activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        **method.options,
    )  # fmt: skip

    class Live(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if progress is not None and logs and "reward" in logs:
                progress(-(-state.global_step // batches), settings["steps"], _numbers(logs))

    kind: Callable[..., Any] = load_reward(method.trainer)  # a class is found as a function is
    options = dict(method.trainer_options(total)) if method.trainer_options else {}
    if method.advantage is not None:
        options["advantage_fn"] = method.advantage(tokenizer)
    rewards = rewards + ([method.penalty(net, tokenizer)] if method.penalty else [])
    trainer = kind(
        model=net, reward_funcs=rewards, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Live()], **options,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _numbers(logs: Mapping[str, Any]) -> Row:
    found = {key: number_or_none(value) for key, value in logs.items()}
    return {key: value for key, value in found.items() if value is not None}


def open_policy(source: str) -> tuple[Any, Any]:
    """A model of `load_model` in float32 and its tokenizer, which can pad, on the left."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar a checkpoint would cut the table of steps to pieces
    net, tokenizer = load_model(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return net.float(), tokenizer


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this run's, or see that it is; InputError if it is another's."""
    notes = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"out: got {out}, which is a file, want a folder")
    if notes.is_file():
        before = json.loads(notes.read_text())
        now = json.loads(json.dumps(settings, default=str))
        changed = [key for key in now if before.get(key) != now[key]]
        same = not changed
        require(same, "out", f"{out}, a run with other {', '.join(changed)}", "another folder")
        require(not (out / "run.json").is_file(), "out", f"{out}, a finished run", "another folder")
        return
    empty = not out.exists() or not any(out.iterdir())
    require(empty, "out", f"{out}, which holds something else", "a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(notes) as path:
        path.write_text(json.dumps(settings, indent=1, default=str))


def _last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    folder = out / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else str(found)
