r"""A small language model that answers twice: a question, and again when asked to.

    How many times does the letter "e" appear in the text: "owner of the Project"?
    #2
    again:
    #3

The small policy that ships answers half of such questions right, without working out, so that there
is room for two attempts. It is taught the second one by imitation, on fresh questions (made by
reasoning-gym, the extra `gym`):

    question                               ->  the first attempt that it had sampled itself
    question, that attempt, "\nagain:\n"   ->  the right answer

so that its first attempts stay what they were. Nobody says whether a first attempt was right. (As
much teaching leaves second attempts at sums, 1 % right, and at divisors, 16 %, far below the first:
the numbers to compute with are not found again from there.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from scoredraw.journal import atomic_path
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.small_policy import (
    FOLDER,
    Problem,
    fine_tuned,
    problems,
    shipped_problems,
)
from scoredraw.papers.studies import fingerprint
from scoredraw.rl.policy_training import final_answer, find_reward, open_policy
from scoredraw.rl.self_correction import self_correction_metrics

AGAIN = "\nagain:\n"  # the correction prompt
FAMILY = "letter_counting"
FRESH_SEED = 1_000_000  # far from that of the problems that ship and their like


class Attempt(NamedTuple):
    """What was written; ended: by the policy itself, not at the limit."""

    text: str
    ended: bool


class Episode(NamedTuple):
    """Two attempts and whether each is right; the second is empty where the first did not end."""

    problem: Problem
    first: Attempt
    second: Attempt
    right: tuple[bool, bool]


def second_prompt(tokenizer: Any, prompt: str, first: str) -> str:
    """What a second attempt goes on from; the end of the first stays, as `SCoReTrainer` has it."""
    return f"{prompt}{first}{tokenizer.eos_token}{AGAIN}"


# ── sampling ────────────────────────────────────────────────────────────────────────────────────


def attempts(
    net: Any, tokenizer: Any, contexts: Sequence[str], max_tokens: int, batch: int = 256
) -> list[Attempt]:
    """One for each context, sampled at temperature 1 from torch's generator."""
    found: list[Attempt] = []
    for start in range(0, len(contexts), batch):
        some = tokenizer(list(contexts[start : start + batch]), return_tensors="pt", padding=True)
        ids, seen = some["input_ids"].to(net.device), some["attention_mask"].to(net.device)
        with torch.no_grad():
            out = net.generate(
                input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id,
            )[:, ids.shape[1] :]  # fmt: skip
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        found += map(Attempt, texts, (out == tokenizer.eos_token_id).any(dim=1).tolist())
    return found


def episodes(net: Any, tokenizer: Any, rows: Sequence[Problem], max_tokens: int) -> list[Episode]:
    """One for each problem."""
    first = attempts(net, tokenizer, [row["prompt"] for row in rows], max_tokens)
    ended = [(row["prompt"], one.text) for row, one in zip(rows, first, strict=True) if one.ended]
    contexts = [second_prompt(tokenizer, prompt, text) for prompt, text in ended]
    again = iter(attempts(net, tokenizer, contexts, max_tokens))
    second = [next(again) if one.ended else Attempt("", False) for one in first]
    right = zip(*(are_right(rows, tried) for tried in (first, second)), strict=True)
    return list(map(Episode, rows, first, second, right))


def are_right(rows: Sequence[Problem], tried: Sequence[Attempt]) -> list[bool]:
    """Whether each attempt ends in its problem's answer."""
    texts, golds = [one.text for one in tried], [row["answer"] for row in rows]
    rewards = find_reward("exact")(prompts=texts, completions=texts, answer=golds)
    return [reward == 1 for reward in rewards]


def measured(
    source: str, rows: Sequence[Problem], seed: int, samples: int, max_tokens: int
) -> dict[str, float]:
    """Shares of `samples` episodes a problem of the policy in a folder.

    Those of `self_correction_metrics`, and same: the second answer is the first.
    """
    net, tokenizer = open_policy(source)
    each = [row for row in rows for _ in range(samples)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = episodes(net.eval(), tokenizer, each, max_tokens)
    return shares(found)


def shares(found: Sequence[Episode]) -> dict[str, float]:
    first, second = zip(*(episode.right for episode in found), strict=True)
    missing = torch.tensor([not episode.first.ended for episode in found])
    same = [
        episode.first.ended
        and final_answer(episode.first.text) == final_answer(episode.second.text)
        for episode in found
    ]
    known = self_correction_metrics(first, second, missing)._asdict()
    return {**known, "same": float(np.mean(same))}


# ── teaching ────────────────────────────────────────────────────────────────────────────────────


def taught_policy(fresh: int, steps: int, max_tokens: int) -> str:
    """The folder of the small policy after `steps` of imitation; fresh: how many questions.

    It and what was imitated are kept in the cache; made in about two minutes on one core.
    """
    asked = repr((fresh, max_tokens, AGAIN, FAMILY, fingerprint(FOLDER)))
    key = hashlib.blake2s(asked.encode(), digest_size=8).hexdigest()
    kept = cache_directory() / f"second-attempts-{key}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as path:
            path.write_text(json.dumps(lessons(fresh_problems(fresh), max_tokens)))
    return str(fine_tuned(json.loads(kept.read_text()), steps=steps))


def lessons(asked: Sequence[Problem], max_tokens: int, seed: int = 0) -> list[Problem]:
    """Prompts and targets: of each whose first attempt ended, that and a right second one."""
    net, tokenizer = open_policy(str(FOLDER))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tried = attempts(net.eval(), tokenizer, [row["prompt"] for row in asked], max_tokens)
    found = []
    for row, first in zip(asked, tried, strict=True):
        if first.ended:
            again = second_prompt(tokenizer, row["prompt"], first.text)
            found.append({"prompt": row["prompt"], "target": first.text})
            found.append({"prompt": again, "target": row["target"]})
    return found


def fresh_problems(n: int) -> list[Problem]:
    """Up to n different questions, none of them among those that ship."""
    shipped = shipped_problems("train", [FAMILY]) + shipped_problems("test", [FAMILY])
    known = {row["prompt"] for row in shipped}
    made = problems(FAMILY, n, FRESH_SEED)
    return list({row["prompt"]: row for row in made if row["prompt"] not in known}.values())
