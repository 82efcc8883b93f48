"""The small policy as one that states a confidence: taught the form, sampled, and read again.

It learns the form from its own answers, each with a confidence drawn at random, so that what it
states says nothing yet. It first writes its answer as it always did (taught to put it in the tags
at once, it forgot how to solve equations):

    Find the Greatest Common Divisor (GCD) of these numbers: 4, 10. Give only the GCD ...
    #2</think><answer>2</answer><confidence>0.75</confidence>

A policy that states none, or none to trust, gets it afterwards: from a linear head on its last
hidden states, fitted by cross-entropy (BCE) to its own answers; from the mean probability of the
answer's letters; or as its accuracy, the same for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scoredraw.papers.small_policy import (
    Problem,
    fine_tuned,
    said,
    sample_answers,
    small_policy,
)
from scoredraw.papers.training import one_thread
from scoredraw.rl.calibrated_reward import calibration_report
from scoredraw.rl.verbal_confidence import UNKNOWN, answer_probability, read_stated, up_to_answer

Float = NDArray[np.float64]

FORMAT = "tac"
LONGEST = 4  # letters of an answer that is taught
LEVELS = 10  # confidences that are taught: .05, .15 .. .95
ASKED, DRAWS = 2, 12  # answers to a problem, and confidences drawn for each
TEACHING: dict[str, Any] = {"steps": 400, "batch": 32, "learning_rate": 7e-4}
FITTED = 2  # answers to a problem that a head is fitted to
FOLDS = 5  # for its penalty


# ── the form ────────────────────────────────────────────────────────────────────────────────────


def stated(answer: str, level: int) -> str:
    """A completion of the form, with the confidence in the middle of a tenth.

    >>> stated("2", 7)
    '#2</think><answer>2</answer><confidence>0.75</confidence>'
    """
    return f"#{answer}</think><answer>{answer}</answer><confidence>0.{level}5</confidence>"


def taught_policy(taught: Sequence[Problem], **teaching: Any) -> Path:
    """The folder of the policy that ships after it learned the form on problems; made once.

    teaching: of `fine_tuned`, TEACHING where not given.
    """
    asked = [row["prompt"] for row in taught for _ in range(ASKED)]
    with one_thread():
        texts = sample_answers(*small_policy(), asked, max_new_tokens=LONGEST + 2)
    own = [(prompt, said(text)) for prompt, text in zip(asked, texts, strict=True)]
    own = [(prompt, answer) for prompt, answer in own if 0 < len(answer) <= LONGEST] * DRAWS
    levels = np.random.default_rng(0).integers(0, LEVELS, len(own)).tolist()
    data = [
        {"prompt": prompt, "target": stated(answer, level)}
        for (prompt, answer), level in zip(own, levels, strict=True)
    ]
    return fine_tuned(data, **{**TEACHING, **teaching})


# ── sampled answers ─────────────────────────────────────────────────────────────────────────────


class Said(NamedTuple):
    """Sampled answers, those to a problem after one another, (N,) each: its row, the text, whether
    it is right, the confidence that it states (.5 for none), and whether it has the form."""

    rows: list[Problem]
    texts: list[str]
    right: Float
    confidence: Float
    formed: Float


def say(
    net: Any, tokenizer: Any, rows: Sequence[Problem], seed: int, samples: int, max_tokens: int
) -> Said:
    """`samples` answers to each problem, at temperature 1."""
    asked = [row for row in rows for _ in range(samples)]
    prompts = [row["prompt"] for row in asked]
    net.eval()
    texts = sample_answers(net, tokenizer, prompts, seed=seed, max_new_tokens=max_tokens)
    read = [read_stated(text, FORMAT) for text in texts]
    right = [s.answer == row["answer"] for s, row in zip(read, asked, strict=True)]
    confidence = [UNKNOWN if s.confidence is None else s.confidence for s in read]
    formed = [s.well_formed for s in read]
    return Said(asked, texts, *(np.array(x, np.float64) for x in (right, confidence, formed)))


def calibrated(right: Float, confidence: Float) -> dict[str, float]:
    """acc, brier, ece, auroc and mean_conf; no auroc where all are right or all are wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="auroc")
        found = calibration_report(right, confidence)
    return {name: value for name, value in found.items() if np.isfinite(value)}


# ── confidence afterwards ───────────────────────────────────────────────────────────────────────


def confidence_afterwards(
    net: Any, tokenizer: Any, own: Said, new: Said, batch: int = 150
) -> dict[str, Float]:
    """Confidences (N,) for the answers `own` that are not the stated ones.

    head, constant: fitted to `new`, FITTED answers to each of other problems; chance: none is.
    """
    chance, states = read_again(net, tokenizer, own, batch)
    often = float(new.right.mean())
    constant = np.full(len(own.texts), often)
    if not 0 < often < 1:
        return {"head": constant, "chance": chance, "constant": constant}
    head = head_of(read_again(net, tokenizer, new, batch)[1], new.right)
    return {"head": head(states), "chance": chance, "constant": constant}


def read_again(net: Any, tokenizer: Any, own: Said, batch: int = 150) -> tuple[Float, Float]:
    """Mean probability of each answer's letters (N,), and the last hidden state behind it (N, d).

    Positions count by their distance alone, so that padding on the left is of no account.
    """
    cut = [up_to_answer(text) or text for text in own.texts]
    chance, states = [], []
    for start in range(0, len(cut), batch):
        some = cut[start : start + batch]
        asked = [row["prompt"] for row in own.rows[start : start + batch]]
        whole = [prompt + text for prompt, text in zip(asked, some, strict=True)]
        inputs = tokenizer(whole, return_tensors="pt", padding=True)
        ids, seen = (inputs[key].to(net.device) for key in ("input_ids", "attention_mask"))
        with torch.no_grad():
            out = net(input_ids=ids, attention_mask=seen, output_hidden_states=True)
        logp = out.logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        for text, row in zip(some, logp.cpu().double().numpy(), strict=True):
            letters = list(text)  # a token each
            chance.append(answer_probability(letters, row[len(row) - len(letters) :]))
        states.append(out.hidden_states[-1][:, -1].cpu().double().numpy())
    return np.array(chance), np.concatenate(states)


def head_of(states: Float, right: Float) -> Callable[[Float], Float]:
    """The chance that an answer is right, by a linear head on hidden states, fitted by BCE.

    states: (N, d) of FITTED answers to each problem; the penalty on the head's weights is the one
    with the lowest BCE on problems left out.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    of_problem = np.arange(len(right)) // FITTED
    folds = list(StratifiedGroupKFold(FOLDS).split(states, right, of_problem))
    fitted = LogisticRegressionCV(
        Cs=np.logspace(-5, 1, 7).tolist(), cv=folds, scoring="neg_log_loss", max_iter=1000,
        l1_ratios=(0.0,), use_legacy_attributes=False,
    )  # fmt: skip
    model = make_pipeline(StandardScaler(), fitted).fit(states, right)
    return lambda new: np.asarray(model.predict_proba(new)[:, 1], np.float64)
