"""Answers with a stated probability: reading them out of text, and choosing by them.

A policy that is to know how sure it is writes, after its reasoning,

    ... </think> <answer>Paris</answer> <analysis>...</analysis> <confidence>0.8</confidence>

The format gate asks for exactly these blocks in this order, with nothing but white space between
them and after them; the reasoning before may be anything. Where confidence is asked for, the last
one has to be a number in [0, 1]. The last answer counts.

    FORMATS    tabc  think, answer, analysis, confidence        tac  without analysis
               tbac  the analysis before the answer             ta   answer only

With N samples to a problem the stated confidences vote (`confidence_vote`), and fresh analyses of
the same answer give a steadier one (`confidence_ensemble`).

Damani et al., "Beyond binary rewards: training LMs to reason about their uncertainty", 2025, arXiv
2507.16806. Its released gate lets "nan" through, which makes the reward NaN; here that is no number
in [0, 1]. Comparing answers in words: Rajpurkar et al. (SQuAD) 2016, arXiv 1606.05250.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scoredraw.answers import NULL, Equal, Key, count_votes, group_answers
from scoredraw.errors import import_extra, require
from scoredraw.math_answers import math_equal

FORMATS = {
    "tabc": ("answer", "analysis", "confidence"),
    "tbac": ("analysis", "answer", "confidence"),
    "tac": ("answer", "confidence"),
    "ta": ("answer",),
}
JOINTS = {
    format: [re.compile(rf"</{a}>\s*<{b}>") for a, b in pairwise(("think", *names))]
    for format, names in FORMATS.items()
}
UNKNOWN = 0.5  # the probability of an answer that isn't there
VOTES = ("max", "weighted", "majority")
SLACK = 1e-12  # sums of equal weights may round apart
Verifier = Callable[[str, Any], Any]
Float = NDArray[np.float64]
Int = NDArray[np.int64]

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")

# ── tags ────────────────────────────────────────────────────────────────────────────────────────


class StatedAnswer(NamedTuple):
    """What a completion says: its last answer and last confidence, and whether the gate is open.

    answer: None without a pair of tags; confidence: None unless it is a number in [0, 1].
    """

    answer: str | None
    confidence: float | None
    well_formed: bool


def read_stated(
    text: str, format: str = "tabc", *, strict_tags: bool = False, percent: bool = False
) -> StatedAnswer:
    """Answer, confidence and gate of a completion; never raises for what the text holds.

    strict_tags: repeated tags close the gate (else the last of each counts); percent: see
    `probability_or_none`. Raises InputError for an unknown format. O(len(text)): the gate is a
    row of joints such as "</answer> <analysis>", each looked for after the one before.

    >>> read_stated("so </think><answer> 4 </answer><confidence>0.9</confidence>", "tac")
    StatedAnswer(answer='4', confidence=0.9, well_formed=True)
    >>> read_stated("so </think><answer>4</answer><confidence>high</confidence>", "tac")
    StatedAnswer(answer='4', confidence=None, well_formed=False)
    """
    check_format(format)
    answers, stated = tagged(text, "answer"), tagged(text, "confidence")
    confidence = probability_or_none(stated[-1], percent) if stated else None
    well_formed = has_format(text, format, strict_tags)
    if "confidence" in FORMATS[format]:
        well_formed = well_formed and confidence is not None
    return StatedAnswer(answers[-1].strip() if answers else None, confidence, well_formed)


def check_format(format: str) -> None:
    """InputError for an unknown format."""
    require(format in FORMATS, "format", repr(format), ", ".join(FORMATS))


def has_format(text: str, format: str, strict_tags: bool = False) -> bool:
    """Whether the blocks are there and in order; what stands in them is not looked at.

    >>> has_format("hm </think> <answer>4</answer>", "ta"), has_format("<answer>4</answer>", "ta")
    (True, False)
    """
    place = 0
    for joint in JOINTS[format]:
        found = joint.search(text, place)
        if found is None:
            return False
        place = found.end()
    last = f"</{FORMATS[format][-1]}>"
    body = text.rstrip()
    if not (body.endswith(last) and len(body) - len(last) >= place):
        return False
    tags = [f"{mark}{name}>" for name in FORMATS[format] for mark in ("<", "</")]
    once = all(text.count(tag) == 1 for tag in [*tags, "</think>"]) and text.count("<think>") < 2
    return once or not strict_tags


def tagged(text: str, tag: str) -> list[str]:
    """What stands between each <tag> and the next </tag>. O(len(text)).

    >>> tagged("<answer>a</answer> or <answer>b</answer>", "answer")
    ['a', 'b']
    """
    return [text[start:stop] for start, stop in tag_spans(text, tag)]


def tag_spans(text: str, tag: str) -> list[tuple[int, int]]:
    """Where that stands."""
    opening, closing, spans, place = f"<{tag}>", f"</{tag}>", [], 0
    while (start := text.find(opening, place)) >= 0:
        start += len(opening)
        stop = text.find(closing, start)
        if stop < 0:
            break
        spans.append((start, stop))
        place = stop + len(closing)
    return spans


# ── confidence ──────────────────────────────────────────────────────────────────────────────────


def probability_or_none(text: str, percent: bool = False) -> float | None:
    """The number in [0, 1] that a text is, else None: so for "high", "nan", "inf", "1.3", "90%".

    percent: "90%" is 0.9, and so is a bare number above 1, "90"; "0.9" stays what it is.

    >>> [probability_or_none(text) for text in (" 0.9 ", "1e-1", "nan", "1.3", "90%")]
    [0.9, 0.1, None, None, None]
    >>> [probability_or_none(text, percent=True) for text in ("90", "90%", "0.9", "1%", "101")]
    [0.9, 0.9, 0.9, 0.01, None]
    """
    said = text.strip()
    signed = percent and said.endswith("%")
    try:
        value = float(said.removesuffix("%") if signed else said)
    except ValueError:
        return None
    if signed or (percent and value > 1):
        value /= 100
    return value if 0 <= value <= 1 else None  # false for nan


def logged_confidence(text: str) -> float:
    """The last confidence, clipped to [0, 1], whatever the gate says; 0 if there is no number.

    >>> [logged_confidence(f"<confidence>{said}</confidence>") for said in (0.4, 1.3, "high")]
    [0.4, 1.0, 0.0]
    """
    stated = tagged(text, "confidence")
    try:
        value = float(stated[-1]) if stated else 0.0
    except ValueError:
        return 0.0
    return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)


def answer_probability(tokens: Sequence[str], logprobs: ArrayLike) -> float:
    """Mean probability of the tokens of the last answer, 0.5 without one: a confidence unasked for.

        (1/|T|) Σ_{t in T} exp(logp_t),   T the tokens that overlap what stands in the answer tags

    tokens: (T,) texts that joined are the completion; logprobs: (T,) of what was sampled, <= 0.
    Raises InputError for lengths that differ and for what is no log-probability. O(T).

    >>> import numpy as np
    >>> answer_probability(["so <answer>", "4", "2", "</answer>"], np.log([1.0, 0.5, 0.9, 0.1]))
    0.7
    """
    p = np.asarray(logprobs, np.float64)
    require(p.shape == (len(tokens),), "logprobs", f"shape {p.shape}", f"({len(tokens)},)")
    require(bool((p <= 1e-9).all()), "logprobs", "above 0 or NaN", "log-probabilities")
    spans = tag_spans("".join(tokens), "answer")
    if not spans:
        return UNKNOWN
    start, stop = spans[-1]
    ends = np.fromiter(accumulate(map(len, tokens)), np.int64, len(tokens))
    starts = np.concatenate([[0], ends[:-1]])
    inside = (starts < stop) & (ends > start)
    return float(np.exp(p[inside]).mean()) if inside.any() else UNKNOWN


def up_to_answer(text: str) -> str | None:
    """A completion as far as its last answer, to have what follows sampled again; None without one.

    >>> up_to_answer("</think> <answer>4</answer> <confidence>0.3</confidence>")
    '</think> <answer>4</answer>'
    """
    spans = tag_spans(text, "answer")
    return text[: spans[-1][1]] + "</answer>" if spans else None


# ── correctness ─────────────────────────────────────────────────────────────────────────────────


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single blanks (SQuAD).

    >>> normalize_answer(" The  Beatles! ")
    'beatles'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, gold: Any) -> bool:
    """Whether answer and gold are the same words.

    Where nothing is left of them (the choice "A" is an article) they are compared as they are, so
    that an empty answer isn't right, as in the released check.

    >>> exact_match("the beatles!", "Beatles"), exact_match("Queen", "Beatles")
    (True, False)
    >>> exact_match("a", "A"), exact_match("", "A")
    (True, False)
    """
    said, right = normalize_answer(answer), normalize_answer(str(gold))
    return said == right if said or right else answer.strip().lower() == str(gold).strip().lower()


def math_match(answer: str, gold: Any) -> bool:
    """Whether answer and gold are the same mathematics (math-verify, gold first).

    >>> math_match("0.5", "1/2")  # doctest: +SKIP
    True
    """
    return math_equal(gold, answer)


VERIFIERS: dict[str, Verifier] = {"exact": exact_match, "math": math_match}


def find_verifier(verifier: str | Verifier) -> Verifier:
    """A function (answer, gold) -> bool, or a credit in [0, 1], by its name "exact" or "math".

    Raises InputError for another name and MissingExtraError for "math" without math-verify.
    """
    if callable(verifier):
        return verifier
    require(verifier in VERIFIERS, "verifier", repr(verifier), f"{', '.join(VERIFIERS)} or code")
    if verifier == "math":
        import_extra("math_verify", "language")
    return VERIFIERS[verifier]


def verifiers_by_source(
    verifier: str | Verifier | Mapping[str, str | Verifier],
) -> Callable[[Any], Verifier | None]:
    """The verifier of a row from its source: the same for all, or of a mapping, None if not in it.

    >>> of = verifiers_by_source({"hotpot": "exact", "math": lambda answer, gold: False})
    >>> of("hotpot") is exact_match, of("gpqa")
    (True, None)
    """
    if not isinstance(verifier, Mapping):
        one = find_verifier(verifier)
        return lambda source: one
    require(bool(verifier), "verifier", "an empty mapping", "a verifier a source")
    known: dict[Any, Verifier] = {source: find_verifier(each) for source, each in verifier.items()}
    return lambda source: known.get(source) if isinstance(source, Hashable) else None


# ── choosing among samples ──────────────────────────────────────────────────────────────────────


class ConfidenceVote(NamedTuple):
    """The answer chosen and the sample it is taken from, None and -1 without any; and the distinct
    answers as first seen, with what each got."""

    answer: Any
    sample: int
    answers: tuple[Any, ...]
    scores: Float


def confidence_vote(
    answers: Sequence[Any],
    confidences: ArrayLike,
    how: str = "max",
    *,
    equal: Equal | None = None,
    key: Key | None = None,
) -> ConfidenceVote:
    """One of N sampled answers to a problem, by the confidence stated with each.

    how: "max" max_i q_i; "weighted" Σ_{i: y_i = a} q_i; "majority" #{i: y_i = a}. Ties go to the
    answer seen first. answers: (N,), None for none; confidences: (N,) in [0, 1], NaN where none is
    stated: such a sample has no weight, but counts in the majority. equal, key: as
    `answers.group_answers`. Raises InputError for no answers, other lengths, values or `how`. O(N).

    >>> vote = confidence_vote(["A", "B", "B", "C"], [0.8, 0.5, 0.45, 0.9], how="weighted")
    >>> vote.answer, vote.scores.tolist()
    ('B', [0.8, 0.95, 0.9])
    """
    codes = group_answers(list(answers), equal=equal, key=key)
    q = np.asarray(confidences, np.float64)
    sample = int(vote_in_rows(codes[None], q[None], how)[0])
    known, first = np.unique(codes, return_index=True)
    first = first[known != NULL]
    scores = _standing(codes[None], q[None], how)[0]
    distinct = tuple(answers[i] for i in first)
    answer = None if sample < 0 else distinct[codes[sample]]
    return ConfidenceVote(answer, sample, distinct, scores)


def vote_in_rows(codes: ArrayLike, confidences: ArrayLike, how: str = "max") -> Int:
    """`confidence_vote` of P problems at once: the sample each submits, int64 (P,), -1 for none.

    codes: int (P, N), equal answers of a row numbered as they appear, -1 for none; confidences:
    (P, N). "max" gives its sample, the others the first of the answer. O(P (N + answers)).

    >>> vote_in_rows([[0, 1, 1, -1], [0, 1, 0, 2]], [[0.9, 0.5, 0.5, 1.0], [0.2, 0.3, 0.1, 0.9]])
    array([0, 3])
    >>> vote_in_rows([[0, 1, 1, -1]], [[0.9, 0.5, 0.5, 1.0]], "weighted")
    array([1])
    """
    require(how in VOTES, "how", repr(how), ", ".join(VOTES))
    code, q = np.asarray(codes, np.int64), np.asarray(confidences, np.float64)
    fits = code.ndim == 2 and code.size > 0
    require(fits, "answers", f"shape {code.shape}", "one or more")
    require(q.shape == code.shape, "confidences", f"shape {q.shape}", f"{code.shape}, one each")
    outside = q[(q < 0) | (q > 1)]
    require(not outside.size, "confidences", outside[:1].tolist(), "in [0, 1], or NaN for none")
    if how == "max":
        each = np.where((code == NULL) | np.isnan(q), -np.inf, q)
    else:
        standing = _standing(code, q, how)
        padded = np.concatenate([standing, np.full((len(code), 1), -np.inf)], axis=1)
        each = np.take_along_axis(padded, code, axis=1)
    best = each.max(axis=1, keepdims=True)
    chosen = np.argmax(each >= best - SLACK, axis=1)
    return np.where(np.isfinite(best[:, 0]), chosen, NULL)


def _standing(code: Int, q: Float, how: str) -> Float:
    """What each answer of each row gets, (P, G)."""
    weight = np.nan_to_num(q, nan=0.0)
    if how != "max":
        return count_votes(code, weight if how == "weighted" else None)
    score = np.full((len(code), int(code.max(initial=NULL)) + 2), -np.inf)
    np.maximum.at(score, (np.arange(len(code))[:, None], code), np.where(np.isnan(q), -np.inf, q))
    return score[:, :-1]


def confidence_ensemble(
    prompts: Sequence[str],
    completions: Sequence[str],
    continue_text: Callable[[str, int], Sequence[str]],
    k: int = 8,
    *,
    percent: bool = False,
) -> Float:
    """Confidence averaged over k fresh analyses of the same answer, float64 (B,).

    q̄_i = mean of the q that k continuations of prompt_i + completion_i up to </answer> end with.
    continue_text(text, k) gives k continuations of a text. Those without a number in [0, 1] don't
    count; NaN where none is left, and where the completion has no answer. In format "tbac" the
    analysis comes before the answer and stays. Raises InputError for lengths that differ and
    another number of continuations. B calls.

    >>> fresh = lambda text, k: [f"<confidence>0.{i + 1}</confidence>" for i in range(k)]
    >>> confidence_ensemble(["?"], ["</think><answer>4</answer>"], fresh, k=3).round(6).tolist()
    [0.2]
    """
    require(k >= 1, "k", k, "at least 1")
    n = len(completions)
    require(len(prompts) == n, "prompts", f"{len(prompts)}", f"{n}, one a completion")
    means = np.full(n, np.nan)
    for i, completion in enumerate(completions):
        prefix = up_to_answer(completion)
        if prefix is None:
            continue
        made = list(continue_text(prompts[i] + prefix, k))
        require(len(made) == k, "continue_text", f"{len(made)} texts", f"{k} continuations")
        said = [probability_or_none(s[-1], percent) for t in made if (s := tagged(t, "confidence"))]
        numbers = [q for q in said if q is not None]
        if numbers:
            means[i] = np.mean(numbers)
    return means
